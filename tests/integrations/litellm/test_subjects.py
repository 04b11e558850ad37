"""The subjects of a request, from LiteLLM's own objects; its estimate and its usage."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st

pytest.importorskip("litellm")

from support.litellm_auth import auth

from fast_litellm_shm.integrations.litellm import subjects as module
from fast_litellm_shm.integrations.litellm import usage
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subject, of_deployment, subjects


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, []),
        ({"rpm_limit": 10}, [("api_key", "k", (10, None, None))]),
        (
            {"rpm_limit": 10, "tpm_limit": 5, "max_parallel_requests": 2},
            [("api_key", "k", (10, 5, 2))],
        ),
        ({"rpm_limit": 10, "budget_throttle_pct": 0.25}, [("api_key", "k", (2, None, None))]),
        ({"rpm_limit": 1, "budget_throttle_pct": 0.25}, [("api_key", "k", (1, None, None))]),
        ({"rpm_limit": 10, "metadata": {"rpm_limit_type": "dynamic"}}, []),
        ({"rpm_limit": 10, "api_key": None}, []),
        ({"user_id": "u", "user_tpm_limit": 7}, [("user", "u", (None, 7, None))]),
        ({"user_tpm_limit": 7}, []),
        ({"team_id": "t", "team_rpm_limit": 7}, [("team", "t", (7, None, None))]),
        (
            {"team_id": "t", "user_id": "u", "team_member_rpm_limit": 7},
            [("team_member", "t:u", (7, None, None))],
        ),
        ({"end_user_id": "e", "end_user_rpm_limit": 7}, [("end_user", "e", (7, None, None))]),
        (
            {"org_id": "o", "organization_tpm_limit": 7},
            [("organization", "o", (None, 7, None))],
        ),
        (
            {"metadata": {"model_rpm_limit": {"m": 3, "n": 4}}},
            [("model_per_key", "k:m", (3, None, None))],
        ),
        (
            {"model_max_budget": {"m": {"tpm_limit": 30, "max_budget": 1}}},
            [("model_per_key", "k:m", (None, 30, None))],
        ),
        (
            {"team_id": "t", "team_metadata": {"model_rpm_limit": {"m": 3}}},
            [("model_per_team", "t:m", (3, None, None))],
        ),
        (  # the key's own goes before its team's
            {
                "metadata": {"model_rpm_limit": {"m": 2}},
                "team_id": "t",
                "team_metadata": {"model_rpm_limit": {"m": 3}, "model_tpm_limit": {"m": 9}},
            },
            [
                ("model_per_key", "k:m", (2, None, None)),
                ("model_per_team", "t:m", (None, 9, None)),
            ],
        ),
        (
            {"org_id": "o", "organization_metadata": {"model_tpm_limit": {"m": 3}}},
            [("model_per_organization", "o:m", (None, 3, None))],
        ),
    ],
)
def test_subjects(said: dict[str, Any], found: list[tuple[Any, ...]]) -> None:
    expected = [Subject(kind, value, Limits(*limits)) for kind, value, limits in found]
    assert list(subjects(auth(**said), "m")) == expected


_LIMIT = st.sampled_from([None, 0, 3, 7.0, 2**31])
_TABLE = st.sampled_from(
    [None, {}, {"tags": ["a"]}, {"rpm_limit_type": "dynamic"}, {"model_tpm_limit": {"m": 9}}]
)
_BUDGETS = st.sampled_from([None, {}, {"m": {"rpm_limit": 4}}, {"n": {"budget_limit": 1}}])


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("rpm_limit", "tpm_limit", "max_parallel_requests"), _LIMIT),
            **dict.fromkeys(module._NUMBERS, _LIMIT),
            **dict.fromkeys(("metadata", "team_metadata", "organization_metadata"), _TABLE),
            "model_max_budget": _BUDGETS,
            "budget_throttle_pct": st.sampled_from([None, 0.5]),
            **dict.fromkeys(
                ("api_key", "user_id", "team_id", "org_id", "end_user_id"),
                st.sampled_from([None, "", "a", "b"]),
            ),
        },
    )
)
def test_what_is_remembered_of_a_key_is_what_its_request_says(given: dict[str, Any]) -> None:
    """Whatever of it limits anything is part of what it is remembered by."""
    asked = auth(**given)
    found = subjects(asked, "m")
    event("remembered" if subjects(auth(**given), "m") is found else "found anew")
    assert list(found) == [*module._own(asked), *module.of_model(asked, "m")]
    tokens = [each.limits.tpm for each in found if each.limits.tpm]
    assert found.least_tokens == min(tokens, default=0)
    assert found.limits_of == {(each.kind, each.value): each.limits for each in found}


def test_an_older_litellm_has_not_all_fields() -> None:
    known = {"api_key": "k", "rpm_limit": 3, "tpm_limit": None, "max_parallel_requests": None}
    asked = SimpleNamespace(**known, metadata={}, team_metadata=None, team_id=None)
    assert subjects(asked, "m") == (Subject("api_key", "k", Limits(3)),)


def test_an_alias_counts_as_what_it_stands_for() -> None:
    limited = auth(metadata={"model_rpm_limit": {"m": 3}})
    assert list(subjects(limited, "alias", lambda _: "m")) == [
        Subject("model_per_key", "k:m", Limits(3))
    ]
    assert list(subjects(limited, "alias")) == []
    assert list(subjects(limited, None)) == []


def test_a_latest_model_counts_as_the_model_that_it_is() -> None:
    """Of what LiteLLM calls "-latest", the limits of its name and of that model hold, as in
    LiteLLM's built-in limiter; of one group the least."""
    aliases = pytest.importorskip("litellm.litellm_core_utils.model_latest_aliases")
    latest, model = aliases.expand_model_latest_alias("claude-sonnet-latest")
    assert list(subjects(auth(metadata={"model_rpm_limit": {model: 3}}), latest)) == [
        Subject("model_per_key", f"k:{model}", Limits(3))
    ]
    metadata = {"model_rpm_limit": {model: 3, latest: 5}, "model_tpm_limit": {latest: 7}}
    assert list(subjects(auth(metadata=metadata), latest)) == [
        Subject("model_per_key", f"k:{latest}", Limits(5, 7)),
        Subject("model_per_key", f"k:{model}", Limits(3)),
    ]
    assert list(subjects(auth(metadata=metadata), model)) == [
        Subject("model_per_key", f"k:{model}", Limits(3))
    ]
    assert list(subjects(auth(metadata=metadata), latest, lambda _: "group")) == [
        Subject("model_per_key", "k:group", Limits(3, 7))
    ]


