"""RateLimiter: the limits of a name, enforced together by all processes of the host."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm.handle import SharedLimits, key_bytes
from fast_litellm_shm.limits import AnyLimit
from fast_litellm_shm.native import Decision, lib
from fast_litellm_shm.segment import Segment

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Cost: TypeAlias = int | tuple[int, ...] | list[int]

_FOREVER = 2**62  # ns
_LATE = 1_000_000_000  # ns: a waiter that wakes this late has lost its turn


class Batch(NamedTuple):
    """The answers of :meth:`RateLimiter.acquire_many`, one element for each key."""

    allowed: NDArray[numpy.bool_]
    remaining: NDArray[numpy.uint64]
    retry_after: NDArray[numpy.float64]  # seconds; inf: never


def deadline_ns(timeout: float | None) -> int:
    """A time-out in seconds as an instant of time.monotonic_ns(); None: never."""
    if timeout is None:
        return _FOREVER * 2
    if not isinstance(timeout, (int, float)) or math.isnan(timeout):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return time.monotonic_ns() + round(max(min(timeout, 4e9), 0) * 1e9)


class RateLimiter(SharedLimits):
    """Admit requests by key, under one or several limits, shared by all processes.

    limits: 1 to 4 of Limit, Window, SlidingWindow; a request is admitted when all of them have
    room, and a denied one consumes nothing. name: processes that use the same name share; default:
    a name made of the limits. The limits belong to the name: setting others (here, or in any
    process) changes them for all at their next call, and what was consumed stays consumed. segment:
    default ``Segment.default()``. on_full: what to do when the segment has no room for another key:
    ``"deny"`` (with retry_after 1 s), ``"allow"``, or ``"raise"`` SegmentFullError.

    Keys are ``str`` or ``bytes`` of any length; a str is the same key as its UTF-8 bytes. A cost is
    an int of 0 or more, or one int for each limit. Safe from any thread and any process; a fork
    needs no care.
    """

    def __init__(
        self,
        *limits_: AnyLimit,
        name: str | None = None,
        segment: Segment | None = None,
        on_full: str = "deny",
    ) -> None:
        super().__init__(limits.checked(limits_), name=name, segment=segment, on_full=on_full)

    def reset(self, key: str | bytes | None = None) -> None:
        """Forget what a key has consumed; None: what all keys of this limiter have."""
        if key is None:
            status = lib.fshm_reset_all(self._handle)
        else:
            raw = key_bytes(key)
            status = lib.fshm_reset_key(self._handle, raw, len(raw))
        if status != lib.FSHM_OK:
            self._failed(status)

    def acquire_many(self, keys: Sequence[str | bytes], cost: int | Sequence[int] = 1) -> Batch:
        """acquire() for each key, in order. cost: one int for all, or one for each key.

        Returns numpy arrays: allowed, remaining, retry_after (seconds; inf: never).
        """
        import numpy

        keys = tuple(keys)
        costs: int | list[int] = list(cost) if isinstance(cost, Iterable) else cost
        if isinstance(costs, list) and len(costs) != len(keys):
            raise ValueError(
                f"cost has {len(costs)} values for {len(keys)} keys: give one for each"
            )
        count = len(keys)
        allowed, remaining, retry = bytearray(count), bytearray(8 * count), bytearray(8 * count)
        self._acquire_many(keys, costs, allowed, remaining, retry)
        return Batch(
            numpy.frombuffer(allowed, numpy.bool_),
            numpy.frombuffer(remaining, numpy.uint64),
            numpy.frombuffer(retry, numpy.float64),
        )

    def wait(self, key: str | bytes, cost: Cost = 1, timeout: float | None = None) -> Decision:
        """Block until admitted; at most ``timeout`` seconds.

        On token buckets the waiter reserves its instant at once, so waiters are served in order,
        and sleeps until then. Denied at once where its turn would come after the deadline, or
        never. An interrupt gives the reservation back, if nobody has reserved after it. With a
        window, it sleeps until there is room and tries again.
        """
        deadline = deadline_ns(timeout)
        while True:
            decision, pause, token = self._next(key, cost, deadline)
            due = time.monotonic_ns() + pause
            if pause:
                try:
                    time.sleep(pause / 1e9)
                except BaseException:
                    if decision:
                        self._cancel(key, cost, token)
                    raise
            if not pause or (decision and time.monotonic_ns() - due < _LATE):
                return decision

    async def wait_async(
        self, key: str | bytes, cost: Cost = 1, timeout: float | None = None
    ) -> Decision:
        """wait() for asyncio. Cancelling it gives the reservation back, if it is the last in the
        queue; else its instant passes unused, since those behind it keep theirs."""
        deadline = deadline_ns(timeout)
        while True:
            decision, pause, token = self._next(key, cost, deadline)
            due = time.monotonic_ns() + pause
            if pause:
                try:
                    await asyncio.sleep(pause / 1e9)
                except BaseException:
                    if decision:
                        self._cancel(key, cost, token)
                    raise
            if not pause or (decision and time.monotonic_ns() - due < _LATE):
                return decision

    def _next(self, key: str | bytes, cost: Cost, deadline: int) -> tuple[Decision, int, bytes]:
        """One step of a wait: the decision, how long to sleep, and what to cancel it by. After the
        sleep an admitted decision is the caller's (it was charged ahead), a denied one is to be
        asked again. 0: done."""
        left = max(deadline - time.monotonic_ns(), 0)
        decision, pause, token = self._reserve(key, cost, min(left, _FOREVER))
        if not decision:
            retry = decision.retry_after_ns
            pause = retry if retry is not None and retry <= left else 0
        return decision, pause, token

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.limits, self._name, self._segment, self._on_full))

    def __repr__(self) -> str:
        shown = ", ".join(repr(limit) for limit in self.limits)
        return f"{type(self).__name__}({shown}, name={self._name!r})"


def _rebuild(
    cls: type[RateLimiter], found: tuple[AnyLimit, ...], name: str, segment: Segment, on_full: str
) -> RateLimiter:
    limiter = cls.__new__(cls)
    SharedLimits.__init__(limiter, found, name=name, segment=segment, on_full=on_full, keep=True)
    return limiter
