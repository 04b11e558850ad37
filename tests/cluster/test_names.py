"""Keys at the server: nobody can choose their slot or meet another one's, and where names are not
to be kept, none stands there."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from redis.crc import key_slot
from support import servers
from support.leases import connection_of, tokens_of
from support.names import remove, unique_name
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster, names

HOUR = 3600


def rates(prefix: str, limiter: bytes, key: bytes) -> bytes:
    return names.state_key(prefix, names.RATES, limiter, key)


def test_keys_spread_over_the_slots_whatever_is_in_them() -> None:
    """What stands between the first braces decides the slot: once the client's own text."""
    for shape in (b"a}%d", b"{x}%d", b"}%d", b"%d", b"{%d", b"{}%d"):
        slots = {key_slot(rates("fast-shm", b"api", shape % i)) for i in range(200)}
        assert len(slots) > 190, shape
    limiters = {key_slot(rates("fast-shm", b"a}{%d" % i, b"key")) for i in range(200)}
    assert len(limiters) > 190


def test_no_two_keys_are_one() -> None:
    parts = (b"", b"a", b"a:b", b"a/b", b"a%2Fb", b"rates", b"permits", b"{", b"}", b"a}", b"%7B")
    prefixes = (
        "fast-shm",
        "fast-shm:permits",
        "fast-shm:rates",
        "fast-shm:rates:a",
        "p:hosts",
        "p",
    )
    found: dict[bytes, Any] = {}
    for prefix in prefixes:
        for kind in (names.RATES, names.PERMITS):
            for limiter in parts:
                for key in parts:
                    place = (prefix, kind, limiter, key)
                    name = names.state_key(*place)
                    assert found.setdefault(name, place) == place
        for own in ("hosts", "probe", "probe:1", "recall"):
            assert found.setdefault(f"{prefix}:{own}".encode(), own) is own
    for prefix in prefixes:  # nor does resetting a limiter find those of others
        for limiter in parts:
            start = names.start(prefix, names.RATES, limiter)
            met = {found[name][:3] for name in found if name.startswith(start)}
            assert met == {(prefix, names.RATES, limiter)}


def test_a_prefix_that_was_the_permits_own(
    server: servers.Server, segment: Segment, other: Segment
) -> None:
    """A rate of ``fast-shm:permits`` lay at the key of a permit of ``fast-shm``, and an error put
    the whole server away."""
    rate, permit = (
        Cluster(server.url, on_outage="deny", prefix=prefix, timeout=servers.SLOWEST)
        for prefix in ("fast-shm:permits", "fast-shm")
    )
    limiter = RateLimiter(Window(5, HOUR), name="api", segment=segment, cluster=rate)
    permits = ConcurrencyLimiter(2, name="api", segment=other, cluster=permit)
    for _ in range(3):
        assert limiter.acquire("key")
        with permits.acquire("key") as held:
            assert held
    assert connection_of(limiter).outage is None


@contextmanager
def watched(server: servers.Server) -> Any:
    """All that is said to the server meanwhile, as MONITOR tells it."""
    said: list[str] = []
    with server.client() as client, client.monitor() as monitor:
        ended = threading.Event()

        def listen() -> None:
            while not ended.is_set():
                try:
                    said.append(str(monitor.next_command()))
                except Exception:
                    return

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        yield said
        ended.set()
        with server.client() as other:
            other.ping()
        thread.join(5)


@pytest.mark.parametrize("kept", ["hashed", "off"])
def test_no_name_stands_there(
    server: servers.Server, request: pytest.FixtureRequest, kept: str
) -> None:
    """And hosts still give back what others want."""
    named = [unique_name("named") for _ in range(2)]
    for each in named:
        request.addfinalizer(partial(remove, each))
    segments = [Segment(each, capacity=1000, names=kept) for each in named]
    cluster = Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST)
    key = "sk-s3cr3t"
    with watched(server) as said:
        one, two = (
            RateLimiter(Window(1000, HOUR), name="api", segment=each, cluster=cluster)
            for each in segments
        )
        assert sum(map(one.is_allowed, [key] * 300)) == 300
        rest = 0

        def all_is_used() -> bool:
            nonlocal rest
            rest += two.is_allowed(key)
            return rest == 700

        wait_until("the other gets all the rest", all_is_used, every=0.0001)
        permits = [
            ConcurrencyLimiter(4, name="calls", segment=each, cluster=cluster) for each in segments
        ]
        held = [permits[0].acquire(key) for _ in range(4)]
        assert all(held) and not permits[1].acquire(key)
        for permit in held:
            permit.release()
        wait_until("the other gets one", lambda: permits[1].acquire(key), every=0.01).release()
        with server.client() as client:
            stored = [(name, client.dump(name)) for name in client.scan_iter()]
            slow = client.slowlog_get(1000)
        wait_until("all of it was heard", lambda: len(said) > 10)
    assert len(stored) >= 2
    assert "s3cr3t" not in repr(stored) + repr(said) + repr(slow)
    assert tokens_of(two).reset_all() == 1
    assert one.acquire(key) and two.acquire(key)


@pytest.mark.parametrize("kept", ["plain", "off"])
def test_an_empty_key_is_given_back_too(
    server: servers.Server, request: pytest.FixtureRequest, kept: str
) -> None:
    named = [unique_name("empty") for _ in range(2)]
    for each in named:
        request.addfinalizer(partial(remove, each))
    one, two = (
        RateLimiter(
            Window(1000, HOUR),
            name="api",
            segment=Segment(each, capacity=1000, names=kept),
            cluster=Cluster(server.url, on_outage="deny", timeout=servers.SLOWEST),
        )
        for each in named
    )
    assert sum(map(one.is_allowed, [b""] * 300)) == 300
    rest = 0

    def all_is_used() -> bool:
        nonlocal rest
        rest += two.is_allowed(b"")
        return rest == 700

    wait_until("the other gets all the rest", all_is_used, every=0.0001)


def test_hosts_that_keep_names_and_hosts_that_do_not_count_together(
    server: servers.Server, segment: Segment, request: pytest.FixtureRequest
) -> None:
    name = unique_name("hashed")
    request.addfinalizer(lambda: remove(name))
    hashed = Segment(name, capacity=1000, names="hashed")
    one, two = (
        RateLimiter(Window(10, HOUR), name="api", segment=each, cluster=server.url)
        for each in (segment, hashed)
    )
    assert one.acquire("key", 6) and not two.acquire("key", 6)


def test_a_sealed_name_is_its_own_hosts_to_read(segment: Segment, other: Segment) -> None:
    mine, theirs = names.Seal(segment), names.Seal(other)
    for key in (b"", b"k", b"key" * 40, bytes(range(256))):
        sealed = mine.seal(key)
        assert mine.unseal(sealed) == key and theirs.unseal(sealed) is None
        assert len(key) < 3 or key not in sealed  # a letter may be in any 16 bytes
        assert mine.seal(key) == sealed and names.Seal(segment).unseal(sealed) == key
    for junk in (b"", b"x" * 15, b"x" * 16, b"x" * 99):
        assert mine.unseal(junk) is None
    assert mine.seal(b"x" * 5000) == b""  # too long to be kept: nobody is asked to give it back


def test_the_names_of_a_key_can_be_asked_for() -> None:
    """An operator's way from a key to what redis-cli takes."""
    assert Cluster("redis://h").keys_of("api", "user-1") == (
        rates("fast-shm", b"api", b"user-1").decode(),
        names.state_key("fast-shm", names.PERMITS, b"api", b"user-1").decode(),
    )
