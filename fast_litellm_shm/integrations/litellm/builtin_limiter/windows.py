"""The windowed counters of LiteLLM's built-in limiter, in the segment.

In Redis, LiteLLM keeps three keys for a scope: when its window began, and the requests and tokens
since. Both counters begin anew with the window. Here:

- A window is a key of a limiter ``FixedWindow(1, per=size)``. Its first hit opens it. Its end, an
  instant of the segment's clock, which all processes read alike, is its identity.
- A counter is a key with that end in its name. So an increment that was meant for one window never
  counts in the next, however long its process was stopped, and no counter has to be set to 0.

Exact up to ``MOST``: what a counter holds after an increment (one atomic instruction), and so
whether a limit was passed. A counter counts no further: larger limits are not enforced.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.litellm.window_counter import WindowCounter

MOST = 2**31 - 1
_SECOND = 1_000_000_000


class OpenWindow(NamedTuple):
    """size: seconds. end: ns of the segment's clock. start: seconds since 1970, as LiteLLM shows
    it. It is computed from the wall clock at the time when this process opened the segment: two
    processes may differ by a second, and by what the clock was set in between."""

    size: int
    end: int
    start: int

    def began_at(self, start: str) -> bool:
        """Whether this is the window that some process saw begin at ``start``. Windows of one scope
        begin at least ``size`` apart, so a difference of less than half of that is the same."""
        apart = abs(int(float(start)) - self.start)
        return apart == 0 or 2 * apart < self.size


class Taken(NamedTuple):
    """The result of :meth:`Windows.take`. total: the count, with the charge if it was allowed.
    window: None where it was not allowed and no window is open."""

    allowed: bool
    total: int
    window: OpenWindow | None


class Windows:
    """All windows and counters of one segment. Scopes and kinds are any strings. ``size`` is the
    length of a window in whole seconds, 1 .. 416 days; windows of different sizes count apart.

    Raises SegmentError where the segment is damaged, SegmentFullError where it has no room.
    """

    def __init__(self, segment: Segment, size: int = 60) -> None:
        self._segment = segment
        self._epoch_ns = time.time_ns() - int(lib.fshm_now(segment._handle))
        self._limiters: dict[int, tuple[WindowCounter, WindowCounter]] = {}
        self._of(size)

    def _of(self, size: int) -> tuple[WindowCounter, WindowCounter]:
        """The windows of that size, of one hit each, and the counter in them."""
        found = self._limiters.get(size)
        if found is None:
            found = self._limiters[size] = (
                WindowCounter(f"litellm windows of {size} s", 1, size, segment=self._segment),
                WindowCounter(f"litellm counts of {size} s", MOST, size, segment=self._segment),
            )
        return found

    def opened(self, scope: str, size: int) -> OpenWindow | None:
        """The scope's window now; None where none is open."""
        window, is_open = self._hit(lib.FSHM_PEEK, scope, size)
        return window if is_open else None

    def open(self, scope: str, size: int) -> OpenWindow:
        """The scope's window now, opened where none is."""
        # It looks first, since a hit that is denied would be counted as a denied request. If the
        # hit is denied, another process has opened the window since the look.
        return self.opened(scope, size) or self._hit(lib.FSHM_ACQUIRE, scope, size)[0]

    def _hit(self, op: int, scope: str, size: int) -> tuple[OpenWindow, bool]:
        now = int(lib.fshm_now(self._segment._handle))
        limiter, key = self._of(size)[0].limiter, f"{scope}:window".encode("utf-8", "surrogatepass")
        found = ffi.new("fshm_decision *")
        lib.fshm_apply(limiter._handle, op, key, len(key), (1, 1, 1, 1), 0, now, found)
        if found.status < 0:
            limiter._failed(found.status)
        end = now + int(found.reset_after_ns)
        start = (end - size * _SECOND + self._epoch_ns) // _SECOND
        return OpenWindow(size, end, start), found.status == lib.FSHM_DENIED

    def find(
        self, scope: str, size: int | None = None, start: str | None = None
    ) -> OpenWindow | None:
        """The scope's open window; None where there is none. size: tried first, then the sizes that
        this process has met. start: only the window that began then."""
        for each in dict.fromkeys((*((size,) if size else ()), *self._limiters)):
            window = self.opened(scope, each)
            if window is not None and (start is None or window.began_at(start)):
                return window
        return None

    def count(self, window: OpenWindow, scope: str, kind: str) -> int:
        """The count of the window so far."""
        return self._of(window.size)[1].count(_key(window, scope, kind))

    def add(self, window: OpenWindow, scope: str, kind: str, cost: int) -> int:
        """Count ``cost`` (0 or more) in the window, whatever is counted there. Returns the count
        after it: each of a thousand concurrent increments of 1 gets another number. Where it would
        exceed ``MOST`` nothing is added, and it returns what the count would have been."""
        return self._of(window.size)[1].add_within(_key(window, scope, kind), cost)

    def take(self, scope: str, kind: str, size: int, cost: int, limit: int) -> Taken:
        """Count ``cost`` where the count stays at most ``limit``. A cost of 0 takes nothing, and is
        allowed where there is room for 1.

        Never more than the limit. It may be denied because of a larger cost that does not fit and
        is being given back (for microseconds): to make that rare, it looks before it charges.
        """
        window = self.opened(scope, size)
        count = 0 if window is None else self.count(window, scope, kind)
        if count + max(cost, 1) > limit:
            return Taken(False, count, window)
        window = window or self.open(scope, size)
        if not cost:
            return Taken(True, count, window)
        count = self.add(window, scope, kind, cost)
        if count <= limit:
            return Taken(True, count, window)
        if count <= MOST:  # beyond it nothing was added
            self.give_back(window, scope, kind, cost)
        return Taken(False, count - cost, window)

    def give_back(self, window: OpenWindow, scope: str, kind: str, cost: int) -> None:
        """Subtract ``cost`` from the count, at most down to 0. In a window that has ended:
        nothing."""
        self._of(window.size)[1].add(_key(window, scope, kind), -cost)


def _key(window: OpenWindow, scope: str, kind: str) -> str:
    return f"{scope}:{kind}@{window.end}"
