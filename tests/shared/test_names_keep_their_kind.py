"""A limiter that takes the name of another kind: the newcomer is refused, and the one that is there
goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fast_litellm_shm import (
    AdaptiveConcurrency,
    Budget,
    ConcurrencyLimiter,
    HierarchyLimiter,
    Quota,
    RateLimiter,
)
from fast_litellm_shm.exceptions import SegmentError

PERMITS: dict[str, Callable[[], Any]] = {
    "permits": lambda: ConcurrencyLimiter(2, name="api"),
    "learned": lambda: AdaptiveConcurrency(name="api"),
}
RATES: dict[str, Callable[[], Any]] = {
    "rate": lambda: RateLimiter("3/hour", name="api"),
    "plans": lambda: RateLimiter("3/hour", name="api", plans={}),
    "quota": lambda: Quota(3, max_parallel=2, name="api"),
    "quota of rates": lambda: Quota(3, name="api"),
    "budget": lambda: Budget(3, name="api"),
}


@pytest.mark.parametrize("newcomer", PERMITS)
@pytest.mark.parametrize("there", RATES)
def test_calls_in_flight_take_no_name_of_rates(there: str, newcomer: str) -> None:
    known = RATES[there]()
    with pytest.raises(SegmentError, match="limiter 'api' in segment .* another kind of limits"):
        PERMITS[newcomer]()
    if there == "budget":
        assert known.reserve("k", 1)
    elif there.startswith("quota"):
        with known.admit("k") as admission:
            assert admission
    else:
        assert known.acquire("k").remaining == 2


def test_a_level_keeps_its_name() -> None:
    levels = HierarchyLimiter({"org": "9/hour", "user": "3/hour"}, name="h")
    assert levels.acquire(("o", "u"))
    with pytest.raises(SegmentError, match="another kind of limits"):
        ConcurrencyLimiter(1, name="h/user")
    assert levels.acquire(("o", "u"))


@pytest.mark.parametrize("there", PERMITS)
@pytest.mark.parametrize("newcomer", ["rate", "plans", "budget"])
def test_rates_take_no_name_of_calls_in_flight(there: str, newcomer: str) -> None:
    known = PERMITS[there]()
    with pytest.raises(SegmentError, match="'api' in segment .*: (it exists|this name is that of)"):
        RATES[newcomer]()
    permit = known.acquire("k")
    assert permit and known.in_flight("k") == 1
    permit.release()


def test_a_quota_may_change_all_that_it_has() -> None:
    """When its workers are started with other limits, as a configuration file says."""
    assert Quota(3, max_parallel=2, name="api").admit("k").release()
    assert Quota(max_parallel=2, name="api").admit("k").release()
    assert Quota(7, name="api").admit("k").release()
