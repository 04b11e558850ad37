"""Segment: made, attached to, shared, removed."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
from support.children import run, run_one
from support.names import left_over, remove

from fast_litellm_shm import (
    Limit,
    RateLimiter,
    Segment,
    SegmentNotFoundError,
    SegmentSpaceError,
    Window,
)
from fast_litellm_shm._shared.native import lib


def test_stats_of_a_new_one(segment: Segment) -> None:
    stats = segment.stats()
    size = os.stat(segment.path).st_blocks * 512
    assert stats["size_bytes"] == size
    assert 0 <= stats.pop("age_seconds") < 3600
    del stats["size_bytes"]
    assert stats == {
        "name": segment.name,
        "path": segment.path,
        "capacity": 1000,
        "used": 0,
        "occupancy": 0.0,
        "limiters": 0,
        "processes": 0,
        "admitted": 0,
        "denied": 0,
        "layout_version": lib.FSHM_LAYOUT_VERSION,
        "names": "plain",
        "unlinked": False,
        "liveness_unknown": None,
        "damaged": None,
    }


def test_stats_count(segment: Segment) -> None:
    limiter = RateLimiter(Window(2, 3600), name="t", segment=segment)
    for key in ("a", "a", "a", "b"):
        limiter.acquire(key)
    stats = segment.stats()
    assert (stats["used"], stats["occupancy"], stats["limiters"]) == (2, 0.002, 1)
    assert (stats["admitted"], stats["denied"], stats["processes"]) == (3, 1, 1)
    (me,) = segment.processes()
    assert (me["pid"], me["admitted"], me["denied"], me["refused_full"]) == (os.getpid(), 3, 1, 0)
    assert 0 <= me["attached_seconds"] < 3600


@pytest.mark.parametrize(
    "name", ["", "a/b", "/", "..", ".x", "x" * 65, "a b", "\0", "é", "\ud800", "a\n"], ids=ascii
)
def test_a_bad_name(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        Segment(name)
    assert str(caught.value) == (
        "segment name must be 1 to 64 characters of A-Z a-z 0-9 . _ - and not begin with a dot, "
        f"not {name!r}"
    )


def test_a_name_with_a_nul_in_it(segment_name: str) -> None:
    with pytest.raises(ValueError, match="segment name must be"):
        Segment(f"{segment_name}\0b")
    assert left_over(segment_name) == []


@pytest.mark.parametrize("name", [5, b"x", ["x"]])
def test_a_name_that_is_no_str(name: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Segment(name)
    assert str(caught.value) == f"segment name must be a str, not {name!r}"


@pytest.mark.parametrize("capacity", [0, -1, 2**31 + 1, 1.5, "7", True])
def test_a_bad_capacity(segment_name: str, capacity: Any) -> None:
    with pytest.raises(ValueError) as caught:
        Segment(segment_name, capacity=capacity)
    assert str(caught.value) == (
        f"capacity must be an int between 1 and 2**31 keys, not {capacity!r}"
    )


@pytest.mark.parametrize("mode", [0o400, 0, 0o1600, -1, "0600", 6.0])
def test_a_bad_mode(segment_name: str, mode: Any) -> None:
    with pytest.raises(ValueError, match="mode must be octal permission bits that let the owner"):
        Segment(segment_name, mode=mode)


@pytest.mark.parametrize("mode", [0o666, 0o602, 0o777])
def test_a_mode_that_lets_all_users_write(segment_name: str, mode: int) -> None:
    with pytest.raises(ValueError, match=f"mode must not let all users write .* as {mode:#o} does"):
        Segment(segment_name, mode=mode)


def test_bad_names(segment_name: str) -> None:
    with pytest.raises(ValueError, match="names must be 'plain', 'hashed' or 'off', not 'none'"):
        Segment(segment_name, names="none")


def test_attach_only(segment_name: str) -> None:
    with pytest.raises(SegmentNotFoundError, match="there is no such segment"):
        Segment(segment_name, create=False)
    assert left_over(segment_name) == []
    made = Segment(segment_name, capacity=50)
    assert Segment(segment_name, create=False).stats()["capacity"] == 50
    assert Segment(segment_name, capacity=50).path == made.path


def test_the_default_size_fits_a_container(segment_name: str) -> None:
    stats = Segment(segment_name).stats()
    assert stats["capacity"] == 200_000
    assert stats["size_bytes"] <= 16 << 20


def test_a_file_of_the_whole_size_is_there(segment: Segment) -> None:
    # allocated: a write to it can never die of a full file system. Only what thousands of processes
    # would need is left out
    found = os.stat(segment.path)
    assert segment.stats()["size_bytes"] <= found.st_blocks * 512 < found.st_size


def test_default_is_one_for_each_name() -> None:
    assert Segment.default() is Segment.default()
    assert RateLimiter(Limit(1), name="t").segment is Segment.default()


def test_default_is_made_anew_after_removal() -> None:
    first = Segment.default()
    limiter = RateLimiter(Window(1, 3600), name="t")
    assert limiter.acquire("k")
    first.remove()
    assert first.unlinked
    second = Segment.default()
    assert second is not first
    assert not second.unlinked
    assert RateLimiter(Window(1, 3600), name="t").acquire("k")
    assert not limiter.acquire("k")  # keeps counting in what it has


def test_a_removal_by_another_process_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    first = Segment.default()
    remove(first.name)
    for _ in range(3):
        assert first.unlinked
        assert Segment.default() is not first
        first.stats()
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"segment {first.name!r}: segment {first.path} was removed; restart the processes that are "
        "attached to it: they count apart from new ones"
    ]


def test_the_process_that_removes_it_logs_nothing(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    segment.remove()
    assert segment.unlinked and segment.stats()["liveness_unknown"]
    assert caplog.records == []


def test_remove(segment: Segment) -> None:
    limiter = RateLimiter(Window(1, 3600), name="t", segment=segment)
    limiter.acquire("k")
    assert len(left_over(segment.name)) == 2  # the segment and its lock file
    segment.remove()
    assert left_over(segment.name) == []
    assert segment.unlinked
    assert segment.stats()["unlinked"]
    segment.remove()
    assert not limiter.acquire("k")


def test_remove_leaves_the_next_segment_alone(segment: Segment) -> None:
    segment.remove()
    second = Segment(segment.name, capacity=7)
    segment.remove()
    assert segment.unlinked
    assert not second.unlinked
    assert Segment(segment.name).stats()["capacity"] == 7


def test_a_process_that_joins_after_removal_leaves_nothing(segment: Segment) -> None:
    segment.remove()
    limiter = RateLimiter(Window(5, 3600), name="t", segment=segment)
    assert limiter.acquire("k")  # the first call of this process, and then of a forked one
    assert run_one(limiter.is_allowed, "k", method="fork")
    assert left_over(segment.name) == []


def _capacity_of(name: str, capacity: int) -> int:
    return int(Segment(name, capacity=capacity).stats()["capacity"])


def _use(name: str) -> tuple[int, int]:
    segment = Segment(name)
    RateLimiter(Window(100, 3600), name="t", segment=segment).acquire("k")
    return segment.geometry().instance, os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_many_processes_make_one_segment(segment_name: str, method: str) -> None:
    found = run(_use, [(segment_name,)] * 8, method)
    assert len({instance for instance, _ in found}) == 1
    limiter = RateLimiter(Window(100, 3600), name="t", segment=Segment(segment_name))
    assert limiter.peek("k").remaining == 92


def test_it_outlives_its_processes(segment_name: str) -> None:
    run_one(_use, segment_name)
    assert run_one(_capacity_of, segment_name, 200_000) == 200_000
    segment = Segment(segment_name)
    assert RateLimiter(Window(100, 3600), name="t", segment=segment).peek("k").remaining == 99
    assert segment.processes()[0]["pid"] == os.getpid()
    assert len(segment.processes()) == 1


def _is_joined(segment: Segment) -> bool:
    RateLimiter(Limit(5), name="t", segment=segment).acquire("k")
    return os.getpid() in {p["pid"] for p in segment.processes()}


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_each_process_is_listed_while_it_lives(segment: Segment, method: str) -> None:
    RateLimiter(Limit(5), name="t", segment=segment).acquire("k")
    assert run_one(_is_joined, segment, method=method)
    assert [p["pid"] for p in segment.processes()] == [os.getpid()]


def test_pickle(segment: Segment) -> None:
    again = pickle.loads(pickle.dumps(segment))
    assert (again.name, again.geometry().instance) == (segment.name, segment.geometry().instance)


def test_allow_other_owner_survives_pickling(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=9, allow_other_owner=True)
    if os.geteuid() == 0:
        os.chown(segment.path, 65534, -1)
    assert pickle.loads(pickle.dumps(segment)).stats()["capacity"] == 9


def test_too_large_for_the_file_system(segment_name: str) -> None:
    # 2**31 keys are about 120 GB
    free = os.statvfs(os.path.dirname(Segment(segment_name, capacity=1).path))
    Segment(segment_name).remove()
    if free.f_bavail * free.f_frsize > 100 << 30:
        pytest.skip("the shared-memory file system is larger than the largest segment")
    with pytest.raises(SegmentSpaceError, match="FAST_LITELLM_SHM_CAPACITY"):
        Segment(segment_name, capacity=2**31)
    assert left_over(segment_name) == []
