"""What a router picks from: a list of deployments, what of it is kept, and bad ones."""

from __future__ import annotations

import copy
import enum
import json
import sys
from types import MappingProxyType
from typing import Any

import pytest
from support.routed import (
    deployments,
    ids,
)
from support.waiting import wait_until

from fast_litellm_shm import AdvancedRouter, Segment, get_available_deployment
from fast_litellm_shm.routing import router as routing

ALL = tuple(routing.STRATEGIES)


@pytest.mark.parametrize("strategy", ALL)
def test_the_same_object_of_the_list_or_none(segment: Segment, strategy: str) -> None:
    router = AdvancedRouter(strategy, segment=segment)
    listed = deployments(3)
    other = {"model_name": "n", "litellm_params": {"model": "x"}}
    assert router.strategy == strategy
    for _ in range(50):
        picked = router.get_available_deployment([other, *listed], "m")
        assert any(picked is deployment for deployment in listed)
    assert router.get_available_deployment([other, *listed], "n") is other
    assert router.get_available_deployment(listed, "unknown") is None
    assert router.get_available_deployment([], "m") is None
    assert router.get_available_deployment(model_list=tuple(listed), model="m") in listed
    assert router.get_available_deployment((d for d in listed), "m") in listed  # any iterable


@pytest.mark.parametrize("strategy", ALL)
def test_blocked(segment: Segment, strategy: str) -> None:
    router = AdvancedRouter(strategy, segment=segment)
    listed = deployments(4)

    def left(*blocked: str) -> set[str]:
        return set(ids(router, listed, 200, *blocked))

    assert left() == {"d0", "d1", "d2", "d3"}
    assert left("d0", "openai/x1") == {"d2", "d3"}
    assert left("d0", "d1", "d2", "a", "b", "c") == {"d3"}  # enough to be looked up as a set
    assert left("nobody") == {"d0", "d1", "d2", "d3"}
    for all_of_them in (["m"], {"m"}, ("m",), {"d0", "d1", "d2", "openai/x3", "a"}):
        assert router.get_available_deployment(listed, "m", all_of_them) is None
    empty: list[Any] = [[], (), None, set()]
    for none in empty:
        assert router.get_available_deployment(listed, "m", blocked_models=none) in listed


