"""When a task that was denied comes back, whatever queue it is of."""

from __future__ import annotations

from typing import Any

import pytest

from fast_litellm_shm import FixedWindow, RateLimitExceeded, TokenBucket
from fast_litellm_shm.integrations._tasks import TaskLimit


def limit_of(*limits: Any, longest_delay: float = 9000, **more: Any) -> TaskLimit:
    given: dict[str, Any] = {
        "key": "k",
        "cost": 1,
        "name": "tasks",
        "held": None,
        "segment": None,
        "cluster": False,
    }
    return TaskLimit("limited_task", limits, longest_delay=longest_delay, **{**given, **more})


def delays(limit: TaskLimit, count: int, cost: Any = 1) -> list[float]:
    """Of tasks that come all at once; those that are admitted are left out."""
    found = [limit.delay("task", "k", cost) for _ in range(count)]
    return [each for each in found if each is not None]


def test_of_a_bucket_each_task_has_a_token_of_its_own() -> None:
    found = delays(limit_of(TokenBucket(10, per=1000, burst=1)), 9)
    assert len(found) == 8
    # 100 s apart; what passes between two calls is far less.
    assert [round(each / 100) for each in found] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_of_a_window_all_tasks_that_fit_come_together() -> None:
    found = delays(limit_of(FixedWindow(10, per=1000)), 35)
    assert [round(each / 1000) for each in found] == [1] * 10 + [2] * 10 + [3] * 5


def test_costs_take_as_many_places() -> None:
    found = delays(limit_of(TokenBucket(10, per=1000)), 5, cost=5)
    assert [round(each / 100) for each in found] == [5, 10, 15]


def test_of_several_limits_the_one_that_denies_says_when() -> None:
    found = delays(limit_of("1000 per minute", FixedWindow(2, per=1000)), 6)
    assert [round(each / 1000) for each in found] == [1, 1, 2, 2]


def test_no_task_stays_away_longer_than_it_may() -> None:
    """Those that have no place until then come at some time before; and none too early."""
    found = delays(limit_of(TokenBucket(1, per=100), longest_delay=250), 40)
    assert len(found) == 39
    assert round(found[0] / 100) == 1
    assert round(found[1] / 100) == 2
    assert all(125 <= each <= 250 for each in found[2:])
    assert len({round(each) for each in found[2:]}) > 10, "they are spread"
    later = delays(limit_of(FixedWindow(1, per=86_400), longest_delay=60, name="day"), 5)
    assert all(30 <= each <= 60 for each in later)


def test_what_was_denied_consumes_nothing() -> None:
    limit = limit_of(FixedWindow(10, per=1000))
    assert delays(limit, 10) == []
    delays(limit, 50)
    limit.take("task", "another key", 10)
    with pytest.raises(RateLimitExceeded, match="task: key 'k' has used up 10/1000s window"):
        limit.take("task", "k", 1)


def test_a_cost_that_never_fits() -> None:
    with pytest.raises(RateLimitExceeded, match="its cost never fits: raise the limit"):
        limit_of("5 per minute").delay("task", "k", 6)
