"""The connection ends after the server has heard a call, and before its reply. The link calls once
more. What the first one gave back is not given back twice: it may stay used, never be free."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from support import servers
from support.leases import connection_of, tokens_of

from fast_litellm_shm import Budget, FixedWindow, RateLimiter, Segment, SlidingWindow
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.exceptions import ClusterError
from fast_litellm_shm.limits import LimitSpec

HOUR = 3600


@pytest.fixture
def lose(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes connections lose so many replies to this thread, as of now."""
    from redis import ConnectionError
    from redis.connection import AbstractConnection

    count, read = [0], AbstractConnection.read_response

    def losing(self: Any, *given: Any, **more: Any) -> Any:
        found = read(self, *given, **more)
        if count[0] and threading.current_thread() is threading.main_thread():
            count[0] -= 1
            raise ConnectionError("ended")
        return found

    monkeypatch.setattr(AbstractConnection, "read_response", losing)
    return count


def limiter_of(server: servers.Server, segment: Segment, limit: LimitSpec) -> RateLimiter:
    cluster = Cluster(server.url, on_outage="deny")
    return RateLimiter(limit, name="api", segment=segment, cluster=cluster)


def used(limiter: RateLimiter) -> int:
    """By the server."""
    request, _ = tokens_of(limiter).request("look", b"key", (0,))
    (found,) = connection_of(limiter).call([request])
    return int(found.limits[0].used)


@pytest.mark.parametrize("limit", [FixedWindow(1000, HOUR), SlidingWindow(1000, HOUR)])
def test_giving_back_a_lease(
    server: servers.Server, segment: Segment, lose: list[int], limit: LimitSpec
) -> None:
    limiter = limiter_of(server, segment, limit)
    assert limiter.acquire("key", 100) and limiter.acquire("key")
    leases = tokens_of(limiter)
    before, leased = used(limiter), leases.look(b"key", take=True)[0]
    assert leased[0] > 0
    lose[0] = 1
    leases._call("give", b"key", (0,), leased)
    assert lose[0] == 0 and leases.connection.outage is None
    assert used(limiter) == before - leased[0]


@pytest.mark.parametrize("limit", [FixedWindow(1000, HOUR), SlidingWindow(1000, HOUR)])
def test_a_call_that_gives_back_what_does_not_suffice(
    server: servers.Server,
    segment: Segment,
    other: Segment,
    lose: list[int],
    limit: LimitSpec,
) -> None:
    here, there = (limiter_of(server, each, limit) for each in (segment, other))
    assert here.acquire("key", 10)
    leases = tokens_of(here)
    (leased,) = leases.look(b"key")[0]
    assert leased > 0
    there.charge("key", 1000 - used(here))
    lose[0] = 1
    assert not here.acquire("key", 900)
    assert lose[0] == 0 and leases.connection.outage is None
    assert leases.look(b"key")[0] == (0,)
    assert used(here) >= 1000 - leased


def test_raising_a_budget(server: servers.Server, segment: Segment, lose: list[int]) -> None:
    budget = Budget(10, "year", name="team", segment=segment, cluster=server.url)
    assert budget.reserve("k", 1)
    lose[0] = 1
    with pytest.raises(ClusterError, match=r"limit of 'k' was changed by \$5: see usage"):
        budget.add("k", 5)
    assert lose[0] == 0
    budget.charge("k", 0)
    assert budget.usage("k").limit <= 15


def test_giving_back_money(
    server: servers.Server, segment: Segment, other: Segment, lose: list[int]
) -> None:
    here, there = (
        Budget(100, "year", name="team", segment=each, cluster=server.url)
        for each in (segment, other)
    )
    for budget in (here, there):
        with budget.reserve("k", 30) as held:
            held.settle(30)
    mine, theirs = (each._leases for each in (here, there))
    assert mine is not None and theirs is not None
    before = theirs._call(theirs._request("look", b"k", theirs.look(b"k")))
    lose[0] = 1
    mine._call(mine._request("give", b"k", mine.look(b"k"), amount=10**9))
    assert lose[0] == 0 and mine.connection.outage is None
    after = theirs._call(theirs._request("look", b"k", theirs.look(b"k")))
    assert before.others - after.others == 10**9
