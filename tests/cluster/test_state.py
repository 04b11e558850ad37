"""What people see of it: health_check, fast-shm inspect."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

from support import servers
from support.fleet import Fleet
from support.leases import permits_of

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window, health_check
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster.state import cluster_state
from fast_litellm_shm.metrics.source import Source


def test_a_host_alone_says_nothing_of_it(segment: Segment) -> None:
    limiter = RateLimiter(Window(10), name="cluster", segment=segment)
    assert limiter.acquire("key")
    assert cluster_state(segment) is None
    assert health_check()["cluster"] is None
    assert [row["name"] for row in Inspection(segment).limiters()] == ["cluster"]


def test_what_is_told(server: servers.Server) -> None:
    with Fleet(server.url, [Window(1000, 3600)], hosts=2, attempts=[None, 10]) as fleet:
        fleet.until(lambda: fleet.total >= 1000, "all of the limit is used")
        fleet.go_on()
        segment, other = (Segment(name, create=False) for name in fleet.names)
        fleet.until(lambda: (cluster_state(segment) or {})["hosts"] == 2, "both hosts are known")
        pids = [process.pid for process in fleet.processes]
        told, theirs = cluster_state(segment), cluster_state(other)
        assert told is not None and theirs is not None
        assert told["leader"] in pids[:2] and theirs["leader"] in pids[2:]
        assert told["admitted"] + theirs["admitted"] == 1000
        assert told["granted"] >= told["admitted"]
        assert theirs["admitted"] <= 20
        assert 0 <= theirs["given_back"] <= theirs["granted"] - theirs["admitted"]
        assert told["failed"] == 0 < told["lag_p50_ms"] <= told["lag_p99_ms"]
        assert told["calls_saved"] > 1000
        shown = inspect(segment.name)
        assert {row["name"] for row in shown["limiters"]} == {"fleet", "fleet (wallet)"}
        assert {row["limiter"] for row in shown["keys"]} == {"fleet", "fleet (wallet)"}
        assert shown["cluster"]["leader"] == told["leader"]
        text = inspect_text(segment.name)
        assert "2 hosts, pid" in text and "round trips (0 failed)" in text


def test_permits_are_told(server: servers.Server, segment: Segment) -> None:
    limiter = ConcurrencyLimiter(10, name="permits", segment=segment, cluster=server.url)
    permits = [limiter.acquire(key) for key in ("a", "a", "b")]
    told = cluster_state(segment)
    assert told is not None and told["permits"]["keys"] == 2 and told["granted"] == 0
    assert told["permits"]["round_trips"] == 2
    leases = permits_of(limiter)
    allowed = [leases.look(key).leased for key in (b"a", b"b")]
    assert told["permits"]["allowed"] == sum(allowed) >= 3
    shown = inspect(segment.name)
    assert [row["name"] for row in shown["limiters"]] == ["permits"]
    text = inspect_text(segment.name)
    assert re.search(r"this host may hold \d+ permits, of 2 keys", text)
    assert re.search(r"(1 host|\? hosts), (pid \d+|no process) leads this one", text)
    metrics = Source(segment).read()
    assert {row.limiter for row in metrics.limiters} == {"permits"}
    assert {(row.limiter, row.in_flight) for row in metrics.permits} == {("permits", 3)}
    for permit in permits:
        permit.release()


def test_what_a_limiter_has_beside_it_takes_no_place_among_the_counts(
    server: servers.Server, segment_name: str
) -> None:
    """The first fifteen limiters are counted apart, however many hosts they are for."""
    segment = Segment(segment_name, capacity=100_000)
    limiters = [
        RateLimiter(Window(5, 3600), name=f"api {i}", segment=segment, cluster=server.url)
        for i in range(lib.FSHM_COUNTERS - 1)
    ]
    for limiter in limiters:
        assert sum(limiter.is_allowed("key") for _ in range(8)) == 5
    found = Source(segment).read()
    told = {row.limiter: (row.admitted, row.denied) for row in found.limiters}
    assert [told.pop(limiter.name) for limiter in limiters] == [(5, 3)] * len(limiters)
    assert told == {f"{limiter.name} (wallet)": (None, None) for limiter in limiters}
    assert (found.segment.admitted, found.segment.denied) == (5 * 15, 3 * 15)


def inspect(name: str) -> dict[str, Any]:
    return dict(json.loads(inspect_text(name, "--json")))


def inspect_text(name: str, *options: str) -> str:
    command = [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", "--name", name, *options]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    return done.stdout
