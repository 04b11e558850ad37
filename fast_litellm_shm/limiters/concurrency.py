"""ConcurrencyLimiter: at most so many requests in flight, over all processes, crash or no crash."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncContextDecorator, ContextDecorator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import greenlets, settings
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import Permit, Slot, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.rate import deadline_ns

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster
    from fast_litellm_shm.cluster.permit_lease import PermitLeases

_LOOK_NS = 1_000_000_000  # a waiter looks for the dead itself, once a second
_ASK_NS = 60_000_000  # and one that must ask a server, after as long as a refusal is remembered
_SLEEPERS = 64  # threads that asyncio's waiters sleep in; more look once a second

_sleepers: ThreadPoolExecutor | None = None


def _executor() -> ThreadPoolExecutor:
    global _sleepers
    if _sleepers is None:
        _sleepers = ThreadPoolExecutor(_SLEEPERS, "fast-shm-wait")
    return _sleepers


def _forget_executor() -> None:
    """Its threads stay behind in the parent."""
    global _sleepers
    _sleepers = None


os.register_at_fork(after_in_child=_forget_executor)


class ConcurrencyLimiter:
    """At most ``max_in_flight`` permits for each key, over all processes of the host together.

    max_in_flight: 1 .. 100,000. name: processes that use the same name share; whoever sets
    max_in_flight last sets it for all. segment: default ``Segment.default()``.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limit holds over all hosts that name the same server, which grants permits to each host;
    False: this host alone; default: what FAST_LITELLM_SHM_CLUSTER says, else this host alone. See
    ``docs/cluster.md``.

    A permit belongs to its process. One that is killed or crashes gives its permits back by itself:
    at once to whoever then finds no other, within a second to whoever waits. One that is merely
    stopped keeps them. Each permit takes one key's room in the segment.

    Raises ValueError or TypeError for bad arguments, SegmentFullError where the process table (256)
    is full.
    """

    acquire: Any
    """acquire(key) -> Permit: true when admitted; else false, and ``in_flight`` says how many are
    held. Release it with ``permit.release()`` or ``with permit:``."""

    _leases: PermitLeases | None = None
    _here: Literal[False] | None  # what a copy is to be given, where there are no leases

    def __init__(
        self,
        max_in_flight: int,
        *,
        name: str,
        segment: Segment | None = None,
        cluster: Cluster | str | Literal[False] | None = None,
        _shown: str | None = None,
        _on_full: str = "deny",
    ) -> None:
        limit = limits.in_flight("ConcurrencyLimiter", "max_in_flight", max_in_flight)
        self._open(limit, name, segment, cluster, keep=False, shown=_shown, on_full=_on_full)

    def _open(
        self,
        limit: limits.InFlight,
        name: str,
        segment: Segment | None,
        cluster: Cluster | str | Literal[False] | None,
        keep: bool,
        shown: str | None = None,
        on_full: str = "deny",
    ) -> None:
        given: dict[str, Any] = {"name": name, "segment": segment, "on_full": on_full, "keep": keep}
        given["shown"] = shown
        found = None
        self._here = False if cluster is False else None
        if settings.names_server(cluster):
            from fast_litellm_shm.cluster import settings as cluster_settings

            found = cluster_settings.found(cluster)
        if found is None:
            self._shared = SharedLimits((limit,), **given)
        else:
            from fast_litellm_shm.cluster.permit_lease import LeasedLimits

            shared = LeasedLimits((limit,), **given)
            self._shared, self._leases = shared, shared.join(found)
        self._handle = self._shared._handle
        self.acquire = self._shared._admit

    async def acquire_async(self, key: str | bytes) -> Permit:
        """acquire() for asyncio: where the limit is that of many hosts and the server must be
        asked, that is done in a thread; else it is acquire()."""
        if self._leases is None:
            permit: Permit = self.acquire(key)
            return permit
        from fast_litellm_shm.cluster.loops import off_loop

        taken: Permit = await off_loop(lambda: self.acquire(key), lambda late: late.release())
        return taken

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
        """How many permits of the key living processes hold. Frees those of dead ones."""
        raw = key_bytes(key)
        return int(lib.fshm_in_flight(self._handle, raw, len(raw)))

    @property
    def _look_ns(self) -> int:
        """How long a waiter sleeps at most: nobody wakes it for what another host releases."""
        return _LOOK_NS if self._leases is None else _ASK_NS

    def wait(self, key: str | bytes, timeout: float | None = None) -> Permit:
        """acquire(), waiting for a permit at most ``timeout`` seconds; false when there was none.

        Sleeps in the kernel (futex) and is woken by a release, in order of arrival unless somebody
        comes by just then. Looks for dead holders once a second.
        """
        permit: Permit = self.acquire(key)
        if permit:
            return permit
        raw, deadline = key_bytes(key), deadline_ns(timeout)
        try:
            while True:
                armed = lib.fshm_bell_arm(self._handle, raw, len(raw))
                permit = self.acquire(key)
                left = deadline - time.monotonic_ns()
                if permit or left <= 0:
                    return permit
                greenlets.bell_wait(self._handle, raw, armed, min(left, self._look_ns))
        except BaseException:  # interrupted: a ring that was meant for us goes to the next
            permit.release()  # the traceback may keep it
            lib.fshm_bell_ring(self._handle, raw, len(raw))
            raise

    async def wait_async(self, key: str | bytes, timeout: float | None = None) -> Permit:
        """wait() for asyncio: sleeps in a thread of its own pool, not in the event loop."""
        permit = await self.acquire_async(key)
        if permit:
            return permit
        raw, deadline = key_bytes(key), deadline_ns(timeout)
        while True:
            armed = lib.fshm_bell_arm(self._handle, raw, len(raw))
            permit = await self.acquire_async(key)
            left = deadline - time.monotonic_ns()
            if permit or left <= 0:
                return permit
            left = min(left, self._look_ns)
            rung = _executor().submit(greenlets.bell_wait, self._handle, raw, armed, left)
            try:
                await asyncio.wait({asyncio.wrap_future(rung)}, timeout=left / 1e9 + 0.01)
            finally:
                # Left alone (cancelled, or late), the thread may yet be rung: then that goes to the
                # next.
                if not rung.done() and not rung.cancel():
                    rung.add_done_callback(lambda late: self._pass_on(late.result(), raw))

    def _pass_on(self, rung: int, raw: bytes) -> None:
        if rung:
            lib.fshm_bell_ring(self._handle, raw, len(raw))

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
                f"{self._held(permit)}; wait longer, or raise the limit"
            )
        return permit

    def _held(self, permit: Permit) -> str:
        most, leases = self.max_in_flight, self._leases
        if leases is None:
            return f"{permit.in_flight} of {most} are held"
        here = f"of {most} over all hosts this one holds {permit.in_flight}"
        cluster, away = leases.cluster, leases.link.away
        if away is None:
            return here
        return f"{here}, and {cluster.shown} does not answer ({away}): {cluster.on_outage!r}"

    def __reduce__(self) -> tuple[Any, ...]:
        cluster = self._leases.cluster if self._leases is not None else self._here
        return (_rebuild, (type(self), self.max_in_flight, self.name, self.segment, cluster))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.max_in_flight}, name={self.name!r})"


class _Slot(Slot, ContextDecorator):
    """What slot() returns: as a decorator, each call has a slot of its own."""

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
    cluster: Cluster | Literal[False] | None,
) -> ConcurrencyLimiter:
    limiter = cls.__new__(cls)
    limiter._open(limits.InFlight(max_in_flight), name, segment, cluster, keep=True)
    return limiter


def release_process(segment: Segment, pid: int) -> int:
    """Give back all permits of a process (0: of all dead ones). For operators; returns how many."""
    return int(lib.fshm_reap(segment._handle, ffi.cast("uint32_t", pid)))
