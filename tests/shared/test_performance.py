"""Durations: exact sums over all processes, quantiles within 5 %, and what is done with them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
from typing import Any

import numpy
import pytest
from support.children import run
from support.routed import record_durations

from fast_litellm_shm import (
    AdvancedRouter,
    Limit,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    compare_implementations,
    export_performance_data,
    get_performance_stats,
    record_performance,
)
from fast_litellm_shm._shared import performance as monitoring

FIELDS = {
    "total_calls",
    "average_duration_ms",
    "success_rate",
    "error_count",
    "min_duration_ms",
    "max_duration_ms",
    "total_duration_ms",
    "p50_duration_ms",
    "p95_duration_ms",
    "p99_duration_ms",
    "total_input_size",
    "total_output_size",
}


def test_nothing_recorded() -> None:
    assert get_performance_stats() == {}
    assert get_performance_stats("nobody") == {}
    assert compare_implementations("a", "b") == {}
    assert export_performance_data() == "{}"


def test_sums_by_component_and_operation() -> None:
    record_performance("tokens", "count", 2.0)
    record_performance("tokens", "count", 4.0, False)
    record_performance("tokens", operation="batch", duration_ms=6, success=True, input_size=10,
                       output_size=3, metadata={"model": "x"})  # fmt: skip
    record_performance(component="other", operation="", duration_ms=0)
    stats = get_performance_stats()
    assert set(stats) == {"tokens", "other"}
    found = stats["tokens"]
    assert set(found) == {*FIELDS, "operations"}
    assert found["total_calls"] == 3
    assert found["average_duration_ms"] == pytest.approx(4.0)
    assert found["success_rate"] == pytest.approx(2 / 3)
    assert found["error_count"] == 1
    assert found["min_duration_ms"] == 2.0
    assert found["max_duration_ms"] == 6.0
    assert found["total_duration_ms"] == pytest.approx(12.0)
    assert (found["total_input_size"], found["total_output_size"]) == (10, 3)
    assert found["p50_duration_ms"] == pytest.approx(4.0, rel=0.05)
    assert found["p99_duration_ms"] == pytest.approx(6.0, rel=0.05)
    assert set(found["operations"]) == {"count", "batch"}
    assert set(found["operations"]["count"]) == FIELDS
    assert found["operations"]["count"]["total_calls"] == 2
    assert stats["other"]["total_duration_ms"] == 0
    assert get_performance_stats("tokens") == {"tokens": found}


def test_four_processes_add_up_exactly_and_quantiles_are_near() -> None:
    name, parties, count = os.environ["FAST_LITELLM_SHM_NAME"], 4, 5000
    Segment.default()
    given = [(name, count, parties, seed) for seed in range(parties)]
    durations = numpy.concatenate(run(record_durations, given, "spawn"))
    found = get_performance_stats("shared")["shared"]
    assert found["total_calls"] == parties * count
    assert found["error_count"] == parties * count // 10
    assert found["total_input_size"] == 3 * parties * count
    assert found["total_output_size"] == parties * count
    ns = (durations * 1e6).astype(numpy.uint64)
    assert found["total_duration_ms"] == int(ns.sum()) / 1e6
    assert found["min_duration_ms"] == int(ns.min()) / 1e6
    assert found["max_duration_ms"] == int(ns.max()) / 1e6
    for quantile in (50, 95, 99):
        truth = numpy.percentile(durations, quantile)
        assert found[f"p{quantile}_duration_ms"] == pytest.approx(truth, rel=0.05)
    halves = found["operations"]
    assert {half["total_calls"] for half in halves.values()} == {parties * count // 2}
    assert halves["even"]["error_count"] == parties * count // 10
    assert halves["odd"]["error_count"] == 0


BAD: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    (("c", "o", -1), {}, ValueError, "duration_ms must be a number of 0 or more, not -1"),
    (("c", "o", math.nan), {}, ValueError, "duration_ms .* not nan"),
    (("c", "o", math.inf), {}, ValueError, "duration_ms .* not inf"),
    (("c", "o", 1e9), {}, ValueError, "duration_ms must .* below 1000000000, not 1000000000.0"),
    (("c", "o", 1), {"input_size": 2**53}, ValueError, "input_size must .* and below"),
    (("c", "o", 10**400), {}, ValueError, "duration_ms must be"),
    (("c", "o", "5"), {}, TypeError, "duration_ms .* not '5'"),
    (("c", "o", None), {}, TypeError, "duration_ms .* not None"),
    ((b"c", "o", 1), {}, TypeError, "component must be a str, not b'c'"),
    (("c", 5, 1), {}, TypeError, "operation must be a str, not 5"),
    (("c", "o", 1), {"input_size": -5}, ValueError, "input_size .* not -5"),
    (("c", "o", 1), {"output_size": "x"}, TypeError, "output_size .* not 'x'"),
    (("c", "o", 1), {"size": 5}, TypeError, "unexpected or repeated argument 'size'"),
    (("c", "o"), {}, TypeError, "missing the argument 'duration_ms'"),
]


@pytest.mark.parametrize(("args", "kwargs", "kind", "message"), BAD)
def test_bad_arguments_are_named(
    args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        record_performance(*args, **kwargs)
    assert get_performance_stats() == {}


@pytest.mark.parametrize("bad", [5, ["x"], b"x"])
def test_a_component_is_a_str(bad: Any) -> None:
    for call in (get_performance_stats, export_performance_data):
        with pytest.raises(TypeError) as caught:
            call(bad)
        assert str(caught.value) == f"component must be a str or None, not {bad!r}"
    for arguments, name in (((bad, "x"), "rust_component"), (("x", bad), "python_component")):
        with pytest.raises(TypeError) as caught:
            compare_implementations(*arguments)
        assert str(caught.value) == f"{name} must be a str, not {bad!r}"
    with pytest.raises(TypeError, match="rust_component must be a str, not None"):
        compare_implementations(None, "x")  # type: ignore[arg-type]


def test_names_of_any_kind() -> None:
    class Name(str):
        __slots__ = ()

        def __hash__(self) -> int:
            raise RuntimeError("must not be asked")

    record_performance("über/größe", "\ud800", 1.0)
    record_performance(Name("über/größe"), Name("\ud800"), 1.0)
    record_performance("x" * 500, "y" * 500, 1.0)
    assert sorted(found["total_calls"] for found in get_performance_stats().values()) == [1, 2]


def test_names_that_are_cut_are_found_and_summed() -> None:
    long, wide = "c" * 80, "\u4e2d" * 40
    for i in range(3):
        record_performance(long, "o" * 60 + str(i), 1.0)
    record_performance(wide, "o", 2.0)
    record_performance("\ud800", "o", 2.0)
    found = get_performance_stats(long)
    assert list(found) == ["c" * 51]
    assert found["c" * 51]["total_calls"] == 3
    assert [each["total_calls"] for each in found["c" * 51]["operations"].values()] == [3]
    assert len(get_performance_stats(wide)) == len(get_performance_stats("\ud800")) == 1
    assert compare_implementations(long, wide)["speedup"] == pytest.approx(2)


def test_names_without_end_are_summed_as_other() -> None:
    for i in range(1000):
        record_performance("requests", f"request-{i}", 1.0)
    stats = get_performance_stats()
    assert stats["requests"]["total_calls"] + stats["(other)"]["total_calls"] == 1000
    assert set(stats["(other)"]["operations"]) == {"(other)"}


def test_compare() -> None:
    for _ in range(40):
        record_performance("quick", "o", 1.0)
        record_performance("slow", "o", 2.5)
        record_performance("nothing", "o", 0)
    found = compare_implementations("quick", "slow")
    assert set(found) == {
        "rust",
        "python",
        "rust_avg_ms",
        "python_avg_ms",
        "speedup",
        "improvement_percentage",
        "recommendation",
    }
    assert found["rust"] == get_performance_stats()["quick"]
    assert found["python"] == get_performance_stats()["slow"]
    assert (found["rust_avg_ms"], found["python_avg_ms"]) == (1.0, 2.5)
    assert found["speedup"] == pytest.approx(2.5)
    assert found["improvement_percentage"] == pytest.approx(150)
    assert found["recommendation"] == "Use quick: it is 2.50 times as fast."
    assert "Use quick" in compare_implementations("slow", "quick")["recommendation"]
    assert "equally fast" in compare_implementations("slow", "slow")["recommendation"]
    assert compare_implementations("nothing", "slow")["speedup"] is None
    record_performance("once", "o", 1.0)
    assert "Only 1 calls" in compare_implementations("once", "slow")["recommendation"]
    assert compare_implementations("quick", "unknown") == {}
    assert compare_implementations("unknown", "quick") == {}


def test_export() -> None:
    record_performance("a", "x,1", 2.0)
    record_performance("a", 'y"2', 3.0, success=False)
    record_performance("b", "z", 4.0)
    assert json.loads(export_performance_data()) == get_performance_stats()
    assert json.loads(export_performance_data(None, None)) == get_performance_stats()
    assert json.loads(export_performance_data("b", "json")) == get_performance_stats("b")
    rows = list(csv.DictReader(io.StringIO(export_performance_data(format="csv"))))
    assert [(row["component"], row["operation"]) for row in rows] == [
        ("a", ""),
        ("a", "x,1"),
        ("a", 'y"2'),
        ("b", ""),
        ("b", "z"),
    ]
    assert set(rows[0]) == {"component", "operation", *FIELDS}
    assert float(rows[0]["total_duration_ms"]) == pytest.approx(5.0)
    assert rows[2]["error_count"] == "1"
    assert export_performance_data("nobody", format="csv").count("\n") == 1
    with pytest.raises(ValueError, match="format must be 'json' or 'csv', not 'xml'"):
        export_performance_data(format="xml")


def _config(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, found: object) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"monitoring": found}))
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(tmp_path / "c.json"))


@pytest.mark.parametrize(
    ("found", "every"),
    [
        ({}, 100),
        ({"sample_rate": 1}, 1),
        ({"sample_rate": 0.1}, 10),
        ({"sample_rate": 0}, 0),
        ({"sample_rate": 1e-320}, 2**32 - 1),
        ({"enabled": False, "sample_rate": 1}, 0),
    ],
)
def test_the_sample_rate(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, found: object, every: int
) -> None:
    _config(tmp_path, monkeypatch, found)
    metric, got = monitoring.measured("own", "call")
    assert got == every
    assert (metric >= 0) is (every > 0)


def test_the_library_records_its_own_calls(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _config(tmp_path, monkeypatch, {"sample_rate": 0.1})
    router = AdvancedRouter()
    for _ in range(1000):
        assert router.get_available_deployment([], "m") is None
    found = get_performance_stats("routing")["routing"]
    assert found["total_calls"] == 1000  # a hundred were measured, and count for ten each
    assert found["operations"]["simple_shuffle"]["total_duration_ms"] > 0


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (5, "monitoring must be a JSON object, not 5"),
        ({"sample_rate": 2}, "sample_rate must be a number from 0 to 1, not 2; 0.01 is used"),
        ({"sample_rate": "x"}, "sample_rate must be a number from 0 to 1, not 'x'"),
        ({"enabled": 1}, "monitoring.enabled must be true or false, not 1"),
        ({"rate": 1}, "there is no 'rate', it is ignored; known are enabled, sample_rate"),
    ],
)
def test_a_wrong_setting_is_told(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, found: object, message: str
) -> None:
    _config(tmp_path, monkeypatch, found)
    with pytest.warns(RuntimeWarning, match=message):
        assert monitoring.measured("own", "call")[1] == 100


def test_without_a_segment_nothing_is_recorded_and_nobody_dies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = os.environ["FAST_LITELLM_SHM_NAME"]
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", "not/a/name")
    with pytest.warns(RuntimeWarning, match="nothing is recorded"):
        record_performance("c", "o", 1.0)
    record_performance("c", "o", 1.0)
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", good)
    monitoring._recorder.bind(None)  # not only in a second
    record_performance("c", "o", 1.0)
    assert get_performance_stats()["c"]["total_calls"] == 1


def test_a_removed_segment_is_left_when_stats_are_read() -> None:
    record_performance("c", "o", 1.0)
    Segment.default().remove()
    assert get_performance_stats() == {}
    record_performance("c", "o", 1.0)
    assert get_performance_stats()["c"]["total_calls"] == 1


def test_an_unbound_recorder_says_nothing_wrong() -> None:
    from fast_litellm_shm._shared.native import Recorder

    with pytest.raises(AttributeError):
        Recorder().record("c", "o", 1.0)  # it has no _bind()


def test_limiters_and_pools_record_their_own_calls(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _config(tmp_path, monkeypatch, {"sample_rate": 0.5})
    limiter = RateLimiter(Limit(1, per=3600), name="own")
    for _ in range(10):
        limiter.is_allowed("k")
        limiter.check("k")
        limiter.acquire("k")
    with pytest.raises(TypeError):
        limiter.acquire(5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        limiter.is_allowed(5)  # type: ignore[arg-type]
    pool = SimpleConnectionPool()
    for _ in range(4):
        pool.return_connection(pool.get_connection("https://a") or "")
    pool.close()
    stats = get_performance_stats()
    own = stats["rate_limiter"]["operations"]["acquire"]
    assert own["total_calls"] == 32
    assert own["error_count"] == 2  # one of the two bad calls; denials are none
    assert stats["connection_pool"]["operations"]["get_connection"]["total_calls"] == 4
    _config(tmp_path, monkeypatch, {"enabled": False})
    before = stats["rate_limiter"]
    other = RateLimiter(Limit(1, per=3600), name="silent")
    for _ in range(10):
        other.is_allowed("k")
    assert get_performance_stats()["rate_limiter"] == before
