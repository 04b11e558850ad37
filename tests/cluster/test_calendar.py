"""Windows of the calendar over many hosts: the server's clock says when they end."""

from __future__ import annotations

from zoneinfo import ZoneInfo

from cluster.test_meter import Meter, meter, new_key, some
from hypothesis import given
from hypothesis import strategies as st
from support import calendar, servers

from fast_litellm_shm import FixedWindow, RateLimiter, Segment

__all__ = ["meter"]  # a fixture
MINUTE = 60_000_000  # us
ZONES = ("UTC", "Europe/Berlin", "America/Santiago", "Australia/Lord_Howe")

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("single"), st.integers(1, 6)),
        st.tuples(st.just("charge"), st.integers(0, 20)),
        st.tuples(st.just("refund"), st.integers(0, 20)),
        st.tuples(st.just("pass"), st.integers(1, 50_000)),
        st.tuples(st.just("pass"), st.integers(1, 120)),
        st.tuples(st.just("back"), st.integers(1, 600)),
    ),
    max_size=25,
)


@some
@given(
    STEPS,
    st.integers(1, 12),
    st.sampled_from(calendar.PERIODS),
    st.sampled_from(ZONES),
    st.integers(28_930_000, 31_000_000),
    st.integers(-50, 50),
)
def test_stories(
    meter: Meter,
    steps: list[tuple[str, int]],
    n: int,
    per: str,
    zone: str,
    minute: int,
    apart: int,
) -> None:
    """The host's clock differs from the server's by ``apart`` minutes. A window that is empty again
    may go on, or a new one begin: that differs where the clock is set back."""
    begun = set[int]()
    key, limit = new_key(), FixedWindow(n, per=per, timezone=zone)
    ends, count = set[int](), 0
    for what, number in steps:
        if what in ("pass", "back"):
            minute += number if what == "pass" else -number
            continue
        at = minute * MINUTE + MINUTE // 2
        ends = {end for end in ends if end > minute}
        count = count if ends else 0
        if not count:
            begun.add(calendar.end(per, ZoneInfo(zone), minute))
            ends = {end for end in begun if end > minute}
        found = meter(at, "h", what, key, [limit], costs=number, minute=minute + apart)
        if what == "single":
            assert found.admitted == (count + number <= n), (what, number)
            count += number * found.admitted
            if not found.admitted and number <= n:
                assert found.retry_after_ns in {(end * MINUTE - at) * 1000 for end in ends}
        else:
            count = max(count + (number if what == "charge" else -number), 0)
        (known,) = found.limits
        assert known.used == count
        if count:
            ends = {end for end in ends if known.left_ns == (end * MINUTE - at) * 1000}
            assert ends


def test_a_batch_is_spent_before_the_window_ends(meter: Meter) -> None:
    limit = FixedWindow(100, per="month", timezone="Europe/Berlin")
    end = calendar.minute_of(2027, 6, 1, zone="Europe/Berlin")
    found = meter(end * MINUTE - 1000, "h", "take", new_key(), [limit], costs=1)
    assert found.admitted and found.batch > 0
    assert found.limits[0].lease_ns == 1_000_000
    again = meter(end * MINUTE, "h", "take", new_key(), [limit], costs=1)
    assert again.limits[0].lease_ns == 30 * 86_400 * 10**9


def test_hosts_share_a_month(server: servers.Server, segment: Segment, other: Segment) -> None:
    limit = FixedWindow(50, per="month", timezone="Europe/Berlin")
    here, there = (
        RateLimiter(limit, name="m", segment=each, cluster=server.url) for each in (segment, other)
    )
    assert sum(bool(each.acquire("k")) for _ in range(60) for each in (here, there)) == 50
    denied, peeked = here.acquire("k"), there.peek("k")
    assert not denied and denied.retry_after is not None and denied.retry_after > 0
    assert peeked.retry_after is not None
    # Windows end with a minute. What the server says is left is rounded up to one: that one, or the
    # next.
    apart = abs(peeked.retry_after - denied.retry_after)
    assert min(apart, abs(apart - 60)) <= 5


def test_a_change_from_days_to_months(meter: Meter) -> None:
    """A window that has begun goes on to its end."""
    key, minute = new_key(), calendar.minute_of(2027, 5, 10, 12, 0)
    day, month = FixedWindow(10, per="day"), FixedWindow(10, per="month")
    at = minute * MINUTE
    assert meter(at, "h", "single", key, [day], costs=8).admitted
    assert not meter(at + 1, "h", "single", key, [month], costs=3).admitted
    found = meter(at + 720 * MINUTE, "h", "single", key, [month], costs=3)
    assert found.admitted and found.limits[0].used == 3
    assert found.limits[0].left_ns == 21 * 86_400 * 10**9
