"""Quota: one admission for a whole LLM call, over rpm, tpm and max_parallel."""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from typing import Any

import pytest
from support.children import run, run_one
from support.permits import Span, most_at_once
from support.waiting import PATIENCE
from support.workers import meet

from fast_litellm_shm import Quota, RateLimiter, Segment, SegmentError, Window

PROCESSES = 8


def make(segment: Segment, *args: Any, name: str = "q", **options: Any) -> Quota:
    return Quota(*args, name=name, segment=segment, **options)


def left(quota: Quota, key: str = "k") -> tuple[int, ...]:
    return tuple(quota.remaining(key).values())


def _calls(
    name: str, limits: tuple[int | None, ...], tokens: int, until: str
) -> tuple[list[Span], dict[str, int]]:
    """Call until this limit denies: entered and left, and how often each limit denied."""
    meet(name, PROCESSES)
    quota, spans, denied = make(Segment(name), *limits), [], {"max_parallel": 0, until: 0}
    end = time.monotonic() + PATIENCE
    while not denied[until] and time.monotonic() < end:
        with quota.admit("k", tokens) as admission:
            if admission:
                entered = time.monotonic_ns()
                os.sched_yield()
                spans.append((entered, time.monotonic_ns()))
            else:
                denied[admission.reason] += 1
    return spans, denied


@pytest.mark.parametrize(
    ("limits", "tokens", "until", "exactly"),
    [
        ((400, None, 2), 0, "rpm", 400),
        ((400, 10**9, 3), 1000, "rpm", 400),
        ((10**6, 5000, 2), 7, "tpm", 714),
        ((400, None, None), 0, "rpm", 400),
    ],
)
def test_eight_processes(
    segment: Segment, limits: tuple[int | None, ...], tokens: int, until: str, exactly: int
) -> None:
    given = [(segment.name, limits, tokens, until)] * PROCESSES
    found = run(_calls, given, "fork")
    spans = [span for of_one, _ in found for span in of_one]
    assert len(spans) == exactly
    assert max(end for _, end in spans) - min(start for start, _ in spans) < 60e9  # one minute
    parallel = limits[2]
    assert most_at_once(spans) <= (parallel or PROCESSES)
    quota = make(segment, *limits)
    remaining = quota.remaining("k")
    rpm, tpm = limits[:2]
    assert rpm is not None
    assert remaining["rpm"] == rpm - exactly
    if tpm is not None:
        assert remaining["tpm"] == tpm - exactly * tokens
    assert remaining.get("max_parallel") == parallel
    assert quota.in_flight("k") == 0


def test_it_admits_and_says_so(segment: Segment) -> None:
    quota = make(segment, 10, 100, 2)
    assert (quota.name, quota.segment) == ("q", segment)
    assert quota.remaining("k") == {"rpm": 10, "tpm": 100, "max_parallel": 2}
    with quota.admit("k", tokens=30) as admission:
        assert admission
        assert admission.allowed
        assert (admission.reason, admission.retry_after) == ("Request allowed", 0.0)
        assert quota.remaining("k") == {"rpm": 9, "tpm": 70, "max_parallel": 1}
        assert quota.in_flight("k") == 1
    assert admission.released
    assert admission and admission.allowed  # it was
    assert not admission.release()
    assert quota.remaining("k") == {"rpm": 9, "tpm": 70, "max_parallel": 2}
    assert left(quota, "other") == (10, 100, 2)


def test_a_denial_by_rpm_leaves_the_others(segment: Segment) -> None:
    quota = make(segment, 2, 100, 2)
    for _ in range(2):
        quota.admit("k", tokens=10).release()
    before = left(quota)
    denied = quota.admit("k", tokens=10)
    assert not denied
    assert denied.reason == "rpm"
    assert denied.retry_after is not None
    assert 0 < denied.retry_after <= 60
    assert left(quota) == before == (0, 80, 2)
    assert not denied.release()


def test_a_denial_by_tpm_leaves_the_others(segment: Segment) -> None:
    quota = make(segment, 10, 100, 2)
    quota.admit("k", tokens=60).release()
    before = left(quota)
    denied = quota.admit("k", tokens=41)
    assert not denied
    assert denied.reason == "tpm"
    assert denied.retry_after is not None
    assert 0 < denied.retry_after <= 60
    never = quota.admit("k", tokens=101)
    assert (never.reason, never.retry_after) == ("tpm", None)
    assert left(quota) == before == (9, 40, 2)


