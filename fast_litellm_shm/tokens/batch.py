"""Many new texts at once, on all cores, where that pays; else the caller counts one after another.

Threads run without the GIL, but those that share one tiktoken encoding wait for each other's
regular expressions, and together are hardly faster than one. So each helping thread has an encoding
of its own: 20 to 45 MB. To make one takes 40 to 80 ms, in which tiktoken holds the GIL, so that the
whole process stands still. They are made one by one, in a thread of the pool, when a process has
spent as much time in large batches; until then it counts as if there were no threads.

Helped, short texts are encoded in one call, with a special token between them: tiktoken cuts there
before it does anything else, so each is encoded as if alone, and no thread has to come back for the
GIL after each of them.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import accumulate
from typing import Any

from fast_litellm_shm.tokens import encoding

_LEAST = 100_000  # characters, about 2 ms: fewer are not worth waking a thread
_LEAST_MEAN = 50  # characters a text: of shorter ones a fifth or more of the work cannot be shared
_PART = 2_000_000  # characters counted at once: helpers that come meanwhile help with the next
_SHORT = 4_000  # characters of a text that is joined with others
_UNIT = 20_000  # characters that a thread takes at once, about 0.5 ms
_SECONDS_PER_HELPER = 0.1  # spent in large batches so far, for each helper that is made
_MOST_HELPERS = 7
_GAIN = 1.2  # times as fast as alone: less, and the other cores have other things to do
_ALONE_SECONDS = 0.25  # then nobody helps for so long

_executor: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_counters: weakref.WeakSet[BatchCounter] = weakref.WeakSet()  # of this process


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
    """In a forked child, where they do not live: what they had in hand is made anew."""
    global _executor, _lock
    _executor, _lock = None, threading.Lock()
    for counter in _counters:
        counter._made, counter._making = len(counter._idle), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def is_large(texts: int, chars: int) -> bool:
    """Whether helpers, where there are any, would make a batch of so many texts quicker."""
    return chars >= _LEAST and chars >= texts * _LEAST_MEAN


def parts(texts: list[str], chars: int) -> Iterator[tuple[list[str], int]]:
    """The texts in order, so many at a time as are counted at once, and their characters. chars: of
    all of them."""
    if chars <= _PART:
        yield texts, chars
        return
    before = list(accumulate(map(len, texts), initial=0))
    start = 0
    while start < len(texts):
        stop = max(bisect_right(before, before[start] + _PART) - 1, start + 1)
        yield texts[start:stop], before[stop] - before[start]
        start = stop


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
    """Counts texts in one encoding, with helping threads. Used by any number of threads."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first = _Encoder(encoding.load(name))
        self._idle: list[_Encoder] = []  # helpers' encodings that nobody uses now
        self._made = 0
        self._making = False
        self._spent = 0.0  # seconds
        self._alone_until = 0.0  # of time.monotonic()
        _counters.add(self)

    def may_help(self, texts: int, chars: int) -> bool:
        """Whether count() will be quicker than one text after another, as far as is known."""
        rested = time.monotonic() >= self._alone_until
        return is_large(texts, chars) and bool(self._idle) and rested

    def count(self, texts: list[str]) -> dict[str, int]:
        """The tokens of different texts. Raises what tiktoken raises, in whichever thread."""
        found: dict[str, int] = {}
        units, chars = self._units(texts)
        worked: list[float] = []  # seconds of a processor, by thread

        def work(encoder: _Encoder) -> None:
            begun = time.thread_time()
            while True:
                try:
                    unit = units.pop()  # each thread another one
                except IndexError:
                    break
                found.update(zip(unit, encoder.count(unit), strict=True))
            worked.append(time.thread_time() - begun)

        begun = time.perf_counter()
        helpers = self._borrow(min(len(units), chars // _UNIT) - 1)
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
            self._idle.extend(helpers)
        for future in running:
            future.result()
        took = time.perf_counter() - begun
        if helpers and sum(worked) < _GAIN * took:
            self._alone_until = time.monotonic() + _ALONE_SECONDS
        self.spend(took)
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

    def _borrow(self, wanted: int) -> list[_Encoder]:
        out: list[_Encoder] = []
        while len(out) < wanted:
            try:
                out.append(self._idle.pop())
            except IndexError:
                break
        return out

    def spend(self, seconds: float) -> None:
        """So long a large batch took: sooner or later another helper is worth it."""
        with _lock:
            self._spent += seconds
            worth = min(_cores() - 1, _MOST_HELPERS, int(self._spent / _SECONDS_PER_HELPER))
            if self._making or self._made >= worth:
                return
            self._making = True
            self._made += 1
        with suppress(RuntimeError):  # no thread is to be had, or Python ends
            _threads().submit(self._make)

    def _make(self) -> None:
        """Another helper. One that cannot be made is not tried again."""
        time.sleep(0.01)  # the batch that it was the last straw of returns first
        try:
            import numpy  # noqa: F401 (here, and not in a batch)
            import tiktoken

            found = encoding.load(self._name)
            parts: dict[str, Any] = {  # as tiktoken's documentation makes one from another
                "pat_str": found._pat_str,
                "mergeable_ranks": found._mergeable_ranks,
                "special_tokens": found._special_tokens,
            }
            self._idle.append(_Encoder(tiktoken.Encoding(self._name, **parts)))
        finally:
            self._making = False
