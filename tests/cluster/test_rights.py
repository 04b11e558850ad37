"""A user with exactly the rights that docs/cluster.md names, and what is said where some miss."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import servers
from support.leases import connection_of
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count

HOUR = 3600
DOCS = (Path(__file__).parents[2] / "docs" / "cluster.md").read_text("utf-8")


def documented() -> list[str]:
    """The user's name, and what ACL SETUSER is given."""
    (line,) = re.findall(r"^ACL SETUSER (.+)$", DOCS, re.MULTILINE)
    return str(line).split()


def of_a_cluster() -> list[str]:
    """What its nodes ask for beside that."""
    (found,) = re.findall(r"^On each node of a Redis Cluster also `([^`]+)`", DOCS, re.MULTILINE)
    return str(found).split()


def url_of(server: servers.Server, database: int = 0) -> str:
    return f"redis://limits:s3cr%40t@127.0.0.1:{server.port}/{database}"


def missed(client: Any) -> dict[str, int]:
    """What the user was refused, and how often. (That it tells its version is of no need.)"""
    return {
        each["object"]: int(each["count"])
        for each in client.acl_log()
        if not each["object"].startswith("client|")
    }


@contextmanager
def granting(kind: str, *rights: str, cluster: bool = False) -> Iterator[servers.Server]:
    if not servers.installed(kind):
        pytest.skip(f"there is no {kind}-server here: apt-get install {kind}-server")
    port = servers.free_port(servers.HIGHEST_OF_A_CLUSTER)
    options = ("--cluster-enabled", "yes") * cluster
    with servers.Server(kind, *options, port=port) as server, server.client() as client:
        client.execute_command("ACL", "SETUSER", *rights, ">s3cr@t")
        if cluster:
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            wait_until(
                "the cluster is complete",
                lambda: b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO"),
            )
        yield server


def test_the_documents_name_what_the_warning_names() -> None:
    name, _, _, *rights = documented()
    assert Cluster("redis://limits:secret@host").user == name
    assert Cluster("redis://limits:secret@host").rights.split() == rights
    assert Cluster("redis+cluster://host").rights.split() == rights + of_a_cluster()
    assert Cluster("redis+cluster://host").user == "default"


@pytest.mark.parametrize("where", ["a server", "another database", "a cluster"])
def test_what_is_documented_is_enough(
    kind: str, where: str, segment: Segment, other: Segment
) -> None:
    rights = documented() + of_a_cluster() * (where == "a cluster")
    with granting(kind, *rights, cluster=where == "a cluster") as server:
        url = url_of(server, 3 if where == "another database" else 0)
        if where == "a cluster":
            url = url.replace("redis://", "redis+cluster://")
        cluster = Cluster(url, on_outage="deny", timeout=servers.SLOWEST)
        one, two = (
            RateLimiter(Window(1000, HOUR), name="api", segment=each, cluster=cluster)
            for each in (segment, other)
        )
        assert one.acquire("key") and two.acquire("key")
        wait_until("both hosts are known", lambda: host_count(segment) == host_count(other) == 2)
        # What one was granted and does not use comes back.
        assert sum(map(one.is_allowed, ["key"] * 300)) == 300
        rest = 0

        def all_is_used() -> bool:
            nonlocal rest
            rest += two.is_allowed("key")
            return rest == 1000 - 302

        wait_until("the other gets all the rest", all_is_used, every=0.0001)
        one.reset("key")
        assert one.acquire("key", 500)
        one.refund("key", 100)
        one.charge("key", 100)
        assert one.peek("key")
        one.reset()
        permits = [
            ConcurrencyLimiter(4, name="calls", segment=each, cluster=cluster)
            for each in (segment, other)
        ]
        held = [permits[0].acquire("key") for _ in range(4)]
        assert all(held) and not permits[1].acquire("key")
        for each in held:
            each.release()
        wait_until("the other gets one", lambda: permits[1].acquire("key"), every=0.01).release()
        for limiter in (one, two):
            assert connection_of(limiter).outage is None
        with server.client() as client:
            assert not missed(client)


def test_a_channel_that_is_not_granted(
    kind: str, segment: Segment, other: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    """It counts as away for as long as that; what to grant is told once by a leader, who hears
    nobody, and once when calls go by the policy."""
    rights = [each for each in documented() if not each.startswith("&")]
    with granting(kind, *rights, "resetchannels") as server, server.client() as client:
        cluster = Cluster(url_of(server), on_outage="deny", timeout=servers.SLOWEST)
        with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
            limiter, holder = (
                RateLimiter(Window(100, HOUR), name="api", segment=each, cluster=cluster)
                for each in (segment, other)
            )
            link = connection_of(limiter)
            assert holder.acquire("key", 30)  # and is granted as many again
            # Who gets too little has others asked to give something back, over the channel.
            wait_until("it is away", lambda: (limiter.acquire("key"), link.outage is not None)[1])
            seen = sum(missed(client).values())
            wait_until(
                "it is tried again and again",
                lambda: (limiter.acquire("key"), sum(missed(client).values()) > seen + 20)[1],
            )
            assert link.outage is not None
            client.execute_command("ACL", "SETUSER", "limits", f"&{cluster.prefix}:*")
            wait_until("it is admitted again", lambda: limiter.acquire("other"))
            assert holder.acquire("fresh", 30)
            wait_until("what is wanted back comes", lambda: limiter.acquire("fresh", 70))
    said = [record.getMessage() for record in caplog.records]
    told = [each for each in said if cluster.shown in each]
    refused = [each for each in told if f"ACL SETUSER limits {cluster.rights}" in each]
    # Two leaders; and the limiter, where its leader had not told it before.
    assert 2 <= len(refused) <= 3, told
    assert len(told) - len(refused) == 1 and "answers again" in told[-1], told


def test_a_leader_that_is_not_let_listen(
    kind: str, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    """Calls go on; that it hears nobody is told, once."""
    rights = [each for each in documented() if each != "+subscribe"]
    with granting(kind, *rights) as server, server.client() as client:
        cluster = Cluster(url_of(server), on_outage="deny", timeout=servers.SLOWEST)
        with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
            limiter = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=cluster)
            assert limiter.acquire("key")
            wait_until("it tries again and again", lambda: missed(client).get("subscribe", 0) > 3)
            assert limiter.acquire("other")
    said = [record.getMessage() for record in caplog.records]
    told = [each for each in said if cluster.shown in each]
    assert len(told) == 1 and f"ACL SETUSER limits {cluster.rights}" in told[0], told