def test_a_denial_by_max_parallel_leaves_the_others(segment: Segment) -> None:
    quota = make(segment, 10, 100, 2)
    with quota.admit("k", 10), quota.admit("k", 10):
        before = left(quota)
        denied = quota.admit("k", tokens=10)
        assert not denied
        assert (denied.reason, denied.in_flight) == ("max_parallel", 2)
        assert denied.retry_after == 0.0  # when a call ends
        assert left(quota) == before == (8, 80, 0)
    assert left(quota) == (8, 80, 2)


def test_denied_ones_do_nothing_later_either(segment: Segment) -> None:
    quota = make(segment, 1, 100, 5)
    with quota.admit("k", 10):
        before = left(quota)
        with quota.admit("k", 50) as denied:
            assert not denied
            denied.settle(tokens=20)
            assert repr(denied) == "Admission(denied by rpm, key='k')"
        assert left(quota) == before == (0, 90, 4)


def test_settling(segment: Segment) -> None:
    quota = make(segment, 10, 1000, 2)
    with quota.admit("k", tokens=100) as admission:
        admission.settle(tokens=100)
        assert left(quota) == (9, 900, 1)
        admission.settle(tokens=250)  # over the estimate
        assert left(quota) == (9, 750, 1)
        admission.settle(tokens=40)  # a later, lower number
        assert left(quota) == (9, 960, 1)
        admission.settle(tokens=0)
        assert left(quota) == (9, 1000, 1)
        admission.settle(tokens=70)
    assert left(quota) == (9, 930, 2)
    admission.settle(tokens=80)  # the count often comes after the call
    admission.settle(tokens=80)
    assert left(quota) == (9, 920, 2)


def test_settling_far_over_makes_a_debt_that_the_next_wait_out(segment: Segment) -> None:
    quota = make(segment, 10, 100, 2)
    with quota.admit("k", tokens=10) as admission:
        admission.settle(tokens=250)
    denied = quota.admit("k", tokens=1)
    assert denied.reason == "tpm"
    assert denied.retry_after is not None
    assert 60 < denied.retry_after <= 180
    assert left(quota) == (9, 0, 2)
    admission.settle(tokens=10)  # it was a mistake
    assert left(quota) == (9, 90, 2)


def test_settling_of_several_calls_adds_up(segment: Segment) -> None:
    quota = make(segment, 10, 1000, 4)
    calls = [quota.admit("k", tokens=100) for _ in range(4)]
    assert left(quota)[1] == 600
    for i, call in enumerate(calls):
        call.settle(tokens=50 + 50 * i)  # 50, 100, 150, 200
    assert left(quota)[1] == 500
    for call in calls:
        assert call.release()
    assert left(quota) == (6, 500, 4)


def test_without_tokens_settling_changes_nothing(segment: Segment) -> None:
    quota = make(segment, 10, max_parallel=2)
    with quota.admit("k") as admission:
        admission.settle(tokens=1000)
    assert left(quota) == (9, 2)


def test_async_and_errors_release(segment: Segment) -> None:
    quota = make(segment, 10, 100, 1)

    async def call() -> None:
        async with quota.admit("k", tokens=10) as admission:
            assert admission
            await asyncio.sleep(0)
            raise KeyError

    for expected in (90, 80):
        with pytest.raises(KeyError):
            asyncio.run(call())
        assert quota.remaining("k")["tpm"] == expected
        assert quota.in_flight("k") == 0


