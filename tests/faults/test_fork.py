"""Forks at the wrong moment: under threads, inside an open, in a signal handler; and spawns."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from support.children import PATIENCE
from support.names import left_over, remove
from support.waiting import TooSlow, wait_until

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window

MANY = 10**9


def _limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(MANY, 3600), name="t", segment=segment)


def _ends(pid: int) -> int:
    """Its exit code; fails where it hangs."""
    status = 0

    def ended() -> bool:
        nonlocal status
        found, status = os.waitpid(pid, os.WNOHANG)
        return bool(found)

    try:
        wait_until(f"child {pid} ends", ended, every=0.002)
    except TooSlow as error:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise AssertionError(f"child {pid} hung") from error
    return os.waitstatus_to_exitcode(status)


def _fork(task: Callable[[], bool]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = 0 if task() else 2
    finally:
        os._exit(status)


class _Busy:
    """Threads that do something again and again, while the body runs."""

    def __init__(self, *tasks: Callable[[], Any]) -> None:
        self._end = threading.Event()
        self.done = [0] * len(tasks)
        self.errors: list[BaseException] = []
        self._threads = [
            threading.Thread(target=self._run, args=(i, task)) for i, task in enumerate(tasks)
        ]

    def _run(self, i: int, task: Callable[[], Any]) -> None:
        try:
            while not self._end.is_set():
                task()
                self.done[i] += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> _Busy:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(PATIENCE)
        assert not self.errors, self.errors


def test_fork_while_others_are_in_calls(segment: Segment) -> None:
    """Nothing that a child admits or holds is lost or doubled, nor anything of the threads."""
    limiter, permits = _limiter(segment), ConcurrencyLimiter(50, name="p", segment=segment)

    def in_child() -> bool:
        with permits.acquire("k") as permit:
            return bool(permit) and sum(limiter.is_allowed("k") for _ in range(10)) == 10

    def hold() -> None:
        permits.acquire("k").release()

    def call() -> None:
        assert limiter.is_allowed("k")

    with _Busy(call, call, hold) as busy:
        codes = [_ends(_fork(in_child)) for _ in range(30)]
    assert codes == [0] * 30
    assert MANY - limiter.peek("k").remaining == 300 + busy.done[0] + busy.done[1]
    assert permits.in_flight("k") == 0


def test_fork_while_another_thread_opens(segment: Segment, segment_name: str) -> None:
    """The lock around the list of open segments is nobody's in the child."""
    other = f"{segment_name[:50]}-other"
    limiter = _limiter(segment)

    def open_and_close() -> None:
        Segment(other, capacity=20)  # made, or attached to
        remove(other)

    def in_child() -> bool:
        mine = Segment(segment_name)
        for _ in range(3):
            Segment(f"{other}-{os.getpid()}", capacity=5).remove()
        return mine.geometry().instance == segment.geometry().instance and bool(
            _limiter(mine).acquire("k")
        )

    try:
        with _Busy(open_and_close) as busy:
            codes = [_ends(_fork(in_child)) for _ in range(40)]
        assert codes == [0] * 40
        assert busy.done[0] > 10
        assert limiter.peek("k").remaining == MANY - 40
    finally:
        remove(other)
        assert left_over(other) == []


def test_fork_in_a_signal_handler(segment: Segment) -> None:
    limiter = _limiter(segment)
    children: list[int] = []

    def handler(*_: object) -> None:
        children.append(_fork(lambda: bool(limiter.acquire("k"))))
        if len(children) < 20:  # armed anew each time: a fork that a timer interrupts begins again
            signal.setitimer(signal.ITIMER_REAL, 0.001)

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    calls, deadline = 0, time.monotonic() + PATIENCE
    try:
        while len(children) < 20 and time.monotonic() < deadline:
            calls += limiter.is_allowed("k")
            calls += bool(_limiter(Segment(segment.name)).acquire("k"))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [_ends(pid) for pid in children] == [0] * 20
    assert limiter.peek("k").remaining == MANY - calls - 20


_SPAWNED = """
import sys
from fast_litellm_shm import RateLimiter, Segment, Window
limiter = RateLimiter(Window(10**9, 3600), name="t", segment=Segment(sys.argv[1]))
sys.exit(not limiter.is_allowed("k"))
"""


def test_posix_spawn(segment: Segment) -> None:
    """A child by vfork and exec shares our memory for a moment: it takes nothing of ours along."""
    limiter = _limiter(segment)
    permits = ConcurrencyLimiter(1, name="p", segment=segment)
    with permits.acquire("k"):
        arguments = [sys.executable, "-c", _SPAWNED, segment.name]
        codes = [_ends(os.posix_spawn(sys.executable, arguments, os.environ)) for _ in range(3)]
        assert codes == [0] * 3
        assert permits.in_flight("k") == 1  # our lock was not closed by theirs
    assert limiter.peek("k").remaining == MANY - 3
    assert [process["pid"] for process in segment.processes()] == [os.getpid()]


@pytest.mark.parametrize("generations", [5])
def test_fork_of_a_fork(segment: Segment, generations: int) -> None:
    """Each has a slot of its own; a dead ancestor's permits come back though its heirs live."""
    permits = ConcurrencyLimiter(generations, name="p", segment=segment)

    def descend(depth: int) -> bool:
        permit = permits.acquire("k")
        held = permits.in_flight("k") == generations - depth + 1
        deeper = depth <= 1 or _ends(_fork(lambda: descend(depth - 1))) == 0
        return bool(permit) and held and deeper  # and dies without releasing

    assert _ends(_fork(lambda: descend(generations))) == 0
    assert permits.in_flight("k") == 0