def test_groups_are_not_asked_for_where_no_model_has_a_limit() -> None:
    def asked(model: str) -> str:
        raise AssertionError(model)

    assert list(subjects(auth(rpm_limit=3), "m", asked)) == [Subject("api_key", "k", Limits(3))]


@pytest.mark.parametrize(
    ("written", "limits"),
    [
        ((None, None, None), None),
        (("10", None, None), Limits(10)),
        ((0, None, None), Limits(0)),
        ((-3, None, None), Limits(0)),
        ((2**31 - 1, None, None), Limits(2**31 - 1)),
        ((2**31, 2**63, 100_001), None),  # as people write "unlimited"
        ((1, 2**63, 100_000), Limits(1, None, 100_000)),
    ],
)
def test_how_limits_are_written(written: tuple[Any, ...], limits: Limits | None) -> None:
    assert module.limits(*written) == limits


def test_a_limit_that_is_no_number() -> None:
    with pytest.raises(ValueError, match="'ten'"):
        module.limits("ten")


def test_of_a_deployment() -> None:
    def of(*limits: int | None) -> Subject:
        return Subject("deployment", "d", Limits(*limits))

    params = {"model": "openai/x", "rpm": 5, "max_parallel_requests": 3}
    deployment = {"litellm_params": params, "model_info": {"id": "d", "tpm": 70}}
    assert of_deployment(deployment, per_minute=True) == (of(5, 70, 3),)
    assert of_deployment(deployment, per_minute=False) == (of(None, None, 3),)
    assert of_deployment({"litellm_params": {"rpm": 5}}, per_minute=True) == ()  # no id
    assert of_deployment({"model_info": {"id": "d"}}, per_minute=True) == ()  # no limits
    assert of_deployment({**deployment, "model_info": {"id": {}}}, per_minute=True) == ()
    assert of_deployment({**deployment, "rpm": 9}, True) == (of(9, 70, 3),)


MESSAGES = [{"role": "user", "content": "x" * 400}]  # 100, 4 for the message, 3 for the reply


