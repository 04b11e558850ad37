"""acquire_many: as acquire for each key, in order."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest

from fast_litellm_shm import Limit, RateLimiter, Segment, Window


@pytest.fixture
def limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(3, 36000), name="t", segment=segment)


def test_as_one_by_one(limiter: RateLimiter) -> None:
    batch = limiter.acquire_many(["a", "b", "a", b"a", "a", "c"])
    assert batch.allowed.tolist() == [True, True, True, True, False, True]
    assert batch.remaining.tolist() == [2, 2, 1, 0, 0, 2]
    assert batch.retry_after[[0, 1, 2, 3, 5]].tolist() == [0.0] * 5
    assert 0 < batch.retry_after[4] <= 36001
    assert [str(column.dtype) for column in batch] == ["bool", "uint64", "float64"]
    assert limiter.peek("a").remaining == 0


def test_a_cost_for_all_and_one_for_each(limiter: RateLimiter) -> None:
    assert limiter.acquire_many(["a", "b"], cost=2).remaining.tolist() == [1, 1]
    batch = limiter.acquire_many(["a", "b", "c", "c"], cost=[1, 2, 3, 4])
    assert batch.allowed.tolist() == [True, False, True, False]
    assert batch.retry_after[3] == math.inf
    costs: Any = numpy.array([1, 2])
    assert limiter.acquire_many(["d", "d"], cost=costs).allowed.all()


def test_no_keys(limiter: RateLimiter) -> None:
    assert [column.size for column in limiter.acquire_many([])] == [0, 0, 0]


def test_any_iterable_of_keys(limiter: RateLimiter) -> None:
    keys: Any = (f"k{i}" for i in range(5))
    assert limiter.acquire_many(keys).allowed.sum() == 5


def test_many_keys_of_several_limits(segment: Segment) -> None:
    limiter = RateLimiter(Window(3, 36000), Limit(2, 36000), name="two", segment=segment)
    keys = [f"k{i % 100}" for i in range(400)]
    batch = limiter.acquire_many(keys)
    assert batch.allowed.sum() == 200
    assert batch.allowed.tolist() == [True] * 200 + [False] * 200


def test_bad_costs(limiter: RateLimiter) -> None:
    with pytest.raises(ValueError, match="cost has 1 values for 2 keys: give one for each"):
        limiter.acquire_many(["a", "b"], cost=[1])
    with pytest.raises(ValueError, match="cost must be 0 or more, not -1"):
        limiter.acquire_many(["a", "b"], cost=-1)
    assert limiter.peek("a").remaining == 3


@pytest.mark.parametrize("cost", [1.5, [1, 1.5], "11"])
def test_costs_that_are_no_ints(limiter: RateLimiter, cost: Any) -> None:
    with pytest.raises(TypeError, match="cost must be an int"):
        limiter.acquire_many(["a", "b"], cost=cost)
    assert limiter.peek("b").remaining == 3


def test_a_bad_key(limiter: RateLimiter) -> None:
    bad: Any = ["a", 5]
    with pytest.raises(TypeError, match="key must be a str or bytes, not 5"):
        limiter.acquire_many(bad)
