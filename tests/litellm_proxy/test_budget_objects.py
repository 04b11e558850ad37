"""Budgets, by the objects and functions of the proxy's own modules, without a proxy that runs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")

import litellm
from litellm.caching.caching import DualCache
from litellm.proxy import proxy_server
from litellm.proxy._types import (
    LiteLLM_BudgetTable,
    LiteLLM_EndUserTable,
    LiteLLM_TeamTable,
    LiteLLM_UserTable,
    UserAPIKeyAuth,
)
from litellm.proxy.agent_endpoints import agent_registry
from litellm.proxy.hooks import max_budget_per_session_limiter
from litellm.proxy.hooks import max_iterations_limiter as max_iterations
from litellm.proxy.hooks import model_max_budget_limiter as of_models
from litellm.proxy.spend_tracking import budget_reservation
from litellm.proxy.utils import InternalUsageCache
from litellm.router_strategy.budget_limiter import RouterBudgetLimiting

from fast_litellm_shm import exceptions
from fast_litellm_shm.integrations.litellm import settings
from fast_litellm_shm.integrations.litellm.budgets import replacement, sessions, spending, windows
from fast_litellm_shm.integrations.litellm.budgets.windows import FOREVER, window_of

# Of pydantic, about types of LiteLLM's router.
pytestmark = pytest.mark.filterwarnings("ignore:Items? .* using the `ReadOnly` qualifier")

PRICED = {
    **{"model": "openai/fake", "api_key": "sk-none", "mock_response": "hello"},
    **{"input_cost_per_token": 0.001, "output_cost_per_token": 0.001},
}
ROUTE = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    replacement.install()
    spending.forget()
    sessions.forget()
    windows._known.clear()
    yield
    spending.forget()
    sessions.forget()


@pytest.fixture(scope="module")
def router() -> Any:
    return litellm.Router(model_list=[{"model_name": "priced", "litellm_params": PRICED}])


def body(**more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "hi"}
    return {"model": "priced", "messages": [message], "max_tokens": 100, **more}


async def reserve(router: Any, auth: UserAPIKeyAuth, **more: Any) -> Any:
    """As LiteLLM's authentication does. Returns what is reserved."""
    given = {
        **{"request_body": body(), "route": ROUTE, "llm_router": router, "valid_token": auth},
        **{"team_object": None, "user_object": None, "prisma_client": None},
        "user_api_key_cache": proxy_server.user_api_key_cache,
        "proxy_logging_obj": proxy_server.proxy_logging_obj,
        **more,
    }
    assert await budget_reservation.reserve_budget_for_request(**given) is None
    return replacement._reserved.get()


def usage_cache() -> Any:
    return InternalUsageCache(DualCache())


def reserved(per: str | None, key: str) -> float:
    return float(spending.budget_of(FOREVER._replace(per=per)).usage(key).reserved)


def test_all_kinds_of_budgets(router: Any) -> None:
    table = LiteLLM_BudgetTable(max_budget=4, budget_duration="7d")

    async def scenario() -> None:
        org = {"spend": 0.0, "litellm_budget_table": {"max_budget": 5, "budget_duration": "1mo"}}
        cache = proxy_server.user_api_key_cache
        await cache.async_set_cache(key="org_id:o:with_budget", value=org)
        window = {"budget_duration": "1h", "max_budget": 9.0}
        of_model = {"priced": {"max_budget": 6, "budget_duration": "30d"}}
        end_user = LiteLLM_EndUserTable(user_id="e", blocked=False, litellm_budget_table=table)
        auth = UserAPIKeyAuth(
            api_key="sk-1", max_budget=1, budget_duration="1d", org_id="o", team_id="t",
            budget_limits=[window], model_max_budget=of_model,
        )  # fmt: skip
        held = await reserve(
            router, auth, end_user_id="e",
            team_object=LiteLLM_TeamTable(team_id="t", max_budget=2, budget_duration="30d"),
            end_user_object=end_user,
        )  # fmt: skip
        token = auth.token
        found = [
            reserved("day", f"key:{token}"),
            reserved("hour", f"key:{token}:window:1h"),
            reserved("month", "team:t"),
            reserved("week", "end_user:e"),
            reserved("month", "org:o"),
            reserved("month", f"key:{token}:model:priced:30d"),
        ]
        assert len(set(found)) == 1
        assert 0.1 < found[0] < 0.2  # "hi", and the 100 tokens that it may answer
        assert len(held.allowances) == 6

    asyncio.run(scenario())


