"""Limits that are written as text."""

from __future__ import annotations

import pytest

from fast_litellm_shm import FixedWindow, RateLimiter, Segment, SlidingWindow, TokenBucket, limits
from fast_litellm_shm.integrations.web.rules import Rule
from fast_litellm_shm.limits import LimitSpec, describe, parse, parse_all


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("100 per minute", TokenBucket(100, 60)),
        ("5r/s", TokenBucket(5, 1)),
        ("30r/m", TokenBucket(30, 60)),
        ("5 requests per second", TokenBucket(5, 1)),
        ("1 request/2 hours", TokenBucket(1, 7200)),
        ("7 reqs per 10 s burst=2", TokenBucket(7, 10, burst=2)),
        ("100/60s burst 10 strict", TokenBucket(100, 60, burst=10, strict=True)),
        ("  100   per  day ", FixedWindow(100, per="day")),
        ("1000/month in Asia/Tokyo", FixedWindow(1000, per="month", timezone="Asia/Tokyo")),
        ("10 per 1.5 s window", FixedWindow(10, 1.5)),
        ("10/2 minutes sliding", SlidingWindow(10, 120)),
    ],
)
def test_one(text: str, limit: LimitSpec) -> None:
    assert parse(text) == limit
    assert parse(describe(limit)) == limit
    assert parse_all(text) == (limit,)


@pytest.mark.parametrize("between", ["; ", ";", ", ", " | "])
def test_several(between: str) -> None:
    text = f"10 per second{between}1000 per day in Europe/Berlin"
    found = (TokenBucket(10, 1), FixedWindow(1000, per="day", timezone="Europe/Berlin"))
    assert parse_all(text) == found


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("often", "must be written as '100 per minute'.*not 'often'"),
        ("100/minut", "not '100/minut': do you mean minute"),
        ("10/second; 1000/dya", "limit 2 of '10/second; 1000/dya': .*do you mean day"),
        ("10/second;", "limit 2 of '10/second;': .* not ''"),
        ("1,000 per day", "limit 1 of '1,000 per day'"),
        ("10/second; 0/day", "limit 2 of '10/second; 0/day': .*n"),
        ("5 per hour in UTC burst 3; 1/s", "limit 1 of "),
    ],
)
def test_bad_ones(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_all(text)


def test_where_limits_are_taken(segment: Segment) -> None:
    text = "2 per second burst 2; 100 per day"
    limiter = RateLimiter(text, name="spelled", segment=segment)
    assert limiter.limits == (TokenBucket(2, 1), FixedWindow(100, per="day"))
    assert [bool(limiter.acquire("k")) for _ in range(3)] == [True, True, False]
    assert limits.checked(["1/s; 2/m", TokenBucket(3, 60)])[2] == TokenBucket(3, 60)
    with pytest.raises(ValueError, match="takes 1 to 4 limits, not 5"):
        RateLimiter("1/s; 2/m; 3/h; 4/d; 5/week", name="many", segment=segment)
    assert Rule("10/second; 1000/day", name="rule").limits[1] == FixedWindow(1000, per="day")
