"""The store of LiteLLM's built-in limiter (its ``RateLimitsHandle``), in the segment.

It stands in the place of LiteLLM's Redis client, and behaves as LiteLLM's Lua scripts do. The
segment needs no round trip, so nothing is sent in batches or after the answer. The memory of each
worker, where LiteLLM mirrors Redis, is used only while the segment is not available.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.litellm import failures, settings
from fast_litellm_shm.integrations.litellm.builtin_limiter.slots import Refused, Slots
from fast_litellm_shm.integrations.litellm.builtin_limiter.windows import OpenWindow, Windows

T = TypeVar("T")

_GAUGE = "max_parallel_requests"  # the suffixes of LiteLLM's entries
_WINDOW = "window"
_SLOT_SECONDS = 3600.0  # LiteLLM's PARALLEL_REQUEST_SLOT_TTL_SECONDS
_RETRY_SECONDS = 1.0  # between two attempts to open the segment
_MOST_SCOPES = 10_000  # that are remembered as counted in memory

# The windows in which this request has reserved tokens, by scope and kind. When LiteLLM settles a
# reservation, it says only by how much it was too large: that is given back to its own window.
_Reserved: TypeAlias = "dict[tuple[str, str], OpenWindow]"
_reserved: ContextVar[_Reserved | None] = ContextVar("fast_litellm_shm_reserved", default=None)


class Script(Generic[T]):
    """Like a declared Redis script: it runs when it is awaited, without a pause, once."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[[], T]) -> None:
        self._run = run

    def resolve(self) -> Script[T]:
        return self

    def __await__(self) -> Generator[Any, None, T]:
        yield from ()
        return self._run()


class _Shared(NamedTuple):
    windows: Windows
    slots: Slots


def _scope(scope: Any) -> str:
    """As LiteLLM writes it in Redis: operators know it by that."""
    return f"{{{scope.descriptor_key}:{scope.descriptor_value}}}"


