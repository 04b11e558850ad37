"""Budgets, as an operator sees them: inspect, export, reset, dashboard."""

from __future__ import annotations

import csv
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from fast_litellm_shm import Budget, RateLimiter, Segment, Window
from fast_litellm_shm.cli import render
from fast_litellm_shm.durable import StateFile

from .conftest import Command, environment

DAY = 86_400


@pytest.fixture
def team(segment: Segment) -> Budget:
    """$50 a month: "a" has spent 41.000000001 of 50, was warned, and has $2 in flight; "b" has
    spent all of 30 + 20; "c" was given $5. "keys" is for ever: "a" has spent $0.0134."""
    made = Budget(50, name="team", segment=segment, warn_at=0.8, on_warn=lambda key, usage: None)
    made.charge("a", "41.000000001")
    made.charge("b", 50)
    made.add("c", 5)
    Budget(1, None, name="keys", segment=segment).charge("a", "0.0134")
    RateLimiter(Window(5, 3600), name="other", segment=segment).acquire("a")
    return made


def _table(output: str, title: str) -> dict[str, list[str]]:
    rows = output.split(title, 1)[1].split("\n\n", 1)[0].splitlines()[3:]
    return {" ".join(row.split()[:2]): row.split()[2:] for row in rows}


def test_inspect(fast_shm: Command, segment_name: str, team: Budget) -> None:
    with team.reserve("a", usd=2):
        done = fast_shm("inspect", "--name", segment_name)
    assert (done.returncode, done.stderr) == (0, "")
    found = _table(done.stdout, "Budgets (4 keys, 2 warned, 1 with nothing left)")
    assert list(found) == ["b team", "a team", "a keys", "c team"]  # the largest part first
    assert found["a team"][:4] == ["$41.000000001", "$2", "$50", "86.0%"]
    assert found["b team"][:4] == ["$50", "-", "$50", "100.0%"]
    assert (found["a team"][-1], found["b team"][-2:]) == ("warned", ["used", "up"])
    assert found["c team"][:4] == ["$0", "-", "$55", "0.0%"]
    assert found["a keys"] == ["$0.0134", "-", "$1", "1.3%", "never"]
    limits = [line.split() for line in done.stdout.splitlines() if "USD" in line]
    assert sorted(map(" ".join, limits)) == ["keys 1 USD 1", "team 50 USD/month UTC 3"]
    keys = _table(done.stdout, "Keys (5;")
    assert keys["a team"][2] == "$6.999999999" and keys["b team"][2] == "$0"
    only = fast_shm("inspect", "--name", segment_name, "--limiter", "team", "--top", "1").stdout
    assert list(_table(only, "Budgets (3 keys")) == ["b team"]
    assert "Budgets" not in fast_shm("inspect", "--name", segment_name, "--match", "x*").stdout


def test_json(fast_shm: Command, segment_name: str, team: Budget) -> None:
    with team.reserve("a", usd=2):
        found = json.loads(fast_shm("inspect", "--name", segment_name, "--json").stdout)
    keys, budget = found["budgets"]
    left = budget.pop("reset_after")
    assert 0 < left <= 31 * DAY
    assert budget == {
        "name": "team", "limit": 50, "per": "month", "timezone": "UTC", "keys": 3,
        "spent": 91.000000001, "reserved": 2, "warned": 2, "used_up": 1,
    }  # fmt: skip
    assert (keys["name"], keys["per"], keys["reset_after"], keys["spent"]) == (
        *("keys", None, None, 0.0134),
    )
    rows = {(row["budget"], row["key"]): row for row in found["spending"]}
    assert [row["key"] for row in found["spending"]] == ["b", "a", "a", "c"]
    a = rows["team", "a"]
    assert (a["limit"], a["spent"], a["reserved"], a["remaining"], a["warned"]) == (
        *(50, 41.000000001, 2, 6.999999999, True),
    )
    assert abs(a["reset_after"] - left) < 60 and rows["keys", "a"]["reset_after"] is None
    (key,) = (row for row in found["keys"] if (row["limiter"], row["key"]) == ("team", "b"))
    assert (key["remaining"], key["limit"], key["unit"]) == (0, 50, "USD")
    assert 0 < key["retry_after"] <= left
    (plain,) = (row for row in found["keys"] if row["limiter"] == "other")
    assert "unit" not in plain
    one = json.loads(fast_shm("inspect", "--name", segment_name, "--json", "--top", "1").stdout)
    assert [row["key"] for row in one["spending"]] == ["b"] and len(one["budgets"]) == 2


