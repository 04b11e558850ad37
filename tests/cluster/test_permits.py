"""Permits in flight over many hosts: never more than n, and all of them can be used."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support import servers
from support.flights import Flights
from support.leases import permits_of
from support.names import remove, unique_name
from support.permits import Holder
from support.relay import Relay
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window, cli
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.exceptions import PermitTimeoutError

MOST = 100


@pytest.fixture
def hosts(
    server: servers.Server, segment: Segment, other: Segment
) -> tuple[ConcurrencyLimiter, ConcurrencyLimiter]:
    return _limiter(segment, server.url), _limiter(other, server.url)


def _limiter(segment: Segment, cluster: Cluster | str, most: int = 5) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(most, name="api", segment=segment, cluster=cluster)


_taken: list[Any] = []


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    yield
    while _taken:
        _taken.pop().release()


def take(limiter: ConcurrencyLimiter, key: str = "key") -> Any:
    _taken.append(limiter.acquire(key))
    return _taken[-1]


def wait(limiter: ConcurrencyLimiter) -> Any:
    _taken.append(limiter.wait("key", timeout=30))
    return _taken[-1]


# the calls


def test_at_most_n_over_all_hosts(hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter]) -> None:
    first, second = hosts
    permits = [take(first) for _ in range(3)] + [take(second) for _ in range(2)]
    assert all(permits)
    for each in hosts:
        denied = take(each)
        assert not denied and denied.decision.retry_after == 0.0
        assert denied.in_flight == each.in_flight("key")
    assert first.in_flight("key") == 3 and first.max_in_flight == 5
    assert take(first, "other") and take(second, "other")
    assert permits[0].release() and not permits[0].release()
    assert wait(second)


def test_wait_slot_and_async(hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter]) -> None:
    first, second = hosts
    held = [take(first) for _ in range(5)]
    assert not second.wait("key", timeout=0.05)
    timer = threading.Timer(0.05, held[0].release)
    timer.start()
    with second.slot("key", timeout=30) as permit:
        assert permit
    timer.join()

    async def calls() -> None:
        (await first.acquire_async("none")).release()
        async with second.slot_async("key", timeout=30) as permit:
            assert permit
        waiting = asyncio.create_task(second.wait_async("key", timeout=30))
        (await waiting).release()

    asyncio.run(calls())


def test_a_cancelled_call_holds_nothing(
    hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter],
) -> None:
    first, second = hosts

    async def cancelled() -> None:
        for _ in range(20):
            task = asyncio.create_task(first.acquire_async("key"))
            await asyncio.sleep(0)
            task.cancel()
            (found,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(found, BaseException):
                found.release()  # it needed no server

    asyncio.run(cancelled())
    permits = [wait(second) for _ in range(5)]
    assert all(permits)


def test_pickle_and_the_variable(
    server: servers.Server, segment: Segment, other: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code with it and without."""

    def taken() -> list[int]:
        found = []
        for each in (segment, other):
            limiter = ConcurrencyLimiter(5, name="same", segment=each)
            permits = [take(limiter) for _ in range(5)]
            found.append(sum(map(bool, permits)))
        return found

    assert taken() == [5, 5]
    for permit in _taken:
        permit.release()
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    assert taken() == [5, 0]
    copy = pickle.loads(pickle.dumps(_limiter(segment, server.url)))
    assert permits_of(copy).cluster.url == server.url
    held = [take(copy) for _ in range(5)]
    assert all(held) and not take(_limiter(other, server.url))


@pytest.mark.parametrize("preload", [False, True])
def test_a_fork_goes_on(
    hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter], preload: bool
) -> None:
    """Threads and connections stay in the parent; what a child holds, it tells by itself."""
    first, second = hosts
    if preload:
        assert first.acquire("key").release()
    told, theirs = os.pipe()
    go, stop = os.pipe()
    child = os.fork()
    if not child:
        held = [take(first) for _ in range(5)]
        os.write(theirs, b"%d" % sum(map(bool, held)))
        os.read(go, 1)
        os._exit(0)
    assert os.read(told, 1) == b"5"
    time.sleep(10.5)  # longer than a host counts that says nothing
    assert not take(second)
    os.write(stop, b"x")
    os.waitpid(child, 0)
    for each in (told, theirs, go, stop):
        os.close(each)
    assert wait(second)


