"""Feature flags: the environment, the file, shares of requests, errors of all workers."""

from __future__ import annotations

import json
import logging
import pathlib
import re
import warnings
from typing import Any

import pytest
from support.children import run, run_one
from support.routed import is_on, record_errors

from fast_litellm_shm import Segment, exceptions, get_feature_status, is_enabled, reset_errors
from fast_litellm_shm._shared import features, settings
from fast_litellm_shm._shared import performance as monitoring

VARIABLES = {name: f"FAST_LITELLM_{name.upper()}" for name in features.FEATURES}
GUIDE = pathlib.Path(__file__).parents[2] / "docs" / "performance.md"
IDS = [f"request-{i}" for i in range(4000)]


def write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, content: object) -> str:
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(path))
    return str(path)


def test_all_are_on_where_nothing_is_set() -> None:
    assert set(features.FEATURES) == {
        "rust_routing",
        "rust_token_counting",
        "rust_rate_limiting",
        "rust_connection_pool",
        "batch_token_counting",
    }
    assert all(is_enabled(name) and is_enabled(name, "x") for name in features.FEATURES)


@pytest.mark.parametrize("name", features.FEATURES)
def test_each_has_its_variable(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(VARIABLES[name], "false")
    assert [other for other in features.FEATURES if not is_enabled(other)] == [name]
    monkeypatch.setenv(VARIABLES[name], "true")
    assert is_enabled(name)
    monkeypatch.setenv(VARIABLES[name], " FALSE ")
    assert not is_enabled(name)
    monkeypatch.setenv(VARIABLES[name], "")  # as not set
    assert is_enabled(name)
    monkeypatch.delenv(VARIABLES[name])
    assert is_enabled(name)


def test_one_switch_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_ENABLED", "false")
    monkeypatch.setenv(VARIABLES["rust_routing"], "true")
    assert not any(is_enabled(name) for name in features.FEATURES)
    assert {found["state"] for found in get_feature_status().values()} == {"disabled"}
    for on in ("true", ""):
        monkeypatch.setenv("FAST_LITELLM_ENABLED", on)
        assert all(is_enabled(name) for name in features.FEATURES)


@pytest.mark.parametrize("word", ["canary", "rollout"])
def test_a_share_of_the_requests(monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    chosen: dict[float, set[str]] = {}
    for share in (0, 0.5, 5, 25, 50, 100):
        monkeypatch.setenv(VARIABLES["rust_routing"], f"{word}:{share}")
        chosen[share] = {i for i in IDS if is_enabled("rust_routing", i)}
        assert chosen[share] == {i for i in IDS if is_enabled("rust_routing", i)}
        # 5 standard deviations
        off = 5 * (len(IDS) * share / 100 * (1 - share / 100)) ** 0.5
        assert abs(len(chosen[share]) - len(IDS) * share / 100) <= off
        calls = sum(is_enabled("rust_routing") for _ in IDS)  # without an id: by chance
        assert abs(calls - len(IDS) * share / 100) <= max(off, 1) * 1.4
        status = get_feature_status()["rust_routing"]
        assert status["state"] == word
        assert status["rollout_percentage"] == share
        assert status["enabled"] is (share > 0)
    shares = sorted(chosen)
    for less, more in zip(shares, shares[1:], strict=False):
        assert chosen[less] <= chosen[more]  # who was in stays in


def test_features_do_not_choose_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rust_routing", "rust_token_counting"):
        monkeypatch.setenv(VARIABLES[name], "rollout:50")
    both = sum(is_enabled("rust_routing", i) and is_enabled("rust_token_counting", i) for i in IDS)
    assert abs(both - len(IDS) / 4) < 5 * (len(IDS) * 3 / 16) ** 0.5


def test_all_processes_choose_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLES["rust_routing"], "rollout:30")
    mine = [is_enabled("rust_routing", i) for i in IDS]
    assert run(is_on, [("rust_routing", IDS)] * 2, "spawn") == [mine, mine]
    # and all hosts, and all versions: this is the rule
    assert [is_enabled("rust_routing", i) for i in ("a", "b", "c", "d", 17, "\ud800")] == [
        False,
        False,
        False,
        True,
        False,
        False,
    ]


BAD_VALUES = ["canary:abc", "rollout:200", "rollout:-1", "canary:", "rollout", "maybe", "true:5",
              "rollout:nan"]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_VALUES)
def test_a_wrong_value_is_named_once_and_ignored(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, bad: str
) -> None:
    monkeypatch.setenv(VARIABLES["rust_routing"], bad)
    with pytest.warns(RuntimeWarning) as caught, caplog.at_level(logging.WARNING):
        assert is_enabled("rust_routing")
    assert len(caught) == 1
    for text in (str(caught[0].message), caplog.text):
        assert VARIABLES["rust_routing"] in text
        assert repr(bad) in text
        assert "canary:N" in text
    assert is_enabled("rust_routing")
    get_feature_status()  # no second warning: it would be an error here


