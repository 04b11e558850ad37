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
    assert retry is not None and retry <= HOUR + 1
    limiter = RateLimiter(FixedWindow(100, per=HOUR), name="api", segment=segment)
    assert limiter.peek("k").remaining == 50


def test_it_keeps_nothing_longer(segment: Segment) -> None:
    """What is used fits the new limit, but would be gone later: it stays under the former one."""
    RateLimiter(FixedWindow(100, per=HOUR), name="api", segment=segment).acquire("k", 50)
    limiter = RateLimiter(TokenBucket(50, per=24 * HOUR), name="api", segment=segment)
    decision = limiter.acquire("k", 0)
    assert decision.allowed and decision.remaining == 0
    assert decision.reset_after <= HOUR + 1


def test_a_bucket_denies_it_while_more_than_its_burst_is_used(segment: Segment) -> None:
    """A window of more than the burst became a bucket: it drains as a bucket."""
    RateLimiter(FixedWindow(100, per=HOUR), name="api", segment=segment).acquire("k", 4)
    limiter = RateLimiter(TokenBucket(8, per=60, burst=3), name="api", segment=segment)
    assert limiter.acquire("k", 0).retry_after == pytest.approx(60 / 8, abs=0.5)


def test_it_is_told_when_to_come_back(segment: Segment) -> None:
    """The bucket would drain after the former window has ended: denied until that has."""
    RateLimiter(FixedWindow(2, per=HOUR), name="api", segment=segment).acquire("k", 2)
    limiter = RateLimiter(TokenBucket(1, per=24 * HOUR), name="api", segment=segment)
    decision = limiter.acquire("k", 0)
    assert not decision.allowed
    assert decision.retry_after == pytest.approx(HOUR, abs=60)


def test_a_window_admits_it_whatever_is_used(segment: Segment) -> None:
    """Also where a bucket was in debt before."""
    limiter = RateLimiter(TokenBucket(2, per=HOUR), name="api", segment=segment)
    limiter.charge("k", 5)
    assert not limiter.acquire("k", 0).allowed
    limiter = RateLimiter(FixedWindow(2, per=24 * HOUR), name="api", segment=segment)
    assert limiter.peek("k", 0).allowed
    assert limiter.acquire("k", 0).allowed
    assert not limiter.acquire("k").allowed
