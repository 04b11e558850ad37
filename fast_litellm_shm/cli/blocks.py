"""The text of a file of any size, in blocks that can be counted one by one.

A block ends where a text may be cut: the tokens of both sides are those of the whole, in every
encoding whose pattern the engine knows. csrc/DESIGN.md, "Counting tokens", has the argument.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterator

SIZE = 1 << 22  # bytes that are read at a time

# From the beginning of a text to the last place where it may be cut: between a character that is no
# space and a space; behind a line end between two others; between a letter and a digit of ASCII.
# What (?=...) looks at comes behind the place.
TO_LAST_CUT = re.compile(r"(?s:.*)(?:\S(?= )|\S\n(?=[^\s/])|[A-Za-z](?=[0-9]))")


class NotUTF8Error(Exception):
    """A file is not UTF-8. ``offset``: of the first byte that is wrong; ``found``: the bytes
    there."""

    def __init__(self, offset: int, found: bytes) -> None:
        super().__init__(offset, found)
        self.offset, self.found = offset, found


def texts(
    read: Callable[[int], bytes], errors: str = "strict", cut: bool = True
) -> Iterator[tuple[str, int]]:
    """What a file holds, in blocks, each with the number of bytes that were read since the last.

    read: returns at most so many bytes, none at the end. errors: ``strict`` raises NotUTF8Error;
    ``replace`` puts U+FFFD for what is not UTF-8. cut: False for one block. Where a text has no
    place to cut, the block goes on to the next one."""
    text, rest = "", b""
    offset = taken = 0  # of `rest` in the file; bytes since the last block
    while True:
        data = read(max(SIZE, taken))  # as much again: a long block is searched a few times only
        taken += len(data)
        rest += data
        try:
            more, used = codecs.utf_8_decode(rest, errors, not data)
        except UnicodeDecodeError as error:
            raise NotUTF8Error(offset + error.start, rest[error.start : error.start + 4]) from None
        offset += used
        rest = rest[used:]
        searched = max(len(text) - 2, 0)  # a place may lie between two reads
        text += more
        if not data:
            yield text, taken
            return
        end = TO_LAST_CUT.match(text, searched) if cut else None
        if end:
            yield text[: end.end()], taken
            text, taken = text[end.end() :], 0
