"""Windows of the calendar: when they begin and end, over changes of summer time and steps of the
clock; against zoneinfo and a model that counts."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import calendar
from support.children import run_one
from support.names import remove, unique_name

from fast_litellm_shm import FixedWindow, RateLimiter, Segment, TokenBucket
from fast_litellm_shm._shared import zones
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.limits import describe, longest, reason

# Half-hour summer time; summer time that begins and ends at midnight; four changes a year; none.
ZONES = (
    "UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Santiago",
    "Africa/Cairo", "Asia/Beirut", "America/Havana", "Africa/Casablanca", "Asia/Gaza",
    "Asia/Kathmandu", "Pacific/Kiritimati", "Antarctica/Troll",
)  # fmt: skip
MINUTE, DAY = 60_000_000_000, 86_400_000_000_000


class Clock:
    """The kernel's clock of the day, as the segment sees it."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.handle = segment._handle
        self._pretended = 0

    def now(self) -> int:
        """What all processes of the segment go by, ns since 1970."""
        return int(lib.fshm_wall(self.handle, 0))

    def set(self, minute: int) -> None:
        """Half a minute past it, so that a slow test stays in that minute."""
        import time

        self.step(minute * MINUTE + MINUTE // 2 - time.time_ns() - self._pretended)

    def step(self, ns: int) -> None:
        self._pretended += ns
        lib.fshm_wall_pretend(self.handle, self._pretended)


@pytest.fixture
def clock(segment: Segment) -> Iterator[Clock]:
    yield Clock(segment)
    lib.fshm_wall_pretend(segment._handle, 0)


def at(zone: str, *wall: int) -> int:
    return calendar.minute_of(*wall, zone=zone)


def end_of(per: str, zone: str, minute: int) -> int:
    known = zones.spans(zone) if zone != "UTC" else ()
    words = ffi.new("uint64_t[]", known or (0,))
    return int(lib.fshm_calendar_end(calendar.USUAL[per] * 10**9, words, len(known), minute))


def _near_changes(zone: str) -> st.SearchStrategy[int]:
    changes = [span >> 16 for span in zones.spans(zone)[1:]] if zone != "UTC" else []
    if not changes:
        return st.integers(28_927_000, 68_900_000)  # 2025 .. 2100
    anywhere = st.integers(28_927_000, 49_000_000)  # .. 2063
    near = st.builds(int.__add__, st.sampled_from(changes), st.integers(-1600, 1600))
    return st.one_of(anywhere, near)


@settings(max_examples=600, deadline=None)
@given(
    st.data(),
    st.sampled_from(ZONES) | st.sampled_from(sorted(available_timezones())),
    st.sampled_from(calendar.PERIODS),
)
def test_windows_end_when_zoneinfo_says(data: Any, zone: str, per: str) -> None:
    minute = data.draw(_near_changes(zone))
    assert end_of(per, zone, minute) == calendar.end(per, ZoneInfo(zone), minute)


@pytest.mark.parametrize(
    ("per", "wall", "end"),
    [
        ("day", (2028, 2, 28, 12, 0), (2028, 2, 29)),
        ("day", (2028, 2, 29, 23, 59), (2028, 3, 1)),
        ("month", (2028, 2, 29, 12, 0), (2028, 3, 1)),
        ("month", (2027, 12, 31, 23, 59), (2028, 1, 1)),
        ("year", (2028, 2, 29, 0, 0), (2029, 1, 1)),
        ("week", (2027, 1, 4, 0, 0), (2027, 1, 11)),
        ("week", (2027, 1, 3, 23, 59), (2027, 1, 4)),
        ("day", (2100, 2, 28, 0, 0), (2100, 3, 1)),
    ],
)
def test_leap_years_and_mondays(per: str, wall: tuple[int, ...], end: tuple[int, ...]) -> None:
    assert end_of(per, "UTC", at("UTC", *wall)) == at("UTC", *end)


@pytest.mark.parametrize(
    ("zone", "day", "hours"),
    [
        ("Europe/Berlin", (2027, 3, 28), 23),
        ("Europe/Berlin", (2027, 10, 31), 25),
        ("America/Santiago", (2027, 9, 5), 23),  # which begins at 01:00
        ("America/Santiago", (2027, 4, 3), 25),
        ("Australia/Lord_Howe", (2027, 10, 3), 23.5),
    ],
)
def test_days_of_other_lengths(
    segment: Segment, clock: Clock, zone: str, day: tuple[int, ...], hours: float
) -> None:
    limiter = RateLimiter(FixedWindow(2, per="day", timezone=zone), name="d", segment=segment)
    begin = calendar.midnight(ZoneInfo(zone), *day)
    clock.set(begin - 1)
    assert [bool(limiter.acquire("k")) for _ in range(3)] == [True, True, False]
    clock.set(begin)
    found = limiter.acquire("k")
    assert found and found.reset_after == pytest.approx(hours * 3600 - 30, abs=5)
    clock.set(begin + int(hours * 60) - 1)
    assert [bool(limiter.acquire("k")) for _ in range(2)] == [True, False]
    clock.set(begin + int(hours * 60))
    assert limiter.acquire("k")


def test_all_keys_begin_together(segment: Segment, clock: Clock) -> None:
    """Unlike ``per=86_400``, which begins with a key's first request."""
    limiter = RateLimiter(
        FixedWindow(1, per="day", timezone="Europe/Berlin"), name="d", segment=segment
    )
    clock.set(at("Europe/Berlin", 2027, 5, 3, 9, 0))
    assert limiter.acquire("early")
    clock.set(at("Europe/Berlin", 2027, 5, 3, 23, 58))
    late = limiter.acquire("late")
    assert late and late.reset_after == pytest.approx(90, abs=5)
    denied = limiter.acquire("early")
    assert not denied and denied.retry_after == pytest.approx(90, abs=5)
    clock.set(at("Europe/Berlin", 2027, 5, 4, 0, 0))
    assert limiter.acquire("early") and limiter.acquire("late")


def test_a_clock_that_is_set_back_begins_no_window_twice(segment: Segment, clock: Clock) -> None:
    limiter = RateLimiter(FixedWindow(2, per="day"), name="d", segment=segment)
    clock.set(at("UTC", 2027, 5, 3, 23, 59))
    assert limiter.acquire("k") and limiter.acquire("k") and not limiter.acquire("k")
    clock.set(at("UTC", 2027, 5, 4, 0, 10))
    assert limiter.acquire("k") and limiter.acquire("k") and not limiter.acquire("k")
    assert limiter.acquire("other", 2)
    for back in (
        (2027, 5, 3, 23, 30),
        (2027, 5, 3, 23, 59),
        (2027, 5, 4, 0, 0),
        (2027, 5, 4, 9, 0),
    ):
        clock.set(at("UTC", *back))
        assert not limiter.acquire("k") and not limiter.acquire("other")
    found = limiter.peek("k")
    assert found.retry_after == pytest.approx(15 * 3600 - 30, abs=5)
    clock.set(at("UTC", 2027, 5, 5, 0, 0))
    assert limiter.acquire("k") and limiter.acquire("other")


def test_a_key_that_is_new_after_the_clock_was_set_back(segment: Segment, clock: Clock) -> None:
    """It is in the later window too: that one has begun."""
    limiter = RateLimiter(FixedWindow(2, per="hour"), name="d", segment=segment)
    clock.set(at("UTC", 2027, 5, 4, 0, 0))
    assert limiter.acquire("old")
    clock.set(at("UTC", 2027, 5, 3, 23, 30))
    found = limiter.acquire("new", 2)
    assert found and found.reset_after == pytest.approx(5400 - 30, abs=5)
    clock.set(at("UTC", 2027, 5, 4, 0, 30))
    assert not limiter.acquire("new")


def test_a_clock_that_was_wrong_by_more_than_a_day(segment: Segment, clock: Clock) -> None:
    limiter = RateLimiter(FixedWindow(2, per="day"), name="d", segment=segment)
    clock.set(at("UTC", 2031, 1, 1, 12, 0))
    assert limiter.acquire("k", 2)
    clock.set(at("UTC", 2027, 5, 3, 12, 0))
    assert clock.now() // MINUTE == at("UTC", 2027, 5, 3, 12, 0)
    # What was consumed counts until the end of the window that it is now.
    assert not limiter.acquire("k") and limiter.acquire("other", 2)
    clock.set(at("UTC", 2027, 5, 4, 0, 0))
    assert limiter.acquire("other")


def test_thirty_days_begin_with_the_first_request(segment: Segment, clock: Clock) -> None:
    limiter = RateLimiter(FixedWindow(1, per=30 * 86_400), name="d", segment=segment)
    clock.set(at("UTC", 2027, 5, 31, 23, 0))
    found = limiter.acquire("k")
    assert found.reset_after == pytest.approx(30 * 86_400, abs=5)
    clock.set(at("UTC", 2027, 6, 1, 0, 0))  # the clock on the wall does not matter to it
    assert not limiter.acquire("k")


def test_debt_ends_with_its_window(segment: Segment, clock: Clock) -> None:
    limiter = RateLimiter(FixedWindow(10, per="month"), name="d", segment=segment)
    clock.set(at("UTC", 2027, 5, 31, 23, 0))
    limiter.charge("k", 1000)
    found = limiter.acquire("k")
    assert not found and found.retry_after == pytest.approx(3600 - 30, abs=5)
    clock.set(at("UTC", 2027, 6, 1, 0, 0))
    assert limiter.acquire("k", 10)


def test_a_settlement_of_a_window_that_is_over_gives_nothing_back(
    segment: Segment, clock: Clock
) -> None:
    limiter = RateLimiter(
        FixedWindow(10, per="day"), TokenBucket(100, per=36_000), name="d", segment=segment
    )
    clock.set(at("UTC", 2027, 5, 31, 23, 59))
    assert limiter.acquire("k", (5, 1))
    clock.set(at("UTC", 2027, 6, 1, 0, 0))
    assert limiter.acquire("k", (10, 1))
    assert not limiter.acquire("k", (1, 1))


@pytest.fixture
def small() -> Iterator[Segment]:
    name = unique_name("small")
    found = Segment(name, capacity=40)
    yield found
    lib.fshm_wall_pretend(found._handle, 0)
    remove(name)


def test_slots_are_reused_when_windows_end_and_not_before(small: Segment) -> None:
    clock = Clock(small)
    limiter = RateLimiter(FixedWindow(1, per="month"), name="d", segment=small, on_full="deny")
    clock.set(at("UTC", 2027, 5, 10, 0, 0))
    first = [key for i in range(200) if limiter.acquire(key := f"a{i}")]
    assert 30 <= len(first) < 200
    clock.set(at("UTC", 2027, 5, 31, 23, 59))
    assert not any(limiter.acquire(key) for key in first)  # no live key is forgotten
    assert not any(limiter.acquire(f"b{i}") for i in range(100))
    clock.set(at("UTC", 2027, 6, 1, 0, 0))
    assert sum(bool(limiter.acquire(f"c{i}")) for i in range(100)) >= 30
    clock.set(at("UTC", 2027, 5, 31, 23, 50))  # set back: those of June are still there
    assert not any(limiter.acquire(f"c{i}") for i in range(100))


def test_another_process_goes_by_the_same_windows(segment: Segment, clock: Clock) -> None:
    clock.set(at("Europe/Berlin", 2027, 5, 31, 23, 59))
    limit = FixedWindow(3, per="month", timezone="Europe/Berlin")
    limiter = RateLimiter(limit, name="d", segment=segment)
    assert limiter.acquire("k", 2)
    pid_said: Any = run_one(_acquire_in_child, pickle.dumps(limiter), clock._pretended)
    assert pid_said == [True, False, repr(limit)]
    assert not limiter.acquire("k")


def _acquire_in_child(pickled: bytes, pretended: int) -> list[Any]:
    limiter = pickle.loads(pickled)
    lib.fshm_wall_pretend(limiter.segment._handle, pretended)
    found: list[Any] = [bool(limiter.acquire("k")) for _ in range(2)]
    return [*found, repr(limiter.limits[0])]


def test_two_tz_databases(segment: Segment, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that sets the limit last decides, for all; a window that has begun ends as it was
    to."""
    clock.set(at("Europe/Berlin", 2027, 7, 10, 12, 0))
    limit = FixedWindow(3, per="day", timezone="Europe/Berlin")
    ours = RateLimiter(limit, name="d", segment=segment)
    assert ours.acquire("k").reset_after == pytest.approx(12 * 3600 - 30, abs=5)
    other = (60 + 32768,)  # a database of a country that gave up summer time
    monkeypatch.setattr(zones, "spans", lambda name: other)
    theirs = RateLimiter(limit, name="d", segment=segment)
    for limiter in (ours, theirs):
        assert limiter.acquire("k").reset_after == pytest.approx(12 * 3600 - 30, abs=5)
        found = limiter.peek("new")
        assert limiter.acquire(f"new {id(limiter)}").reset_after == pytest.approx(
            13 * 3600 - 30, abs=5
        ), found
    assert not ours.acquire("k", 2) and ours.limits == theirs.limits == (limit,)


def test_changes_between_kinds_keep_what_was_consumed(segment: Segment, clock: Clock) -> None:
    def limit(*found: Any) -> RateLimiter:
        return RateLimiter(*found, name="d", segment=segment)

    clock.set(at("UTC", 2027, 5, 10, 12, 0))
    assert limit(FixedWindow(10, per="month")).acquire("k", 8)
    daily = limit(FixedWindow(10, per="day"))
    assert not daily.acquire("k", 3)
    clock.set(at("UTC", 2027, 5, 11, 0, 0))  # the month goes on
    assert not daily.acquire("k", 3) and daily.acquire("k", 2)
    seconds = limit(FixedWindow(10, per=60))
    assert not seconds.acquire("k") and (seconds.peek("k").retry_after or 0) > 86_400
    assert not limit(FixedWindow(10, per="year")).acquire("k")
    clock.set(at("UTC", 2027, 6, 1, 0, 0))
    assert limit(FixedWindow(10, per="year")).acquire("k", 10)
    bucket = limit(TokenBucket(10, per=36_000))
    assert not bucket.acquire("k")
    assert not limit(FixedWindow(10, per="hour")).acquire("k")


@dataclass
class Model:
    """Counts tokens, one window at a time."""

    n: int
    per: str
    zone: str
    wall: int  # the latest minute that was seen
    open: dict[str, tuple[int, int]] = field(default_factory=dict)  # end, count

    def set(self, minute: int) -> None:
        back = self.wall - minute
        if back <= 0 or back > 1440:
            self.wall = minute

    def window(self, key: str) -> tuple[int, int]:
        end, count = self.open.get(key, (0, 0))
        if end <= self.wall or not count:
            return calendar.end(self.per, ZoneInfo(self.zone), self.wall), 0
        return end, count

    def take(self, key: str, cost: int) -> bool:
        end, count = self.window(key)
        if count + cost > self.n:
            return False
        self.open[key] = end, count + cost
        return True

    def change(self, key: str, by: int) -> None:
        end, count = self.window(key)
        self.open[key] = end, max(count + by, 0)


LIMITS = st.tuples(st.integers(1, 12), st.sampled_from(calendar.PERIODS), st.sampled_from(ZONES))
KEYS = st.sampled_from(["a", "b"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), KEYS, st.integers(1, 6)),
        st.tuples(st.just("charge"), KEYS, st.integers(0, 20)),
        st.tuples(st.just("refund"), KEYS, st.integers(0, 20)),
        st.tuples(st.just("forward"), st.integers(1, 50_000)),
        st.tuples(st.just("forward"), st.integers(1, 120)),
        st.tuples(st.just("back"), st.integers(1, 1430)),
        st.tuples(st.just("limit"), LIMITS),
    ),
    max_size=40,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(STEPS, LIMITS, st.integers(28_930_000, 31_000_000))
def test_stories(
    segment: Segment, clock: Clock, steps: list[Any], first: tuple[int, str, str], start: int
) -> None:
    # the year before, to be seen as a clock that was wrong
    name = "stories"
    clock.set(start - 600_000)
    clock.set(start)
    n, per, zone = first
    limiter = RateLimiter(FixedWindow(n, per=per, timezone=zone), name=name, segment=segment)
    limiter.reset()
    model, shown = Model(n, per, zone, clock.now() // MINUTE), start
    for step in steps:
        if step[0] == "take":
            _, key, cost = step
            found = limiter.acquire(key, cost)
            assert bool(found) == model.take(key, cost), step
        elif step[0] in ("charge", "refund"):
            _, key, cost = step
            getattr(limiter, step[0])(key, cost)
            model.change(key, cost if step[0] == "charge" else -cost)
        elif step[0] == "limit":
            model.n, model.per, model.zone = step[1]
            limit = FixedWindow(model.n, per=model.per, timezone=model.zone)
            limiter = RateLimiter(limit, name=name, segment=segment)
        else:
            shown += step[1] if step[0] == "forward" else -step[1]
            shown -= model.wall - shown == 1440  # neither a day back nor more
            clock.set(shown)
            model.set(shown)
        for key in ("a", "b"):
            end, count = model.window(key)
            peeked = limiter.peek(key, 1)
            assert peeked.remaining == max(model.n - count, 0), (step, key)
            if count:
                left = end * 60 - shown * 60 - 30  # the clock may stand still until then
                assert peeked.reset_after == pytest.approx(left, abs=5), (step, key)
    limiter.reset()


# what a limit says


def test_what_it_says() -> None:
    limit = FixedWindow(1000, per="month", timezone="Europe/Berlin")
    assert repr(limit) == "FixedWindow(n=1000, per='month', timezone='Europe/Berlin')"
    assert limit == pickle.loads(pickle.dumps(limit)) == eval(repr(limit))
    assert describe(limit) == "1000/month Europe/Berlin window"
    assert reason(limit) == "Rate limit exceeded (requests per month)"
    assert longest(limit) >= 31 * 86_400
    assert FixedWindow(5, per="day").timezone == "UTC"
    assert FixedWindow(5, per="day", timezone=ZoneInfo("Asia/Tokyo")).timezone == "Asia/Tokyo"  # type: ignore[arg-type]
    assert repr(FixedWindow(5, per=60)) == "FixedWindow(n=5, per=60)"
    assert FixedWindow(5, per="day") != FixedWindow(5, per=86_400)


@pytest.mark.parametrize("zone", ["Europe/Berlyn", "", "../etc/passwd", "x" * 100, "/etc/passwd"])
def test_a_zone_that_is_not_known(zone: str) -> None:
    with pytest.raises(ValueError, match="FixedWindow: timezone must be a name of the tz database"):
        FixedWindow(5, per="day", timezone=zone)


@pytest.mark.parametrize("per", [60, 86_400.0])
def test_a_zone_needs_a_period_of_the_calendar(per: float) -> None:
    with pytest.raises(ValueError, match="timezone goes with per='hour'"):
        FixedWindow(5, per=per, timezone="Europe/Berlin")


@pytest.mark.parametrize("per", ["60", "minute", "Day", ""])
def test_a_period_that_the_calendar_does_not_have(per: str) -> None:
    with pytest.raises(
        TypeError, match="per must be a number of seconds or a timedelta, or 'hour'"
    ):
        FixedWindow(5, per=per)


def test_default_names_differ(segment: Segment) -> None:
    names = {
        RateLimiter(limit, segment=segment).name
        for limit in (
            FixedWindow(5, per="day"),
            FixedWindow(5, per="day", timezone="Asia/Tokyo"),
            FixedWindow(5, per=86_400),
        )
    }
    assert len(names) == 3


def test_more_zones_than_a_segment_keeps(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    from fast_litellm_shm import SegmentFullError

    for i in range(63):
        monkeypatch.setattr(zones, "spans", lambda name, i=i: (i + 32768,))
        assert zones.index_of(segment, "Europe/Berlin") == i + 1
    monkeypatch.setattr(zones, "spans", lambda name: (100 + 32768,))
    with pytest.raises(SegmentFullError, match="no room for another time zone"):
        zones.index_of(segment, "Europe/Berlin")
    monkeypatch.setattr(zones, "spans", lambda name: (7 + 32768,))
    assert zones.index_of(segment, "Europe/Berlin") == 8
