"""Redis Cluster: keys spread over nodes, which move, do not answer, and are replaced."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
from support import green, servers
from support.children import run_one
from support.fleet import Fleet
from support.flights import Flights
from support.leases import connection_of, tokens_of
from support.waiting import wait_until

from fast_litellm_shm import RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster, connection
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.cluster.link import UnreachableError

HOUR = 3600
SLOTS = 16384


def _is_complete(client: Any) -> bool:
    return b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")


def _started(stack: ExitStack, kind: str, count: int, patience: int) -> list[servers.Server]:
    """So many nodes that do not know each other. patience: ms until one counts as failed."""
    found = []
    for _ in range(count):
        port = servers.free_port(servers.HIGHEST_OF_A_CLUSTER)
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", str(patience))
        found.append(stack.enter_context(servers.Server(kind, *options, port=port)))
    return found


def _joined(nodes: list[servers.Server], primaries: int) -> None:
    for i, node in enumerate(nodes):
        with node.client() as client:
            if i < primaries:
                first, last = i * SLOTS // primaries, (i + 1) * SLOTS // primaries - 1
                client.execute_command("CLUSTER", "ADDSLOTSRANGE", first, last)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            for other in nodes[:i]:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
    for node in nodes:
        with node.client() as client:
            wait_until("the nodes find each other", partial(_is_complete, client))


@pytest.fixture
def nodes(kind: str) -> Iterator[list[servers.Server]]:
    """A cluster of three nodes, complete. None of them ever counts as failed."""
    with ExitStack() as stack:
        found = _started(stack, kind, 3, 60_000)
        _joined(found, 3)
        yield found


def url_of(nodes: list[servers.Server]) -> str:
    return f"redis+cluster://127.0.0.1:{nodes[0].port},127.0.0.1:{nodes[1].port}"


def limiter_of(nodes: list[servers.Server], segment: Segment, policy: str = "deny") -> RateLimiter:
    cluster = Cluster(url_of(nodes), on_outage=policy, timeout=servers.SLOWEST)
    return RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=cluster)


def slot_of(limiter: RateLimiter, key: str) -> int:
    request, _ = tokens_of(limiter).request("look", key.encode(), (0,))
    client = connection_of(limiter).client()
    return int(client.keyslot(request.state_key(connection_of(limiter).cluster.prefix)))


def key_on(limiter: RateLimiter, node: int, start: str = "key") -> str:
    """One that the first, second or third node of three keeps."""
    keys = (f"{start} {i}" for i in range(1000))
    return next(key for key in keys if slot_of(limiter, key) * 3 // SLOTS == node)


def test_a_cluster_of_three_nodes(nodes: list[servers.Server], segment: Segment) -> None:
    """Keys spread over the nodes, and what one host holds comes back over any of them."""
    with Fleet(url_of(nodes), [Window(1000, HOUR)], hosts=3, attempts=[None, 20, 20]) as fleet:
        fleet.until(lambda: fleet.total >= 1000, "all of the limit is used")
        fleet.go_on()
        assert fleet.total == 1000
    limiter = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=url_of(nodes))
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
    with Flights(url_of(nodes), 20, hosts=2, turns=None) as flights:
        flights.want(10, 10, 0, 0)
        flights.until(lambda: flights.total == 20, "one host has all")
        flights.want(3, 0, 9, 8)
        flights.until(lambda: flights.total == 20, "the other has nearly all")
        flights.go_on()
        assert flights.most() <= 20


def _counted(node: servers.Server, command: str) -> int:
    with node.client() as client:
        return int(client.info("commandstats").get(f"cmdstat_{command}", {}).get("calls", 0))


def test_a_node_that_does_not_answer_is_asked_once(
    nodes: list[servers.Server], segment: Segment
) -> None:
    """And no other one is asked who has its keys: a call waits for one answer, and what one did
    that came too late, it did once."""
    limiter = limiter_of(nodes, segment)
    key = key_on(limiter, 2)
    cluster = connection_of(limiter).cluster
    alone = connection.Connection(cluster, segment, lambda _: None)  # no thread tries it again
    request, _ = tokens_of(limiter).request("single", key.encode(), (10,))
    assert alone.call([request])[0].admitted
    looked = [_counted(node, "cluster|slots") for node in nodes[:2]]
    nodes[2].freeze()
    with pytest.raises(UnreachableError, match="TimeoutError"):
        alone.call([request])
    assert [_counted(node, "cluster|slots") for node in nodes[:2]] == looked
    nodes[2].thaw()
    assert limiter.get_remaining(key) == 80


def test_a_node_that_is_away(
    nodes: list[servers.Server],
    segment: Segment,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All keys go by the policy until it is back, however often the others answer meanwhile; and
    that is told once each way."""
    probe, tries = connection.Connection.probe, 0

    def counted(given: connection.Connection) -> None:
        nonlocal tries
        probe(given)
        tries += 1

    monkeypatch.setattr(connection.Connection, "probe", counted)
    limiter = limiter_of(nodes, segment)
    keys = [key_on(limiter, node) for node in range(3)]
    assert all(limiter.acquire(key, 60) for key in keys)
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        nodes[2].freeze()
        others = [f"other {i}" for i in range(30)]
        wait_until("it is missed", lambda: not all(limiter.acquire(key) for key in others))
        since = tries
        wait_until(
            "it is tried again and again",
            lambda: (list(map(limiter.is_allowed, others)), tries > since + 8)[1],
        )
        assert connection_of(limiter).outage is not None
        nodes[2].thaw()
        wait_until("it is back", lambda: all(limiter.acquire(key) for key in keys))
    said = [record.getMessage() for record in caplog.records]
    told = [each for each in said if url_of(nodes) in each]
    assert len(told) == 2, told
    assert "does not answer" in told[0] and "answers again" in told[1]


