"""PathPattern: ``/users/{id}/*``, matched in a time that grows with the length of the path alone.

A client chooses the path, and a regular expression that backtracks takes the square of its length:
``*{a}-{b}*`` took 12 s for 20,000 characters. So a pattern runs as an automaton with all its states
at once: each bit of an integer is a position in the path, and each part of the pattern moves all
positions by a few operations on integers.
"""

from __future__ import annotations

import re

_WILDCARD = re.compile(r"(\{\w*\}|\*+)")
_NAME, _STAR = "{", "*"  # as which wildcards stand among the parts; no literal has these characters


class PathPattern:
    """``{name}`` stands for one segment of the path, or for a part of one that is not empty; ``*``
    for anything, also ``/``; all else for itself. Raises ValueError for a pattern that can match no
    path."""

    def __init__(self, pattern: str) -> None:
        if not pattern.startswith(("/", "*")):
            raise ValueError(f"Rule: path must begin with '/', not {pattern!r}")
        self._prefix, *parts = _WILDCARD.split(pattern)
        if set("{}<>") & set("".join([self._prefix, *parts[1::2]])):
            raise ValueError(
                f"Rule: path {pattern!r} has braces that are no {{name}}; write {{name}} for one "
                "segment, * for anything, or give a compiled regular expression"
            )
        self._parts = [part[:1] if at % 2 == 0 else part for at, part in enumerate(parts) if part]
        self.has_names = _NAME in self._parts

    def matches(self, path: str, *, empty_names: bool = False) -> bool:
        """Does the whole path match? empty_names: a ``{name}`` may be empty."""
        if not path.startswith(self._prefix):
            return False
        if self._parts == [_STAR]:
            return True
        length = len(path)
        positions = 1 << len(self._prefix)  # bit i: path[:i] matches the parts so far
        in_segment = ((1 << length) - 1) ^ _occurrences(path, "/") if self.has_names else 0
        for part in self._parts:
            if part == _STAR:  # from the first position on, all
                positions = -(positions & -positions) & ((2 << length) - 1)
            elif part == _NAME:
                if not empty_names:
                    positions = (positions & in_segment) << 1
                # The carry of the sum runs from each position to the end of its segment; XOR leaves
                # what it has changed.
                carried = ((positions & in_segment) + in_segment) ^ in_segment
                positions |= carried
            else:
                positions = (positions & _occurrences(path, part)) << len(part)
            if not positions:
                return False
        return bool(positions >> length)


def _occurrences(path: str, text: str) -> int:
    """Bit i: the text stands at path[i:]."""
    bits = bytearray(len(path) // 8 + 1)
    at = path.find(text)
    while at >= 0:
        bits[at >> 3] |= 1 << (at & 7)
        at = path.find(text, at + 1)
    return int.from_bytes(bits, "little")
