"""A refund goes to the window that was charged, or nowhere: whatever is late, frozen, lost or
reset."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from cluster.test_meter import Meter, meter, new_key
from support import calendar, servers
from support.leases import tokens_of
from support.waiting import PATIENCE, wait_until

from fast_litellm_shm import FixedWindow, RateLimiter, Segment, SlidingWindow
from fast_litellm_shm.cluster import Cluster, wire
from fast_litellm_shm.cluster.connection import Connection
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.limits import LimitSpec

__all__ = ["meter"]  # a fixture
MINUTE = 60_000_000  # us
START = 10**15
HOUR = 3600
DAY = FixedWindow(10, per="day", timezone="UTC")
MIDNIGHT = calendar.minute_of(2027, 5, 4, 0, 0) * MINUTE


def looked(meter: Meter, at: int, key: bytes, limit: LimitSpec) -> int:
    """What the server calls the present window."""
    return meter(at, "a", "look", key, [limit]).limits[0].window


@pytest.mark.parametrize(
    ("limit", "at", "later"),
    [
        (FixedWindow(10, 60), START, 60 * 10**6),
        (FixedWindow(10, 60), START, 61 * 10**6),
        (SlidingWindow(10, 60), START, 120 * 10**6),
        (DAY, MIDNIGHT - MINUTE, MINUTE),
    ],
)
def test_it_is_late(meter: Meter, limit: LimitSpec, at: int, later: int) -> None:
    """It was sent while its window lasted, and comes when the next one is used up."""
    key = new_key()
    assert meter(at, "a", "single", key, [limit], costs=5).admitted
    window = looked(meter, at, key, limit)
    assert window > 0
    assert looked(meter, at + 1, key, limit) == window
    at += later
    assert meter(at, "b", "single", key, [limit], costs=10).admitted
    assert looked(meter, at, key, limit) not in (0, window)
    assert meter(at, "a", "refund", key, [limit], costs=5, left=window).limits[0].used == 10
    assert not meter(at, "b", "single", key, [limit], costs=1).admitted


def test_a_sliding_window_later_it_is_of_the_previous_count(meter: Meter) -> None:
    key, limit, at = new_key(), SlidingWindow(10, 60), START
    assert meter(at, "a", "single", key, [limit], costs=4).admitted
    window = looked(meter, at, key, limit)
    at += 61 * 10**6
    assert meter(at, "b", "single", key, [limit], costs=5).admitted
    (known,) = meter(at, "a", "refund", key, [limit], costs=3, left=window).limits
    assert (known.current, known.previous) == (5, 1)
    (known,) = meter(at, "a", "refund", key, [limit], costs=3, left=window).limits
    assert (known.current, known.previous) == (5, 0)


@pytest.mark.parametrize("limit", [FixedWindow(10, 60), SlidingWindow(10, 60), DAY])
def test_a_reset_between_look_and_refund(meter: Meter, limit: LimitSpec) -> None:
    key, at = new_key(), MIDNIGHT - 10 * MINUTE
    assert meter(at, "a", "single", key, [limit], costs=5).admitted
    window = looked(meter, at, key, limit)
    meter(at + 1, "a", "reset", key, [limit])
    assert looked(meter, at + 1, key, limit) == 0
    assert meter(at + 1, "b", "single", key, [limit], costs=10).admitted
    found = meter(at + 1, "a", "refund", key, [limit], costs=5, left=window)
    assert found.limits[0].used == 10


def test_the_servers_clock_goes_back(meter: Meter) -> None:
    """The window has another name as of then: what was asked for is not given back."""
    key, limit = new_key(), FixedWindow(10, 60)
    assert meter(START, "a", "single", key, [limit], costs=5).admitted
    window = looked(meter, START, key, limit)
    back = START - 10**7
    assert meter(back, "a", "refund", key, [limit], costs=5, left=window).limits[0].used == 5
    assert meter(back, "a", "refund", key, [limit], costs=5).limits[0].used == 0


def test_a_window_in_debt_keeps_its_name(meter: Meter) -> None:
    key, limit, at = new_key(), FixedWindow(10, 60), START
    meter(at, "a", "charge", key, [limit], costs=30)
    window = looked(meter, at, key, limit)
    at += 100 * 10**6
    assert looked(meter, at, key, limit) == window
    assert meter(at, "a", "refund", key, [limit], costs=20, left=window).limits[0].used == 0


# over real servers


def limiter_of(
    server: servers.Server, segment: Segment, limit: LimitSpec, timeout: float = PATIENCE
) -> RateLimiter:
    cluster = Cluster(server.url, timeout=timeout)
    return RateLimiter(limit, name="late", segment=segment, cluster=cluster)


def settled(leases: TokenLeases, less: int, end: int) -> None:
    leases.settle(Settlement(leases, b"key", (0,), (less,), (end,)), later=False)


def known_end(leases: TokenLeases) -> int:
    return leases.states.now() + leases.states.known(b"key")[1][0]


def used(leases: TokenLeases) -> int:
    (found,) = leases.connection.call([leases.request("look", b"key", (0,))[0]])
    return int(found.limits[0].used)


@pytest.mark.parametrize("calls", ["settlement", "refund"])
def test_a_server_is_frozen(
    server: servers.Server,
    segment: Segment,
    other: Segment,
    calls: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Until the window is over, and another host has asked for all of the next one before."""
    limit = FixedWindow(100, 1.5)
    here, there = (limiter_of(server, each, limit) for each in (segment, other))
    for each in (here, there):
        monkeypatch.setattr(tokens_of(each).connection, "questions", None)  # all by _send()
        assert each.peek("key")  # and they are connected
    leases, send = tokens_of(here), Connection._send
    admitted: list[bool] = []
    sends = threading.Event()
    asks = threading.Thread(target=lambda: admitted.append(bool(there.acquire("key", 100))))

    def frozen_send(connection: Connection, requests: Any) -> Any:
        if connection is tokens_of(there).connection:
            sends.set()
        elif requests[0].operation == "refund":
            server.freeze()
            asks.start()
            sends.wait(PATIENCE)
            time.sleep(0.05)  # it is in the server's queue, before the refund
            thaws.start()
        return send(connection, requests)

    def thaw() -> None:
        wait_until("the window is over", lambda: leases.states.now() > end + 10**7)
        server.thaw()

    thaws = threading.Thread(target=thaw)
    wait_until("a window begins", lambda: here.acquire("key", 100))
    end = known_end(leases)
    monkeypatch.setattr(Connection, "_send", frozen_send)
    if calls == "settlement":
        settled(leases, 60, end)
    else:
        here.refund("key", 60)
    asks.join(PATIENCE)
    thaws.join(PATIENCE)
    if admitted == [True]:  # else the first window was not over yet: a slow machine
        assert used(leases) in (0, 100)  # 0: that window is over too