def test_a_wrong_value_leaves_the_file_in_force(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, monkeypatch, {"features": {"rust_routing": {"enabled": False}}})
    monkeypatch.setenv(VARIABLES["rust_routing"], "rollout:200")
    with pytest.warns(RuntimeWarning, match="rollout:200"):
        assert not is_enabled("rust_routing")


def test_a_wrong_main_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_ENABLED", "canary:5")
    with pytest.warns(RuntimeWarning, match="FAST_LITELLM_ENABLED must be true or false"):
        assert is_enabled("rust_routing")


def test_an_unknown_feature_is_off_with_one_warning() -> None:
    with pytest.warns(RuntimeWarning, match="no feature 'rust_ruoting'; there are rust_routing"):
        assert is_enabled("rust_ruoting") is False
    assert is_enabled("rust_ruoting") is False
    features.record_error("rust_ruoting", ValueError("x"))
    with pytest.raises(ValueError, match="feature_name must be one of rust_routing"):
        reset_errors("rust_ruoting")


@pytest.mark.parametrize("bad", [["x"], None, 5])
def test_a_feature_is_named_by_a_str(bad: Any) -> None:
    for call in (is_enabled, features.share_of, lambda name: features.record_error(name, "x")):
        with pytest.raises(TypeError) as caught:
            call(bad)
        assert str(caught.value) == f"feature_name must be a str, not {bad!r}"
    if bad is not None:
        with pytest.raises(TypeError) as caught:
            reset_errors(bad)
        assert str(caught.value) == f"feature_name must be a str or None, not {bad!r}"


# the file


def test_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    path = write(
        tmp_path,
        monkeypatch,
        {
            "features": {
                "rust_routing": {"enabled": False, "rollout_percentage": 100},
                "rust_token_counting": {"enabled": True, "rollout_percentage": 25},
                "rust_rate_limiting": {
                    "enabled": True,
                    "config": {"requests_per_minute": 60, "burst_size": 10},
                },
                "rust_connection_pool": {"rollout_percentage": 0},
            },
            "monitoring": {"enabled": True, "sample_rate": 0.1},
            "fallback": {"auto_disable_on_errors": True, "max_errors_before_disable": 3},
        },
    )
    status = get_feature_status()
    assert {
        name: (found["state"], found["rollout_percentage"]) for name, found in status.items()
    } == {
        "rust_routing": ("disabled", 0),
        "rust_token_counting": ("rollout", 25),
        "rust_rate_limiting": ("enabled", 100),
        "rust_connection_pool": ("rollout", 0),
        "batch_token_counting": ("enabled", 100),
    }
    assert {found["error_threshold"] for found in status.values()} == {3}
    monkeypatch.setenv(VARIABLES["rust_routing"], "true")  # the environment wins
    assert is_enabled("rust_routing")
    pathlib.Path(path).write_text("{}")
    features.reload()
    assert get_feature_status()["rust_token_counting"]["state"] == "enabled"


