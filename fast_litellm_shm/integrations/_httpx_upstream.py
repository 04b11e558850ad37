"""Upstream: what all processes of a host together may send to each origin.

Three bounds: the requests in flight, the requests in a period, and the pause that a response asked
for with ``Retry-After``. It knows no HTTP library: the integrations for httpx, requests and aiohttp
use it. Each of their requests is one :class:`Call`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Iterable
from types import TracebackType
from typing import TypeAlias
from urllib.parse import urlsplit

from fast_litellm_shm import limits
from fast_litellm_shm._shared.moved_clock import at_most, jump, monotonic_ns
from fast_litellm_shm._shared.native import Decision, Permit
from fast_litellm_shm._shared.retry_after import retry_after
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, RateLimitExceeded
from fast_litellm_shm.limiters.adaptive import THROTTLED, AdaptiveCall, AdaptiveConcurrency
from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import Spelled, TokenBucket

__all__ = ["Call", "Held", "LimitedClient", "NotSentError", "Upstream", "origin_of", "retry_after"]

Held: TypeAlias = Permit | AdaptiveCall  # by a request in flight

_LONGEST_SLEEP = 1.0  # s: so much later a waiter notices that its pause was lifted
_SERVER_ERROR = 500
_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
_log = logging.getLogger("fast_litellm_shm")


class NotSentError(RateLimitExceeded):
    """A request was not sent, because it would wait longer than it may."""

    http_status = 503  # of an application that cannot ask its upstream


def origin_of(url: str) -> str:
    """Scheme, host and port, as limits know them: ``https://example.com:443``. All clients call
    this one, so that they count together."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}:{parts.port or _PORTS.get(parts.scheme, 0)}"


