"""A segment that was written over says so: to who asks, in exceptions, for as long as it lives."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from support.children import run_one
from support.damage import CURRENT, DAMAGE, SECRET, SET, damage_limits, entry_of, write_word
from support.names import left_over

from fast_litellm_shm import (
    ConcurrencyLimiter,
    Limit,
    Quota,
    RateLimiter,
    Segment,
    SegmentDamagedError,
    SegmentError,
    SimpleConnectionPool,
    Window,
)
from fast_litellm_shm._shared.inspection import Inspection


def test_nothing(segment: Segment) -> None:
    RateLimiter(Limit(5), Window(7, 60), name="t", segment=segment).acquire("k")
    assert segment.damaged is None
    assert segment.stats()["damaged"] is None
    assert Inspection(segment).damaged is None


def _told_elsewhere(name: str) -> str | None:
    return Segment(name).damaged


def test_limits(segment: Segment) -> None:
    RateLimiter(Limit(5), name="first", segment=segment)
    limiter = RateLimiter(Limit(5), name="second", segment=segment, on_full="allow")
    damage_limits(segment, 1)
    assert not segment.damaged  # nobody has come upon it
    with pytest.raises(SegmentDamagedError) as caught:
        limiter.acquire("k")
    said = segment.damaged
    assert said == (
        f"segment {segment.name!r} was damaged: the limits of limiter number 1 do not add up; stop "
        f"the workers, remove it with `fast-shm rm --name {segment.name}`, and start them again"
    )
    assert str(caught.value) == (
        f"limiter 'second' in segment {segment.name!r} cannot be used: {said}"
    )
    assert run_one(_told_elsewhere, segment.name) == said
    assert RateLimiter(Limit(5), name="first", segment=segment).acquire("k")
    assert segment.damaged == said


def test_limits_that_only_inspect_finds(segment: Segment) -> None:
    RateLimiter(Limit(5), name="t", segment=segment)
    damage_limits(segment, 0)
    found = Inspection(segment)
    assert found.limiters() == []
    assert "limiter number 0" in (found.damaged or "")
    assert segment.damaged == found.damaged


def _policies(segment: Segment) -> dict[str, Callable[[], object]]:
    """A use of each class on its limiter, number 0 .. 3 (the pool has two)."""
    rates = RateLimiter(Limit(5), name="rates", segment=segment, on_full="allow")
    quota = Quota(rpm=5, max_parallel=2, name="quota", segment=segment, on_full="allow")
    gpu = ConcurrencyLimiter(2, name="gpu", segment=segment)
    pool = SimpleConnectionPool("pool", segment=segment)
    return {
        "acquire": lambda: rates.acquire("k"),
        "is_allowed": lambda: rates.is_allowed("k"),
        "check": lambda: rates.check("k"),
        "refund": lambda: rates.refund("k", 1),
        "limits are set again": lambda: RateLimiter(Limit(6), name="rates", segment=segment),
        "admit": lambda: quota.admit("k"),
        "remaining": lambda: quota.remaining("k"),
        "permit": lambda: gpu.acquire("k"),
        "wait": lambda: gpu.wait("k", timeout=1),
        "pool": lambda: pool.get_connection("https://one.example"),
    }


@pytest.mark.parametrize(("word", "value"), [(CURRENT, 0), (SET, 15)])
def test_no_policy_hides_it(segment: Segment, word: int, value: int) -> None:
    """Whatever on_full says: neither admitted nor denied, and nobody counts anew."""
    uses = _policies(segment)
    for limiter in range(5):
        write_word(segment, entry_of(segment, limiter) + word, value)
    for use in uses.values():
        with pytest.raises(SegmentDamagedError, match="was damaged"):
            use()


def test_header(segment: Segment) -> None:
    limiter = RateLimiter(Limit(5), name="t", segment=segment)
    write_word(segment, SECRET, 12345)
    assert limiter.acquire("k")  # what we know of it, we know
    assert f"its header was written over, at byte {SECRET}" in (segment.damaged or "")
    with pytest.raises(SegmentDamagedError):
        run_one_refused(segment.name)


def run_one_refused(name: str) -> None:
    """Somebody else would count apart, by another secret."""
    try:
        run_one(_told_elsewhere, name)
    except AssertionError as error:
        assert "SegmentDamagedError" in str(error)
        raise SegmentDamagedError from None


def test_a_name_that_lost_its_id(segment: Segment) -> None:
    RateLimiter(Limit(5), name="t", segment=segment)
    write_word(segment, entry_of(segment, 0), 77)
    with pytest.raises(SegmentDamagedError, match="the name of limiter number 0 was written over"):
        RateLimiter(Limit(5), name="t", segment=segment)


def test_a_cell(segment: Segment) -> None:
    write_word(segment, segment.geometry().slots_offset + 16 * 7 + 8, 99)
    assert not segment.damaged
    said = segment.stats()["damaged"]
    assert f"segment {segment.name!r} was damaged: slot 7 holds a value that the library" in said
    assert segment.damaged == said


def test_the_note_itself(segment: Segment) -> None:
    write_word(segment, DAMAGE, 2**64 - 1)
    assert f"at byte {DAMAGE}" in (segment.damaged or "")


@pytest.mark.parametrize("size", [0, 4096])
def test_cut_while_open(segment: Segment, size: int) -> None:
    """Told, and not touched: that would be a SIGBUS."""
    RateLimiter(Limit(5), name="t", segment=segment)
    os.truncate(segment.path, size)
    assert f"its file has {size} bytes" in (segment.damaged or "")
    with pytest.raises(SegmentDamagedError, match=f"{size} bytes"):
        segment.stats()
    with pytest.raises(SegmentDamagedError, match=f"{size} bytes"):
        Inspection(segment)
    with pytest.raises(SegmentDamagedError, match=f"size {size}"):
        Segment(segment.name)
    for path in left_over(segment.name):  # as `fast-shm rm`: no header says how its lock is called
        os.unlink(path)


def test_other_kinds_of_limits_are_no_damage(segment: Segment) -> None:
    limiter = RateLimiter(Limit(5), name="t", segment=segment)
    quota = Quota(rpm=5, name="q", segment=segment)
    Quota(max_parallel=2, name="t", segment=segment)  # a quota may change all that a name has
    with pytest.raises(SegmentError, match="in flight alone"):
        limiter.acquire("k")
    RateLimiter(Limit(5), Limit(6), name="q", segment=segment)
    with pytest.raises(SegmentError, match="other kinds of limits"):
        quota.remaining("k")
    assert segment.stats()["damaged"] is None
