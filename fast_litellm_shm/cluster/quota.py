"""ClusterQuota: rates and calls in flight, granted by a server and admitted together. The server
keeps each by itself: token leases, and permit leases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fast_litellm_shm._shared.named_limiter import InnerLimits, key_bytes, refused, states_of
from fast_litellm_shm._shared.native import Decision, Permit
from fast_litellm_shm._shared.states import States
from fast_litellm_shm.cluster.link import Link
from fast_litellm_shm.cluster.permit_lease import PermitLeases
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.cluster.single_flight import MOST_NAME
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.limiters.grantors import Cost, Held, Key, Quotas
from fast_litellm_shm.limiters.waiting import ASYNCIO, BLOCKING, Steps, Waits, run, run_async
from fast_litellm_shm.limits import InFlight, LimitSpec

_PARALLEL = " (parallel)"


def longest_name(found: Sequence[LimitSpec | InFlight]) -> int:
    """How many bytes a name may have for these limits: that of the permits is lengthened, where
    there are rates too."""
    both = len({isinstance(each, InFlight) for each in found}) == 2
    return int(MOST_NAME - len(_PARALLEL) if both else MOST_NAME)


def permits_name(found: Sequence[LimitSpec | InFlight], name: str) -> str:
    """Raises ValueError: it would be too long."""
    most = longest_name(found)
    if most == MOST_NAME or not isinstance(name, str):
        return name
    if len(name.encode("utf-8", "surrogatepass")) > most:
        raise ValueError(
            f"name must be at most {most} bytes for rates and max_parallel over many hosts, not "
            f"{name!r}"
        )
    return name + _PARALLEL


@dataclasses.dataclass(slots=True, eq=False, repr=False)
class ClusterPermit:
    """What a call of the quota holds, as a Permit is for one host. decision: of the rates, or of
    the permits where these deny. ends: of the windows that were charged. on_loop: its settlement
    may not wait for the server."""

    decision: Decision
    index: int
    permit: Permit | None
    ends: list[int]
    on_loop: bool = False

    @property
    def allowed(self) -> bool:
        return self.decision.allowed

    @property
    def in_flight(self) -> int:
        """When too many were in flight: how many of this host."""
        return self.permit.in_flight if self.permit is not None else 0

    def release(self) -> bool:
        return self.permit is not None and bool(self.permit.release())

    def __bool__(self) -> bool:
        """Whether a permit was granted."""
        return bool(self.permit)


class LocalPermits:
    """In place of PermitLeases: permits of this host alone, beside rates that a file grants."""

    def __init__(self, limiter: InnerLimits, connection: Link) -> None:
        self.limiter, self.states, self.connection = limiter, states_of(limiter), connection


class ClusterQuota(Quotas):
    """The permit first, then the rates: where these deny, the permit is given back, and nothing is
    consumed. At least one of the two.

    settles: what a call was charged is settled when it is over, so the ends of its windows must be
    remembered: all rates are windows of one length. Else what was charged is consumed.
    """

    may_wait = True
    segment_clock = False
    wake_ns = 60_000_000  # as long as a refusal of the server is remembered

    def __init__(
        self,
        token_leases: TokenLeases | None,
        permit_leases: PermitLeases | LocalPermits | None,
        *,
        settles: bool,
    ) -> None:
        self.token_leases, self.permit_leases = token_leases, permit_leases
        self._settles = settles
        leases = permit_leases or token_leases
        assert leases is not None
        self._states, self._tail = states_of(leases.limiter), b""  # of those that wait
        self.connection: Link = leases.connection
        self.segment = self.connection.segment
        self._count = 0 if token_leases is None else len(token_leases.limiter.limits)

    @property
    def limits(self) -> tuple[Any, ...]:
        found = (self.token_leases, self.permit_leases)
        return tuple(each for leases in found if leases for each in leases.limiter.limits)

    def admit(self, key: Key, costs: Cost) -> ClusterPermit:
        return run(self._admit(BLOCKING, key, costs))

    async def admit_async(self, key: Key, costs: Cost) -> ClusterPermit:
        """Cancelled, it gives back what it has, and what a thread gets later."""
        return await run_async(self._admit(ASYNCIO, key, costs))

    def admitting(self, waits: Waits, key: Key, costs: Cost) -> Steps[Held]:
        return (yield from self._admit(waits, key, costs))

    def queue(self, key: Key) -> tuple[States, bytes]:
        """Of the permits, whose release wakes those that wait."""
        leases = self.permit_leases or self.token_leases
        assert leases is not None
        return leases.states, key_bytes(key)

    def denied(self, key: Key, costs: Cost) -> Held:
        if self.permit_leases is not None:
            permit = self.permit_leases.limiter.refused(key, 0)
            return ClusterPermit(permit.decision, self._count, permit, [])
        assert self.token_leases is not None
        decision = refused(self.token_leases.limiter, key, costs)
        return ClusterPermit(decision, decision.limit_index, None, [])

    def _admit(self, waits: Waits, key: Key, costs: Cost) -> Steps[ClusterPermit]:
        permit: Permit | None = None
        if self.permit_leases is not None:
            admit = self.permit_leases.limiter.admit
            permit = yield from waits.ask(lambda: admit(key), lambda late: late.release())
            if not permit or self.token_leases is None:
                return ClusterPermit(permit.decision, 0 if permit else self._count, permit, [])
        try:
            decision, ends = yield from waits.ask(
                lambda: self._charge(key, costs), lambda late: self._give_back(key, costs, *late)
            )
        except BaseException:
            if permit is not None:
                permit.release()
            raise
        if not decision and permit is not None:
            permit.release()
            permit = None
        return ClusterPermit(decision, decision.limit_index, permit, ends, waits is ASYNCIO)

    def _charge(self, key: Key, costs: Cost) -> tuple[Decision, list[int]]:
        """And of each rate, when the window that was charged ends: segment time, ns."""
        assert self.token_leases is not None
        limiter, states = self.token_leases.limiter, self.token_leases.states
        if isinstance(costs, tuple) and self.permit_leases is not None:
            costs = costs[:-1]
        if not self._settles:
            return limiter.acquire(key, costs), []
        before = states.now()
        decision = limiter.acquire(key, costs)
        if not decision:
            return decision, []
        # What is known may be of the next window by now. The decision tells the end of the one that
        # was charged. (In seconds: its last digit is not exact.)
        last = before + int(decision.reset_after * 1e9) - 1000
        # 0 during an outage: what the host admits by itself was not granted: there is no refund.
        known = states.known(key_bytes(key))[1] if self.connection.outage is None else None
        now = states.now()
        ends = [now + ns for ns in known[: self._count]] if known else [0] * self._count
        return decision, [min(end, last) for end in ends]

    def _give_back(self, key: Key, costs: Cost, decision: Decision, ends: list[int]) -> None:
        if decision and self._settles:
            assert isinstance(costs, tuple)
            held = ClusterPermit(decision, 0, None, ends, on_loop=True)
            self.settle(key, costs, (0,) * len(costs), held)

    def settle(
        self, key: Key, charged: tuple[int, ...], actual: tuple[int, ...], held: ClusterPermit
    ) -> None:
        """A call that was admitted on an event loop does not wait: a thread tells the server."""
        if self.token_leases is None:
            return
        pairs = list(zip(charged, actual, strict=True))[: self._count]
        more = tuple(max(after - before, 0) for before, after in pairs)
        now = self.token_leases.states.now()
        less = tuple(
            max(before - after, 0) if now < end else 0
            for (before, after), end in zip(pairs, held.ends, strict=True)
        )
        if any(more) or any(less):
            settled = Settlement(self.token_leases, key_bytes(key), more, less, tuple(held.ends))
            self.token_leases.settle(settled, held.on_loop)

    def in_flight(self, key: Key) -> int:
        leases = self.permit_leases
        return leases.states.in_flight(key_bytes(key)) if leases is not None else 0

    def left(self, key: Key, *, ask: bool = False) -> tuple[int, ...]:
        """By what the server has last said, and what is leased."""
        leases = self.token_leases
        if leases is None:
            return ()
        if ask:
            leases.limiter.peek(key, (1,) * self._count)
        raw = key_bytes(key)
        both = leases.states.remaining(raw), leases.look(raw)[0]
        return tuple(there + here for there, here in zip(*both, strict=False))

    def of_limit(self, key: Key, decision: Decision) -> tuple[int, float]:
        """During an outage, ``remaining`` is of this host's share."""
        left, until, index = decision.remaining, decision.reset_after, decision.limit_index
        assert self.token_leases is not None
        if self.connection.outage is None:
            left = dict(enumerate(self.left(key))).get(index, left)
        if decision.allowed:
            until = self.token_leases.states.known(key_bytes(key))[1][index] / 1e9
        return left, until
