"""Routing: each strategy does what it says, over all processes; bad lists are named."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import time
from collections import Counter
from typing import Any

import pytest
from support.routed import (
    PICKS,
    deployments,
    ids,
    near,
    wait_for_the_next_minute_if_it_is_near,
)
from support.waiting import wait_until

from fast_litellm_shm import AdvancedRouter, Segment, get_available_deployment
from fast_litellm_shm._shared import features
from fast_litellm_shm.routing import router as routing

ALL = tuple(routing.STRATEGIES)


# strategies, in one process


@pytest.mark.parametrize("field", ["weight", "rpm", "tpm"])
def test_shuffle_by_weight(segment: Segment, field: str) -> None:
    listed = deployments(4)
    for deployment, weight in zip(listed, (1, "2", 0, None), strict=True):
        deployment["litellm_params"][field] = weight
    found = ids(AdvancedRouter(segment=segment), listed, PICKS)
    assert near(found["d0"], 1 / 3)
    assert near(found["d1"], 2 / 3)
    assert found["d2"] == found["d3"] == 0


def test_shuffle_by_the_first_measure_that_anybody_has(segment: Segment) -> None:
    listed = deployments(3, rpm=100, tpm=5)
    listed[1]["litellm_params"]["weight"] = 2
    assert set(ids(AdvancedRouter(segment=segment), listed, 500)) == {"d1"}
    router = AdvancedRouter(segment=segment)
    found = ids(router, deployments(3, weight=0), PICKS)
    assert all(near(found[name], 1 / 3) for name in ("d0", "d1", "d2"))
    found = ids(router, listed, PICKS, "d1")  # none of those left has a weight: all alike
    assert near(found["d0"], 1 / 2)


def test_least_busy_counts_what_is_tracked(segment: Segment) -> None:
    router, listed = AdvancedRouter("least_busy", segment=segment), deployments(3)
    with router.track(listed[0]), router.track("d0"), router.track(listed[1]):
        assert set(ids(router, listed, 100)) == {"d2"}
        with router.track(listed[2]), router.track(listed[2]), router.track(listed[2]):
            assert set(ids(router, listed, 100)) == {"d1"}
        assert router.get_stats()["d0"]["in_flight"] == 2
    found = ids(router, listed, PICKS)
    assert all(near(found[name], 1 / 3) for name in ("d0", "d1", "d2"))


def test_latency_based_tries_those_nobody_knows_and_then_takes_the_quickest(
    segment: Segment,
) -> None:
    router, listed = AdvancedRouter("latency_based", segment=segment), deployments(3)
    router.record("d0", 50)
    assert set(ids(router, listed, 200)) == {"d1", "d2"}
    router.record("d1", 20)
    with router.track("d2"):  # one request at a time finds out
        assert set(ids(router, listed, 50)) == {"d1"}
    router.record("d2", 400, success=False)
    assert router.get_stats()["d2"]["latency_ms"] is not None  # tracked above
    for _ in range(100):
        router.record("d1", 900)
    for _ in range(100):
        router.record("d2", 300)
    assert set(ids(router, listed, 50)) == {"d0"}


def test_cost_based(segment: Segment) -> None:
    router, listed = AdvancedRouter("cost_based", segment=segment), deployments(4)
    listed[0]["litellm_params"] |= {"input_cost_per_token": 3e-6, "output_cost_per_token": 15e-6}
    listed[1]["model_info"] |= {"input_cost_per_token": "1e-6", "output_cost_per_token": 2e-6}
    listed[2]["litellm_params"] |= {"input_cost_per_token": 4e-6}
    assert set(ids(router, listed, 50)) == {"d1"}  # 18, 3, 4 and unknown
    assert set(ids(router, listed, 50, "d1")) == {"d2"}
    assert set(ids(router, listed, 50, "d0", "d1", "d2")) == {"d3"}
    router.record("d1", cost=0.009)  # 3,000 tokens: so the third will cost 0.012
    router.record("d3", cost=0.011)
    assert set(ids(router, listed, 50, "d1")) == {"d3"}
    for _ in range(20):
        router.record("d3", cost=0.02)
    assert set(ids(router, listed, 50, "d1")) == {"d2"}
    assert router.get_stats()["d3"]["cost"] == pytest.approx(0.019, abs=0.001)


@pytest.mark.parametrize("strategy", ALL)
def test_cooldown_after_too_many_failures(segment: Segment, strategy: str) -> None:
    router = AdvancedRouter(strategy, allowed_fails=2, cooldown_seconds=3600, segment=segment)
    listed = deployments(2)
    for _ in range(2):
        wait_for_the_next_minute_if_it_is_near(segment)
        router.record("d0", 1, success=False)
    assert set(ids(router, listed, 50, "d1")) == {"d0"}
    router.record("d0", 1, success=False)
    assert set(ids(router, listed, 100)) == {"d1"}
    assert router.get_available_deployment(listed, "m", ["d1"]) is None
    assert 3590 < router.get_stats()["d0"]["cooldown_seconds"] <= 3600
    assert router.get_stats()["d0"]["success_rate"] == 0
    assert router.get_stats()["d0"]["requests"] == 3


def test_no_cooldown_with_zero_seconds_and_it_ends(segment: Segment) -> None:
    never = AdvancedRouter(allowed_fails=0, cooldown_seconds=0, segment=segment)
    for _ in range(10):
        never.record("d0", success=False)
    assert never.get_available_deployment(deployments(1), "m")
    short = AdvancedRouter(allowed_fails=0, cooldown_seconds=0.2, segment=segment)
    before = time.monotonic()
    short.record("d1", success=False)
    listed = deployments(2)
    picked = short.get_available_deployment(listed, "m", ["d0"])
    assert picked is None or time.monotonic() - before > 0.2
    wait_until("it ends", lambda: short.get_available_deployment(listed, "m", ["d0"]), every=0.01)


# track and record


def test_track_records_what_became_of_it(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    with router.track("a") as request:
        time.sleep(0.02)
        request.cost = 0.5
    with pytest.raises(KeyError, match="passes on"), router.track("b"):
        raise KeyError("passes on")
    with pytest.raises(KeyboardInterrupt), router.track("c"):
        raise KeyboardInterrupt
    stats = router.get_stats()
    assert set(stats["a"]) == {
        "in_flight",
        "latency_ms",
        "success_rate",
        "cost",
        "cooldown_seconds",
        "requests",
    }
    assert stats["a"]["latency_ms"] >= 20
    assert stats["a"] == stats["a"] | {"in_flight": 0, "success_rate": 1, "cost": 0.5,
                                       "cooldown_seconds": 0, "requests": 1}  # fmt: skip
    assert stats["b"] == {"in_flight": 0, "latency_ms": None, "success_rate": 0, "cost": None,
                          "cooldown_seconds": 0, "requests": 1}  # fmt: skip
    assert stats["c"]["requests"] == stats["c"]["in_flight"] == 0
    with pytest.raises(RuntimeError, match="call track\\(\\) for each request"):
        request.__enter__()


def test_a_bad_cost_does_not_hide_the_blocks_error(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    with pytest.raises(KeyError, match="the block's"), router.track("a") as request:
        request.cost = float("nan")
        raise KeyError("the block's")
    with (
        pytest.raises(ValueError, match="cost must be a number of 0 or more, not nan"),
        router.track("b") as request,
    ):
        request.cost = float("nan")
    found = router.get_stats()
    assert (found["a"]["requests"], found["a"]["success_rate"]) == (1, 0)
    assert found["a"]["in_flight"] == found["b"]["in_flight"] == 0


def test_track_without_its_end_does_not_count_for_ever(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    request = router.track("a")
    request.__enter__()
    assert router.get_stats()["a"]["in_flight"] == 1
    del request
    assert router.get_stats()["a"]["in_flight"] == 0
    assert router.get_stats()["a"]["requests"] == 0


def test_track_async(segment: Segment) -> None:
    router = AdvancedRouter("least_busy", segment=segment)
    listed = deployments(3)

    async def request(fail: bool) -> str:
        picked = router.get_available_deployment(listed, "m")
        async with router.track(picked):
            await asyncio.sleep(0.01)
            if fail:
                raise TimeoutError
        return str(picked["model_info"]["id"])

    async def main() -> None:
        assert Counter(await asyncio.gather(*(request(False) for _ in range(9)))) == {
            "d0": 3,
            "d1": 3,
            "d2": 3,
        }
        with pytest.raises(TimeoutError):
            await request(True)
        waiting = asyncio.create_task(request(False))
        await asyncio.sleep(0)
        assert sum(found["in_flight"] for found in router.get_stats().values()) == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        stats = router.get_stats().values()
        assert sum(found["in_flight"] for found in stats) == 0
        assert sum(found["requests"] for found in stats) == 10  # the cancelled one is nobody's
        assert sum(found["success_rate"] < 1 for found in stats) == 1

    asyncio.run(main())


def test_record(segment: Segment) -> None:
    router, (deployment,) = AdvancedRouter(segment=segment), deployments(1)
    router.record(deployment, latency_ms=100, success=True, cost=0.25)
    router.record("d0", 50)
    router.record("d0", success=False)
    assert router.get_stats() == {
        "d0": {
            "in_flight": 0,
            "latency_ms": pytest.approx(75, abs=0.001),
            "success_rate": pytest.approx(2 / 3),
            "cost": 0.25,
            "cooldown_seconds": 0,
            "requests": 3,
        }
    }


def test_numbers_beyond_what_is_kept_are_the_greatest(segment: Segment) -> None:
    router = AdvancedRouter(allowed_fails=0, cooldown_seconds=1e300, segment=segment)
    router.record("d0", 1e305, True, 1e305)
    router.record("d0", 10**300, success=False)
    found = router.get_stats()["d0"]
    assert found["cost"] == 2**43 / 1e9
    assert found["latency_ms"] > 1e9
    assert found["cooldown_seconds"] > 1e7


# who a deployment is


def test_without_an_id_it_is_known_by_its_parameters(segment: Segment) -> None:
    params = {"model": "azure/gpt", "api_key": "sk-secret-1", "api_base": "https://a"}
    one: dict[str, Any] = {"model_name": "m", "litellm_params": params}
    same = {"litellm_params": dict(reversed(params.items())), "model_name": "m"}
    other = copy.deepcopy(one)
    other["litellm_params"]["api_key"] = "sk-secret-2"
    router = AdvancedRouter(segment=segment)
    router.record(one, 10)
    router.record(same, 10)
    router.record(other, 10)
    stats = router.get_stats()
    assert sorted(found["requests"] for found in stats.values()) == [1, 2]
    assert all(name.startswith("azure/gpt#") for name in stats)
    assert "secret" not in repr(stats)
    with open(segment.path, "rb") as file:
        assert b"sk-secret" not in file.read()
    with_objects = {"model_name": "m", "litellm_params": {"model": "x", "client": object()}}
    again = {"model_name": "m", "litellm_params": {"model": "x", "client": object()}}
    router.record(with_objects, 1)
    router.record(again, 1)
    assert len(router.get_stats()) == 3


def test_names_set_routers_apart(segment: Segment) -> None:
    one, same, other = (AdvancedRouter(segment=segment, name=name) for name in ("a", "a", "b"))
    one.record("d0", 5)
    same.record("d0", 5)
    other.record("d0", 5)
    assert one.get_stats()["d0"]["requests"] == 2
    assert other.get_stats()["d0"]["requests"] == 1
    assert (one.name, one.segment) == ("a", segment)
    assert repr(one) == "AdvancedRouter('simple_shuffle', name='a')"


def test_more_deployments_than_places(segment: Segment) -> None:
    router = AdvancedRouter("least_busy", segment=segment)
    listed = deployments(1000)
    for deployment in listed:
        router.record(deployment, 1)
    assert router.get_available_deployment(listed, "m") in listed
    assert len(router.get_stats()) == 1000
    with router.track(listed[0]):
        assert router.get_available_deployment(listed[:2], "m") is listed[1]


def test_pickle(segment: Segment) -> None:
    router = AdvancedRouter("least_busy", allowed_fails=7, name="p", segment=segment)
    router.record("d0", 5)
    other = pickle.loads(pickle.dumps(router))
    other.record("d0", 5)
    assert (other.strategy, other.name, other._allowed_fails) == ("least_busy", "p", 7)
    assert router.get_stats()["d0"]["requests"] == 2


# the module's function


def test_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = deployments(3)
    AdvancedRouter().record("d1", 5)
    assert get_available_deployment(listed, "m") in listed
    assert get_available_deployment(listed, "n") is None
    assert get_available_deployment(listed, "m", ["d0", "d2"]) is listed[1]
    assert get_available_deployment(
        model_list=listed, model="m", blocked_models=["d0", "d2"], context={}, settings={}
    ) is listed[1]  # fmt: skip
    with AdvancedRouter().track("d0"), AdvancedRouter().track("d2"):
        picked = get_available_deployment(listed, "m", settings={"strategy": "least_busy"})
        assert picked is listed[1]
    with pytest.raises(ValueError, match="strategy must be one of simple_shuffle"):
        get_available_deployment(listed, "m", settings={"strategy": "random"})
    with pytest.warns(RuntimeWarning, match="no setting 'routing_strategy'.* strategy, allowed"):
        assert get_available_deployment(listed, "m", settings={"routing_strategy": "x"})


def test_switched_off_it_picks_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = deployments(2)
    router = AdvancedRouter("least_busy", allowed_fails=0, cooldown_seconds=3600)
    router.record("d0", success=False)
    assert set(ids(router, listed, 50)) == {"d1"}
    monkeypatch.setenv("FAST_LITELLM_RUST_ROUTING", "false")
    wait_until("both are picked", lambda: set(ids(router, listed, 50)) == {"d0", "d1"})  # 0.1 s
    assert {get_available_deployment(listed, "m")["model_info"]["id"] for _ in range(50)} == {
        "d0",
        "d1",
    }
    assert get_available_deployment(listed, "m", ["d0", "d1"]) is None
    monkeypatch.setenv("FAST_LITELLM_RUST_ROUTING", "true")
    assert set(ids(router, listed, 50)) == {"d1"}


@pytest.mark.parametrize("switch", ["true", "false"])
def test_bad_arguments_are_named_also_where_it_is_switched_off(
    monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv("FAST_LITELLM_RUST_ROUTING", switch)
    listed = deployments(2)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"model_list": None}, "model_list must be a list of deployments, not None"),
        ({"model_list": "m"}, "model_list must be a list of deployments, not 'm'"),
        ({"model_list": listed[0]}, "model_list must be a list of deployments, not {"),
        ({"model": 5}, "model must be a str, not 5"),
        ({"blocked_models": "d0"}, "blocked_models must be a list of names, not 'd0'"),
        ({"blocked_models": 5}, "blocked_models must be a list of names, not 5"),
        ({"blocked_models": ["d0", 5]}, r"blocked_models\[1\] must be a str, not 5"),
        ({"context": 5}, "context must be a dict, not 5"),
        ({"settings": ["strategy"]}, r"settings must be a dict, not \['strategy'\]"),
        ({"settings": []}, r"settings must be a dict, not \[\]"),
        ({"settings": {"strategy": ["x"]}}, r"strategy must be a str, not \['x'\]"),
        ({"settings": {"allowed_fails": []}}, r"allowed_fails must be an int, not \[\]"),
        ({"settings": {"cooldown_seconds": None}}, "cooldown_seconds must be a number, not None"),
    ]
    for arguments, message in bad:
        with pytest.raises(TypeError, match=message):
            get_available_deployment(**{"model_list": listed, "model": "m", **arguments})
    with pytest.raises(
        ValueError, match="strategy must be one of simple_shuffle.*, not 'nonsense'"
    ):
        get_available_deployment(listed, "m", settings={"strategy": "nonsense"})


@pytest.mark.parametrize("bad", [["x"], None, 5])
def test_a_strategy_is_a_str(bad: Any) -> None:
    with pytest.raises(TypeError) as caught:
        AdvancedRouter(bad)
    assert str(caught.value) == f"strategy must be a str, not {bad!r}"


def test_rolled_out_to_a_share(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = deployments(2)
    router = AdvancedRouter("least_busy", allowed_fails=0, cooldown_seconds=3600)
    router.record("d0", success=False)
    monkeypatch.setenv("FAST_LITELLM_RUST_ROUTING", "rollout:40")
    for i in range(200):
        request_id = f"r{i}"
        if features.is_enabled("rust_routing", request_id):
            assert get_available_deployment(listed, "m", None, {"request_id": request_id}) in [
                listed[1]
            ]
    # without an id by chance: 40 % go to the one that does not cool down, and half of the others
    found = ids(router, listed, 2000)
    assert near(found["d1"], 0.7, 2000)


def test_without_a_segment_it_picks_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    Segment.default().remove()
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", os.environ["FAST_LITELLM_SHM_NAME"] + "-x")
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", str(2**31))  # 100 GB: no room for it
    listed = deployments(2)
    with pytest.warns(RuntimeWarning, match="counted in this process only"):
        for _ in range(20):
            assert get_available_deployment(listed, "m") in listed
    assert "no space left" in features.get_feature_status()["rust_routing"]["errors"][-1]
