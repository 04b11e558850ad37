"""How requests wait for their turn, under a rule with ``wait``."""

from __future__ import annotations

from fast_litellm_shm._shared import moved_clock
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm.limiters.grantors import Cost, Held, Key, Quotas
from fast_litellm_shm.limiters.rate import deadline_ns
from fast_litellm_shm.limiters.waiting import Pace, Steps, Waits, Wish, in_turn, run_async
from fast_litellm_shm.limits import InFlight

_SOON = 1_000_000  # ns: between two attempts


class Turns:
    """Of the requests of one rule. pace: how fast they are served."""

    def __init__(self, grantor: Quotas) -> None:
        self._grantor, self.pace = grantor, Pace()

    def may_come(self, denied: Held, seconds: float) -> bool:
        """Whether a request that was denied may be admitted within so many seconds."""
        return self._pause(denied, deadline_ns(seconds)) is not None

    def _pause(self, denied: Held, deadline: int) -> int | None:
        """For how many ns at most to wait for the next attempt; None: no attempt before the
        deadline would be admitted."""
        retry = denied.decision.retry_after_ns
        if retry == 0:  # when a request in flight ends
            return self._grantor.wake_ns
        if retry is None or retry > deadline - monotonic_ns():
            return None
        return max(retry, _SOON)

    async def wait(self, waits: Waits, key: Key, cost: Cost, seconds: float, wished: Wish) -> Held:
        """Admit a request when it is its turn. Raises Shed. Cancelled, it holds nothing."""
        return await run_async(self._wait(waits, key, cost, deadline_ns(seconds), wished))

    def _wait(self, waits: Waits, key: Key, cost: Cost, deadline: int, wished: Wish) -> Steps[Held]:
        grantor = self._grantor
        states, raw = grantor.queue(key)
        place = waits.place(states, raw, wished.order)
        granted: list[Held] = []

        def attempt() -> Steps[tuple[Held, int | None]]:
            held = yield from grantor.admitting(waits, key, cost)
            if not held.allowed:
                pause = self._pause(held, deadline)
                if pause and held.decision.retry_after_ns and grantor.segment_clock:
                    moved_clock.jump(grantor.segment, pause)
                return held, pause
            granted.append(held)
            place.served(self._service(cost))
            return held, None

        def refused() -> Held:
            return grantor.denied(key, cost)

        try:
            return (yield from in_turn(waits, place, attempt, refused, deadline, wished, self.pace))
        except BaseException:
            for held in granted:
                held.release()  # the traceback may keep it
            raise

    def _service(self, cost: Cost) -> int:
        """What a tenant is served by a request: tokens; one, where all that is limited is how many
        are in flight."""
        if isinstance(self._grantor.limits[0], InFlight):
            return 1
        return max(cost if isinstance(cost, int) else max(cost), 1)
