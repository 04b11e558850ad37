"""Server: the grantor of limits over many hosts (fast_litellm_shm/limiters/grantors.py)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fast_litellm_shm._shared.named_limiter import InnerLimits, PermitLimits, SharedLimits
from fast_litellm_shm._shared.native import Decision, Permit, Reservation
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster import connection, leader, questions
from fast_litellm_shm.cluster.budget_lease import BudgetLeases
from fast_litellm_shm.cluster.permit_lease import PermitLeases
from fast_litellm_shm.cluster.quota import ClusterQuota, longest_name, permits_name
from fast_litellm_shm.cluster.settings import Cluster
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.limiters.grantors import (
    Answers,
    Cost,
    Grantor,
    Key,
    Limits,
    Permits,
    Quotas,
    Rates,
    ns_until,
)
from fast_litellm_shm.limiters.waiting import Steps, Waits
from fast_litellm_shm.limits import InFlight

_SOONEST = 1_000_000  # ns: between two tries of a waiter


def token_leases(limiter: SharedLimits, cluster: Cluster) -> TokenLeases:
    return TokenLeases(limiter, _connection(cluster, limiter.segment))


def _connection(cluster: Cluster, segment: Segment) -> connection.Connection:
    cluster.check()
    return connection.of(cluster, segment, leader.lead, questions.of)


class Server(Grantor):
    """Of limiters whose argument, or FAST_LITELLM_SHM_CLUSTER, names a server."""

    has_budgets = True

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self._cluster = cluster

    def rates(self, limiter: SharedLimits) -> Rates:
        return ServerRates(token_leases(limiter, self._cluster))

    def permits(self, limit: InFlight, **given: Any) -> Permits:
        return ServerPermits(self._permit_leases(PermitLimits((limit,), **given)))

    def quota(self, limits: Limits, *, settles: bool = True, **given: Any) -> Quotas:
        if not settles:
            given["on_full"] = "raise"  # keys without room share no counters: a server has them
        rates = tuple(each for each in limits if not isinstance(each, InFlight))
        last, name, tokens, permits = limits[-1], given["name"], None, None
        own = permits_name(limits, name)
        if rates:
            tokens = token_leases(InnerLimits(rates, **given), self._cluster)
        if isinstance(last, InFlight):
            full = "raise" if given["on_full"] == "raise" else "deny"
            given |= {"name": own, "shown": name, "on_full": full}
            permits = self._permit_leases(InnerLimits((last,), **given))
        return ClusterQuota(tokens, permits, settles=settles)

    def budget(self, handle: Any, name: str, segment: Segment) -> BudgetLeases:
        connection = _connection(self._cluster, segment)
        leases = BudgetLeases(handle, name, segment, connection)
        found: BudgetLeases = connection.budgets.setdefault(leases.name, leases)
        return found

    def _permit_leases(self, limits: InnerLimits) -> PermitLeases:
        return PermitLeases(limits, _connection(self._cluster, limits.segment))

    def longest_name(self, limits: Limits) -> int:
        return longest_name(limits)


class ServerRates(Rates):
    segment_clock = False
    in_batches = True

    def __init__(self, leases: TokenLeases) -> None:
        self.leases = leases

    def spend(
        self, limiter: SharedLimits, raw: bytes, cost: Cost
    ) -> tuple[Decision, Callable[[], object]]:
        return self.leases.spend(raw, cost)

    def is_refused(self, raw: bytes) -> bool:
        return self.leases.is_refused(raw)

    def acquire_many(
        self, limiter: SharedLimits, keys: tuple[Key, ...], costs: int | list[int], out: Answers
    ) -> None:
        self.leases.prepare(keys, costs)
        allowed, remaining, retry = out
        left, wait = memoryview(remaining).cast("Q"), memoryview(retry).cast("d")
        for i, key in enumerate(keys):
            found = limiter.acquire(key, costs[i] if isinstance(costs, list) else costs)
            allowed[i], left[i] = found.allowed, found.remaining
            wait[i] = math.inf if found.retry_after is None else found.retry_after

    def reserve(
        self, waits: Waits, limiter: SharedLimits, key: Key, cost: Cost, deadline: int
    ) -> Steps[tuple[Decision, int, Reservation | None]]:
        """Nothing is reserved: the first that asks when there is room is admitted."""
        decision = yield from waits.ask(lambda: limiter.acquire(key, cost), lambda _: None)
        retry = decision.retry_after_ns
        if decision or retry is None or retry > ns_until(deadline):
            return decision, 0, None
        return decision, max(retry, _SOONEST), None

    def block(self, limiter: SharedLimits, raw: bytes, ns: int) -> None:
        self.leases.block(raw, ns)

    def reset(self, limiter: SharedLimits, raw: bytes | None) -> None:
        if raw is None:
            self.leases.reset_all()
        else:
            self.leases.reset(raw)


class ServerPermits(Permits):
    wake_ns = 60_000_000  # a waiter asks again after as long as a refusal is remembered

    def __init__(self, leases: PermitLeases) -> None:
        super().__init__(leases.limiter)
        self.leases = leases

    def held(self, permit: Permit) -> str:
        most, outage = self.limits.limits[0].n, self.leases.connection.outage
        here = f"of {most} over all hosts this one holds {permit.in_flight}"
        if outage is None:
            return here
        cluster = self.leases.cluster
        return f"{here}, and {cluster.shown} does not answer ({outage}): {cluster.on_outage!r}"
