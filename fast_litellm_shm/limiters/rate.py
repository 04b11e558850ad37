"""RateLimiter: the limits of a name, enforced together by all processes of the host."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from operator import index
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared import moved_clock
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes, refused, states_of
from fast_litellm_shm._shared.native import Decision, Reservation
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.wait_queue import Place
from fast_litellm_shm.limiters import grantors
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument, Cost, DurableArgument, ns_until
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
from fast_litellm_shm.limits import LimitSpec, Spelled, TokenBucket

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

_NEVER = 2**63  # ns
_MOST_BLOCKED = 2**55 // 10**9  # s, 416 days
_LATE = 1_000_000_000  # ns: a waiter that wakes this late has lost its turn
_AHEAD = 50_000_000  # ns: a bucket is charged at most so long before the instant
_SOON = 200_000  # ns: between two attempts

# Limits of a plan: one, or several, as objects or as text. plans: by the plan's name. plan_of: from
# a key to a plan's name, to limits, or to None: the limiter's own.
PlanLimits: TypeAlias = "Spelled | Sequence[Spelled]"
Plans: TypeAlias = "Mapping[str, PlanLimits]"
PlanOf: TypeAlias = "Callable[[Any], PlanLimits | None | Awaitable[PlanLimits | None]]"

_Found: TypeAlias = "tuple[Decision, int, Reservation | None]"


class Batch(NamedTuple):
    """The answers of :meth:`RateLimiter.acquire_many`: one element for each key."""

    allowed: NDArray[numpy.bool_]
    remaining: NDArray[numpy.uint64]
    retry_after: NDArray[numpy.float64]  # seconds; inf: never


def deadline_ns(timeout: float | None) -> int:
    """A time-out in seconds as an instant of monotonic_ns(); None: never."""
    if timeout is None:
        return _NEVER
    if not isinstance(timeout, (int, float)) or (type(timeout) is float and math.isnan(timeout)):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return monotonic_ns() + round(max(min(timeout, 4e9), 0) * 1e9)


class RateLimiter(SharedLimits):
    """Admit requests by key, under one or several limits, shared by all processes.

    limits: 1 to 4 of TokenBucket, FixedWindow, SlidingWindow, or text that
    :func:`fast_litellm_shm.limits.parse` reads: ``"1000 per day in Europe/Berlin"``; a request is
    admitted when all of them have room, and a denied one consumes nothing. name: processes that use
    the same name share; default: a name made of the limits. The limits belong to the name: setting
    others (here, or in any process) changes them for all at their next call, and what was consumed
    stays consumed. segment: default ``Segment.default()``. on_full: what to do when the segment has
    no room for another key of this limiter: ``"share"``: keys without room share counters, under
    the same limits; ``"deny"`` them (with retry_after 1 s), ``"allow"`` them, or ``"raise"``
    SegmentFullError. See ``docs/limits.md``, "Floods of keys".

    plans, plan_of, plan_age, on_plan_error: each key has limits of its own. See
    :class:`~fast_litellm_shm.limiters.plans.PlannedRateLimiter`, which is what is made then, and
    ``docs/plans.md``.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limits hold over all hosts that name the same server, which grants them to each host in batches;
    False: this host alone; default: what FAST_LITELLM_SHM_CLUSTER says, else this host alone. See
    ``docs/cluster.md``.

    durable: True, or a :class:`~fast_litellm_shm.durable.StateFile`: what was consumed outlives a
    reboot of this host. A file grants the limits in small batches; after a power cut, what was
    granted counts as consumed. Over many hosts the server keeps them instead. See
    ``docs/durable.md``.

    Keys are ``str`` or ``bytes`` of any length; a str is the same key as its UTF-8 bytes. A cost is
    an int of 0 or more, or one int for each limit. Safe in any thread and any process, also after a
    fork.
    """

    def __new__(
        cls,
        *limits_: Spelled,
        plans: Plans | None = None,
        plan_of: PlanOf | None = None,
        **options: Any,
    ) -> RateLimiter:
        if cls is RateLimiter and (plans is not None or plan_of is not None):
            from fast_litellm_shm.limiters.plans import PlannedRateLimiter

            return super().__new__(PlannedRateLimiter)
        return super().__new__(cls)

    def __init__(
        self,
        *limits_: Spelled,
        name: str | None = None,
        segment: Segment | None = None,
        on_full: str = "share",
        cluster: ClusterArgument = None,
        durable: DurableArgument = None,
        plans: Plans | None = None,
        plan_of: PlanOf | None = None,
        plan_age: float = 60.0,
        on_plan_error: str = "keep",
    ) -> None:
        if plans is not None or plan_of is not None:
            raise TypeError(
                f"{type(self).__name__} cannot take plans: make a RateLimiter, or derive the class "
                "from fast_litellm_shm.limiters.plans.PlannedRateLimiter"
            )
        super().__init__(limits.checked(limits_), name=name, segment=segment, on_full=on_full)
        self._choose(cluster, durable)

    def _choose(self, cluster: ClusterArgument, durable: DurableArgument) -> None:
        grantor = chosen(cluster, durable)
        self._cluster, self._durable, self._grantor = (
            grantor.argument, durable, grantor.rates(self),
        )  # fmt: skip
        self._states, self._pace = states_of(self), Pace()

    async def acquire_async(self, key: str | bytes, cost: Cost = 1) -> Decision:
        """acquire() for asyncio: where a server has to be asked, a thread does that. Cancelled
        meanwhile, it has consumed what it was granted."""
        return await off_loop(lambda: self.acquire(key, cost))

    def reset(self, key: str | bytes | None = None) -> None:
        """Forget what a key has consumed; None: what all keys of this limiter have. Over many hosts
        it raises ClusterError during an outage, of a durable limiter StateFileError where the file
        cannot be used; so does block()."""
        self._grantor.reset(self, None if key is None else key_bytes(key))

    def block(self, key: str | bytes, seconds: float) -> None:
        """Deny the key for so many seconds, for all processes: for an upstream that answers
        ``Retry-After``. Of several blocks, the one that ends last counts. When the block ends, one
        token fits, and the other tokens come back at the limit's rate. ``reset(key)`` ends it. A
        block is stored as consumed tokens, so a change of the limits changes how long it lasts. If
        that matters, block keys by a separate limiter whose limits never change.

        seconds: 0 .. 416 days. Windows stay as they are. Raises ValueError if none of the limits is
        a TokenBucket, and SegmentFullError if there is no room for the key, whatever ``on_full``
        says.
        """
        raw = key_bytes(key)
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
            raise TypeError(f"seconds must be a number, not {seconds!r}")
        if not 0 <= seconds <= _MOST_BLOCKED:
            raise ValueError(f"seconds must be between 0 and {_MOST_BLOCKED}, not {seconds!r}")
        if not any(isinstance(each, TokenBucket) for each in self.limits):
            raise ValueError(
                f"limiter {self.name!r} cannot block a key: none of its limits is a "
                "TokenBucket; add one, or use a limiter of its own for it"
            )
        self._grantor.block(self, raw, round(seconds * 1e9))

    def plan(self, key: str | bytes) -> tuple[LimitSpec, ...]:
        """The limits of the key: without ``plans``, those of the limiter."""
        key_bytes(key)
        return tuple(self.limits)

    async def plan_async(self, key: str | bytes) -> tuple[LimitSpec, ...]:
        """:meth:`plan`, where ``plan_of`` is a coroutine function."""
        return self.plan(key)

    def set_override(self, key: str | bytes, *limits_: Spelled) -> None:
        """From its next call on, in every process, the key has these limits (1 to 3) instead of its
        plan, until :meth:`remove_override`. What it has consumed stays consumed. Raises TypeError
        if the limiter was made without ``plans`` and ``plan_of``, SegmentFullError if there is no
        room."""
        self._no_plans()

    def remove_override(self, key: str | bytes) -> None:
        """The key has its plan again. Nothing happens if it had no override."""
        self._no_plans()

    def ask_again(self) -> None:
        """All processes ask ``plan_of`` again at the next call of each key: for when plans have
        changed in your database."""
        self._no_plans()

    def _no_plans(self) -> NoReturn:
        raise TypeError(
            f"limiter {self.name!r}: all its keys have the same limits; to set those of one key, "
            "make the limiter with plans= or plan_of= (plans={} if there are none)"
        )

    def acquire_many(self, keys: Sequence[str | bytes], cost: int | Sequence[int] = 1) -> Batch:
        """acquire() for each key, in order. cost: one int for all, or one for each key.

        Returns numpy arrays: allowed, remaining, retry_after (seconds; inf: never).
        """
        from fast_litellm_shm._shared.dependencies import numpy

        keys = tuple(keys)
        costs: int | list[int] = list(cost) if isinstance(cost, Iterable) else cost
        if isinstance(costs, list) and len(costs) != len(keys):
            raise ValueError(
                f"cost has {len(costs)} values for {len(keys)} keys: give one for each"
            )
        count = len(keys)
        allowed, remaining, retry = bytearray(count), bytearray(8 * count), bytearray(8 * count)
        self._grantor.acquire_many(self, keys, costs, (allowed, remaining, retry))
        return Batch(
            numpy.frombuffer(allowed, numpy.bool_),
            numpy.frombuffer(remaining, numpy.uint64),
            numpy.frombuffer(retry, numpy.float64),
        )

    def wait(
        self,
        key: str | bytes,
        cost: Cost = 1,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> Decision:
        """Block until admitted; at most ``timeout`` seconds.

        Callers that wait for a key are served in the order in which they came, over all processes.
        A caller that is next and cannot be admitted before its deadline, or ever, is denied at
        once. Nothing is charged for a caller that waits, but in the last 50 ms before its instant
        (token buckets); if it is interrupted then, that is given back unless another call has
        charged the key since.

        tenant, weight, priority, max_waiting, on_wait: as of ConcurrencyLimiter.wait(). Tenants are
        served in tokens, of ``cost``.
        """
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        try:
            return run(self._wait(BLOCKING, key, cost, timeout, wished))
        except Shed:
            return refused(self, key, cost)

    async def wait_async(
        self,
        key: str | bytes,
        cost: Cost = 1,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> Decision:
        """wait() for asyncio. It needs no thread."""
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        try:
            return await run_async(self._wait(ASYNCIO, key, cost, timeout, wished))
        except Shed:
            return await off_loop(lambda: refused(self, key, cost))

    def queue_size(self, key: str | bytes, tenant: str | None = None) -> int:
        """How many callers of all processes wait for the key; tenant: of this one only."""
        of = None if tenant is None else tenant_hash(tenant)
        return self._states.waiting(key_bytes(key), of)

    def _wait(
        self, waits: Waits, key: str | bytes, cost: Cost, timeout: float | None, wished: Wish
    ) -> Steps[Decision]:
        deadline, raw = deadline_ns(timeout), key_bytes(key)
        place: Place | None = None
        # Under a clock that a test moves, no caller sleeps for its last part.
        ahead = _AHEAD if self._segment._clock is None else 0

        def attempt() -> Steps[tuple[_Found, int | None]]:
            soon = min(deadline, monotonic_ns() + ahead)
            found = yield from self._grantor.reserve(waits, self, key, cost, soon)
            if found[0]:
                if place is not None:
                    place.served(max(cost) if isinstance(cost, Sequence) else index(cost))
                return found, None
            retry, left = found[0].retry_after_ns, ns_until(deadline)
            if retry is None or retry > left:
                return (found[0], 0, None), None
            if self._grantor.segment_clock and moved_clock.jump(self._segment, retry):
                return (found[0], 0, None), _SOON
            return (found[0], 0, None), max(retry - ahead // 2 if retry > ahead else retry, _SOON)

        def turned_away() -> _Found:
            return refused(self, key, cost), 0, None

        while True:
            found, again = None, None
            if not self._states.waited_for(raw):
                found, again = yield from attempt()
            if found is None or again is not None:
                place = waits.place(self._states, raw, wished.order)
                found = yield from in_turn(
                    waits, place, attempt, turned_away, deadline, wished, self._pace
                )
            decision, pause, reserved = found
            due = monotonic_ns() + pause
            if pause:
                try:
                    yield from waits.sleep(pause / 1e9)
                except BaseException:
                    if reserved is not None:
                        reserved.cancel()
                    raise
            if not pause or monotonic_ns() - due < _LATE:
                if reserved is not None:
                    reserved.keep()
                return decision

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"name": self._name, "segment": self._segment, "on_full": self._on_full}
        given = (type(self), self.limits, options, self._cluster, self._durable)
        return (_rebuild, given)

    def __repr__(self) -> str:
        shown = ", ".join(repr(limit) for limit in self.limits)
        return f"{type(self).__name__}({shown}, name={self._name!r})"


def _rebuild(
    cls: type[RateLimiter],
    found: tuple[LimitSpec, ...],
    options: dict[str, Any],
    cluster: grantors.Replayed,
    durable: DurableArgument = None,
) -> RateLimiter:
    limiter = cls.__new__(cls)
    SharedLimits.__init__(limiter, found, **options, keep=True)
    limiter._choose(cluster, durable)
    return limiter
