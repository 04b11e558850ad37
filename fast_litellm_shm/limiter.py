"""RateLimiter: the limits of a name, enforced together by all processes of the host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm.limits import AnyLimit, Limit
from fast_litellm_shm.native import Core, Decision, ffi, lib
from fast_litellm_shm.segment import Segment

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

Cost: TypeAlias = int | tuple[int, ...] | list[int]

_ON_FULL = {"deny": 0, "allow": 1, "raise": 2}
_FOREVER = 2**62  # ns
_LATE = 1_000_000_000  # ns: a waiter that wakes this late has lost its turn


class Batch(NamedTuple):
    """The answers of :meth:`RateLimiter.acquire_many`, one element for each key."""

    allowed: NDArray[numpy.bool_]
    remaining: NDArray[numpy.uint64]
    retry_after: NDArray[numpy.float64]  # seconds; inf: never


def _deadline(timeout: float | None) -> int:
    if timeout is None:
        return _FOREVER * 2
    if not isinstance(timeout, (int, float)) or timeout != timeout:
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return time.monotonic_ns() + round(max(min(timeout, 4e9), 0) * 1e9)


class RateLimiter(Core):
    """Admit requests by key, under one or several limits, shared by all processes.

    limits: 1 to 4 of Limit, Window, SlidingWindow; a request is admitted when all of them have room,
    and a denied one consumes nothing. name: processes that use the same name share; default: a name
    made of the limits. The limits belong to the name: setting others (here, or in any process)
    changes them for all at their next call, and what was consumed stays consumed. segment: default
    ``Segment.default()``. on_full: what to do when the segment has no room for another key:
    ``"deny"`` (with retry_after 1 s), ``"allow"``, or ``"raise"`` SegmentFullError.

    Keys are ``str`` or ``bytes`` of any length; a str is the same key as its UTF-8 bytes. A cost is an
    int of 0 or more, or one int for each limit. Safe from any thread and any process; a fork needs no
    care.
    """

    def __init__(
        self,
        *limits_: AnyLimit,
        name: str | None = None,
        segment: Segment | None = None,
        on_full: str = "deny",
    ) -> None:
        found = limits.checked(limits_)
        if name is None:
            name = " + ".join(limits.describe(limit) for limit in found)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        encoded = name.encode("utf-8", "surrogatepass")
        if not 1 <= len(encoded) <= lib.FSHM_MAX_LIMITER_NAME:
            raise ValueError(
                f"name must be 1 to {lib.FSHM_MAX_LIMITER_NAME} bytes of UTF-8, not {name!r}"
            )
        if on_full not in _ON_FULL:
            raise ValueError(f"on_full must be 'deny', 'allow' or 'raise', not {on_full!r}")
        if segment is not None and not isinstance(segment, Segment):
            raise TypeError(f"segment must be a Segment or None, not {segment!r}")
        self._name, self._on_full = name, on_full
        self._segment = Segment.default() if segment is None else segment
        out = ffi.new("fshm_limiter **")
        raw = ffi.new("fshm_limit[]", [limit._raw() for limit in found])
        status = lib.fshm_limiter_open(
            self._segment._handle, encoded, len(encoded), raw, len(found), out
        )
        if status != lib.FSHM_OK:
            self._failed(status)
        self._handle: Any = ffi.gc(out[0], lib.fshm_limiter_close)
        self._limits_changed()

    @property
    def name(self) -> str:
        """The name that processes share by."""
        return self._name

    @property
    def segment(self) -> Segment:
        """The segment it lives in."""
        return self._segment

    def reset(self, key: str | bytes | None = None) -> None:
        """Forget what a key has consumed; None: what all keys of this limiter have."""
        if key is None:
            status = lib.fshm_reset_all(self._handle)
        else:
            raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
            if not isinstance(raw, bytes):
                raise TypeError(f"key must be a str or bytes, not {key!r}")
            status = lib.fshm_reset_key(self._handle, raw, len(raw))
        if status != lib.FSHM_OK:
            self._failed(status)

    def acquire_many(self, keys: Sequence[str | bytes], cost: int | Sequence[int] = 1) -> Batch:
        """acquire() for each key, in order. cost: one int for all, or one for each key.

        Returns numpy arrays: allowed, remaining, retry_after (seconds; inf: never).
        """
        import numpy

        keys = tuple(keys)
        costs: int | list[int] = cost if isinstance(cost, int) else [int(c) for c in cost]
        if isinstance(costs, list) and len(costs) != len(keys):
            raise ValueError(f"cost has {len(costs)} values for {len(keys)} keys: give one for each")
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

        On token buckets the waiter reserves its instant at once, so waiters are served in order, and
        sleeps until then. Denied at once where its turn would come after the deadline, or never.
        An interrupt gives the reservation back. With a window, it sleeps until there is room and
        tries again.
        """
        deadline = _deadline(timeout)
        while True:
            decision, pause = self._next(key, cost, deadline)
            due = time.monotonic_ns() + pause
            if pause:
                try:
                    time.sleep(pause / 1e9)
                except BaseException:
                    self._give_back(decision, key, cost)
                    raise
            if not pause or (decision and time.monotonic_ns() - due < _LATE):
                return decision

    async def wait_async(
        self, key: str | bytes, cost: Cost = 1, timeout: float | None = None
    ) -> Decision:
        """wait() for asyncio. Cancelling it gives the reservation back."""
        deadline = _deadline(timeout)
        while True:
            decision, pause = self._next(key, cost, deadline)
            due = time.monotonic_ns() + pause
            if pause:
                try:
                    await asyncio.sleep(pause / 1e9)
                except BaseException:
                    self._give_back(decision, key, cost)
                    raise
            if not pause or (decision and time.monotonic_ns() - due < _LATE):
                return decision

    def _next(self, key: str | bytes, cost: Cost, deadline: int) -> tuple[Decision, int]:
        """One step of a wait: the decision, and how long to sleep. After the sleep an admitted
        decision is the caller's (it was charged ahead), a denied one is to be asked again. 0: done."""
        left = max(deadline - time.monotonic_ns(), 0)
        decision, pause = self._reserve(key, cost, min(left, _FOREVER))
        if decision:
            return decision, pause
        retry = decision.retry_after_ns
        only_buckets = all(isinstance(limit, Limit) for limit in self.limits)
        if retry is None or retry > left or (only_buckets and retry == 0):
            return decision, 0
        return decision, retry

    def _give_back(self, decision: Decision, key: str | bytes, cost: Cost) -> None:
        if decision:
            self.refund(key, cost)

    def _limits_changed(self, _status: int = 0) -> None:
        """Called by the native part when it meets another version of the limits."""
        raw, version = ffi.new("fshm_limit[4]"), ffi.new("uint64_t *")
        count = lib.fshm_limiter_limits(self._handle, raw, version)
        if count < 1:
            self._failed(lib.FSHM_E_DAMAGED)
        found = tuple(limits.from_raw(raw[i]) for i in range(count))
        self._bind(
            int(ffi.cast("uintptr_t", self._handle)),
            found,
            self._reasons(found),
            version[0],
            _ON_FULL[self._on_full],
        )

    @staticmethod
    def _reasons(found: tuple[AnyLimit, ...]) -> tuple[str, ...]:
        """What check() says when each limit denies."""
        return tuple(limits.reason(limit) for limit in found)

    def _failed(self, status: int) -> NoReturn:
        """Called by the native part when a call ends neither admitted nor denied."""
        where = f"limiter {self._name!r} in segment {self._segment.name!r}"
        if status == lib.FSHM_E_LIMITERS:
            raise exceptions.SegmentFullError(
                f"{where}: the segment's table of limiters is full "
                f"({self._segment.geometry().limiters}); use fewer names, or a larger capacity"
            )
        if status in (lib.FSHM_FULL, lib.FSHM_CONTENDED):
            capacity = self._segment.geometry().capacity
            raise exceptions.SegmentFullError(
                f"{where}: no room for another key (capacity {capacity}); remove the segment and make "
                "it with a larger FAST_LITELLM_SHM_CAPACITY, or use shorter periods"
            )
        if status == lib.FSHM_E_DAMAGED:
            raise exceptions.SegmentDamagedError(
                f"{where}: its limits do not add up, somebody wrote over the segment; stop the workers "
                "and remove it with `fast-shm rm`"
            )
        raise exceptions.SegmentError(f"{where}: unexpected error {status}")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.limits, self._name, self._segment, self._on_full))

    def __repr__(self) -> str:
        shown = ", ".join(repr(limit) for limit in self.limits)
        return f"{type(self).__name__}({shown}, name={self._name!r})"


def _rebuild(
    cls: type[RateLimiter], found: tuple[AnyLimit, ...], name: str, segment: Segment, on_full: str
) -> RateLimiter:
    limiter = cls.__new__(cls)
    RateLimiter.__init__(limiter, *found, name=name, segment=segment, on_full=on_full)
    return limiter
