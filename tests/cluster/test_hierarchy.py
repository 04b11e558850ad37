"""Several levels over many hosts: what the levels before a denial were granted is given back."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest
from support import servers
from support.waiting import wait_until

from fast_litellm_shm import FixedWindow, HierarchyLimiter, RateLimiter, Segment, TokenBucket
from fast_litellm_shm.cluster import Cluster

HOUR = 3600
PATH = ("acme", "red", "ann")


def of(server: servers.Server, segment: Segment, org: Any, team: Any, user: Any) -> Any:
    levels = {"org": org, "team": team, "user": user}
    return HierarchyLimiter(levels, name="api", segment=segment, cluster=server.url)


def windows(server: servers.Server, segment: Segment, *n: int) -> Any:
    return of(server, segment, *(FixedWindow(each, HOUR) for each in n))


@pytest.mark.parametrize("binds", ["org", "team", "user"])
def test_hosts_admit_what_one_would(
    server: servers.Server, segment: Segment, other: Segment, binds: str
) -> None:
    """A denial consumes nothing: in the end every other level has used what was admitted."""
    n = {level: 40 if level == binds else 1000 for level in ("org", "team", "user")}
    hosts = [windows(server, each, *n.values()) for each in (segment, other)]
    admitted, denied = 0, 0
    while denied < 60:
        for limiter in hosts:
            decision = limiter.acquire(PATH)
            admitted += bool(decision)
            denied += not decision
            assert decision.level == (None if decision else binds)
    assert admitted == 40

    keys = {"org": b"acme", "team": b"acme/red", "user": b"acme/red/ann"}

    def all_used(level: str) -> bool:
        raw = keys[level]
        leases = hosts[0].levels[level]._grantor.leases
        (found,) = leases.connection.call([leases.request("look", raw, (0,) * 4)[0]])
        leased = sum(each.levels[level]._grantor.leases.look(raw)[0][0] for each in hosts)
        return bool(found.limits[0].used - leased == 40)

    for level in n:
        wait_until(f"level {level} has used what was admitted", partial(all_used, level))


def test_a_denial_that_is_known_asks_no_other_level(
    server: servers.Server, segment: Segment
) -> None:
    limiter = windows(server, segment, 1000, 2, 1000)
    assert limiter.acquire(PATH) and limiter.acquire(PATH)
    assert limiter.acquire(PATH).level == "team"
    left = limiter.remaining(PATH)
    for _ in range(20):
        assert limiter.acquire(PATH).level == "team"
    assert limiter.remaining(PATH) == left


def test_other_calls(server: servers.Server, segment: Segment) -> None:
    limiter = windows(server, segment, 100, 50, 20)
    decision = limiter.acquire(PATH, {"org": 3})
    assert decision and decision.remaining <= 19 and decision.limit == FixedWindow(20, HOUR)
    assert limiter.peek(PATH) and limiter.is_allowed(PATH)
    assert limiter.peek(PATH, 30).level == "user"
    limiter.charge(PATH, 5)
    assert limiter.remaining(PATH) == {"org": 91, "team": 43, "user": 13}
    limiter.refund(PATH, 5)
    assert limiter.remaining(PATH) == {"org": 96, "team": 48, "user": 18}
    limiter.reset(("acme",))
    assert limiter.remaining(PATH) == {"org": 100, "team": 48, "user": 18}
    assert asyncio.run(limiter.acquire_async(PATH))
    assert asyncio.run(limiter.wait_async(PATH, timeout=30))
    assert not limiter.wait(PATH, 30, timeout=1)


def test_a_bucket_gives_back_too(server: servers.Server, segment: Segment) -> None:
    limiter = of(server, segment, FixedWindow(5, HOUR), "900/hour", TokenBucket(1000, HOUR))
    for _ in range(5):
        assert limiter.acquire(PATH)
    before = limiter.remaining(PATH)
    for _ in range(100):
        assert limiter.acquire(PATH).level == "org"
    after = limiter.remaining(PATH)
    # The first denial may have asked the server for the bucket's token.
    assert all(before[level] - after[level] <= 1 for level in before)


def test_away(server: servers.Server, segment: Segment) -> None:
    cluster = Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST)
    levels = {"org": "5/hour", "user": "5/hour"}
    limiter = HierarchyLimiter(levels, name="api", segment=segment, cluster=cluster)
    server.kill()
    decision = limiter.acquire(("acme", "ann"))
    assert not decision and decision.level in levels


def test_all_levels_or_none(server: servers.Server, segment: Segment) -> None:
    alone = RateLimiter("5/hour", name="alone", segment=segment, cluster=False)
    with pytest.raises(ValueError, match="of its levels, user count in this host alone"):
        HierarchyLimiter(
            {"org": "5/hour", "user": alone}, name="api", segment=segment, cluster=server.url
        )
