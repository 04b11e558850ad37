"""A request may cost nothing of one of several limits: then it changes nothing of that limit."""

from __future__ import annotations

import pytest

from fast_litellm_shm import FixedWindow, RateLimiter, Segment, TokenBucket

HOUR = 3600


def test_it_makes_no_debt_of_old_use(segment: Segment) -> None:
    """50 of 100 used, lowered to 7: these are gone with their window, and not after seven."""
    RateLimiter(FixedWindow(100, per=HOUR), name="api", segment=segment).acquire("k", 50)
    limiter = RateLimiter(FixedWindow(7, per=HOUR), name="api", segment=segment)
    assert limiter.acquire("k", 0).allowed
    retry = limiter.peek("k").retry_after
    assert retry is not None and retry <= HOUR
    limiter = RateLimiter(FixedWindow(100, per=HOUR), name="api", segment=segment)
    assert limiter.peek("k").remaining == 50


def test_it_is_not_denied_for_ever(segment: Segment) -> None:
    """A window of more than the burst became a bucket: it drains as a bucket."""
    RateLimiter(FixedWindow(100, per=HOUR), name="api", segment=segment).acquire("k", 4)
    limiter = RateLimiter(TokenBucket(8, per=60, burst=3), name="api", segment=segment)
    assert limiter.acquire("k", 0).retry_after == pytest.approx(60 / 8, abs=0.5)
