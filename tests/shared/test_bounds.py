"""Each limit's bound, from the times at which four real processes were admitted."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
from support import bounds
from support.bounds import Times
from support.children import run
from support.workers import admitted_times, now

from fast_litellm_shm import Limit, Segment, SlidingWindow, Window

PROCESSES, SECONDS = 4, 2.5


def hammer(segment: Segment, *limits: Any, keys: tuple[str, ...] = ("hot",)) -> dict[str, Times]:
    """Admitted times by key, of all processes together."""
    given = [(segment.name, limits, list(keys), SECONDS, PROCESSES, "raise")] * PROCESSES
    found = defaultdict(list)
    for admitted in run(admitted_times, given, "fork"):
        for key, before, after in admitted:
            found[key].append((before, after))
    assert set(found) == set(keys)
    return found


@pytest.mark.parametrize(
    ("n", "per", "burst"), [(100, 1.0, 10), (30, 0.5, 30), (2000, 1.0, 1), (7, 0.1, 3)]
)
def test_bucket(segment: Segment, n: int, per: float, burst: int) -> None:
    times = hammer(segment, Limit(n, per, burst=burst))["hot"]
    assert bounds.worst_excess(times, bounds.bucket(n, per, burst)) <= 0
    assert len(times) > burst


@pytest.mark.parametrize(("n", "per", "burst"), [(50, 0.5, 5), (20, 0.3, 20), (10, 0.25, 1)])
def test_strict(segment: Segment, n: int, per: float, burst: int) -> None:
    times = hammer(segment, Limit(n, per, burst=burst, strict=True))["hot"]
    assert bounds.worst_excess(times, bounds.strict(n, per)) <= 0
    assert len(times) > burst


@pytest.mark.parametrize(("n", "per"), [(50, 0.5), (5, 0.05), (1, 0.02)])
def test_window(segment: Segment, n: int, per: float) -> None:
    times = hammer(segment, Window(n, per))["hot"]
    assert bounds.windows(times, n, per) <= 0
    assert len(times) > n


@pytest.mark.parametrize(("n", "per"), [(50, 0.5), (5, 0.05)])
def test_sliding(segment: Segment, n: int, per: float) -> None:
    times = hammer(segment, SlidingWindow(n, per))["hot"]
    origin = now() - segment.geometry().time_ns
    assert bounds.sliding_counter(times, n, per, origin) <= 0
    assert len(times) > n


def test_several_limits_keep_each_bound(segment: Segment) -> None:
    times = hammer(segment, Limit(60, 1.0, burst=20), Window(10, 0.1))["hot"]
    assert bounds.worst_excess(times, bounds.bucket(60, 1.0, 20)) <= 0
    assert bounds.windows(times, 10, 0.1) <= 0
    assert len(times) > 20


def test_the_judge_finds_one_too_many() -> None:
    ms = 1_000_000
    kept = [(i * 10 * ms, i * 10 * ms + ms) for i in range(100)]
    one_more = [*kept, (500 * ms, 501 * ms), (502 * ms, 503 * ms), (503 * ms, 504 * ms)]
    slow = [*kept, (0, 5000 * ms), (0, 5000 * ms), (0, 5000 * ms)]  # could have been at any time
    for judge in (bounds.bucket(100, 1.0, 2), bounds.strict(2, 0.012)):
        assert bounds.worst_excess(kept, judge) <= 0
        assert bounds.worst_excess(one_more, judge) > 0
    assert bounds.worst_excess(slow, bounds.bucket(100, 1.0, 2)) <= 0
    assert bounds.windows(kept, 10, 0.1) <= 0
    assert bounds.windows(one_more, 10, 0.1) > 0
    assert bounds.sliding_counter(kept, 11, 0.1, 0) <= 0
    assert bounds.sliding_counter(one_more, 11, 0.1, 0) > 0
    assert bounds.sliding_counter(slow, 11, 0.1, 0) <= 0


@pytest.mark.parametrize("capacity", [1, 4])
def test_reuse_races(segment_name: str, capacity: int) -> None:
    """The same few keys inserted as they expire, over and over, into one line or two. The table has
    room for all of them, so nothing is ever refused (on_full="raise" would tell)."""
    segment = Segment(segment_name, capacity=capacity)
    keys = ("a", "b", "c")
    found = hammer(segment, Window(2, 0.004), keys=keys)
    for key in keys:
        assert bounds.windows(found[key], 2, 0.004) <= 0
        assert len(found[key]) > 20


@pytest.mark.parametrize("capacity", [1, 4])
def test_reuse_races_of_buckets(segment_name: str, capacity: int) -> None:
    segment = Segment(segment_name, capacity=capacity)
    keys = ("a", "b", "c")
    found = hammer(segment, Limit(2, 0.004, burst=1), keys=keys)
    for key in keys:
        assert bounds.worst_excess(found[key], bounds.bucket(2, 0.004, 1)) <= 0
        assert len(found[key]) > 20