def test_a_key_that_moves(nodes: list[servers.Server], segment: Segment) -> None:
    """It is asked for where its slot moves to, and where it has moved."""
    limiter = limiter_of(nodes, segment)
    key = key_on(limiter, 0)
    slot = slot_of(limiter, key)
    ids = []
    for node in nodes:
        with node.client() as client:
            ids.append(client.execute_command("CLUSTER", "MYID").decode())
    with nodes[1].client() as client:
        client.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[0])
    with nodes[0].client() as client:
        client.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[1])
    assert limiter.acquire(key, 60)  # of a key that is not there a node says: ASK the other
    assert not limiter.acquire(key, 60)
    for node in (nodes[1], nodes[0], nodes[2]):
        with node.client() as client:
            client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", ids[1])
    assert limiter.acquire(key, 40)  # MOVED
    assert connection_of(limiter).outage is None
    with nodes[1].client() as client:
        assert client.execute_command("CLUSTER", "COUNTKEYSINSLOT", slot) == 1


@pytest.fixture
def replicated(kind: str) -> Iterator[list[servers.Server]]:
    """Three nodes, which count as failed after two seconds, and a replica of the third."""
    with ExitStack() as stack:
        found = _started(stack, kind, 4, 2000)
        _joined(found, 3)
        with found[2].client() as client:
            place = client.execute_command("CLUSTER", "MYID")
        with found[3].client() as client:
            client.execute_command("CLUSTER", "REPLICATE", place)
            wait_until(
                "the replica finds its primary",
                lambda: client.info("replication")["master_link_status"] == "up",
            )
        yield found


@pytest.mark.parametrize("gone", ["killed", "frozen"])
def test_a_replica_takes_the_place_of_a_node(
    replicated: list[servers.Server], segment: Segment, gone: str
) -> None:
    """It is found, and knows what was consumed."""
    _, _, primary, replica = replicated
    limiter = limiter_of(replicated, segment)
    key = key_on(limiter, 2)
    assert limiter.acquire(key, 60)
    with primary.client() as client:
        assert client.wait(1, 5000) == 1
    primary.kill() if gone == "killed" else primary.freeze()
    wait_until("it takes over", lambda: limiter.acquire(key, 40), every=0.05)
    assert not limiter.acquire(key)
    with replica.client() as client:
        assert client.info("replication")["role"] == "master"


def test_a_replica_is_told_what_was_admitted_meanwhile(
    replicated: list[servers.Server], segment: Segment
) -> None:
    limiter = limiter_of(replicated, segment, "local")
    key = key_on(limiter, 2)
    assert limiter.acquire(key_on(limiter, 2, "other"))
    wait_until("it is known how many hosts there are", lambda: host_count(segment) == 1)
    replicated[2].freeze()
    assert limiter.acquire(key, 30)
    found = connection_of(limiter)
    assert found.outage is not None
    wait_until("it takes over", lambda: found.outage is None)
    with replicated[3].client() as client:
        assert client.info("replication")["role"] == "master"
    # (Less, where what the host knew of the key was not what the server did: both are told.)
    assert limiter.get_remaining(key) <= 70


@pytest.mark.parametrize("hub", green.HUBS)
def test_greenlets_connect_at_once(hub: str, nodes: list[servers.Server], segment: Segment) -> None:
    """The first to call looks for the nodes, and the others run meanwhile."""
    admitted, _ = run_one(green.over_hosts, hub, segment.name, url_of(nodes), 1, 10, 5)
    assert sum(admitted) == 50
