"""fast-shm reset and rm, from outside."""

from __future__ import annotations

import os
import pty
import subprocess
import time

import pytest
from support.children import PATIENCE
from support.names import left_over

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.segment import path_of

from .conftest import COMMAND, Command, environment

LIMITS = (Limit(7, per=3601.5, burst=3, strict=True), Window(5, per=3600), SlidingWindow(9, per=60))


@pytest.fixture
def limiters(segment: Segment) -> tuple[RateLimiter, RateLimiter]:
    """Two limiters in which "a" and "b" have consumed something."""
    both = (
        RateLimiter(*LIMITS, name="one", segment=segment),
        RateLimiter(Limit(5, per=3600), name="two", segment=segment),
    )
    for limiter in both:
        limiter.acquire_many(["a", "a", "b"])
    return both


def _left(limiters: tuple[RateLimiter, RateLimiter]) -> list[int]:
    return [limiter.peek(key).remaining for limiter in limiters for key in ("a", "b")]


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        (["a"], [3, 2, 5, 4]),
        (["--limiter", "one", "a"], [3, 2, 3, 4]),
        (["--limiter", "two"], [1, 2, 5, 5]),
        (["--all"], [3, 3, 5, 5]),
        (["nobody"], [1, 2, 3, 4]),
    ],
)
def test_reset(
    fast_shm: Command,
    segment_name: str,
    limiters: tuple[RateLimiter, RateLimiter],
    arguments: list[str],
    left: list[int],
) -> None:
    assert _left(limiters) == [1, 2, 3, 4]
    done = fast_shm("reset", "--name", segment_name, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Nothing" if "nobody" in arguments else "Reset")
    assert _left(limiters) == left


def test_reset_leaves_limits_and_limiters(
    fast_shm: Command,
    segment: Segment,
    segment_name: str,
    limiters: tuple[RateLimiter, RateLimiter],
) -> None:
    before = [(each["name"], each["limits"], each["version"]) for each in _limiters(segment)]
    # a capacity in the environment that the segment does not have is no reason to refuse
    fast_shm("reset", "--name", segment_name, "a", env=environment(FAST_LITELLM_SHM_CAPACITY="5"))
    fast_shm("reset", "--name", segment_name, "--all")
    done = fast_shm("reset", "--name", segment_name, "--limiter", "three", "a")
    assert done.returncode == 1 and "'one', 'two'" in done.stderr
    assert [
        (each["name"], each["limits"], each["version"]) for each in _limiters(segment)
    ] == before
    assert limiters[0].limits == LIMITS


def _limiters(segment: Segment) -> list[dict[str, object]]:
    return Inspection(segment).limiters()


def test_reset_odd_keys(fast_shm: Command, segment: Segment, segment_name: str) -> None:
    limiter = RateLimiter(Limit(5, per=3600), name="odd", segment=segment)
    for key in (b"\xff\xfe", b"-dash", b"", "[red]\n🎉".encode()):
        limiter.acquire(key)
        done = fast_shm("reset", "--name", segment_name, "--", key)
        assert "Reset key" in done.stdout, key
        assert limiter.peek(key).remaining == 5, key


@pytest.mark.parametrize("arguments", [[], ["--all", "a"], ["--all", "--limiter", "one"]])
def test_reset_usage(fast_shm: Command, segment_name: str, arguments: list[str]) -> None:
    done = fast_shm("reset", "--name", segment_name, *arguments)
    assert done.returncode == 2 and "--all" in done.stderr


@pytest.mark.parametrize(
    "verb", [["reset", "--all"], ["reset", "a"], ["release", "--dead"], ["rm"], ["rm", "--yes"]]
)
def test_no_segment(fast_shm: Command, segment_name: str, verb: list[str]) -> None:
    done = fast_shm(*verb, "--name", segment_name)
    assert done.returncode == 3 and path_of(segment_name) in done.stderr
    assert left_over(segment_name) == []


def test_rm_of_an_unused_segment(fast_shm: Command, segment_name: str) -> None:
    subprocess.run(
        [
            *(COMMAND[0], "-c"),
            "import sys; from fast_litellm_shm import Limit, RateLimiter, Segment\n"
            "RateLimiter(Limit(1), segment=Segment(sys.argv[1], capacity=10)).acquire('a')",
            segment_name,
        ],
        check=True,
        timeout=PATIENCE,
        env=environment(),
    )
    old, fresh = (f"{path_of(segment_name)}.{c * 16}.tmp" for c in "ab")
    for path in (old, fresh, f"{path_of(segment_name)}.{'c' * 16}.lock"):
        with open(path, "wb"):
            pass
    os.utime(old, (time.time() - 3600,) * 2)
    done = fast_shm("rm", "--name", segment_name)
    assert (done.returncode, done.stderr) == (0, "")
    assert left_over(segment_name) == [fresh]  # a process may be creating a segment with it
    os.utime(fresh, (time.time() - 3600,) * 2)
    done = fast_shm("rm", "--name", segment_name)
    assert done.returncode == 0 and "left-over" in done.stdout
    assert left_over(segment_name) == []


def test_rm_where_others_left_files(fast_shm: Command, segment_name: str) -> None:
    """What cannot be removed is named; everything else is removed."""
    Segment(segment_name, capacity=10)
    path = path_of(segment_name)
    folder, later = f"{path}.0123456789abcdef.lock", f"{path}.ffffffffffffffff.lock"
    os.mkdir(folder)
    with open(later, "wb"):
        pass
    try:
        done = fast_shm("rm", "--name", segment_name)
        assert done.returncode == 0 and "Removed segment" in done.stdout
        assert f"cannot remove {folder}: Is a directory" in done.stderr
        assert not os.path.exists(path) and not os.path.exists(later)
        done = fast_shm("rm", "--name", segment_name)
        assert "removed 0 left-over files" in done.stdout and folder in done.stderr
    finally:
        os.rmdir(folder)


def test_rm_of_a_used_segment(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    done = fast_shm("rm", "--name", segment_name)
    assert done.returncode == 1 and "--yes" in done.stderr
    assert all(str(pid) in done.stderr for pid in workers)
    assert os.path.exists(path_of(segment_name))
    done = fast_shm("rm", "--name", segment_name, "--yes")
    assert done.returncode == 0 and all(str(pid) in done.stdout for pid in workers)
    assert left_over(segment_name) == []


def test_rm_of_a_damaged_segment(fast_shm: Command, segment_name: str) -> None:
    with open(path_of(segment_name), "wb") as file:
        file.write(b"not a segment")
    done = fast_shm("rm", "--name", segment_name)
    assert done.returncode == 1 and "damaged" in done.stderr
    assert fast_shm("rm", "--name", segment_name, "--yes").returncode == 0
    assert left_over(segment_name) == []


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 1), (b"\n", 1), (b"y\n", 0)])
def test_rm_asks_on_a_terminal(
    workers: list[int], segment_name: str, answer: bytes, status: int
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    done = subprocess.run(
        [*COMMAND, "rm", "--name", segment_name],
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment(),
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == status and "[y/N]" in done.stderr
    assert os.path.exists(path_of(segment_name)) == (status != 0)
