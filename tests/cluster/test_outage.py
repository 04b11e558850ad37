"""While the server is away, and when it is back."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import pytest
from support import servers
from support.fleet import Fleet
from support.leases import tokens_of
from support.waiting import wait_until

from fast_litellm_shm import Limit, RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster, connection, settlement
from fast_litellm_shm.cluster.hosts import host_count

HOUR = 3600


def limiter_of(server: servers.Server, segment: Segment, policy: str, n: int = 100) -> RateLimiter:
    cluster = Cluster(server.url, on_outage=policy, timeout=servers.SLOWEST)
    return RateLimiter(Window(n, HOUR), name="api", segment=segment, cluster=cluster)


def exhausted(limiter: RateLimiter, key: str) -> int:
    """How many fit, until 50 in a row do not."""
    admitted = denied = 0
    while denied < 50:
        found = limiter.is_allowed(key)
        admitted, denied = admitted + found, 0 if found else denied + 1
    return admitted


@pytest.mark.parametrize("gone", ["killed", "frozen"])
def test_deny(server: servers.Server, segment: Segment, gone: str) -> None:
    limiter = limiter_of(server, segment, "deny")
    assert limiter.acquire("key")
    server.kill() if gone == "killed" else server.freeze()
    held = exhausted(limiter, "key")  # what was granted before is the host's
    assert held < 20
    denied = limiter.acquire("key")
    assert not denied and 0 < (denied.retry_after or 0) <= 3
    if gone == "killed":
        server.start()
    else:
        server.thaw()
    wait_until("it is admitted again", lambda: limiter.acquire("key"))
    assert 1 + held + 1 + exhausted(limiter, "key") <= 100 + 1  # the killed one's state is restored


def test_allow(server: servers.Server, segment: Segment) -> None:
    limiter = limiter_of(server, segment, "allow")
    assert exhausted(limiter, "key") == 100
    assert limiter.acquire("other")
    server.kill()
    assert all(limiter.acquire("other") for _ in range(500))


def test_local_is_a_share(server: servers.Server, segment: Segment, segment_name: str) -> None:
    """Of as many hosts as were last seen; what it admits is charged when the server is back."""
    limiter = limiter_of(server, segment, "local")
    assert limiter.acquire("key")
    with server.client() as client:
        wait_until("the leader has told how many hosts there are", lambda: host_count(segment) == 1)
        client.zadd("fast-shm:hosts", {"another": time.time() * 1e6, "third": time.time() * 1e6})
        client.zadd("fast-shm:hosts", {"fourth": time.time() * 1e6})
        wait_until("and again", lambda: host_count(segment) == 4)
    server.freeze()
    assert exhausted(limiter, "fresh") == 25
    denied = limiter.acquire("fresh")
    assert not denied and (denied.retry_after or 0) > HOUR / 2
    server.thaw()
    wait_until(
        "it is back", lambda: limiter.get_remaining("fresh") != 25 and limiter.acquire("probe")
    )
    wait_until("there is room again", lambda: limiter.is_allowed("fresh"))
    # The call that found the server frozen was answered when it thawed, too late: what it was
    # granted is lost.
    assert 70 <= 1 + exhausted(limiter, "fresh") <= 75


def test_other_hosts_are_not_forgotten_with_the_server(
    server: servers.Server, segment: Segment
) -> None:
    """Emptied, it hears of this host first: its share is what it was until the others had time."""
    assert limiter_of(server, segment, "local").acquire("key")
    with server.client() as client:
        client.zadd("fast-shm:hosts", {"another": time.time() * 1e6, "third": time.time() * 1e6})
        wait_until("they are known", lambda: host_count(segment) == 3)
        client.delete("fast-shm:hosts")
        wait_until("this one has told", lambda: client.zcard("fast-shm:hosts") == 1)
        told = client.zrange("fast-shm:hosts", 0, -1, withscores=True)
        wait_until(
            "and once more, so that what it heard is kept by now",
            lambda: client.zrange("fast-shm:hosts", 0, -1, withscores=True) != told,
        )
        assert host_count(segment) == 3
        wait_until("they are gone", lambda: host_count(segment) == 1)


def test_local_denies_what_is_known_to_be_used(server: servers.Server, segment: Segment) -> None:
    limiter = limiter_of(server, segment, "local")
    assert exhausted(limiter, "key") == 100
    wait_until("the leader has told how many hosts there are", lambda: host_count(segment) == 1)
    server.kill()
    wait_until("calm", lambda: not tokens_of(limiter).is_refused(b"key"))
    assert exhausted(limiter, "key") == 0


def test_a_host_that_never_saw_the_server_denies(segment: Segment) -> None:
    cluster = Cluster("redis://127.0.0.1:1", timeout=0.1)
    limiter = RateLimiter(Limit(10), name="api", segment=segment, cluster=cluster)
    with pytest.warns(RuntimeWarning, match="not known what is left"):
        assert not limiter.acquire("key")


def test_it_is_told_once_each_way(
    server: servers.Server, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    limiter = limiter_of(server, segment, "deny")
    limiter.acquire("key")
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        server.kill()
        exhausted(limiter, "key")
        wait_until("denied", lambda: not limiter.acquire("other"))
        server.start()
        wait_until("admitted", lambda: limiter.acquire("other"))
        exhausted(limiter, "key")
    said = [record.getMessage() for record in caplog.records]
    told = [each for each in said if server.url in each]  # links of other tests may yet notice
    assert len(told) == 2, told
    assert "does not answer" in told[0] and "on_outage='deny'" in told[0]
    assert "answers again" in told[1]


def test_a_server_that_lost_everything_learns_it_from_the_hosts(server: servers.Server) -> None:
    """Restarted empty under load: what the hosts know of the key is what it was."""
    with Fleet(
        Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST), [Window(1000, HOUR)]
    ) as fleet:
        fleet.until(lambda: fleet.total >= 1000, "all of the limit is used")
        fleet.until(lambda: known(fleet, server) == [1000] * 4, "all hosts know that")
        server.kill()
        server.start()
        fleet.until(lambda: server.calls() >= 8, "hosts ask again")
        fleet.go_on(50_000)
        assert fleet.total == 1000


def known(fleet: Fleet, server: servers.Server) -> list[int]:
    """How much of the limit each host has been told to be used."""
    found = []
    for name in fleet.names:
        segment = Segment(name, create=False)
        limiter = RateLimiter(Window(1000, HOUR), name="fleet", segment=segment, cluster=server.url)
        request, _ = tokens_of(limiter).request("look", b"key", (0,))
        found.append(request.used[0])
    return found


def test_flushed_scripts_are_loaded_again(server: servers.Server, segment: Segment) -> None:
    limiter = limiter_of(server, segment, "deny")
    assert limiter.acquire("a")
    with server.client() as client:
        client.script_flush()
    assert limiter.acquire("b")


def test_a_read_only_server_is_away(
    server: servers.Server,
    segment: Segment,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For as long as it is, though it answers: told once each way."""
    probe, tries = connection.Connection.probe, 0

    def counted(given: connection.Connection) -> None:
        nonlocal tries
        probe(given)
        tries += 1

    monkeypatch.setattr(connection.Connection, "probe", counted)
    limiter = limiter_of(server, segment, "deny")
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        with server.client() as client:
            client.replicaof("127.0.0.1", servers.free_port())
        assert not limiter.acquire("key")
        wait_until("it is tried again and again", lambda: (limiter.acquire("key"), tries > 15)[1])
        with server.client() as client:
            client.replicaof("NO", "ONE")
        wait_until("it is admitted again", lambda: limiter.acquire("key"))
    said = [record.getMessage() for record in caplog.records]
    told = [each for each in said if server.url in each]
    assert len(told) == 2, told
    assert "does not answer" in told[0] and "answers again" in told[1]


def test_a_leader_goes_on_whatever_went_wrong(
    server: servers.Server,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The connection is lost while the redis library is being replaced, say: the host is heard
    again when both are back."""
    assert limiter_of(server, segment, "deny").acquire("key")

    def heard() -> bool:
        with server.client() as client:
            return bool(client.zcard("fast-shm:hosts"))

    wait_until("it leads", heard)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "redis", None)
        server.kill()
        wait_until("it could not", lambda: "leading this host failed" in caplog.text)
    server.start()
    wait_until("it leads again", heard)


def test_trying_again_goes_on_whatever_went_wrong(
    server: servers.Server,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    limiter = limiter_of(server, segment, "deny")
    assert limiter.acquire("key")
    owe, tries = settlement.keep, 0

    def fails_at_first(given: connection.Connection) -> Any:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise MemoryError
        return owe(given)

    monkeypatch.setattr(settlement, "keep", fails_at_first)
    server.kill()
    assert exhausted(limiter, "key") < 20
    wait_until("it was tried", lambda: tries > 3)
    said = "settling, or refilling in advance, failed"  # by another thread, after its try
    wait_until("it was logged", lambda: said in caplog.text)
    server.start()
    wait_until("it is admitted again", lambda: limiter.acquire("key"))