@pytest.mark.parametrize(
    ("data", "call_type", "kind", "tokens"),
    [
        ({"messages": MESSAGES, "max_tokens": 50}, "acompletion", "total", 157),
        ({"messages": MESSAGES, "max_tokens": 50, "n": 3}, "acompletion", "total", 257),
        ({"messages": MESSAGES, "max_tokens": 50}, "acompletion", "input", 107),
        ({"messages": MESSAGES, "max_tokens": 50}, "acompletion", "output", 50),
        ({"messages": MESSAGES, "model": "not known"}, "acompletion", "total", 1107),
        ({"prompt": "x" * 40, "max_tokens": 1}, "atext_completion", "total", 11),
        ({"input": ["x" * 40, "y" * 40]}, "aembedding", "total", 20),
        ({"input": [1, 2, 3]}, "aembedding", "total", 3),
        ({"prompt": [[1, 2], [3]], "max_tokens": 1}, "atext_completion", "total", 5),
        ({"input": "x" * 40, "max_output_tokens": 5}, "aresponses", "total", 15),
        ({"input": "x", "instructions": "x" * 39}, "aresponses", "input", 10),
        ({"query": "x" * 20, "documents": ["y" * 20, {"text": "z" * 40}]}, "rerank", "input", 20),
        ({"messages": MESSAGES, "system": [{"text": "x" * 40}]}, "acompletion", "input", 117),
        ({"messages": MESSAGES, "tools": [{"x": "y" * 390}]}, "acompletion", "input", 208),
        ({"messages": MESSAGES, "max_completion_tokens": 1, "max_tokens": 50}, "", "output", 50),
        ({"messages": MESSAGES, "max_tokens": -1, "model": "not known"}, "", "output", 1000),
        ({}, "acompletion", "input", 1),
        (
            {"messages": [{"content": [{"type": "image_url"}, {"type": "text", "text": "abcd"}]}]},
            "acompletion",
            "input",
            308,
        ),
        ({"messages": MESSAGES, "max_tokens": 10**9}, "acompletion", "total", 4000),
        ({"messages": None, "max_tokens": "many", "n": None}, "acompletion", "input", 1),
    ],
)
def test_estimate(data: dict[str, Any], call_type: str, kind: str, tokens: int) -> None:
    assert usage.Estimate(data, call_type, kind).within(4000) == tokens


@pytest.fixture
def nothing_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "_mean_outputs", type(usage._mean_outputs)())


def estimate_of(who: str, model: str = "m", **more: Any) -> usage.Estimate:
    data = {"model": model, "messages": MESSAGES, **more}
    return usage.Estimate(data, "acompletion", "total", usage.calls_of(data, "acompletion"), who)


def learn(who: str, used: int, model: str = "m", **more: Any) -> None:
    estimate = estimate_of(who, model, **more)
    estimate.within(1)
    estimate.learn(used)


@pytest.mark.usefixtures("nothing_learnt")
def test_an_estimate_learns_from_its_own_key() -> None:
    learn("a", 100_000)
    assert estimate_of("a").within(10**6) == 100_000
    assert estimate_of("b").within(10**6) == 107 + 1024
    assert estimate_of("a", "another").within(10**6) == 107 + 1024


@pytest.mark.usefixtures("nothing_learnt")
def test_an_estimated_output_is_at_most_a_quarter_of_the_limit() -> None:
    learn("a", 100_000)
    assert estimate_of("a").within(20_000) == 107 + 5000
    assert estimate_of("a", max_tokens=50_000).within(20_000) == 20_000  # which it asks for


@pytest.mark.usefixtures("nothing_learnt")
def test_an_estimate_is_of_each_choice_and_of_each_call() -> None:
    learn("a", 107 + 4 * 50, n=4)
    assert estimate_of("a").within(10**6) == 107 + 50
    assert estimate_of("a", n=10).within(10**6) == 107 + 500
    learn("b", 3 * (107 + 70), "m,m,m")
    assert estimate_of("b", "m,m,m").within(10**6) == 107 + 70


@pytest.mark.usefixtures("nothing_learnt")
def test_who_learns_much_makes_others_forget_little() -> None:
    """The memory has an end: keys that a tenant makes take the place of who learnt longest ago, and
    models of one key that of its own."""
    learn("a", 100_000)
    for i in range(usage._MOST_LEARNERS - 1):
        learn(f"flood {i}", 10)
    learn("a", 100_000)
    for i in range(10 * usage._MOST_MODELS):
        learn("flood 0", 10, f"model {i}")
    assert estimate_of("a").within(10**6) == 100_000
    assert len(usage._mean_outputs) <= usage._MOST_LEARNERS
    assert len(usage._mean_outputs["flood 0"]) <= usage._MOST_MODELS