def test_without_names(segment_name: str, fast_shm: Command) -> None:
    budget = Budget(5, name="b", segment=Segment(segment_name, names="hashed", capacity=1000))
    budget.charge("secret", 1)
    budget.add("secret", 2)
    with budget.reserve("secret", usd=3):
        found = json.loads(fast_shm("inspect", "--name", segment_name, "--json").stdout)
    (row,) = found["spending"]
    assert row["key"].startswith("#") and len(found["keys"]) == 1
    assert (row["limit"], row["spent"], row["reserved"], row["remaining"]) == (7, 1, 3, 3)


def test_export(fast_shm: Command, segment_name: str, team: Budget) -> None:
    with team.reserve("a", usd=2):
        texts = {
            kind: fast_shm("export", "--name", segment_name, "--keys", "9", "--format", kind).stdout
            for kind in ("prometheus", "json", "csv")
        }
    samples = {
        (sample.name, *(v for k, v in sorted(sample.labels.items()) if k != "segment")): (
            sample.value
        )
        for family in parse(texts["prometheus"])
        for sample in family.samples
    }
    expected = {
        ("fast_shm_budget_limit_usd", "team"): 50,
        ("fast_shm_budget_spent_usd", "team"): 91.000000001,
        ("fast_shm_budget_reserved_usd", "team"): 2,
        ("fast_shm_budget_keys", "team"): 3,
        ("fast_shm_budget_keys_warned", "team"): 2,
        ("fast_shm_budget_keys_used_up", "team"): 1,
        ("fast_shm_budget_spent_usd", "keys"): 0.0134,
        ("fast_shm_budget_key_spent_usd", "a", "team"): 41.000000001,
        ("fast_shm_budget_key_reserved_usd", "a", "team"): 2,
        ("fast_shm_budget_key_limit_usd", "c", "team"): 55,
        ("fast_shm_limiter_keys", "team"): 3,
    }
    assert {name: samples[name] for name in expected} == expected
    resets = samples["fast_shm_budget_reset_timestamp_seconds", "team"]
    assert resets % 60 == 0
    assert ("fast_shm_budget_reset_timestamp_seconds", "keys") not in samples
    assert "41.000000001\n" in texts["prometheus"]
    found = json.loads(texts["json"])
    assert [row["limiter"] for row in found["budgets"]] == ["keys", "team"]
    assert found["spending"][0] | {"key": "b"} == found["spending"][0]
    rows = list(csv.DictReader(io.StringIO(texts["csv"])))
    assert {"41.000000001", "0.0134"} <= {row["value"] for row in rows}


def test_reset(fast_shm: Command, segment_name: str, team: Budget) -> None:
    def said(*arguments: str) -> str:
        done = fast_shm("reset", "--name", segment_name, *arguments)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    assert said("--limiter", "team", "b") == "Reset key 'b' of limiter 'team'.\n"
    assert team.spent("b") == 0 and team.remaining("b") == 50
    assert said("--limiter", "team", "c") == "Reset key 'c' of limiter 'team'.\n"  # what was added
    assert team.remaining("c") == 50
    assert said("--limiter", "team", "b").startswith("Nothing to reset")
    assert said("--limiter", "team") == "Reset limiter 'team': all keys (1 known).\n"
    assert team.spent("a") == 0


