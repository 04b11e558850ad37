"""One call, one reply, whatever comes instead of it."""

from __future__ import annotations

import time
from typing import Any

import pytest
from support import servers
from support.leases import connection_of
from support.relay import Relay
from support.waiting import PATIENCE, wait_until

from fast_litellm_shm import RateLimiter, Segment, Window
from fast_litellm_shm.cluster import Cluster

HOUR = 3600


class InPieces(Relay):
    """Whatever the server says comes byte by byte."""

    ends_after = 0  # so many bytes of what it says next; 0: it does not end

    def _send(self, to: Any, data: bytes) -> None:
        if to.getpeername() == self._target:  # to the server
            super()._send(to, data)
            return
        for at in range(len(data)):
            if self.ends_after and at == self.ends_after:
                self.ends_after = 0
                raise OSError
            super()._send(to, data[at : at + 1])
            time.sleep(0.0002)


def limiter_at(path: str, segment: Segment, timeout: float = servers.SLOWEST) -> RateLimiter:
    cluster = Cluster(f"unix://{path}", on_outage="deny", timeout=timeout)
    return RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=cluster)


def test_a_reply_in_pieces(server: servers.Server, segment: Segment) -> None:
    relay = InPieces(server.path)
    with relay:
        limiter = limiter_at(relay.path, segment, timeout=PATIENCE)
        for i in range(5):
            found = limiter.acquire(f"key {i}", 40)
            assert found and found.remaining == 60
        assert not limiter.acquire("key 0", 61)


def test_a_line_that_ends_within_a_reply(server: servers.Server, segment: Segment) -> None:
    """It is asked again. What was taken then counts: never more than the limit."""
    relay = InPieces(server.path)
    with relay:
        limiter = limiter_at(relay.path, segment, timeout=PATIENCE)
        for i, after in enumerate((1, 3, 5, 50), start=1):
            assert limiter.acquire("before", 1)
            relay.ends_after = after
            assert limiter.acquire(f"key {i}", 40)
            assert connection_of(limiter).outage is None
            assert not limiter.acquire(f"key {i}", 61)


@pytest.mark.parametrize("what", ["its scripts", "the connection"])
def test_a_server_that_has_forgotten(server: servers.Server, segment: Segment, what: str) -> None:
    limiter = limiter_at(server.path, segment)
    with server.client() as client:
        for i in range(10):
            assert limiter.acquire(f"key {i}", 40)
            if what == "its scripts":
                client.script_flush()
            else:
                client.client_kill_filter(_type="normal", skipme=True)
            assert limiter.acquire(f"other {i}", 40)
            assert not limiter.acquire(f"other {i}", 61)
    assert connection_of(limiter).outage is None


def test_a_server_that_refuses(server: servers.Server, segment: Segment) -> None:
    """The policy decides; what it said is in the log, and later it is asked again."""
    limiter = limiter_at(server.path, segment)
    assert limiter.acquire("key")
    with server.client() as client:
        client.config_set("maxmemory", 1)
        assert not limiter.acquire("other")
        client.config_set("maxmemory", 0)
    wait_until("it is asked again", lambda: limiter.acquire("another"), every=0.05)


def test_a_server_that_is_late(server: servers.Server, segment: Segment) -> None:
    limiter = limiter_at(server.path, segment, timeout=0.2)
    assert limiter.acquire("key")
    with server.client() as client:
        client.client_pause(1000)
        assert not limiter.acquire("other")  # the policy
        client.client_unpause()
    wait_until("it is asked again", lambda: limiter.acquire("other", 40), every=0.05)
    # What the first one asked has arrived, and its answer is nobody's.
    assert limiter.acquire("third", 40)
    assert not limiter.acquire("third", 61)
