"""Stories of limits that change, each in its shortest form, that once went wrong."""

from __future__ import annotations

from itertools import cycle, islice

import pytest

from changes.driver import HOUR, SECOND, Limiter, bucket, permits, sliding, window
from fast_litellm_shm import Segment
from fast_litellm_shm._shared.native import lib

NOW = 10**6 * SECOND


def test_a_lowered_window_forgets_nothing_when_something_is_given_back(segment: Segment) -> None:
    """Once 1,484 more were admitted: the refund cut the count to the four bits of 10."""
    limiter = Limiter(segment, window(1000, HOUR))
    assert limiter.acquire("k", NOW, 500)
    limiter.change(window(10, HOUR))
    limiter.refund("k", NOW, 1)
    assert limiter.remaining("k", NOW) == [0]
    limiter.change(window(1000, HOUR))
    assert limiter.remaining("k", NOW) == [501]
    assert limiter.drain("k", NOW, 1000) == 501


def test_a_call_that_settles_under_a_lowered_window_forgets_nothing(segment: Segment) -> None:
    """As ``Quota(tpm=90000)`` has it. Once 164,990 of 90,000 were admitted."""
    limiter = Limiter(segment, window(90_000, 60 * SECOND))
    admitted = [limiter.admit("k", NOW, 20_000) for _ in range(4)]
    assert [d.status for _, d in admitted] == [1, 1, 1, 1]
    limiter.change(window(100, 60 * SECOND))
    limiter.settle("k", NOW + SECOND, 20_000, 15_000, admitted[0][0])
    assert limiter.remaining("k", NOW + SECOND) == [0]
    limiter.change(window(90_000, 60 * SECOND))
    assert limiter.remaining("k", NOW + SECOND) == [15_000]
    assert limiter.acquire("k", NOW + SECOND, 15_000)
    assert not limiter.acquire("k", NOW + SECOND)


def test_a_token_more_under_a_lowered_window_makes_no_debt_of_old_use(segment: Segment) -> None:
    """Once the key was denied for 48,000 s."""
    limiter = Limiter(segment, window(90_000, 60 * SECOND))
    admitted = [limiter.admit("k", NOW, 20_000)[0] for _ in range(4)]
    limiter.change(window(100, 60 * SECOND))
    limiter.settle("k", NOW + SECOND, 20_000, 20_001, admitted[0])
    retry = limiter.peek("k", NOW + SECOND).retry_after_ns
    assert (
        59 * SECOND <= retry <= 59 * SECOND + 2 * 2**17
    )  # the count's bits, as the end is rounded
    limiter.change(window(90_000, 60 * SECOND))
    assert limiter.remaining("k", NOW + SECOND) == [9_999]


@pytest.mark.parametrize("touch", ["charge", "refund"])
@pytest.mark.parametrize("low", [1, 3, 100, 999])
def test_a_window_counts_on_whatever_it_was_lowered_to(
    segment: Segment, touch: str, low: int
) -> None:
    limiter = Limiter(segment, window(1000, HOUR))
    assert limiter.acquire("k", NOW, 900)
    limiter.change(window(low, HOUR))
    getattr(limiter, touch)("k", NOW, 1)
    limiter.change(window(1000, HOUR))
    assert limiter.remaining("k", NOW) == [99 if touch == "charge" else 101]


def test_raising_a_window_absorbs_its_debt(segment: Segment) -> None:
    limiter = Limiter(segment, window(10, HOUR))
    limiter.charge("k", NOW, 25)
    assert limiter.peek("k", NOW).retry_after_ns >= 2.5 * HOUR
    limiter.change(window(30, HOUR))
    assert limiter.remaining("k", NOW) == [5]
    assert limiter.acquire("k", NOW, 5)
    assert HOUR <= limiter.peek("k", NOW).retry_after_ns <= HOUR + 2 * 2**5


@pytest.mark.parametrize("changes", [33, 65, 97, 32 * 100 + 1, 2**16 + 1])
def test_a_bucket_that_sleeps_through_changes_keeps_its_use(segment: Segment, changes: int) -> None:
    """Once 199 were admitted: after 32 changes its version came round, and it was read as
    ``Limit(1, per=3600)``, under which an hour is one token."""
    limiter = Limiter(segment, bucket(100, HOUR))
    assert limiter.acquire("k", NOW, 100)
    for n in islice(cycle((50, 70)), changes - 2):
        limiter.change(bucket(n, HOUR))
    limiter.change(bucket(1, HOUR))
    limiter.change(bucket(100, HOUR))
    assert limiter.drain("k", NOW + SECOND, 200) == 0
    assert limiter.drain("k", NOW + HOUR, 200) == 100


