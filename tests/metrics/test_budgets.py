"""Budgets in health_check() and get_recommendations(); what processes that die had reserved."""

from __future__ import annotations

import os
import signal

import pytest
from support.waiting import wait_until

from fast_litellm_shm import Budget, Segment, get_recommendations, health_check
from fast_litellm_shm._shared import spending


def _by_type() -> dict[str, str]:
    return {one["type"]: one["message"] for one in get_recommendations()}


def test_health_and_recommendations() -> None:
    budget = Budget(10, "day", name="team", warn_at=0.8, on_warn=lambda key, usage: None)
    budget.charge("fine", "7.5")
    assert "budget_warned" not in _by_type() and "budget_used_up" not in _by_type()
    budget.charge("much", "8.5")
    assert (
        "Key 'much' of budget 'team' has used $8.5 of $10 for the next"
        in (_by_type()["budget_warned"])
    )
    budget.charge("all", "12.000000001")
    assert (
        "Key 'all' of budget 'team' has used $12.000000001 of $10" in (_by_type()["budget_used_up"])
    )
    assert health_check()["status"] == "ok"  # a budget that denies does what it is for
    (found,) = health_check()["segment"]["budgets"]
    assert (found["name"], found["keys"], found["warned"], found["used_up"]) == ("team", 3, 2, 1)
    assert (found["spent"], found["per"]) == (28.000000001, "day")
    budget.add("all", 100)
    budget.add("much", 100)
    budget.reset("much")
    assert "budget_used_up" not in _by_type()


@pytest.mark.parametrize("read_only", [False, True])
def test_reservations_of_the_dead(segment: Segment, read_only: bool) -> None:
    """Also where no process is left that marks the dead: a reader asks the kernel."""
    from fast_litellm_shm._shared.inspection import open_for_reading

    budget = Budget(10, name="b", segment=segment)
    budget.charge("k", 1)
    pid = os.fork()
    if not pid:
        try:
            held = Budget(10, name="b", segment=segment).reserve("k", usd=3)
            while held:
                signal.pause()
        finally:
            os._exit(1)
    try:
        reader = open_for_reading(segment.name) if read_only else segment

        def reserved() -> str:
            (found,) = spending.spending(reader)
            return str(found.reserved)

        wait_until("it is reserved", lambda: reserved() == "3")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    wait_until("it is not", lambda: reserved() == "0")


def test_windows_that_are_over(segment: Segment) -> None:
    """What was spent in a window that is over is not shown; what is reserved is."""
    from fast_litellm_shm._shared.native import lib

    budget = Budget(10, "hour", name="b", segment=segment)
    budget.charge("k", 4)
    budget.charge("gone", 4)
    held = budget.reserve("k", usd=3)
    try:
        lib.fshm_wall_pretend(segment._handle, 3600 * 10**9)
        (found,) = spending.spending(segment)
        assert (str(found.spent), str(found.reserved), found.keys) == ("0", "3", 1)
        assert found.reset_after is not None and 0 < found.reset_after <= 3600
        (row,) = spending.rows(segment, [found])
        assert (row.key, str(row.remaining)) == ("k", "7")
        held.settle(usd=2)
        (found,) = spending.spending(segment)
        assert (str(found.spent), str(found.reserved), found.keys) == ("2", "0", 1)
    finally:
        lib.fshm_wall_pretend(segment._handle, 0)


def test_budgets_that_change(segment: Segment) -> None:
    """A key that spent under an earlier limit counts under the present one."""
    Budget(10, "day", name="b", segment=segment).charge("k", 4)
    budget = Budget(20, "month", name="b", segment=segment)
    (row,) = spending.rows(segment, spending.spending(segment))
    assert (row.limit, row.spent) == (budget.usage("k").limit, budget.spent("k"))
    assert (str(row.limit), str(row.spent)) == ("20", "4")


def test_two_budgets_of_one_key(segment: Segment) -> None:
    """A reservation is told with its own budget."""
    one, two = (Budget(10, name=name, segment=segment) for name in ("one", "two"))
    with one.reserve("k", usd=1), two.reserve("k", usd=2, also=[(one, "j")]):
        rows = spending.rows(segment, spending.spending(segment))
        assert {(row.budget, row.key): str(row.reserved) for row in rows} == {
            ("one", "k"): "1",
            ("two", "k"): "2",
            ("one", "j"): "2",
        }