def test_a_user(router: Any) -> None:
    user = LiteLLM_UserTable(user_id="u", max_budget=1, spend=0.25)

    async def scenario() -> None:
        held = await reserve(router, UserAPIKeyAuth(api_key="sk-1", user_id="u"), user_object=user)
        assert reserved(None, "user:u") > 0.1
        held.spent(0.05)
        assert spending.used(held.allowances[0]) == pytest.approx(0.3)

    asyncio.run(scenario())


def test_the_error_is_litellms(router: Any) -> None:
    auth = UserAPIKeyAuth(api_key="sk-1", max_budget=1, spend=1.5)

    with pytest.raises(litellm.BudgetExceededError) as ours:
        asyncio.run(reserve(router, auth))
    counter = SimpleNamespace(
        entity_type="Key", entity_id=auth.token, spend_log_entity_id=None, max_budget=1.0
    )
    with pytest.raises(litellm.BudgetExceededError) as theirs:
        budget_reservation._raise_counter_budget_exceeded(counter, 1.5)
    assert vars(ours.value) == vars(theirs.value)


def test_several_calls_of_a_request(router: Any) -> None:
    async def scenario() -> None:
        auth = UserAPIKeyAuth(api_key="sk-1", max_budget=10)
        one = await reserve(router, auth)
        once = reserved(None, f"key:{auth.token}")
        several = await reserve(router, auth, request_body=body(model="priced,priced,priced"))
        assert reserved(None, f"key:{auth.token}") == pytest.approx(4 * once)
        one.release(), several.release()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("caps", "like"),
    [
        ({"max_tokens": -1000}, {}),
        ({"max_tokens": 0}, {}),
        ({"max_tokens": "x"}, {}),
        ({"max_completion_tokens": 1, "max_tokens": 500}, {"max_tokens": 500}),
        ({"max_completion_tokens": -5, "max_tokens": "500"}, {"max_tokens": 500}),
        ({"max_tokens": 500, "n": -3}, {"max_tokens": 500}),
    ],
)
def test_no_spelling_makes_an_estimate_smaller(
    router: Any, caps: dict[str, Any], like: dict[str, Any]
) -> None:
    async def scenario() -> list[float]:
        found: list[float] = []
        for more in (caps, like):
            auth = UserAPIKeyAuth(api_key=f"sk-{len(found)}", max_budget=1000)
            asked = body(**more)
            if "max_tokens" not in more:
                del asked["max_tokens"]
            held = await reserve(router, auth, request_body=asked)
            found.append(reserved(None, held.allowances[0].key))
            held.release()
        return found

    found = asyncio.run(scenario())
    assert found[0] == found[1] > 0.4


