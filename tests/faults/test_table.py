"""More processes than have rows of the table at first; those that close all descriptors."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
from typing import Any

import pytest
from support import world
from support.children import run, run_one
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window

TABLE = 4096
MANY = 300  # more than have rows when the segment is made
F_OFD_SETLK = 37  # fcntl has it from Python 3.12 on


def _limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(1000, 3600), name="t", segment=segment)


def _permits(segment: Segment) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(1000, name="p", segment=segment)


def _one_too_many(name: str) -> dict[str, Any]:
    segment = Segment(name)
    return {
        "rates": sum(_limiter(segment).is_allowed("k") for _ in range(1000)),
        "permit": world.failure(_permits(segment).acquire, "k"),
        "unknown": segment.liveness_unknown,
    }


def _takes(name: str) -> bool:
    return world.takes(_permits(Segment(name)), "k")


def test_more_than_a_small_host_has(segment_name: str) -> None:
    def work() -> Any:
        segment = Segment(segment_name, capacity=2000)
        permit = _permits(segment).acquire("k")
        return _limiter(segment).is_allowed("k") and permit and [segment, permit]

    with contextlib.ExitStack() as workers:
        pids = [workers.enter_context(world.forked(work)) for _ in range(MANY)]
        found = run_one(_one_too_many, segment_name, method="fork")
        assert found["rates"] == 1000 - MANY
        assert (found["permit"], found["unknown"]) == ("", None)
        assert len(world.fast_shm("inspect", "--name", segment_name).stdout.splitlines()) > MANY
        world.kill(pids[100])
        world.kill(pids[0])
        seen = run_one(_seen, segment_name, method="fork")
        assert seen == (MANY - 2, {*pids} - {pids[0], pids[100]})
    assert run_one(_seen, segment_name, method="fork") == (0, set())


def test_a_neighbour_takes_all_places(segment_name: str) -> None:
    """By locks on the lock file, which he may open as the workers do."""
    segment = Segment(segment_name, capacity=100)
    permits = _permits(segment)
    held = permits.acquire("k")
    lock = f"{segment.path}.{segment.geometry().instance:016x}.lock"
    with open(lock, "rb+") as file:
        for byte in range(2 * TABLE):
            with contextlib.suppress(OSError):
                place = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
                fcntl.fcntl(file, F_OFD_SETLK, place)
        found = world.in_child(_one_too_many, segment_name)
        assert found["rates"] == 1000
        assert found["permit"].startswith("SegmentFullError: ") and lock in found["permit"]
        assert f"1 of {TABLE} are living processes" in found["permit"]
        assert permits.in_flight("k") == 1  # nobody is taken for dead
    assert held and held.release()
    assert world.in_child(_takes, segment_name)


def _seen(name: str) -> tuple[int, set[int]]:
    segment = Segment(name)
    held = _permits(segment).in_flight("k")
    return held, {process["pid"] for process in segment.processes()} - {os.getpid()}


# Descriptors that others close -------------------------------------------------------------------


def _close_all() -> None:
    """As daemonising libraries do."""
    os.closerange(3, 4096)


def test_daemonised_after_opening(segment: Segment) -> None:
    """Fork, then close all descriptors: the child joins by itself, and is seen to live and die."""
    limiter, permits = _limiter(segment), _permits(segment)
    assert limiter.is_allowed("k") and world.takes(permits, "k")
    orders, ours = os.pipe()
    says, said = os.pipe()
    pid = os.fork()
    if not pid:
        os.setsid()
        os.dup2(orders, 0)  # which daemons keep
        os.dup2(said, 1)
        _close_all()
        taken = [
            os.open("/dev/null", os.O_RDONLY) for _ in range(20)
        ]  # the numbers are others' now
        permit = permits.acquire("k")
        fine = permit and limiter.is_allowed("k") and segment.liveness_unknown is None
        os.write(1, b"held" if fine and not segment.unlinked else b"lost")
        os.read(0, 1)
        os._exit(len(taken) - 20)
    os.close(orders)
    os.close(said)
    try:
        assert os.read(says, 4) == b"held"
        assert permits.in_flight("k") == 1
        assert pid in {process["pid"] for process in segment.processes()}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ours)
        os.close(says)
    wait_until("its permit is free", lambda: permits.in_flight("k") == 0)
    assert os.getpid() in {process["pid"] for process in segment.processes()}


def test_closed_in_place(segment_name: str) -> None:
    """Without a fork: the process goes on as before, and files that got the numbers since are
    neither locked nor closed."""
    ends = os.pipe()
    pid = os.fork()
    if not pid:
        os.dup2(ends[1], 1)
        segment = Segment(segment_name, capacity=100)
        limiter = _limiter(segment)
        limiter.is_allowed("k")
        _close_all()
        taken = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
        counted = sum(limiter.is_allowed("k") for _ in range(9))
        said = segment.liveness_unknown or ""
        removed = segment.unlinked
        del limiter, segment
        kept = all(os.fstat(number) for number in taken)
        os.write(1, f"{counted} {removed} {kept} {said}".encode())
        os._exit(0)
    os.close(ends[1])
    with open(ends[0], "rb") as end:
        *found, said = end.read().decode().split(" ", 3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert found == ["9", "False", "True"]
    assert not said
    assert _limiter(Segment(segment_name)).peek("k").remaining == 1000 - 10


# Races of the first ------------------------------------------------------------------------------


def _first(name: str) -> tuple[int, int, int]:
    segment = Segment(name, capacity=1000)
    limiter = RateLimiter(Window(100, 3600), name="raced", segment=segment)
    admitted = sum(limiter.is_allowed("k") for _ in range(10))
    with ConcurrencyLimiter(100, name="p", segment=segment).acquire("k") as permit:
        return segment.geometry().instance, admitted, bool(permit)


@pytest.mark.parametrize("attempt", range(3))
def test_32_are_the_first(segment_name: str, attempt: int) -> None:
    """They make the segment, its lock file, a limiter and its limits at once: one of each."""
    found = run(_first, [(segment_name,)] * 32, "fork")
    assert len({instance for instance, _, _ in found}) == 1
    assert sum(admitted for _, admitted, _ in found) == 100
    assert all(permit for _, _, permit in found)
    segment = Segment(segment_name)
    assert segment.stats()["limiters"] == 2
    assert segment.liveness_unknown is None
