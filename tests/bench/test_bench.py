"""`python -m bench`, as `make bench` runs it: it runs where no peer is installed, and says so. Of
the figures themselves nothing is asked: machines are noisy."""

from __future__ import annotations

import datetime
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from bench import report
from bench.peers import Place
from bench.questions import QUESTIONS
from bench.result import Plot, Ratio, Result, Row, Settings, Values, asked, ratio

ROOT = pathlib.Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def found() -> Any:
    done = bench("--quick", "--iterations", "5", "--only", "check_cost", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_its_json_says_where_and_how(found: Any) -> None:
    assert found["schema"] == 1
    assert found["quick"] is True
    assert found["rounds"] == 5
    assert {"processor", "cores", "python", "system"} <= set(found["where"])
    assert "fast-litellm-shm" in found["packages"]


def test_rows_have_a_unit_a_median_and_a_spread(found: Any) -> None:
    (question,) = found["questions"].values()
    assert question["failed"] is None
    rows = {row["name"]: row for row in question["rows"]}
    assert {"ours is_allowed", "ours check", "plain Python, token bucket"} <= set(rows)
    for row in rows.values():
        assert row["unit"] == "ns"
        assert row["low"] <= row["median"] <= row["high"]
        assert row["rounds"] == 5


def test_a_peer_is_measured_or_named_as_missing(found: Any) -> None:
    question = found["questions"]["check_cost"]
    measured = {row["who"] for row in question["rows"]}
    for peer in ("fast-litellm", "rust-py-rate-limit", "token_bucket"):
        assert peer in measured or "not installed" in question["missing"][peer]


def test_a_ratio_without_its_peer_is_not_measured_and_not_reached(found: Any) -> None:
    for each in found["questions"]["check_cost"]["ratios"]:
        if each["found"] is None:
            assert each["reached"] is None
            assert each["verdict"].startswith("not measured: ")
        else:
            assert each["reached"] is not None


def test_an_unknown_question_is_refused_with_those_that_are() -> None:
    done = bench("--only", "speed")
    assert done.returncode == 2
    assert "'speed' is none of check_cost, " in done.stderr


def made(measured: float, target: float, at_least: bool = True) -> Ratio:
    return Ratio("a / b", Values([measured]), target, at_least, promise="pool get + return")


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        (made(8.0, 8), "reached"),
        (made(6.0, 8), "NOT REACHED, by 25.0%"),
        (made(3.3, 3, at_least=False), "NOT REACHED, by 10.0%"),
        (made(1, 0, at_least=False), "NOT REACHED"),
        (made(7.9999, 8), "NOT REACHED, by 0.0%"),
        (Ratio("a / b", Values([2]), None), "no target"),
    ],
)
def test_a_verdict_is_by_the_median_and_says_by_how_much_not(given: Ratio, verdict: str) -> None:
    assert given.verdict == verdict


def test_the_spread_of_equal_values_has_the_median_in_it() -> None:
    found = Values([46.969] * 5)  # whose interpolated tenths are beside it by a rounding
    assert found.low <= found.median <= found.high


def test_a_ratio_is_taken_round_by_round() -> None:
    rows = [Row("a", "ns", Values([10, 40, 90])), Row("b", "ns", Values([10, 20, 30]))]
    assert ratio(rows, "a", "b", 2.0).found == Values([1, 2, 3])


def test_the_report_begins_with_the_targets_and_names_what_was_not_measured() -> None:
    result = asked("A question?\n\nHow it is asked.")
    result.rows = [Row("ours", "ns", Values([1, 2, 3]), group="g")]
    result.ratios = [made(6.5, 8)]
    result.missing = {"a peer": "not installed"}
    result.plots = [Plot("p", "bars", "t", ("g",), "ns")]
    found = report.as_json(
        {"q": result}, Settings(5), datetime.datetime.now().astimezone(), report.where(True)
    )
    text = report.markdown({"q": result}, found, {"q": ["p"]}, "folder")
    assert text.index("## Targets") < text.index("## A question?")
    assert "| pool get + return | a / b | ≥ 8 × | 6.50 × | 6.50 – 6.50 | **NOT REACHED" in text
    assert text.count("**not measured in this run**") == len(report.PROMISES) - 1
    assert "missing: **a peer**: not installed" in text
    assert "(folder/p.svg)" in text


def test_what_fails_is_told_and_stops_nothing() -> None:
    result = Result("A question?", failed="RuntimeError: no")
    assert "**FAILED: RuntimeError: no**" in "\n".join(report._question("q", result, [], "f"))


def test_every_file_of_a_question_is_asked() -> None:
    files = (ROOT / "bench").glob("*.py")
    with_run = {f.stem for f in files if "\ndef run(settings: Settings)" in f.read_text("utf-8")}
    assert with_run == set(QUESTIONS)


def test_a_place_leaves_nothing_behind() -> None:
    with Place(capacity=1000) as place:
        path = pathlib.Path(place.segment().path)
        assert path.exists()
    assert not path.exists()
    assert not pathlib.Path(place.folder).exists()