class Call:
    """A request that may be sent now, as Upstream.begin() returns it. The client says what became
    of it: answered(), when the head of a response has come; end(), when the response was read, or
    there is none. ``with call:`` ends it if the block fails, and not otherwise."""

    __slots__ = ("_begun", "_origin", "_permit", "_upstream")

    def __init__(self, upstream: Upstream, origin: str, permit: Held | None) -> None:
        self._upstream, self._origin, self._permit = upstream, origin, permit
        self._begun = time.monotonic()

    @property
    def holds(self) -> bool:
        """Is a permit held, until end()?"""
        return self._permit is not None

    def answered(self, status: int, retry_after_: str | None, date: str | None) -> None:
        """The head of a response has come; the last two: its ``Retry-After`` and ``Date``. A pause
        that it asks for begins, for all processes; and a limit that is learned learns from it."""
        refused = status in THROTTLED
        pause = retry_after(retry_after_, date) if refused else None
        try:
            if pause:
                self._upstream.block(self._origin, pause)
            if isinstance(self._permit, AdaptiveCall):
                if refused:
                    self._permit.throttled()  # the pause is here
                elif status >= _SERVER_ERROR:
                    self._permit.failed()
                else:
                    self._permit.ok(time.monotonic() - self._begun)
        except FastShmError as error:  # the response is good all the same
            _log.error(
                "%s answered %s (a pause of %s s), and the other workers cannot be told",
                self._origin,
                status,
                pause or 0,
                exc_info=error,
            )

    def begins(self) -> None:
        """The request is sent now: from here on its time counts."""
        self._begun = time.monotonic()

    def end(self, error: BaseException | None = None) -> None:
        """The request is in flight no longer. error: what it failed with. A second call does
        nothing."""
        permit, self._permit = self._permit, None
        if permit is None:
            return
        if error is not None and isinstance(permit, AdaptiveCall):
            with contextlib.suppress(FastShmError):
                permit.ended(error)
        permit.release()

    def __enter__(self) -> Call:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self.end(error)


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

    def begin(self, origin: str, timeout: float | None) -> Call:
        """Wait until a request may be sent to the origin, at most so many seconds; None: without
        end. Raises NotSentError."""
        end = _end(timeout)
        self._pause(origin, end)  # rather than wait for a permit first
        permit: Held | None = None
        if self._permits is not None:
            permit = self._in_flight(origin, self._permits.wait(origin, _left(end)), timeout)
        with Call(self, origin, permit) as call:
            while True:
                while pause := self._pause(origin, end):
                    if not jump(self._pauses.segment, math.ceil(pause * 1e9)):
                        time.sleep(_sleep(pause))
                if self._rate is not None:
                    decision = self._rate.wait(origin, timeout=_left(end))
                    self._in_rate(origin, decision, timeout)
                # A pause that began meanwhile: wait for another turn. Otherwise all requests that
                # had one would go at the end of the pause, whatever the rate.
                if not self._pause(origin, end):
                    call.begins()
                    return call

    async def begin_async(self, origin: str, timeout: float | None) -> Call:
        """begin() for asyncio."""
        end = _end(timeout)
        self._pause(origin, end)
        permit: Held | None = None
        if self._permits is not None:
            found: Held = await self._permits.wait_async(origin, _left(end))
            permit = self._in_flight(origin, found, timeout)
        with Call(self, origin, permit) as call:
            while True:
                while pause := self._pause(origin, end):
                    if not jump(self._pauses.segment, math.ceil(pause * 1e9)):
                        await asyncio.sleep(_sleep(pause))
                if self._rate is not None:
                    decision = await self._rate.wait_async(origin, timeout=_left(end))
                    self._in_rate(origin, decision, timeout)
                if not self._pause(origin, end):
                    call.begins()
                    return call

    def _pause(self, origin: str, end: float) -> float:
        """Seconds until the pause of the origin ends. Raises if the request may not wait for it."""
        pause = self.blocked(origin)
        if pause and _now() + pause > end:
            raise NotSentError(
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
        raise NotSentError(
            f"{self._name}: {permit.in_flight} of {most} requests to {origin} are in flight, and "
            f"none ended within {timeout} s; wait longer, or {do}",
            0.0,
        )

    def _in_rate(self, origin: str, decision: Decision, timeout: float | None) -> None:
        if not decision:
            retry = decision.retry_after
            when = "never" if retry is None else f"in {retry:.3g} s"
            raise NotSentError(
                f"{self._name}: the rate of requests to {origin} is used up, and its turn would "
                f"come {when}, not within {timeout} s; wait longer, or raise the limit",
                retry,
            )


class LimitedClient:
    """What the clients of all libraries have: their options, checked, and ``upstream``."""

    def __init__(
        self,
        *,
        max_in_flight: int | AdaptiveConcurrency | None = None,
        limits: Spelled | Iterable[Spelled] = (),
        max_wait: float | None = None,
        max_retry_after: float = 3600.0,
        name: str,
        segment: Segment | None = None,
    ) -> None:
        if max_wait is not None and (
            isinstance(max_wait, bool) or not isinstance(max_wait, (int, float)) or max_wait < 0
        ):
            raise ValueError(f"max_wait must be a number of seconds of 0 or more, not {max_wait!r}")
        self._upstream = Upstream(limits, max_in_flight, max_retry_after, name, segment)
        self._max_wait = max_wait

    @property
    def upstream(self) -> Upstream:
        """To inspect the limits, and to end a pause: ``blocked(origin)``, ``in_flight(origin)``,
        ``unblock(origin)``; an origin is ``https://example.com:443``."""
        return self._upstream

    def _wait(self, own: float | None) -> float | None:
        """Seconds that a request may wait; None: without end. own: what the request itself says."""
        return own if self._max_wait is None else self._max_wait


def _now() -> float:
    return monotonic_ns() / 1e9


def _sleep(pause: float) -> float:
    return at_most(round(min(pause, _LONGEST_SLEEP) * 1e9)) / 1e9


def _end(timeout: float | None) -> float:
    return math.inf if timeout is None else _now() + timeout


def _left(end: float) -> float | None:
    return None if end == math.inf else max(end - _now(), 0.0)
