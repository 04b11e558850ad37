"""The requests in flight of LiteLLM's built-in limiter, in the segment.

LiteLLM names the slot of a request by an id, and gives it back by that id in the worker that took
it. A slot is a permit of that worker's process: when the worker dies, its slots are free.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from fast_litellm_shm._shared import key_grammar
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.quota import Admission, Quota, numbered_quota

MOST = 100_000  # a larger limit is this one
_MOST_QUOTAS = 1024  # that this process keeps open
_COUNTED = 1000  # the largest limit whose slots are counted for display: 50 us on the event loop
_MOST_SCOPES = 100_000  # whose limits are remembered


class Refused(NamedTuple):
    """which: the index of the scope that had no free slot. in_flight: its slots in use."""

    which: int
    in_flight: int


class Slots:
    """The slots of one segment that this process takes and gives back.

    The permits of each limit are counted apart. When a scope's limit changes, those in flight under
    its earlier limits count too, in every worker that has seen these limits.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._quotas: dict[int, Quota] = {}
        self._held: dict[str, tuple[float, dict[str, Admission]]] = {}  # by id, oldest first
        self._limits: dict[str, tuple[int, ...]] = {}  # of a scope: the present one, earlier ones
        self._own: Counter[str] = Counter()  # slots of a scope that this process holds

    def _quota(self, limit: int) -> Quota:
        found = self._quotas.get(limit)
        if found is None:
            if len(self._quotas) >= _MOST_QUOTAS:
                self._quotas.clear()
            found = self._quotas[limit] = numbered_quota(
                max_parallel=limit, name=key_grammar.NATIVE, segment=self._segment, on_full="raise"
            )
        return found

    def acquire(
        self, gauges: Sequence[tuple[str, int]], slot_id: str, ttl: float
    ) -> list[int] | Refused:
        """Take one slot of every (scope, limit), or none. Returns how many each then has in use.

        A slot that this process has held for ``ttl`` seconds was forgotten, and is given back.
        """
        self._expire(ttl)
        taken: dict[str, Admission] = {}
        counts = []
        held = self._held.get(slot_id, (0.0, {}))[1]
        try:
            for index, (scope, limit) in enumerate(gauges):
                if scope not in held:
                    in_use = self._take(scope, limit, taken)
                    if in_use is not None:
                        self._release(taken)
                        return Refused(index, in_use)
                counts.append(self.count(scope))
        except BaseException:
            self._release(taken)
            raise
        self._held[slot_id] = (time.monotonic(), {**held, **taken})
        return counts

    def _take(self, scope: str, limit: int, taken: dict[str, Admission]) -> int | None:
        """Put a slot into ``taken``. Where none is free: return how many are in use."""
        if limit < 1:
            return self.count(scope)
        limit = min(limit, MOST)
        earlier = self._earlier(scope, limit)
        admission = self._quota(limit).admit(scope)
        if not admission:
            return admission.in_flight + earlier
        # Take first, then count the others: of several processes that do so, the last one to count
        # sees them all.
        if earlier and (others := self._exact(scope) - 1) >= limit:
            admission.release()
            return others
        taken[scope] = admission
        self._own[scope] += 1
        return None

    def _earlier(self, scope: str, limit: int) -> int:
        """Slots in flight under earlier limits of the scope. Remembers the present limit."""
        known = self._limits.get(scope, ())
        if known[:1] == (limit,) and len(known) == 1:
            return 0
        counts = {old: self._quota(old).in_flight(scope) for old in known if old != limit}
        self._limits[scope] = (limit, *(old for old, count in counts.items() if count))
        if len(self._limits) > _MOST_SCOPES:
            del self._limits[next(iter(self._limits))]
        return sum(counts.values())

    def release(self, scopes: Sequence[str], slot_id: str) -> None:
        """Give the slots of that id back. Where this process does not hold them, do nothing."""
        held = self._held.get(slot_id)
        if held is None:
            return
        self._release({scope: held[1].pop(scope) for scope in scopes if scope in held[1]})
        if not held[1]:
            del self._held[slot_id]

    def count(self, scope: str) -> int:
        """Slots of the scope in flight, for display, under the limits of it that this process has
        met (0 before it has taken one). Under a limit above 1,000: only those of this process.
        Admission does not use this number."""
        if max(self._limits.get(scope, (0,))) > _COUNTED:
            return self._own[scope]
        return self._exact(scope)

    def _exact(self, scope: str) -> int:
        return sum(self._quota(limit).in_flight(scope) for limit in self._limits.get(scope, ()))

    def __del__(self) -> None:
        """No caller can give them back any more."""
        self._expire(-math.inf)

    def _expire(self, ttl: float) -> None:
        oldest = time.monotonic() - ttl
        while self._held:
            slot_id, (taken_at, held) = next(iter(self._held.items()))
            if taken_at > oldest:
                return
            del self._held[slot_id]
            self._release(held)

    def _release(self, admissions: dict[str, Admission]) -> None:
        for scope, admission in admissions.items():
            admission.release()
            self._own[scope] -= 1
            if self._own[scope] <= 0:
                del self._own[scope]
