"""An outage is seen, by everybody who looks: counts, health_check, fast-shm inspect."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support import servers
from support.children import PATIENCE
from support.waiting import wait_until

from fast_litellm_shm import (
    ConcurrencyLimiter,
    Quota,
    RateLimiter,
    Segment,
    Window,
    health_check,
)
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.cluster.state import cluster_state
from fast_litellm_shm.metrics.source import Source

HOUR = 3600
POLICIES = ("local", "deny", "allow")
NOBODY = "unix:///nonexistent/server"


def known_hosts(segment: Segment) -> None:
    wait_until("it is known how many hosts there are", lambda: host_count(segment) == 1)


def counted(segment: Segment, name: str) -> tuple[int, int, int]:
    """Calls of the limiter that were admitted, and denied; and of all limiters together."""
    found = Source(segment).read()
    (row,) = (row for row in found.limiters if row.limiter == name)
    return row.admitted or 0, row.denied or 0, found.segment.admitted + found.segment.denied


@pytest.mark.parametrize("policy", POLICIES)
def test_each_call_is_counted_once(server: servers.Server, segment: Segment, policy: str) -> None:
    """By what was decided, by whoever it was."""
    cluster = Cluster(server.url, on_outage=policy, timeout=servers.SLOWEST)
    limiter = RateLimiter(Window(20, HOUR), name="api", segment=segment, cluster=cluster)
    assert limiter.acquire("warm")
    known_hosts(segment)
    calls = [limiter.is_allowed("before") for _ in range(30)]
    calls += [bool(limiter.acquire("before", cost)) for cost in (30, 2**60)]
    server.kill()
    for key in ("before", "fresh"):
        calls += [limiter.is_allowed(key) for _ in range(50)]
    calls += [bool(each) for each in limiter.acquire_many([f"key {i}" for i in range(9)]).allowed]
    limiter.peek("fresh")
    limiter.charge("fresh", 1)
    limiter.refund("fresh", 1)
    admitted = 1 + sum(calls)
    assert counted(segment, "api") == (admitted, 1 + len(calls) - admitted, 1 + len(calls))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_quota_is_counted_as_its_rates_are(
    server: servers.Server, segment: Segment, policy: str
) -> None:
    """Permits that are not to be had are not counted, with a server or without."""
    cluster = Cluster(server.url, on_outage=policy, timeout=servers.SLOWEST)
    quota = Quota(rpm=20, tpm=2000, max_parallel=30, name="api", segment=segment, cluster=cluster)
    first = quota.admit("warm", 1)
    assert first
    known_hosts(segment)
    server.kill()
    found = [quota.admit("key", 10) for _ in range(40)]
    by_rates = [each for each in found if each or each.reason != "max_parallel"]
    admitted = 1 + sum(map(bool, found))
    assert counted(segment, "api")[:2] == (admitted, 1 + len(by_rates) - admitted)
    assert admitted == {"local": 21, "deny": 1, "allow": 31}[policy]
    for each in (first, *found):
        each.release()


def test_permits_are_counted_by_nobody(server: servers.Server, segment: Segment) -> None:
    """As on one host."""
    cluster = Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST)
    limiter = ConcurrencyLimiter(2, name="permits", segment=segment, cluster=cluster)
    held = limiter.acquire("warm")
    server.kill()
    assert held and not any(limiter.acquire("key") for _ in range(10))
    assert counted(segment, "permits") == (0, 0, 0)
    held.release()


# who is told --------------------------------------------------------------------------------------


def away(segment: Segment) -> dict[str, Any] | None:
    found = cluster_state(segment)
    assert found is not None
    told: dict[str, Any] | None = found["away"]
    return told


def inspect(segment: Segment, *options: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", "--name", segment.name, *options],
        capture_output=True, text=True, check=True, timeout=PATIENCE,
        env=os.environ | {"COLUMNS": "200"},
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("names", ["plain", "hashed", "off"])
def test_everybody_sees_it_and_the_return(
    server: servers.Server,
    segment_name: str,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment_name)
    segment = Segment(segment_name, capacity=1000, names=names)
    cluster = Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST)
    limiter = RateLimiter(Window(20, HOUR), name="api", segment=segment, cluster=cluster)
    assert limiter.acquire("key")
    assert away(segment) is None and health_check()["status"] == "ok"
    assert "WARNING" not in inspect(segment) and "lost" not in inspect(segment)
    server.kill()
    assert not limiter.acquire("other")
    health = health_check()
    said = "has not answered 1 of 1 processes for "
    assert said in health["status"] and "on_outage='deny'" in health["status"]
    told = health["cluster"]["away"]
    assert (told["processes"], told["of"], told["on_outage"]) == (1, 1, ["deny"])
    assert health["cluster"]["lost"] == 1
    text = inspect(segment)
    assert said in text and "on_outage='deny'" in text and "the server was lost 1 time\n" in text
    wait_until("time passes", lambda: (away(segment) or {})["seconds"] > told["seconds"])
    shown = json.loads(inspect(segment, "--json"))["cluster"]
    assert shown["away"]["seconds"] > told["seconds"] and shown["lost"] == 1
    server.start()
    wait_until("it is back", lambda: limiter.acquire("other"))
    wait_until("that is told", lambda: away(segment) is None)
    assert health_check()["status"] == "ok" and health_check()["cluster"]["lost"] == 1
    assert "WARNING" not in inspect(segment)
    (row,) = (each for each in Source(segment).read().operations if each.operation == "away")
    assert row.component == "cluster_outage" and sum(row.calls_by_duration) == 1 < row.seconds


def loses(name: str, url: str, policy: str, end: Any) -> None:
    segment = Segment(name, create=False)
    cluster = Cluster(url, on_outage=policy, timeout=servers.SLOWEST)
    RateLimiter(Window(20, HOUR), name="api", segment=segment, cluster=cluster).acquire("asked")
    end.send("asked")
    end.recv()


@contextmanager
def worker(*given: Any, method: str = "spawn") -> Iterator[Any]:
    context: Any = multiprocessing.get_context(method)
    mine, theirs = context.Pipe()
    child = context.Process(target=loses, args=(*given, theirs), daemon=True)
    child.start()
    try:
        assert mine.poll(PATIENCE) and mine.recv() == "asked"
        yield child
    finally:
        child.kill()
        child.join()


def test_one_that_cannot_reach_it_while_others_can(
    server: servers.Server, segment: Segment
) -> None:
    """And one that dies while it says so."""
    limiter = RateLimiter(Window(20, HOUR), name="api", segment=segment, cluster=server.url)
    assert limiter.acquire("key")
    with worker(segment.name, NOBODY, "allow") as one:
        told = away(segment)
        assert told is not None and (told["processes"], told["of"]) == (1, 2)
        assert told["on_outage"] == ["allow"]
        with worker(segment.name, NOBODY, "deny"):
            told = away(segment)
            assert told is not None and (told["processes"], told["of"]) == (2, 3)
            assert told["on_outage"] == ["allow", "deny"]
            one.kill()
            one.join()
            told = away(segment)
            assert told is not None and (told["processes"], told["of"]) == (1, 2)
            assert told["on_outage"] == ["deny"]
    assert away(segment) is None
    assert limiter.acquire("key")


def test_of_two_servers_the_one_that_is_back_says_nothing_of_the_other(
    server: servers.Server, segment: Segment
) -> None:
    made: Callable[..., RateLimiter] = RateLimiter
    first, second = (
        made(
            Window(20, HOUR),
            name=url,
            segment=segment,
            cluster=Cluster(url, policy, servers.SLOWEST),
        )
        for url, policy in ((server.url, "local"), (NOBODY, "allow"))
    )
    assert first.acquire("key") and second.acquire("key")
    assert (away(segment) or {})["on_outage"] == ["allow"]
    known_hosts(segment)
    server.kill()

    def both() -> bool:
        first.acquire("other")
        return bool((away(segment) or {})["on_outage"] == ["allow", "local"])

    wait_until("both are away", both)
    server.start()
    wait_until("one is back", lambda: (away(segment) or {})["on_outage"] == ["allow"])


def test_a_child_says_it_too(segment: Segment) -> None:
    """What is known of the server it has from its parent, its place among the processes not."""
    cluster = Cluster(NOBODY, on_outage="allow", timeout=servers.SLOWEST)  # the child's is equal
    limiter = RateLimiter(Window(20, HOUR), name="api", segment=segment, cluster=cluster)
    assert limiter.acquire("key")
    with worker(segment.name, NOBODY, "allow", method="fork"):
        wait_until("both say so", lambda: (away(segment) or {})["processes"] == 2)


def test_round_trips_a_second(server: servers.Server, segment: Segment) -> None:
    """Of what came between two looks."""
    limiter = RateLimiter(Window(20, HOUR), name="api", segment=segment, cluster=server.url)
    assert limiter.acquire("key")
    assert "round_trips_per_second" not in json.loads(inspect(segment, "--json"))["cluster"]
    watch = subprocess.Popen(
        [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", "--name", segment.name,
         "--watch", "0.2", "--json"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert watch.stdout is not None
        rates: list[float] = []
        for line in watch.stdout:
            if '"cluster": ' not in line:
                continue
            found = json.loads(line.strip().removeprefix('"cluster": ').removesuffix(","))
            rates.append(found.get("round_trips_per_second", -1.0))
            if len(rates) > 2 and rates[-2] > 0.0 == rates[-1]:
                break
            if len(rates) == 1:
                limiter.reset("key")
    finally:
        watch.kill()
        watch.communicate(timeout=PATIENCE)
    assert rates[0] == -1.0