def test_cancelling_gives_the_slot_back_also_where_the_rest_cannot_be(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    quota = Quota(rpm=5, max_parallel=1, name="api", segment=segment)
    admission = quota.admit("key")

    def fails(*_: object) -> None:
        raise SegmentError("damaged")

    with monkeypatch.context() as broken, pytest.raises(SegmentError):
        broken.setattr(quota._grantor, "settle", fails)
        admission.cancel()
    assert quota.in_flight("key") == 0 and admission.released
    admission.cancel()  # harmless
    assert quota.remaining("key") == {"rpm": 4, "max_parallel": 1}


def test_a_dropped_admission_gives_its_slot_back_and_is_warned_of(segment: Segment) -> None:
    quota = make(segment, 10, 100, 1)
    with pytest.warns(ResourceWarning, match=r"dropped without release\(\)"):
        quota.admit("k", 10)
    assert left(quota) == (9, 90, 1)


def _admit_and_die(name: str, count: int) -> None:
    quota = make(Segment(name), 100, 1000, 5)
    held = [quota.admit("k", tokens=10) for _ in range(count)]
    os._exit(0 if all(held) else 1)


def test_death_gives_the_slots_back_and_leaves_the_charge(segment: Segment) -> None:
    quota = make(segment, 100, 1000, 5)
    with pytest.raises(AssertionError, match="died in _admit_and_die: 0"):
        run_one(_admit_and_die, segment.name, 5, method="fork")
    assert left(quota) == (95, 950, 5)
    with quota.admit("k", tokens=10) as admission:
        assert admission


def test_a_forked_child_cannot_release_its_parents(segment: Segment) -> None:
    quota = make(segment, 100, 1000, 2)
    with quota.admit("k", tokens=10) as admission:
        pid = os.fork()
        if not pid:
            admission.release()
            os._exit(0 if quota.in_flight("k") == 1 else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert quota.in_flight("k") == 1
        assert admission
    assert quota.in_flight("k") == 0


@pytest.mark.parametrize(
    ("limits", "names"),
    [
        ({"rpm": 3}, ["rpm"]),
        ({"tpm": 3}, ["tpm"]),
        ({"max_parallel": 3}, ["max_parallel"]),
        ({"tpm": 3, "max_parallel": 3}, ["tpm", "max_parallel"]),
        ({"rpm": 3, "tpm": 3}, ["rpm", "tpm"]),
    ],
)
def test_any_of_the_three(segment: Segment, limits: dict[str, Any], names: list[str]) -> None:
    quota = make(segment, **limits)
    admitted = [quota.admit("k", tokens=1) for _ in range(3)]
    assert all(admitted)
    assert quota.remaining("k") == dict.fromkeys(names, 0)
    assert quota.admit("k", tokens=1).reason in names
    for admission in admitted:
        assert admission.release()


def test_limits_of_a_name_are_shared_and_change(segment: Segment) -> None:
    quota = make(segment, 10, 100, 1)
    with make(segment, 10, 100, 1).admit("k", 10):
        assert left(quota) == (9, 90, 0)
        assert quota.admit("k").reason == "max_parallel"
        make(segment, 10, 100, 2)
        with quota.admit("k", 10) as second:
            assert second
        assert left(quota) == (8, 80, 1)
    assert left(make(segment, 10, 100, 1, name="other")) == (10, 100, 1)


def test_pickled_it_is_the_same(segment: Segment) -> None:
    quota = make(segment, 10, 100, 2)
    with quota.admit("k", 10) as admission:
        again = pickle.loads(pickle.dumps(quota))
        assert again.remaining("k") == {"rpm": 9, "tpm": 90, "max_parallel": 1}
        with pytest.raises(TypeError):
            pickle.dumps(admission)


@pytest.mark.parametrize("label", ["rpm", "tpm", "max_parallel"])
@pytest.mark.parametrize("bad", [0, -1, "3", 1.5, True, 2**63])
def test_a_bad_limit_is_named(segment: Segment, label: str, bad: Any) -> None:
    kind = ValueError if type(bad) is int else TypeError
    with pytest.raises(kind, match=f"Quota: {label}.*must be .*{bad}"):
        make(segment, **{label: bad})


def test_no_limit_at_all(segment: Segment) -> None:
    with pytest.raises(ValueError, match="at least one of rpm, tpm and max_parallel"):
        make(segment)


@pytest.mark.parametrize("bad", [-1, "3", 1.5, None, True])
def test_bad_tokens_are_named_and_charge_nothing(segment: Segment, bad: Any) -> None:
    quota = make(segment, 10, 100, 1)
    kind = ValueError if bad == -1 else TypeError
    with pytest.raises(kind, match="tokens must be"):
        quota.admit("k", tokens=bad)
    assert left(quota) == (10, 100, 1)
    with quota.admit("k", tokens=10) as admission:
        with pytest.raises(kind, match="settle: tokens must be"):
            admission.settle(tokens=bad)
        assert left(quota) == (9, 90, 0)


@pytest.mark.parametrize("bad", [None, 1, ["k"]])
def test_a_bad_key(segment: Segment, bad: Any) -> None:
    quota = make(segment, 10)
    for call in (quota.admit, quota.in_flight, quota.remaining):
        with pytest.raises(TypeError, match="key must be a str or bytes"):
            call(bad)
    assert left(quota) == (10,)


def test_windows_of_a_quota_are_its_own(segment: Segment) -> None:
    """The same numbers elsewhere are another limit."""
    limiter = RateLimiter(Window(10, 60), name="elsewhere", segment=segment)
    assert limiter.acquire("k", cost=10)
    assert left(make(segment, 10)) == (10,)
