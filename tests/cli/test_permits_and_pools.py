"""What processes hold: fast-shm inspect shows it, fast-shm release gives it back."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest

from fast_litellm_shm import ConcurrencyLimiter, Limit, Quota, RateLimiter, Segment
from fast_litellm_shm._shared.inspection import Inspection

from .conftest import Command, environment

Holder = subprocess.Popen[bytes]


def _inspect(fast_shm: Command, name: str, *options: str) -> dict[str, Any]:
    done = fast_shm("inspect", "--name", name, "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _killed(holder: Holder) -> int:
    holder.kill()
    holder.wait()
    return holder.pid


def _releases(holder: Holder) -> bytes:
    """Lets it release its permit of "gpu" and its admission of "gpt"; whether it still had them."""
    assert holder.stdin is not None and holder.stdout is not None
    holder.stdin.write(b"\n")
    holder.stdin.flush()
    return holder.stdout.readline()


def test_json(fast_shm: Command, holders: list[Holder], segment_name: str) -> None:
    found, pids = _inspect(fast_shm, segment_name), sorted(each.pid for each in holders)
    permits = {row["limiter"]: row for row in found["permits"]}
    assert set(permits) == {"gpu", "gpt"}  # permits of the pool are in "pools"
    assert all(row.pop("oldest_seconds") >= 0 for row in permits.values())
    assert permits["gpu"] == {
        **{"limiter": "gpu", "key": "a", "pids": pids, "dead": 0},
        **{"in_flight": 2, "max_in_flight": 3},
    }
    assert (permits["gpt"]["key"], permits["gpt"]["max_in_flight"]) == ("team", 4)
    pools = {row["endpoint"]: row for row in found["pools"]}
    common = {"pool": "web", "max_connections": 5, "pids": pids, "dead": 0}
    assert pools == {
        "https://one.example": {"endpoint": "https://one.example", "active": 2, "idle": 0} | common,
        "https://two.example": {"endpoint": "https://two.example", "active": 0, "idle": 2} | common,
    }
    assert [(row["limiter"], row["key"]) for row in found["keys"]] == [("gpt", "team")]


def test_limiter_and_match(fast_shm: Command, holders: list[Holder], segment_name: str) -> None:
    def held(*options: str) -> set[str]:
        found = _inspect(fast_shm, segment_name, *options)
        endpoints = {row["endpoint"] for row in found["pools"]}
        return {row["key"] for row in found["permits"]} | endpoints

    assert held("--limiter", "gpu") == {"a"}
    assert held("--limiter", "pool web") == {"https://one.example", "https://two.example"}
    assert held("--match", "t*") == {"team"}
    assert held("--match", "*two*") == {"https://two.example"}


def test_table(fast_shm: Command, holders: list[Holder], segment_name: str) -> None:
    shown = fast_shm("inspect", "--name", segment_name).stdout
    rows = [line.split() for line in shown.splitlines()]
    pids = [str(pid) for pid in sorted(each.pid for each in holders)]
    assert "Permits (4 in flight)" in shown and "Pools (4 connections)" in shown
    permit = next(row for row in rows if row[:2] == ["a", "gpu"])
    assert permit[2:4] == ["2", "3"] and permit[-3:] == ["-", *pids]
    assert ["web", "https://one.example", "2", "0", "5", "-", *pids] in rows
    assert ["web", "https://two.example", "0", "2", "5", "-", *pids] in rows


def test_names_that_are_not_pools(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    limiters = [
        ConcurrencyLimiter(2, name=name, segment=segment) for name in ("pool", "pool x", "y total")
    ]
    permits = [limiter.acquire("[red]\x1b[2J") for limiter in limiters]
    shown = fast_shm("inspect", "--name", segment_name).stdout
    found = _inspect(fast_shm, segment_name)
    assert "\x1b" not in shown and shown.count("[red]\\x1b[2J") == 3
    assert {row["limiter"] for row in found["permits"]} == {each.name for each in limiters}
    assert found["pools"] == found["keys"] == []
    assert all(permit.release() for permit in permits)


def test_dead_holder(
    fast_shm: Command, holders: list[Holder], segment: Segment, segment_name: str
) -> None:
    dead, alive = _killed(holders[0]), holders[1].pid
    for _ in range(2):  # looking gives nothing back
        found = _inspect(fast_shm, segment_name)
        assert [row["dead"] for row in found["permits"] + found["pools"]] == [1] * 4
        assert all(row["pids"] == [alive] for row in found["permits"] + found["pools"])
        assert {row["in_flight"] for row in found["permits"]} == {1}
    assert str(dead) not in fast_shm("inspect", "--name", segment_name).stdout.split()
    done = fast_shm("release", "--name", segment_name, "--dead")
    # a pooled connection is two: of its endpoint, and of the pool
    assert (done.returncode, done.stderr) == (0, "") and "Gave back 6 permits of" in done.stdout
    assert all(row.pid == alive for row in Inspection(segment).permits())
    done = fast_shm("release", "--name", segment_name, "--dead")
    assert done.returncode == 0 and "Nothing to give back" in done.stdout
    assert _releases(holders[1]) == b"True True\n"


def test_release_of_a_dead_process(
    fast_shm: Command, holders: list[Holder], segment: Segment, segment_name: str
) -> None:
    dead = _killed(holders[0])
    done = fast_shm("release", "--name", segment_name, "--pid", str(dead))
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Process {dead} is not attached" in done.stdout and "Gave back 6" in done.stdout
    assert {row.pid for row in Inspection(segment).permits()} == {holders[1].pid}


def test_release_of_a_number_that_was_reused(
    fast_shm: Command, holders: list[Holder], segment_name: str
) -> None:
    """A living process that does not use the segment is not the one that held something."""
    _killed(holders[0])
    with subprocess.Popen(["sleep", "600"]) as stranger:
        done = fast_shm("release", "--name", segment_name, "--pid", str(stranger.pid))
        stranger.kill()
    assert done.returncode == 0 and "not attached" in done.stdout and "Gave back 6" in done.stdout


def test_release_of_a_living_process(
    fast_shm: Command, holders: list[Holder], segment: Segment, segment_name: str
) -> None:
    pid = holders[0].pid
    done = fast_shm("release", "--name", segment_name, "--pid", str(pid))
    assert (done.returncode, done.stdout) == (1, "")
    assert f"process {pid} (" in done.stderr and "python" in done.stderr
    assert "--force" in done.stderr
    assert sum(row.pid == pid for row in Inspection(segment).permits()) == 6
    done = fast_shm("release", "--name", segment_name, "--pid", str(pid), "--force")
    assert (done.returncode, done.stderr) == (0, "") and "Gave back 6" in done.stdout
    assert {row.pid for row in Inspection(segment).permits()} == {holders[1].pid}
    assert _releases(holders[0]) == b"False False\n"
    assert _releases(holders[1]) == b"True True\n"


def test_reset_leaves_permits(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    gpu = ConcurrencyLimiter(2, name="gpu", segment=segment)
    quota = Quota(rpm=5, max_parallel=2, name="gpt", segment=segment)
    permit, admission = gpu.acquire("a"), quota.admit("a")
    done = fast_shm("reset", "--name", segment_name, "a", env=environment())
    assert done.stdout == "Reset key 'a' of limiter 'gpt'.\n"
    assert quota.remaining("a") == {"rpm": 5, "max_parallel": 1}
    done = fast_shm("reset", "--name", segment_name, "a")
    assert done.stdout.startswith("Nothing to reset")
    done = fast_shm("reset", "--name", segment_name, "--all")
    assert "Left limiter 'gpu' alone" in done.stdout and "Reset limiter 'gpt'" in done.stdout
    assert gpu.in_flight("a") == quota.in_flight("a") == 1
    assert permit.release() and admission.release()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_release_in_a_segment_of_another_user(
    fast_shm: Command, segment: Segment, segment_name: str
) -> None:
    RateLimiter(Limit(5), name="rate", segment=segment).acquire("k")
    os.chown(segment.path, 12345, -1)
    done = fast_shm("release", "--name", segment_name, "--dead")
    assert done.returncode == 1 and "--allow-other-owner" in done.stderr
    done = fast_shm("release", "--name", segment_name, "--dead", "--allow-other-owner")
    assert done.returncode == 0
