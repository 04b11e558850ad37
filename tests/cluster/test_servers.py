"""Redis Cluster, Sentinel, passwords, and what URLs mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from support import servers
from support.fleet import Fleet
from support.flights import Flights
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster

HOUR = 3600
SLOTS = 16384


def need(kind: str) -> None:
    if not servers.installed(kind):
        pytest.skip(f"there is no {kind}-server here: apt-get install {kind}-server")


def _is_complete(client: Any) -> bool:
    return b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")


@pytest.fixture
def nodes(kind: str) -> Iterator[list[servers.Server]]:
    """A cluster of three nodes, complete."""
    need(kind)
    with ExitStack() as stack:
        found = []
        for _ in range(3):
            port = servers.free_port() % 40_000 + 10_000  # its bus is at 10,000 more
            options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "60000")
            found.append(stack.enter_context(servers.Server(kind, *options, port=port)))
        for i, node in enumerate(found):
            with node.client() as client:
                first, last = i * SLOTS // 3, (i + 1) * SLOTS // 3 - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
                client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
                for other in found[:i]:
                    client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
        for node in found:
            with node.client() as client:
                wait_until("the nodes find each other", partial(_is_complete, client))
        yield found


def test_a_cluster_of_three_nodes(nodes: list[servers.Server], segment: Segment) -> None:
    """Keys spread over the nodes, and what one host holds comes back over any of them."""
    url = f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
    with Fleet(url, [Window(1000, HOUR)], hosts=3, attempts=[None, 20, 20]) as fleet:
        fleet.until(lambda: fleet.total >= 1000, "all of the limit is used")
        fleet.go_on()
        assert fleet.total == 1000
    limiter = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=url)
    for i in range(30):
        assert limiter.acquire(f"key {i}", 60) and not limiter.acquire(f"key {i}", 60)
    sizes = []
    for node in nodes:
        with node.client() as client:
            sizes.append(client.dbsize())
    assert min(sizes) > 0
    limiter.reset()
    assert limiter.acquire("key 1", 60) and limiter.acquire("key 29", 60)


def test_permits_over_a_cluster_of_three_nodes(nodes: list[servers.Server]) -> None:
    """A host is asked over the nodes' own bus to give back what another one lacks."""
    url = f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"
    with Flights(url, 20, hosts=2, turns=None) as flights:
        flights.want(10, 10, 0, 0)
        flights.until(lambda: flights.total == 20, "one host has all")
        flights.want(3, 0, 9, 8)
        flights.until(lambda: flights.total == 20, "the other has nearly all")
        flights.go_on()
        assert flights.most() <= 20


@pytest.fixture
def watched() -> Iterator[tuple[servers.Server, servers.Server, servers.Server]]:
    """A master, its replica, and a Sentinel that watches them."""
    need("redis")
    ports = [servers.free_port() for _ in range(3)]
    with ExitStack() as stack:
        at_once = ("--repl-diskless-sync-delay", "0")  # or a replica waits 5 s for others
        master = stack.enter_context(servers.Server("redis", *at_once, port=ports[0]))
        replica = stack.enter_context(
            servers.Server("redis", "--replicaof", f"127.0.0.1 {ports[0]}", port=ports[1])
        )
        sentinel = servers.Server("redis", port=ports[2])
        with open(f"{sentinel.path}.conf", "w", encoding="ascii") as file:
            file.write(
                f"sentinel monitor limits 127.0.0.1 {ports[0]} 1\n"
                "sentinel down-after-milliseconds limits 300\n"
                "sentinel failover-timeout limits 3000\n"
            )
        stack.enter_context(sentinel.sentinel(f"{sentinel.path}.conf"))
        with sentinel.client() as client:
            wait_until(
                "Sentinel finds the replica",
                lambda: client.execute_command("SENTINEL", "REPLICAS", "limits"),
            )
        with replica.client() as client:
            wait_until(
                "the replica finds its master",
                lambda: client.info("replication")["master_link_status"] == "up",
            )
        yield master, replica, sentinel


def test_a_failover_by_sentinel(
    watched: tuple[servers.Server, servers.Server, servers.Server], segment: Segment
) -> None:
    """The replica is asked once it is the master, and knows what was consumed."""
    master, _, sentinel = watched
    cluster = Cluster(
        f"redis+sentinel://127.0.0.1:{sentinel.port}/limits/0",
        on_outage="deny",
        timeout=servers.SLOWEST,
    )
    limiter = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=cluster)
    assert limiter.acquire("key", 90)
    with master.client() as client:
        assert client.wait(1, 5000) == 1
    master.kill()
    # All that is left; refused at once while nobody answers.
    wait_until("another takes over", lambda: limiter.acquire("key", 10), every=0.05)
    assert not limiter.acquire("key")


