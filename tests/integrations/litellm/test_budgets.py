"""Budgets: windows, what is reserved and spent, and the hooks in the orders that LiteLLM calls them
in, without the proxy."""

from __future__ import annotations

import asyncio
import importlib
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("litellm")

import litellm
from support.litellm_auth import auth

from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.budgets import found, spending, windows
from fast_litellm_shm.integrations.litellm.budgets import replacement as budgets
from fast_litellm_shm.integrations.litellm.budgets.spending import Allowance, Refusal, Spending
from fast_litellm_shm.integrations.litellm.budgets.windows import FOREVER, Window, window_of
from fast_litellm_shm.integrations.litellm.limiter import SharedLimiter
from fast_litellm_shm.limiters.budget import Usage

limiting: Any = importlib.import_module("fast_litellm_shm.integrations.litellm.limiter")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    spending.forget()
    windows._known.clear()
    failures.forget()
    yield
    spending.forget()


def of_key(usd: float = 1.0, spent: float = 0.0, **more: Any) -> Allowance:
    return Allowance("Key", "k", "key:k", usd, spent, FOREVER, **more)


OF_TEAM = Allowance("Team", "t", "team:t", 1.0, 0.0, FOREVER)


def usage(allowance: Allowance | None = None) -> Usage:
    allowance = allowance or of_key()
    return spending.budget_of(allowance.window).usage(allowance.key)


def so_far() -> tuple[float, float]:
    """Spent and reserved."""
    found = usage()
    return float(found.spent), float(found.reserved)


def reserved(usd: float, *allowances: Allowance, strict: bool = False) -> Spending:
    got = spending.reserve(allowances or (of_key(),), usd, strict)
    assert isinstance(got, Spending)
    return got


def refused(usd: float, *allowances: Allowance, strict: bool = False) -> Refusal:
    got = spending.reserve(allowances or (of_key(),), usd, strict)
    assert isinstance(got, Refusal)
    return got


# windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration", "per"),
    [
        *[("1h", "hour"), ("hourly", "hour"), ("1d", "day"), ("24h", "day"), ("daily", "day")],
        *[("7d", "week"), ("1w", "week"), ("30d", "month"), ("1mo", "month"), ("monthly", "month")],
    ],
)
def test_windows_of_the_calendar(duration: str, per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert window_of(duration)[:3] == (per, "UTC", "")
    monkeypatch.setattr(litellm, "timezone", "Asia/Tokyo", raising=False)
    assert window_of(duration)[:3] == (per, "Asia/Tokyo", "")


def test_a_calendar_window_ends_when_litellms_does() -> None:
    from litellm.litellm_core_utils.duration_parser import get_next_standardized_reset_time

    ends = get_next_standardized_reset_time("30d", datetime.now(timezone.utc))
    assert window_of("30d", ends) == window_of("30d")
    assert window_of("30d", ends.isoformat()) == window_of("30d")
    assert window_of("30d").until == ends.timestamp()


def test_a_window_that_litellm_began_otherwise() -> None:
    """For example a key's of an older release: 30 days from when it was made."""
    ends = datetime(2099, 5, 17, 9, 30, tzinfo=timezone.utc)
    assert window_of("30d", ends)[:3] == (None, "UTC", " until 2099-05-17T09:30:00Z")
    assert window_of("14d", "2099-05-17T09:30:00Z") == window_of("30d", ends)
    late = datetime.now(timezone.utc) - timedelta(minutes=5)  # LiteLLM is late to end it
    assert window_of("14d", late).mark == f" until {late.strftime('%Y-%m-%dT%H:%M:%SZ')}"
    assert window_of("30d", late).per == "month"


def test_windows_of_another_length(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [86400.0 * 20]
    monkeypatch.setattr(time, "time", lambda: now[0])
    first = window_of("12h")
    assert first[:3] == (None, "UTC", " until 1970-01-21T12:00:00Z")
    now[0] += 43199
    assert window_of("12h") == first
    now[0] += 1
    assert window_of("12h").mark == " until 1970-01-22T00:00:00Z"


@pytest.mark.parametrize("duration", [None, "", "0d", "soon"])
def test_no_window(duration: str | None) -> None:
    assert window_of(duration) == FOREVER


def test_a_reset_at_another_time_of_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litellm, "budget_reset_time", "12:00", raising=False)
    assert window_of("1d", "2099-05-17T12:00:00Z").mark == " until 2099-05-17T12:00:00Z"


# what is reserved and spent -------------------------------------------------------------------


def test_reserved_then_spent() -> None:
    found = reserved(0.4)
    assert so_far() == (0, 0.4)
    found.spent(0.25)
    assert so_far() == (0.25, 0)
    found.spent(0.05)  # another call of the same request
    found.release()
    assert so_far() == (0.3, 0)


@pytest.mark.parametrize("how", ["release", "drop"])
def test_what_is_not_spent_is_given_back(how: str) -> None:
    found: Spending | None = reserved(0.4)
    if how == "release":
        assert found is not None
        found.release()
    found = None
    assert so_far() == (0, 0)


def test_a_cost_that_is_known_late_counts() -> None:
    found = reserved(0.4)
    found.release()
    found.spent(0.1)
    assert usage().spent == Decimal("0.1")


def test_all_budgets_or_none() -> None:
    of_all = (of_key(), OF_TEAM)
    reserved(0.9, OF_TEAM).spent(0.9)
    assert refused(0.5, *of_all, strict=True).allowance == OF_TEAM
    assert usage().reserved == 0
    reserved(0.05, *of_all).spent(0.04)
    assert usage().spent == Decimal("0.04")
    assert usage(OF_TEAM).spent == Decimal("0.94")


def test_what_is_left_is_less_than_the_estimate() -> None:
    """As with LiteLLM, the request passes, but one at a time."""
    first = reserved(5.0)
    assert usage().reserved == 1
    assert refused(0.1).spent == 1
    first.spent(0.7)
    second = reserved(0.2)
    refused(0.2)  # 0.1 is left, and one is in flight
    second.spent(0.2)
    third = reserved(0.2)
    assert usage().reserved == Decimal("0.1")
    third.spent(0.2)
    assert usage().spent == Decimal("1.1")
    assert refused(0.000001).spent == pytest.approx(1.1)


def test_strict() -> None:
    reserved(0.7).spent(0.7)
    refused(0.4, strict=True)
    reserved(0.3, strict=True)


def test_a_budget_of_nothing() -> None:
    refused(0.1, of_key(0.0))
    refused(0.1, of_key(-1.0))


def test_a_soft_budget_denies_nothing_and_counts() -> None:
    reserved(0.9).spent(1.0)
    reserved(0.5, of_key(soft=True), OF_TEAM).spent(0.25)
    assert usage().spent == Decimal("1.25")
    assert usage(OF_TEAM).spent == Decimal("0.25")


def test_the_database_knows_of_more() -> None:
    refused(0.3, of_key(spent=0.8), strict=True)
    assert usage().spent == Decimal("0.8")
    reserved(0.1, of_key(spent=0.5)).spent(0.1)  # what it knew before
    assert usage().spent == Decimal("0.9")
    reserved(0.01, of_key(spent=0.85)).release()  # it lags behind
    assert usage().spent == Decimal("0.9")


@pytest.mark.parametrize("duration", [None, "1d", "30d", "12h"])
def test_an_operator_sets_what_was_spent(
    duration: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    window = window_of(duration)
    allowance = Allowance("Key", "k", f"key:k{window.mark}", 1.0, 0.9, window)
    refused(0.5, allowance, strict=True)
    spending.set_spent("key:k", 0.0)
    reserved(0.5, allowance._replace(spent=0.0), strict=True).spent(0.3)
    spending._known.clear()  # as in another worker, which has the number before in its cache
    reserved(0.5, allowance, strict=True).release()
    assert usage(allowance).spent == Decimal("0.3")
    then = time.time() + spending._STALE + 1
    monkeypatch.setattr(time, "time", lambda: then)
    spending._known.clear()
    reserved(0.05, allowance, strict=True).release()
    assert usage(allowance).spent == Decimal("0.9")


def test_another_limit_holds_at_once_with_what_was_spent() -> None:
    reserved(0.9).spent(0.9)
    refused(0.01, of_key(0.5))
    assert usage().limit == Decimal("0.5")
    reserved(1.0, of_key(2.0), strict=True).spent(1.0)
    assert (float(usage().limit), float(usage().spent)) == (2.0, 1.9)


def test_a_limit_that_another_worker_has_set_from_what_it_knew() -> None:
    reserved(0.1).release()
    spending.budget_of(FOREVER).tell("key:k", 10**8, 0)
    reserved(0.9, strict=True).release()


def test_a_window_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [86400.0 * 20]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def allowance() -> Allowance:
        window = window_of("12h")
        return Allowance("Key", "k", f"key:k{window.mark}", 1.0, 0.0, window)

    old = allowance()
    reserved(1.0, old).spent(1.0)
    refused(0.1, allowance())
    now[0] += 43200
    reserved(1.0, allowance(), strict=True).spent(1.0)
    assert usage(old).spent == 1
    now[0] += 43200
    reserved(0.1, allowance())
    assert usage(old).spent == 0  # its window was over an hour ago: it takes no more room


def test_no_more_is_reserved_than_there_is() -> None:
    """By threads that meet at the limit."""
    got: list[Spending | Refusal] = []
    begin = threading.Barrier(8)

    def ask() -> None:
        begin.wait()
        got.extend(spending.reserve((of_key(),), 0.03, True) for _ in range(20))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(each, Spending) for each in got) == 33
    assert usage().reserved == Decimal("0.99")


# which budgets --------------------------------------------------------------------------------


def of_auth(user_budget: bool = False, **given: Any) -> list[tuple[str, str, float]]:
    known = SimpleNamespace(**{**vars(auth()), "token": "k", **given})
    return [each[:1] + each[2:4] for each in found.of_auth(known, user_budget)]


def test_budgets_of_an_auth() -> None:
    assert of_auth() == []
    assert of_auth(max_budget=2) == [("Key", "key:k", 2.0)]
    assert of_auth(max_budget=float("nan"), team_max_budget=1.0) == []
    assert of_auth(team_id="t", team_max_budget=1.0) == [("Team", "team:t", 1.0)]
    assert of_auth(user_id="u", user_max_budget=1.0) == [("User", "user:u", 1.0)]
    team_key: dict[str, Any] = {"team_id": "t", "user_id": "u", "user_max_budget": 1.0}
    assert of_auth(**team_key) == []  # as with LiteLLM
    assert of_auth(True, **team_key) == [("User", "user:u", 1.0)]
    assert of_auth(end_user_id="e", end_user_max_budget=1.0) == [("EndUser", "end_user:e", 1.0)]
    org = of_auth(org_id="o", organization_max_budget=1.0)
    assert org == [("Organization", "org:o", 1.0)]
    limits = [
        {"budget_duration": "1d", "max_budget": 3},
        '{"budget_duration": "1h", "max_budget": 1}',
    ]
    assert of_auth(budget_limits=limits) == [
        ("Key", "key:k:window:1d", 3.0),
        ("Key", "key:k:window:1h", 1.0),
    ]


def test_what_was_spent_in_the_window_before_does_not_count() -> None:
    """LiteLLM's job, which ends windows, runs every ten minutes."""
    late = datetime.now(timezone.utc) - timedelta(minutes=5)
    fields = {"max_budget": 1.0, "spend": 0.9, "budget_duration": "30d"}
    known = SimpleNamespace(**{**vars(auth()), "token": "k", **fields})
    [allowance] = found.of_auth(known, False)
    assert allowance.spent == 0.9
    known.budget_reset_at = late
    [allowance] = found.of_auth(known, False)
    assert (allowance.spent, allowance.window.per) == (0.0, "month")


# the hooks ------------------------------------------------------------------------------------


def logged(cost: float | None, id: str = "c") -> dict[str, Any]:
    return {"litellm_call_id": id, "model": "m", "litellm_params": {}, "response_cost": cost}


def data() -> dict[str, Any]:
    return {"litellm_call_id": "c", "model": "m", "messages": []}


@pytest.fixture
def limiter(monkeypatch: pytest.MonkeyPatch) -> SharedLimiter:
    """Each request has reserved half a dollar, where the key has it."""

    async def reserved_for(auth: Any, data: Any) -> Spending:
        got = spending.reserve((of_key(),), 0.5, True)
        if isinstance(got, Refusal):
            raise budgets.error_of(got, 0.5)
        return got

    monkeypatch.setattr(limiting.budgets, "has_none", lambda auth: False)
    monkeypatch.setattr(limiting.budgets, "reserved_for", reserved_for)
    return SharedLimiter()


async def ask(limiter: SharedLimiter, **limits: Any) -> None:
    await limiter.async_pre_call_hook(auth(**limits), None, data(), "acompletion")


def test_answered(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        await ask(limiter)
        assert usage().reserved == Decimal("0.5")
        await limiter.async_post_call_success_hook(data(), auth(), {})
        assert usage().reserved == Decimal("0.5")  # the cost is not known yet
        await limiter.async_log_success_event(logged(0.2), {}, None, None)
        assert so_far() == (0.2, 0)

    asyncio.run(scenario())


def test_several_calls(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        await ask(limiter)
        for _ in range(3):
            await limiter.async_log_success_event(logged(0.2), {}, None, None)
        assert usage().spent == Decimal("0.6")

    asyncio.run(scenario())


def test_failed_and_tried_again(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        await ask(limiter)
        await limiter.async_log_failure_event(logged(0.0), None, None, None)
        assert usage().reserved == Decimal("0.5")
        await limiter.async_log_success_event(logged(0.1), {}, None, None)
        assert so_far() == (0.1, 0)

    asyncio.run(scenario())


def test_failed(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        await ask(limiter)
        await limiter.async_log_failure_event(logged(0.0), None, None, None)
        await limiter.async_post_call_failure_hook(data(), ValueError(), auth())
        assert so_far() == (0, 0)

    asyncio.run(scenario())


def test_a_stream_that_is_cut_costs_what_litellm_says(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        await ask(limiter)
        await limiter.async_log_failure_event(logged(0.1), None, None, None)
        await limiter.async_post_call_failure_hook(data(), ValueError(), auth())
        assert so_far() == (0.1, 0)

    asyncio.run(scenario())


def test_denied_by_another_limit(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        with pytest.raises(Exception) as denied:
            await ask(limiter, rpm_limit=0)
        assert getattr(denied.value, "status_code", None) == 429
        assert usage().reserved == 0

    asyncio.run(scenario())


def test_used_up(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        with pytest.raises(litellm.BudgetExceededError) as denied:
            await ask(limiter)
        assert denied.value.current_cost == 0.75
        assert str(denied.value) == (
            "Budget has been exceeded! Key=k Current cost: 0.75, Estimated request cost: 0.5, "
            "Max budget: 1.0"
        )

    held = reserved(0.75)
    asyncio.run(scenario())
    held.release()


def test_a_cost_that_nobody_tells(limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiting, "_COST_KNOWN_AFTER", 0.0)

    async def scenario() -> None:
        kept = []

        async def request() -> None:
            await ask(limiter)
            kept.append(limiting._call.get())  # as a task of LiteLLM's would, for ever

        await asyncio.create_task(request())
        while usage().reserved:
            await asyncio.sleep(0)
        assert kept[0].spending is not None

    asyncio.run(scenario())


def test_an_error_says_what_litellms_says() -> None:
    error: Any = budgets.error_of(Refusal(of_key(), 0.25), 0.8)
    assert str(error) == (
        "Budget has been exceeded! Key=k Current cost: 0.25, Estimated request cost: 0.8, "
        "Max budget: 1.0"
    )
    of_model = of_key(what="LiteLLM Virtual Key: k, key_alias: a, exceeded budget for model=m")
    assert str(budgets.error_of(Refusal(of_model, 1.0), 0.0)).endswith("budget for model=m")
    assert (error.current_cost, error.max_budget) == (0.25, 1.0)
    assert error.status_code == litellm.budget_exceeded_status_code


def test_a_window_is_of_the_budget_too() -> None:
    zone = Window("day", "Asia/Tokyo")
    assert spending.budget_of(zone) is spending.budget_of(zone._replace(mark="x"))
    assert spending.budget_of(zone) is not spending.budget_of(Window("day"))
