"""Sliding windows at a server that forgets everything while hosts are under their limit."""

from __future__ import annotations

import time

from cluster.test_meter import Meter, meter, new_key
from support import servers
from support.leases import tokens_of
from support.waiting import wait_until

from fast_litellm_shm import RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.side_limiters import is_side_limiter
from fast_litellm_shm.cluster import algorithms, sliding

__all__ = ["meter"]  # the fixture

START = 10**12
N, PER = 200, 2.0
LOAD = 0.72  # of the limit


def test_a_flush_denies_nobody_who_is_under_the_limit(
    server: servers.Server, segment: Segment, other: Segment
) -> None:
    """What was consumed in the window before was once booked as consumed in this one, and stayed
    for a whole ``per``: half of it was denied."""
    hosts = [
        RateLimiter(SlidingWindow(N, PER), name="api", segment=each, cluster=server.url)
        for each in (segment, other)
    ]
    admitted, denied = [0] * 6, [0] * 6
    begun = time.monotonic()
    for i in range(round(6 * N * LOAD)):
        # Whoever is late makes fewer calls a second, not more: the load is this one, or less.
        pause = begun + i * PER / (N * LOAD) - time.monotonic()
        if pause > 0:
            time.sleep(pause)
        else:
            begun -= pause
        period = i // round(N * LOAD)
        if i == round(3.5 * N * LOAD):
            server.client().flushall()
        if hosts[i % 2].acquire("key"):
            admitted[period] += 1
        else:
            denied[period] += 1
    assert denied == [0] * 6, admitted


def test_what_hosts_know_of_a_window_grows_together(meter: Meter) -> None:
    """One was last told before the present window began; another one after."""
    limit, key, second = SlidingWindow(100, 10), new_key(), 10**6
    for at, cost in ((0, 60), (9, 10), (11, 5), (14, 5)):
        assert meter(START + at * second, "c", "single", key, [limit], costs=cost).admitted
    at = START + 15 * second
    truth = meter(at, "c", "look", key, [limit]).limits[0]
    assert (truth.current, truth.previous) == (10, 70)
    late = {"used": 0, "previous": 60, "left": 5 * second - 700}  # a message took so long
    early = {"used": 10, "previous": 70, "left": 5 * second}
    for told in (late, early), (early, late), (early,):
        lost = new_key()
        for host, each in zip("ab", told, strict=False):
            found = meter(at, host, "look", lost, [limit], **each).limits[0]
        assert (found.current, found.previous) == (10, 70)
    # hosts on either side of a window's end
    at, lost = START + 20 * second, new_key()
    before, after = (
        {"used": 10, "previous": 70, "left": 500},
        {"used": 0, "previous": 10, "left": 10 * second - 500},
    )
    meter(at, "a", "look", lost, [limit], **after)
    found = meter(at, "b", "look", lost, [limit], **before).limits[0]
    assert (found.current, found.previous) == (0, 10)
    lost = new_key()
    meter(at, "b", "look", lost, [limit], **before)
    found = meter(at, "a", "look", lost, [limit], **after).limits[0]
    assert (found.current, found.previous) == (0, 10)


def test_what_was_admitted_alone_counts_beside_what_was_known(meter: Meter) -> None:
    """The server goes, and comes back empty: hosts tell what they admitted meanwhile first."""
    limit, lost = SlidingWindow(100, 10), new_key()
    meter(START, "a", "fill", lost, [limit], costs=20)
    meter(START, "b", "fill", lost, [limit], costs=10)
    found = meter(START, "a", "look", lost, [limit], used=30, previous=8, left=5 * 10**6).limits[0]
    assert (found.current, found.previous) == (60, 8)


def test_what_a_host_was_told_is_kept_apart(server: servers.Server, segment: Segment) -> None:
    limiter = RateLimiter(
        Window(1000, 60), SlidingWindow(100, PER), name="api", segment=segment, cluster=server.url
    )
    assert limiter.acquire("key", 10)
    wallet = tokens_of(limiter)

    def known() -> algorithms.Request:
        return wallet.request("look", b"key", (0, 0))[0]

    first = known()
    assert first.used[1] >= 10 and first.previous == (0, 0) and 0 < first.left[1] <= PER * 1e6
    wait_until("the window is over", lambda: known().previous[1] > 0)
    second = known()
    assert second.used[1] == 0 and second.previous[1] == first.used[1]
    assert second.used[0] == first.used[0] and second.previous[0] == 0
    shown = Inspection(segment)
    assert {row.limiter for row in shown.keys()} <= {"api", "api (wallet)"}  # noqa: SIM118
    names = {each["name"] for each in shown.limiters()}
    assert "api (told)" not in names or is_side_limiter("api (told)", names)


def test_counts_are_kept_to_a_few_bits() -> None:
    for count in [*range(70_000), *(2**bits + off for bits in range(17, 30) for off in (-1, 0, 1))]:
        found = sliding.unpacked(sliding.packed(count))
        assert count <= found <= count * (1 + 2**-15)
        assert found == count or count > 65_535


def test_a_lost_window_that_was_lowered_owes_nothing(meter: Meter) -> None:
    """It had 500 of 1000 when it was lowered; then the server lost it."""
    key, second = new_key(), 10**6
    told = {"used": 500, "left": 30 * second}
    denied = meter(START, "a", "single", key, [Window(10, 60)], costs=1, **told)
    assert not denied.admitted and denied.retry_after_ns == 30 * 10**9
    again = meter(START, "a", "look", key, [Window(1000, 60)], costs=500)
    assert again.admitted and again.limits[0].used == 500