@pytest.mark.parametrize("changes", [33, 65, 97])
def test_a_bucket_that_is_denied_through_changes_keeps_its_use(
    segment: Segment, changes: int
) -> None:
    limiter = Limiter(segment, bucket(100, HOUR))
    assert limiter.acquire("k", NOW, 100)
    rules = [bucket(n, HOUR) for n in islice(cycle((50, 70)), changes - 2)]
    for i, rule in enumerate([*rules, bucket(1, HOUR), bucket(100, HOUR)]):
        limiter.change(rule)
        assert not limiter.acquire("k", NOW + i)
    assert limiter.drain("k", NOW + SECOND, 200) == 0


@pytest.mark.parametrize("changes", [4, 5, 31, 1000])
def test_a_token_that_was_used_before_many_changes_stays_one(
    segment: Segment, changes: int
) -> None:
    """Once it became a whole burst of debt: limits older than three changes were forgotten."""
    limiter = Limiter(segment, bucket(100, HOUR))
    assert limiter.acquire("k", NOW, 1)
    for n in islice(cycle((60, 40)), changes):
        limiter.change(bucket(n, HOUR))
    assert limiter.remaining("k", NOW) == [(60 if changes % 2 else 40) - 1]
    limiter.change(bucket(100, HOUR))
    assert limiter.remaining("k", NOW) == [99]
    assert limiter.drain("k", NOW, 100) == 99


def test_a_controller_that_changes_the_rate_for_ever_admits_no_more_than_the_highest(
    segment: Segment,
) -> None:
    """``Limit(100 | 40 | 60, per=2)``, changed a thousand times a second. Once two processes were
    admitted 5,246 and more in 7 s; one that asks each 34 ms was admitted 896."""
    limiter = Limiter(segment, bucket(100, 2 * SECOND))
    admitted, rates = 0, cycle((40, 100, 60))
    for ms in range(7000):
        limiter.change(bucket(next(rates), 2 * SECOND))
        if ms % 34 == 0:
            admitted += limiter.drain("k", NOW + ms * 10**6, 1000)
    assert admitted <= 100 + 7 * 50
    assert admitted >= 20 * 7  # nor is it locked out: what the lowest limit gives


def test_lowering_a_bucket_makes_no_debt(segment: Segment) -> None:
    """What was used at a token a second is gone after as many seconds, whatever comes next."""
    limiter = Limiter(segment, bucket(100, 100 * SECOND))
    assert limiter.acquire("k", NOW, 100)
    limiter.change(bucket(1, HOUR))
    assert limiter.peek("k", NOW).retry_after_ns <= 100 * SECOND + 1000
    assert not limiter.acquire("k", NOW + 99 * SECOND)
    assert limiter.acquire("k", NOW + 100 * SECOND + 1000)
    assert limiter.peek("k", NOW + 100 * SECOND + 1000).retry_after_ns >= HOUR - 1000


