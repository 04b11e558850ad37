"""One limit, many processes: exactly n, whatever they are and however they began."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
from support.children import run
from support.gunicorn import Server
from support.workers import attempt, attempt_in_threads

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window

LIMIT, ATTEMPTS, PROCESSES = 1000, 5000, 4
KINDS: list[Any] = [
    Limit(LIMIT, 360_000),
    Limit(LIMIT, 3600, burst=LIMIT, strict=True),
    Window(LIMIT, 360_000),
    SlidingWindow(LIMIT, 360_000),
]


@pytest.mark.parametrize("limit", KINDS, ids=repr)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_exactly_the_limit(segment: Segment, method: str, limit: Any) -> None:
    given = [(segment.name, (limit,), "hot", ATTEMPTS, PROCESSES)] * PROCESSES
    assert sum(run(attempt, given, method)) == LIMIT


@pytest.mark.parametrize("time", range(6))
def test_exactly_the_limit_time_after_time(segment_name: str, time: int) -> None:
    segment = Segment(segment_name, capacity=1 if time % 2 else 1000)
    given = [(segment.name, (KINDS[time % 4],), "hot", ATTEMPTS, PROCESSES)] * PROCESSES
    assert sum(run(attempt, given, "fork")) == LIMIT


def test_exactly_the_limit_by_threads_in_processes(segment: Segment) -> None:
    given = [(segment.name, (Window(LIMIT, 360_000),), "hot", ATTEMPTS, PROCESSES, 5)] * PROCESSES
    assert sum(run(attempt_in_threads, given, "fork")) == LIMIT


def test_several_limits_by_several_processes(segment: Segment) -> None:
    limits = (Limit(2 * LIMIT, 360_000), Window(LIMIT, 360_000), SlidingWindow(3 * LIMIT, 360_000))
    given = [(segment.name, limits, "hot", ATTEMPTS, PROCESSES)] * PROCESSES
    assert sum(run(attempt, given, "fork")) == LIMIT
    # what was denied consumed nothing, of any limit
    limiter = RateLimiter(*limits, name="exact", segment=segment)
    assert limiter.peek("hot", cost=(LIMIT, 0, 2 * LIMIT))
    assert not limiter.peek("hot", cost=(LIMIT + 10, 0, 0))
    assert not limiter.peek("hot", cost=(0, 0, 2 * LIMIT + 10))


def _deny(name: str, limits: tuple[Any, ...], key: str) -> int:
    limiter = RateLimiter(*limits, name="deny", segment=Segment(name))
    return sum(bool(limiter.acquire(key)) for _ in range(ATTEMPTS))


def test_denial_consumes_nothing_across_processes(segment: Segment) -> None:
    limits = (Window(LIMIT, 360_000), Limit(LIMIT, 360_000), Window(1, 360_000))
    limiter = RateLimiter(*limits, name="deny", segment=segment)
    assert limiter.acquire("k", cost=(0, 0, 1))  # the last limit has no room any more
    assert run(_deny, [(segment.name, limits, "k")] * PROCESSES, "fork") == [0] * PROCESSES
    assert limiter.peek("k", cost=(LIMIT, LIMIT, 0))


def _forked(limiter: RateLimiter, key: str) -> int:
    """Fork here, let the child check, and return how many it was admitted. Plain os.fork: a process
    with threads, where no lock of the library may be held across it."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            admitted = sum(limiter.is_allowed(key) for _ in range(200))
            os.write(write, str(admitted).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return int(text)


def _fork_while_others_check(name: str, limits: tuple[Any, ...]) -> int:
    limiter = RateLimiter(*limits, name="exact", segment=Segment(name))
    counts, stop = [0] * 3, threading.Event()

    def check(i: int) -> None:
        while not stop.is_set():
            counts[i] += limiter.is_allowed("hot")
            RateLimiter(*limits, name="exact", segment=Segment(name))  # takes the library's lock

    threads = [threading.Thread(target=check, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    in_children = sum(_forked(limiter, "hot") for _ in range(30))
    stop.set()
    for thread in threads:
        thread.join()
    return in_children + sum(counts)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fork_from_a_thread_while_others_check(segment: Segment) -> None:
    limits = (Window(100_000_000, 360_000),)
    counted = sum(run(_fork_while_others_check, [(segment.name, limits)] * 2, "fork"))
    limiter = RateLimiter(*limits, name="exact", segment=segment)
    assert counted == 100_000_000 - limiter.peek("hot").remaining
    assert counted >= 2 * 30 * 200


@pytest.mark.parametrize("preload", [False, True], ids=["lazy", "preload"])
def test_gunicorn(segment_name: str, preload: bool) -> None:
    with Server(segment_name, limit=150, preload=preload) as server:
        answers = server.ask(400)
    admitted = [pid for status, pid in answers if status == 200]
    assert len(admitted) == 150
    assert {status for status, _ in answers} == {200, 429}
    assert len({pid for _, pid in answers}) > 1


def test_children_that_end_leave_their_counts(segment: Segment) -> None:
    given = [(segment.name, (Window(100, 360_000),), "hot", 50, PROCESSES)] * PROCESSES
    run(attempt, given, "fork")
    stats = segment.stats()
    # 200 attempts, and what the meeting place admitted
    assert stats["admitted"] + stats["denied"] == 200 + PROCESSES
    assert stats["denied"] == 100
