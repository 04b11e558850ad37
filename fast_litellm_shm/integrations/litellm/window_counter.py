"""Counters of the segment that begin anew with each window, and deny nothing."""

from __future__ import annotations

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow


class WindowCounter:
    """A count for each key. The first increment of a key opens its window, of ``per`` seconds; the
    count returns to 0 when the window ends. Exact up to ``most``.

    name: that of the limiter which keeps it. It counts on this host alone. on_full: as of
    :class:`RateLimiter`; by default SegmentFullError is raised where the segment has no room for
    another key. Raises SegmentError where there is no segment.
    """

    def __init__(
        self,
        name: str,
        most: int,
        per: float,
        *,
        segment: Segment | None = None,
        on_full: str = "raise",
    ) -> None:
        self.most = most
        self.limiter = RateLimiter(
            FixedWindow(most, per), name=name, segment=segment, on_full=on_full, cluster=False
        )

    def add(self, key: str, by: int) -> int:
        """Add to the count, or subtract from it (by < 0), at most down to 0. Returns the new
        count."""
        limiter = self.limiter
        decision = limiter.charge(key, by) if by > 0 else limiter.refund(key, -by)
        return self.most - decision.remaining

    def add_within(self, key: str, by: int) -> int:
        """Like :meth:`add`, but nothing is added where the count would exceed ``most``. Returns
        the count as it is, or would have been."""
        decision = self.limiter.acquire(key, by)
        count = self.most - decision.remaining
        return count if decision else count + by

    def count(self, key: str) -> int:
        """The count of the window that is open; 0 where none is."""
        return self.most - self.limiter.peek(key, 0).remaining
