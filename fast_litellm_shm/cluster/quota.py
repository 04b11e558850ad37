"""The limits of a Quota, or of a rule for web requests, that are those of many hosts: a limiter of
permits and one of rates, which the server keeps each by itself."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import Decision, Permit, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster.single_flight import MOST_NAME
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.cluster.loops import off_loop
from fast_litellm_shm.cluster.settings import Cluster
from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
from fast_litellm_shm.limiters.rate import Cost, RateLimiter
from fast_litellm_shm.limits import InFlight, LimitSpec

_PARALLEL = " (parallel)"


def most_name(found: tuple[LimitSpec | InFlight, ...]) -> int:
    """How many bytes a name may have for these limits: one for both kinds is lengthened."""
    both = len({isinstance(each, InFlight) for each in found}) == 2
    return int(MOST_NAME - len(_PARALLEL) if both else MOST_NAME)


def _release(permit: Permit | None) -> None:
    if permit is not None:
        permit.release()


class Granted:
    """What a call of the quota holds, as a Permit is for one host. decision: of the rates, or of
    the permits where these deny. ends: of the windows that were charged. on_loop: nobody may wait
    for the server when it is settled."""

    __slots__ = ("_ends", "_on_loop", "_permit", "decision", "index")

    def __init__(
        self,
        decision: Decision,
        index: int,
        permit: Permit | None,
        ends: list[int],
        on_loop: bool = False,
    ) -> None:
        self.decision, self.index, self._permit = decision, index, permit
        self._ends, self._on_loop = ends, on_loop

    @property
    def in_flight(self) -> int:
        """When too many were in flight: how many of this host."""
        return self._permit.in_flight if self._permit is not None else 0

    def release(self) -> bool:
        return self._permit is not None and bool(self._permit.release())

    def __bool__(self) -> bool:
        """Is a permit held?"""
        return bool(self._permit)


class ClusterQuota:
    """The permits first, then the rates: a denial gives the permit back and consumes nothing.

    settles: what a call was charged is booked when it is over, so its windows must be remembered;
    all of them are Windows of one length. Else what was charged is consumed.
    """

    def __init__(
        self,
        found: tuple[LimitSpec | InFlight, ...],
        name: str,
        segment: Segment | None,
        on_full: str,
        cluster: Cluster,
        *,
        settles: bool = True,
    ) -> None:
        rates = [each for each in found if not isinstance(each, InFlight)]
        most = found[-1].n if isinstance(found[-1], InFlight) else None
        if rates and most is not None and isinstance(name, str):
            room = most_name(found)
            if len(name.encode("utf-8", "surrogatepass")) > room:
                raise ValueError(
                    f"name must be at most {room} bytes for rates and max_parallel over many "
                    f"hosts, not {name!r}"
                )
        self.rates = self.permits = None
        if rates:
            self.rates = RateLimiter(
                *rates, name=name, segment=segment, on_full=on_full, cluster=cluster
            )
        if most is not None:
            own = name + _PARALLEL if rates else name
            self.permits = ConcurrencyLimiter(
                most,
                name=own,
                segment=segment,
                cluster=cluster,
                _shown=name,
                _on_full="raise" if on_full == "raise" else "deny",
            )
        self._count, self._settles = len(rates), settles

    @property
    def segment(self) -> Segment:
        return (self.rates or self.permits).segment  # type: ignore[union-attr]

    @property
    def limits(self) -> tuple[LimitSpec | InFlight, ...]:
        """Those in force."""
        rates = self.rates.limits if self.rates is not None else ()
        if self.permits is None:
            return rates
        return (*rates, InFlight(self.permits.max_in_flight))

    def admit(self, key: str | bytes, costs: Cost) -> Granted:
        """costs: one for each limit; where nothing is settled, as RateLimiter takes them."""
        permit = self.permits.acquire(key) if self.permits is not None else None
        if self.rates is None or (permit is not None and not permit):
            return self._of_permit(permit)
        try:
            charged = self._charge(key, costs)
        except BaseException:
            _release(permit)
            raise
        return self._of_both(permit, charged, False)

    async def admit_async(self, key: str | bytes, costs: Cost) -> Granted:
        """The same for asyncio: whatever has to ask the server does it in a thread. Cancelled, it
        gives back what it has, and what such a thread yet gets: a permit, and what can be settled.
        """
        permit = await self.permits.acquire_async(key) if self.permits is not None else None
        if self.rates is None or (permit is not None and not permit):
            return self._of_permit(permit)
        try:
            charged = await off_loop(
                lambda: self._charge(key, costs), lambda late: self._give_back(key, costs, *late)
            )
        except BaseException:
            _release(permit)
            raise
        return self._of_both(permit, charged, True)

    def _charge(self, key: str | bytes, costs: Cost) -> tuple[Decision, list[int]]:
        """And of each rate, when the window is over that was charged: segment time, ns."""
        assert self.rates is not None
        if not self._settles:
            return self.rates.acquire(key, costs), []
        assert isinstance(costs, tuple)
        before = int(lib.fshm_now(self.segment._handle))
        decision = self.rates.acquire(key, costs[: self._count])
        if not decision:
            return decision, []
        # What is known may be of the next window by now: of the one that was charged, the decision
        # tells. (In seconds: the last digit is not to be trusted.)
        last = before + int(decision.reset_after * 1e9) - 1000
        return decision, [min(end, last) for end in self._ends(key)]

    def _of_permit(self, permit: Permit | None) -> Granted:
        """It denies, or there are no rates."""
        assert permit is not None
        return Granted(permit.decision, 0 if permit else self._count, permit, [])

    @staticmethod
    def _of_both(
        permit: Permit | None, charged: tuple[Decision, list[int]], on_loop: bool
    ) -> Granted:
        decision, ends = charged
        if not decision:
            _release(permit)
        return Granted(decision, decision.limit_index, permit, ends, on_loop)

    def _give_back(
        self, key: str | bytes, costs: Cost, decision: Decision, ends: list[int]
    ) -> None:
        if decision and self._settles:
            assert isinstance(costs, tuple)
            self._book(key, costs, (0,) * len(costs), ends, True)

    def book(
        self, key: str | bytes, charged: tuple[int, ...], actual: tuple[int, ...], held: Granted
    ) -> None:
        """Charge what was used beyond the estimate, into debt if need be; give back what was not,
        as long as its minute lasts. What was admitted on an event loop waits for nobody: a thread
        tells the server."""
        if self.rates is not None:
            self._book(key, charged, actual, held._ends, held._on_loop)

    def _book(
        self,
        key: str | bytes,
        charged: tuple[int, ...],
        actual: tuple[int, ...],
        ends: list[int],
        later: bool,
    ) -> None:
        assert self.rates is not None and self.rates._wallet is not None
        pairs = list(zip(charged, actual, strict=True))[: self._count]
        more = tuple(max(after - before, 0) for before, after in pairs)
        now = int(lib.fshm_now(self.segment._handle))
        less = tuple(
            max(before - after, 0) if now < end else 0
            for (before, after), end in zip(pairs, ends, strict=True)
        )
        if any(more) or any(less):
            wallet = self.rates._wallet
            wallet.book(Settlement(wallet, key_bytes(key), more, less, tuple(ends)), later)

    def in_flight(self, key: str | bytes) -> int:
        return self.permits.in_flight(key) if self.permits is not None else 0

    def left(self, key: str | bytes, ask: bool) -> list[int]:
        """Of each rate, by what the server has last said and what was granted; ask: it is asked."""
        if self.rates is None:
            return []
        if ask:
            self.rates.peek(key, (1,) * self._count)
        raw, left = key_bytes(key), ffi.new("uint64_t[4]")
        count = lib.fshm_remaining(self.rates._handle, raw, len(raw), 0, left)
        if count < 0:
            self.rates._failed(count)
        assert self.rates._wallet is not None
        mine = self.rates._wallet.look(raw)[0]
        return [int(left[i]) + mine[i] for i in range(min(count, len(mine)))]

    def _ends(self, key: str | bytes) -> list[int]:
        """Of each rate, when its window is over, as the server has said. 0 while it is away: what
        a host admits by itself then was not granted to it, so there is nothing to give back."""
        assert self.rates is not None and self.rates._wallet is not None
        if self.rates._wallet.link.away is not None:
            return [0] * self._count
        raw, used, left = key_bytes(key), ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        lib.fshm_known(self.rates._handle, raw, len(raw), 0, used, left)
        now = int(lib.fshm_now(self.segment._handle))
        return [now + int(left[i]) for i in range(self._count)]

    @property
    def cluster(self) -> Any:
        found = self.rates._wallet if self.rates is not None else self.permits._leases  # type: ignore[union-attr]
        return found.cluster if found is not None else None
