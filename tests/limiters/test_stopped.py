"""A process that is stopped at the head of a queue delays nobody beyond a second, whatever it waits
for, and however: in a thread, a task or a greenlet. A process that is stopped keeps what it holds,
and one that is killed holds nothing a second later."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from contextlib import ExitStack

import pytest
from support.permits import stop, wait_until_dead
from support.wait_storm import MOST, Things, use_once
from support.waiting import PATIENCE, comes_true, wait_until

from fast_litellm_shm import RateLimiter, Segment, Window
from fast_litellm_shm._shared.inspection import Inspection

WHICH = (1, 2, 3)  # a slot, the quota, a connection
ALL = tuple(each for each in WHICH for _ in range(MOST[each]))
WITHIN = 1.0  # seconds


def _take_all(things: Things, stack: ExitStack) -> None:
    for which in WHICH:
        for _ in range(MOST[which]):
            stack.enter_context(things.enter(which, PATIENCE))


def _callers(segment: Segment) -> int:
    return sum(row["callers"] for row in Inspection(segment).waiting())


def _wait(things: Things, which: int, served: list[int]) -> None:
    with things.enter(which, PATIENCE):
        served.append(which)


@pytest.mark.parametrize("kind", ["threads", "tasks", "gevent", "eventlet"])
@pytest.mark.parametrize("heads", [1, 3])
def test_a_stopped_process_at_the_head(segment: Segment, kind: str, heads: int) -> None:
    things, served = Things(segment), list[int]()
    context = multiprocessing.get_context("spawn")
    stopped = [
        context.Process(target=use_once, args=(kind, segment.name, WHICH), daemon=True)
        for _ in range(heads)
    ]
    with ExitStack() as stack:
        _take_all(things, stack)
        for each in stopped:
            each.start()
        wait_until("all of them wait", lambda: _callers(segment) == heads * len(WHICH))
        threads = [threading.Thread(target=_wait, args=(things, each, served)) for each in WHICH]
        for thread in threads:
            thread.start()
        wait_until("all wait", lambda: _callers(segment) == (heads + 1) * len(WHICH))
        for each in stopped:
            stop(each.pid or 0)
        assert not served
    try:
        assert comes_true(lambda: len(served) == len(WHICH), WITHIN), served
    finally:
        for each in stopped:
            os.kill(each.pid or 0, signal.SIGCONT)
    for thread in threads:
        thread.join()
    for each in stopped:  # it has its turn when it goes on
        each.join(PATIENCE)
        assert each.exitcode == 0


@pytest.mark.parametrize("kind", ["threads", "tasks", "gevent", "eventlet"])
def test_what_a_stopped_process_holds_comes_back_when_it_is_killed(
    segment: Segment, kind: str
) -> None:
    things, served = Things(segment), list[int]()
    holder = multiprocessing.get_context("spawn").Process(
        target=use_once, args=(kind, segment.name, ALL, PATIENCE), daemon=True
    )
    holder.start()
    try:
        wait_until("it holds all", lambda: things.held()[:4] == [0, 1, 2, 2])
        threads = [threading.Thread(target=_wait, args=(things, each, served)) for each in WHICH]
        for thread in threads:
            thread.start()
        wait_until("all wait", lambda: _callers(segment) == len(WHICH))
        stop(holder.pid or 0)
        time.sleep(2 * WITHIN)
        assert not served and things.held()[:4] == [0, 1, 2, 2], "it lives, and holds them"
    finally:
        holder.kill()
        wait_until_dead(holder.pid or 0)
    assert comes_true(lambda: len(served) == len(WHICH), WITHIN), served
    for thread in threads:
        thread.join()
    holder.join()
    assert things.held()[:3] == [0, 0, 0]


def _wait_for_a_token(name: str) -> None:
    assert _rate(Segment(name)).wait("k")


def _rate(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(1, 30), name="rate", segment=segment)


def test_a_stopped_process_that_waits_for_a_token(segment: Segment) -> None:
    limiter, served = _rate(segment), list[bool]()
    assert limiter.acquire("k")
    stopped = multiprocessing.get_context("fork").Process(
        target=_wait_for_a_token, args=(segment.name,), daemon=True
    )
    stopped.start()
    wait_until("it waits", lambda: limiter.queue_size("k") == 1)
    thread = threading.Thread(target=lambda: served.append(bool(limiter.wait("k"))))
    thread.start()
    wait_until("both wait", lambda: limiter.queue_size("k") == 2)
    stop(stopped.pid or 0)
    try:
        limiter.reset("k")
        assert comes_true(lambda: served == [True], WITHIN)
    finally:
        os.kill(stopped.pid or 0, signal.SIGCONT)
    thread.join()
    limiter.reset("k")
    stopped.join(PATIENCE)
    assert stopped.exitcode == 0
