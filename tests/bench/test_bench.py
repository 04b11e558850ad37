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
from support.built_once import built_once

from bench import questions, report, seed, tokens_worker
from bench.passes import merged
from bench.peers import Place
from bench.questions import QUESTIONS
from bench.result import EMPTY_CALL, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from bench.token_counters import MODELS, Counting, WrongCountError
from bench.token_texts import KINDS, Texts, corpus, fresh
from bench.tokens_cost import _Rounds, group_of, ratios

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


def report_of(factory: pytest.TempPathFactory, name: str) -> Any:
    """Of one question; asked once for all processes that run the tests."""

    def ask(folder: pathlib.Path) -> None:
        done = bench("--quick", "--iterations", "5", "--only", name, "--json")
        assert done.returncode == 0, done.stderr
        (folder / "report.json").write_text(done.stdout)

    return json.loads((built_once(factory, name, ask) / "report.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return report_of(tmp_path_factory, "check_cost")


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


def test_what_takes_long_is_asked_by_name_alone() -> None:
    assert not set(questions.APART) & set(QUESTIONS)
    for name in questions.APART:
        assert (ROOT / "bench" / f"{name}.py").exists()
        assert f"--only {name}" in (ROOT / "Makefile").read_text()


def test_an_unknown_question_is_refused_with_those_that_are() -> None:
    done = bench("--only", "speed")
    assert done.returncode == 2
    assert "'speed' is none of check_cost, " in done.stderr


@pytest.mark.parametrize("rounds", ["0", "-3", "4", "x"])
def test_too_few_rounds_are_refused_with_the_range(rounds: str) -> None:
    done = bench("--iterations", rounds)
    assert done.returncode == 2
    assert f"--iterations: must be an int of 5 or more, not {rounds!r}" in done.stderr


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


def test_a_target_within_the_spread_is_not_reached_and_said_to_be() -> None:
    found = Ratio("a / b", Values([7.0, 7.5, 9.0]), 8)
    assert found.reached is False
    assert found.verdict == "NOT REACHED, by 6.2%, which is within the spread"


def one_pass(values: list[float], worst: float, **given: Any) -> Result:
    rows = [Row("ours", "ns", Values(values), group="g", notes={"kept": "yes", "denied": worst})]
    return Result(
        "A question?",
        rows=rows,
        ratios=[
            Ratio("a / b", Values(values), 2.0),
            Ratio("off", Values([worst]), 0, False, worst=True),
        ],
        seconds=1.0,
        **given,
    )


def test_passes_are_one_result_with_the_spread_of_all() -> None:
    passes = [one_pass([1, 1, 1], 0), one_pass([9, 9, 9], 7), one_pass([5, 5, 5], 0)]
    found = merged(passes)
    assert found.rows[0].found == Values([1, 1, 1, 9, 9, 9, 5, 5, 5])
    assert (found.rows[0].found.low, found.rows[0].found.high) == (1, 9)
    assert found.ratios[0].found == found.rows[0].found
    assert found.seconds == 3.0


def test_a_breach_in_one_pass_of_many_is_no_median() -> None:
    found = merged([one_pass([1], 0), one_pass([1], 3), one_pass([1], 0)])
    assert found.ratios[1].reached is False
    assert found.rows[0].notes["denied"] == 3


def test_who_was_missing_in_some_passes_is_told_and_keeps_the_values_of_the_others() -> None:
    lacking = Result("A question?", ratios=[Ratio("a / b", None, 2.0, missing="gone")])
    lacking.missing = {"a peer": "timed out"}
    lacking.failed = "RuntimeError: no"
    found = merged([lacking, one_pass([4], 0)])
    assert found.missing == {"a peer": "timed out (in 1 of 2 passes)"}
    assert found.ratios[0].verdict == "reached"
    assert found.failed == "RuntimeError: no"
    assert merged([lacking, lacking]).missing == {"a peer": "timed out"}


def test_questions_are_asked_in_turn_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    names, order = ("check_cost", "bytes_per_key", "key_count"), []

    def answer(name: str, settings: Settings) -> Result:
        order.append((name, settings.passes))
        return one_pass([len(order)], 0)

    monkeypatch.setattr(questions, "ask", answer)
    found = questions.ask_all(names, Settings(3, passes=5), lambda line: None)
    once, thrice, always = ("bytes_per_key", 1), ("key_count", 3), ("check_cost", 5)
    assert order == [always, once, thrice, always, always, thrice, always, always, thrice]
    assert found["check_cost"].rows[0].found == Values([1, 4, 5, 7, 8])


def compared(tmp_path: pathlib.Path, *runs: list[float]) -> subprocess.CompletedProcess[str]:
    paths = []
    for i, values in enumerate(runs):
        result = {"q": one_pass(values, 0)}
        now, where = datetime.datetime.now().astimezone(), report.where(True)
        paths.append(tmp_path / f"{i}.json")
        paths[-1].write_text(json.dumps(report.as_json(result, Settings(3), now, where)))
    return subprocess.run(
        [sys.executable, "-m", "bench.compare", *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_two_runs_agree_where_their_spreads_overlap(tmp_path: pathlib.Path) -> None:
    done = compared(tmp_path, [1.0, 2.0, 3.0], [2.9, 4.0, 5.0])
    assert done.returncode == 1  # 2.8 and 3.1, the tenths, are apart
    assert "a / b" in done.stdout and "1 of 2 ratios agree" in done.stdout
    done = compared(tmp_path, [1.0, 2.0, 3.0], [2.0, 4.0, 5.0])
    assert done.returncode == 0
    assert "2 of 2 ratios agree" in done.stdout


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


def test_a_target_in_ns_that_is_missed_says_how_fast_the_machine_is() -> None:
    result = asked("A question?\n\nHow it is asked.")
    result.rows = [Row(EMPTY_CALL, "ns", Values([40, 41, 42]), group="g")]
    result.ratios = [
        Ratio("a", Values([5]), 4, at_least=False, unit="µs"),
        Ratio("b", Values([3]), 4, at_least=False, unit="µs"),
        Ratio("c", Values([3]), 4),
    ]
    found = report.as_json(
        {"q": result}, Settings(5), datetime.datetime.now().astimezone(), report.where(True)
    )
    lines = report.markdown({"q": result}, found, {}, "folder").splitlines()
    rows = {line[2]: line for line in lines if line[:4] in ("| a ", "| b ", "| c ")}
    assert "by 25.0% (an empty Python call: 41 ns here, 17.5 where the target was set)" in rows["a"]
    assert "reached" in rows["b"]
    assert "NOT REACHED, by 25.0%**" in rows["c"]
    result.rows = []
    assert "an empty" not in report.markdown({"q": result}, found, {}, "folder")


def test_a_second_run_of_a_day_leaves_the_first_as_it_is(tmp_path: pathlib.Path) -> None:
    begun = datetime.datetime(2030, 1, 2, 3, 4)
    runs = [begun + datetime.timedelta(seconds=seconds) for seconds in (0, 1, 2, 62)]
    for now in runs:
        found = report.as_json({}, Settings(5), now, report.where(True))
        report.write({}, found, tmp_path, report.free_stem(tmp_path, now))
    names = ["2030-01-02", "2030-01-02-0304", "2030-01-02-030402", "2030-01-02-0305"]
    for name, now in zip(names, runs, strict=True):
        assert json.loads((tmp_path / f"{name}.json").read_text())["when"] == now.isoformat()
        assert (tmp_path / f"{name}.md").exists()


def test_what_fails_is_told_and_stops_nothing() -> None:
    result = Result("A question?", failed="RuntimeError: no")
    assert "**FAILED: RuntimeError: no**" in "\n".join(report._question("q", result, [], "f"))


def test_every_file_of_a_question_is_asked() -> None:
    files = (ROOT / "bench").glob("*.py")
    with_run = {f.stem for f in files if "\ndef run(settings: Settings)" in f.read_text("utf-8")}
    assert with_run == {*QUESTIONS, *questions.APART}


def test_a_place_leaves_nothing_behind() -> None:
    with Place(capacity=1000) as place:
        path = pathlib.Path(place.segment().path)
        assert path.exists()
    assert not path.exists()
    assert not pathlib.Path(place.folder).exists()


# texts, and who counts them --------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_text_is_given_twice(kind: str) -> None:
    texts = Texts(kind, 1)
    for size in (10, 100, 1_000, 20_000):
        given = [texts.new(size) for _ in range(20)]
        assert {len(text) for text in given} == {size}
        assert len(set(given)) == len(given)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_corpus_is_used_up_as_it_is_and_then_changed(kind: str) -> None:
    whole, texts, parts = corpus(kind), Texts(kind, 2), 40
    used = [texts.new(parts * 250) for _ in range(len(whole) // (parts * 250))]
    assert "".join(used) in whole + whole
    text = texts.new(parts * 250)
    as_it_was = sum(text[i : i + 250] in whole for i in range(0, len(text), 250))
    assert as_it_was <= parts // 2  # two equal letters that change places change nothing


def test_the_same_seed_gives_the_same_texts() -> None:
    one, two = (Texts("many scripts", 3) for _ in range(2))
    assert [one.new(500) for _ in range(5)] == [two.new(500) for _ in range(5)]
    assert Texts("many scripts", 4).new(500) != Texts("many scripts", 3).new(500)


def test_each_contender_gets_an_object_of_its_own() -> None:
    text = "größer als 1"
    assert fresh(text) == text and fresh(text) is not text


def rounds_of(peer: Counting, missing: dict[str, str]) -> _Rounds:
    right: Counting = lambda texts: list(map(len, texts))  # noqa: E731
    return _Rounds({"ours": right, "tiktoken": right, "a peer": peer}, missing)


def test_a_peer_that_counts_otherwise_is_named_and_not_measured() -> None:
    missing: dict[str, str] = {}
    found = rounds_of(lambda texts: [len(text) + (text == "abc") for text in texts], missing)
    found.add(["warm"], {2: ["ab", "ba"]})
    assert list(found.found(2)) == ["ours", "tiktoken", "a peer"]
    found.add(["warm"], {2: ["ab", "abc"]})
    assert list(found.found(2)) == ["ours", "tiktoken"]
    assert missing["a peer"] == "counts otherwise than tiktoken in one of ['ab', 'abc']"


def test_a_wrong_count_of_ours_is_an_error() -> None:
    found = _Rounds({"ours": lambda texts: [7], "tiktoken": lambda texts: [1]}, {})
    with pytest.raises(WrongCountError, match="ours and tiktoken differ in one of \\['a'\\]"):
        found.add([], {1: ["a"]})


def test_the_best_peer_is_the_quicker_one_of_each_round() -> None:
    rows = [
        Row(name, "µs", Values(values), x=10)
        for name, values in {
            "ours": [1, 1, 1],
            "tiktoken": [9, 9, 9],
            "quicktok-v1": [2, 4, 6],
            "toktok-rs": [3, 3, 3],
        }.items()
    ]
    ours, best = ratios(rows, "cl100k_base", "English", 10)
    assert (ours.found, ours.target) == (Values([9, 9, 9]), 3.0)
    assert (best.found, best.target) == (Values([2, 3, 3]), 1.0)
    ours, best = ratios(rows[:2], "cl100k_base", "English", 10)
    assert best.verdict == "not measured: neither quicktok-v1 nor toktok-rs is there"


def test_each_promise_of_tokens_is_in_the_table_of_targets() -> None:
    rows = [Row("ours", "µs", Values([1]), x=10), Row("tiktoken", "µs", Values([1]), x=10)]
    named = {each.promise for name in MODELS for each in ratios(rows, name, "English", 10)}
    found = tokens_worker.Found(1.0, [1.0], 1.0, 1.0, None)
    named |= {each.promise for each in tokens_worker._ratios(found, 8)}
    assert named <= set(report.PROMISES)


def test_the_rows_of_the_guides_claims_are_those_that_are_measured() -> None:
    assert group_of("o200k_base", "English") == seed.NEW
    assert {claim.question for claim in seed.CLAIMS} <= set(QUESTIONS)


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    (question,) = report_of(tmp_path_factory, "tokens_worker")["questions"].values()
    if "tiktoken" in question["missing"]:
        pytest.skip(question["missing"]["tiktoken"])
    return question


def test_later_workers_have_the_tables_of_the_first(workers: Any) -> None:
    rows = {(row["group"], row["who"]): row for row in workers["rows"]}
    assert {tokens_worker.READY, seed.SECOND} < {group for group, _ in rows}
    ours, tiktoken = (rows[seed.SECOND, who]["median"] for who in ("ours", "reference"))
    assert ours < tiktoken / 4  # megabytes
    assert {each["name"].split(", ")[1] for each in workers["ratios"]} == {
        "first use",
        "private memory of the second worker",
        "private memory of 8 workers together",
    }