def test_another_n(server: servers.Server, segment: Segment, other: Segment) -> None:
    """Whoever asks last sets it for all; a lower one holds when all hosts have been heard."""
    first = _limiter(segment, server.url, 5)
    held = [take(first) for _ in range(5)]
    assert all(held)
    second = _limiter(other, server.url, 7)
    more = [take(second) for _ in range(2)]
    assert all(more) and not take(second)
    third = _limiter(segment, server.url, 2)
    for permit in held[:4]:
        permit.release()
    # Three are held, which the heartbeat tells.
    wait_until("none is to be had", lambda: not third.acquire("key").release(), every=0.05)
    more[0].release()
    assert not third.wait("key", timeout=0.3)
    more[1].release()
    assert wait(third)


def test_what_a_time_out_says(
    server: servers.Server, hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter], segment: Segment
) -> None:
    """That none is held here does not mean that some are free."""
    first, second = hosts
    assert all(take(first) for _ in range(5))
    said = "of 5 over all hosts this one holds 0; "
    with pytest.raises(PermitTimeoutError, match=said), second.slot("key", timeout=0.05):
        pass
    server.kill()
    denies, said = _limiter(segment, Cluster(server.url, on_outage="deny")), "not answer .*'deny'"
    with pytest.raises(PermitTimeoutError, match=said), denies.slot("none", timeout=0.05):
        pass
    assert 0 < (denies.acquire("none").decision.retry_after or 0) < 10


def test_a_full_segment_denies_without_asking(
    server: servers.Server, request: pytest.FixtureRequest
) -> None:
    """What the server granted could not be put in; nobody waits for who cannot be noted either."""
    name = unique_name("full")
    request.addfinalizer(lambda: remove(name))
    segment = Segment(name, capacity=1)
    local = RateLimiter(Window(5, per=3600), name="filler", segment=segment, on_full="deny")
    limiter = _limiter(segment, server.url)
    assert take(limiter)
    denials = 0
    for i in range(10_000):
        denials = 0 if local.acquire(f"{i}") else denials + 1
        if denials == 200:
            break
    assert denials == 200, "it was never full"
    with server.client() as client:
        before = _scripts_run(client)
        assert not any(take(limiter, f"another {i}") for i in range(100))
        assert _scripts_run(client) - before < 50  # of the heartbeat and the leader


def _scripts_run(client: Any) -> int:
    return sum(v["calls"] for k, v in client.info("commandstats").items() if "evalsha" in k)


def test_fast_shm_reset_leaves_what_was_granted(
    hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter], segment: Segment
) -> None:
    first, second = hosts
    permits = [take(first) for _ in range(3)]
    assert all(permits) and all(take(second) for _ in range(2))
    assert not take(first)  # so the server has heard of what it granted
    for arguments in (["--all"], ["--limiter", "api"], ["key"]):
        assert cli.main(["reset", "--name", segment.name, *arguments]) == 0
        permits.pop().release()
        _taken.append(first.wait("key", timeout=3))  # the server would not listen for 4 s
        assert _taken[-1]
    assert cli.main(["reset", "--name", segment.name, "--limiter", "api (leases)", "key"]) == 1


def test_a_host_without_the_key_has_no_share_of_it(
    server: servers.Server,
    hosts: tuple[ConcurrencyLimiter, ConcurrencyLimiter],
    request: pytest.FixtureRequest,
) -> None:
    """A recall goes to all hosts. Of those that know nothing of the key none is counted."""
    first, second = hosts
    name = unique_name("third")
    request.addfinalizer(lambda: remove(name))
    third = _limiter(Segment(name, capacity=1000), server.url)
    take(third, "other")
    assert all(take(first) for _ in range(5))
    with server.client() as client:
        wait_until(
            "the first and the third listen",
            lambda: client.pubsub_numsub("fast-shm:recall")[0][1] == 2,
        )
        look = client.register_script(_HOSTS_COUNTED)

        def recalled() -> bool:
            assert not take(second)
            return _recalls(client) >= 3

        wait_until("all were asked to give back, thrice", recalled, every=0.01)
        assert look(Cluster(server.url).keys_of("api", "key")[1:]) == 2


_HOSTS_COUNTED = """
local found = 0
for _ in pairs(cmsgpack.unpack(redis.call('GET', KEYS[1])).h) do found = found + 1 end
return found
"""


def _recalls(client: Any) -> int:
    return int(client.info("commandstats").get("cmdstat_publish", {"calls": 0})["calls"])


