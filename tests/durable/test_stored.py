"""States outside a segment count as those in one: the same arithmetic, whatever the clock says."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from support.names import remove, unique_name

from fast_litellm_shm import FixedWindow, Segment, SlidingWindow, TokenBucket
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.limits import LimitSpec

UNIT = 2**31 / 1e9  # s: ends of windows are kept in units of it at most, or of a divisor
START = 2**31 * 10_000_000  # ns: a time of day
LIMITS = [
    FixedWindow(7, per=2 * UNIT), FixedWindow(100, per=UNIT), SlidingWindow(9, per=2 * UNIT),
    SlidingWindow(120, per=2 * UNIT), TokenBucket(8, per=UNIT), TokenBucket(8, per=UNIT, burst=3),
    TokenBucket(16, per=UNIT, burst=4, strict=True),
]  # fmt: skip
_OPERATIONS = (lib.FSHM_ACQUIRE, lib.FSHM_PEEK, lib.FSHM_CHARGE, lib.FSHM_REFUND)


class Stored:
    def __init__(self) -> None:
        self.state = ffi.new("fshm_stored *")

    def apply(self, op: int, limit: LimitSpec, cost: int, now: int, charged: Any = None) -> Any:
        out, raw = ffi.new("fshm_stored_answer *"), ffi.new("fshm_limit *", limit._raw())
        by = ffi.NULL if charged is None else charged
        assert lib.fshm_stored_apply(op, raw, self.state, cost, by, now, out) == lib.FSHM_OK
        return out


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
@given(limits=st.lists(st.sampled_from(LIMITS), min_size=1, max_size=3), steps=STEPS)
def test_it_counts_as_a_segment_does(
    big: Segment, limits: list[LimitSpec], steps: list[tuple[int, int, int, bool]]
) -> None:
    kinds = {type(each) for each in limits}
    assume(kinds == {SlidingWindow} or SlidingWindow not in kinds)  # else windows begin elsewhere
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
    cost=st.integers(0, 2**64 - 1),
)  # fmt: skip
def test_no_state_can_do_harm(
    words: list[int], op: int, limit: LimitSpec, now: int, cost: int
) -> None:
    """A file can hold anything."""
    state, other = ffi.new("fshm_stored *"), ffi.new("fshm_stored *")
    n, per, burst, kind, strict, end, used, previous, _ = words
    for each, raw in ((state, (n, per, burst, kind % 8, strict % 2)), (other, limit._raw())):
        each[0] = {"limit": raw, "end": end, "used": used, "previous": previous}
    raw, out = ffi.new("fshm_limit *", limit._raw()), ffi.new("fshm_stored_answer *")
    for one, charged in ((state, other), (other, state), (other, ffi.NULL)):
        found = lib.fshm_stored_apply(op, raw, one, cost, charged, now, out)
        assert found in (lib.FSHM_OK, lib.FSHM_E_ARGUMENT, lib.FSHM_E_DAMAGED)
