"""Who holds what, over processes, as the holders themselves say: in a file that all of them map.

A holder writes its row after it was admitted, and clears it before it releases. So a row covers no
more than the time that the permit was held. After it has written its row, it counts the rows of the
same kind: rows that do not change between two looks, and whose processes live meanwhile, were all
held at the end of the first look. More of them than the limit is an over-admission for certain. A
process that was killed lives until the kernel has taken down its memory, which is before its
permits can come back.
"""

from __future__ import annotations

import fcntl
import itertools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

BLOCKS, ROWS = 256, 64  # of processes; of one process
_HEAD = 1 + 256  # words: blocks in use; the most of each kind
_WORDS = _HEAD + BLOCKS * (1 + ROWS)  # of each process: its pid, and its rows


def _lives(pid: int) -> bool:
    """Whether its memory is there; a stopped process lives."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return not file.read().startswith("0 ")
    except OSError:
        return False


class Holders:
    """The file at ``path``, made where it is not there yet. For the process that makes the object;
    holds: it may hold something."""

    def __init__(self, path: str, holds: bool = True) -> None:
        self._path, self._numbers = path, itertools.count(1)
        with open(path, "a+b") as file:
            os.ftruncate(file.fileno(), 8 * _WORDS)
            self._words = memoryview(mmap.mmap(file.fileno(), 8 * _WORDS)).cast("Q")
        self._free = self._claim() if holds else []

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with open(self._path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _claim(self) -> list[int]:
        """Rows for this process, of a block that nobody has, or whose owner is dead."""
        words = self._words
        with self._alone():
            for at in range(_HEAD, _WORDS, 1 + ROWS):
                if not words[at] or not _lives(words[at]):
                    break
            else:
                raise AssertionError("too many processes hold something")
            for row in range(at + 1, at + 1 + ROWS):
                words[row] = 0
            words[at] = os.getpid()
            words[0] = max(words[0], (at - _HEAD) // (1 + ROWS) + 1)
        return list(range(at + 1, at + 1 + ROWS))

    @contextmanager
    def holding(self, kind: int) -> Iterator[None]:
        """During the block, the caller holds one of a kind, 0 to 254."""
        row = self._free.pop()
        self._words[row] = (next(self._numbers) << 8) + kind + 1
        try:
            self._note(kind)
            yield
        finally:
            self._words[row] = 0
            self._free.append(row)

    def _look(self) -> list[int]:
        return self._words[_HEAD : _HEAD + self._words[0] * (1 + ROWS)].tolist()

    def now(self, kind: int) -> int:
        """How many of a kind are held."""
        first = self._look()
        found = [at for at, word in enumerate(first) if word & 0xFF == kind + 1]
        found = [at for at in found if at % (1 + ROWS)]  # the others are pids
        living = {block: _lives(first[block]) for block in {at - at % (1 + ROWS) for at in found}}
        again = self._look()
        return sum(first[at] == again[at] and living[at - at % (1 + ROWS)] for at in found)

    def _note(self, kind: int) -> None:
        count = self.now(kind)
        if count > self._words[1 + kind]:
            with self._alone():
                self._words[1 + kind] = max(self._words[1 + kind], count)

    def most(self, kind: int) -> int:
        """The most of a kind that were held at once."""
        return self._words[1 + kind]
