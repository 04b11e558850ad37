"""The values that LiteLLM's routing strategies pick by, over several processes with a real Router
each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from support.waiting import wait_until

pytest.importorskip("litellm")

import litellm
from litellm.caching.in_memory_cache import InMemoryCache
from litellm.router import Router
from litellm.router_strategy import lowest_latency, lowest_tpm_rpm, lowest_tpm_rpm_v2
from litellm.router_utils.pre_call_checks.model_rate_limit_check import ModelRateLimitingCheck
from support.litellm_workers import (
    GROUP,
    TOKENS,
    Caller,
    NoonDatetime,
    Worker,
    Workers,
    deployment,
    router,
)

from fast_litellm_shm._shared.native import ffi
from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router import cache_values
from fast_litellm_shm.integrations.litellm.router.deployments import Deployments
from fast_litellm_shm.integrations.litellm.router.sharing import RouterState

# LiteLLM warns, of its own code and of event loops that it leaves open.
pytestmark = pytest.mark.filterwarnings("ignore")

state = RouterState()


@pytest.fixture(autouse=True)
def _as_if_new() -> Iterator[None]:
    """No callbacks of another test's router are left, and no failure was logged in this minute."""
    failures.forget()
    yield
    for name in ("callbacks", "input_callback", "success_callback", "failure_callback"):
        setattr(litellm, name, [])


@pytest.fixture
def noon(monkeypatch: pytest.MonkeyPatch) -> None:
    """No minute of the clock ends."""
    for module in (lowest_tpm_rpm, lowest_latency, cache_values):
        monkeypatch.setattr(module, "datetime", NoonDatetime)
    monkeypatch.setattr(lowest_tpm_rpm_v2, "get_utc_datetime", NoonDatetime.now)
    check: Any = ModelRateLimitingCheck.__init__  # its clock is an argument
    monkeypatch.setattr(check, "__defaults__", (NoonDatetime.now,))


def shared(*ids: str, **settings: Any) -> Any:
    """A router that shares its state."""
    made = router(*ids, **settings)
    state.attach(made)
    return made


def least_busy() -> Any:
    return shared("a", "b", "c", "d", routing_strategy="least-busy")


def in_flight(caller: Caller) -> dict[str, int]:
    """As least-busy reads it."""
    cache = caller.router.health().store
    ids = caller.router.registry().names(kind="ids")
    counts = cache.batch_get_cache([f"{GROUP}_request_count:{i}" for i in ids], local_only=True)
    return {i: count for i, count in zip(ids, counts, strict=True) if count}


def until(worker: Worker, name: str, expected: Any) -> None:
    """Ask until the answer is what is expected: another worker brings it about, some time."""
    wait_until(
        lambda: f"{name}: {worker.do(name)}, not {expected}", lambda: worker.do(name) == expected
    )


# least busy --------------------------------------------------------------------------------------


def test_least_busy_picks_the_one_that_is_idle_in_all_workers() -> None:
    with Workers(4, least_busy, [in_flight]) as workers:
        held = [worker.do("hold") for worker in workers]
        assert sorted(held) == ["a", "b", "c", "d"]
        assert workers[0].do("in_flight") == dict.fromkeys("abcd", 1)
        workers[2].do("release")
        assert workers[0].do("in_flight") == {i: 1 for i in "abcd" if i != held[2]}
        assert workers[1].do("hold") == held[2]


def test_without_opting_in_each_worker_knows_its_own_only() -> None:
    def alone() -> Any:
        return router("a", "b", "c", "d", routing_strategy="least-busy")

    with Workers(2, alone, [in_flight]) as (one, two):
        held = one.do("hold")
        assert one.do("in_flight") == {held: 1}
        assert two.do("in_flight") == {}


def test_requests_of_a_killed_worker_are_not_in_flight() -> None:
    with Workers(2, least_busy, [in_flight]) as (one, two):
        for _ in range(4):
            one.do("hold")
        assert two.do("in_flight") == dict.fromkeys("abcd", 1)
        one.kill()
        until(two, "in_flight", {})


