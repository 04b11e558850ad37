"""Output for people: escaped text, sizes, times, bars, and tables for terminals and pipes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import threading
import unicodedata
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.inspection import is_cut

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_PIPE_WIDTH = 1_000_000  # a pipe has no right margin: rows are never cut
_GAP, _NARROW = 3, 8  # between columns; no column of text is cut below this
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_BARS = "▁▂▃▄▅▆▇"  # not a full block: rows would run into each other
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def escaped(value: str | bytes) -> str:
    """Text without control characters: it cannot move the cursor, reverse the writing direction or
    break a line. ``$'...'`` in bash reads it back."""
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if value.isprintable() and "\\" not in value:
        return value
    return "".join(_escaped(c) for c in value)


def _escaped(c: str) -> str:
    if c in _SHORT:
        return _SHORT[c]
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    if c.isprintable() or unicodedata.category(c) == "Zs":
        return c
    if code < 0x80:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def shown_name(name: str, raw: bytes) -> str:
    """The name of a key, as Inspection.name() returns it, escaped for terminals and readers."""
    if not raw:
        return name or "''"  # a hash, or the empty key
    return escaped(raw) + ("…" if is_cut(name, raw) else "")


def command(text: str | None) -> str:
    """The command line of a process; None: the system does not tell it."""
    return "? (not visible from here)" if text is None else escaped(text)


def counted(count: int, noun: str) -> str:
    """``1 permit``, ``2,000 permits``, ``3 processes``."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def size(count: float) -> str:
    """Bytes for people: ``10.9 MiB``."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def _in_units(seconds: float) -> tuple[int, str, int, str]:
    """A minute or more in its two greatest units: ``(3, "min", 20, "s")``."""
    whole = round(seconds)
    big, small, size, part = "d", "h", 86_400, 3600
    if whole < 3600:
        big, small, size, part = "min", "s", 60, 1
    elif whole < 86_400:
        big, small, size, part = "h", "min", 3600, 60
    return whole // size, big, whole % size // part, small


def duration(seconds: float) -> str:
    """A time for people: ``350 ms``, ``4.2 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole, big, rest, small = _in_units(seconds)
    return f"{whole} {big}" + (f" {rest} {small}" if rest else "")


def brief(seconds: float | None) -> str:
    """The same in at most six columns: ``350ms``, ``4.2s``, ``3m20s``, ``2h05m``, ``3d04h``; None:
    ``never``."""
    if seconds is None:
        return "never"
    if seconds < 59.95:
        return duration(seconds).replace(" ", "")
    if seconds >= 100 * 86_400:
        return f"{seconds / 86_400:,.0f}d"
    whole, big, rest, small = _in_units(seconds)
    return f"{whole}{big[0]}{rest:02}{small[0]}"


def compact(count: float) -> str:
    """A number in at most six columns: ``0.4``, ``12``, ``1,234``, ``12.3k``, ``4.6M``."""
    if count < 9.95 and count != int(count):
        return f"{count:.1f}"
    if count < 9999.5:
        return f"{count:,.0f}"
    for unit in "kMGTP":
        count /= 1000
        if count < 99.95:
            return f"{count:.1f}{unit}"
        if count < 999.5:
            return f"{count:.0f}{unit}"
    return f"{count:.0f}P"


def usd(amount: Decimal) -> str:
    """Dollars, with all their digits: ``$1,234.5``, ``$0.000134``."""
    return f"${amount.normalize():,f}"


def brief_usd(amount: Decimal) -> str:
    """Dollars in at most seven columns, rounded down: ``$49.98``, ``$0.0134``, ``$12.3k``."""
    if amount >= 1000:
        return f"${compact(float(amount))}"
    places = 2 if amount >= 1 else 4
    whole = int(amount.scaleb(places))
    if amount and not whole:
        return "<$.0001"
    return f"${(type(amount)(whole)).scaleb(-places).normalize():f}"


