"""PathPattern: ``/users/{id}/*``, matched in a time that grows in proportion to the length of the
path.

A client chooses the path, and a regular expression that backtracks takes the square of its length:
``*{a}-{b}*`` took 12 s for 20,000 characters. So a pattern runs as an automaton with all its states
at once: each bit of an integer is a position in the path (in UTF-8), and each part of the pattern
moves all positions by a few operations on integers and bytes.
"""

from __future__ import annotations

import re

_WILDCARD = re.compile(r"(\{\w*\}|\*+)")
# As which wildcards stand among the parts; no literal has these characters.
_NAME, _STAR = b"{", b"*"
_STARTS = bytes(48 + (byte & 0xC0 != 0x80) for byte in range(256))  # "1": a character begins


class PathPattern:
    """``{name}`` stands for one segment of the path, or for a part of one that is not empty; ``*``
    for anything, also ``/``; all else for itself. Raises ValueError for a pattern that can match no
    path."""

    def __init__(self, pattern: str) -> None:
        if not pattern.startswith(("/", "*")):
            raise ValueError(f"Rule: path must begin with '/', not {pattern!r}")
        prefix, *parts = _WILDCARD.split(pattern)
        self.beginning = prefix  # of each path that it matches
        if set("{}<>") & set("".join([prefix, *parts[1::2]])):
            raise ValueError(
                f"Rule: path {pattern!r} has braces that are no {{name}}; write {{name}} for one "
                "segment, * for anything, or give a compiled regular expression"
            )
        parts = [part[:1] if at % 2 == 0 else part for at, part in enumerate(parts) if part]
        self._prefix, *self._parts = (
            each.encode("utf-8", "surrogatepass") for each in (prefix, *parts)
        )
        self.has_names = _NAME in self._parts

    def matches(self, path: str, *, empty_names: bool = False) -> bool:
        """Does the whole path match? empty_names: a ``{name}`` may be empty."""
        text = path.encode("utf-8", "surrogatepass")
        if not text.startswith(self._prefix):
            return False
        if self._parts == [_STAR]:
            return True
        every = (2 << len(text)) - 1
        starts = every if path.isascii() else _bits(text, _STARTS) | 1 << len(text)
        in_segment = every >> 1 & ~_bits(text, _only(ord("/"))) if self.has_names else 0
        positions = 1 << len(self._prefix)  # bit i: text[:i] matches the parts so far
        for part in self._parts:
            if part == _STAR:  # from the first position on, all
                positions = -(positions & -positions) & starts
            elif part == _NAME:
                if not empty_names:
                    positions = (positions & in_segment) << 1
                # The carry of the sum runs from each position to the end of its segment; XOR leaves
                # what it has changed.
                positions |= ((positions & in_segment) + in_segment) ^ in_segment
                positions &= starts
            else:
                positions = (positions & _occurrences(text, part)) << len(part)
            if not positions:
                return False
        return bool(positions >> len(text))


def _occurrences(text: bytes, part: bytes) -> int:
    """Bit i: the part stands at text[i:]."""
    first = text.find(part)
    if first == text.rfind(part):  # the usual case: one, or none
        return 1 << first if first >= 0 else 0
    found = -1
    for offset, byte in enumerate(part):
        found &= _bits(text, _only(byte)) >> offset
    return found


def _bits(text: bytes, table: bytes) -> int:
    """Bit i: the table has "1" for text[i]."""
    return int(b"0" + text[::-1].translate(table), 2)


def _only(byte: int) -> bytes:
    """A table that has "1" for one byte, and "0" for all others."""
    return b"0" * byte + b"1" + b"0" * (255 - byte)
