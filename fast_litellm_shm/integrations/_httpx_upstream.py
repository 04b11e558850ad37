"""Upstream: what all processes of a host together may send to each origin.

Three bounds: the requests in flight, the requests in a period, and the pause that a response asked
for with ``Retry-After``. It knows no HTTP library; :mod:`fast_litellm_shm.integrations.httpx` uses
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared.native import Decision, Permit
from fast_litellm_shm._shared.retry_after import retry_after
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, RateLimitExceeded
from fast_litellm_shm.limiters.adaptive import THROTTLED, AdaptiveCall, AdaptiveConcurrency
from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import Spelled, TokenBucket

__all__ = ["Held", "Upstream", "released_on_error", "retry_after"]

Held: TypeAlias = Permit | AdaptiveCall  # by a request in flight

_LONGEST_SLEEP = 1.0  # s: so much later a waiter notices that its pause was lifted
_SERVER_ERROR = 500
_log = logging.getLogger("fast_litellm_shm")


class Upstream:
    """limits: 0 to 4, for each origin. max_in_flight: 1 .. 100,000; an AdaptiveConcurrency, which
    learns it from :meth:`ended`; None: no such limit.
    max_retry_after: the longest pause, in seconds, that a response can ask for. It comes from the
    network, and a mistake there must not stop all workers for a year. name: processes that use the
    same name share. segment: default ``Segment.default()``."""

    def __init__(
        self,
        limits_: Spelled | Iterable[Spelled],
        max_in_flight: int | AdaptiveConcurrency | None,
        max_retry_after: float,
        name: str,
        segment: Segment | None,
    ) -> None:
        if isinstance(max_retry_after, bool) or not isinstance(max_retry_after, (int, float)):
            raise TypeError(f"max_retry_after must be a number, not {max_retry_after!r}")
        if not 0 <= max_retry_after <= 86_400 * 30:
            raise ValueError(f"max_retry_after must be 0 s to 30 days, not {max_retry_after!r}")
        chosen: tuple[Spelled, ...] = (
            (limits_,)
            if isinstance(limits_, str) or not isinstance(limits_, Iterable)
            else tuple(limits_)
        )
        self._longest = max_retry_after
        self._name = name
        self._rate: RateLimiter | None = None
        if chosen:
            found = limits.checked(chosen)
            self._rate = RateLimiter(*found, name=f"{name}: rate", segment=segment)
        self._permits: ConcurrencyLimiter | AdaptiveConcurrency | None = None
        if isinstance(max_in_flight, AdaptiveConcurrency):
            self._permits = max_in_flight
        elif max_in_flight is not None:
            in_flight = f"{name}: in flight"
            self._permits = ConcurrencyLimiter(max_in_flight, name=in_flight, segment=segment)
        # One token, which no call ever consumes: a key that is blocked denies, any other admits.
        # It is never over hosts: each request looks at it, and must not ask a server for that.
        self._pauses = RateLimiter(
            TokenBucket(1, per=1), name=f"{name}: retry after", segment=segment, cluster=False
        )

    def blocked(self, origin: str) -> float:
        """Seconds until the pause of the origin ends; 0.0: there is none."""
        return self._pauses.peek(origin).retry_after or 0.0

    def block(self, origin: str, seconds: float) -> None:
        """Begin a pause: no process sends a request to the origin for so long."""
        self._pauses.block(origin, min(max(seconds, 0.0), self._longest))

    def unblock(self, origin: str) -> None:
        """End the pause of the origin."""
        self._pauses.reset(origin)

    def in_flight(self, origin: str) -> int:
        """Requests in flight to the origin, of all processes; 0 without max_in_flight."""
        return 0 if self._permits is None else self._permits.in_flight(origin)

    def enter(self, origin: str, timeout: float | None) -> Held | None:
        """Wait until a request may be sent to the origin, at most so many seconds; None: without
        end. Returns the permit to release when the response has been read. Raises
        RateLimitExceeded."""
        end = _end(timeout)
        self._pause(origin, end)  # rather than wait for a permit first
        permit: Held | None = None
        if self._permits is not None:
            permit = self._in_flight(origin, self._permits.wait(origin, _left(end)), timeout)
        with released_on_error(permit):
            while True:
                while pause := self._pause(origin, end):
                    time.sleep(min(pause, _LONGEST_SLEEP))
                if self._rate is not None:
                    decision = self._rate.wait(origin, timeout=_left(end))
                    self._in_rate(origin, decision, timeout)
                # A pause that began meanwhile: wait for another turn. Otherwise all requests that
                # had one would go at the end of the pause, whatever the rate.
                if not self._pause(origin, end):
                    return permit

    async def enter_async(self, origin: str, timeout: float | None) -> Held | None:
        """enter() for asyncio."""
        end = _end(timeout)
        self._pause(origin, end)
        permit: Held | None = None
        if self._permits is not None:
            found: Held = await self._permits.wait_async(origin, _left(end))
            permit = self._in_flight(origin, found, timeout)
        with released_on_error(permit):
            while True:
                while pause := self._pause(origin, end):
                    await asyncio.sleep(min(pause, _LONGEST_SLEEP))
                if self._rate is not None:
                    decision = await self._rate.wait_async(origin, timeout=_left(end))
                    self._in_rate(origin, decision, timeout)
                if not self._pause(origin, end):
                    return permit

    def ended(
        self,
        origin: str,
        permit: Held | None,
        *,
        status: int,
        seconds: float,
        retry_after: float | None = None,
    ) -> None:
        """A response has come; the permit stays held until it has been read. status: of the
        response, of which 429 and 503 are refusals. seconds: since the request was sent.
        retry_after: its header, in seconds: the pause that a refusal asks for. A request that ends
        by an exception: :func:`released_on_error`. Raises nothing: the response is good all the
        same."""
        refused = status in THROTTLED
        try:
            if refused and retry_after:
                self.block(origin, retry_after)
            if isinstance(permit, AdaptiveCall):
                if refused:
                    permit.throttled()  # the pause is here
                elif status >= _SERVER_ERROR:
                    permit.failed()
                else:
                    permit.ok(seconds)
        except FastShmError as error:
            _log.error(
                "%s answered %s (Retry-After: %s s), and the other workers cannot be told",
                origin,
                status,
                retry_after,
                exc_info=error,
            )

    def _pause(self, origin: str, end: float) -> float:
        """Seconds until the pause of the origin ends. Raises if the request may not wait for it."""
        pause = self.blocked(origin)
        if pause and time.monotonic() + pause > end:
            raise RateLimitExceeded(
                f"{self._name}: {origin} asked for a pause (Retry-After), of which {pause:.3g} s "
                "are left, more than this request may wait; come back then, or wait longer",
                pause,
            )
        return pause

    def _in_flight(self, origin: str, permit: Held, timeout: float | None) -> Held:
        if permit or self._permits is None:
            return permit
        if isinstance(self._permits, ConcurrencyLimiter):
            most, do = self._permits.max_in_flight, "raise max_in_flight"
        else:
            most, do = self._permits.limit(origin), "see docs/adaptive.md if that limit is too low"
        raise RateLimitExceeded(
            f"{self._name}: {permit.in_flight} of {most} requests to {origin} are in flight, and "
            f"none ended within {timeout} s; wait longer, or {do}",
            0.0,
        )

    def _in_rate(self, origin: str, decision: Decision, timeout: float | None) -> None:
        if not decision:
            retry = decision.retry_after
            when = "never" if retry is None else f"in {retry:.3g} s"
            raise RateLimitExceeded(
                f"{self._name}: the rate of requests to {origin} is used up, and its turn would "
                f"come {when}, not within {timeout} s; wait longer, or raise the limit",
                retry,
            )


@contextmanager
def released_on_error(permit: Held | None) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if isinstance(permit, AdaptiveCall):
            with contextlib.suppress(FastShmError):
                permit.ended(error)
        if permit is not None:
            permit.release()
        raise


def _end(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout


def _left(end: float) -> float | None:
    return None if end == math.inf else max(end - time.monotonic(), 0.0)