def left(amount: int | Decimal, is_usd: bool) -> str:
    """What is left of a limit, or the limit."""
    return usd(Decimal(amount)) if is_usd else f"{amount:,}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as bars, the newest at the right. The greatest has a full bar. A value above
    0 never looks like 0."""
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0)
    bars = (_BARS[min(int(value / top * 6) + 1, 6) if value > 0 else 0] for value in shown)
    return "".join(bars).rjust(width)


def waiting(retry_after: float | None) -> str:
    """The column "wait": the time until a request of cost 1 is admitted; None: never."""
    if retry_after is None:
        return "never"
    return duration(retry_after) if retry_after else "-"


def import_ahead() -> None:
    """Import what tables need, in a thread. Meanwhile C code looks at a segment, without the GIL,
    which takes about as long for a million keys."""

    def imports() -> None:
        with contextlib.suppress(ImportError):  # console() says so
            import rich.box
            import rich.console
            import rich.table
            import rich.text  # noqa: F401

    threading.Thread(target=imports).start()


def console() -> Console:
    """Standard output. Colours only on a terminal, and not with NO_COLOR; in a pipe, rows are not
    cut."""
    from fast_litellm_shm._shared.dependencies import rich  # noqa: F401, I001 - may be missing
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            """The reader has closed the pipe, as ``head`` does. (rich would exit with 1.)"""
            raise BrokenPipeError

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # the locale may have fewer characters
    terminal = sys.stdout.isatty()
    plain = not terminal or bool(os.environ.get("NO_COLOR"))
    return Output(
        color_system=None if plain else "auto",
        force_terminal=terminal,
        width=None if terminal else _PIPE_WIDTH,
        highlight=False,
        markup=False,
        emoji=False,
    )


def section(
    title: str,
    columns: tuple[str, ...],
    rows: list[Any],
    cells_of: Callable[[Any], tuple[str, ...]],
    out: Console,
    most: int | None,
    is_red: Callable[[Any], bool] = lambda row: False,
) -> list[RenderableType]:
    """A table() of the first ``most`` rows (None: all), and a line that says how many more there
    are. Nothing, if there are no rows."""
    from rich.text import Text

    if not rows:
        return []
    shown = rows if most is None else rows[:most]
    made = table(title, columns, [cells_of(row) for row in shown], out)
    for line, row in zip(made.rows, shown, strict=True):
        line.style = "red" if is_red(row) else ""
    parts: list[RenderableType] = [made]
    if len(shown) < len(rows):
        more = f"... and {len(rows) - len(shown)} more: --json has all"
        parts.append(Text(more, style="dim"))
    return [*parts, Text()]


def table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    out: Console,
    least: list[int] | None = None,
) -> Table:
    """A table of plain text: no markup, no emoji codes.

    A column whose name begins with ``>`` holds numbers: it is aligned right and never cut. On a
    narrow terminal, the widest columns of text are cut. least: the widths of the columns, for a
    table without a head that continues another one."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = [column.lstrip(">") for column in columns]
    made = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        header_style="bold",
        show_edge=False,
        show_header=least is None,
    )
    widths = column_widths(columns, rows) if least is None else least
    texts = [i for i, name in enumerate(names) if columns[i] == name]
    excess = sum(widths) + _GAP * (len(widths) - 1) - out.width
    cut = list(widths)
    while (
        excess > 0 and (widest := max(texts, key=lambda i: cut[i])) >= 0 and cut[widest] > _NARROW
    ):
        cut[widest] -= 1
        excess -= 1
    for i, name in enumerate(names):
        made.add_column(
            Text(name),
            justify="left" if i in texts else "right",
            no_wrap=True,
            overflow="ellipsis",
            width=cut[i] if cut[i] < widths[i] else None,
            min_width=cut[i],
        )
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def column_widths(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[int]:
    """The width that each column of a table() needs."""
    from rich.cells import cell_len

    cells = zip((column.lstrip(">") for column in columns), *rows, strict=True)
    return [max(map(cell_len, column)) for column in cells]
