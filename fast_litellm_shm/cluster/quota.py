"""A Quota whose limits are those of many hosts: a limiter of permits and one of rates, which the
server keeps each by itself."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm.cluster.settings import Cluster
from fast_litellm_shm.concurrency import ConcurrencyLimiter
from fast_litellm_shm.handle import key_bytes
from fast_litellm_shm.limiter import RateLimiter
from fast_litellm_shm.limits import AnyLimit, InFlight
from fast_litellm_shm.native import Decision, Permit, ffi, lib
from fast_litellm_shm.segment import Segment

_PARALLEL = " (parallel)"


class Granted:
    """What a call of the quota holds, as a Permit is for one host. decision: of the rates, or of
    the permits where these deny."""

    __slots__ = ("_ends", "_permit", "decision", "index")

    def __init__(self, decision: Decision, index: int, permit: Permit | None, ends: list[int]):
        self.decision, self.index, self._permit, self._ends = decision, index, permit, ends

    @property
    def in_flight(self) -> int:
        """When too many were in flight: how many of this host."""
        return self._permit.in_flight if self._permit is not None else 0

    def release(self) -> bool:
        return self._permit is not None and bool(self._permit.release())


class Parts:
    """The permits first, then the rates: a denial gives the permit back and consumes nothing."""

    def __init__(
        self,
        found: tuple[AnyLimit | InFlight, ...],
        name: str,
        segment: Segment | None,
        on_full: str,
        cluster: Cluster,
    ) -> None:
        rates = [each for each in found if not isinstance(each, InFlight)]
        most = found[-1].n if isinstance(found[-1], InFlight) else None
        self.rates = self.permits = None
        if rates:
            self.rates = RateLimiter(
                *rates, name=name, segment=segment, on_full=on_full, cluster=cluster
            )
        if most is not None:
            own = name + _PARALLEL if rates else name
            self.permits = ConcurrencyLimiter(most, name=own, segment=segment, cluster=cluster)
        self._count = len(rates)

    @property
    def segment(self) -> Segment:
        return (self.rates or self.permits).segment  # type: ignore[union-attr]

    @property
    def limits(self) -> tuple[AnyLimit | InFlight, ...]:
        """Those in force."""
        rates = self.rates.limits if self.rates is not None else ()
        if self.permits is None:
            return rates
        return (*rates, InFlight(self.permits.max_in_flight))

    def admit(self, key: str | bytes, costs: tuple[int, ...]) -> Granted:
        permit = self.permits.acquire(key) if self.permits is not None else None
        if permit is not None and not permit:
            return Granted(permit.decision, self._count, permit, [])
        if self.rates is None:
            assert permit is not None
            return Granted(permit.decision, 0, permit, [])
        try:
            decision = self.rates.acquire(key, costs[: self._count])
        except BaseException:
            if permit is not None:
                permit.release()
            raise
        if not decision and permit is not None:
            permit.release()
        return Granted(decision, decision.limit_index, permit, self._ends(key) if decision else [])

    def book(
        self, key: str | bytes, charged: tuple[int, ...], actual: tuple[int, ...], held: Granted
    ) -> None:
        """Charge what was used beyond the estimate, into debt if need be; give back what was not,
        as long as its minute lasts."""
        if self.rates is None:
            return
        pairs = list(zip(charged, actual, strict=True))[: self._count]
        more = tuple(max(after - before, 0) for before, after in pairs)
        now = int(lib.fshm_now(self.segment._handle))
        less = tuple(
            max(before - after, 0) if now < end else 0
            for (before, after), end in zip(pairs, held._ends, strict=True)
        )
        if any(more):
            self.rates.charge(key, more)
        if any(less):
            self.rates.refund(key, less)

    def in_flight(self, key: str | bytes) -> int:
        return self.permits.in_flight(key) if self.permits is not None else 0

    def left(self, key: str | bytes) -> list[int]:
        """Of each rate, by what is known here and by the server."""
        if self.rates is None:
            return []
        self.rates.peek(key, (1,) * self._count)  # asks
        raw, left = key_bytes(key), ffi.new("uint64_t[4]")
        count = lib.fshm_remaining(self.rates._handle, raw, len(raw), 0, left)
        if count < 0:
            self.rates._failed(count)
        assert self.rates._wallet is not None
        mine = self.rates._wallet.look(raw)[0]
        return [int(left[i]) + mine[i] for i in range(min(count, len(mine)))]

    def _ends(self, key: str | bytes) -> list[int]:
        """Of each rate, when the window is over that was charged: segment time, ns."""
        assert self.rates is not None
        raw, used, left = key_bytes(key), ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        lib.fshm_known(self.rates._handle, raw, len(raw), 0, used, left)
        now = int(lib.fshm_now(self.segment._handle))
        return [now + int(left[i]) for i in range(self._count)]

    @property
    def cluster(self) -> Any:
        found = self.rates._wallet if self.rates is not None else self.permits._leases  # type: ignore[union-attr]
        return found.cluster if found is not None else None
