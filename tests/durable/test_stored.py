"""States outside a segment count as those in one: the same arithmetic, whatever the clock says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.names import remove, unique_name

from fast_litellm_shm import FixedWindow, Segment, SlidingWindow, TokenBucket
from fast_litellm_shm._shared import zones
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.durable.grants import applied, raw_numbers
from fast_litellm_shm.limits import LimitSpec

UNIT = 2**31 / 1e9  # s: ends of windows are kept in units of it at most, or of a divisor
START = 2**31 * 10_000_000  # ns: a time of day
LIMITS = [
    FixedWindow(7, per=2 * UNIT), FixedWindow(100, per=UNIT), SlidingWindow(9, per=2 * UNIT),
    SlidingWindow(120, per=2 * UNIT), TokenBucket(8, per=UNIT), TokenBucket(8, per=UNIT, burst=3),
    TokenBucket(16, per=UNIT, burst=4, strict=True),
]  # fmt: skip
CALENDAR = [
    FixedWindow(9, per="hour", timezone="Australia/Lord_Howe"), FixedWindow(20, per="day"),
    FixedWindow(40, per="day", timezone="Europe/Berlin"), FixedWindow(40, per="day"),
    FixedWindow(30, per="month", timezone="America/New_York"),
    FixedWindow(30, per="week", timezone="Asia/Tokyo"), FixedWindow(60, per="year"),
]  # fmt: skip
_OPERATIONS = (lib.FSHM_ACQUIRE, lib.FSHM_PEEK, lib.FSHM_CHARGE, lib.FSHM_REFUND)


class Stored:
    def __init__(self) -> None:
        self.state = ffi.new("fshm_stored *")

    def apply(self, op: int, limit: LimitSpec, cost: int, now: int, charged: Any = None) -> Any:
        by = ffi.NULL if charged is None else charged
        return applied(op, raw_numbers(limit), self.state, cost, (now, now), by)


class InSegment:
    """A key of its own in a segment, at instants that a test chooses."""

    def __init__(self, segment: Segment, key: int) -> None:
        self._segment, self._name, self._key = segment, b"limiter", b"%d" % key
        self._limit: LimitSpec | None = None
        self._handle: Any = None

    def apply(self, op: int, limit: LimitSpec, cost: int, now: int) -> Any:
        if limit != self._limit:
            self.close()
            out, raw = ffi.new("fshm_limiter **"), ffi.new("fshm_limit *", limit._raw())
            handle = self._segment._handle
            status = lib.fshm_limiter_open_at(handle, self._name, len(self._name), raw, 1, now, out)
            assert status == lib.FSHM_OK
            self._handle, self._limit = out[0], limit
        decision, costs = ffi.new("fshm_decision *"), ffi.new("uint64_t[4]", [cost] * 4)
        lib.fshm_apply(self._handle, op, self._key, len(self._key), costs, 0, now, decision)
        return decision

    def close(self) -> None:
        if self._handle is not None:
            lib.fshm_limiter_close(self._handle)


def _lists(sliding: bool) -> st.SearchStrategy[list[LimitSpec]]:
    """Those beside others begin elsewhere in a segment."""
    of = [each for each in LIMITS if isinstance(each, SlidingWindow) == sliding]
    return st.lists(st.sampled_from(of), min_size=1, max_size=3)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(_OPERATIONS), st.integers(0, 12), st.integers(0, 3), st.booleans()
    ),
    min_size=1, max_size=30,
)  # fmt: skip
_counter = iter(range(10**9))


@pytest.fixture(scope="module", name="big")
def _big(request: pytest.FixtureRequest) -> Segment:
    name = unique_name("stored")
    request.addfinalizer(lambda: remove(name))
    return Segment(name, capacity=100_000)


@example(  # a cost of 0, when more is used than the new burst
    limits=[TokenBucket(8, per=UNIT, burst=3), FixedWindow(7, per=2 * UNIT)],
    steps=[(0, 4, 0, True), (0, 0, 0, True), (0, 0, 1, False)],
)
@given(limits=st.one_of(_lists(sliding=True), _lists(sliding=False)), steps=STEPS)
def test_it_counts_as_a_segment_does(
    big: Segment, limits: list[LimitSpec], steps: list[tuple[int, int, int, bool]]
) -> None:
    stored, number, at = Stored(), next(_counter), 0
    shared = InSegment(big, number)
    time = 4 * 2**31 * 20 * (number + 1)  # a multiple of each `per`, after the last example
    changed = False
    for op, cost, step, changes in steps:
        if changes and len(limits) > 1:
            at, changed = (at + 1) % len(limits), True
        limit = limits[at]
        time += step * 2**29
        over = stored.apply(lib.FSHM_PEEK, limit, 0, START * 4 + time).over_ns == 0
        if over and isinstance(limit, SlidingWindow):
            # A window begins with the first request, in a segment at a multiple of `per`.
            time = -(-time // 2**32) * 2**32
        one = stored.apply(op, limit, cost, START * 4 + time)
        other = shared.apply(op, limit, cost, time)
        if op in (lib.FSHM_ACQUIRE, lib.FSHM_PEEK):
            assert one.status == other.status, (op, limit, cost)
            if not changed:
                # debt is rounded up to a multiple of less than twice the tokens, in ns
                assert abs(one.retry_ns - other.retry_after_ns) <= 512
        if op == lib.FSHM_ACQUIRE and not changed:
            assert one.remaining == other.remaining
    shared.close()


@given(
    limit=st.sampled_from(LIMITS), later=st.integers(0, 60 * 365 * 86_400),
    costs=st.lists(st.integers(1, 5), max_size=8),
)  # fmt: skip
def test_it_counts_alike_at_any_time(limit: LimitSpec, later: int, costs: list[int]) -> None:
    """Not only for the years that a state of a segment can hold."""
    first, second = Stored(), Stored()
    shift = later * 10**9 // 2**32 * 2**32
    for i, cost in enumerate(costs):
        now = START + i * 10**8
        one = first.apply(lib.FSHM_ACQUIRE, limit, cost, now)
        other = second.apply(lib.FSHM_ACQUIRE, limit, cost, now + shift)
        fields = ("status", "used", "remaining", "retry_ns", "left_ns", "window_ns", "over_ns")
        assert [getattr(one, each) for each in fields] == [getattr(other, each) for each in fields]


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_what_was_granted_is_given_back_once(limit: LimitSpec) -> None:
    """As long as it counts, and never to a later window."""
    stored, most = Stored(), limit.burst if isinstance(limit, TokenBucket) else limit.n
    stored.apply(lib.FSHM_ACQUIRE, limit, most, START)
    granted = ffi.new("fshm_stored *", stored.state[0])
    for _ in range(3):
        stored.apply(lib.FSHM_REFUND, limit, 1, START, granted)
    assert stored.apply(lib.FSHM_PEEK, limit, 0, START).remaining == min(3, most)
    later = START + 4 * 2**31
    used = stored.apply(lib.FSHM_ACQUIRE, limit, most, later)
    if used.status:
        stored.apply(lib.FSHM_REFUND, limit, most, later, granted)
        assert not stored.apply(lib.FSHM_ACQUIRE, limit, 1, later).status


@given(
    words=st.lists(st.integers(0, 2**64 - 1), min_size=9, max_size=9),
    op=st.integers(0, 9), limit=st.sampled_from(LIMITS), now=st.integers(0, 2**64 - 1),
    cost=st.integers(0, 2**64 - 1), dated=st.booleans(),
)  # fmt: skip
def test_no_state_can_do_harm(
    words: list[int], op: int, limit: LimitSpec, now: int, cost: int, dated: bool
) -> None:
    """A file can hold anything."""
    state, other = ffi.new("fshm_stored *"), ffi.new("fshm_stored *")
    n, per, burst, kind, strict, end, used, previous, wall = words
    made = raw_numbers(CALENDAR[n % len(CALENDAR)] if dated else limit)[:5]
    hostile = (made[0], made[1], burst % 2, made[3], strict % 2) if dated else (
        n, per, burst, kind % 8, strict % 2
    )  # fmt: skip
    for each, raw in ((state, hostile), (other, made)):
        each[0] = {"limit": raw, "end": end, "used": used, "previous": previous}
    raw, out = ffi.new("fshm_limit *", made), ffi.new("fshm_stored_answer *")
    spans = ffi.new("uint64_t[3]", [n, per, burst])
    at = ffi.new("fshm_stored_time *", (now, wall, spans, strict % 4))
    for one, charged in ((state, other), (other, state), (other, ffi.NULL)):
        found = lib.fshm_stored_apply(op, raw, one, cost, charged, at, out)
        assert found in (lib.FSHM_OK, lib.FSHM_E_ARGUMENT, lib.FSHM_E_DAMAGED)


@pytest.mark.parametrize("kind", [lib.FSHM_PERMITS, lib.FSHM_LEASE, lib.FSHM_MONEY, 7])
def test_kinds_that_no_file_keeps(kind: int) -> None:
    per = 30 * 86_400 * 10**9 if kind == lib.FSHM_MONEY else 0
    raw, good = (9, per, 0, kind, 0), raw_numbers(FixedWindow(9, per=60))[:5]
    at, out = ffi.new("fshm_stored_time *", (START, START)), ffi.new("fshm_stored_answer *")
    for limit, own, expected in (
        (raw, good, lib.FSHM_E_ARGUMENT), (good, raw, lib.FSHM_E_DAMAGED),
    ):  # fmt: skip
        state = ffi.new("fshm_stored *", {"limit": own, "end": START, "used": 1})
        asked = ffi.new("fshm_limit *", limit)
        found = lib.fshm_stored_apply(lib.FSHM_PEEK, asked, state, 1, ffi.NULL, at, out)
        assert found == expected


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(_OPERATIONS), st.integers(0, 12), st.integers(0, len(CALENDAR) - 1),
            st.integers(0, 40 * 1440),
        ),
        min_size=1, max_size=30,
    ),
    begin=st.integers(29_000_000, 36_000_000),
)  # fmt: skip
def test_a_calendar_counts_as_a_model_does(
    steps: list[tuple[int, int, int, int]], begin: int
) -> None:
    """Whatever the clock of the file shows; limits change meanwhile, also their zones."""
    stored, used, end, minute = Stored(), 0, 0, begin
    for op, cost, at, passes in steps:
        limit = CALENDAR[at]
        minute += passes
        if end <= minute:
            used = end = 0
        when = START + (minute - begin) * 7 * 10**9, minute * 60 * 10**9
        found = applied(op, raw_numbers(limit), stored.state, cost, when)
        fits = used + cost <= limit.n or not cost
        if op in (lib.FSHM_ACQUIRE, lib.FSHM_PEEK):
            assert bool(found.status) == (fits and cost <= limit.n)
        if cost and (op == lib.FSHM_CHARGE or (op == lib.FSHM_ACQUIRE and fits)):
            used += cost
            end = end or _end(limit, minute)
        elif op == lib.FSHM_REFUND:
            used = max(used - cost, 0)
            end = end if used else 0
        assert found.used == used
        assert (stored.state.end, stored.state.used) == (end, used) or op == lib.FSHM_PEEK
        assert found.window_ns == found.over_ns == max(end - minute, 0) * 60 * 10**9


def _end(limit: FixedWindow, minute: int) -> int:
    assert limit.timezone is not None
    known = zones.spans(limit.timezone) if limit.timezone != "UTC" else ()
    words = ffi.new("uint64_t[]", known or (0,))
    return int(lib.fshm_calendar_end(limit._per_ns, words, len(known), minute))


@pytest.mark.parametrize("limit", LIMITS, ids=str)
def test_a_state_goes_over_to_the_calendar_and_back(limit: LimitSpec) -> None:
    """What was used stays used."""
    stored, day = Stored(), FixedWindow(50, per="day", timezone="Europe/Berlin")
    stored.apply(lib.FSHM_ACQUIRE, limit, 3, START)
    assert stored.apply(lib.FSHM_ACQUIRE, day, 4, START).used == 7
    assert stored.state.limit.kind == lib.FSHM_CALENDAR
    found = stored.apply(lib.FSHM_ACQUIRE, limit, 1, START)
    assert found.status == (limit.n >= 8 and getattr(limit, "burst", 8) >= 8)
