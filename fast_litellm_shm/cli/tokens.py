"""``fast-shm tokens``: count the tokens of files, exactly as tiktoken does."""

from __future__ import annotations

import argparse
import codecs
import errno
import io
import json
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from fast_litellm_shm import exceptions
from fast_litellm_shm.cli import blocks, render
from fast_litellm_shm.tokens import encoding, prices, vocabulary

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_PROGRESS_FROM = 32 << 20  # bytes of a file: about a quarter of a second
_WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class _Counter:
    """Counts in one encoding."""

    encoding: str
    count: Callable[[str], int]
    in_blocks: bool  # else a file is counted as one text


@dataclass
class _File:
    """What was found in one file."""

    name: str
    tokens: int = 0
    size: int = 0  # bytes
    cost: float | None = None  # dollars, as input of one request
    error: str | None = None


def _encoding_of(args: argparse.Namespace) -> str:
    """The name of the encoding. Says on stderr where a count is only an estimate."""
    if args.encoding is not None:
        name: str = args.encoding
        path = vocabulary.path_of(name) if name.isidentifier() else None
        if not (path and os.path.exists(path)) and name not in encoding.names():  # loads tiktoken
            known = ", ".join(sorted(encoding.names()))
            raise exceptions.FastShmError(
                f"there is no encoding '{render.escaped(name)}'; there are {known}"
            )
        return name
    if args.model is None:
        return encoding.DEFAULT
    found = encoding.name_of(args.model, "")
    if not found:
        print(
            f"fast-shm: tiktoken has no encoding for the model {render.escaped(args.model)}: "
            f"counted in {encoding.DEFAULT}, which is an estimate",
            file=sys.stderr,
        )
    return found or encoding.DEFAULT


def _is_watched() -> bool:
    """Whether a person sees stderr."""
    return sys.stderr is not None and sys.stderr.isatty()


def _counter(name: str) -> _Counter:
    path = vocabulary.path_of(name)
    if _is_watched() and path and not os.path.exists(path):
        print(f"Making the tables of {name}, once for this host: 1 to 3 s.", file=sys.stderr)
    found = vocabulary.load(name)
    if found is not None:
        return _Counter(name, found.count, True)
    encode = encoding.load(name).encode_ordinary
    return _Counter(name, lambda text: len(encode(text)), False)


# reading -----------------------------------------------------------------------------------------


@contextmanager
def _opened(name: str) -> Iterator[IO[bytes]]:
    if name != "-":
        with open(name, "rb") as file:
            yield file
    elif isinstance(sys.stdin, io.TextIOWrapper):
        yield sys.stdin.buffer
    else:
        raise OSError(errno.EBADF, "standard input is closed")


def _reader(file: IO[bytes]) -> Callable[[int], bytes]:
    """read(), for which one Ctrl-D ends what is typed, and which never returns None."""
    typed, ended = file.isatty(), False

    def read(size: int) -> bytes:
        nonlocal ended
        data: bytes | None = b"" if ended else file.read(size)
        if data is None:
            raise BlockingIOError(errno.EAGAIN, "it does not block, and has nothing at this moment")
        ended = typed and len(data) < size
        return data

    return read


