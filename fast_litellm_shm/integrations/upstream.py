"""Upstream: what all processes of the host may ask of the servers that they are clients of.

At most so many requests in flight to each origin, so many in a period, and none before the instant
that an answer's ``Retry-After`` named. Knows no HTTP library; what asks it is
:mod:`fast_litellm_shm.integrations.httpx`.
"""

from __future__ import annotations

import asyncio
import email.utils
import math
import time
from collections.abc import Iterable
from datetime import timezone

from fast_litellm_shm import limits
from fast_litellm_shm._shared.native import Permit
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import RateLimitExceeded
from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import LimitSpec, TokenBucket

_LOOK = 1.0  # s: how long a waiter may not hear that its pause was lifted


class Upstream:
    """limits: 0 to 4, for each origin. max_in_flight: 1 .. 100,000; None: no such limit.
    max_retry_after: the longest time, in seconds, that an answer may block its origin for; it comes
    from the network, and a mistake there must not stop all workers for a year. name: processes that
    use the same name share. segment: default ``Segment.default()``."""

    def __init__(
        self,
        limits_: LimitSpec | Iterable[LimitSpec],
        max_in_flight: int | None,
        max_retry_after: float,
        name: str,
        segment: Segment | None,
    ) -> None:
        if isinstance(max_retry_after, bool) or not isinstance(max_retry_after, (int, float)):
            raise TypeError(f"max_retry_after must be a number, not {max_retry_after!r}")
        if not 0 <= max_retry_after <= 86_400 * 30:
            raise ValueError(f"max_retry_after must be 0 s to 30 days, not {max_retry_after!r}")
        chosen = tuple(limits_) if isinstance(limits_, Iterable) else (limits_,)
        self._longest = max_retry_after
        self._name = name
        self._rate = (
            RateLimiter(*limits.checked(chosen), name=f"{name}: rate", segment=segment)
            if chosen
            else None
        )
        self._slots = (
            ConcurrencyLimiter(max_in_flight, name=f"{name}: in flight", segment=segment)
            if max_in_flight is not None
            else None
        )
        # One token: what is blocked denies, whatever is not has room. Nobody ever charges it.
        # And this host's alone: a look at it, which each request takes, must not ask a server.
        self._blocks = RateLimiter(
            TokenBucket(1, per=1), name=f"{name}: retry after", segment=segment, cluster=False
        )

    def blocked(self, origin: str) -> float:
        """Seconds until the origin may be asked again; 0.0: now."""
        return self._blocks.peek(origin).retry_after or 0.0

    def block(self, origin: str, seconds: float) -> None:
        """Nobody is to ask the origin for so long."""
        self._blocks.block(origin, min(max(seconds, 0.0), self._longest))

    def unblock(self, origin: str) -> None:
        """It may be asked again, whatever it said."""
        self._blocks.reset(origin)

    def in_flight(self, origin: str) -> int:
        """Requests in flight to the origin, of all processes; 0 without max_in_flight."""
        return 0 if self._slots is None else self._slots.in_flight(origin)

    def enter(self, origin: str, timeout: float | None) -> Permit | None:
        """Wait for the origin's turn, at most so many seconds; None: for ever. Returns what to
        release when the answer has been read. Raises RateLimitExceeded."""
        end = _end(timeout)
        self._check(origin, end)  # rather than wait for a permit first
        permit = None
        if self._slots is not None:
            permit = self._slots.wait(origin, _left(end))
            if not permit:
                raise self._too_many(origin, permit, timeout)
        try:
            while True:
                self._sleep(origin, end)
                if self._rate is not None:
                    decision = self._rate.wait(origin, timeout=_left(end))
                    if not decision:
                        raise self._too_fast(origin, decision.retry_after, timeout)
                # Blocked meanwhile: its turn has passed. Else all who had one would go at the end
                # of the pause at once, whatever the rate.
                if not self._check(origin, end):
                    return permit
        except BaseException:
            if permit is not None:
                permit.release()
            raise

    async def enter_async(self, origin: str, timeout: float | None) -> Permit | None:
        """enter() for asyncio."""
        end = _end(timeout)
        self._check(origin, end)
        permit = None
        if self._slots is not None:
            permit = await self._slots.wait_async(origin, _left(end))
            if not permit:
                raise self._too_many(origin, permit, timeout)
        try:
            while True:
                await self._sleep_async(origin, end)
                if self._rate is not None:
                    decision = await self._rate.wait_async(origin, timeout=_left(end))
                    if not decision:
                        raise self._too_fast(origin, decision.retry_after, timeout)
                if not self._check(origin, end):
                    return permit
        except BaseException:
            if permit is not None:
                permit.release()
            raise

    def _check(self, origin: str, end: float) -> float:
        """Seconds that it is blocked for; raises where that is longer than may be waited."""
        pause = self.blocked(origin)
        if pause and time.monotonic() + pause > end:
            raise RateLimitExceeded(
                f"{self._name}: {origin} asked for a pause (Retry-After), of which {pause:.3g} s "
                "are left, more than this request may wait; come back then, or wait longer",
                pause,
            )
        return pause

    def _sleep(self, origin: str, end: float) -> None:
        while pause := self._check(origin, end):
            time.sleep(min(pause, _LOOK))

    async def _sleep_async(self, origin: str, end: float) -> None:
        while pause := self._check(origin, end):
            await asyncio.sleep(min(pause, _LOOK))

    def _too_many(self, origin: str, permit: Permit, timeout: float | None) -> RateLimitExceeded:
        most = self._slots.max_in_flight if self._slots is not None else 0
        return RateLimitExceeded(
            f"{self._name}: {permit.in_flight} of {most} requests to {origin} are in flight, and "
            f"none ended within {timeout} s; wait longer, or raise max_in_flight",
            0.0,
        )

    def _too_fast(
        self, origin: str, retry: float | None, timeout: float | None
    ) -> RateLimitExceeded:
        when = "never" if retry is None else f"in {retry:.3g} s"
        return RateLimitExceeded(
            f"{self._name}: the rate of requests to {origin} is used up, and its turn would come "
            f"{when}, not within {timeout} s; wait longer, or raise the limit",
            retry,
        )


def _end(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout


def _left(end: float) -> float | None:
    return None if end == math.inf else max(end - time.monotonic(), 0.0)


def retry_after(value: str | None, date: str | None = None) -> float | None:
    """A ``Retry-After``, in seconds from now: of a number, or of an HTTP date (RFC 9110, 10.2.3).

    date: the answer's ``Date``: then the server's clock need not agree with ours. None: there is no
    such header, or nobody can tell what it means. 0.0: that time is over.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:18])  # 30 thousand million years are enough
    until = _instant(text)
    if until is None:
        return None
    now = _instant(date) if date is not None else None
    return max(until - (time.time() if now is None else now), 0.0)


def _instant(text: str) -> float | None:
    try:
        found = email.utils.parsedate_to_datetime(text.strip())
        if found.tzinfo is None:  # "-0000", and the obsolete forms: UTC all the same
            found = found.replace(tzinfo=timezone.utc)
        return found.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
