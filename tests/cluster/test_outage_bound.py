"""What ``on_outage="local"`` can add: the bound of docs/cluster.md, reached and never passed."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest
from support import servers
from support.leases import connection_of
from support.names import remove, unique_name
from support.waiting import wait_until

from fast_litellm_shm import RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count

HOSTS = 3
N = 90
SHARE = N // HOSTS
HOUR = 3600


@pytest.fixture
def names() -> Iterator[list[str]]:
    """Of the segments: each is a host."""
    found = [unique_name(f"host{i}") for i in range(HOSTS)]
    yield found
    for each in found:
        remove(each)


def hosts(server: servers.Server, names: list[str], per: float) -> list[RateLimiter]:
    """A limiter on each, when all know how many they are."""
    cluster = Cluster(server.url, timeout=servers.SLOWEST)
    segments = [Segment(name, capacity=1000) for name in names]
    found = [
        RateLimiter(Window(N, per), name="api", segment=each, cluster=cluster) for each in segments
    ]
    for each in found:
        assert each.acquire("other")
    wait_until("all hosts are known", lambda: all(host_count(each) == HOSTS for each in segments))
    return found


def is_away(limiter: RateLimiter) -> bool:
    return connection_of(limiter).outage is not None


def exhausted(limiters: list[RateLimiter]) -> int:
    """How many fit, asked in turn, until 60 in a row do not, nor more after a pause."""
    admitted = denied = 0
    while denied < 60:
        for each in limiters:
            found = each.is_allowed("key")
            admitted, denied = admitted + found, 0 if found else denied + 1
        if denied:
            time.sleep(0.005)  # what is refused is asked again after 60 ms
    return admitted


def freeze(server: servers.Server, limiters: list[RateLimiter]) -> None:
    """And let all notice, by a key of which nothing is known."""
    server.freeze()
    for i, each in enumerate(limiters):
        wait_until("noticed", lambda e=each, i=i: e.acquire(f"notice{i}") and is_away(e))  # type: ignore[misc]


def thaw(server: servers.Server, limiters: list[RateLimiter]) -> None:
    server.thaw()
    wait_until("it is back", lambda: not any(map(is_away, limiters)))


def test_the_most_that_an_outage_adds(server: servers.Server, names: list[str]) -> None:
    """One host was granted all of it, and the others, which have not asked, admit their shares.
    When the server is back it has nothing left to grant."""
    limiters = hosts(server, names, HOUR)
    assert exhausted(limiters[:1]) == N
    freeze(server, limiters)
    assert exhausted(limiters) == (HOSTS - 1) * SHARE
    thaw(server, limiters)
    assert exhausted(limiters) == 0


def test_what_was_admitted_alone_is_not_granted_again(
    server: servers.Server, names: list[str]
) -> None:
    """Nobody had asked: all shares together are the limit, and all is charged."""
    limiters = hosts(server, names, HOUR)
    freeze(server, limiters)
    assert exhausted(limiters) == HOSTS * SHARE
    thaw(server, limiters)
    assert exhausted(limiters) == 0


@pytest.mark.parametrize("seed", range(2))
def test_whatever_happens_it_is_not_more(
    server: servers.Server, names: list[str], seed: int
) -> None:
    """Calls of any host, and outages, in any order within one window."""
    chosen = random.Random(seed)
    limiters = hosts(server, names, HOUR)
    total, frozen = 0, False
    for _ in range(60):
        if chosen.random() < 0.12:
            freeze(server, limiters) if not frozen else thaw(server, limiters)
            frozen = not frozen
        each = chosen.choice(limiters)
        total += sum(each.is_allowed("key") for _ in range(chosen.randrange(1, 12)))
    if not frozen:
        freeze(server, limiters)
    total += exhausted(limiters)
    thaw(server, limiters)
    total += exhausted(limiters)
    assert N // 3 <= total <= N + HOSTS * SHARE


def test_windows_after_it_are_exact(server: servers.Server, names: list[str]) -> None:
    """Of an outage in which the window ended, and the next one began without the server."""
    per = 10.0
    limiters = hosts(server, names, per)
    assert exhausted(limiters[:1]) == N
    began = time.monotonic()
    freeze(server, limiters)
    exhausted(limiters)
    wait_until(
        "the next one", lambda: time.monotonic() - began > per and limiters[0].is_allowed("key")
    )
    exhausted(limiters)
    thaw(server, limiters)
    for _ in range(3):
        wait_until("a window that the server grants", lambda: limiters[0].is_allowed("key"))
        began = time.monotonic()
        admitted = 1 + exhausted(limiters)
        if time.monotonic() - began < per - 1:  # else it may have seen two, on a slow machine
            assert admitted <= N
            return
    pytest.skip("this machine is too slow to use up a window before it ends")
