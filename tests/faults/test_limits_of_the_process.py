"""What a process may not have: descriptors, memory, system calls, /proc; and signal storms."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import signal
import time
from typing import Any

import pytest
from support import world
from support.names import left_over
from support.waiting import PATIENCE, wait_until_async

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window
from fast_litellm_shm._shared import wait_queue
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.segment import path_of


def _limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(5, 3600), name="t", segment=segment)


def _no_descriptors() -> list[int]:
    """Takes all that there are. What the parent left to the collector (a file in a cycle) must not
    come back as a descriptor in the middle of a test."""
    gc.collect()
    gc.disable()
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    return taken


def _open_without(name: str) -> tuple[str, str, str]:
    taken = _no_descriptors()
    said = world.failure(Segment, name, capacity=100), world.failure(Segment, name, create=False)
    os.close(taken.pop())
    return *said, world.failure(Segment, name, capacity=100)


def test_no_descriptor_to_open_with(segment_name: str) -> None:
    made, attached, later = world.in_child(_open_without, segment_name)
    for said in (made, attached):
        assert said == (
            f"SegmentError: cannot open segment {path_of(segment_name)}: this process has no file "
            "descriptor left (RLIMIT_NOFILE 64); raise that (ulimit -n), or close files"
        )
    assert later == ""  # one is enough


def _join_without(name: str) -> dict[str, Any]:
    segment = Segment(name, capacity=100)
    taken = _no_descriptors()  # before the first call, which joins
    limiter = _limiter(segment)
    permits = ConcurrencyLimiter(1, name="p", segment=segment)
    found = {
        "rates": sum(limiter.is_allowed("k") for _ in range(9)),
        "permit": world.failure(permits.acquire, "k"),
        "unknown": segment.liveness_unknown,
    }
    os.close(taken.pop())
    return found | {"later": world.takes(permits, "k"), "known": segment.liveness_unknown}


def test_no_descriptor_to_join_with(segment_name: str) -> None:
    found = world.in_child(_join_without, segment_name)
    assert found["rates"] == 5
    assert found["permit"].startswith("SegmentError: limiter 'p' in segment ")
    for said in (found["permit"], found["unknown"]):
        assert ".lock cannot be opened: this process has no file descriptor left (RLIMIT_" in said
    assert found["later"] and found["known"] is None


def _wait_without(name: str) -> tuple[bool, bool, bool]:
    limiter = ConcurrencyLimiter(1, name="p", segment=Segment(name, capacity=100))
    held = limiter.acquire("k")

    def woken() -> bool:
        (line,) = (line for each in wait_queue._events.values() for line in each.lines.values())
        assert line.native is not None
        return bool(line.native.place.fd >= 0)

    async def main() -> tuple[bool, bool, bool]:
        taken = _no_descriptors()
        late = bool(await limiter.wait_async("k", 0.01))
        task = asyncio.ensure_future(limiter.wait_async("k", PATIENCE))
        await asyncio.sleep(0)
        without = woken()
        for fd in taken:
            os.close(fd)
        await wait_until_async("it has one later", woken)
        held.release()
        return late, without, bool(await task)

    return asyncio.run(main())


def test_no_descriptor_to_be_woken_with(segment_name: str) -> None:
    """A task waits without one, and sees what is free at its next look."""
    assert world.in_child(_wait_without, segment_name) == (False, False, True)


def _little_memory(name: str) -> tuple[str, str]:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    soft = used + (8 << 20)
    resource.setrlimit(resource.RLIMIT_AS, (soft, resource.RLIM_INFINITY))
    said = world.failure(Segment, name, capacity=1_000_000)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return said, world.failure(Segment, name, capacity=1_000_000)


def test_no_address_space(segment_name: str) -> None:
    said, later = world.in_child(_little_memory, segment_name)
    assert said.startswith(f"SegmentError: cannot open segment {path_of(segment_name)}: out of ")
    needs = lib.fshm_size_for(1_000_000) / 2**20
    assert f"it needs {needs:.1f} MiB of address space; RLIMIT_AS is " in said
    assert later == ""


def _small_files(name: str, action: signal.Handlers) -> str:
    signal.signal(signal.SIGXFSZ, action)  # Python ignores it, other programs die of it
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    said = world.failure(Segment, name, capacity=1000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return said


@pytest.mark.parametrize("action", [signal.SIG_IGN, signal.SIG_DFL])
def test_file_size_limit(segment_name: str, action: signal.Handlers) -> None:
    said = world.in_child(_small_files, segment_name, action)
    assert said.startswith("SegmentSpaceError: ")
    assert "and this process may make files of at most 100,000 bytes (RLIMIT_FSIZE); raise" in said
    assert left_over(segment_name) == []


# System calls that a sandbox refuses -------------------------------------------------------------


def _sandboxed(name: str, refused: list[tuple[str, int | None]]) -> int:
    for call, number in refused:
        world.refuse(call, number, only_tmpfile=call == "openat")
    limiter = _limiter(Segment(name, capacity=100))
    return sum(limiter.is_allowed("k") for _ in range(9))


@pytest.mark.parametrize(
    "refused",
    [
        [("linkat", errno.EPERM)],
        [("linkat", errno.ENOSYS)],
        [("openat", errno.EOPNOTSUPP)],
        [("openat", errno.EISDIR)],  # a kernel that knows no O_TMPFILE
        [("openat", errno.EPERM), ("renameat2", errno.ENOSYS)],
    ],
    ids=str,
)
def test_refused_calls(segment_name: str, refused: list[tuple[str, int | None]]) -> None:
    """The other way of making a segment: a private name, and a rename that replaces nothing."""
    assert world.in_child(_sandboxed, segment_name, refused) == 5
    assert not [path for path in left_over(segment_name) if path.endswith(".tmp")]
    assert not _limiter(Segment(segment_name)).is_allowed("k")


def _all_refused(name: str) -> str:
    world.refuse("openat", errno.EOPNOTSUPP, only_tmpfile=True)
    world.refuse("renameat2", errno.EPERM)
    world.refuse("linkat", errno.EPERM)
    return world.failure(Segment, name, capacity=100)


def test_link_instead_of_rename(segment_name: str) -> None:
    """link(2), which has a number of its own on x86-64, is the last way."""
    said = world.in_child(_all_refused, segment_name)
    assert said == "" or said.startswith("SegmentPermissionError: cannot open segment /dev/shm/")
    assert not [path for path in left_over(segment_name) if path.endswith(".tmp")]


def _interrupted_kernel(name: str) -> str:
    world.refuse("fallocate", errno.EINTR)
    return world.failure(Segment, name, capacity=100)


def test_a_kernel_that_never_finishes(segment_name: str) -> None:
    said = world.in_child(_interrupted_kernel, segment_name)
    assert said.startswith(f"SegmentError: cannot open segment {path_of(segment_name)}: ")
    assert "Interrupted system call" in said
    assert left_over(segment_name) == []


@pytest.mark.parametrize("way", ["linkat", "renameat2"])
def test_killed_before_it_has_its_name(segment_name: str, way: str) -> None:
    """The kernel kills the maker at the call that would publish the finished file."""
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if way == "renameat2":
                world.refuse("openat", errno.EOPNOTSUPP, only_tmpfile=True)
            world.refuse(way, None)
            Segment(segment_name, capacity=100)
        os._exit(1)
    died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if died == 1:
        pytest.skip("no seccomp filter may be set here")
    assert died == -signal.SIGSYS
    left = left_over(segment_name)
    assert [path.endswith(".tmp") for path in left] == ([True] if way == "renameat2" else [])
    assert sum(_limiter(Segment(segment_name, capacity=50)).is_allowed("k") for _ in range(9)) == 5
    for path in left:
        os.utime(path, (time.time() - 3600,) * 2)
    assert world.fast_shm("rm", "--name", segment_name, "--yes").returncode == 0
    assert left_over(segment_name) == []


# No /proc ----------------------------------------------------------------------------------------


def _without_proc(name: str, made: str) -> list[Any]:
    world.own_mounts()
    world.mount("/proc", "tmpfs", 0, "size=64k")
    limiter = _limiter(Segment(made, capacity=100))  # made and used here: works
    return [
        sum(limiter.is_allowed("k") for _ in range(9)),
        world.takes(ConcurrencyLimiter(1, name="p", segment=limiter.segment), "k"),
        world.failure(Segment, name),
    ]


def test_no_proc(segment: Segment) -> None:
    made = f"{segment.name[:50]}-other"
    try:
        admitted, permit, said = world.in_child(_without_proc, segment.name, made)
        assert (admitted, permit) == (5, True)
        assert said.startswith("SegmentClockError: ")
        assert "this process cannot tell which, since it cannot read /proc; mount it" in said
        said = world.failure(Segment, made)
        assert "its maker could not read /proc, so which one is unknown; mount it there" in said
    finally:
        world.fast_shm("rm", "--name", made, "--yes")


# Signals -----------------------------------------------------------------------------------------


def _stormed(name: str) -> dict[str, Any]:
    hits = 0

    def count(*_: object) -> None:
        nonlocal hits
        hits += 1

    signal.signal(signal.SIGALRM, count)
    signal.siginterrupt(signal.SIGALRM, True)
    signal.setitimer(signal.ITIMER_REAL, 0.0003, 0.0003)
    try:
        opened = 0
        for i in range(20):
            segment = Segment(name, capacity=1000 if i % 5 else 1_000_000)
            opened += world.takes(ConcurrencyLimiter(1, name="p", segment=segment), "k")
            if i < 19:
                segment.remove()
        permits = ConcurrencyLimiter(1, name="p", segment=segment)
        limiter = RateLimiter(Window(5, 6), name="t", segment=segment)
        admitted = sum(bool(limiter.wait("k", timeout=0)) for _ in range(9))
        with permits.acquire("k"):
            begun = time.monotonic()
            denied = permits.wait("k", timeout=0.3)
            waited = time.monotonic() - begun
        late = bool(limiter.wait("k", timeout=60))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return {
        "opened": opened,
        "admitted": admitted,
        "denied": not denied,
        "whole wait": waited >= 0.3,
        "late": late,
        "stormed": hits > 100,
    }


def test_a_signal_storm(segment_name: str) -> None:
    assert world.in_child(_stormed, segment_name) == {
        "opened": 20,
        "admitted": 5,
        "denied": True,
        "whole wait": True,
        "late": True,
        "stormed": True,
    }
