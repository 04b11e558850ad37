"""A refund goes to the window of the file that was charged, or nowhere."""

from __future__ import annotations

import pytest
from support.reboots import Host, leases_of

from fast_litellm_shm import FixedWindow, SlidingWindow
from fast_litellm_shm.cluster.algorithms import Answer, Known, Request
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.limits import LimitSpec

HOUR = 3600


@pytest.fixture(autouse=True)
def _no_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Background, "refill", lambda *_: None)


def asked(leases: TokenLeases, operation: str, cost: int = 0) -> tuple[Request, Answer]:
    request, _ = leases.request(operation, b"k", (cost,))
    (found,) = leases.connection.call([request])
    return request, found


def refunded(leases: TokenLeases, look: tuple[Request, Answer], cost: int) -> Known:
    request, _ = leases.refund_request(*look, (cost,))
    (found,) = leases.connection.call([request])
    known: Known = found.limits[0]
    return known


@pytest.mark.parametrize(
    ("limit", "later"),
    [
        (FixedWindow(1000, HOUR), HOUR),
        (SlidingWindow(1000, HOUR), 2 * HOUR),
        (FixedWindow(1000, per="day", timezone="UTC"), 24 * HOUR),
    ],
)
def test_it_is_late(host: Host, limit: LimitSpec, later: int) -> None:
    """It was made while its window lasted, and comes when the next one is used up."""
    leases = leases_of(host.limiter(limit))
    assert asked(leases, "single", 500)[1].admitted
    look = asked(leases, "look")
    host.pass_time(later)
    assert asked(leases, "single", 1000)[1].admitted
    assert refunded(leases, look, 500).used == 1000
    assert not asked(leases, "single", 1)[1].admitted
    assert refunded(leases, asked(leases, "look"), 500).used == 500


def test_a_sliding_window_later_it_is_of_the_previous_count(host: Host) -> None:
    leases = leases_of(host.limiter(SlidingWindow(1000, HOUR)))
    assert asked(leases, "single", 200)[1].admitted
    look = asked(leases, "look")
    host.pass_time(HOUR)
    assert asked(leases, "single", 100)[1].admitted
    known = refunded(leases, look, 150)
    assert (known.current, known.previous) == (100, 50)
    known = refunded(leases, look, 150)
    assert (known.current, known.previous) == (100, 0)


@pytest.mark.parametrize("limit", [FixedWindow(1000, HOUR), SlidingWindow(1000, HOUR)])
def test_a_reset_between_look_and_refund(host: Host, limit: LimitSpec) -> None:
    """(Of a window of the calendar, which begins anew with the same end, it is not noticed.)"""
    limiter = host.limiter(limit)
    leases = leases_of(limiter)
    assert asked(leases, "single", 500)[1].admitted
    look = asked(leases, "look")
    host.pass_time(HOUR / 4)
    limiter.reset("k")
    if isinstance(limit, SlidingWindow):  # its windows begin at multiples of `per`
        host.pass_time(2 * HOUR)
    assert asked(leases, "single", 1000)[1].admitted
    assert refunded(leases, look, 500).used == 1000


def test_a_window_in_debt(host: Host) -> None:
    leases = leases_of(host.limiter(FixedWindow(1000, HOUR)))
    asked(leases, "charge", 3000)
    look = asked(leases, "look")
    host.pass_time(1.5 * HOUR)
    assert asked(leases, "look")[1].limits[0].window == look[1].limits[0].window
    assert refunded(leases, look, 2000).used == 0


def test_a_reset_between_charge_and_settlement(host: Host) -> None:
    """The window that was charged had begun ten minutes before the one after the reset."""
    limiter = host.limiter(FixedWindow(1000, HOUR))
    leases = leases_of(limiter)
    assert asked(leases, "single", 500)[1].admitted
    limiter.reset("k")
    assert asked(leases, "single", 1000)[1].admitted
    end = leases.states.now() + asked(leases, "look")[1].limits[0].lease_ns
    for early, used in ((600 * 10**9, 1000), (0, 500)):
        leases.settle(Settlement(leases, b"k", (0,), (500,), (end - early,)), later=False)
        assert asked(leases, "look")[1].limits[0].used == used
