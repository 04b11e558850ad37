"""ConcurrencyLimiter: at most n permits for each key, over all processes, also after crashes."""

from __future__ import annotations

from contextlib import AsyncContextDecorator, ContextDecorator
from typing import TYPE_CHECKING, Any

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared.named_limiter import key_bytes, states_of
from fast_litellm_shm._shared.native import Permit, Slot, ffi, lib
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm._shared.wait_queue import Place
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument
from fast_litellm_shm.limiters.rate import deadline_ns
from fast_litellm_shm.limiters.waiting import (
    ASYNCIO,
    BLOCKING,
    OnWait,
    Pace,
    Shed,
    Steps,
    Waits,
    Wish,
    in_turn,
    off_loop,
    run,
    run_async,
    tenant_hash,
    wish,
)


class ConcurrencyLimiter(InSegment):
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
        _keep: bool = False,  # where the name exists, leave its limit as it is
    ) -> None:
        limit = limits.in_flight("ConcurrencyLimiter", "max_in_flight", max_in_flight)
        grantor = chosen(cluster)
        self._cluster = grantor.argument
        self._grantor = grantor.permits(
            limit, name=name, segment=segment, on_full="deny", keep=_keep
        )
        self._shared = self._grantor.limits
        self._name, self._segment = self._shared.name, self._shared.segment
        self._states, self._pace = states_of(self._shared), Pace()
        self.acquire = self._shared.admit  # type: ignore[method-assign]

    async def acquire_async(self, key: str | bytes) -> Permit:
        """acquire() for asyncio: where a server has to be asked, a thread does that."""
        return await off_loop(lambda: self.acquire(key), lambda late: late.release())

    @property
    def max_in_flight(self) -> int:
        """The limit in force."""
        return self._shared.limits[0].n

    def in_flight(self, key: str | bytes) -> int:
        """How many permits of the key living processes hold. Frees those of dead processes. One
        that another call is taking or giving back at this instant may count or not."""
        return self._shared.in_flight(key)

    def wait(
        self,
        key: str | bytes,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> Permit:
        """acquire(), but waits for a permit, at most ``timeout`` seconds; false if it got none.

        Callers that wait for a key are served in the order in which they came, over all processes.
        acquire() does not wait, and may take a permit before them.

        priority: -100 .. 100; higher ones are served first; each 10 s of waiting count as one more.
        tenant: of one priority, the tenant that was served least is next; weight: 0.001 .. 1000, a
        tenant of weight 2 is served twice as much. max_waiting: false at once, if so many callers
        would be before this one. on_wait: called with the place in the queue (1: next) and the
        expected seconds (None: not known yet) when it waits, and when the place changes. See
        ``docs/waiting.md``.
        """
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        try:
            return self._enter(key, timeout, wished)
        except Shed:
            return self._shared.refused(key, 0)

    async def wait_async(
        self,
        key: str | bytes,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> Permit:
        """wait() for asyncio. It needs no thread."""
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        try:
            return await self._enter_async(key, timeout, wished)
        except Shed:
            return self._shared.refused(key, 0)

    def _enter(self, key: str | bytes, timeout: float | None, wished: Wish) -> Permit:
        deadline = deadline_ns(timeout)
        if not self._states.waited_for(key_bytes(key)):
            permit = self.acquire(key)
            if permit or timeout == 0:
                return permit
        return run(self._wait(BLOCKING, key, deadline, wished))

    async def _enter_async(self, key: str | bytes, timeout: float | None, wished: Wish) -> Permit:
        deadline = deadline_ns(timeout)
        if not self._states.waited_for(key_bytes(key)):
            permit = await self.acquire_async(key)
            if permit or timeout == 0:
                return permit
        return await run_async(self._wait(ASYNCIO, key, deadline, wished))

    def _wait(self, waits: Waits, key: str | bytes, deadline: int, wished: Wish) -> Steps[Permit]:
        place = waits.place(self._states, key_bytes(key), wished.order)
        tries = _Tries(self, waits, key, place)
        try:
            return (
                yield from in_turn(
                    waits, place, tries.attempt, tries.refused, deadline, wished, self._pace
                )
            )
        except BaseException:
            if tries.granted is not None:
                tries.granted.release()  # the traceback may keep it
            raise

    def _again_ns(self, permit: Permit) -> int:
        """For how long a caller that is next, and was denied, sleeps at most."""
        return self._grantor.wake_ns

    def queue_size(self, key: str | bytes, tenant: str | None = None) -> int:
        """How many callers of all processes wait for the key; tenant: of this one only."""
        of = None if tenant is None else tenant_hash(tenant)
        return self._states.waiting(key_bytes(key), of)

    def slot(
        self,
        key: str | bytes,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> _Slot:
        """``with limiter.slot(key, timeout=5):`` hold a permit. Waits as wait() does. Raises
        PermitTimeoutError; QueueFullError for ``max_waiting``."""
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return _Slot(self, key, timeout, wished)

    def slot_async(
        self,
        key: str | bytes,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> _AsyncSlot:
        """``async with limiter.slot_async(key, timeout=5):`` slot() for asyncio."""
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return _AsyncSlot(self, key, timeout, wished)

    def _slot(self, key: str | bytes, given: tuple[float | None, Wish]) -> Permit:
        """Called by the native part."""
        timeout, wished = given
        try:
            return self._or_raise(self._enter(key, timeout, wished), key, timeout)
        except Shed as shed:
            raise self._queue_full(key, shed) from None

    def _queue_full(self, key: str | bytes, shed: Shed) -> exceptions.QueueFullError:
        expected = self._pace.expected(shed.ahead)
        retry = 1.0 if expected is None else expected
        return exceptions.QueueFullError(
            f"limiter {self.name!r}: {shed.ahead} callers wait for key {key!r} before this one, "
            f"and it allows no more; try again in {retry:.3g} s, or raise max_waiting",
            retry,
            shed.ahead + 1,
        )

    def _or_raise(self, permit: Permit, key: str | bytes, timeout: float | None) -> Permit:
        if not permit:
            raise exceptions.PermitTimeoutError(
                f"limiter {self.name!r}: no permit for key {key!r} within {timeout} s, "
                f"{self._grantor.held(permit)}; wait longer, or raise the limit"
            )
        return permit

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"name": self.name, "segment": self.segment, "cluster": self._cluster}
        return (_rebuild, (type(self), self.max_in_flight, options))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.max_in_flight}, name={self.name!r})"


class _Tries:
    """Of a call that waits. An object, since closures would be ten, and ten thousand tasks that
    wait are what the garbage collector goes through."""

    __slots__ = ("_key", "_limiter", "_place", "_waits", "granted")

    def __init__(
        self, limiter: ConcurrencyLimiter, waits: Waits, key: str | bytes, place: Place
    ) -> None:
        self._limiter, self._waits, self._key, self._place = limiter, waits, key, place
        self.granted: Permit | None = None

    def attempt(self) -> Steps[tuple[Permit, int | None]]:
        limiter, key = self._limiter, self._key
        # `granted` first: a permit in a local variable is kept by the traceback of an exception.
        self.granted = permit = yield from self._waits.ask(
            lambda: limiter.acquire(key), lambda late: late.release()
        )
        if not permit:
            return permit, limiter._again_ns(permit)
        self._place.served(1)
        self._place.took()
        return permit, None

    def refused(self) -> Permit:
        return self._limiter._shared.refused(self._key, 0)


class _Slot(Slot, ContextDecorator):
    """Of slot(). As a decorator: each call has a slot of its own."""

    def __init__(
        self, limiter: ConcurrencyLimiter, key: str | bytes, timeout: float | None, wished: Wish
    ) -> None:
        super().__init__(limiter, key, (timeout, wished))
        self._given = limiter, key, timeout, wished

    def _recreate_cm(self) -> _Slot:
        return _Slot(*self._given)


class _AsyncSlot(AsyncContextDecorator):
    def __init__(
        self, limiter: ConcurrencyLimiter, key: str | bytes, timeout: float | None, wished: Wish
    ) -> None:
        self._limiter, self._key, self._timeout, self._wished = limiter, key, timeout, wished
        self._permit: Permit | None = None

    def _recreate_cm(self) -> _AsyncSlot:
        return _AsyncSlot(self._limiter, self._key, self._timeout, self._wished)

    async def __aenter__(self) -> Permit:
        if self._permit is not None:
            raise RuntimeError("the slot is held: call slot_async() for each block")
        limiter, key, timeout = self._limiter, self._key, self._timeout
        try:
            found = await limiter._enter_async(key, timeout, self._wished)
        except Shed as shed:
            raise limiter._queue_full(key, shed) from None
        self._permit = limiter._or_raise(found, key, timeout)
        return self._permit

    async def __aexit__(self, *exc: object) -> None:
        permit, self._permit = self._permit, None
        if permit is not None:
            permit.release()


def _rebuild(
    cls: type[ConcurrencyLimiter], max_in_flight: int, options: dict[str, Any]
) -> ConcurrencyLimiter:
    limiter = cls.__new__(cls)
    ConcurrencyLimiter.__init__(limiter, max_in_flight, **options, _keep=True)
    return limiter


def release_process(segment: Segment, pid: int) -> int:
    """Give back all permits of a process (0: of all dead ones), for operators. Returns how many."""
    return int(lib.fshm_reap(segment._handle, ffi.cast("uint32_t", pid)))
