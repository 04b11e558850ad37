"""Budget: exact amounts, reservations that never pass it, and what becomes of them when a process
dies."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import random
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from decimal import Decimal, Inexact, localcontext
from fractions import Fraction
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from limiters.test_calendar import Clock, at
from support import calendar
from support.children import run, run_one
from support.names import remove, unique_name
from support.waiting import wait_until, wait_until_async

from fast_litellm_shm import (
    Budget,
    FixedWindow,
    Quota,
    RateLimiter,
    Segment,
    SegmentError,
    SegmentFullError,
)
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.limiters.budget import Usage, nanos
from fast_litellm_shm.limits import dollars

D = Decimal


@pytest.fixture
def clock(segment: Segment) -> Iterator[Clock]:
    yield Clock(segment)
    lib.fshm_wall_pretend(segment._handle, 0)


def make(segment: Segment, usd: Any = 50, name: str = "team", **more: Any) -> Budget:
    return Budget(usd, name=name, segment=segment, **more)


# amounts


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (1, 10**9),
        ("0.1", 10**8),
        (D("0.000000001"), 1),
        (0.1, 10**8),
        (0.3, 3 * 10**8),
        (1e-9, 1),
        (4e-10, 0),
        (D("1E+3"), 10**12),
        ("1000000000", 10**18),
        (D("0.0000000005"), 0),  # half to even
        (D("0.0000000015"), 2),
    ],
)
def test_dollars_as_nano_dollars(given: Any, found: int) -> None:
    assert nanos(given) == found


@given(st.floats(0, 1e9))
def test_a_float_is_rounded_once(value: float) -> None:
    exact = Fraction(value) * 10**9
    assert abs(nanos(value) - exact) <= Fraction(1, 2)


@given(st.integers(0, 10**18))
def test_nano_dollars_as_dollars(amount: int) -> None:
    assert nanos(dollars(amount)) == amount
    assert nanos(str(dollars(amount))) == amount


@pytest.mark.parametrize(
    "value", [-1, "x", "", float("nan"), float("inf"), D("NaN"), 10**10, "1e99"]
)
def test_what_is_no_amount(segment: Segment, value: Any) -> None:
    budget = make(segment)
    with pytest.raises(ValueError, match="reserve: usd must be"):
        budget.reserve("k", value)


@pytest.mark.parametrize("value", [None, True, [], b"1"])
def test_what_is_no_number(segment: Segment, value: Any) -> None:
    with pytest.raises(TypeError, match="reserve: usd must be an int, float, str or Decimal"):
        make(segment).reserve("k", value)


# reserve and settle


def test_reserve_settle(segment: Segment) -> None:
    budget = make(segment, 50)
    with budget.reserve("team-a", usd=0.02) as reservation:
        assert reservation and reservation.reason == "Request allowed"
        assert budget.remaining("team-a") == D("49.98")
        assert budget.usage("team-a").reserved == D("0.02")
        reservation.settle(usd=0.0134)
        reservation.settle(usd=5)  # it is over
    assert budget.spent("team-a") == D("0.0134")
    assert budget.remaining("team-a") == D("49.9866")
    assert budget.spent("team-b") == 0


def test_what_does_not_fit_reserves_nothing(segment: Segment) -> None:
    budget = make(segment, "1")
    held = budget.reserve("k", "0.6")
    denied = budget.reserve("k", "0.400000001")
    assert not denied and denied.denied_by is budget and "team" in denied.reason
    assert denied.retry_after is not None and denied.retry_after > 0
    assert budget.reserve("k", 2).retry_after is None
    assert budget.usage("k").reserved == D("0.6")
    with budget.reserve("k", "0.4") as rest:
        assert rest and budget.remaining("k") == 0
    held.settle("0.6")
    assert budget.reserve("k", "0.4").allowed


def test_what_failed_costs_nothing(segment: Segment) -> None:
    budget = make(segment, 1)
    with pytest.raises(ZeroDivisionError), budget.reserve("k", 1):
        _ = 1 / 0
    assert budget.remaining("k") == 1
    reservation = budget.reserve("k", 1)
    assert not budget.reserve("k", 1)
    del reservation  # forgotten
    gc.collect()
    assert budget.remaining("k") == 1


def test_a_call_can_cost_more_than_it_reserved(segment: Segment) -> None:
    budget = make(segment, 1)
    budget.reserve("k", "0.9").settle(3)
    assert budget.spent("k") == 3 and budget.remaining("k") == 0
    assert not budget.reserve("k", 0)


def test_amounts_are_exact(segment: Segment) -> None:
    budget, spent = make(segment, 10**9), D(0)
    numbers = random.Random(7)
    for _ in range(3000):
        estimate = dollars(numbers.randrange(10**11))
        actual = dollars(numbers.randrange(10**11))
        budget.reserve("k", estimate).settle(actual)
        spent += actual
    assert budget.spent("k") == spent
    assert budget.remaining("k") == 10**9 - spent


def test_a_thousand_million_dollars(segment: Segment) -> None:
    budget = make(segment, 10**9)
    with budget.reserve("k", D("999999999.999999999")) as most:
        assert most and not budget.reserve("k", D("0.000000002"))
        assert budget.reserve("k", D("0.000000001"))
        most.settle(D("999999999.999999999"))
    assert budget.spent("k") == D("999999999.999999999")


def test_charge_refund_add(segment: Segment) -> None:
    budget = make(segment, 50)
    budget.charge("k", 60)
    assert budget.spent("k") == 60 and not budget.reserve("k", 1)
    budget.add("k", 20)
    assert budget.remaining("k") == 10 and budget.usage("k").limit == 70
    budget.refund("k", 5)
    assert budget.remaining("k") == 15
    budget.add("k", -15)
    assert budget.usage("k").limit == 55 and budget.remaining("k") == 0
    budget.add("k", -100)  # no more than was added
    assert budget.usage("k").limit == 50
    budget.refund("k", 100)  # no more than was spent
    assert budget.remaining("k") == 50
    assert budget.usage("other")[:3] == (D(50), D(0), D(0))


def test_the_limit_changes_for_all(segment: Segment) -> None:
    budget = make(segment, 50)
    budget.reserve("k", 30).settle(30)
    held = budget.reserve("k", 15)
    make(segment, 10)
    assert budget.usd == 10 and not budget.reserve("k", 0.01)
    make(segment, 100)
    assert budget.remaining("k") == 55
    held.settle(15)
    assert budget.spent("k") == 45


def test_many_keys_of_one_set_of_entries(segment: Segment) -> None:
    """More keys at once than a process has entries for: what is beyond is charged at once."""
    budget = make(segment, 10)
    held = [(f"k{i}", budget.reserve(f"k{i}", "2.5")) for i in range(600)]
    for key, each in held:
        assert each and budget.remaining(key) == D("7.5"), key
    for _, each in held[::2]:
        each.settle("1.25")
    for _, each in held[1::2]:
        each.release()
    assert all(budget.remaining(key) == D("8.75") for key, _ in held[::2])
    assert all(budget.remaining(key) == 10 for key, _ in held[1::2])


def test_several_budgets_or_none(segment: Segment) -> None:
    key, team, org = (
        make(segment, n, name=name) for n, name in ((5, "key"), (8, "team"), (9, "org"))
    )
    with key.reserve("k1", 4, also=[(team, "t"), (org, "o")]) as one:
        assert one
        two = key.reserve("k2", "4.5", also=[(team, "t"), (org, "o")])
        assert not two and two.denied_by is team
        assert [key.remaining("k2"), team.remaining("t"), org.remaining("o")] == [5, 4, 5]
        assert key.reserve("k2", 4, also=[(team, "t"), (org, "o")])
        one.settle(3)
    assert [each.spent(its) for each, its in ((key, "k1"), (team, "t"), (org, "o"))] == [3, 3, 3]


# windows


def test_windows_of_the_calendar(segment: Segment, clock: Clock) -> None:
    budget = make(segment, 50, timezone="Europe/Berlin")
    clock.set(at("Europe/Berlin", 2027, 5, 31, 23, 59))
    budget.reserve("k", 45).settle(45)
    budget.add("k", 3)
    held = budget.reserve("k", 5)
    assert budget.usage("k").reset_after == pytest.approx(30, abs=5)
    clock.set(at("Europe/Berlin", 2027, 6, 1, 0, 0))
    assert budget.spent("k") == 0 and budget.usage("k").limit == 50
    assert budget.remaining("k") == 45  # the call that is not over
    held.settle("4.5")
    assert budget.spent("k") == D("4.5")  # in the month in which it was settled
    clock.set(at("Europe/Berlin", 2027, 5, 31, 23, 59))  # set back
    assert budget.spent("k") == D("4.5")
    clock.set(at("Europe/Berlin", 2027, 7, 1, 0, 0))
    assert budget.remaining("k") == 50


def test_for_ever(segment: Segment, clock: Clock) -> None:
    budget = make(segment, 50, per=None)
    clock.set(at("UTC", 2027, 5, 31, 23, 59))
    budget.reserve("k", 45).settle(45)
    clock.set(at("UTC", 2057, 5, 31, 23, 59))
    assert budget.remaining("k") == 5 and budget.usage("k").reset_after is None
    assert budget.reserve("k", 6).retry_after is None


def test_a_changed_period(segment: Segment, clock: Clock) -> None:
    """A window that has begun goes on to its end."""
    clock.set(at("UTC", 2027, 5, 10, 12, 0))
    make(segment, 50).reserve("k", 45).settle(45)
    daily = make(segment, 50, per="day")
    assert daily.spent("k") == 45
    clock.set(at("UTC", 2027, 5, 11, 12, 0))
    daily.reserve("k", 4).settle(4)
    assert daily.spent("k") == 49 and daily.spent("other") == 0
    clock.set(at("UTC", 2027, 6, 1, 0, 0))
    assert daily.spent("k") == 0
    daily.reserve("k", 40).settle(40)
    clock.set(at("UTC", 2027, 6, 2, 0, 0))
    assert daily.spent("k") == 0


def test_slots_of_windows_that_are_over_are_reused(segment: Segment, clock: Clock) -> None:
    budget = make(segment, 50, per="day")
    clock.set(at("UTC", 2027, 5, 10, 12, 0))
    for i in range(100):
        budget.reserve(f"k{i}", 1).settle(1)
    assert lib.fshm_live_keys(budget._handle, 0) == 100
    clock.set(at("UTC", 2027, 5, 11, 12, 0))
    assert lib.fshm_live_keys(budget._handle, 0) == 0


# processes


def _spend(name: str, segment: str, seed: int, calls: int) -> int:
    budget = Budget(50, name=name, segment=Segment(segment))
    numbers, spent = random.Random(seed), 0
    for _ in range(calls):
        estimate = numbers.randrange(1, 10**9)
        with budget.reserve("k", dollars(estimate)) as reservation:
            if reservation:
                actual = numbers.randrange(estimate + 1)
                reservation.settle(dollars(actual))
                spent += actual
    return spent


def test_processes_together_spend_no_more(segment: Segment) -> None:
    budget = make(segment, 50)
    spent = run(_spend, [("team", segment.name, seed, 400) for seed in range(4)], "fork")
    assert budget.spent("k") == dollars(sum(spent)) <= 50
    assert budget.remaining("k") < 1
    assert budget.usage("k").reserved == 0


def _child(work: Any) -> int:
    """A forked process that does this, and then sleeps."""
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(told, b"1")
            time.sleep(600)
        finally:
            os._exit(1)
    os.close(told)
    assert os.read(ready, 1) == b"1"
    os.close(ready)
    return pid


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_dead_give_back_what_they_reserved(segment: Segment) -> None:
    budget = make(segment, 50)
    kept: list[Any] = []
    pid = _child(lambda: kept.append(budget.reserve("k", 40)))
    assert budget.remaining("k") == 10 and not budget.reserve("k", 11)
    _kill(pid)
    wait_until("the reservation is back", lambda: budget.remaining("k") == 50)
    assert budget.reserve("k", 50)


def test_the_dead_can_be_charged(segment: Segment) -> None:
    budget = make(segment, 50, on_death="charge")
    kept: list[Any] = []
    pid = _child(lambda: kept.append(budget.reserve("k", 40)))
    _kill(pid)
    time.sleep(1)
    assert budget.remaining("k") == 10 and budget.spent("k") == 40
    with budget.reserve("k", 10) as mine:
        mine.settle(4)
    assert budget.spent("k") == 44


def test_a_fork_does_not_settle_twice(segment: Segment) -> None:
    budget = make(segment, 50)
    held = budget.reserve("k", 40)
    assert run_one(_settle_in_child, held, method="fork") is None
    assert budget.usage("k").reserved == 40 and budget.spent("k") == 0
    held.settle(30)
    assert budget.spent("k") == 30


def _settle_in_child(held: Any) -> None:
    held.settle(35)


@pytest.mark.parametrize("on_death", ["release", "charge"])
def test_a_storm_of_kills(segment: Segment, on_death: str) -> None:
    """Workers reserve and settle no more than that, and are killed anywhere."""
    budget = make(segment, 3, on_death=on_death)
    numbers = random.Random(11)
    budget.usage("k")

    def work() -> None:
        mine = random.Random(os.getpid())

        def call() -> None:
            estimate = mine.randrange(1, 10**8)
            with budget.reserve("k", dollars(estimate)) as reservation:
                if reservation:
                    reservation.settle(dollars(mine.randrange(estimate + 1) // 200))

        call()
        pid = os.getppid()
        while os.getppid() == pid:
            call()

    workers: list[int] = []
    for _ in range(40):
        while len(workers) < 4:
            pid = os.fork()
            if pid == 0:
                try:
                    work()
                finally:
                    os._exit(0)
            workers.append(pid)
        time.sleep(numbers.random() * 0.03)
        found = budget.usage("k")
        assert found.spent <= 3 and found.spent + found.reserved <= 3, found
        _kill(workers.pop(numbers.randrange(len(workers))))
    for pid in workers:
        _kill(pid)
    wait_until("no phantom is left", lambda: budget.usage("k").reserved == 0)
    left = budget.remaining("k")
    assert left == 3 - budget.spent("k")
    assert left == 0 or budget.reserve("k", left)


# warnings


def test_one_warning_a_window(segment: Segment, clock: Clock) -> None:
    told: list[tuple[str, Usage]] = []
    clock.set(at("UTC", 2027, 5, 10, 12, 0))
    one, two = (
        make(segment, 10, warn_at=0.8, on_warn=lambda *given: told.append(given)) for _ in range(2)
    )
    one.reserve("k", "7.99").settle("7.99")
    assert not told
    held = two.reserve("k", "0.01")
    assert [key for key, _ in told] == ["k"] and told[0][1].spent == D("7.99")
    held.settle("0.01")
    one.reserve("k", 1).settle(1)
    one.charge("k", 5)
    assert len(told) == 1
    one.charge("other", 9)
    assert [key for key, _ in told] == ["k", "other"]
    clock.set(at("UTC", 2027, 6, 10, 12, 0))
    two.reserve("k", 1).settle(12)
    assert [key for key, _ in told] == ["k", "other", "k"]


def test_a_warning_that_fails(segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    def fails(key: str, usage: Usage) -> None:
        raise ZeroDivisionError

    assert make(segment, 10, warn_at=0.5, on_warn=fails).reserve("k", 6)
    assert "on_warn failed" in caplog.text
    make(segment, 10, name="b", warn_at=0.5).charge("k", 6)
    assert "'k' has used or reserved 6 of 10 dollars" in caplog.text


# what it says, and with whom


def test_pickled(segment: Segment) -> None:
    budget = make(segment, "12.5", per="week", timezone="Asia/Tokyo", on_death="charge")
    budget.charge("k", 2)
    copy = pickle.loads(pickle.dumps(budget))
    assert copy.remaining("k") == D("10.5")
    assert repr(copy) == repr(budget) == "Budget(12.5 USD/week Asia/Tokyo, name='team')"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"usd": 0}, "usd must be more than 0"),
        ({"usd": 1, "per": "fortnight"}, "per must be 'hour'"),
        ({"usd": 1, "per": 60}, "per must be 'hour'"),
        ({"usd": 1, "timezone": "Europe/Berlyn"}, "timezone must be a name"),
        ({"usd": 1, "on_death": "keep"}, "on_death must be 'release' or 'charge'"),
        ({"usd": 1, "warn_at": 0}, "warn_at must be above 0"),
        ({"usd": 1, "name": ""}, "name must be 1 to"),
        ({"usd": 1, "name": "b" * 1000}, "not 1000: 'bbbb"),
        ({"usd": 1, "warn_at": "80%"}, "warn_at must be a number such as 0.8 or None, not '80%'"),
        ({"usd": 1, "warn_at": True}, "warn_at must be a number"),
        ({"usd": 1, "on_warn": 5}, "on_warn must be a function or None, not 5"),
    ],
)
def test_bad_arguments(segment: Segment, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message) as raised:
        Budget(**{"name": "b", "segment": segment, **given})
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize("also", [5, "team", [5], [("team", "k")]])
def test_bad_also(segment: Segment, also: Any) -> None:
    budget = make(segment, 10)
    with pytest.raises(TypeError, match="also must be pairs of a Budget and a key"):
        budget.reserve("k", 1, also=also)
    with pytest.raises(TypeError, match="also must be pairs of a Budget and a key"):
        budget.reserve("k", 1, also=[budget])  # type: ignore[list-item]
    assert not budget.usage("k").reserved


def test_a_name_counts_money_or_tokens(segment: Segment) -> None:
    budget = make(segment, 10, name="b")
    with pytest.raises(SegmentError, match="another kind of limits"):
        RateLimiter(FixedWindow(5), name="b", segment=segment)
    RateLimiter(FixedWindow(5), name="r", segment=segment)
    with pytest.raises(SegmentError, match="counts no money"):
        make(segment, 10, name="r")
    assert budget.reserve("k", 10)


def test_reset(segment: Segment) -> None:
    budget = make(segment, 10)
    for key in ("a", "b"):
        budget.charge(key, 10)
    budget.reset("a")
    assert budget.remaining("a") == 10 and budget.remaining("b") == 0
    held = budget.reserve("a", 4)
    budget.reset()
    assert budget.remaining("a") == budget.remaining("b") == 10
    held.settle(3)
    assert budget.spent("a") == 3 and budget.remaining("a") == 7


def test_a_full_segment(segment_name: str) -> None:
    """Nothing is admitted that cannot be counted."""
    small = Segment(segment_name, capacity=1)
    budget = Budget(10, name="b", segment=small)
    with pytest.raises(SegmentFullError):
        for number in range(1000):
            budget.reserve(f"k{number}", 1).settle(1)
    assert number < 100 and budget.spent("k0") == 1


def test_amounts_do_not_depend_on_the_threads_decimals(segment: Segment) -> None:
    budget = Budget(10**6, name="b", segment=segment)
    with localcontext() as context:
        context.prec = 4
        context.traps[Inexact] = True
        budget.charge("k", Decimal("123456.789"))
        budget.charge("k", "0.000000001")
    assert budget.spent("k") == Decimal("123456.789000001")


def test_of_several_budgets_none_is_kept_by_an_exception(segment: Segment) -> None:
    one, two = (Budget(10, name=name, segment=segment) for name in ("one", "two"))
    with pytest.raises(TypeError) as kept:
        one.reserve("k", 4, also=[(two, 5)])  # type: ignore[list-item]
    assert kept.value is not None and not one.usage("k").reserved


def test_a_quotas_budget_is_one(segment: Segment) -> None:
    with pytest.raises(TypeError, match="budget must be a Budget, not 5"):
        Quota(rpm=3, name="q", segment=segment, budget=5)  # type: ignore[arg-type]


def test_quota_with_a_budget(segment: Segment) -> None:
    budget = make(segment, 1)
    quota = Quota(rpm=3, max_parallel=2, name="q", segment=segment, budget=budget)
    with quota.admit("k", usd="0.6") as one:
        assert one and budget.remaining("k") == D("0.4")
        two = quota.admit("k", usd="0.6")
        assert not two and two.reason == "budget" and two.retry_after is not None
        assert quota.remaining("k") == {"rpm": 2, "max_parallel": 1}
        one.settle(tokens=0, usd="0.5")
    assert budget.spent("k") == D("0.5")
    with quota.admit("k", usd="0.1"), quota.admit("k", usd="0.1"):
        third = quota.admit("k", usd="0.1")
        assert not third and third.reason in ("rpm", "max_parallel")
        assert budget.usage("k").reserved == D("0.2")
    assert budget.remaining("k") == D("0.5")

    async def admitted() -> None:
        async with await Quota(
            max_parallel=2, name="p", segment=segment, budget=budget
        ).admit_async("k", usd="0.5") as found:
            assert found and budget.remaining("k") == 0
            found.settle(0, usd="0.25")

    asyncio.run(admitted())
    assert budget.spent("k") == D("0.75")


def test_a_quotas_call_without_a_price_costs_what_it_had_reserved(segment: Segment) -> None:
    budget = make(segment, 10)
    quota = Quota(rpm=9, tpm=900, name="q", segment=segment, budget=budget)
    with quota.admit("k", tokens=10, usd="0.25") as made:
        made.settle(tokens=8)
        assert budget.usage("k").reserved == D("0.25")
    made.release()
    assert budget.spent("k") == D("0.25") and not budget.usage("k").reserved
    with quota.admit("k", tokens=10, usd="0.25") as made:  # a stream, whose price comes at its end
        made.settle(tokens=4)
        made.settle(tokens=8, usd="0.125")
    with quota.admit("k", tokens=10, usd=1):  # it failed
        pass
    cancelled = quota.admit("k", tokens=10, usd=1)
    cancelled.settle(tokens=4)
    cancelled.cancel()
    assert budget.spent("k") == D("0.375") and not budget.usage("k").reserved


def waiting_quota(segment: Segment, budget: Budget, max_parallel: int = 9) -> Quota:
    return Quota(max_parallel=max_parallel, name="q", segment=segment, budget=budget)


def test_a_quota_waits_with_a_budget(segment: Segment) -> None:
    budget = make(segment, 1, per=None)
    quota = waiting_quota(segment, budget)
    with quota.wait("k", usd="0.6") as one:
        assert one and budget.remaining("k") == D("0.4")
        one.settle(0, usd="0.5")
    assert (budget.spent("k"), budget.remaining("k")) == (D("0.5"), D("0.5"))
    # Too much is spent, and the window never ends: no caller waits, whatever its time-out.
    denied = quota.wait("k", usd="0.6", timeout=None)
    assert not denied and denied.reason == "budget" and denied.retry_after is None
    assert quota.in_flight("k") == 0 and budget.usage("k").reserved == 0
    assert not quota.wait("k", usd=2)
    with pytest.raises(ValueError, match="wait: usd"):
        quota.wait("k", usd=-1)
    assert budget.usage("k").reserved == 0

    async def waited() -> None:
        assert not await quota.wait_async("k", usd="0.6", timeout=None)
        async with await quota.wait_async("k", usd="0.5") as found:
            assert found and budget.remaining("k") == 0
        assert budget.remaining("k") == D("0.5")

    asyncio.run(waited())


def test_a_quota_waits_for_money_that_is_reserved(segment: Segment) -> None:
    budget = make(segment, 1)
    quota = waiting_quota(segment, budget)
    held = budget.reserve("k", "0.7")
    denied = quota.wait("k", usd="0.5", timeout=0.01)
    assert not denied and denied.reason == "budget"
    counted = segment.stats()["denied"]
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(quota.wait, "k", usd="0.5")
        wait_until("it waits", lambda: quota.queue_size("k") == 1)
        wait_until("it is denied once", lambda: segment.stats()["denied"] == counted + 1)
        held.settle("0.4")
        with later.result() as admitted:
            assert admitted and budget.usage("k").reserved == D("0.5")
        assert budget.remaining("k") == D("0.6")
    assert segment.stats()["denied"] == counted + 1

    async def waited() -> None:
        held = budget.reserve("k", "0.6")
        waiting = asyncio.ensure_future(quota.wait_async("k", usd="0.5"))
        await wait_until_async("it waits", lambda: quota.queue_size("k") == 1)
        held.release()
        async with await waiting as admitted:
            assert admitted
        waiting = asyncio.ensure_future(quota.wait_async("k", usd="0.5"))
        async with await waiting:
            cancelled = asyncio.ensure_future(quota.wait_async("k", usd="0.5"))
            await wait_until_async("it waits", lambda: quota.queue_size("k") == 1)
            cancelled.cancel()
            with pytest.raises(asyncio.CancelledError):
                await cancelled

    asyncio.run(waited())
    assert budget.usage("k").reserved == quota.queue_size("k") == 0


def test_a_quota_that_waits_for_its_rate_holds_no_money(segment: Segment) -> None:
    budget = make(segment, 1)
    quota = waiting_quota(segment, budget, max_parallel=1)
    with quota.admit("k", usd="0.1"), ThreadPoolExecutor(1) as pool:
        later = pool.submit(quota.wait, "k", usd="0.5", timeout=0.05)
        denied = later.result()
        assert not denied and denied.reason == "max_parallel"
        assert budget.usage("k").reserved == D("0.1")
    assert budget.usage("k").reserved == 0


def test_a_quota_waits_for_the_next_window(segment: Segment, clock: Clock) -> None:
    """Where it begins within the time-out; else it is denied at once."""
    budget = make(segment, 1, per="hour")
    quota = waiting_quota(segment, budget)
    minute = at("UTC", 2027, 6, 1, 11, 30)
    clock.set(minute)
    budget.charge("k", 1)
    denied = quota.wait("k", usd="0.5", timeout=1700)
    assert not denied and denied.retry_after is not None and 1700 < denied.retry_after <= 1770
    with ThreadPoolExecutor(1) as pool:
        later = pool.submit(quota.wait, "k", usd="0.5", timeout=1900)
        wait_until("it waits", lambda: quota.queue_size("k") == 1)
        clock.set(minute + 30)
        with later.result() as admitted:
            assert admitted and budget.spent("k") == 0


# stories against a model


@dataclass
class Model:
    limit: int
    per: str | None
    zone: str
    wall: int
    spent: dict[str, int] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    held: list[tuple[str, int]] = field(default_factory=list)
    end: int = 0

    def set(self, minute: int) -> None:
        back = self.wall - minute
        if back <= 0:
            self.wall = minute
        if self.per is not None and self.wall >= self.end:
            self.end = calendar.end(self.per, ZoneInfo(self.zone), self.wall)
            self.spent, self.added = {}, {}

    def reserved(self, key: str) -> int:
        return sum(amount for its, amount in self.held if its == key)

    def left(self, key: str) -> int:
        most = self.limit + self.added.get(key, 0)
        return most - self.spent.get(key, 0) - self.reserved(key)


def _die_with(budget: Budget, key: str, amount: int, before: Decimal) -> None:
    """A process reserves this and dies; then that is reserved which was before."""
    kept: list[Any] = []
    _kill(_child(lambda: kept.append(budget.reserve(key, dollars(amount)))))
    wait_until("the reservation is back", lambda: budget.usage(key).reserved == before)


AMOUNTS = st.one_of(st.integers(0, 60), st.integers(0, 10**12), st.integers(0, 3))
KEYS = st.sampled_from(["a", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), KEYS, AMOUNTS),
        st.tuples(st.just("settle"), st.integers(0, 5), AMOUNTS),
        st.tuples(st.just("release"), st.integers(0, 5)),
        st.tuples(st.just("charge"), KEYS, AMOUNTS),
        st.tuples(st.just("refund"), KEYS, AMOUNTS),
        st.tuples(st.just("add"), KEYS, st.integers(-50, 10**12)),
        st.tuples(st.just("limit"), st.integers(1, 10**12)),
        st.tuples(st.just("limit"), st.integers(1, 100)),
        st.tuples(st.just("pass"), st.integers(1, 50_000)),
        st.tuples(st.just("back"), st.integers(1, 600)),
        st.tuples(st.just("death"), KEYS, AMOUNTS),
    ),
    max_size=30,
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    STEPS,
    st.integers(1, 100),
    st.sampled_from(["hour", "day", "month", None]),
    st.sampled_from(["UTC", "Europe/Berlin", "America/Santiago"]),
    st.integers(28_930_000, 30_000_000),
)
def test_stories(  # noqa: PLR0912
    segment: Segment,
    clock: Clock,
    steps: list[Any],
    limit: int,
    per: str | None,
    zone: str,
    start: int,
) -> None:
    clock.set(start - 600_000)
    clock.set(start)
    name = "stories"
    budget = make(segment, dollars(limit), name=name, per=per, timezone=zone)
    budget.reset()
    model = Model(limit, per, zone, clock.now() // 60_000_000_000)
    model.set(model.wall)
    shown, held = start, []
    for step in steps:
        what = step[0]
        if what == "reserve":
            found = budget.reserve(step[1], dollars(step[2]))
            assert bool(found) == (step[2] <= model.left(step[1])), step
            if found:
                held.append(found)
                model.held.append((step[1], step[2]))
        elif what in ("settle", "release"):
            if step[1] >= len(held):
                continue
            each, (key, _) = held.pop(step[1]), model.held.pop(step[1])
            if what == "settle":
                each.settle(dollars(step[2]))
                model.spent[key] = model.spent.get(key, 0) + step[2]
            else:
                each.release()
        elif what in ("charge", "refund"):
            getattr(budget, what)(step[1], dollars(step[2]))
            by = step[2] if what == "charge" else -step[2]
            model.spent[step[1]] = max(model.spent.get(step[1], 0) + by, 0)
        elif what == "add":
            budget.add(step[1], dollars(step[2]) if step[2] >= 0 else -dollars(-step[2]))
            model.added[step[1]] = max(model.added.get(step[1], 0) + step[2], 0)
        elif what == "limit":
            model.limit = step[1]
            budget = make(segment, dollars(step[1]), name=name, per=per, timezone=zone)
        elif what == "death":
            _die_with(budget, step[1], step[2], dollars(model.reserved(step[1])))
        else:
            shown += step[1] if what == "pass" else -min(step[1], 1400 - (model.wall - shown))
            clock.set(shown)
            model.set(shown)
        for key in ("a", "b"):
            now = budget.usage(key)
            assert now.spent == dollars(model.spent.get(key, 0)), (step, key)
            assert now.reserved == dollars(model.reserved(key)), (step, key)
            assert now.limit == dollars(model.limit + model.added.get(key, 0)), (step, key)
    for each in held:
        each.release()
    budget.reset()


# what a ledger has granted


class InMemory:
    """A ledger that grants a tenth of the limit at a time."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, bytes, int], list[int]] = {}  # instance, before, granted
        self.writes = 0

    def grant(
        self, name: str, key: bytes, window: int, instance: int, least: int, most: int
    ) -> tuple[int, int]:
        row = self.rows.setdefault((name, key, window), [instance, 0, 0])
        if row[0] != instance:
            row[:2] = [instance, row[2]]
            least += row[1]
        if row[2] < least <= most:
            row[2] = min(max(least, row[2] + most // 10), most)
            self.writes += 1
        return row[1], row[2]


def test_a_ledger_grants_ahead(segment: Segment) -> None:
    ledger = InMemory()
    budget = make(segment, 10, _ledger=ledger)
    for _ in range(50):
        with budget.reserve("k", "0.1") as reservation:
            assert reservation
            reservation.settle("0.1")
    assert ledger.writes <= 10 and budget.spent("k") == 5
    assert not budget.reserve("k", 6) and budget.reserve("k", 5)


def test_a_reboot_forgets_no_more_than_was_granted(segment: Segment) -> None:
    ledger, names = InMemory(), [unique_name("boot") for _ in range(4)]
    for i, name in enumerate(names):
        fresh = Segment(name, capacity=100)
        try:
            budget = make(fresh, 10, _ledger=ledger)
            for _ in range(15):
                budget.reserve("k", "0.1").settle("0.1")
            (row,) = ledger.rows.values()
            assert row[2] >= (i + 1) * 15 * 10**8  # never more than was granted
            assert row[2] - row[1] < 26 * 10**8
            assert budget.spent("k") == dollars(row[1]) + D("1.5")
        finally:
            del budget
            remove(name)
    assert sum(row[2] for row in ledger.rows.values()) <= 10**10