# many hosts, each with many workers


def have_told(server: servers.Server, held: int) -> None:
    """Until the server has heard from all hosts together that so many are held."""
    with server.client() as client:
        look = client.register_script(_TOLD)
        wait_until(
            f"the hosts have told that they hold {held}",
            lambda: look(Cluster(server.url).keys_of("flights", "key")[1:]) >= held,
            every=0.05,
        )


_TOLD = """
local found, state = 0, redis.call('GET', KEYS[1])
for _, host in pairs(state and cmsgpack.unpack(state).h or {}) do found = found + host.a end
return found
"""


@pytest.mark.parametrize("shape", ["even", "skewed", "crowded"])
def test_never_more_than_n_and_all_of_them(kind: str, shape: str) -> None:
    wanted = {"even": [13] * 8, "skewed": [80, 14, 2, 1, 1, 1, 1, 1], "crowded": [100] * 8}[shape]
    with servers.Server(kind) as server, Flights(server.url, MOST) as flights:
        flights.want(*wanted)
        flights.until(lambda: flights.total >= 95, "nearly all are held")
        flights.go_on()
        flights.want(*reversed(wanted))
        flights.until(lambda: flights.total >= 95, "nearly all are held by others")
        flights.want(0)
        flights.until(lambda: flights.total == 0, "none is held")
        assert 95 <= flights.most() <= MOST


def test_who_waits_is_not_starved(server: servers.Server) -> None:
    """One host would take each permit back that it releases."""
    with Flights(server.url, 10, hosts=2, workers=1, turns=0.01) as flights:
        flights.want(10, 0)
        flights.until(lambda: flights.total >= 10, "one has all")
        flights.want(20, 5)
        flights.until(lambda: flights.held[1] >= 3, "the other has some")
        assert flights.most() <= 10


def test_fewer_permits_than_hosts_go_round(server: servers.Server) -> None:
    """Workers of a host that wake each other would keep the only one for good."""
    with Flights(server.url, 1, hosts=3, workers=2, turns=0.005) as flights:
        flights.want(1, 1, 0, 0, 0, 0)
        flights.until(lambda: flights._noted[0] > 50, "one host has it")
        flights.want(1)
        flights.until(
            lambda: min(sum(flights._noted[2 * host : 2 * host + 2]) for host in range(3)) > 60,
            "all hosts have had it, again and again",
        )
        assert flights.most() == 1


def test_unused_ones_come_back_when_they_are_wanted(server: servers.Server) -> None:
    with Flights(server.url, MOST, hosts=2, turns=None) as flights:
        flights.want(50, 50, 0, 0)
        flights.until(lambda: flights.total == MOST, "all are held")
        flights.want(1, 0, 0, 0)
        flights.until(lambda: flights.total == 1, "nearly none is")
        flights.want(1, 0, 50, 49)
        flights.until(lambda: flights.total == MOST, "the other host has them")
        assert flights.most() <= MOST


def test_killed_workers_and_a_killed_host(server: servers.Server) -> None:
    """What they held comes back; to others no sooner than it is known that they are gone."""
    with Flights(server.url, MOST, hosts=2, turns=None) as flights:
        flights.want(40, 40, 10, 10)
        flights.until(lambda: flights.total == MOST, "all are held")
        flights.kill(0)
        flights.want(0, 60, 20, 20)
        flights.until(lambda: flights.total == MOST, "what the dead worker held is held again")
        flights.kill(1)
        flights.want(0, 0, 50, 50)
        flights.until(lambda: flights.total == MOST, "what the dead host held is held again")
        assert flights.most() <= MOST


def test_stopped_holder_and_leader(server: servers.Server) -> None:
    """While a worker of their host goes on, they keep what they hold; nobody waits for them."""
    with Flights(server.url, 20, hosts=2, workers=3, turns=None) as flights:
        flights.want(4, 4, 2, 3, 3, 0)
        flights.until(lambda: flights.total == 16, "some are held")
        segment = Segment(flights.names[0], create=False)
        flights.until(lambda: lib.fshm_leader(segment._handle) > 0, "a worker leads the host")
        leader = int(lib.fshm_leader(segment._handle))
        victim = [process.pid for process in flights.processes].index(leader)
        flights.kill(victim, signal.SIGSTOP)
        mine = [4, 4, 2, 3, 3, 20]
        flights.want(*mine)
        flights.until(lambda: flights.total == 20, "all are held")
        time.sleep(11)  # longer than a host counts that says nothing
        assert flights.total == 20
        flights.kill(victim, signal.SIGCONT)
        flights.go_on()
        assert flights.most() <= 20


