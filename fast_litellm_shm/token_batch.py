"""Many new texts at once: short ones joined, all of them on all cores.

Short texts are encoded in one call, with a special token between them: tiktoken cuts there before
it does anything else, so each is encoded as if alone, and tokens need not become Python objects.

Threads run without the GIL, but those that share one tiktoken encoding wait for each other's
regular expressions, and together are hardly faster than one. So each helping thread has an encoding
of its own: 20 to 45 MB, 0.1 to 0.3 s. They are made one by one, when a process has counted much
text in batches.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any

from fast_litellm_shm import encoding

_SHORT = 4_000  # characters of a text that is joined with others
_UNIT = 20_000  # characters that a thread takes at once, about 2 ms
_CHARS_PER_HELPER = 2_000_000  # counted in batches so far, for each helper that is made
_MOST_HELPERS = 7

_executor: ThreadPoolExecutor | None = None
_lock = threading.Lock()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads() -> ThreadPoolExecutor:
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(_MOST_HELPERS, "fast_litellm_shm tokens")
        return _executor


def _forget_threads() -> None:
    global _executor, _lock
    _executor, _lock = None, threading.Lock()  # its threads do not live in the child


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


class _Encoder:
    """Counts lists of texts by an encoding that one thread uses at a time."""

    def __init__(self, found: Any) -> None:
        self._encode = found.encode_ordinary
        self._to_numpy = getattr(found, "encode_to_numpy", None)
        self._end = found.eot_token if self._to_numpy else 0
        self._between = found.decode([self._end]) if self._to_numpy else ""

    def count(self, texts: list[str]) -> list[int]:
        """The tokens of each. None of several texts holds the token that goes between them."""
        if len(texts) > 1 and self._to_numpy is not None:
            try:
                return self._count_joined(texts)
            except UnicodeEncodeError:
                pass  # lone surrogates, which encode_ordinary() mends
        return [len(self._encode(text)) for text in texts]

    def _count_joined(self, texts: list[str]) -> list[int]:
        import numpy as np

        assert self._to_numpy is not None
        between = self._between
        tokens = self._to_numpy(
            between.join(texts), allowed_special={between}, disallowed_special=()
        )
        ends = np.flatnonzero(tokens == self._end)
        counts: list[int] = (np.diff(ends, prepend=-1, append=len(tokens)) - 1).tolist()
        return counts

    def may_be_joined(self, text: str) -> bool:
        """Whether it is short, and does not hold what goes between."""
        return len(text) < _SHORT and self._to_numpy is not None and self._between not in text


class BatchCounter:
    """Counts texts in one encoding. Used by any number of threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first = _Encoder(encoding.load(name))
        self._helpers: list[_Encoder] = []  # those that nobody uses now
        self._made = 0
        self._chars = 0

    def count(self, texts: list[str]) -> dict[str, int]:
        """The tokens of different texts."""
        found: dict[str, int] = {}
        units, chars = self._units(texts)

        def work(encoder: _Encoder) -> None:
            while True:
                try:
                    unit = units.pop()  # each thread another one
                except IndexError:
                    return
                found.update(zip(unit, encoder.count(unit), strict=True))

        helpers = self._borrow(min(len(units), chars // _UNIT) - 1, chars)
        started: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # no thread is to be had, or Python ends: this one counts
                for helper in helpers:
                    started.append(_threads().submit(work, helper))
            work(self._first)
        finally:
            units.clear()  # nothing is left, or this thread has failed and the rest is not wanted
            running = [future for future in started if not future.cancel()]
            wait(running)
            self._helpers += helpers
        for future in running:
            future.result()
        return found

    def _units(self, texts: list[str]) -> tuple[list[list[str]], int]:
        """What a thread takes at once: one long text, or several short ones; and all characters.
        The longest are last, where they are taken first, so that all threads end together."""
        units: list[list[str]] = []
        short: list[str] = []
        chars = size = 0
        for text in sorted(texts, key=len):
            chars += len(text)
            if not self._first.may_be_joined(text):
                units.append([text])
                continue
            short.append(text)
            size += len(text)
            if size >= _UNIT:
                units.append(short)
                short, size = [], 0
        if short:
            units.append(short)
        return units, chars

    def _borrow(self, wanted: int, chars: int) -> list[_Encoder]:
        """Helpers for this batch; one more is made where that will be worth it."""
        with _lock:
            self._chars += chars
            worth = min(_cores() - 1, _MOST_HELPERS, self._chars // _CHARS_PER_HELPER)
            make = wanted > len(self._helpers) and self._made < worth
            self._made += make
        if make and (helper := self._make()) is not None:
            self._helpers.append(helper)
        out: list[_Encoder] = []
        while len(out) < wanted:
            try:
                out.append(self._helpers.pop())
            except IndexError:
                break
        return out

    def _make(self) -> _Encoder | None:
        import tiktoken

        found = encoding.load(self._name)
        try:  # as tiktoken's own documentation makes an encoding from another
            parts: dict[str, Any] = {
                "pat_str": found._pat_str,
                "mergeable_ranks": found._mergeable_ranks,
                "special_tokens": found._special_tokens,
            }
        except AttributeError:
            return None
        return _Encoder(tiktoken.Encoding(self._name, **parts))