def test_reset_of_a_durable_budget(
    segment: Segment, segment_name: str, fast_shm: Command, tmp_path: Path
) -> None:
    """The file forgets it too: a new segment would else take what was granted for spent."""
    state = {"FAST_LITELLM_SHM_STATE": str(tmp_path)}
    budget = Budget(1, name="kept", segment=segment, durable=StateFile(folder=str(tmp_path)))
    budget.charge("k", "0.9")
    done = fast_shm("reset", "--name", segment_name, "k", env=environment(**state))
    assert (done.returncode, done.stderr) == (0, "")
    assert budget.spent("k") == 0 and budget.reserve("k", "0.5")
    shown = fast_shm("state", "show", "--name", segment_name, "--json", env=environment(**state))
    assert shown.returncode == 0
    (kept,) = json.loads(shown.stdout)["budgets"]
    assert Decimal(kept["granted_usd"]) < Decimal("0.9")  # of the lease for the 0.5


def test_amounts() -> None:
    for amount, text in (
        ("0", "$0"), ("0.000000001", "$0.000000001"), ("1234.5", "$1,234.5"),
        ("1000000000", "$1,000,000,000"), ("999999999.999999999", "$999,999,999.999999999"),
    ):  # fmt: skip
        assert render.usd(Decimal(amount)) == text
    for amount, text in (
        ("0", "$0"), ("0.00009", "<$.0001"), ("0.0134", "$0.0134"), ("0.99999", "$0.9999"),
        ("49.989", "$49.98"), ("50", "$50"), ("999.999", "$999.99"), ("1234", "$1,234"),
        ("12300", "$12.3k"), ("1000000000", "$1.0G"),
    ):  # fmt: skip
        assert render.brief_usd(Decimal(amount)) == text


def test_dashboard(segment: Segment, team: Budget) -> None:
    for needed in ("starlette", "uvicorn"):
        pytest.importorskip(needed, reason=f"not installed: {needed}")
    from support.dashboard import Dashboard
    from support.waiting import wait_until

    team.charge("<b>\x1b", 1)
    with Dashboard(segment.name) as dashboard:
        found: dict[str, Any] = wait_until(
            "budgets are seen", lambda: (look := dashboard.snapshot())["budgets"] and look
        )
    rows = {(row["budget"], row["key"]): row for row in found["budgets"]}
    assert found["budgets_total"] == 5 and ("team", "<b>\\x1b") in rows
    a = rows["team", "a"]
    assert a["shown"] == {"spent": "$41.000000001", "reserved": "$0", "limit": "$50"}
    assert (a["warned"], a["remaining"]) == (True, 8.999999999)
    (key,) = (row for row in found["keys"] if (row["limiter"], row["key"]) == ("keys", "a"))
    assert (key["usd"], key["remaining"], key["reset_after"]) == (True, 0.9866, None)


def test_top(segment: Segment, team: Budget) -> None:
    pytest.importorskip("textual", reason="not installed: textual")
    from .test_top import driven, lines, lists, sees

    async def body(pilot: Any, app: Any) -> None:
        await sees(app, "8 Budgets")
        await sees(app, "$8.99/$50")
        await pilot.press("8")
        await lists(app, ["b", "a", "a", "c"])
        (a,) = (line.split() for line in lines(app) if line.startswith("a ") and "team" in line)
        assert a[1:6] == ["team", "$41.000000001", "-", "$50", "82.0%"]
        assert all(len(line) <= 80 for line in lines(app))
        await pilot.press("k")
        await lists(app, ["a", "a", "b", "c"])
        await pilot.press("/", *"key")
        await lists(app, ["a"])
        await sees(app, "never")
        await pilot.press("escape", "tab")
        await sees(app, "$8.99/$50")

    driven(segment.name, body)


def test_inspection_writes_nothing(segment: Segment, team: Budget, fast_shm: Command) -> None:
    """The mapping of fast-shm is read only: a write would end it by a signal."""
    before = Path(segment.path).read_bytes()
    assert fast_shm("inspect", "--name", segment.name).returncode == 0
    assert Path(segment.path).read_bytes() == before