def test_a_request_that_is_cancelled_or_fails_is_not_in_flight() -> None:
    with Workers(2, least_busy, [in_flight]) as (one, two):
        held = one.do("hold")
        assert two.do("in_flight") == {held: 1}
        one.do("cancel")
        until(two, "in_flight", {})
        one.do("fail", "a", "b", "c", "d")
        held = one.do("hold")
        assert two.do("in_flight") == {held: 1}
        one.do("release")
        assert two.do("in_flight") == {}


def test_a_call_of_the_synchronous_api_goes_to_the_idle_one() -> None:
    with Workers(2, least_busy) as (one, two):
        held = {one.do("hold") for _ in range(3)}
        assert {two.do("call_sync"), *held} == set("abcd")


def test_a_routing_group_with_a_strategy_of_its_own() -> None:
    def grouped() -> Any:
        group = {
            "group_name": "mine",
            "models": [GROUP],
            "routing_strategy": "least-busy",
        }
        return shared("a", "b", "c", "d", routing_groups=[group])

    with Workers(4, grouped) as workers:
        assert sorted(worker.do("hold") for worker in workers) == ["a", "b", "c", "d"]


def behind_a_wildcard(ids: str, strategy: str) -> Any:
    made = Router(
        model_list=[deployment(i, group="openai/*") for i in ids],
        model_group_alias={GROUP: "openai/some"},
        routing_strategy=strategy,
        num_retries=0,
    )
    state.attach(made)
    return made


def test_deployments_behind_a_wildcard_and_an_alias() -> None:
    with Workers(4, partial(behind_a_wildcard, "abcd", "least-busy")) as workers:
        assert sorted(worker.do("hold") for worker in workers) == ["a", "b", "c", "d"]


def test_the_order_of_deployments_holds_as_before() -> None:
    def ordered() -> Any:
        first, second = deployment("a", order=1), deployment("b", order=2)
        made = Router(model_list=[first, second], routing_strategy="least-busy", num_retries=0)
        state.attach(made)
        return made

    with Workers(2, ordered) as (one, two):
        assert [one.do("hold"), two.do("hold"), two.do("hold")] == ["a", "a", "a"]


def test_what_is_in_flight_when_a_worker_forks_is_not_its_childs() -> None:
    def with_child(caller: Caller) -> Any:
        with Workers(1, lambda: caller.router, [in_flight, own]) as (child,):
            return child.do("own"), child.do("in_flight")

    def own(caller: Caller) -> list[str]:
        cache = caller.router.health().store.in_memory_cache
        return [key for key in cache.own.cache_dict if "_request_count:" in key]

    with Workers(1, least_busy, [in_flight, own, with_child]) as (one,):
        held = one.do("hold")
        assert one.do("own")
        assert one.do("with_child") == ([], {held: 1})
        one.do("release")
        assert one.do("in_flight") == {}


def test_two_routers_of_one_process_count_a_request_once() -> None:
    kept: list[Any] = []

    def twice() -> Any:
        kept.append(least_busy())  # stays in use
        return least_busy()

    def calls_in_flight(caller: Caller) -> int:
        return sum(in_flight(caller).values())

    with Workers(1, twice, [calls_in_flight]) as (one,):
        one.do("hold")
        one.do("release")  # the later of the two has counted, and goes on
        one.do("hold")
        one.do("hold")
        assert one.do("calls_in_flight") == 2


# latency -----------------------------------------------------------------------------------------


def by_latency(**arguments: Any) -> Any:
    return shared(
        "a", "b", routing_strategy="latency-based-routing", routing_strategy_args=arguments
    )


async def took(
    caller: Caller, deployment_id: str, seconds: float, first: float | None, group: str = GROUP
) -> None:
    """Tell the strategy of an answer of one token that took so long."""
    strategy = caller.router.lowestlatency_logger
    start = datetime(2030, 1, 1)
    answer = litellm.ModelResponse(
        usage=litellm.Usage(prompt_tokens=1, completion_tokens=1, total_tokens=2)
    )
    kwargs: dict[str, Any] = {
        "litellm_params": {"metadata": {"model_group": group}, "model_info": {"id": deployment_id}},
        "standard_logging_object": None,
    }
    if first is not None:
        kwargs |= {"stream": True, "completion_start_time": start + timedelta(seconds=first)}
    await strategy.async_log_success_event(
        kwargs, answer, start, start + timedelta(seconds=seconds)
    )