def test_what_changes_in_the_list_is_seen(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    listed = deployments(2)
    assert set(ids(router, listed, 100)) == {"d0", "d1"}
    removed = listed.pop(0)
    assert set(ids(router, listed, 100)) == {"d1"}
    listed[0] = removed
    assert set(ids(router, listed, 100)) == {"d0"}
    listed[0]["model_name"] = "n"  # inside: within 0.1 s
    wait_until("it is seen", lambda: router.get_available_deployment(listed, "m") is None)
    for i in range(30):  # more lists than a router keeps
        many = deployments(i + 1)
        assert router.get_available_deployment(many, "m") in many


def _planned(router: AdvancedRouter, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows with each list that the router reads anew."""
    read: list[str] = []
    plan = AdvancedRouter._plan

    def noted(router: AdvancedRouter, listed: list[Any], model: str) -> Any:
        read.append(model)
        return plan(router, listed, model)

    monkeypatch.setattr(AdvancedRouter, "_plan", noted)
    return read


@pytest.mark.parametrize("strategy", ["simple_shuffle", "least_busy", "cost_based"])
def test_a_list_of_new_dicts_is_not_read_anew(
    segment: Segment, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = AdvancedRouter(strategy, segment=segment)
    read = _planned(router, monkeypatch)
    other = {"model_name": "n", "litellm_params": {"model": "x"}}
    text = json.dumps([*deployments(3, weight=2), other])
    for _ in range(50):
        listed = json.loads(text)
        picked = router.get_available_deployment(listed, "m")
        assert any(picked is each for each in listed[:3])  # the very object of this list
    assert len(read) < 10  # one in 0.1 s


@pytest.mark.parametrize(
    ("strategy", "field"),
    [
        ("simple_shuffle", "weight"),
        ("simple_shuffle", "tpm"),
        ("cost_based", "input_cost_per_token"),
    ],
)
def test_what_differs_in_a_new_list_is_seen_at_once(
    segment: Segment, strategy: str, field: str
) -> None:
    router = AdvancedRouter(strategy, segment=segment)
    for best in [0, 1, 2] * 20:
        listed = deployments(3)
        for at, deployment in enumerate(listed):
            favoured = (at == best) == (strategy == "simple_shuffle")
            deployment["litellm_params"][field] = 1 if favoured else 0
        assert router.get_available_deployment(listed, "m") is listed[best]


@pytest.mark.parametrize("field", ["input_cost_per_token", "output_cost_per_token"])
def test_a_price_that_comes_or_goes_with_a_new_list(segment: Segment, field: str) -> None:
    """In model_info, which has the id alone in between."""
    router = AdvancedRouter("cost_based", segment=segment)
    for best in [0, 1, None, 2, None] * 10:
        listed = deployments(3)
        for at, deployment in enumerate(listed):
            if best is not None:
                deployment["model_info"][field] = 1 if at == best else 2
            assert best is not None or len(deployment["model_info"]) == 1
        picked = {id(router.get_available_deployment(listed, "m")) for _ in range(20)}
        assert picked == {id(listed[best])} if best is not None else len(picked) > 1
    only = deployments(2)
    only[0]["model_info"][field] = 2
    assert router.get_available_deployment(only, "m") is only[0]  # the other's is not known
    other = deployments(2)
    other[1]["model_info"][field] = 2
    assert router.get_available_deployment(other, "m") is other[1]


def test_what_is_blocked_goes_by_the_new_list(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    for best in [0, 1, 2] * 20:
        listed = deployments(3)
        for at, deployment in enumerate(listed):
            deployment["litellm_params"]["model"] = "good" if at == best else "bad"
        assert router.get_available_deployment(listed, "m", ["bad"]) is listed[best]


@pytest.mark.parametrize("becomes", [[], [1], [1, 0], [2, 2]])
def test_a_list_that_changes_while_it_is_compared(segment: Segment, becomes: list[int]) -> None:
    """By another thread; or by what a dict's lookup runs, as here. What is left of it counts."""

    class Key(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            mine[:] = [three[place] for place in becomes]
            return str.__eq__(self, other)

    router = AdvancedRouter(segment=segment)
    router.get_available_deployment(deployments(2), "m")
    for place in range(2):  # where the change comes
        three: list[dict[str, Any]] = deployments(3)
        mine = three[:2]
        mine[place] = {Key(name): value for name, value in mine[place].items()}
        picked = router.get_available_deployment(mine, "m")
        assert picked in mine if becomes else picked is None


@pytest.mark.parametrize("first", range(1, 6))
def test_a_key_that_cannot_be_compared(segment: Segment, first: int) -> None:
    """Its comparison fails from a call on, which is within each look at the list."""
    calls = 0

    class Key(str):
        def __hash__(self) -> int:
            return hash("weight")

        def __eq__(self, other: object) -> bool:
            nonlocal calls
            calls += 1
            if calls >= first:
                raise ValueError("compared")
            return False

    router = AdvancedRouter(segment=segment)
    router.get_available_deployment(deployments(1), "m")
    (mine,) = deployments(1)
    params = {Key("other"): 1, **mine["litellm_params"]}
    try:
        assert router.get_available_deployment([{**mine, "litellm_params": params}], "m")
    except ValueError as error:  # of the plan that was made anew
        assert str(error) == "compared"


def test_another_id_or_another_kind_of_value_is_another_deployment(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    listed = deployments(2, weight=1)
    assert router.get_available_deployment(listed, "m") in listed
    for i in range(20):
        again = copy.deepcopy(listed)
        again[1]["model_info"]["id"] = f"other{i}"
        router.get_available_deployment(again, "m")
        assert f"other{i}" in router.get_stats()
    again = copy.deepcopy(listed)
    again[1]["litellm_params"]["weight"] = True
    with pytest.raises(ValueError, match="weight"):
        router.get_available_deployment(again, "m")
    again[1]["litellm_params"] = None
    with pytest.raises(TypeError, match="litellm_params"):
        router.get_available_deployment(again, "m")


def test_kept_plans_do_not_keep_lists_for_ever(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    listed = deployments(1)
    held = [sys.getrefcount(listed[0])]
    router.get_available_deployment(listed, "m")
    held.append(sys.getrefcount(listed[0]))
    for i in range(20):
        router.get_available_deployment(deployments(i + 2), "m")
    held.append(sys.getrefcount(listed[0]))
    router.get_available_deployment(listed, "m", ["a"])
    del router
    held.append(sys.getrefcount(listed[0]))
    assert held == [held[0], held[0] + 1, held[0], held[0]]


def test_models_may_be_members_of_an_enum(segment: Segment) -> None:
    class Model(str, enum.Enum):
        M = "m"

    listed = [{"model_name": Model.M, "litellm_params": {"model": Model.M}}]
    router = AdvancedRouter(segment=segment)
    assert router.get_available_deployment(listed, Model.M) is listed[0]
    assert router.get_available_deployment(listed, "m") is listed[0]
    assert router.get_available_deployment(listed, "m", [Model.M]) is None


def test_mappings_that_are_no_dicts(segment: Segment) -> None:
    listed = [MappingProxyType(d) for d in deployments(2)]
    assert AdvancedRouter(segment=segment).get_available_deployment(listed, "m") in listed


BAD_LISTS: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, "model_list must be a list of deployments, not None"),
    ("m", TypeError, "model_list must be a list of deployments, not 'm'"),
    ({"model_name": "m"}, TypeError, "model_list must be a list of deployments"),
    ([5], TypeError, r"model_list\[0\]: a deployment must be a dict, not 5"),
    ([{}], ValueError, r"model_list\[0\]: model_name is missing"),
    ([{"model_name": 5}], TypeError, r"model_list\[0\]: model_name must be a str, not 5"),
    ([*deployments(1), {"model_name": "m"}], ValueError, r"\[1\]: litellm_params is missing"),
    (
        [{"model_name": "m", "litellm_params": None}],
        TypeError,
        r"\[0\]: litellm_params must be a dict, not None",
    ),
    (
        [{"model_name": "m", "litellm_params": {}}],
        ValueError,
        r"\[0\]: litellm_params.model is missing",
    ),
    (
        [{"model_name": "m", "litellm_params": {"model": 7}}],
        TypeError,
        r"\[0\]: litellm_params.model must be a str, not 7",
    ),
    (
        [{"model_name": "m", "litellm_params": {"model": "x"}, "model_info": []}],
        TypeError,
        r"\[0\]: model_info must be a dict, not \[\]",
    ),
    (
        [{"model_name": "m", "litellm_params": {"model": "x"}, "model_info": {"id": 1.5}}],
        TypeError,
        r"\[0\]: model_info.id must be a str, not 1.5",
    ),
    (deployments(1, weight="heavy"), ValueError, r"\[0\]: litellm_params.weight .* not 'heavy'"),
    (deployments(1, weight=-1), ValueError, r"\[0\]: litellm_params.weight .* not -1"),
    (deployments(1, rpm=float("nan")), ValueError, r"\[0\]: litellm_params.rpm .* not nan"),
    (deployments(1, tpm=[1]), TypeError, r"\[0\]: litellm_params.tpm .* not \[1\]"),
    (deployments(1, weight=True), ValueError, r"\[0\]: litellm_params.weight .* not True"),
    (
        [{"model_name": "m", "litellm_params": {"model": "x", 1: 2, "a": 3}}],
        TypeError,
        r"\[0\]: litellm_params cannot be hashed.*give it a model_info.id",
    ),
]


@pytest.mark.parametrize(("listed", "kind", "message"), BAD_LISTS)
def test_a_bad_list_is_named(
    segment: Segment, listed: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        AdvancedRouter(segment=segment).get_available_deployment(listed, "m")
    with pytest.raises(kind, match=message):
        get_available_deployment(listed, "m")


@pytest.mark.parametrize("place", ["litellm_params", "model_info"])
def test_a_bad_price_is_named(segment: Segment, place: str) -> None:
    listed = deployments(2)
    listed[1][place]["output_cost_per_token"] = "dear"
    message = rf"model_list\[1\]: {place}.output_cost_per_token must be a number .* not 'dear'"
    with pytest.raises(ValueError, match=message):
        AdvancedRouter("cost_based", segment=segment).get_available_deployment(listed, "m")


def test_other_models_entries_are_not_looked_into(segment: Segment) -> None:
    listed = [{"model_name": "broken"}, *deployments(1)]
    assert AdvancedRouter(segment=segment).get_available_deployment(listed, "m") is listed[1]


@pytest.mark.parametrize("blocked", ["d0", b"d0", 5, [5], ["d0", None]])
def test_bad_blocked_models_are_named(segment: Segment, blocked: Any) -> None:
    with pytest.raises(TypeError, match="blocked_models"):
        AdvancedRouter(segment=segment).get_available_deployment(deployments(2), "m", blocked)


def test_bad_arguments(segment: Segment) -> None:
    with pytest.raises(
        ValueError,
        match="strategy must be one of simple_shuffle, least_busy, latency_based, cost_based, not "
        "'nonsense'",
    ):
        AdvancedRouter("nonsense")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"allowed_fails": -1}, ValueError, "allowed_fails"),
        ({"allowed_fails": 1.5}, TypeError, "allowed_fails"),
        ({"cooldown_seconds": -1}, ValueError, "cooldown_seconds"),
        ({"cooldown_seconds": None}, TypeError, "cooldown_seconds"),
        ({"cooldown_seconds": float("nan")}, ValueError, "cooldown_seconds"),
        ({"segment": "x"}, TypeError, "segment"),
        ({"name": 5}, TypeError, "name"),
    ]
    for kwargs, kind, message in bad:
        with pytest.raises(kind, match=message):
            AdvancedRouter(**{"segment": segment, **kwargs})
    router = AdvancedRouter(segment=segment)
    with pytest.raises(TypeError, match="model must be a str, not 5"):
        router.get_available_deployment([], 5)  # type: ignore[arg-type]
    for deployment in (5, {}, {"model_name": "m"}):
        with pytest.raises((TypeError, ValueError), match="deployment"):
            router.track(deployment)  # type: ignore[arg-type]
    for latency in (-1, float("nan"), float("inf"), "soon"):
        with pytest.raises(ValueError, match="latency_ms must be a number of 0 or more"):
            router.record("d0", latency)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cost must be a number of 0 or more, not -1"):
        router.record("d0", 1.0, True, -1)
    assert router.get_stats() == {}
    with pytest.raises(RuntimeError, match="__init__ was not called"):
        AdvancedRouter.__new__(AdvancedRouter).get_available_deployment([], "m")
    with pytest.raises(RuntimeError, match="make another object"):
        router.__init__()  # type: ignore[misc]
