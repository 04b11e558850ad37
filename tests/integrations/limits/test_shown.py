"""Keys of the storages for ``limits`` as people see them: by their own limit, not the storage's."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

limits = pytest.importorskip("limits", reason="not installed: limits")

from limits import parse  # noqa: E402
from limits.storage import storage_from_string  # noqa: E402
from limits.strategies import (  # noqa: E402
    FixedWindowRateLimiter,
    MovingWindowRateLimiter,
    SlidingWindowCounterRateLimiter,
)

import fast_litellm_shm.integrations.limits  # noqa: E402, F401 - registers shm://
from fast_litellm_shm import RateLimiter, Segment, Window  # noqa: E402
from fast_litellm_shm._shared import key_grammar  # noqa: E402
from fast_litellm_shm._shared.inspection import Inspection, KeyRow  # noqa: E402

STRATEGIES: dict[str, Any] = {
    key_grammar.FIXED: FixedWindowRateLimiter,
    key_grammar.SLIDING: SlidingWindowCounterRateLimiter,
    key_grammar.MOVING: MovingWindowRateLimiter,
}


def strategy_of(name: str, segment: Segment) -> Any:
    return STRATEGIES[name](storage_from_string(f"shm://{segment.name}"))


def shown(segment: Segment) -> list[KeyRow]:
    """As fast-shm inspect reads it."""
    return list(Inspection(Segment(segment.name, _read_only=True)).keys())


@pytest.mark.parametrize("name", STRATEGIES)
def test_what_is_left_is_of_the_key_s_limit(name: str, segment: Segment) -> None:
    strategy, item = strategy_of(name, segment), parse("5/hour")
    for used in range(1, 7):
        strategy.hit(item, "user", "1.2.3.4")
        (row,) = shown(segment)
        told = strategy.get_window_stats(item, "user", "1.2.3.4")
        assert (row.remaining, row.limit) == (told.remaining, 5)
        assert (row.admitted, row.denied) == (min(used, 5), max(used - 5, 0))
        assert (row.retry_after == 0) == (used < 5)
        assert row.reset_after is not None and 0 < row.reset_after <= 7201
    assert row.key == "LIMITER/user/1.2.3.4/5/1/hour"
    # Sliding windows are the clock's: one fits when a fifth of the next hour is over too.
    assert 0 < (row.retry_after or 0) <= (3601 + 720 if "sliding window" in name else 3601)
    (limiter,) = [found for found in Inspection(segment).limiters() if found["name"] == name]
    assert limiter["limits"] == ["of each key"]


@pytest.mark.parametrize("name", STRATEGIES)
def test_reset_of_one_key(name: str, segment: Segment) -> None:
    """Of a moving window the hits too, which have cells of their own."""
    strategy, item = strategy_of(name, segment), parse("3/hour")
    for who in ("a", "b"):
        assert [strategy.hit(item, who) for _ in range(4)] == [True] * 3 + [False]
    command = [sys.executable, "-m", "fast_litellm_shm.cli", "reset", "--name", segment.name]
    for said in ("Reset key 'LIMITER/a/3/1/hour'", "Nothing to reset"):
        done = subprocess.run(
            [*command, "LIMITER/a/3/1/hour"], capture_output=True, text=True, check=True, timeout=60
        )
        assert said in done.stdout
    assert [strategy.hit(item, "a") for _ in range(4)] == [True] * 3 + [False]
    assert not strategy.hit(item, "b")


def test_where_the_limit_is_not_known(segment: Segment) -> None:
    """In a name that does not say, or that is cut before it says."""
    storage = storage_from_string(f"shm://{segment.name}")
    storage.incr("free", 60)
    FixedWindowRateLimiter(storage).hit(parse("5/hour"), "x" * 300)
    assert [(r.remaining, r.limit, r.retry_after, r.reset_after) for r in shown(segment)] == [
        (None, None, None, None)
    ] * 2


def test_hashed_names(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100, names="hashed")
    strategy_of(key_grammar.FIXED, segment).hit(parse("5/hour"), "secret")
    (row,) = shown(segment)
    assert row.remaining is None and row.key.startswith("#")


@pytest.mark.parametrize("ending", ["5/1/hour", "/5/1/hours", "/0/1/hour", "/5/999999999/year"])
def test_endings_that_are_none(ending: str, segment: Segment) -> None:
    assert key_grammar.limit_of(key_grammar.FIXED, b"x" + ending.encode()) is None


def test_another_limiter_of_such_a_key(segment: Segment) -> None:
    RateLimiter(Window(9, 60), name="mine", segment=segment).acquire("x/5/1/hour")
    (row,) = shown(segment)
    assert (row.remaining, row.limit) == (8, 9)
