"""RateLimiter.block: a key is denied until the latest instant that anybody asked for."""

from __future__ import annotations

from typing import Any

import pytest
from support.children import run
from support.workers import block_for

from fast_litellm_shm import Limit, RateLimiter, Segment, SegmentFullError, SlidingWindow, Window


def make(segment: Segment, *limits: Any, name: str = "t", **more: Any) -> RateLimiter:
    return RateLimiter(*limits, name=name, segment=segment, **more)


def test_it_denies_and_says_until_when(segment: Segment) -> None:
    limiter = make(segment, Limit(10, 60))
    limiter.block("k", 100)
    denied = limiter.acquire("k")
    assert not denied
    assert denied.retry_after is not None and 90 < denied.retry_after <= 100
    assert limiter.acquire("another")
    limiter.reset("k")
    assert limiter.acquire("k")


@pytest.mark.parametrize("order", [(5, 100, 20), (100, 5, 20), (20, 5, 100)], ids=str)
def test_the_longest_stands(segment: Segment, order: tuple[float, ...]) -> None:
    limiter = make(segment, Limit(10, 60))
    for seconds in order:
        limiter.block("k", seconds)
    left = limiter.peek("k").retry_after
    assert left is not None and 90 < left <= 100


def test_of_many_processes_too(segment: Segment) -> None:
    """A sum would be 200 s."""
    run(block_for, [(segment.name, "t", "k", 50.0, 4)] * 4, "fork")
    left = make(segment, Limit(10, 60)).peek("k").retry_after
    assert left is not None and 40 < left <= 50


def test_waiters_wait_it_out(segment: Segment) -> None:
    limiter = make(segment, Limit(10, 60))
    limiter.block("k", 0.05)
    assert limiter.wait("k", timeout=60)
    limiter.block("k", 60)
    assert not limiter.wait("k", timeout=1)  # at once: its turn would come too late


def test_nothing_is_no_block(segment: Segment) -> None:
    limiter = make(segment, Limit(10, 60))
    limiter.block("k", 0)
    assert limiter.acquire("k").remaining == 9


def test_a_window_beside_it_stays_as_it_is(segment: Segment) -> None:
    limiter = make(segment, Window(5, 60), Limit(10, 60))
    limiter.block("k", 100)
    assert not limiter.acquire("k")
    limiter.reset("k")
    assert limiter.acquire("k").remaining == 4


@pytest.mark.parametrize("limit", [Window(5, 60), SlidingWindow(5, 60)], ids=repr)
def test_windows_alone_cannot_be_blocked(segment: Segment, limit: Any) -> None:
    with pytest.raises(
        ValueError, match="'t' cannot block a key: none of its limits is a TokenBucket"
    ):
        make(segment, limit).block("k", 1)


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 1e12])
def test_seconds_out_of_range(segment: Segment, seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be between 0 and"):
        make(segment, Limit(10)).block("k", seconds)


@pytest.mark.parametrize("seconds", [None, "5", True])
def test_seconds_of_a_wrong_type(segment: Segment, seconds: Any) -> None:
    with pytest.raises(TypeError, match="seconds must be a number, not"):
        make(segment, Limit(10)).block("k", seconds)


def test_no_room_for_the_key(segment_name: str) -> None:
    """Told, whatever on_full says: who asks for a block must know that there is none."""
    limiter = make(Segment(segment_name, capacity=1), Limit(10, 3600), on_full="allow")
    with pytest.raises(SegmentFullError, match="no room for another key"):
        for i in range(1000):
            limiter.block(f"key {i}", 100)
