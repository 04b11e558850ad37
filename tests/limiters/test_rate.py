"""RateLimiter: deciding, charging, giving back, and what it says of bad arguments."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from support.children import run_one
from support.workers import acquire_with, set_limits

from fast_litellm_shm import (
    Decision,
    Limit,
    RateLimiter,
    Segment,
    SegmentFullError,
    SlidingWindow,
    Window,
)

# Slow enough that nothing refills while a test runs.
SLOW = [
    Limit(10, 36000),
    Limit(10, 36000, burst=10, strict=True),
    Window(10, 36000),
    SlidingWindow(10, 36000),
]
KEYS: list[Any] = [
    "user-1",
    "",
    "\0",
    "a\0b",
    "🙂" * 50,
    "\ud800",
    "x" * (1 << 20),
    b"",
    b"\xff\xfe",
    b"\0" * 5000,
]


def _id(key: Any) -> str:
    return f"{type(key).__name__}-{len(key)}-{key[:4]!a}"


def make(segment: Segment, *limits: Any, name: str = "t", **more: Any) -> RateLimiter:
    return RateLimiter(*limits, name=name, segment=segment, **more)


@pytest.mark.parametrize("limit", SLOW, ids=repr)
def test_admits_n_and_not_one_more(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    decisions = [limiter.acquire("k") for _ in range(15)]
    assert [d.allowed for d in decisions] == [True] * 10 + [False] * 5
    assert [d.remaining for d in decisions] == [*range(9, -1, -1), 0, 0, 0, 0, 0]


@pytest.mark.parametrize("limit", SLOW, ids=repr)
def test_fields_of_a_decision(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    yes = limiter.acquire("k", cost=4)
    assert isinstance(yes, Decision)
    assert (bool(yes), yes.allowed, yes.remaining, yes.retry_after) == (True, True, 6, 0.0)
    assert yes.limit == limit
    assert 0 < yes.reset_after <= 4 * 36001  # strict with a burst of n: a token every 36,000 s
    no = limiter.acquire("k", cost=7)
    assert (bool(no), no.allowed, no.remaining) == (False, False, 6)
    assert no.retry_after is not None
    assert no.retry_after_ns is not None
    assert 0 < no.retry_after <= 4 * 36001
    assert no.retry_after == pytest.approx(no.retry_after_ns / 1e9)
    assert no.limit == limit
    assert repr(no) == (
        f"Decision(allowed=False, remaining=6, retry_after={no.retry_after!r}, "
        f"reset_after={no.reset_after!r}, limit={limit!r})"
    )


def test_retry_after_is_when_it_fits(segment: Segment) -> None:
    limiter = make(segment, Limit(10, 36000))  # a token every 3,600 s
    limiter.acquire("k", cost=10)
    for cost in (1, 3, 10):
        retry = limiter.acquire("k", cost=cost).retry_after
        assert retry is not None
        # never later than the arithmetic says, and earlier only by the time the test itself took
        assert cost * 3600 - 60 < retry <= cost * 3600


@pytest.mark.parametrize("limit", SLOW, ids=repr)
def test_a_cost_that_never_fits(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    for cost in (11, 2**63, 2**64, 10**30):
        decision = limiter.acquire("k", cost=cost)
        assert not decision
        assert decision.retry_after is None
        assert decision.retry_after_ns is None
        assert "retry_after=None" in repr(decision)
    assert limiter.peek("k").remaining == 10


def test_a_cost_above_the_burst_never_fits(segment: Segment) -> None:
    limiter = make(segment, Limit(100, 60, burst=5))
    assert limiter.acquire("k", cost=6).retry_after is None
    assert limiter.acquire("k", cost=5)


@pytest.mark.parametrize("limit", SLOW, ids=repr)
def test_cost_zero_consumes_nothing(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    assert limiter.acquire("k", cost=0).remaining == 10
    limiter.acquire("k", cost=10)
    assert limiter.acquire("k", cost=0)


@pytest.mark.parametrize("key", KEYS, ids=_id)
def test_keys_of_any_length_and_content(segment: Segment, key: Any) -> None:
    limiter = make(segment, Window(2, 36000))
    assert [bool(limiter.acquire(key)) for _ in range(3)] == [True, True, False]
    assert [limiter.is_allowed(key), limiter.check(key)["allowed"]] == [False, False]
    limiter.refund(key, 1)
    assert limiter.peek(key).remaining == 1
    limiter.reset(key)
    assert limiter.get_remaining(key) == 2


def test_no_two_keys_are_one(segment: Segment) -> None:
    limiter = make(segment, Window(1, 36000))
    assert [bool(limiter.acquire(key)) for key in KEYS if key != b""] == [True] * (len(KEYS) - 1)


@pytest.mark.parametrize("key", ["", "user", "é🙂", "\0", "\ud800"], ids=ascii)
def test_a_str_is_its_utf8(segment: Segment, key: str) -> None:
    limiter = make(segment, Window(2, 36000))
    limiter.acquire(key)
    assert limiter.acquire(key.encode("utf-8", "surrogatepass")).remaining == 0
    assert not limiter.acquire(key)


@pytest.mark.parametrize("key", [None, 5, 1.5, ["k"], bytearray(b"k"), object])
@pytest.mark.parametrize("call", ["acquire", "peek", "charge", "refund", "reset", "wait"])
def test_a_key_that_is_none(segment: Segment, call: str, key: Any) -> None:
    limiter = make(segment, Window(2, 36000))
    if key is None and call == "reset":
        return  # all keys, by design
    arguments = (key, 1) if call in ("charge", "refund") else (key,)
    with pytest.raises(TypeError) as caught:
        getattr(limiter, call)(*arguments)
    assert str(caught.value) == f"key must be a str or bytes, not {key!r}"


@pytest.mark.parametrize("call", ["acquire", "peek", "charge", "refund", "wait"])
@pytest.mark.parametrize("cost", [1.0, "2", None, [1.5], object()])
def test_a_cost_that_is_no_int(segment: Segment, call: str, cost: Any) -> None:
    shown = cost[0] if isinstance(cost, list) else cost
    with pytest.raises(TypeError) as caught:
        getattr(make(segment, Window(2)), call)("k", cost)
    assert str(caught.value) == (f"cost must be an int, or one int for each limit, not {shown!r}")


@pytest.mark.parametrize("call", ["acquire", "peek", "charge", "refund", "wait"])
@pytest.mark.parametrize("cost", [-1, -(2**63), -(2**64), -(10**30)])
def test_a_negative_cost(segment: Segment, call: str, cost: int) -> None:
    limiter = make(segment, Window(2, 36000))
    with pytest.raises(ValueError) as caught:
        getattr(limiter, call)("k", cost)
    assert str(caught.value) == f"cost must be 0 or more, not {cost}"
    assert limiter.peek("k").remaining == 2


@pytest.mark.parametrize("cost", [(1,), [1, 2, 3], ()])
def test_costs_that_do_not_match_the_limits(segment: Segment, cost: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"cost has {len(cost)} values, but the limiter has 2 limits"
    ):
        make(segment, Window(2), Window(3)).acquire("k", cost=cost)


def test_missing_and_unknown_arguments(segment: Segment) -> None:
    limiter: Any = make(segment, Window(2))
    with pytest.raises(TypeError, match="missing the argument 'key'"):
        limiter.acquire()
    with pytest.raises(TypeError, match="missing the argument 'cost'"):
        limiter.charge("k")
    with pytest.raises(TypeError, match="unexpected or repeated argument 'price'"):
        limiter.acquire("k", price=1)
    with pytest.raises(TypeError, match="unexpected or repeated argument 'key'"):
        limiter.acquire("k", key="j")
    with pytest.raises(TypeError, match="at most 2 arguments"):
        limiter.acquire("k", 1, 2)


def test_a_cost_for_each_limit(segment: Segment) -> None:
    requests, tokens = Limit(5, 36000), Window(1000, 36000)
    limiter = make(segment, requests, tokens)
    assert limiter.acquire("k", cost=(1, 900)).remaining == 4
    no = limiter.acquire("k", cost=[1, 200])
    assert not no
    assert no.limit == tokens
    assert limiter.peek("k", cost=(4, 100))  # the denied one consumed nothing of either
    assert not limiter.peek("k", cost=(5, 100))
    assert not limiter.peek("k", cost=(4, 101))
    assert limiter.acquire("k", cost=(4, 0))
    assert limiter.acquire("k", cost=(1, 0)).limit == requests


def test_several_limits_admit_what_the_tightest_does(segment: Segment) -> None:
    limiter = make(
        segment, Window(9, 36000), Limit(5, 36000), SlidingWindow(7, 36000), Window(6, 36000)
    )
    decisions = [limiter.acquire("k") for _ in range(8)]
    assert [bool(d) for d in decisions] == [True] * 5 + [False] * 3
    assert decisions[-1].limit == Limit(5, 36000)


def test_peek_charges_nothing(segment: Segment) -> None:
    limiter = make(segment, Window(3, 36000))
    for _ in range(10):
        assert limiter.peek("k", cost=3).remaining == 3
    assert not limiter.peek("k", cost=4)


@pytest.mark.parametrize("limit", SLOW, ids=repr)
def test_charge_goes_into_debt(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    after = limiter.charge("k", 25)
    assert after.remaining == 0
    no = limiter.acquire("k")
    assert not no
    # two of ten and a half are waited out; a bucket refills, a window ends only whole
    assert no.retry_after is not None
    assert no.retry_after > 36000 / 2


@pytest.mark.parametrize("limit", SLOW, ids=repr)
def test_refund_gives_back_and_not_more(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    limiter.acquire("k", cost=10)
    limiter.refund("k", 4)
    assert limiter.peek("k").remaining == 4
    limiter.refund("k", 400)
    assert limiter.peek("k").remaining == 10
    limiter.refund("unseen", 5)
    assert limiter.peek("unseen").remaining == 10


def test_reset_of_one_key_and_of_all(segment: Segment) -> None:
    limiter, other = make(segment, Window(1, 36000)), make(segment, Window(1, 36000), name="other")
    for key in ("a", "b"):
        limiter.acquire(key)
        other.acquire(key)
    limiter.reset("a")
    assert (limiter.peek("a").remaining, limiter.peek("b").remaining) == (1, 0)
    limiter.acquire("a")
    limiter.reset()
    assert (limiter.peek("a").remaining, limiter.peek("b").remaining) == (1, 1)
    assert (other.peek("a").remaining, other.peek("b").remaining) == (0, 0)


def test_names_share_and_set_apart(segment: Segment) -> None:
    limits = (Window(3, 36000),)
    one, same, other = (make(segment, *limits, name=n) for n in ("one", "one", "other"))
    one.acquire("k")
    assert (same.peek("k").remaining, other.peek("k").remaining) == (2, 3)


def test_the_default_name_is_made_of_the_limits(segment: Segment) -> None:
    a = RateLimiter(Window(3, 36000), Limit(9), segment=segment)
    b = RateLimiter(Window(3, 36000), Limit(9), segment=segment)
    assert a.name == b.name == "3/36000s window + 9/60s"
    a.acquire("k")
    assert b.peek("k").remaining == 2


@pytest.mark.parametrize("name", ["", "n" * 97, "é" * 49])
def test_a_name_of_bad_length(segment: Segment, name: str) -> None:
    with pytest.raises(ValueError) as caught:
        make(segment, Limit(1), name=name)
    assert str(caught.value) == f"name must be 1 to 96 bytes of UTF-8, not {name!r}"


def test_other_bad_arguments(segment: Segment) -> None:
    bad: Any = 5
    with pytest.raises(TypeError, match="name must be a str, not 5"):
        make(segment, Limit(1), name=bad)
    with pytest.raises(
        ValueError, match="on_full must be 'share', 'deny', 'allow' or 'raise', not 'wait'"
    ):
        make(segment, Limit(1), on_full="wait")
    with pytest.raises(TypeError, match="segment must be a Segment or None, not 5"):
        RateLimiter(Limit(1), segment=bad)


@pytest.mark.parametrize("policy", ["deny", "allow", "raise"])
def test_a_table_full_of_live_keys(segment_name: str, policy: str) -> None:
    tiny = Segment(segment_name, capacity=1)  # one line: four cells
    limiter = make(tiny, Window(2, 36000), on_full=policy)
    assert all(limiter.acquire(f"k{i}") for i in range(4))
    if policy == "raise":
        with pytest.raises(SegmentFullError, match=r"capacity 1\); remove the segment and make it"):
            limiter.acquire("one more")
    else:
        decision = limiter.acquire("one more")
        assert decision.allowed == (policy == "allow")
        assert decision.retry_after == (0.0 if policy == "allow" else 1.0)
    # no live key was forgotten, and they go on
    assert [limiter.peek(f"k{i}").remaining for i in range(4)] == [1] * 4
    assert limiter.acquire("k0")
    assert not limiter.acquire("k0")
    assert sum(p["refused_full"] for p in tiny.processes()) == 1
    limiter.reset("k3")
    assert limiter.acquire("one more")


def test_full_with_several_limits_consumes_nothing(segment_name: str) -> None:
    tiny = Segment(segment_name, capacity=1)
    limiter = make(tiny, Window(5, 36000), Limit(5, 36000), name="two", on_full="deny")
    make(tiny, Window(5, 36000), name="one").acquire("a")
    assert limiter.acquire("k")
    before = limiter.peek("k").remaining
    # one cell is left, the next key needs two
    assert not limiter.acquire("j")
    assert limiter.peek("j").remaining == 5
    assert limiter.peek("k").remaining == before
    assert make(tiny, Window(5, 36000), name="one").acquire("b")  # the one cell is free again


def test_the_table_of_limiters_is_full(segment_name: str) -> None:
    tiny = Segment(segment_name, capacity=1)
    made = [make(tiny, Limit(1), name=f"n{i}") for i in range(32)]
    with pytest.raises(
        SegmentFullError, match=r"table of limiters is full \(32\); use fewer names"
    ):
        make(tiny, Limit(1), name="n32")
    assert make(tiny, Limit(1), name="n31").name == made[31].name


def test_limits_change_at_run_time_from_another_process(segment: Segment) -> None:
    limiter = make(segment, Window(10, 36000))
    limiter.acquire("k", cost=4)
    run_one(set_limits, segment.name, "t", (Window(6, 36000),))
    assert limiter.acquire("k").remaining == 1  # 4 stay consumed
    assert limiter.limits == (Window(6, 36000),)
    assert limiter.acquire("k").limit == Window(6, 36000)
    assert not limiter.acquire("k")
    run_one(set_limits, segment.name, "t", (Window(20, 36000),))
    assert limiter.limits == (Window(20, 36000),)
    assert limiter.peek("k").remaining == 14


def test_a_changed_bucket_keeps_what_was_consumed(segment: Segment) -> None:
    limiter = make(segment, Limit(10, 36000))
    limiter.acquire("k", cost=6)
    make(segment, Limit(100, 3600))
    # 6 are gone; what refills between two calls on a busy machine is less than 4
    assert 94 <= limiter.peek("k").remaining <= 98
    make(segment, Limit(10, 36000))
    assert 4 <= limiter.peek("k").remaining <= 8


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_pickled_limiter_goes_on(segment: Segment, method: str) -> None:
    limits = (Window(10, 36000), Limit(20, 36000, burst=7))
    limiter = make(segment, *limits, name="moved")
    limiter.acquire("k", cost=3)
    assert run_one(acquire_with, limiter, "k", 2, method=method) == (True, 2, "moved", limits)
    assert limiter.peek("k").remaining == 2
    assert pickle.loads(pickle.dumps(limiter)).peek("k").remaining == 2


def test_repr(segment: Segment) -> None:
    limiter = make(segment, Window(5, 60), name="chat")
    assert repr(limiter) == "RateLimiter(FixedWindow(n=5, per=60), name='chat')"
    assert repr(segment) == f"Segment({segment.name!r}, capacity=1000)"
    assert limiter.segment is segment


def test_check_and_its_reasons(segment: Segment) -> None:
    limiter = make(segment, Window(3, 60), SlidingWindow(2, 3600))
    assert limiter.check("k") == {
        "allowed": True,
        "reason": "Request allowed",
        "remaining_requests": 1,
    }
    limiter.check("k")
    denied = limiter.check("k")
    assert set(denied) == {"allowed", "reason", "remaining_requests", "retry_after_ms"}
    assert denied["reason"] == "Rate limit exceeded (requests per hour)"
    assert (denied["allowed"], denied["remaining_requests"]) == (False, 0)
    assert 0 < denied["retry_after_ms"] <= 2 * 3600 * 1000


def test_none_is_the_key_default(segment: Segment) -> None:
    limiter = make(segment, Window(9, 36000))
    assert limiter.is_allowed()
    assert limiter.check(None)["remaining_requests"] == 7
    assert limiter.get_remaining("default") == 7
