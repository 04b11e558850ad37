"""What was spent is not forgotten by a reboot, and a power cut costs one lease at most."""

from __future__ import annotations

import pytest
from support.reboots import Host, leases_of, link_of, spend

from fast_litellm_shm import FixedWindow, RateLimiter, SlidingWindow, TokenBucket
from fast_litellm_shm.limits import LimitSpec

DAY = 86_400


def test_a_clean_stop_forgets_nothing_and_loses_nothing(host: Host) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert all(limiter.acquire("k") for _ in range(400))
    host.reboot()
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert spend(limiter, "k") == 600
    assert not limiter.acquire("k")


def test_a_power_cut_costs_one_lease_at_most(host: Host) -> None:
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert all(limiter.acquire("k") for _ in range(400))
    host.lose_power()
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    assert 590 <= spend(limiter, "k") <= 600


def test_many_power_cuts_never_admit_more(host: Host) -> None:
    admitted = 0
    for _ in range(40):
        limiter = host.limiter(FixedWindow(1000, per=DAY))
        admitted += sum(bool(limiter.acquire("k")) for _ in range(30))
        host.lose_power(down=1)
    limiter = host.limiter(FixedWindow(1000, per=DAY))
    admitted += spend(limiter, "k")
    assert 1000 - 41 * 10 <= admitted <= 1000


def test_a_removed_segment_forgets_nothing(host: Host) -> None:
    """At any point: whatever was asked before, and whichever process still has the old one."""
    admitted, others = 0, []
    for _ in range(50):
        limiter = host.limiter(FixedWindow(300, per=DAY))
        others.append(limiter)
        for each in others[-3:]:  # processes that have not noticed
            admitted += sum(bool(each.acquire("k")) for _ in range(3))
        host.remove_segment()
    admitted += sum(spend(each, "k") for each in others)
    assert 300 - 50 * 3 <= admitted <= 300


@pytest.mark.parametrize(
    ("limit", "after"),
    [
        (FixedWindow(1000, per=DAY), 1000),
        (SlidingWindow(1000, per=DAY), 500),  # half of the window before counts
        (TokenBucket(1000, per=DAY), 1000),
        (TokenBucket(1000, per=DAY, burst=100, strict=True), 100),
    ],
    ids=str,
)
def test_time_passes_while_the_host_is_down(host: Host, limit: LimitSpec, after: int) -> None:
    limiter = host.limiter(limit)
    most = limit.burst if isinstance(limit, TokenBucket) else limit.n
    assert spend(limiter, "k") == most
    host.reboot(down=0)
    assert not host.limiter(limit).acquire("k")
    host.reboot(down=1.5 * DAY)
    assert spend(host.limiter(limit), "k") == pytest.approx(after, abs=2)


def test_several_limits_at_once(host: Host) -> None:
    limits = FixedWindow(500, per=DAY), TokenBucket(1000, per=DAY)
    limiter = host.limiter(*limits)
    assert spend(limiter, "k") == 500
    host.reboot(down=DAY + 1)  # 500 of the bucket's are back, and its first 500
    assert spend(host.limiter(*limits), "k") == 500
    host.reboot(down=0)
    found = host.limiter(*limits).acquire("k", cost=(0, 400))
    assert found.allowed


def test_a_denied_call_writes_nothing(host: Host) -> None:
    limiter = host.limiter(FixedWindow(10, per=DAY))
    spend(limiter, "k")
    before = host.rows()
    host.pass_time(0.5)
    leases_of(limiter).unrefuse(b"k")
    assert not limiter.acquire("k")
    assert not limiter.acquire("k", 3)
    assert host.rows() == before


@pytest.mark.parametrize("n", [1, 5, 1000, 100_000])
def test_a_lease_is_a_hundredth_of_the_limit_at_most(host: Host, n: int) -> None:
    limiter = host.limiter(FixedWindow(n, per=DAY))
    largest = 0
    for _ in range(min(n, 3000)):
        assert limiter.acquire("k")
        host.pass_time(1e-5)  # 100,000 a second: a quarter of a second's use would be a quarter
        largest = max(largest, leases_of(limiter).look(b"k")[0][0])
    assert largest <= max(n // 100, 1)
    assert largest > n // 200 or n < 100_000


def test_a_clock_that_is_set_back_gives_nothing_back(host: Host) -> None:
    limit = FixedWindow(100, per=3600)
    assert spend(host.limiter(limit), "k") == 100
    host.time_of_day -= DAY * 10**9
    host.pass_time(1)
    assert not host.limiter(limit).acquire("k")
    for _ in range(3):
        host.reboot(down=60)
        host.time_of_day -= DAY * 10**9
        assert not host.limiter(limit).acquire("k")
    # and it goes on at its pace: nobody waits for the time of day to come back
    host.pass_time(3600)
    host.reboot(down=0)
    assert spend(host.limiter(limit), "k") == 100


def test_a_clock_that_is_set_ahead_ends_no_window(host: Host) -> None:
    limit = FixedWindow(100, per=3600)
    limiter = host.limiter(limit)
    spend(limiter, "k", 50)
    host.time_of_day += DAY * 10**9
    assert spend(limiter, "k") == 50
    host.remove_segment()
    assert not host.limiter(limit).acquire("k")


def test_a_copy_is_durable_too(host: Host) -> None:
    import pickle

    limiter = host.limiter(FixedWindow(100, per=DAY))
    copy: RateLimiter = pickle.loads(pickle.dumps(limiter))
    assert link_of(copy) is link_of(limiter)
    assert spend(limiter, "k", 60) + spend(copy, "k") == 100


def test_refunds_and_resets_are_durable(host: Host) -> None:
    limit = FixedWindow(100, per=DAY)
    limiter = host.limiter(limit)
    assert spend(limiter, "a") == spend(limiter, "b") == 100
    limiter.refund("a", 30)
    limiter.reset("b")
    host.reboot()
    limiter = host.limiter(limit)
    assert (spend(limiter, "a"), spend(limiter, "b")) == (30, 100)
    limiter.reset()
    host.reboot()
    assert spend(host.limiter(limit), "a") == 100


def test_a_block_is_durable(host: Host) -> None:
    limit = TokenBucket(60, per=60)
    limiter = host.limiter(limit)
    limiter.block("k", 600)
    host.reboot(down=300)
    found = host.limiter(limit).peek("k")
    assert not found.allowed
    assert found.retry_after == pytest.approx(300, abs=5)


def test_limits_that_change_over_a_reboot(host: Host) -> None:
    assert spend(host.limiter(FixedWindow(1000, per=DAY)), "k", 500) == 500
    host.reboot()
    assert not host.limiter(FixedWindow(10, per=DAY)).acquire("k")
    host.reboot()
    assert spend(host.limiter(FixedWindow(1000, per=DAY)), "k") == 500


def test_a_limit_that_is_taken_away_and_comes_back(host: Host) -> None:
    hour, day = FixedWindow(50, per=3600), FixedWindow(1000, per=DAY)
    assert spend(host.limiter(hour, day), "k") == 50
    host.reboot()
    assert spend(host.limiter(day), "k", 100) == 100
    host.reboot()
    limiter = host.limiter(day, hour)
    assert not limiter.acquire("k")
    assert limiter.acquire("k", cost=(850, 0))
    assert not limiter.acquire("k", cost=(1, 0))
