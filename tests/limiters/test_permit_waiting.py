"""Waiting for a permit: asleep in the kernel, woken by a release, held up by nobody.

A waiter whose turn it is also looks for the dead once a second. Here it does so once an hour,
unless a test says otherwise.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from support.children import run
from support.permits import stop, wait_until_asleep
from support.waiting import PATIENCE, comes_true
from support.workers import meet

from fast_litellm_shm import ConcurrencyLimiter, PermitTimeoutError, Segment
from fast_litellm_shm.limiters.grantors import Permits


@pytest.fixture(autouse=True)
def _only_when_woken() -> Iterator[None]:
    before, Permits.wake_ns = Permits.wake_ns, 3600 * 10**9
    yield
    Permits.wake_ns = before


def make(segment: Segment, most: int = 1) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(most, name="w", segment=segment)


def _forked_waiter(limiter: ConcurrencyLimiter) -> int:
    """A child that waits for the key, takes a permit, and gives it back. Its pid, once it
    sleeps."""
    pid = os.fork()
    if not pid:
        try:
            with limiter.slot("k", timeout=PATIENCE):
                os._exit(0)
        finally:
            os._exit(1)
    wait_until_asleep(pid)
    return pid


def _ended_well(pid: int) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_release_wakes_a_waiter(segment: Segment) -> None:
    limiter = make(segment)
    with limiter.slot("k"):
        pid = _forked_waiter(limiter)
    assert _ended_well(pid)


def test_a_killed_waiter_holds_up_nobody(segment: Segment) -> None:
    limiter = make(segment)
    with limiter.slot("k"):
        first, second = _forked_waiter(limiter), _forked_waiter(limiter)
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
    assert _ended_well(second)
    assert limiter.in_flight("k") == 0


def test_a_stopped_waiter_holds_up_nobody_for_more_than_a_look(segment: Segment) -> None:
    """It may be woken first and not move; the next then looks by itself."""
    Permits.wake_ns = 10**9
    limiter = make(segment)
    with limiter.slot("k"):
        first, second = _forked_waiter(limiter), _forked_waiter(limiter)
        stop(first)
    assert _ended_well(second)
    os.kill(first, signal.SIGCONT)
    assert _ended_well(first)


def _take_turns(name: str, turns: int, parties: int, most: int) -> int:
    Permits.wake_ns = 3600 * 10**9
    meet(name, parties)
    limiter = make(Segment(name), most)
    for _ in range(turns):
        with limiter.slot("k", timeout=PATIENCE):
            os.sched_yield()
    return turns


@pytest.mark.parametrize("most", [1, 3])
def test_all_waiters_get_through(segment: Segment, most: int) -> None:
    given = [(segment.name, 300, 8, most)] * 8
    assert run(_take_turns, given, "fork") == [300] * 8
    assert make(segment, most).in_flight("k") == 0


def test_threads_of_one_process_wait_too(segment: Segment) -> None:
    limiter, through = make(segment, 2), []

    def body(i: int) -> None:
        for _ in range(20):
            with limiter.slot("k", timeout=PATIENCE):
                pass
        through.append(i)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(through) == list(range(16))


def test_one_keys_release_is_not_lost_on_another_keys_waiter(segment: Segment) -> None:
    """So many keys that some places are beside those of another key."""
    limiter = make(segment)
    keys = [f"key-{i}" for i in range(64)]
    held = [limiter.acquire(key) for key in keys]
    found: list[Any] = [None] * len(keys)

    def body(i: int) -> None:
        found[i] = limiter.wait(keys[i], timeout=10 * PATIENCE)

    threads = [threading.Thread(target=body, args=(i,)) for i in range(len(keys))]
    for thread in threads:
        thread.start()
    time.sleep(0.2)  # most sleep by now, and those that do not are right as well
    hung = []
    for i in reversed(range(len(keys))):
        held[i].release()
        threads[i].join(PATIENCE)
        if threads[i].is_alive():
            hung.append(keys[i])
            break
    for permit, thread in zip(held, threads, strict=True):
        permit.release()
        thread.join()
    for permit in found:
        permit.release()
    assert hung == []


def test_a_raised_limit_is_seen_at_the_next_look(segment: Segment) -> None:
    Permits.wake_ns = 10**9
    limiter = make(segment)
    with limiter.slot("k"):
        pid = _forked_waiter(limiter)
        make(segment, 2)
        assert _ended_well(pid)


class _InterruptedError(Exception):
    pass


def test_a_signal_handler_runs_while_it_waits(segment: Segment) -> None:
    limiter = make(segment)

    def interrupt(*_: object) -> None:
        raise _InterruptedError

    old = signal.signal(signal.SIGUSR1, interrupt)

    def when_it_sleeps() -> None:
        wait_until_asleep(os.getpid())  # its main thread, which this one is not
        os.kill(os.getpid(), signal.SIGUSR1)

    other = threading.Thread(target=when_it_sleeps)
    try:
        with limiter.slot("k"):
            with pytest.raises(_InterruptedError):
                other.start()
                with limiter.slot("k", timeout=PATIENCE):
                    raise AssertionError("entered")
            assert limiter.in_flight("k") == 1
    finally:
        other.join()
        signal.signal(signal.SIGUSR1, old)
    assert limiter.in_flight("k") == 0


def test_asyncio_waiters_get_through_and_the_loop_goes_on(segment: Segment) -> None:
    limiter, order = make(segment, 2), []

    async def one(i: int) -> None:
        async with limiter.slot_async("k", timeout=PATIENCE):
            await asyncio.sleep(0.001)
            order.append(i)

    async def everybody() -> None:
        await asyncio.gather(*(one(i) for i in range(30)))

    asyncio.run(everybody())
    assert sorted(order) == list(range(30))
    assert limiter.in_flight("k") == 0


def test_a_cancelled_asyncio_waiter_takes_nothing(segment: Segment) -> None:
    limiter = make(segment)

    async def cancelled() -> None:
        with limiter.slot("k"):
            waiting = asyncio.ensure_future(limiter.wait_async("k"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        assert limiter.in_flight("k") == 0
        async with limiter.slot_async("k", timeout=0) as permit:
            assert permit

    asyncio.run(cancelled())
    assert limiter.in_flight("k") == 0


def test_a_cancelled_asyncio_waiter_holds_up_nobody(segment: Segment) -> None:
    limiter = make(segment)

    async def cancelled() -> int:
        waiting = asyncio.ensure_future(limiter.wait_async("k"))
        await asyncio.sleep(0.05)  # it sleeps, and is first
        pid = await asyncio.to_thread(_forked_waiter, limiter)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return pid

    with limiter.slot("k"):
        pid = asyncio.run(cancelled())
    assert comes_true(lambda: os.waitpid(pid, os.WNOHANG)[0], PATIENCE / 2)


def test_asyncio_times_out_while_it_waits(segment: Segment) -> None:
    limiter = make(segment)

    async def entered() -> None:
        async with limiter.slot_async("k", timeout=0.5):
            raise AssertionError("entered")

    async def ticking() -> int:
        waiting, ticks = asyncio.ensure_future(entered()), 0
        while not waiting.done():
            ticks += 1
            await asyncio.sleep(0.001)
        with pytest.raises(PermitTimeoutError):
            await waiting
        return ticks

    with limiter.slot("k"):
        assert asyncio.run(ticking()) > 1  # the loop ran meanwhile
    assert limiter.in_flight("k") == 0


def test_a_forked_child_waits_with_threads_of_its_own(segment: Segment) -> None:
    limiter = make(segment)

    async def through(timeout: float) -> bool:
        try:
            async with limiter.slot_async("k", timeout=timeout):
                return True
        except PermitTimeoutError:
            return False

    with limiter.slot("k"):
        assert not asyncio.run(through(0.01))  # now this process has threads that sleep
        pid = os.fork()
        if not pid:
            try:
                os._exit(0 if asyncio.run(through(PATIENCE)) else 1)
            finally:
                os._exit(2)
        wait_until_asleep(pid)
    assert _ended_well(pid)
