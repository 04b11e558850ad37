"""ConcurrencyLimiter: at most so many requests in flight, over all processes, crashes included."""

from __future__ import annotations

import time
from contextlib import AsyncContextDecorator, ContextDecorator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared.named_limiter import key_bytes, states_of
from fast_litellm_shm._shared.native import Permit, Slot, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters import grantors
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument
from fast_litellm_shm.limiters.rate import deadline_ns
from fast_litellm_shm.limiters.waiting import (
    ASYNCIO,
    BLOCKING,
    Steps,
    Waits,
    off_loop,
    run,
    run_async,
)


class ConcurrencyLimiter:
    """Grants at most ``max_in_flight`` permits for each key, over all processes of the host
    together.

    max_in_flight: 1 .. 100,000. name: processes that use the same name share; the last process that
    sets max_in_flight sets it for all. segment: default ``Segment.default()``.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limit holds over all hosts that name the same server, which grants permits to each host;
    False: this host alone; default: what FAST_LITELLM_SHM_CLUSTER says, else this host alone. See
    ``docs/cluster.md``.

    A permit belongs to its process. When a process is killed or crashes, its permits are free
    again: within half a second for a call that finds no other permit, within a second for a call
    that waits. A process that is stopped keeps its permits. Each permit takes one slot of the
    segment, like a key of one limit.

    Raises ValueError or TypeError for bad arguments, SegmentFullError where the process table
    (4,096 entries) is full.
    """

    if TYPE_CHECKING:  # else the native method, of each object

        def acquire(self, key: str | bytes) -> Permit:
            """True when admitted; else false, and ``in_flight`` says how many are held. Release it
            with ``permit.release()`` or ``with permit:``."""

    def __init__(
        self,
        max_in_flight: int,
        *,
        name: str,
        segment: Segment | None = None,
        cluster: ClusterArgument = None,
    ) -> None:
        limit = limits.in_flight("ConcurrencyLimiter", "max_in_flight", max_in_flight)
        self._open(limit, name, segment, cluster, keep=False)

    def _open(
        self,
        limit: limits.InFlight,
        name: str,
        segment: Segment | None,
        cluster: ClusterArgument,
        keep: bool,
    ) -> None:
        grantor = chosen(cluster)
        self._cluster = grantor.argument
        self._grantor = grantor.permits(
            limit, name=name, segment=segment, on_full="deny", keep=keep
        )
        self._shared = self._grantor.limits
        self._states = states_of(self._shared)
        self.acquire = self._shared.admit  # type: ignore[method-assign]

    async def acquire_async(self, key: str | bytes) -> Permit:
        """acquire() for asyncio: where a server has to be asked, a thread does that."""
        return await off_loop(lambda: self.acquire(key), lambda late: late.release())

    @property
    def name(self) -> str:
        """The name that processes share by."""
        return self._shared.name

    @property
    def segment(self) -> Segment:
        """The segment it lives in."""
        return self._shared.segment

    @property
    def max_in_flight(self) -> int:
        """The limit in force."""
        return self._shared.limits[0].n

    def in_flight(self, key: str | bytes) -> int:
        """How many permits of the key living processes hold. Frees those of dead processes."""
        return self._states.in_flight(key_bytes(key))

    def wait(self, key: str | bytes, timeout: float | None = None) -> Permit:
        """acquire(), but waits for a permit, at most ``timeout`` seconds; false if it got none.

        Sleeps in the kernel (futex). A release wakes the waiters in the order in which they came. A
        new caller may still take the permit first. Looks for dead holders once a second.
        """
        return self.acquire(key) or run(self._wait(BLOCKING, key, timeout))

    async def wait_async(self, key: str | bytes, timeout: float | None = None) -> Permit:
        """wait() for asyncio: sleeps in a thread of its own pool, not in the event loop."""
        return await self.acquire_async(key) or await run_async(self._wait(ASYNCIO, key, timeout))

    def _wait(self, waits: Waits, key: str | bytes, timeout: float | None) -> Steps[Permit]:
        raw, deadline = key_bytes(key), deadline_ns(timeout)
        permit: Permit | None = None
        try:
            while True:
                armed = self._states.arm(raw)
                permit = yield from waits.ask(
                    lambda: self.acquire(key), lambda late: late.release()
                )
                left = deadline - time.monotonic_ns()
                if permit or left <= 0:
                    return permit
                ns = min(left, self._grantor.wake_ns)
                yield from waits.until_woken(self._states, raw, armed, ns)
        except BaseException:  # interrupted: a wake-up that was for this waiter goes to the next
            if permit is not None:
                permit.release()  # the traceback may keep it
            self._states.wake(raw)
            raise

    def slot(self, key: str | bytes, timeout: float | None = None) -> _Slot:
        """``with limiter.slot(key, timeout=5):`` hold a permit. Raises PermitTimeoutError."""
        return _Slot(self, key, timeout)

    def slot_async(self, key: str | bytes, timeout: float | None = None) -> _AsyncSlot:
        """``async with limiter.slot_async(key, timeout=5):`` likewise."""
        return _AsyncSlot(self, key, timeout)

    def _slot(self, key: str | bytes, timeout: float | None) -> Permit:
        """Called by the native part."""
        return self._or_raise(self.wait(key, timeout), key, timeout)

    def _or_raise(self, permit: Permit, key: str | bytes, timeout: float | None) -> Permit:
        if not permit:
            raise exceptions.PermitTimeoutError(
                f"limiter {self.name!r}: no permit for key {key!r} within {timeout} s, "
                f"{self._grantor.held(permit)}; wait longer, or raise the limit"
            )
        return permit

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.max_in_flight, self.name, self.segment, self._cluster)
        return (_rebuild, (type(self), *given))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.max_in_flight}, name={self.name!r})"


class _Slot(Slot, ContextDecorator):
    """Of slot(). As a decorator: each call has a slot of its own."""

    def __init__(
        self, limiter: ConcurrencyLimiter, key: str | bytes, timeout: float | None
    ) -> None:
        super().__init__(limiter, key, timeout)
        self._given = limiter, key, timeout

    def _recreate_cm(self) -> _Slot:
        return _Slot(*self._given)


class _AsyncSlot(AsyncContextDecorator):
    def __init__(
        self, limiter: ConcurrencyLimiter, key: str | bytes, timeout: float | None
    ) -> None:
        self._given = limiter, key, timeout
        self._permit: Permit | None = None

    def _recreate_cm(self) -> _AsyncSlot:
        return _AsyncSlot(*self._given)

    async def __aenter__(self) -> Permit:
        if self._permit is not None:
            raise RuntimeError("the slot is held: call slot_async() for each block")
        limiter, key, timeout = self._given
        self._permit = limiter._or_raise(await limiter.wait_async(key, timeout), key, timeout)
        return self._permit

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        permit, self._permit = self._permit, None
        if permit is not None:
            permit.release()


def _rebuild(
    cls: type[ConcurrencyLimiter],
    max_in_flight: int,
    name: str,
    segment: Segment,
    cluster: grantors.Replayed,
) -> ConcurrencyLimiter:
    limiter = cls.__new__(cls)
    limiter._open(limits.InFlight(max_in_flight), name, segment, cluster, keep=True)
    return limiter


def release_process(segment: Segment, pid: int) -> int:
    """Give back all permits of a process (0: of all dead ones), for operators. Returns how many."""
    return int(lib.fshm_reap(segment._handle, ffi.cast("uint32_t", pid)))