def test_a_request_that_cannot_be_estimated_takes_all_that_is_left(
    router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> float:
        raise OverflowError

    monkeypatch.setattr(budget_reservation, "estimate_request_max_cost", fail)

    async def scenario() -> None:
        auth = UserAPIKeyAuth(api_key="sk-1", max_budget=5)
        held = await reserve(router, auth)
        assert reserved(None, held.allowances[0].key) == 5
        with pytest.raises(litellm.BudgetExceededError):
            await reserve(router, auth)

    asyncio.run(scenario())


@pytest.mark.parametrize("route", ["/v1/models", "/key/info", "/utils/token_counter"])
def test_routes_that_cost_nothing(router: Any, route: str) -> None:
    async def scenario() -> None:
        auth = UserAPIKeyAuth(api_key="sk-1", max_budget=1, spend=2)
        assert await reserve(router, auth, route=route) is False

    asyncio.run(scenario())


def test_a_model_without_a_price_passes_while_anything_is_left() -> None:
    params = {"model": "openai/unheard-of", "api_key": "sk-none", "mock_response": "hello"}
    router = litellm.Router(model_list=[{"model_name": "priced", "litellm_params": params}])

    async def scenario() -> None:
        auth = UserAPIKeyAuth(api_key="sk-1", max_budget=1)
        held = await reserve(router, auth)
        assert 0 < reserved(None, f"key:{auth.token}") < 0.001
        held.spent(2.0)
        with pytest.raises(litellm.BudgetExceededError):
            await reserve(router, auth)

    asyncio.run(scenario())


def test_without_a_segment_litellms_own_holds(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise exceptions.SegmentError("planted")

    monkeypatch.setattr(spending, "reserve", fail)
    auth = UserAPIKeyAuth(api_key="sk-1", max_budget=1)
    given = {
        **{"request_body": body(), "route": ROUTE, "llm_router": router, "valid_token": auth},
        **{"team_object": None, "user_object": None, "prisma_client": None},
        "user_api_key_cache": proxy_server.user_api_key_cache,
        "proxy_logging_obj": proxy_server.proxy_logging_obj,
    }

    async def scenario() -> Any:
        return await budget_reservation.reserve_budget_for_request(**given)

    held = asyncio.run(scenario())
    assert held["entries"][0]["counter_key"] == f"spend:key:{auth.token}"
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, {"fail_open": False}, raising=False)
    with pytest.raises(Exception) as refused:
        asyncio.run(scenario())
    assert getattr(refused.value, "status_code", None) == 503


def test_they_can_be_left_to_litellm(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, {"budgets": False}, raising=False)
    auth = UserAPIKeyAuth(api_key="sk-2", max_budget=1)

    async def scenario() -> Any:
        return await budget_reservation.reserve_budget_for_request(
            request_body=body(), route=ROUTE, llm_router=router, valid_token=auth,
            team_object=None, user_object=None, prisma_client=None,
            user_api_key_cache=proxy_server.user_api_key_cache,
            proxy_logging_obj=proxy_server.proxy_logging_obj,
        )  # fmt: skip

    assert asyncio.run(scenario())["reserved_cost"] > 0.1
    assert reserved(None, f"key:{auth.token}") == 0


def test_litellms_check_of_a_models_budget_reads_the_segment(router: Any) -> None:
    """So its budget_fallbacks choose by what all workers have spent."""
    budgets = {"priced": {"max_budget": 0.5, "budget_duration": "30d"}}
    auth = UserAPIKeyAuth(
        api_key="sk-1", model_max_budget=budgets, budget_fallbacks={"priced": ["free"]}
    )

    async def scenario() -> None:
        limiter = of_models._PROXY_VirtualKeyModelMaxBudgetLimiter(dual_cache=DualCache())
        assert await limiter.is_key_within_model_budget(auth, "priced")
        key = f"key:{auth.token}:model:priced:30d"
        spending.charge(window_of("30d"), key, 0.5)  # as another worker has
        with pytest.raises(litellm.BudgetExceededError):
            await limiter.is_key_within_model_budget(auth, "priced")
        assert await limiter.get_fallback_model_within_budget(auth, "priced") == "free"

    asyncio.run(scenario())


def test_budgets_of_providers() -> None:
    deployment = {
        "model_name": "m",
        "litellm_params": {"model": "openai/fake", "max_budget": 3, "budget_duration": "1d"},
        "model_info": {"id": "d"},
    }

    async def scenario() -> None:
        limits = {"openai": litellm.types.utils.BudgetConfig(budget_limit=1, time_period="1d")}
        ours = RouterBudgetLimiting(DualCache(), limits, [deployment])
        other = RouterBudgetLimiting(DualCache(), limits, [deployment])  # of another worker
        payload = {
            **{"custom_llm_provider": "openai", "response_cost": 0.6, "model_id": "d"},
            "metadata": {},
        }
        kwargs = {
            **{"standard_logging_object": payload, "response_cost": 0.6},
            "litellm_params": {"custom_llm_provider": "openai", "model_info": {"id": "d"}},
            "custom_llm_provider": "openai",
        }
        for limiter in (ours, other):
            assert await limiter.async_filter_deployments("m", [deployment], None) == [deployment]
            await limiter.async_log_success_event(kwargs, None, None, None)
        for limiter in (ours, other):
            with pytest.raises(ValueError, match=r"Exceeded budget for provider openai: 1\.2 >= 1"):
                await limiter.async_filter_deployments("m", [deployment], None)
            limiter.retire()

    asyncio.run(scenario())


def test_sessions_of_agents() -> None:
    """Two workers count together."""

    async def scenario() -> None:
        iterations = [max_iterations._PROXY_MaxIterationsHandler(usage_cache()) for _ in range(2)]
        key = iterations[0]._make_cache_key("s")
        assert [await each._increment_and_get(key) for each in iterations * 2] == [1, 2, 3, 4]
        handler = max_budget_per_session_limiter._PROXY_MaxBudgetPerSessionHandler
        budgets = [handler(usage_cache()) for _ in range(2)]
        key = budgets[0]._make_cache_key("s")
        assert await budgets[0]._increment_spend(key, 0.5) == 0.5
        assert await budgets[1]._increment_spend(key, 0.25) == 0.75
        assert await budgets[0]._get_current_spend(key) == 0.75

    asyncio.run(scenario())


def test_calls_of_a_session_at_once(router: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """BerriAI/litellm#34732: each reserves what it may cost."""
    agent = SimpleNamespace(litellm_params={"max_budget_per_session": 1.0})
    monkeypatch.setattr(proxy_server, "llm_router", router)
    monkeypatch.setattr(
        agent_registry.global_agent_registry, "get_agent_by_id", lambda agent_id: agent
    )
    auth = UserAPIKeyAuth(api_key="sk-1", agent_id="a", max_budget=50, request_route=ROUTE)

    async def ask(session: str = "s") -> Any:
        replacement._reserved.set(None)
        return await replacement.reserved_for(auth, body(metadata={"session_id": session}))

    async def scenario() -> None:
        asked = await asyncio.gather(*(ask() for _ in range(30)), return_exceptions=True)
        held = [each for each in asked if isinstance(each, spending.Spending)]
        refused = [each for each in asked if isinstance(each, sessions.Refused)]
        assert len(held) in (8, 9) and len(refused) == 30 - len(held)  # 100 tokens, and the message
        error = refused[0].error
        assert error.status_code == 429  # type: ignore[attr-defined]
        assert str(error.detail).startswith(  # type: ignore[attr-defined]
            "Session budget exceeded for session s. Current spend: $0."
        )
        per_call = reserved(None, f"key:{auth.token}") / len(held)
        assert 0.1 < per_call < 0.13  # of the key too: nothing of those that were refused
        assert await ask("another")
        for each in held:
            each.spent(0.03)
        found = spending.budget_of(window_of("1h")).usage("session:s")
        assert (float(found.spent), float(found.reserved)) == (0.03 * len(held), 0.0)
        again = [await ask() for _ in range(3)]
        assert all(again)
        handler = max_budget_per_session_limiter._PROXY_MaxBudgetPerSessionHandler(usage_cache())
        await handler._increment_spend(handler._make_cache_key("s"), 0.9)  # by LiteLLM's counter
        with pytest.raises(sessions.Refused, match=r"max_budget_per_session: \$1\.00"):
            await ask()

    asyncio.run(scenario())


def test_what_an_operator_sets_as_spent(router: Any) -> None:
    """BerriAI/litellm#27735: it holds at once."""

    async def scenario() -> None:
        auth = UserAPIKeyAuth(api_key="sk-1", max_budget=1, spend=1.5)
        with pytest.raises(litellm.BudgetExceededError):
            await reserve(router, auth)
        await proxy_server.spend_counter_store.set(f"spend:key:{auth.token}", 0.0, ttl=60)
        auth.spend = 0.0
        assert await reserve(router, auth)

    asyncio.run(scenario())


def test_a_budget_whose_window_litellm_knows(router: Any) -> None:
    ends = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(days=3)

    async def scenario() -> None:
        auth = UserAPIKeyAuth(
            api_key="sk-1", max_budget=1, budget_duration="14d", budget_reset_at=ends
        )
        held = await reserve(router, auth)
        mark = f" until {ends.strftime('%Y-%m-%dT%H:%M:%SZ')}"
        assert held.allowances[0].key == f"key:{auth.token}{mark}"

    asyncio.run(scenario())
