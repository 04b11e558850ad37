"""Count many new texts on all cores, where that is faster; else one after another.

tiktoken runs without the GIL. But threads that share an encoding wait for each other's regular
expressions, and together are hardly faster than one. So each helping thread has an encoding of its
own: 20 to 45 MB. Making one takes 40 to 80 ms; tiktoken holds the GIL meanwhile, so the whole
process stands still. So helpers are made one by one, each in a thread of the pool, when the process
has spent as much time in large batches. Until then it counts without threads.

With helpers, several short texts are encoded in one call, with a special token between them.
tiktoken splits there first, so it encodes each text as if it were alone, and a thread takes the GIL
once for many texts.
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

_LEAST = 100_000  # characters, about 2 ms: for fewer, waking a thread costs more than it saves
_LEAST_MEAN = 50  # characters a text: with shorter ones, a fifth or more of the work is serial
_PART = 2_000_000  # characters in one round: helpers that are made meanwhile join the next round
_SHORT = 4_000  # characters: shorter texts are joined with others
_UNIT = 20_000  # characters that a thread takes at a time, about 0.5 ms
_SECONDS_PER_HELPER = 0.1  # of large batches, for each helper
_MOST_HELPERS = 7
_GAIN = 1.2  # times as fast as one thread: below that, the other cores are busy
_ALONE_SECONDS = 0.25  # then this process counts without helpers for so long

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
    """In a forked child, which has no threads: helpers that were borrowed or in the making are
    made again."""
    global _executor, _lock
    _executor, _lock = None, threading.Lock()
    for counter in _counters:
        counter._made, counter._making = len(counter._idle), False


os.register_at_fork(after_in_child=_forget_threads)


def is_large(texts: int, chars: int) -> bool:
    """Whether helpers would make a batch of so many texts and characters faster."""
    return chars >= _LEAST and chars >= texts * _LEAST_MEAN


def parts(texts: list[str], chars: int) -> Iterator[tuple[list[str], int]]:
    """The texts in rounds of at most _PART characters (or one text), in order, each with its number
    of characters. chars: of all texts together."""
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
    """Counts lists of texts with one encoding. One thread uses it at a time."""

    def __init__(self, found: Any) -> None:
        self._encode = found.encode_ordinary
        self._to_numpy = getattr(found, "encode_to_numpy", None)
        self._end = found.eot_token if self._to_numpy else 0
        self._between = found.decode([self._end]) if self._to_numpy else ""

    def count(self, texts: list[str]) -> list[int]:
        """The tokens of each text. Of several texts, none may contain the separating token."""
        if len(texts) > 1 and self._to_numpy is not None:
            try:
                return self._count_joined(texts)
            except UnicodeEncodeError:
                pass  # lone surrogates, which encode_ordinary() replaces
        return [len(self._encode(text)) for text in texts]

    def _count_joined(self, texts: list[str]) -> list[int]:
        from fast_litellm_shm._shared.dependencies import numpy

        assert self._to_numpy is not None
        between = self._between
        tokens = self._to_numpy(
            between.join(texts), allowed_special={between}, disallowed_special=()
        )
        ends = numpy.flatnonzero(tokens == self._end)
        counts: list[int] = (numpy.diff(ends, prepend=-1, append=len(tokens)) - 1).tolist()
        return counts

    def may_be_joined(self, text: str) -> bool:
        """Whether it is short, and does not contain the separating token."""
        return len(text) < _SHORT and self._to_numpy is not None and self._between not in text


class BatchCounter:
    """Counts texts in one encoding, with helping threads. Safe from any thread."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first = _Encoder(encoding.load(name))
        self._idle: list[_Encoder] = []  # encodings of helpers that are free
        self._made = 0
        self._making = False
        self._spent = 0.0  # seconds
        self._alone_until = 0.0  # of time.monotonic()
        _counters.add(self)

    def may_help(self, texts: int, chars: int) -> bool:
        """Whether count() is expected to be faster than one text after another."""
        rested = time.monotonic() >= self._alone_until
        return is_large(texts, chars) and bool(self._idle) and rested

    def count(self, texts: list[str]) -> dict[str, int]:
        """The tokens of different texts, by text. Raises what tiktoken raises in any thread."""
        found: dict[str, int] = {}
        units, chars = self._units(texts)
        worked: list[float] = []  # seconds of a processor, by thread

        def work(encoder: _Encoder) -> None:
            begun = time.thread_time()
            while True:
                try:
                    unit = units.pop()  # atomic: no two threads get the same unit
                except IndexError:
                    break
                found.update(zip(unit, encoder.count(unit), strict=True))
            worked.append(time.thread_time() - begun)

        begun = time.perf_counter()
        helpers = self._borrow(min(len(units), chars // _UNIT) - 1)
        started: list[Future[None]] = []
        try:
            with suppress(RuntimeError):  # no thread can be started, or Python is ending
                for helper in helpers:
                    started.append(_threads().submit(work, helper))
            work(self._first)
        finally:
            units.clear()  # empty, or this thread has failed: then the others stop
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
        """Units of work (one long text, or several short ones), and the sum of their characters.
        Threads pop from the end: the longest come first, so that all threads end together."""
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
        with suppress(IndexError):  # no more are free
            while len(out) < wanted:
                out.append(self._idle.pop())
        return out

    def spend(self, seconds: float) -> None:
        """Add the seconds of a large batch; make another helper when the sum is worth it."""
        with _lock:
            self._spent += seconds
            worth = min(_cores() - 1, _MOST_HELPERS, int(self._spent / _SECONDS_PER_HELPER))
            if self._making or self._made >= worth:
                return
            self._making = True
            self._made += 1
        with suppress(RuntimeError):  # no thread can be started, or Python is ending
            _threads().submit(self._make)

    def _make(self) -> None:
        """Make another helper. Where that fails, it is not tried again."""
        time.sleep(0.01)  # the batch that asked for it returns first
        try:
            # numpy: imported here, and not in a batch
            from fast_litellm_shm._shared.dependencies import numpy, tiktoken  # noqa: F401

            found = encoding.load(self._name)
            parts: dict[str, Any] = {  # as tiktoken's documentation makes one from another
                "pat_str": found._pat_str,
                "mergeable_ranks": found._mergeable_ranks,
                "special_tokens": found._special_tokens,
            }
            self._idle.append(_Encoder(tiktoken.Encoding(self._name, **parts)))
        finally:
            self._making = False