def test_the_leader_tells_for_workers_that_are_stopped(
    server: servers.Server, segment: Segment, other: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This process leads the host, and has never used the key itself."""
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    here, there = (ConcurrencyLimiter(20, name="held", segment=each) for each in (segment, other))
    take(here, "another").release()
    deadline = time.monotonic() + 60
    while lib.fshm_leader(segment._handle) != os.getpid():
        assert time.monotonic() < deadline, "this process does not lead"
        time.sleep(0.01)  # a thread does it
    with Holder(segment.name, 20, "key", 5) as holder:
        assert holder.held == 5
        holder.kill(signal.SIGSTOP)
        assert all(wait(there) for _ in range(15))
        end = time.monotonic() + 11  # longer than a host counts that says nothing
        while time.monotonic() < end:
            assert not take(there)
            time.sleep(0.05)
        holder.kill(signal.SIGCONT)
        assert holder.ask("release") == 5
        assert all(wait(there) for _ in range(5))
        assert not take(there)


@pytest.mark.parametrize("policy", ["deny", "allow", "local"])
def test_while_the_server_is_away(server: servers.Server, policy: str) -> None:
    """Longer than what was granted lasts. Nobody loses what it holds; then all is known again."""
    cluster = Cluster(server.url, on_outage=policy, timeout=servers.SLOWEST)
    with Flights(cluster, 20, hosts=2, turns=None) as flights:
        flights.want(4, 2, 3, 0)
        flights.until(lambda: flights.total == 9, "some are held")
        segments = [Segment(name, create=False) for name in flights.names]
        flights.until(lambda: all(host_count(each) == 2 for each in segments), "they are known")
        server.kill()
        time.sleep(12)
        flights.want(20, 20, 20, 20)
        if policy == "deny":
            flights.go_on(30)
            assert flights.total == 9
        else:
            each = 10 if policy == "local" else 20
            flights.until(lambda: flights.total == 2 * each, "each host has its share")
            flights.go_on(30)
            assert flights.total == 2 * each
        server.start()
        if policy == "deny":
            flights.until(lambda: flights.total == 20, "all are held")
        flights.want(3, 3, 3, 3)
        flights.until(lambda: flights.total == 12, "fewer are wanted")
        have_told(server, 12)
        time.sleep(4)  # it is back for all of them
        flights.want(20, 20, 20, 20)
        flights.until(lambda: flights.total == 20, "all are held")
        flights.go_on()
        assert flights.total == 20
        assert flights.most() <= (40 if policy == "allow" else 20)


def test_a_server_that_lost_everything_learns_it_from_the_hosts(server: servers.Server) -> None:
    with Flights(server.url, 20, hosts=3, turns=None) as flights:
        flights.want(10, 4, 4, 2, 0, 0)
        flights.until(lambda: flights.total == 20, "all are held")
        with server.client() as client:
            client.flushall()
        have_told(server, 20)  # when less than 5 of 8 seconds are left
        flights.want(10, 4, 4, 2, 5, 5)
        flights.go_on()
        assert flights.most() == 20


def test_a_host_that_is_cut_off_and_joined_again(server: servers.Server) -> None:
    """Beyond its lease it takes none, and what it held is granted to others: then both are in
    flight. Once it is back, it is counted."""
    with Relay(server.path) as relay:
        clusters = [
            Cluster(f"unix://{path}", on_outage="deny", timeout=servers.SLOWEST)
            for path in (relay.path, server.path)
        ]
        with Flights(clusters, 10, hosts=2, turns=None) as flights:
            flights.want(3, 3, 2, 2)
            flights.until(lambda: flights.total == 10, "all are held")
            relay.cut()
            flights.want(20, 20, 20, 20)
            flights.until(lambda: sum(flights.held[2:]) == 10, "the others have all that is known")
            assert sum(flights.held[:2]) == 6
            relay.join()
            have_told(server, 16)
            time.sleep(3)  # it is back for all of them
            flights.want(3, 3, 0, 0)
            flights.until(lambda: flights.total == 6, "the others have released theirs")
            flights.want(3, 3, 20, 20)
            flights.until(lambda: flights.total == 10, "all are held")
            flights.go_on()
            assert flights.total == 10
            assert flights.most() == 16