def test_a_settlement_is_given_back(server: servers.Server, segment: Segment) -> None:
    for limit in (FixedWindow(100, HOUR), FixedWindow(100, per="month", timezone="UTC")):
        here = limiter_of(server, segment, limit)
        leases = tokens_of(here)
        here.reset("key")
        assert here.acquire("key", 100)
        settled(leases, 60, known_end(leases))
        assert used(leases) == 40


def test_a_reset_between_charge_and_settlement(server: servers.Server, segment: Segment) -> None:
    """The window that was charged had begun ten seconds before the one after the reset: longer than
    any answer takes."""
    here = limiter_of(server, segment, FixedWindow(100, HOUR), timeout=servers.SLOWEST)
    leases = tokens_of(here)
    assert here.acquire("key", 100)
    here.reset("key")
    assert here.acquire("key", 100)
    settled(leases, 60, known_end(leases) - 10 * 10**9)
    assert used(leases) == 100


def test_a_sliding_window_that_had_begun_before_the_charge(
    server: servers.Server, segment: Segment
) -> None:
    here = limiter_of(server, segment, SlidingWindow(100, HOUR))
    leases, per = tokens_of(here), HOUR * 10**9
    before = leases.states.now()
    assert here.acquire("key", 50)
    settled(leases, 20, before + per)  # it may be that another had been charged
    assert used(leases) >= 50
    there, before = used(leases), leases.states.now()
    settled(leases, 20, before + per)
    assert used(leases) == there - 20


@pytest.mark.parametrize("lost", ["look", "refund"])
def test_a_reply_is_lost(
    server: servers.Server, segment: Segment, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not known to be given back stays used here; the server gives it back once, or not."""
    import redis

    here = limiter_of(server, segment, FixedWindow(100, HOUR))
    leases, send = tokens_of(here), Connection._send
    assert here.acquire("key", 100)
    sent: list[str] = []

    def losing(connection: Connection, requests: Any) -> Any:
        found = send(connection, requests)
        sent.append(requests[0].operation)
        if sent[-1] == lost:
            raise redis.TimeoutError("lost")
        return found

    monkeypatch.setattr(Connection, "_send", losing)
    settled(leases, 60, known_end(leases))
    monkeypatch.setattr(Connection, "_send", send)
    assert sent.count("refund") == (lost == "refund")
    wait_until("the server answers", lambda: leases.connection.outage is None)
    assert used(leases) == (40 if lost == "refund" else 100)


def test_a_connection_that_ends_after_a_refund_was_heard(
    server: servers.Server, segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link calls once more: it does not give back twice."""
    import redis

    here = limiter_of(server, segment, FixedWindow(100, HOUR))
    leases, exchange = tokens_of(here), wire.Wire._exchange
    assert here.acquire("key", 100)
    calls: list[int] = []

    def ending(self: wire.Wire, *given: Any) -> Any:
        found = exchange(self, *given)
        calls.append(1)
        if len(calls) == 2:  # the first one was the look
            raise redis.ConnectionError("ended")
        return found

    monkeypatch.setattr(wire.Wire, "_exchange", ending)
    settled(leases, 30, known_end(leases))
    assert len(calls) == 3 and leases.connection.outage is None
    assert used(leases) == 70
