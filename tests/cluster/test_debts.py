"""What a host admitted by itself, until it is told: what still counts, and nothing that is over."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import servers
from support.leases import connection_of, tokens_of
from support.waiting import wait_until

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.cluster.outage import Outage, Usage
from fast_litellm_shm.limits import LimitSpec

# What takes long says that the machine is busy.
some = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PER = 100
# what happens, and after how long: tokens are admitted, or the server could not be told
steps = st.lists(st.tuples(st.integers(0, PER // 2), st.integers(0, 5)), min_size=1, max_size=30)


@some
@given(steps, st.integers(0, 3 * PER), st.randoms(use_true_random=False))
def test_of_a_window_what_is_over_is_over(
    taken: list[tuple[int, int]], pause: int, chance: random.Random
) -> None:
    """However often it could not be told in between: exactly what the window that goes on has."""
    now, end, used = 0, 0, 0
    owed, told = Usage(0, 0), Usage(0, 0)
    for wait, cost in taken:
        now += wait
        if now >= end:
            end, used = now + PER, 0
        used += cost
        owed = owed.joined(Usage(end, cost), 0, now)
        if chance.random() < 0.5:  # as a probe does: told has no more than the window before it
            told, owed = told.joined(owed, 0, now), Usage(0, 0)
    now += pause
    assert told.joined(owed, 0, now).left(0, now) == (used if now < end else 0)


@some
@given(steps, st.integers(0, 3 * PER), st.randoms(use_true_random=False))
def test_of_other_limits_nothing_young_is_forgotten_and_all_that_is_old(
    taken: list[tuple[int, int]], pause: int, chance: random.Random
) -> None:
    now, costs = 0, []
    owed, told = Usage(0, 0), Usage(0, 0)
    for wait, cost in taken:
        now += wait
        costs.append((now, cost))
        owed = owed.joined(Usage(now + PER, cost), PER, now)
        if chance.random() < 0.5:
            told, owed = told.joined(owed, PER, now), Usage(0, 0)
    now += pause
    left = told.joined(owed, PER, now).left(PER, now)
    assert left >= sum(cost for at, cost in costs if now < at + PER)
    assert left <= sum(cost for at, cost in costs if now < at + 3 * PER)


def limiter_of(
    server: servers.Server, segment: Segment, limit: LimitSpec, policy: str, timeout: float
) -> RateLimiter:
    cluster = Cluster(server.url, on_outage=policy, timeout=timeout)
    return RateLimiter(limit, name="api", segment=segment, cluster=cluster)


def outage_of(limiter: RateLimiter) -> Outage:
    return tokens_of(limiter)._outage


def lost(server: servers.Server, limiter: RateLimiter, how: str) -> None:
    assert limiter.acquire("warm")
    wait_until("it is known how many hosts there are", lambda: host_count(limiter.segment) == 1)
    if how == "read-only":  # it answers, but not as it should
        with server.client() as client:
            client.replicaof("127.0.0.1", servers.free_port())
    else:
        server.kill() if how == "killed" else server.freeze()
    while connection_of(limiter).outage is None:
        limiter.acquire("notices")


def back(server: servers.Server, limiter: RateLimiter, how: str) -> None:
    if how == "read-only":
        with server.client() as client:
            client.replicaof("NO", "ONE")
    else:
        server.start() if how == "killed" else server.thaw()
    wait_until("it is back", lambda: connection_of(limiter).outage is None)


@pytest.mark.parametrize("how", ["killed", "frozen", "read-only"])
@pytest.mark.parametrize("policy", ["local", "allow"])
def test_a_window_that_is_over_is_not_charged_to_the_next(
    server: servers.Server, segment: Segment, how: str, policy: str
) -> None:
    """Nobody asks for the key meanwhile; the outage goes on."""
    limiter = limiter_of(server, segment, Window(10, 3), policy, 0.5)
    lost(server, limiter, how)
    assert sum(limiter.is_allowed("key") for _ in range(10)) == 10
    outage = outage_of(limiter)
    with outage._lock:
        owed, *_ = outage._usage.get(b"key") or outage._reporting[b"key"]
    wait_until("its window is over", lambda: owed.end < outage._states.now())
    back(server, limiter, how)
    assert limiter.acquire("key").remaining == 9


@pytest.mark.parametrize(
    "limit", [Window(100, 3600), SlidingWindow(100, 3600), Limit(100, per=3600)], ids=repr
)
@pytest.mark.parametrize("policy", ["local", "allow", "deny"])
@pytest.mark.parametrize("how", ["frozen", "read-only"])
def test_what_counts_is_charged_once_however_often_it_could_not_be_told(
    server: servers.Server,
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    limit: LimitSpec,
    policy: str,
    how: str,
) -> None:
    """A key that the server hears of when it is back, from what the host has admitted alone."""
    limiter = limiter_of(server, segment, limit, policy, 0.5)
    assert limiter.peek("key").remaining == 100
    lost(server, limiter, how)
    tries, probe = 0, connection_of(limiter).probe

    def counted() -> None:
        nonlocal tries
        tries += 1
        probe()

    monkeypatch.setattr(connection_of(limiter), "probe", counted)
    for _ in range(7):
        if policy == "deny":  # calls that were admitted before use more than they were charged
            limiter.charge("key", 1)
        else:
            assert limiter.is_allowed("key")
    wait_until("it was tried some times", lambda: tries > 3)
    back(server, limiter, how)
    assert limiter.peek("key").remaining == 93


def test_each_process_tells_its_own_part(server: servers.Server, segment: Segment) -> None:
    """Of a key that the server has never heard of, or not since it was emptied."""
    two = [
        limiter_of(server, segment, Window(100, 3600), "local", timeout) for timeout in (0.5, 0.6)
    ]
    assert connection_of(two[0]) is not connection_of(two[1])  # as two processes have it
    lost(server, two[0], "killed")
    for limiter in two:
        assert all(limiter.is_allowed("key") for _ in range(7))
    server.start()
    wait_until("it is back", lambda: all(connection_of(each).outage is None for each in two))
    assert [limiter.peek("key").remaining for limiter in two] == [86, 86]