class Handle:
    """memory: LiteLLM's own handle without Redis. replies: LiteLLM's module with the types of the
    answers. window_size: seconds of windows that come without their size.

    The segment is opened at the first use: a server that preloads makes this object before it
    forks, and a worker must not die of a segment. After a failure, the next attempt is a second
    later. Until then :attr:`has_redis` is false, and LiteLLM counts in its memory; if ``fail_open``
    is false, every script raises instead, and LiteLLM refuses.
    """

    def __init__(self, memory: Any, replies: ModuleType, window_size: int = 60) -> None:
        self._memory, self._replies = memory, replies
        self.window_size = window_size
        self._opened: _Shared | None = None
        self._why: Exception | None = None
        self._retry_at = 0.0
        # Scopes that LiteLLM counts in memory, since the segment failed; and until when.
        self._in_memory: dict[str, float] = {}

    def missing(self) -> Exception | None:
        """Why there is no segment; None where there is one."""
        return self._why if self._shared() is None else None

    def _shared(self) -> _Shared | None:
        if self._opened is None and time.monotonic() >= self._retry_at:
            try:
                segment = Segment.default()
                self._opened = _Shared(Windows(segment, self.window_size), Slots(segment))
            except Exception as error:  # of any kind: fail_open decides
                self._why, self._retry_at = error, time.monotonic() + _RETRY_SECONDS
        return self._opened

    def _script(self, scopes: Sequence[str], run: Callable[[_Shared], T]) -> Script[T]:
        """LiteLLM takes an exception of a script for an outage of Redis: by ``fail_closed`` it
        refuses the request, else it counts it in this worker's memory."""

        def attempt() -> T:
            try:
                shared = self._shared()
                if shared is None:
                    raise exceptions.SegmentError(str(self._why))
                return run(shared)
            except Exception as error:
                self._count_in_memory(scopes)
                policy = "counts alone" if settings.current().fail_open else "refuses it with 503"
                failures.report("LiteLLM's limiter", error, f"this worker {policy}")
                raise

        return Script(attempt)

    # What LiteLLM keeps in the worker ---------------------------------------------------------

    def _count_in_memory(self, scopes: Sequence[str]) -> None:
        """LiteLLM counts these in memory now: so for a window's length they are read there."""
        if len(self._in_memory) > _MOST_SCOPES:
            self._in_memory.clear()
        self._in_memory.update(dict.fromkeys(scopes, time.monotonic() + self.window_size))

    def _counts_in_memory(self, scope: str) -> bool:
        if self._in_memory and time.monotonic() >= self._in_memory.get(scope, 0.0):
            self._in_memory.pop(scope, None)
        return scope in self._in_memory or self._shared() is None

    @property
    def has_redis(self) -> bool:
        return self._shared() is not None or not settings.current().fail_open

    def slot_groups(self, scopes: Sequence[Any], force: bool) -> Any:
        """One group: no Redis Cluster spreads the scopes over servers."""
        return self._memory.slot_groups(scopes, False)

    def get_local(self, entry: Any) -> Any:
        """LiteLLM reads here first, and denies what is over its limit without counting it. So this
        returns the segment's counts. Slots: only the segment decides, when they are acquired."""
        scope = _scope(entry.scope)
        if entry.suffix == _GAUGE or self._counts_in_memory(scope):
            return self._memory.get_local(entry)
        try:
            return None if entry.suffix == _WINDOW else self._value(entry)
        except Exception:  # the script that follows reports it
            return None

    def set_local(self, entry: Any, value: Any, ttl_seconds: float | None) -> None:
        """Mirrors of the segment's counts are dropped. A dict is LiteLLM's own register of slots,
        which it keeps where the segment failed."""
        alone = self._counts_in_memory(_scope(entry.scope))
        if isinstance(value, dict) or (alone if entry.suffix != _GAUGE else self._opened is None):
            self._memory.set_local(entry, value, ttl_seconds)

    # Reading ----------------------------------------------------------------------------------

    def _value(self, entry: Any) -> Any:
        shared, scope = self._shared(), _scope(entry.scope)
        if shared is None:
            return self._memory.get_local(entry)
        if entry.suffix == _GAUGE:
            return shared.slots.count(scope)
        window = shared.windows.find(scope)
        if window is None:
            return None
        if entry.suffix == _WINDOW:
            return str(window.start)
        return shared.windows.count(window, scope, entry.suffix)

    async def get(self, entry: Any, *, backfill_ttl_seconds: float | None = None) -> Any:
        return self._value(entry)

    def read_counters(self, counters: Sequence[Any], send: Any) -> Script[list[str | None]]:
        def run(shared: _Shared) -> list[str | None]:
            found: list[str | None] = []
            for counter in counters:
                scope = _scope(counter.scope)
                window = shared.windows.find(scope)
                if window is None:
                    found += (None, None)
                else:
                    count = shared.windows.count(window, scope, counter.suffix)
                    found += (str(window.start), str(count))
            return found

        return self._script(_scopes(counters), run)

    # Counting ---------------------------------------------------------------------------------

    def sliding_window(
        self, counters: Sequence[Any], now: int, window_size: int, send: Any
    ) -> Script[list[Any]]:
        """Count 1 in each, over its limit or not. ``now``, the worker's clock, is not used: all
        workers go by the segment's clock."""

        def run(shared: _Shared) -> list[Any]:
            windows, found = shared.windows, []
            with contextlib.ExitStack() as undo:
                for counter in counters:
                    scope, kind = _scope(counter.scope), counter.suffix
                    window = windows.open(scope, window_size)
                    count = windows.add(window, scope, kind, 1)
                    undo.callback(windows.give_back, window, scope, kind, 1)
                    found.append(self._replies.WindowCount(str(window.start), count))
                undo.pop_all()  # nothing failed
            return found

        return self._script(_scopes(counters), run)

    def check_and_increment(self, counters: Sequence[Any], send: Any) -> Script[Any]:
        """Count all; or none, where one has no room. No counter ever exceeds its limit."""
        reserved = _reserved.get()
        if reserved is None:  # set here: the script may run in a task of its own
            reserved = {}
            _reserved.set(reserved)

        def run(shared: _Shared) -> Any:
            windows, found = shared.windows, []
            taken_in: _Reserved = {}
            with contextlib.ExitStack() as undo:
                for index, each in enumerate(counters):
                    scope, kind = _scope(each.counter.scope), each.counter.suffix
                    taken = windows.take(scope, kind, each.window_size, each.increment, each.limit)
                    window = taken.window
                    if not taken.allowed or window is None:
                        return self._replies.AtomicOverLimit(index, taken.total, each.limit)
                    undo.callback(windows.give_back, window, scope, kind, each.increment)
                    taken_in[scope, kind] = window
                    found.append((taken.total, window.start))
                undo.pop_all()  # all are counted
            reserved.update(taken_in)
            return self._replies.AtomicApplied(found)

        return self._script([_scope(each.counter.scope) for each in counters], run)

    def guarded_increment(
        self,
        counter: Any,
        expected_window_start: str,
        amount: float,
        ttl_seconds: int | None,
        send: Any,
    ) -> Script[Any]:
        """Count, or give back, where the window that began at that time is still open."""

        def run(shared: _Shared) -> Any:
            scope, windows = _scope(counter.scope), shared.windows
            window = windows.find(scope, ttl_seconds, expected_window_start)
            if window is None:
                other = windows.find(scope, ttl_seconds)
                count = 0 if other is None else windows.count(other, scope, counter.suffix)
                return self._replies.GuardedReply(False, count)
            count = _add(windows, window, scope, counter.suffix, amount)
            return self._replies.GuardedReply(True, count)

        return self._script([_scope(counter.scope)], run)

    def token_increment(self, increments: Sequence[Any], send: Any) -> Script[list[float]]:
        return self._script(
            [_scope(each.counter.scope) for each in increments],
            lambda shared: [_increment(shared.windows, each) for each in increments],
        )

    def token_increment_post_call(self, request: Any, increments: Sequence[Any]) -> bool:
        """False: it was not queued, so LiteLLM does it now."""
        return False

    async def increment(self, increment: Any) -> int | float:
        try:
            return (await self.token_increment([increment], None))[0]
        except Exception:  # reported already; LiteLLM does the same without Redis
            return await self._memory.increment(increment)  # type: ignore[no-any-return]

    async def increment_many(self, increments: Sequence[Any]) -> None:
        try:
            await self.token_increment(increments, None)
        except Exception:
            await self._memory.increment_many(increments)

    def increment_many_post_call(self, request: Any, increments: Sequence[Any]) -> None:
        try:
            self.token_increment(increments, None)._run()
        except Exception:
            self._memory.increment_many_post_call(request, increments)

    # Slots ------------------------------------------------------------------------------------

    def parallel_acquire(
        self,
        gauges: Sequence[tuple[Any, int]],
        slot_ttl_seconds: int,
        slot_id: str,
        send: Any,
    ) -> Script[Any]:
        named = [(_scope(scope), limit) for scope, limit in gauges]

        def run(shared: _Shared) -> Any:
            found = shared.slots.acquire(named, slot_id, slot_ttl_seconds)
            if isinstance(found, Refused):
                limit = named[found.which][1]
                return self._replies.GaugeOverLimit(found.which, found.in_flight, limit)
            return self._replies.GaugesAcquired(found)

        return self._script([scope for scope, _ in named], run)

    def parallel_release(self, gauges: Sequence[Any], slot_id: str, send: Any) -> Script[list[int]]:
        def run(shared: _Shared) -> list[int]:
            named = [_scope(scope) for scope in gauges]
            shared.slots.release(named, slot_id)
            for scope in gauges:  # or the slot was taken in memory, while the segment had failed
                kept = self._memory.get_local(scope.gauge)
                if isinstance(kept, dict) and kept.pop(slot_id, None) is not None:
                    self._memory.set_local(scope.gauge, kept, _SLOT_SECONDS)
            return [shared.slots.count(scope) for scope in named]

        return self._script([_scope(scope) for scope in gauges], run)

    def parallel_release_post_call(self, request: Any, gauges: Sequence[Any], slot_id: str) -> bool:
        """False: it was not queued, so LiteLLM does it now."""
        return False

    def parallel_count(
        self, gauges: Sequence[Any], slot_ttl_seconds: int, send: Any
    ) -> Script[list[int]]:
        named = [_scope(scope) for scope in gauges]
        return self._script(named, lambda shared: [shared.slots.count(scope) for scope in named])


def _scopes(counters: Sequence[Any]) -> list[str]:
    return [_scope(counter.scope) for counter in counters]


def _add(windows: Windows, window: OpenWindow, scope: str, kind: str, amount: float) -> int:
    """amount: tokens, with a fraction where LiteLLM weighs them (PTU shares); < 0: give back."""
    whole = round(amount)
    if whole >= 0:
        return windows.add(window, scope, kind, whole)
    windows.give_back(window, scope, kind, -whole)
    return windows.count(window, scope, kind)


def _increment(windows: Windows, increment: Any) -> float:
    """Where no window is open nothing is counted. The next one begins at 0, as in Redis."""
    scope, kind = _scope(increment.counter.scope), increment.counter.suffix
    window = (_reserved.get() or {}).get((scope, kind)) if increment.amount < 0 else None
    window = window or windows.find(scope, increment.ttl)
    return float(_add(windows, window, scope, kind, increment.amount)) if window else 0.0