async def picks(caller: Caller, stream: bool) -> dict[str, int]:
    found: Counter[str] = Counter()
    for _ in range(12):
        picked = await caller.router.async_get_available_deployment(
            GROUP, messages=[], request_kwargs={"stream": stream}
        )
        found[picked["model_info"]["id"]] += 1
    return found


def means(caller: Caller) -> dict[str, list[float]]:
    known = caller.router.health().store.get_cache(f"{GROUP}_map")
    return {i: [round(v, 3) for v in entry["latency_normalized"]] for i, entry in known.items()}


def test_latency_is_known_to_workers_that_have_not_called() -> None:
    with Workers(2, by_latency, [took, picks, means]) as (one, two):
        one.do("took", "a", 0.2, None)
        one.do("took", "b", 0.1, None)
        assert two.do("picks", False) == {"b": 12}
        for _ in range(3):
            two.do("took", "b", 0.7, None)
        assert one.do("means") == {"a": [0.2], "b": [0.55]}
        assert one.do("picks", False) == {"a": 12}


def test_streams_go_by_the_time_to_the_first_token() -> None:
    with Workers(2, by_latency, [took, picks]) as (one, two):
        one.do("took", "a", 0.5, 0.1)
        one.do("took", "b", 0.3, 0.2)
        assert two.do("picks", True) == {"a": 12}
        assert two.do("picks", False) == {"b": 12}


def test_a_time_to_the_first_token_is_no_cost() -> None:
    """fast-shm top shows costs in dollars."""
    deployments = Deployments()
    deployments.record("a", 0.2, 0.1)
    assert deployments.latencies(["a", "b"]) == [
        (pytest.approx(0.2, abs=1e-6), pytest.approx(0.1, abs=1e-6)),
        (None, None),
    ]
    entries = deployments._look(list(range(256)))
    infos = [info for info in ffi.from_buffer("fshm_deployment_info[]", entries) if info.id]
    assert {info.cost for info in infos} == {2**64 - 1}
    assert len(infos) == 3  # reading takes an entry of "b", but none for its first tokens


def test_a_deployment_that_was_never_called_is_tried_first() -> None:
    with Workers(2, by_latency, [took, picks]) as (one, two):
        one.do("took", "a", 0.1, None)
        assert two.do("picks", False) == {"b": 12}


def test_arguments_of_the_strategy_hold() -> None:
    def with_buffer() -> Any:
        return by_latency(lowest_latency_buffer=1.0, max_latency_list_size=1)

    with Workers(2, with_buffer, [took, picks, means]) as (one, two):
        for _ in range(2):
            one.do("took", "a", 0.2, None)
            one.do("took", "b", 0.15, None)
        assert two.do("means") == {"a": [0.2], "b": [0.15]}
        assert set(two.do("picks", False)) == {"a", "b"}


def test_latency_of_deployments_behind_a_wildcard() -> None:
    made = partial(behind_a_wildcard, "ab", "latency-based-routing")
    with Workers(2, made, [took]) as (one, two):
        one.do("took", "a", 200.0, None, "openai/some")  # calls may be slow here
        one.do("took", "b", 100.0, None, "openai/some")
        assert {two.do("call") for _ in range(6)} == {"b"}


def test_calls_record_their_latency(noon: None) -> None:
    with Workers(2, by_latency, [means]) as (one, two):
        assert {one.do("call"), two.do("call")} == {"a", "b"}  # first that which was not tried
        assert sorted(one.do("means")) == sorted(two.do("means")) == ["a", "b"]


# usage -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["usage-based-routing", "usage-based-routing-v2"])
def test_usage_is_levelled_over_workers(strategy: str, noon: None) -> None:
    def by_usage() -> Any:
        return shared("a", "b", "c", "d", routing_strategy=strategy)

    with Workers(4, by_usage) as workers:
        reached = [worker.do("call") for _ in range(3) for worker in workers]
        assert Counter(reached) == dict.fromkeys("abcd", 3)