@pytest.mark.parametrize(
    ("given", "call_type", "models", "rows"),
    [
        ({"model": "a"}, "acompletion", {"a": 1}, 1),
        ({"model": "a,b, a"}, "acompletion", {"a": 2, "b": 1}, 1),
        ({"model": "a,"}, "acompletion", {"a": 1, "": 1}, 1),
        ({"model": "a,b"}, "aembedding", {"a,b": 1}, 1),
        ({"model": "a,b", "api_base": "x"}, "acompletion", {"a,b": 1}, 1),
        ({"model": "a,b", "messages": [MESSAGES] * 3}, "acompletion", {"a": 3, "b": 3}, 3),
        ({"model": "a,b", "messages": [*MESSAGES, MESSAGES]}, "acompletion", {"a": 1, "b": 1}, 1),
        (
            {"model": "a,b", "messages": [MESSAGES] * 3, "fastest_response": True},
            "acompletion",
            {"a": 1, "b": 1},
            1,
        ),
        ({"model": ["a"]}, "acompletion", {}, 1),
        ({}, "acompletion", {}, 1),
    ],
)
def test_calls_that_a_request_makes(
    given: dict[str, Any], call_type: str, models: dict[str, int], rows: int
) -> None:
    found = usage.calls_of({"messages": MESSAGES, **given}, call_type)
    assert (dict(found.models), found.rows) == (models, rows)
    assert found.total == max(sum(models.values()), 1)


def test_a_list_counts_for_each_model() -> None:
    limited = auth(rpm_limit=9, metadata={"model_rpm_limit": {"m": 3, "n": 4}})
    assert module.of_calls(limited, {"m": 2, "n": 1, "other": 1}) == (
        Subject("api_key", "k", Limits(9), 4),
        Subject("model_per_key", "k:m", Limits(3), 2),
        Subject("model_per_key", "k:n", Limits(4), 1),
    )
    one_group = module.of_calls(limited, {"m": 2, "n": 1}, lambda _: "group")
    assert one_group[1:] == (Subject("model_per_key", "k:group", Limits(3), 3),)


@pytest.mark.usefixtures("nothing_learnt")
def test_an_estimate_learns() -> None:
    estimate = usage.Estimate({"model": "m", "messages": MESSAGES}, "acompletion", "total")
    assert estimate.within(4000) == 1107
    estimate.learn(130)
    assert estimate.within(4000) == 130
    for _ in range(100):
        estimate.learn(170)
    assert estimate.within(4000) == 170
    longer = usage.Estimate({"model": "m", "messages": MESSAGES * 2}, "acompletion", "total")
    assert longer.within(4000) == 274  # its own input, and what answers had beyond theirs


@pytest.mark.parametrize(
    ("reported", "total", "input_", "output"),
    [
        ({"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}, 30, 10, 20),
        ({"input_tokens": 10, "output_tokens": 20}, 30, 10, 20),
        ({"total_tokens": 30}, 30, 30, 30),
        (  # Anthropic's own: its input is without what it has read from its cache, or put into it
            {
                "input_tokens": 10,
                "cache_creation_input_tokens": 5,
                "cache_read_input_tokens": 90,
                "output_tokens": 20,
            },
            35,
            15,
            20,
        ),
        (
            {
                "input_tokens": 10,
                "input_tokens_details": {"cached_tokens": 4},
                "output_tokens": 20,
                "total_tokens": 30,
            },
            26,
            6,
            20,
        ),
        (
            {
                "prompt_tokens": 10,
                "completion_tokens": 20,
                "total_tokens": 30,
                "prompt_tokens_details": {"cached_tokens": 4},
            },
            26,
            6,
            20,
        ),
    ],
)
def test_usage(reported: dict[str, Any], total: int, input_: int, output: int) -> None:
    for answer in ({"usage": reported}, SimpleNamespace(usage=reported)):
        found = usage.usage_of(answer)
        assert found is not None
        assert found.of_kind("total") == total
        assert found.of_kind("input") == input_
        assert found.of_kind("output") == output


@pytest.mark.parametrize("reported", [None, {}, {"usage": None}, {"total_tokens": 0}, "text", 3])
def test_no_usage_is_reported(reported: Any) -> None:
    assert usage.usage_of(reported) is None
