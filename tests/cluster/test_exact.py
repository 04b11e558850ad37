"""Many hosts with many workers admit what one process would, whoever asks how often."""

from __future__ import annotations

import numpy
import pytest
from support import bounds, servers
from support.fleet import Fleet

from fast_litellm_shm import Limit, SlidingWindow, Window
from fast_litellm_shm.limits import LimitSpec

LIMIT = 1000
HOUR = 3600


@pytest.mark.parametrize("shape", ["even", "skewed"])
def test_hosts_admit_exactly_the_limit(kind: str, shape: str) -> None:
    """Skewed: three hosts of four stop asking after a few calls; what they hold comes back."""
    attempts = [None, 20, 20, 20] if shape == "skewed" else None
    with (
        servers.Server(kind) as server,
        Fleet(server.url, [Window(LIMIT, HOUR)], attempts=attempts) as fleet,
    ):
        fleet.until(lambda: fleet.total >= LIMIT, "all of the limit is used")
        fleet.go_on()
        assert fleet.total == LIMIT
        at_most = 20 if attempts else LIMIT
        assert max(fleet.admitted[2:]) <= at_most


def test_costs_above_one_never_exceed_the_limit(server: servers.Server) -> None:
    with Fleet(server.url, [Window(LIMIT, HOUR)], hosts=2, cost=7) as fleet:
        fleet.until(lambda: fleet.total >= LIMIT // 7, "all of the limit that 7 fit in")
        fleet.go_on()
        assert fleet.total == LIMIT // 7


def test_several_limits_are_all_kept(server: servers.Server) -> None:
    limits: list[LimitSpec] = [
        Window(LIMIT, HOUR),
        SlidingWindow(LIMIT // 2, HOUR),
        Limit(LIMIT, HOUR * 100),
    ]
    with Fleet(server.url, limits, hosts=2) as fleet:
        fleet.until(lambda: fleet.total >= LIMIT // 2, "all of the tightest limit is used")
        fleet.go_on()
        assert fleet.total == LIMIT // 2


@pytest.mark.parametrize("strict", [False, True])
def test_a_bucket_keeps_its_bound_in_any_interval(server: servers.Server, strict: bool) -> None:
    """burst + rate * t, and what leases carry over: rate * lease. Strict: n in any period."""
    n, per, burst = 200, 0.5, 50
    lease = per / 20
    with Fleet(server.url, [Limit(n, per, burst=burst, strict=strict)], times=True) as fleet:
        fleet.until(lambda: fleet.total >= 3 * n, "three periods' worth")
        times = fleet.times()
    if strict:
        assert bounds.worst_excess(times, bounds.strict(n, per)) <= 0
    else:
        extra = n * lease / per
        plain = bounds.bucket(n, per, burst)
        assert bounds.worst_excess(times, lambda ns: plain(ns) + numpy.ceil(extra)) <= 0


def test_far_from_the_limit_the_server_is_hardly_asked(server: servers.Server) -> None:
    with Fleet(server.url, [Window(2**31 - 1, HOUR)], hosts=2) as fleet:
        fleet.until(lambda: min(fleet.asked) > 100_000, "each worker has asked often")
        asked, calls = sum(fleet.asked), server.calls()
    assert asked >= 500 * calls
    assert fleet.total >= asked
