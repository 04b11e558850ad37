"""The windowed counters of LiteLLM's own limiter, in the segment.

LiteLLM keeps three keys of a scope in Redis: when its window began, and how many requests and
tokens were counted since. Both counters begin anew with the window. Here:

- A window is a key of a limiter ``FixedWindow(1, per=size)``: its first hit opens it, and its end,
  an instant of the segment's clock that all processes read alike, is its identity.
- A counter is a key that has this end in its name. So an increment that was meant for one window
  never lands in the next, whoever was stopped in between, and nothing has to be set to 0.

Exact: what a counter holds after an increment (one atomic instruction), hence whether a limit was
passed, up to ``MOST``. A counter counts no further: limits above that number are not enforced.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow

MOST = 2**31 - 1
_SECOND = 1_000_000_000


class OpenWindow(NamedTuple):
    """size: seconds. end: ns of the segment's clock. start: seconds since 1970, as LiteLLM shows
    it; made with the wall clock as it was when this process opened the segment, so two processes
    may differ by a second, and by whatever the clock was set in between."""

    size: int
    end: int
    start: int

    def began_at(self, start: str) -> bool:
        """Is this the window that some process saw begin at ``start``? Windows of one scope begin
        at least ``size`` apart, so half of that cannot be mistaken."""
        apart = abs(int(float(start)) - self.start)
        return apart == 0 or 2 * apart < self.size


class Taken(NamedTuple):
    """What :meth:`Windows.take` did. total: with the charge where there was room, else without.
    window: None where there was no room in a window that nobody has opened."""

    allowed: bool
    total: int
    window: OpenWindow | None


class Windows:
    """All windows and counters of one segment. Scopes and kinds are any strings; ``size`` is the
    length of a window in whole seconds, 1 .. 416 days, and windows of different sizes count apart.

    Raises SegmentError where the segment is damaged, SegmentFullError where it has no room.
    """

    def __init__(self, segment: Segment, size: int = 60) -> None:
        self._segment = segment
        self._epoch_ns = time.time_ns() - int(lib.fshm_now(segment._handle))
        self._limiters: dict[int, tuple[RateLimiter, RateLimiter]] = {}
        self._of(size)

    def _of(self, size: int) -> tuple[RateLimiter, RateLimiter]:
        """The limiter of the windows of that size, and that of what is counted in them."""
        found = self._limiters.get(size)
        if found is None:
            options: Any = {"segment": self._segment, "on_full": "raise", "cluster": False}
            found = self._limiters[size] = (
                RateLimiter(FixedWindow(1, size), name=f"litellm windows of {size} s", **options),
                RateLimiter(FixedWindow(MOST, size), name=f"litellm counts of {size} s", **options),
            )
        return found

    def opened(self, scope: str, size: int) -> OpenWindow | None:
        """The scope's window now; None where none is open."""
        window, is_open = self._hit(lib.FSHM_PEEK, scope, size)
        return window if is_open else None

    def open(self, scope: str, size: int) -> OpenWindow:
        """The scope's window now, opened where none is."""
        # Looked at first, since a hit that is turned away would be counted as a request denied.
        # Turned away here, somebody else opened it since the look, and it is that window.
        return self.opened(scope, size) or self._hit(lib.FSHM_ACQUIRE, scope, size)[0]

    def _hit(self, op: int, scope: str, size: int) -> tuple[OpenWindow, bool]:
        now = int(lib.fshm_now(self._segment._handle))
        found = _apply(self._of(size)[0], op, f"{scope}:window".encode(*_UTF8), 1, now)
        end = now + int(found.reset_after_ns)
        start = (end - size * _SECOND + self._epoch_ns) // _SECOND
        return OpenWindow(size, end, start), found.status == lib.FSHM_DENIED

    def find(
        self, scope: str, size: int | None = None, start: str | None = None
    ) -> OpenWindow | None:
        """The scope's open window where its size is not known: ``size`` is tried first, then those
        that this process has met. start: only the one that began then. None where there is none."""
        for each in dict.fromkeys((*((size,) if size else ()), *self._limiters)):
            window = self.opened(scope, each)
            if window is not None and (start is None or window.began_at(start)):
                return window
        return None

    def count(self, window: OpenWindow, scope: str, kind: str) -> int:
        """What is counted in the window so far."""
        return MOST - self._of(window.size)[1].peek(_counter(window, scope, kind), 0).remaining

    def add(self, window: OpenWindow, scope: str, kind: str, cost: int) -> int:
        """Count ``cost`` (0 or more) in the window, whatever is counted there. The count after it:
        every one of a thousand that add 1 at once gets another number. Where it would pass
        ``MOST`` nothing is added, and the answer is what it would have been."""
        decision = self._of(window.size)[1].acquire(_counter(window, scope, kind), cost)
        count = MOST - decision.remaining
        return count if decision else count + cost

    def take(self, scope: str, kind: str, size: int, cost: int, limit: int) -> Taken:
        """Count ``cost`` where the count stays at most ``limit``; a cost of 0 asks for room for 1.

        Never more than the limit. It can be turned away by a larger cost that does not fit itself
        and is being taken back at this moment (microseconds), as it would have been an instant
        later by whoever takes that room: which is why it looks before it charges.
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
        """Take ``cost`` from the count, at most to 0. In a window that is over: nothing."""
        counter = self._of(window.size)[1]
        _apply(counter, lib.FSHM_REFUND, _counter(window, scope, kind), cost, 0)


_UTF8 = ("utf-8", "surrogatepass")


def _counter(window: OpenWindow, scope: str, kind: str) -> bytes:
    return f"{scope}:{kind}@{window.end}".encode(*_UTF8)


def _apply(limiter: SharedLimits, op: int, key: bytes, cost: int, now: int) -> Any:
    found = ffi.new("fshm_decision *")
    costs = ffi.new("uint64_t[4]", [cost] * 4)
    lib.fshm_apply(limiter._handle, op, key, len(key), costs, 0, now, found)
    if found.status < 0:
        limiter._failed(found.status)
    return found