def test_a_sliding_window_counts_on_when_its_limit_changes(segment: Segment) -> None:
    limiter = Limiter(segment, sliding(100, HOUR))
    start = NOW - NOW % HOUR + HOUR
    assert limiter.acquire("k", start, 80)
    for n in islice(cycle((5, 100)), 100):
        limiter.change(sliding(n, HOUR))
    assert limiter.remaining("k", start) == [20]
    limiter.change(sliding(5, HOUR))
    limiter.refund("k", start, 1)
    limiter.change(sliding(100, HOUR))
    assert limiter.remaining("k", start) == [21]
    assert limiter.remaining("k", start + HOUR + HOUR // 2) == [60]


def test_permits_beyond_a_lowered_limit_count_for_the_key_that_holds_them(segment: Segment) -> None:
    """That another key holds none there says nothing of this one."""
    limiter = Limiter(segment, permits(100))
    held = [limiter.admit("k", NOW)[0] for _ in range(90)]
    limiter.change(permits(10))
    assert limiter.admit("another", NOW)[1].status
    assert limiter.in_flight("k") == 90
    for permit in held[:40]:
        assert limiter.release(permit)
    assert not limiter.admit("k", NOW)[1].status  # 50 are held, of 10


def test_a_block_that_is_refused_changes_nothing(segment: Segment) -> None:
    """Once it brought what was used under the present limit, where it lasts longer."""
    limiter = Limiter(segment, bucket(2, SECOND, 1))
    assert limiter.acquire("k", NOW)
    limiter.change(sliding(1, HOUR))
    assert limiter.block("k", NOW, SECOND) == lib.FSHM_E_ARGUMENT
    assert limiter.remaining("k", NOW + SECOND) == [1]


@pytest.mark.parametrize("n", [2, 19, 1837, 100_000])
def test_a_settlement_finds_its_window_whatever_the_limit_was_meanwhile(
    segment: Segment, n: int
) -> None:
    """The end of a window is rounded anew when its limit is raised."""
    limiter = Limiter(segment, window(6, 60 * SECOND))
    permit, _ = limiter.admit("k", NOW + 1, 3)
    limiter.change(window(n, 60 * SECOND))
    limiter.charge("k", NOW + 2, 1)
    limiter.change(window(6, 60 * SECOND))
    limiter.settle("k", NOW + 3, 3, 1, permit)
    assert limiter.remaining("k", NOW + 3) == [4]


def test_limits_that_were_in_force_while_a_key_slept_make_no_debt(segment: Segment) -> None:
    """A token of which it was not asked is gone after a second, whatever else came and went."""
    limiter = Limiter(segment, bucket(47, 43 * SECOND))
    assert limiter.acquire("k", NOW)
    for n in range(1, 60):
        limiter.change(bucket(n, 43 * 86400 * SECOND, 1), now=NOW + n)
    limiter.change(bucket(1, HOUR), now=NOW + 60)
    assert limiter.acquire("k", NOW + 2 * SECOND)


def test_a_sliding_window_of_another_period_denies_no_longer_than_either(segment: Segment) -> None:
    old, new = 195_455_201_964, 240 * SECOND
    limiter = Limiter(segment, sliding(4, old))
    now = 17_801_297_092_034_108
    limiter.charge("k", now, 1)
    limiter.change(sliding(1, new), now=now)
    retry = limiter.apply(lib.FSHM_ACQUIRE, "k", now, 1).retry_after_ns
    assert retry <= min((now // old + 2) * old, (now // new + 2) * new) - now


def test_what_a_single_limit_counted_goes_to_the_one_that_replaces_it(segment: Segment) -> None:
    """Once 62 of 39 were admitted: the limit had its kind and period in common with one that was in
    force earlier, beside another, and went on from what that one had counted."""
    limiter = Limiter(segment, bucket(2, 60 * SECOND, burst=1), bucket(1, 2_908_915))
    assert limiter.acquire("k", NOW)
    limiter.change(bucket(63, 2_097_152, burst=25))
    assert limiter.acquire("k", NOW, 24)
    limiter.change(bucket(39, 2_908_915))
    assert limiter.drain("k", NOW, 100) <= 39 - 25


def test_a_limit_that_comes_back_in_place_of_another_takes_over_its_use(segment: Segment) -> None:
    """Limits by the minute and the hour; then one by the second; then the one by the hour alone."""
    limiter = Limiter(segment, window(100, 60 * SECOND), window(100, HOUR))
    assert limiter.acquire("k", NOW)
    limiter.change(window(10, SECOND))
    assert limiter.acquire("k", NOW, 9)
    limiter.change(window(100, HOUR))
    assert limiter.remaining("k", NOW) == [90]


def test_what_drained_at_a_fast_pace_in_between_does_not_come_back(segment: Segment) -> None:
    """Slow, fast, slow again. Once 20 were admitted within a second where at most 11 may."""
    slow, fast = bucket(10, 10 * HOUR), bucket(10, SECOND)
    limiter = Limiter(segment, slow)
    permit, d = limiter.admit("k", NOW, 10)
    assert d.status
    limiter.change(fast)
    assert not limiter.acquire("k", NOW + SECOND)  # from now on it drains fast
    limiter.change(slow)
    assert limiter.drain("k", NOW + 3 * SECOND, 100) == 10
    limiter.settle("k", NOW + 3 * SECOND, 10, 0, permit)
    assert limiter.drain("k", NOW + 3 * SECOND, 100) == 0


def test_the_same_where_the_fast_rule_was_swept_away(segment: Segment) -> None:
    slow = bucket(10, 10 * HOUR)
    limiter = Limiter(segment, slow)
    permit, _ = limiter.admit("k", NOW, 10)
    limiter.change(bucket(10, SECOND), now=NOW)
    assert not limiter.acquire("k", NOW + SECOND)
    at = NOW + 3 * SECOND
    for n in range(20, 60):  # more rules than there are slots for
        limiter.change(bucket(n, n * HOUR), now=at)
    limiter.change(slow, now=at)
    assert limiter.drain("k", at, 100) == 10
    limiter.settle("k", at, 10, 0, permit)
    assert limiter.drain("k", at, 100) == 0


def test_what_has_not_drained_comes_back_though_limits_changed_and_came_back(
    segment: Segment,
) -> None:
    slow = bucket(10, 10 * HOUR)
    limiter = Limiter(segment, slow)
    permit, _ = limiter.admit("k", NOW, 10)
    for n in range(20, 60):
        limiter.change(bucket(n, n * HOUR), now=NOW)
    limiter.change(slow, now=NOW)
    limiter.settle("k", NOW, 10, 0, permit)
    assert limiter.drain("k", NOW, 100) == 10