class _Display:
    """A line on stderr for each large file while it is counted, if stderr is a terminal."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def advance(self, name: str, done: int, size: int | None) -> None:
        """So many bytes of a file are counted; size: of the file, None where that is not known."""
        if (done if size is None else size) < _PROGRESS_FROM or not _is_watched():
            return
        if self._progress is None:
            self._progress = _progress()
            self._progress.start()
        if self._task is None:
            self._task = self._progress.add_task(render.escaped(name), total=size)
        self._progress.update(self._task, completed=done)

    def end(self) -> None:
        """Of the file: the line goes away."""
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None


def _progress() -> Progress:
    from fast_litellm_shm._shared.dependencies import rich  # noqa: F401, I001 - may be missing
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    plain = bool(os.environ.get("NO_COLOR"))
    out = Console(stderr=True, color_system=None if plain else "auto", highlight=False)
    name = Column(no_wrap=True, overflow="ellipsis", ratio=1)
    return Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(compact=True),
        console=out,
        transient=True,
        expand=True,
        disable=out.is_dumb_terminal,
    )


def _count(name: str, args: argparse.Namespace, by: _Counter, display: _Display) -> _File:
    found = _File(name)
    try:
        with _opened(name) as file:
            state = os.fstat(file.fileno())
            size = state.st_size if stat.S_ISREG(state.st_mode) else None
            errors = "replace" if args.replace else "strict"
            for text, read in blocks.texts(_reader(file), errors, by.in_blocks):
                found.tokens += by.count(text)
                found.size += read
                display.advance(os.path.basename(_shown(name)), found.size, size)
    except OSError as error:
        found.error = error.strerror or str(error)
    except blocks.NotUTF8Error as error:
        found.error = _not_utf8(name, error)
    except MemoryError:
        found.error = "there is not enough memory for its longest part that cannot be cut"
    finally:
        display.end()
    return found


def _not_utf8(name: str, error: blocks.NotUTF8Error) -> str:
    if error.offset == 0 and error.found.startswith(_WIDE):
        file = "" if name == "-" else f" {render.escaped(shlex.quote(name))}"
        return f"it is UTF-16. `iconv -f UTF-16 -t UTF-8{file} | fast-shm tokens -` counts it"
    return (
        f"it is not UTF-8: byte 0x{error.found[0]:02x} at offset {error.offset:,}. --replace "
        "counts it all the same, with U+FFFD there"
    )


# showing -----------------------------------------------------------------------------------------


def _shown(name: str) -> str:
    return "standard input" if name == "-" else name


def _dollars(cost: float) -> str:
    return f"${cost:,.4f}" if cost >= 0.0001 or not cost else "< $0.0001"


def _price(files: list[_File], model: str | None) -> None:
    """Set the cost of each file, if the model's price is known."""
    if model is None:
        return
    try:
        for each in files:
            each.cost = prices.estimate_cost(each.tokens, 0, model)
    except exceptions.UnknownModelError:
        return
    except exceptions.PriceFileError as error:
        print(f"fast-shm: no costs are shown: {error}", file=sys.stderr)


def _print(files: list[_File], by: _Counter, args: argparse.Namespace) -> None:
    counted = [each for each in files if each.error is None]
    if not counted:
        return
    priced = counted[-1].cost is not None
    total = _File("total", sum(f.tokens for f in counted), sum(f.size for f in counted))
    total.cost = sum(f.cost or 0 for f in counted) if priced else None
    rows = counted if len(files) == 1 else [*counted, total]
    columns = (">tokens", ">size", *([">input cost"] if priced else []), "file")

    def cells(each: _File) -> tuple[str, ...]:
        cost = [_dollars(each.cost)] if each.cost is not None else []
        name = "total" if each is total else render.escaped(_shown(each.name))
        return (f"{each.tokens:,}", render.size(each.size), *cost, name)

    out = render.console()
    whose = f" ({render.escaped(args.model)})" if args.model else ""
    made = render.table("", columns, [cells(each) for each in rows], out)
    for line, each in zip(made.rows, rows, strict=True):
        if each is total:
            line.style = "bold"
        elif args.max is not None and each.tokens > args.max:
            line.style = "red"
    out.print(f"{by.encoding}{whose}", style="bold", soft_wrap=True)
    out.print(made)


def _json(files: list[_File], by: _Counter, args: argparse.Namespace) -> str:
    """A JSON object, with a line for each file."""

    def row(each: _File) -> dict[str, Any]:
        found: dict[str, Any] = {"file": each.name, "tokens": None, "size_bytes": None}
        if each.error is not None:
            return found | {"error": each.error}
        found |= {"tokens": each.tokens, "size_bytes": each.size}
        if args.max is not None:
            found["fits"] = each.tokens <= args.max
        if args.model is not None:
            found["input_cost"] = each.cost
        return found | {"error": None}

    tokens = sum(each.tokens for each in files if each.error is None)
    head = {"encoding": by.encoding, "model": args.model, "tokens": tokens}
    lines = ",\n  ".join(json.dumps(row(each)) for each in files)
    return json.dumps(head)[:-1] + f',\n "files": [\n  {lines}\n ]}}'


def run(args: argparse.Namespace) -> int:
    """Count each file, and print the counts."""
    by = _counter(_encoding_of(args))
    display = _Display()
    files = []
    for name in args.file or ["-"]:
        files.append(_count(name, args, by, display))
        if files[-1].error is not None:
            shown = render.escaped(_shown(name))
            print(f"fast-shm: {shown} was not counted: {files[-1].error}", file=sys.stderr)
    counted = [each for each in files if each.error is None]
    _price(counted, args.model)
    if args.json:
        print(_json(files, by, args))
    else:
        _print(files, by, args)
    sys.stdout.flush()
    over = [] if args.max is None else [each for each in counted if each.tokens > args.max]
    for each in over:
        print(
            f"fast-shm: {render.escaped(_shown(each.name))} has "
            f"{render.counted(each.tokens - args.max, 'token')} more than {args.max:,}",
            file=sys.stderr,
        )
    return 1 if over or len(counted) < len(files) else 0
