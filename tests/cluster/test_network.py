"""Hosts and a server with addresses of their own, over TCP; a host's line goes down for some
seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support import servers
from support.fleet import Fleet
from support.network import Network, why_not

from fast_litellm_shm import Segment, Window
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count

HOSTS, PORT = 3, 6379
LIMIT = 15_000
HOUR = 3600
DOWN = 8.0  # seconds: longer than hosts go without a sign of life of each other, and a time-out


@pytest.fixture(scope="module", autouse=True)
def _permitted() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@contextmanager
def connected(policy: str, pause: float = 0.0) -> Iterator[tuple[Network, Fleet]]:
    kind = next((each for each in servers.KINDS if servers.installed(each)), None)
    if kind is None:
        pytest.skip("there is neither redis-server nor valkey-server here")
    options = ("--bind", Network.ADDRESS, "--protected-mode", "no")
    url = f"redis://{Network.ADDRESS}:{PORT}"
    with (
        Network(HOSTS) as network,
        servers.Server(kind, *options, port=PORT, within=network.in_server()),
        Fleet(
            Cluster(url, on_outage=policy, timeout=servers.SLOWEST),
            [Window(LIMIT, HOUR)],
            hosts=HOSTS,
            pause=pause,
            enter=network.entering(),
        ) as fleet,
    ):
        yield network, fleet


def of_first(counts: list[int]) -> int:
    """Of the two workers of the host that is cut off."""
    return sum(counts[:2])


def spent(fleet: Fleet) -> Callable[[], bool]:
    """Has that host been denied a hundred times in a row?"""
    seen = [0, 0]

    def reached() -> bool:
        asked, admitted = of_first(fleet.asked), of_first(fleet.admitted)
        if admitted != seen[1]:
            seen[:] = asked, admitted
        return asked - seen[0] > 100

    return reached


def go_down(network: Network, fleet: Fleet, policy: str) -> tuple[int, int]:
    """The first host's line, for some seconds. How often it has asked in the second half of them,
    and how often it was admitted."""
    segments = [Segment(name, create=False) for name in fleet.names]
    fleet.until(lambda: all(host_count(each) == HOSTS for each in segments), "all are known")
    network.cut(0)
    since = time.monotonic()
    fleet.until(lambda: time.monotonic() - since > DOWN / 2, "it has noticed")
    if policy == "deny":
        fleet.until(spent(fleet), "what it holds is spent")
    asked, admitted = of_first(fleet.asked), of_first(fleet.admitted)
    others = sum(fleet.admitted[2:])
    fleet.until(lambda: time.monotonic() - since > DOWN, "the line is down for some seconds")
    fleet.until(lambda: sum(fleet.admitted[2:]) > others, "the others go on")
    asked = of_first(fleet.asked) - asked  # first: what is admitted is counted before it
    return asked, of_first(fleet.admitted) - admitted


def use_up(fleet: Fleet) -> None:
    """All that there is: until nobody is admitted in as many calls as no recall takes."""
    fleet.pause(0.0)
    while True:
        before = fleet.total
        fleet.go_on(100_000)
        if fleet.total == before:
            return


def test_hosts_with_addresses_admit_exactly_the_limit() -> None:
    with connected("deny") as (_, fleet):
        fleet.until(lambda: fleet.total >= LIMIT, "all of the limit is used")
        fleet.go_on()
        assert fleet.total == LIMIT


def test_deny() -> None:
    """It spends what it has, and no more; then it denies until it is back."""
    with connected("deny", pause=0.005) as (network, fleet):
        asked, admitted = go_down(network, fleet, "deny")
        assert asked > 0 and admitted == 0
        alone = of_first(fleet.admitted)
        fleet.pause(0.05)  # or the others use it up before
        network.join(0)
        fleet.until(lambda: of_first(fleet.admitted) > alone, "it is admitted again")
        use_up(fleet)
        # What was on its way when the line went down is lost: half of what was left, at most.
        assert LIMIT // 2 <= fleet.total <= LIMIT


def test_local() -> None:
    """It goes by its share, a third; which is charged when it is back."""
    with connected("local", pause=0.005) as (network, fleet):
        asked, admitted = go_down(network, fleet, "local")
        assert 0 < admitted <= min(asked + 2, LIMIT // HOSTS)
        network.join(0)
        use_up(fleet)
        assert LIMIT // 2 <= fleet.total <= LIMIT + LIMIT // HOSTS


def test_allow() -> None:
    """It admits everything; the others are held to the limit all the same."""
    with connected("allow", pause=0.005) as (network, fleet):
        asked, admitted = go_down(network, fleet, "allow")
        assert asked > 0 and admitted >= asked - 2
        network.join(0)
        use_up(fleet)
        assert sum(fleet.admitted[2:]) <= LIMIT
