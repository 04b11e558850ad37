"""Limits that two processes change all the time, while two others ask: never too much."""

from __future__ import annotations

from typing import Any

import pytest
from support import bounds
from support.bounds import Times
from support.children import run
from support.workers import admitted_times, keep_changing, now

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window

SECONDS, PER = 4.0, 2.0
FEW = (100, 40, 60)  # few enough to be kept side by side
MANY = tuple(range(30, 101))  # more than there is room for: states must be brought under new ones
KINDS: list[Any] = [Limit, Window, SlidingWindow]


def _take_part(changes: bool, *given: Any) -> Any:
    return keep_changing(*given) if changes else admitted_times(*given)


def hammer(segment: Segment, choices: list[tuple[Any, ...]]) -> Times:
    """When a key was admitted, by the time around each call."""
    most = max(choices, key=lambda limits: limits[0].n)
    RateLimiter(*most, name="times", segment=segment)
    asking = (False, segment.name, most, ["hot"], SECONDS, 4, "raise")
    changing = (True, segment.name, "times", choices, SECONDS, 4)
    *asked, one, other = run(_take_part, [asking, asking, changing, changing], "fork")
    assert min(one, other) > 20  # they did change, more often than rules can lie side by side
    return [(before, after) for found in asked for _, before, after in found]


def excess(segment: Segment, times: Times, kind: Any) -> int:
    if kind is Window:
        return bounds.windows(times, 100, PER)
    if kind is SlidingWindow:
        return bounds.sliding_counter(times, 100, PER, now() - segment.geometry().time_ns)
    return bounds.worst_excess(times, bounds.bucket(100, PER, 100))


@pytest.mark.parametrize("numbers", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_never_more_than_the_largest_limit_allows(
    segment: Segment, kind: Any, numbers: tuple[int, ...]
) -> None:
    times = hammer(segment, [(kind(n, PER),) for n in numbers])
    assert excess(segment, times, kind) <= 0
    assert len(times) >= 100


def test_with_another_limit_that_comes_and_goes(segment: Segment) -> None:
    choices = [(Limit(100, PER),), (Limit(80, PER), Window(90, PER)), (Limit(60, PER),)]
    times = hammer(segment, choices)
    assert excess(segment, times, Limit) <= 0
    assert len(times) >= 60


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_sleeping_key_keeps_what_it_used(segment: Segment, kind: Any) -> None:
    """Through any number of changes, asked or not, and it owes nothing for having used more."""
    limiter = RateLimiter(kind(1000, 3600), name="sleep", segment=segment)
    assert limiter.acquire("asleep", cost=500)
    assert limiter.acquire("denied", cost=500)
    for n in range(1, 400):
        changed = RateLimiter(kind(n, 3600), name="sleep", segment=segment)
        denied = changed.acquire("denied")
        assert denied.allowed == (n > 500)
        assert denied.retry_after is not None and denied.retry_after <= 2 * 3600
    RateLimiter(kind(1000, 3600), name="sleep", segment=segment)
    for key in ("asleep", "denied"):
        assert not limiter.acquire(key, cost=502)
        assert limiter.acquire(key, cost=500)


def test_throttled_and_settled(segment: Segment) -> None:
    """One token more than was estimated, while the limit is lowered, is a debt of one token."""
    limiter = RateLimiter(Window(90_000, 60), name="tpm", segment=segment)
    assert all(limiter.acquire("team", cost=20_000) for _ in range(4))
    throttled = RateLimiter(Window(100, 60), name="tpm", segment=segment)
    throttled.charge("team", 1)
    retry = throttled.acquire("team").retry_after
    assert retry is not None and retry <= 61
    RateLimiter(Window(90_000, 60), name="tpm", segment=segment)
    assert not limiter.acquire("team", cost=10_000)
    assert limiter.acquire("team", cost=9_999)
