"""ConcurrencyLimiter: at most max_in_flight permits of a key, over all processes."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import time
import warnings
from typing import Any

import pytest
from support.children import run, run_one
from support.permits import Span, most_at_once
from support.waiting import wait_until
from support.workers import meet

from fast_litellm_shm import ConcurrencyLimiter, PermitTimeoutError, Segment, SegmentFullError


def make(segment: Segment, most: int, name: str = "c") -> ConcurrencyLimiter:
    return ConcurrencyLimiter(most, name=name, segment=segment)


def _take(limiter: ConcurrencyLimiter, key: str, count: int) -> list[Any]:
    permits = [limiter.acquire(key) for _ in range(count)]
    assert all(permits)
    return permits


def _release(permits: list[Any]) -> None:
    for permit in permits:
        permit.release()


@pytest.mark.parametrize("most", [1, 2, 7, 300])
def test_exactly_max(segment: Segment, most: int) -> None:
    limiter = make(segment, most)
    permits = _take(limiter, "k", most)
    denied = limiter.acquire("k")
    assert not denied
    assert denied.in_flight == limiter.in_flight("k") == most
    assert repr(denied) == f"Permit(denied, in_flight={most})"
    assert limiter.in_flight("other") == 0
    permits[most // 2].release()
    assert limiter.in_flight("k") == most - 1
    permits[most // 2] = limiter.acquire("k")
    assert permits[most // 2]
    assert not limiter.acquire("k")
    _release(permits)
    assert limiter.in_flight("k") == 0


def test_a_hundred_thousand(segment_name: str) -> None:
    limiter = make(Segment(segment_name, capacity=300_000), 100_000)
    permits = _take(limiter, "k", 100_000)
    assert limiter.acquire("k").in_flight == limiter.in_flight("k") == 100_000
    _release(permits)
    assert limiter.in_flight("k") == 0


def test_keys_are_str_or_their_utf8_bytes(segment: Segment) -> None:
    limiter = make(segment, 2)
    permits = [limiter.acquire("ключ"), limiter.acquire("ключ".encode())]
    assert all(permits)
    assert limiter.in_flight("ключ") == limiter.in_flight("ключ".encode()) == 2
    assert not limiter.acquire("ключ")
    _release(permits)


def test_release_twice_is_harmless(segment: Segment) -> None:
    limiter = make(segment, 1)
    first = limiter.acquire("k")
    assert repr(first) == "Permit(held)" and first.release()
    assert first and first.released and repr(first) == "Permit(released)"
    second = limiter.acquire("k")
    assert not first.release()
    assert limiter.in_flight("k") == 1
    assert second.release()
    denied_never = limiter.acquire("k")
    denied = limiter.acquire("k")
    assert not denied.release()
    assert limiter.in_flight("k") == 1
    denied_never.release()


def test_with_releases_even_when_it_raises(segment: Segment) -> None:
    limiter = make(segment, 1)
    with pytest.raises(KeyError), limiter.acquire("k") as permit:
        assert permit
        raise KeyError
    with pytest.raises(KeyError), limiter.slot("k") as permit:
        assert permit
        raise KeyError

    async def raising() -> None:
        async with limiter.slot_async("k") as permit:
            assert permit
            raise KeyError

    with pytest.raises(KeyError):
        asyncio.run(raising())
    assert limiter.in_flight("k") == 0


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_no_permit_in_time(segment: Segment, timeout: float) -> None:
    limiter = make(segment, 1)
    says = "limiter 'c': no permit for key 'k' within .* s, 1 of 1 are held; wait longer"

    async def entered() -> None:
        async with limiter.slot_async("k", timeout=timeout):
            raise AssertionError("entered")

    with limiter.slot("k"):
        assert not limiter.wait("k", timeout=timeout)
        with pytest.raises(PermitTimeoutError, match=says), limiter.slot("k", timeout=timeout):
            raise AssertionError("entered")
        with pytest.raises(TimeoutError, match=says):
            asyncio.run(entered())
        assert limiter.in_flight("k") == 1
    assert limiter.in_flight("k") == 0


def test_a_dropped_permit_is_given_back_and_warned_of(segment: Segment) -> None:
    limiter = make(segment, 1)
    with pytest.warns(ResourceWarning, match=r"dropped without release\(\).*given back"):
        limiter.acquire("k")
        gc.collect()
    assert limiter.in_flight("k") == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        limiter.acquire("k").release()  # nothing to warn of
        with limiter.slot("k"):
            limiter.acquire("k")  # a denial holds nothing


def test_a_dropped_permit_does_not_hide_the_exception(segment: Segment) -> None:
    limiter = make(segment, 1)

    def loses_it() -> None:
        permit = limiter.acquire("k")
        raise KeyError(bool(permit))

    with pytest.warns(ResourceWarning), pytest.raises(KeyError, match="True"):
        loses_it()
        gc.collect()
    gc.collect()
    assert limiter.in_flight("k") == 0


def test_max_changes_at_run_time(segment: Segment) -> None:
    old = make(segment, 2)
    permits = _take(old, "k", 2)
    new = make(segment, 5)
    permits += _take(old, "k", 3)  # the old object follows
    assert old.max_in_flight == new.max_in_flight == 5
    make(segment, 2)
    denied = old.acquire("k")
    assert not denied
    assert denied.in_flight == old.in_flight("k") == 5
    for left in (4, 3, 2):
        permits.pop().release()
        assert old.in_flight("k") == left
        assert not old.acquire("k")
    permits.pop(0).release()
    permits += _take(old, "k", 1)
    assert not new.acquire("k")
    _release(permits)


@pytest.mark.parametrize("changes", [1, 3, 4, 9])
def test_permits_from_before_many_changes_still_count(segment: Segment, changes: int) -> None:
    limiter = make(segment, 10)
    held = _take(limiter, "k", 10)
    for i in range(changes):
        limiter = make(segment, 3 if i % 2 else 2)
    limiter = make(segment, 2)
    assert limiter.in_flight("k") == 10
    while len(held) > 2:
        held.pop(0).release()
        assert not limiter.acquire("k"), f"granted although {len(held)} of 2 are held"
    held.pop().release()
    held += _take(limiter, "k", 1)
    assert not limiter.acquire("k")
    _release(held)


def test_names_share_and_set_apart(segment: Segment) -> None:
    one, same, other = make(segment, 1), make(segment, 1), make(segment, 1, "other")
    assert (one.name, one.segment, other.name) == ("c", segment, "other")
    permit = one.acquire("k")
    assert not same.acquire("k")
    assert same.in_flight("k") == 1
    apart = other.acquire("k")
    assert apart
    _release([permit, apart])


def test_pickled_it_is_the_same_limiter(segment: Segment) -> None:
    limiter = make(segment, 2)
    with limiter.slot("k"):
        assert run_one(_use_pickled, limiter) == ("c", 2, 1, True, False)
        with limiter.slot("k") as permit, pytest.raises(TypeError, match="cannot pickle"):
            pickle.dumps(permit)  # it belongs to this process


def _use_pickled(limiter: ConcurrencyLimiter) -> tuple[str, int, int, bool, bool]:
    before = limiter.in_flight("k")
    with limiter.acquire("k") as mine:
        return limiter.name, limiter.max_in_flight, before, bool(mine), bool(limiter.acquire("k"))


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (0, ValueError, "max_in_flight must be between 1 and 100,000, not 0"),
        (-1, ValueError, "max_in_flight must be between 1 and 100,000, not -1"),
        (100_001, ValueError, "max_in_flight must be between 1 and 100,000, not 100001"),
        ("3", TypeError, "max_in_flight must be an int, not '3'"),
        (1.0, TypeError, "max_in_flight must be an int, not 1.0"),
        (True, TypeError, "max_in_flight must be an int, not True"),
        (None, TypeError, "max_in_flight must be an int, not None"),
    ],
)
def test_a_bad_maximum(segment: Segment, bad: Any, kind: type[Exception], says: str) -> None:
    with pytest.raises(kind) as caught:
        make(segment, bad)
    assert str(caught.value) == f"ConcurrencyLimiter: {says}"


@pytest.mark.parametrize("bad", [None, 1, 1.5, ["k"]])
def test_a_bad_key(segment: Segment, bad: Any) -> None:
    limiter = make(segment, 1)
    for call in (limiter.acquire, limiter.in_flight, limiter.wait):
        with pytest.raises(TypeError) as caught:
            call(bad)
        assert str(caught.value) == f"key must be a str or bytes, not {bad!r}"


def test_a_full_segment_denies_and_is_no_damage(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=10)
    limiter = make(segment, 1000)
    permits = []
    while permit := limiter.acquire("k"):
        permits.append(permit)
    assert 10 <= len(permits) < 1000
    assert permit.in_flight == limiter.in_flight("k") == len(permits)
    _release(permits)
    assert limiter.in_flight("k") == 0
    with limiter.acquire("k") as again:
        assert again


def _never_denied(name: str, most: int, turns: int) -> int:
    meet(name, most)
    limiter = make(Segment(name), most)
    denials = 0
    for _ in range(turns):
        permit = limiter.acquire("k")
        denials += not permit
        permit.release()
    return denials


@pytest.mark.parametrize("most", [2, 4])
def test_busy_is_not_denied(segment: Segment, most: int) -> None:
    """As many processes as permits, each holds one at most: there is always one left."""
    assert run(_never_denied, [(segment.name, most, 20_000)] * most, "fork") == [0] * most


def _spans(name: str, most: int, turns: int, parties: int) -> tuple[list[Span], int]:
    meet(name, parties)
    limiter, out, denied = make(Segment(name), most), [], 0
    for _ in range(turns):
        with limiter.acquire("k") as permit:
            if permit:
                start = time.monotonic_ns()
                os.sched_yield()
                out.append((start, time.monotonic_ns()))
            else:
                denied += permit.in_flight == most
    return out, denied


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_never_above_max(segment: Segment, method: str) -> None:
    found = run(_spans, [(segment.name, 2, 5000, 4)] * 4, method)
    assert most_at_once(span for spans, _ in found for span in spans) == 2
    assert sum(len(spans) + denied for spans, denied in found) == 4 * 5000
    assert make(segment, 2).in_flight("k") == 0


def _count_in_shared_memory(name: str, most: int, turns: int, held: Any, highest: Any) -> int:
    meet(name, 64)
    limiter = make(Segment(name), most)
    for _ in range(turns):
        with limiter.slot("k", timeout=90):
            with held.get_lock():
                held.value += 1
                highest.value = max(highest.value, held.value)
            while highest.value < 2:  # who is first waits for a second one to come in
                time.sleep(0.001)
            os.sched_yield()
            with held.get_lock():
                held.value -= 1
    return turns


def test_64_processes_over_one_key(segment: Segment) -> None:
    context = multiprocessing.get_context("fork")
    held, highest = context.Value("i", 0), context.Value("i", 0)
    given = [(segment.name, 3, 10, held, highest)] * 64
    assert run(_count_in_shared_memory, given, "fork") == [10] * 64
    assert held.value == 0
    assert 2 <= highest.value <= 3
    assert make(segment, 3).in_flight("k") == 0


@pytest.mark.skipif(
    "FAST_LITELLM_SHM_ALL_PROCESSES" not in os.environ,
    reason="4,096 processes: by hand, FAST_LITELLM_SHM_ALL_PROCESSES=1",
)
def test_the_process_table_is_full(segment: Segment) -> None:
    """Every living process has a place; the next is told so, and limits nobody else."""
    places = segment.geometry().processes
    limiter = make(segment, 1)
    with limiter.slot("k"):  # this process has one too
        ends, pids = os.pipe(), []
        try:
            for _ in range(places - 1):
                pid = os.fork()
                if not pid:
                    limiter.in_flight("k")
                    os.close(ends[1])
                    os.read(ends[0], 1)
                    os._exit(0)
                pids.append(pid)
            wait_until("all have a place", lambda: len(segment.processes()) == places, every=0.5)
            with pytest.raises(AssertionError, match="SegmentFullError.*process table is full"):
                run_one(_acquire_once, segment.name, method="fork")
        finally:
            os.close(ends[1])
            os.close(ends[0])
            for pid in pids:
                os.waitpid(pid, 0)
    assert run_one(_acquire_once, segment.name, method="fork")


def _acquire_once(name: str) -> bool:
    try:
        with make(Segment(name), 1).acquire("k") as permit:
            return bool(permit)
    except SegmentFullError as error:
        raise AssertionError(f"SegmentFullError: {error}") from None


def test_a_permit_tells_its_decision(segment: Segment) -> None:
    limiter = ConcurrencyLimiter(1, name="told", segment=segment)
    with limiter.acquire("k") as held:
        denied = limiter.acquire("k")
        assert held.allowed and held.decision.allowed
        assert not denied.allowed and not denied.decision.allowed
        assert denied.decision.limit == limiter._shared.limits[0]
    assert held.allowed and held.decision.allowed  # also after its release
