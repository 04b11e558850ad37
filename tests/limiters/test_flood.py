"""Floods of keys on one limiter: the others, and the keys that were there, are as before."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fast_litellm_shm import Limit, Quota, RateLimiter, Segment, Window
from fast_litellm_shm._shared import named_limiter as handle
from fast_litellm_shm.metrics.snapshot import snapshot

CAPACITY = int(os.environ.get("FLOOD_CAPACITY", "4000"))
KEYS = int(os.environ.get("FLOOD_KEYS", "30000"))  # by hand: 10,000,000
SOME = CAPACITY // 200
N = 3


def _flood(name: str, who: int, keys: int, admitted: object) -> None:
    """Each key once, as fast as it goes."""
    limiter = RateLimiter(Window(N, 3600), name="flooded", segment=Segment(name))
    ours = sum(limiter.is_allowed(f"{who}-{i}") for i in range(keys))
    with admitted.get_lock():  # type: ignore[attr-defined]
        admitted.value += ours  # type: ignore[attr-defined]


def _spent(limiter: RateLimiter, keys: list[str], times: int) -> list[int]:
    """How often each key was admitted."""
    return [sum(limiter.is_allowed(key) for _ in range(times)) for key in keys]


def test_other_limiters_and_keys_that_were_there(
    segment_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    segment = Segment(segment_name, capacity=CAPACITY)
    flooded = RateLimiter(Window(N, 3600), name="flooded", segment=segment)
    other = RateLimiter(Limit(N, 3600), name="other", segment=segment, on_full="raise")
    quota = Quota(rpm=N, max_parallel=1, name="quota", segment=segment, on_full="raise")
    there, new = [f"there {i}" for i in range(SOME)], [f"new {i}" for i in range(SOME)]
    assert _spent(flooded, there, 1) == [1] * SOME
    assert _spent(other, there, 1) == [1] * SOME

    context = multiprocessing.get_context("spawn")
    admitted = context.Value("Q", 0)
    floods = [
        context.Process(target=_flood, args=(segment_name, who, KEYS // 2, admitted))
        for who in range(2)
    ]
    for flood in floods:
        flood.start()
    half = SOME // 2  # while it goes on
    assert _spent(other, new[:half], N + 1) == [N] * half
    for flood in floods:
        flood.join()
        assert flood.exitcode == 0

    assert _spent(other, new[half:], N + 1) == [N] * (SOME - half)
    assert _spent(other, there, N + 1) == [N - 1] * SOME
    assert _spent(flooded, there, N + 1) == [N - 1] * SOME
    for key in new:
        with quota.admit(key) as admission:
            assert admission
            assert not quota.admit(key)
    told = snapshot(segment)
    row = next(row for row in told.limiters if row.limiter == "flooded")
    assert row.shared is not None and row.shared > KEYS // 4
    assert told.segment.refused == 0
    assert admitted.value <= told.segment.used + 8 * N
    print(f"{KEYS} keys: {admitted.value} admitted, {told.segment.used} cells", file=sys.stderr)

    handle._told.clear()
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        again = RateLimiter(Window(N, 3600), name="flooded", segment=segment)
        answers = [again.acquire(f"late {i}") for i in range(300)]
        assert not all(again.is_allowed(f"late {i}") for i in range(300))
    assert sum(answer.shared for answer in answers) > 200
    assert [record.message for record in caplog.records if "share counters" in record.message] == [
        record.message for record in caplog.records
    ]
    assert len(caplog.records) == 1


def test_two_floods_one_after_the_other(segment_name: str) -> None:
    """They leave others one place in each region, and no more."""
    segment = Segment(segment_name, capacity=4000)
    for name in "ab":
        flooded = RateLimiter(Window(N, 3600), name=name, segment=segment)
        for i in range(30000):
            flooded.is_allowed(f"{name}{i}")
    third = RateLimiter(Window(N, 3600), name="third", segment=segment)
    answers = [[third.acquire(f"c{i}") for _ in range(N + 2)] for i in range(100)]
    alone = sum(not each[0].shared for each in answers)
    assert alone > 10, alone  # by where the keys lie: 51 to 93 in 40 runs
    assert max(sum(map(bool, each)) for each in answers) == N


@pytest.fixture
def full(segment_name: str) -> Segment:
    """A segment that has no room for any key more."""
    segment = Segment(segment_name, capacity=1)
    filler = RateLimiter(Window(1, 360000), name="filler", segment=segment, on_full="raise")
    for key in "abcd":
        assert filler.is_allowed(key)
    return segment


def test_each_policy(full: Segment) -> None:
    def made(policy: str) -> RateLimiter:
        return RateLimiter(Window(2, 3600), name=policy, segment=full, on_full=policy)

    share, deny, allow = made("share"), made("deny"), made("allow")
    answers = [share.acquire("k") for _ in range(3)]
    assert [bool(answer) for answer in answers] == [True, True, False]
    assert all(answer.shared for answer in answers)
    assert answers[2].retry_after == pytest.approx(3600, rel=0.01)
    assert [share.is_allowed("k"), share.check("k")["allowed"]] == [False, False]
    many = share.acquire_many(["k", "k"])
    assert not many.allowed.any() and (many.retry_after > 3000).all()
    refused = deny.acquire("k")
    assert (refused.allowed, refused.shared, refused.retry_after) == (False, False, 1.0)
    assert all(allow.is_allowed("k") for _ in range(5))
    with pytest.raises(Exception, match="no room for another key"):
        made("raise").acquire("k")


def test_it_is_the_default_and_is_shown(full: Segment) -> None:
    limiter = RateLimiter(Window(2, 3600), name="l", segment=full)
    assert sum(limiter.is_allowed(f"k{i}") for i in range(500)) == 8 * 2
    shown = subprocess.run(
        [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", "--name", full.name, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = {row["name"]: row["shared_seconds"] for row in json.loads(shown.stdout)["limiters"]}
    assert rows["filler"] == 0 and rows["l"] > 3000
    shown = subprocess.run(
        [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", "--name", full.name],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "limiter l: new keys find no room and share counters" in " ".join(shown.stdout.split())


def test_the_alert_names_what_is_exported() -> None:
    alerts = Path(__file__).parents[2] / "examples" / "prometheus" / "alerts.yml"
    assert "fast_shm_limiter_shared_total" in alerts.read_text()
