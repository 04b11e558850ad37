"""The numbers themselves: right, the same in every process, and counters that never fall."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from support.scene import AWKWARD, DURATIONS_NS, Scene
from support.waiters import killed_waiter, waiters
from support.waiting import wait_until

from fast_litellm_shm import (
    ConcurrencyLimiter,
    Limit,
    RateLimiter,
    Segment,
    SegmentNotFoundError,
    SimpleConnectionPool,
)
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.wait_queue import ALIKE, Order
from fast_litellm_shm.metrics import DURATION_BOUNDS, OTHERS
from fast_litellm_shm.metrics.prometheus_text import prometheus_text
from fast_litellm_shm.metrics.snapshot import snapshot
from fast_litellm_shm.metrics.source import Source, Sources

WALL = 1232  # of header_t.wall_base and wall_floor in the segment's file


def test_everything_is_told(scene: Scene) -> None:
    found = Source(scene.segment, keys=5, deployments={"eu": ["gpt-a", "gpt-b", "never"]}).read()
    limiters = {row.limiter: row for row in found.limiters}
    chat, full = limiters["chat"], limiters["full"]
    assert (chat.admitted, chat.denied, chat.refused, chat.keys) == (3, 2, 0, 1)
    assert (limiters[AWKWARD].admitted, limiters[AWKWARD].denied) == (4, 0)
    assert full.admitted is not None and full.denied is not None
    assert full.admitted + full.denied == 200
    assert full.denied == full.refused and full.refused > 0
    assert full.keys == full.admitted
    of = found.segment
    assert of.admitted == sum(row.admitted or 0 for row in found.limiters)
    assert (of.denied, of.refused) == (full.denied + 2, full.refused)
    assert of.processes == 1 and of.damaged is None and not of.unlinked
    assert of.utilization == of.used / of.capacity > 1  # there is room for some more than it says
    stats = scene.segment.stats()
    assert (of.used, of.admitted, of.denied) == (stats["used"], stats["admitted"], stats["denied"])

    (gpu,) = found.permits
    assert (gpu.limiter, gpu.in_flight, gpu.dead, gpu.max_per_key) == ("gpu", 2, 1, 3)
    pools = {row.endpoint: row for row in found.pools}
    one, two = pools["https://one.example"], pools["https://two.example"]
    assert (one.pool, one.active, one.idle, one.dead, one.max_connections) == ("web", 1, 0, 1, 5)
    assert (two.active, two.idle, two.dead) == (0, 1, 0)

    assert found.keys[0].key == "busy" and found.keys[0].limiter == "chat"
    assert (found.keys[0].admitted, found.keys[0].denied) == (3, 2)
    assert len(found.keys) == 5
    assert (found.memo["hits"], found.memo["misses"]) == (300, 100)
    assert found.feature_errors["rust_token_counting"] == 1

    a, b = sorted(found.deployments, key=lambda row: row.deployment)
    assert (a.router, a.deployment, a.in_flight, a.requests) == ("eu", "gpt-a", 1, 1)
    assert a.latency_seconds == pytest.approx(0.12, rel=1e-3)
    assert (a.success_ratio, a.cooldown_seconds) == (1, 0)
    assert (b.deployment, b.in_flight, b.latency_seconds) == ("gpt-b", 0, None)
    assert b.success_ratio == 0 and 3500 < b.cooldown_seconds <= 3600

    operations = {(row.component, row.operation): row for row in found.operations}
    # names of operations are kept by their first 52 bytes
    kept = AWKWARD.encode()[:52].decode("utf-8", "replace")
    mine = operations["component", kept]
    expected = [0] * (len(DURATION_BOUNDS) + 1)
    for ns in DURATIONS_NS:
        expected[next((i for i, b in enumerate(DURATION_BOUNDS) if ns / 1e9 < b), -1)] += 1
    assert list(mine.calls_by_duration) == expected
    assert mine.seconds == pytest.approx(sum(DURATIONS_NS) / 1e9)
    assert mine.errors == 1


def test_callers_that_wait(segment: Segment) -> None:
    """By limiter and priority; those of a killed process are stale; and a row of 0 for the rest."""
    gpu = ConcurrencyLimiter(1, name="gpu", segment=segment)
    RateLimiter(Limit(3, per=60), name="chat", segment=segment)

    def rows() -> dict[tuple[str, str], tuple[int, int]]:
        found = Source(segment).read().waiting
        assert all((row.longest_seconds > 0) == (row.callers > 0) for row in found)
        return {(row.limiter, row.priority): (row.callers, row.stale) for row in found}

    with waiters(gpu, "a", ALIKE, Order(1), Order(2, 1000, -7)), waiters(gpu, "b", ALIKE):
        killed_waiter(gpu, "a")
        expected = {("gpu", "0"): (3, 1), ("gpu", "-7"): (1, 0), ("chat", "0"): (0, 0)}
        wait_until(lambda: f"{expected}, not {rows()}", lambda: rows() == expected)
        text = prometheus_text([("s", Source(segment).read())])
    assert 'fast_shm_waiting_callers{segment="s",limiter="gpu",priority="0"} 3' in text
    assert 'fast_shm_waiting_stale{segment="s",limiter="gpu",priority="0"} 1' in text


def test_names_that_nobody_gave_are_hashes(scene: Scene) -> None:
    rows = Source(scene.segment).read().deployments
    assert [row.router for row in rows] == ["", ""]
    assert all(row.deployment.startswith("#") and len(row.deployment) == 17 for row in rows)


def test_reading_writes_nothing(scene: Scene) -> None:
    source = Source(scene.segment, keys=10)
    source.read()
    before = Path(scene.segment.path).read_bytes()
    for _ in range(3):
        source.read()
    after = Path(scene.segment.path).read_bytes()
    wall = slice(WALL, WALL + 16)  # the time of day, which all who have a budget follow
    assert before[: wall.start] == after[: wall.start] and before[wall.stop :] == after[wall.stop :]


def test_counts_outlive_processes_and_their_slots(segment_name: str) -> None:
    """More processes than there are slots, all killed: each call counts, and no sum ever falls."""
    segment = Segment(segment_name, capacity=10)
    limiter = RateLimiter(Limit(1000, per=30 * 86400), name="a", segment=segment, on_full="deny")
    for i in range(100):  # until it is full
        limiter.is_allowed(f"key {i}")
    source = Source(segment)
    before = source.read().segment
    assert before.admitted and before.refused
    for i in range(300):
        child = os.fork()
        if not child:
            limiter.is_allowed("key 0")
            for k in range(2):
                limiter.is_allowed(f"another {i + k}")
            os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
        if i % 10 == 9:
            now = source.read().segment
            assert now.admitted == before.admitted + i + 1
            assert now.denied == now.refused == before.refused + 2 * (i + 1)
    (row,) = source.read().limiters
    assert (row.admitted, row.refused) == (now.admitted, now.refused)
    assert now.processes == 1  # this one


def test_sums_never_fall_while_keys_are_forgotten(segment: Segment) -> None:
    """Keys expire, their places go to others: what is known of single keys falls, sums do not."""
    limiter = RateLimiter(Limit(1000, per=0.001), name="brief", segment=segment)
    source, calls, seen = Source(segment, keys=1000), 0, 0
    fell = False
    remembered = 0
    end = time.monotonic() + 30
    while not fell and time.monotonic() < end:
        for _ in range(1500):
            limiter.is_allowed(f"key {random.random()}")
            calls += 1
        found = source.read()
        (row,) = found.limiters
        assert row.admitted is not None and row.denied is not None
        assert row.admitted + row.denied == calls > seen
        seen = calls
        now = sum(key.admitted + key.denied for key in found.keys)
        fell, remembered = now < calls, now
    assert fell, f"nothing was forgotten: {remembered} of {calls}"


def test_limiters_beyond_those_counted_apart_are_told_together(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100_000)
    last = lib.FSHM_COUNTERS - 1
    for i in range(last + 3):
        RateLimiter(Limit(9, per=60), name=f"limiter {i}", segment=segment).is_allowed("k")
    rows = {row.limiter: row for row in Source(segment).read().limiters}
    assert [rows[f"limiter {i}"].admitted for i in range(last)] == [1] * last
    assert rows[f"limiter {last}"].admitted is None
    assert rows[f"limiter {last}"].keys == 1
    assert rows[OTHERS].admitted == 3


def test_a_limiter_called_as_the_others_are_is_one_series_with_them(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100_000)
    RateLimiter(Limit(9, per=60), name=OTHERS, segment=segment).is_allowed("k")
    for i in range(lib.FSHM_COUNTERS):
        RateLimiter(Limit(9, per=60), name=f"limiter {i}", segment=segment).is_allowed("k")
    found = Source(segment).read()
    (row,) = (row for row in found.limiters if row.limiter == OTHERS)
    assert (row.admitted, row.keys) == (3, 1)
    assert sum(each.admitted or 0 for each in found.limiters) == found.segment.admitted


def test_endpoints_are_bounded(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=10_000)
    pool = SimpleConnectionPool("web", max_per_endpoint=5, max_total=1000, segment=segment)
    held = [pool.get_connection(f"https://{i}.example") for i in range(130)]
    held += [pool.get_connection("https://7.example") for _ in range(3)]
    rows = Source(segment).read().pools
    assert len(rows) == 101
    assert rows[0].endpoint == "https://7.example" and rows[0].active == 4
    rest = next(row for row in rows if row.endpoint == OTHERS)
    assert (rest.active, rest.max_connections) == (30, None)
    assert sum(row.active for row in rows) == len(held)
    pool.close()


def test_without_names_nothing_is_told_of_keys(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100, names="off")
    limiter = RateLimiter(Limit(3, per=60), name="a", segment=segment)
    for _ in range(5):
        limiter.is_allowed("secret")
    found = Source(segment, keys=10).read()
    assert found.keys == ()
    (row,) = found.limiters
    assert (row.admitted, row.denied, row.keys) == (3, 2, None)


def test_a_successor_is_followed(segment_name: str) -> None:
    source = Source(segment_name)
    with pytest.raises(SegmentNotFoundError):
        source.read()
    first = Segment(segment_name, capacity=100)
    limiter = RateLimiter(Limit(3, per=60), name="a", segment=first)
    limiter.is_allowed("k")
    assert source.read().segment.admitted == 1
    first.remove()
    assert source.read().segment.unlinked  # and it is read as long as there is no other
    assert source.read().segment.admitted == 1
    Segment(segment_name, capacity=200)
    found = source.read().segment
    assert (found.capacity, found.admitted) == (200, 0)
    assert found.unlinked  # this very process counts in the removed one still
    del limiter, first
    assert not source.read().segment.unlinked


def test_what_cannot_be_read_is_none_and_logged_once(
    segment_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    sources = Sources(segment_name)
    for _ in range(3):
        assert sources.read() == [(segment_name, None)]
    assert len(caplog.records) == 1 and "there is no such segment" in caplog.text
    segment = Segment(segment_name, capacity=100)
    assert sources.read()[0][1] is not None
    with open(segment.path, "r+b") as file:
        file.truncate(4096)
    assert sources.read() == [(segment_name, None)]
    assert len(caplog.records) == 2 and "4096 bytes" in caplog.text


def test_damage_is_told(segment: Segment) -> None:
    RateLimiter(Limit(3, per=60), name="a", segment=segment).is_allowed("k")
    with open(segment.path, "r+b") as file:
        file.seek(24)  # the capacity, which never changes
        file.write(b"\xff")
    damaged = snapshot(segment).segment.damaged
    assert damaged is not None and "header was written over" in damaged


def test_names_of_deployments_can_be_encoded(scene: Scene) -> None:
    scene_of = Source(scene.segment, deployments={"eu": ["gpt-a", "\udc80"]})
    assert set(scene_of._deployments.values()) == {("eu", "gpt-a"), ("eu", "?")}


@pytest.mark.parametrize(
    ("arguments", "kind", "said"),
    [
        ({"segment": 5}, TypeError, "segment must be a Segment"),
        ({"segment": "a/b"}, ValueError, "not 'a/b'"),
        ({"keys": 1001}, ValueError, "between 0 and 1000, not 1001"),
        ({"keys": -1}, ValueError, "not -1"),
        ({"keys": True}, TypeError, "keys must be an int"),
        ({"deployments": ["a"]}, TypeError, "names by router"),
        ({"deployments": {"r": "abc"}}, TypeError, "must be a list of names, not 'abc'"),
        ({"deployments": {"r": [5]}}, TypeError, "named by str"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind, match=said):
        Sources(**arguments)  # type: ignore[arg-type]