def test_the_guides_file_holds_all_there_is_with_the_defaults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    block = re.search(r"```json\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    without = get_feature_status(), settings.rate_defaults(), settings.pool_defaults()
    write(tmp_path, monkeypatch, block[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of what nobody knows
        assert without == (
            get_feature_status(),
            settings.rate_defaults(),
            settings.pool_defaults(),
        )
        assert monitoring.measured("c", "o")[1] == 100
    found = json.loads(block[1])["features"]
    assert set(found) == set(features.FEATURES)
    for name, entry in found.items():
        assert set(entry.get("config", ())) == set(features._CONFIG_OF.get(name, ()))


def test_the_guide_tells_what_each_flag_does() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    assert [name for name in VARIABLES.values() if f"`{name}`" not in guide] == []


BAD_FILES: list[tuple[Any, str]] = [
    ('{"features": ', "cannot read .* as JSON"),
    ("[" * 100_000, "cannot read .* as JSON"),
    ("[1]", "must hold a JSON object"),
    ({"feature": {}}, "there is no 'feature', it is ignored; known are features, monitoring"),
    ({"features": []}, "features must be a JSON object, not"),
    ({"features": {"rust_rooting": {}}}, "features: there is no 'rust_rooting'"),
    ({"features": {"rust_routing": None}}, "rust_routing must be a JSON object, not None"),
    (
        {"features": {"rust_rate_limiting": {"config": {"requests_per_minutes": 5}}}},
        "config: there is no 'requests_per_minutes', it is ignored; known are requests_per_minute",
    ),
    (
        {"features": {"rust_routing": {"config": {"x": 5}}}},
        "rust_routing.config: there is no 'x', it is ignored; known are none",
    ),
    ({"features": {"rust_connection_pool": {"config": 5}}}, "config must be a JSON object, not 5"),
    ({"features": {"rust_routing": 5}}, "features.rust_routing must be a JSON object, not 5"),
    ({"features": {"rust_routing": {"enable": 1}}}, "features.rust_routing: there is no 'enable'"),
    (
        {"features": {"rust_routing": {"enabled": "no"}}},
        "features.rust_routing.enabled must be true or false, not 'no'",
    ),
    (
        {"features": {"rust_routing": {"rollout_percentage": 200}}},
        "rollout_percentage must be a number from 0 to 100, not 200",
    ),
    (
        {"features": {"rust_routing": {"rollout_percentage": "abc"}}},
        "rollout_percentage must be a number from 0 to 100, not 'abc'",
    ),
    ({"fallback": 5}, "fallback must be a JSON object, not 5"),
    (
        {"fallback": {"max_errors_before_disable": 0}},
        "fallback.max_errors_before_disable must be a whole number of 1 or more, not 0",
    ),
    (
        {"fallback": {"auto_disable_on_errors": "yes"}},
        "fallback.auto_disable_on_errors must be true or false, not 'yes'",
    ),
]


@pytest.mark.parametrize(("content", "message"), BAD_FILES)
def test_a_broken_file_is_told_and_the_defaults_apply(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, content: Any, message: str
) -> None:
    path = write(tmp_path, monkeypatch, content)
    with pytest.warns(RuntimeWarning, match=message) as caught:
        status = get_feature_status()
    assert path in str(caught[0].message)
    assert len(caught) == 1
    assert status["rust_routing"]["state"] == "enabled"
    assert status["rust_routing"]["error_threshold"] == 10


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", "/nowhere/flags.json")
    with pytest.warns(RuntimeWarning, match="/nowhere/flags.json"):
        assert is_enabled("rust_routing")


def test_where_warnings_are_errors_the_setting_is_still_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLES["rust_routing"], "maybe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning):
            is_enabled("rust_routing")
        assert is_enabled("rust_routing")


# errors


def test_errors_switch_a_feature_off_in_all_processes(caplog: pytest.LogCaptureFixture) -> None:
    Segment.default()
    assert run(record_errors, [("rust_routing", 3)] * 3, "spawn") == [True] * 3
    assert is_enabled("rust_routing")
    with caplog.at_level(logging.WARNING):
        features.record_error("rust_routing", KeyError("the tenth"))
    assert "rust_routing is off on this host after 10 errors" in caplog.text
    assert "the tenth" in caplog.text
    assert not is_enabled("rust_routing")
    assert not is_enabled("rust_routing", "x")
    assert run_one(is_on, "rust_routing", ["a"]) == [False]
    assert is_enabled("rust_token_counting")
    status = get_feature_status()["rust_routing"]
    assert status == {
        "enabled": False,
        "state": "disabled_by_errors",
        "error_count": 10,
        "errors": ["KeyError: 'the tenth'"],
        "error_threshold": 10,
        "rollout_percentage": 100.0,
    }
    reset_errors("rust_token_counting")
    assert not is_enabled("rust_routing")
    reset_errors("rust_routing")
    assert is_enabled("rust_routing")
    assert run_one(is_on, "rust_routing", ["a"]) == [True]
    assert get_feature_status()["rust_routing"]["errors"] == []


def test_errors_of_many_processes_are_all_counted() -> None:
    Segment.default()
    run(record_errors, [("batch_token_counting", 2000)] * 4, "fork")
    assert get_feature_status()["batch_token_counting"]["error_count"] == 8000
    features.record_error("rust_routing", "as text")
    reset_errors()
    assert {found["error_count"] for found in get_feature_status().values()} == {0}


def test_the_threshold_is_the_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    write(tmp_path, monkeypatch, {"fallback": {"max_errors_before_disable": 2}})
    assert record_errors("rust_routing", 1)
    assert not record_errors("rust_routing", 1)
    write(tmp_path, monkeypatch, {"fallback": {"auto_disable_on_errors": False}})
    assert record_errors("rust_routing", 100)
    assert get_feature_status()["rust_routing"]["error_threshold"] is None


def test_without_a_segment_errors_count_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", "not/a/name")
    with pytest.warns(RuntimeWarning, match="counted in this process only"):
        assert is_enabled("rust_routing")
    assert not record_errors("rust_routing", 10)
    assert get_feature_status()["rust_routing"]["error_count"] == 10
    reset_errors()
    assert is_enabled("rust_routing")


def test_an_error_whose_text_differs_each_time_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    free = iter(range(1000))

    def full(_: object = None) -> Segment:
        raise exceptions.SegmentSpaceError(f"no space left: {next(free)} MiB are free")

    monkeypatch.setattr(Segment, "default", full)
    with pytest.warns(RuntimeWarning, match="only: no space left: 0 MiB") as told:
        for _ in range(20):
            assert is_enabled("rust_routing")
            get_feature_status()
    assert len(told) == 1