def test_permits_after_a_failover(
    watched: tuple[servers.Server, servers.Server, servers.Server],
) -> None:
    """Who holds permits goes on holding them, and the new master knows it."""
    master, _, sentinel = watched
    cluster = Cluster(
        f"redis+sentinel://127.0.0.1:{sentinel.port}/limits/0", on_outage="deny", timeout=0.5
    )
    with Flights(cluster, 10, hosts=2, turns=None) as flights:
        flights.want(5, 5, 0, 0)
        flights.until(lambda: flights.total == 10, "one host has all")
        with master.client() as client:
            client.set("last", 1)
            assert client.wait(1, 5000) == 1
        master.kill()
        flights.want(3, 3, 5, 5)
        flights.until(lambda: flights.total == 10, "the other has what the first gave back")
        flights.go_on()
        assert flights.most() == 10


def test_a_password(kind: str, segment: Segment) -> None:
    need(kind)
    port = servers.free_port()
    with servers.Server(kind, "--requirepass", "secret", port=port) as server:
        for url, answers in (
            (f"redis://:secret@127.0.0.1:{port}/0", True),
            (f"redis://:wrong@127.0.0.1:{port}/0", False),
            (f"unix://:secret@{server.path}?db=3", True),
        ):
            cluster = Cluster(url, on_outage="deny")
            limiter = RateLimiter(Window(9), name=f"n{port}", segment=segment, cluster=cluster)
            assert bool(limiter.acquire(url)) == answers, url
            assert "secret" not in cluster.shown and "wrong" not in cluster.shown


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("http://host", "must begin with one of redis://"),
        ("redis://", "must name a host"),
        ("unix://", "must name a socket's path"),
        ("redis+sentinel://host:26379", "must name the service"),
        ("redis://localhost:abc/0", "a port that is none"),
        ("redis+cluster://host:99999", "a port that is none"),
        ("redis+sentinel://host/service/db", "the number of a database"),
        ("rediss://host/x", "the number of a database"),
    ],
)
def test_urls_that_say_too_little(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Cluster(url)


@pytest.mark.parametrize(
    "url",
    ["redis://[::1]/0", "redis://[::1]:6379", "rediss://u:p%2Fw@h:1/", "redis+cluster://a,b:7000"],
)
def test_urls_that_are_right(url: str) -> None:
    Cluster(url).check()


def test_a_url_that_the_library_cannot_use(segment: Segment) -> None:
    for make in (
        lambda cluster: RateLimiter(Window(1), segment=segment, cluster=cluster),
        lambda cluster: ConcurrencyLimiter(1, name="c", segment=segment, cluster=cluster),
    ):
        with pytest.raises(ValueError, match=r"cannot be used: 'redis://u:\*\*\*@host\?foo=bar'"):
            make("redis://u:secret@host?foo=bar")


def test_other_settings_that_are_wrong(monkeypatch: pytest.MonkeyPatch, segment: Segment) -> None:
    with pytest.raises(ValueError, match="on_outage must be one of local, deny, allow"):
        Cluster("redis://host", on_outage="panic")
    with pytest.raises(ValueError, match=r"0\.001 to 60 seconds"):
        Cluster("redis://host", timeout=0)
    with pytest.raises(TypeError, match="number of seconds"):
        Cluster("redis://host", timeout="1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="url must be a str"):
        Cluster(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="braces"):
        Cluster("redis://host", prefix="{x}")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", "redis://user:secret@host")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", "panic")
    with pytest.raises(ValueError, match="on_outage"):
        RateLimiter(Window(1), segment=segment)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", "deny")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="FAST_LITELLM_SHM_CLUSTER_TIMEOUT"):
        RateLimiter(Window(1), segment=segment)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_TIMEOUT", "0.5")
    limiter = RateLimiter(Window(1), segment=segment)
    assert limiter._wallet is not None
    assert limiter._wallet.cluster == Cluster("redis://user:secret@host", "deny", 0.5)
    assert limiter._wallet.cluster.shown == "redis://user:***@host"
