"""Callers that wait for a key: fast-shm inspect shows them, and top and the page have the rows."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import pytest
from support.waiters import killed_waiter, waiters
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm._shared.wait_queue import ALIKE, Order
from fast_litellm_shm.cli.sampler import Sampler

from .conftest import Command


@pytest.fixture
def gpu(segment: Segment) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(1, name="gpu", segment=segment)


def _json(fast_shm: Command, name: str, *options: str) -> list[dict[str, Any]]:
    done = fast_shm("inspect", "--name", name, "--json", *options)
    assert (done.returncode, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)["waiting"]
    return found


def test_json(fast_shm: Command, gpu: ConcurrencyLimiter, segment_name: str) -> None:
    with gpu.acquire("a"), waiters(gpu, "a", ALIKE, Order(5, 1000, -3), ALIKE):
        found = _json(fast_shm, segment_name)
        assert all(row.pop("longest_seconds") > 0 for row in found)
        common = {"limiter": "gpu", "key": "a", "pids": [os.getpid()], "stale": 0}
        found.sort(key=lambda row: row["priority"])
        assert found == [
            {**common, "tenant": "#0000000000000005", "priority": -3, "callers": 1},
            {**common, "tenant": None, "priority": 0, "callers": 2},
        ]
    assert _json(fast_shm, segment_name) == []


def test_names(
    fast_shm: Command, gpu: ConcurrencyLimiter, segment: Segment, segment_name: str
) -> None:
    """A key is named by its permits or by its counts; one that has neither, by its hash."""
    chat = RateLimiter(Window(10, 3600), name="chat", segment=segment)
    chat.is_allowed("[red]\x1b[2J")
    with (
        waiters(gpu, "b", ALIKE),
        waiters(chat, "[red]\x1b[2J", ALIKE),
        waiters(chat, "never asked", ALIKE),
    ):
        found = _json(fast_shm, segment_name)
        hashes = {row["key"] for row in found if row["key"].startswith("#")}
        assert len(found) == 3 and len(hashes) == 2
        assert ("chat", "[red]\x1b[2J") in {(row["limiter"], row["key"]) for row in found}
        with gpu.acquire("b"):
            assert "b" in {row["key"] for row in _json(fast_shm, segment_name)}
        only = _json(fast_shm, segment_name, "--limiter", "gpu")
        assert [row["limiter"] for row in only] == ["gpu"]
        only = _json(fast_shm, segment_name, "--match", "*red*")
        assert [row["limiter"] for row in only] == ["chat"]
        shown = fast_shm("inspect", "--name", segment_name).stdout
        assert "\x1b" not in shown and "[red]\\x1b[2J" in shown


def test_table(fast_shm: Command, gpu: ConcurrencyLimiter, segment_name: str) -> None:
    with gpu.acquire("a"):
        before = fast_shm("inspect", "--name", segment_name).stdout
        assert "Waiting" not in before
        with waiters(gpu, "a", ALIKE, ALIKE, Order(0, 1000, 2)):
            shown = fast_shm("inspect", "--name", segment_name).stdout
        assert "Waiting (3 callers)" in shown
        rows = [line.split() for line in shown.splitlines()]
        pid = str(os.getpid())
        for priority, callers in (("0", "2"), ("2", "1")):
            (row,) = (row for row in rows if row[:4] == ["a", "gpu", "-", priority])
            assert row[4] == callers and row[-2:] == ["-", pid]


def test_dead_callers_are_stale(
    fast_shm: Command, gpu: ConcurrencyLimiter, segment_name: str
) -> None:
    with gpu.acquire("a"):
        dead = killed_waiter(gpu, "a")
        (row,) = wait_until(
            "the killed caller is stale",
            lambda: [row for row in _json(fast_shm, segment_name) if row["stale"]],
        )
        assert (row["callers"], row["stale"], row["pids"]) == (0, 1, [])
        shown = fast_shm("inspect", "--name", segment_name).stdout
        assert "Waiting (0 callers)" in shown and str(dead) not in shown.split()
        assert re.search(r"^a +gpu +- +0 +0 +- +1 +-$", shown, re.MULTILINE)


def test_sampled(gpu: ConcurrencyLimiter, segment_name: str) -> None:
    sampler = Sampler(segment_name)
    with gpu.acquire("a"):
        assert (sampler.sample().waits, sampler.sample().waiting) == ([], 0)
        with waiters(gpu, "a", ALIKE, Order(0, 1000, 1)):
            found = sampler.sample()
        assert (len(found.waits), found.waiting) == (2, 2)
