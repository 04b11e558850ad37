"""How things are shown: safe text, sizes and times for people, tables for terminals and pipes."""

from __future__ import annotations

import io
import os
import sys
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_PIPE_WIDTH = 1_000_000  # a pipe has no right margin: rows are never cut
_GAP, _NARROW = 3, 8  # between columns; no column of text is cut below this
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}
_BARS = "▁▂▃▄▅▆▇"  # not a full block: rows would run into each other
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def escaped(value: str | bytes) -> str:
    """Text that cannot move the cursor, turn the writing direction, or break a line. $'...' in bash
    reads it back."""
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


def size(count: float) -> str:
    """Bytes for people: ``10.9 MiB``."""
    for unit in _UNITS:
        if count < 1024 or unit == _UNITS[-1]:
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def duration(seconds: float) -> str:
    """A time for people: ``350 ms``, ``4.2 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    big, small, of, part = ("min", "s", 60, 1)
    if seconds >= 86400:
        big, small, of, part = ("d", "h", 86400, 3600)
    elif seconds >= 3600:
        big, small, of, part = ("h", "min", 3600, 60)
    whole, rest = divmod(int(seconds), of)
    return f"{whole} {big}" + (f" {rest // part} {small}" if rest >= part else "")


def brief(seconds: float | None) -> str:
    """The same in at most six columns: ``350ms``, ``4.2s``, ``3m20s``, ``2h05m``, ``3d04h``."""
    if seconds is None:
        return "never"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}ms"
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    seconds = round(seconds)
    for limit, big, small, of, part in (
        (3600, "m", "s", 60, 1),
        (86_400, "h", "m", 3600, 60),
        (100 * 86_400, "d", "h", 86_400, 3600),
    ):
        if seconds < limit:
            whole, rest = divmod(seconds, of)
            return f"{whole}{big}{rest // part:02}{small}"
    return f"{seconds / 86_400:,.0f}d"


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


def sparkline(values: Sequence[float], width: int, most: float | None = None) -> str:
    """The last values as bars, the newest at the right, of at most ``most`` (default: the greatest
    of them). What is above 0 can be told from 0."""
    shown = list(values)[-width:] if width > 0 else []
    top = max(shown, default=0) if most is None else most
    bars = "".join(
        _BARS[0] if value <= 0 else _BARS[min(int(value / top * 6) + 1, 6)] if top else _BARS[0]
        for value in shown
    )
    return bars.rjust(width)


def waiting(retry_after: float | None) -> str:
    """The column "wait": until a cost of 1 fits."""
    if retry_after is None:
        return "never"
    return duration(retry_after) if retry_after else "-"


def console() -> Console:
    """Standard output: colours on a terminal alone (and not with NO_COLOR), full rows in a pipe."""
    from fast_litellm_shm._shared.dependencies import rich  # noqa: F401, I001 - may be missing
    from rich.console import Console

    class Output(Console):
        def on_broken_pipe(self) -> None:
            """A reader that has seen enough is no failure: rich would exit with 1."""
            raise BrokenPipeError

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # whatever the locale can write
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


def limited(rows: list[Any], most: int | None) -> tuple[list[Any], list[RenderableType]]:
    """The first rows, and a line that says how many are left out."""
    from rich.text import Text

    if most is None or len(rows) <= most:
        return rows, []
    return rows[:most], [Text(f"... and {len(rows) - most} more: --json has all", style="dim")]


def table(
    title: str,
    columns: tuple[str, ...],
    rows: Sequence[tuple[str, ...]],
    out: Console,
    least: list[int] | None = None,
) -> Table:
    """A table of cells that are taken as they are: no markup, no emoji codes. A column whose name
    begins with ``>`` is a number: aligned right and never cut; where a terminal is too narrow, the
    widest of the others give way. least: widths to hold, and then no head: it goes on from a table
    before it."""
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
    widths = column_widths(names, rows) if least is None else least
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


def column_widths(names: list[str], rows: Sequence[tuple[str, ...]]) -> list[int]:
    """How wide each column wants to be."""
    from rich.cells import cell_len

    columns = zip(names, *rows, strict=True)
    return [max(cell_len(cell) for cell in column) for column in columns]