@pytest.mark.parametrize("strategy", ["usage-based-routing", "usage-based-routing-v2"])
@pytest.mark.parametrize("limit", [{"rpm": 9}, {"tpm": 9 * TOKENS}])
def test_limits_of_the_strategy_are_those_of_one_process(
    strategy: str, limit: dict[str, int], noon: None
) -> None:
    """As many as one worker alone admits, with its rules."""

    def alone() -> Any:
        return router("a", params=limit, routing_strategy=strategy, disable_cooldowns=True)

    def together() -> Any:
        return shared("a", params=limit, routing_strategy=strategy, disable_cooldowns=True)

    with Workers(1, alone) as (one,):
        expected = one.do("calls", 40).count("a")
    with Workers(4, together) as workers:
        reached = [worker.do("call") for _ in range(10) for worker in workers]
    assert 0 < expected <= 9
    assert reached.count("a") == expected


def test_litellms_own_deployment_limit_holds_for_all_workers(noon: None) -> None:
    def limited() -> Any:
        return shared(
            "a",
            params={"rpm": 10},
            optional_pre_call_checks=["enforce_model_rate_limits"],
            disable_cooldowns=True,
        )

    with Workers(4, limited) as workers:
        for worker in workers:
            worker.begin("calls", 25)
        reached = [deployment_id for worker in workers for deployment_id in worker.result()]
    assert reached.count("a") == 10


def test_usage_within_the_latency_strategy(noon: None) -> None:
    """It has usage counters of its own for the limits."""

    def limited() -> Any:
        strategy = "latency-based-routing"
        return shared("a", params={"rpm": 4}, routing_strategy=strategy, disable_cooldowns=True)

    with Workers(2, limited) as workers:
        reached = [worker.do("call") for _ in range(4) for worker in workers]
    assert reached.count("a") == 4


# what is left alone ------------------------------------------------------------------------------


def test_other_keys_of_the_cache_are_each_workers_own() -> None:
    made, other_one = shared("a"), shared("a")
    cache, other = made.health().store, other_one.health().store
    held = object()
    cache.set_cache("a:max_parallel_requests", held)
    assert cache.get_cache("a:max_parallel_requests") is held
    cache.set_cache("some_map", {"x": 1})
    cache.set_cache("other:tpm:12-00", 3)
    assert cache.increment_cache("a:fails", 1) == 1
    assert cache.get_cache("some_map") == {"x": 1}
    assert cache.get_cache("other:tpm:12-00") == 3
    assert cache.get_cache(None) is None
    assert other.get_cache("a:fails") is other.get_cache("some_map") is None


def test_counters_as_litellm_uses_them(noon: None) -> None:
    routers = [shared("a") for _ in range(2)]
    caches = [made.health().store for made in routers]
    key = "a:openai/x:rpm:12-00"
    assert caches[0].get_cache(key) is None
    assert caches[1].increment_cache(key, 2, ttl=60) == 2
    assert caches[0].get_cache(key) == 2
    assert caches[1].increment_cache(key, -1, ttl=60) == 1  # it was refused: given back
    assert caches[0].batch_get_cache([key, "a:openai/x:tpm:12-00"]) == [1, None]
    assert caches[1].in_memory_cache.own.get_cache(key) == 1


def test_faults_leave_a_worker_with_its_own_values(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    made = shared("a", routing_strategy="least-busy")
    cache = made.health().store
    key = f"{GROUP}_request_count:a"
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())

        def broken(*_: Any) -> Any:
            raise RuntimeError("broken")

        patch.setattr(cache_values.SharedValues, "of", broken)
        assert cache.increment_cache(key, 1) == 1
        assert cache.get_cache(key) == 1
        assert cache.batch_get_cache([key]) == [1]
        cache.set_cache("x", 1)
        assert cache.get_cache("x") == 1
    assert "broken" in caplog.text
    assert type(cache.in_memory_cache.own) is InMemoryCache
