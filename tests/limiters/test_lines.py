"""The lines of event loops: tasks that wait for one key share a place, and no end of a loop, a
task or a process leaves anything behind."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from support.children import run_one
from support.interrupts import EVERY, Interrupted, at_each_instruction
from support.waiting import PATIENCE, ticking, wait_until, wait_until_async

from fast_litellm_shm import ConcurrencyLimiter, Segment
from fast_litellm_shm._shared import wait_queue


def make(segment: Segment, most: int = 1) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(most, name="lines", segment=segment)


def _lines() -> int:
    return sum(len(each.lines) for each in list(wait_queue._events.values()))


def _watched() -> int:
    return sum(len(each.lines) for each in list(wait_queue._watches.values()))


def _threads() -> set[threading.Thread]:
    """That run: one whose start was interrupted is listed for ever."""
    named = (each for each in threading.enumerate() if each.name == "fast-shm-wait")
    return {each for each in named if each.is_alive()}


class Keeper:
    def _asked(self) -> None: ...


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    gc.collect()
    assert (_lines(), _watched()) == (0, 0)


async def _turns(limiter: ConcurrencyLimiter, count: int, key: str = "k") -> list[int]:
    order: list[int] = []

    async def one(i: int) -> None:
        async with limiter.slot_async(key, timeout=PATIENCE):
            order.append(i)
            await asyncio.sleep(0)

    await asyncio.gather(*(one(i) for i in range(count)))
    return order


def test_tasks_are_served_as_they_came(segment: Segment) -> None:
    assert asyncio.run(_turns(make(segment), 200)) == list(range(200))


def test_permits_that_are_released_at_once_are_taken_at_once(segment: Segment) -> None:
    """Not one each time that the loop comes round."""
    limiter = make(segment, 20)

    async def main() -> None:
        held = [limiter.acquire("k") for _ in range(20)]
        served: list[int] = []
        over = asyncio.Event()
        async with ticking() as ticks:

            async def one() -> None:
                async with limiter.slot_async("k", timeout=PATIENCE):
                    served.append(ticks())
                    await over.wait()

            tasks = [asyncio.create_task(one()) for _ in range(30)]
            await wait_until_async("they wait", lambda: limiter.queue_size("k") == 30)
            begun = ticks()
            for permit in held:
                permit.release()
            await wait_until_async("20 are served", lambda: len(served) == 20)
            assert served[-1] - begun < 10
            over.set()
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_many_short_loops_leave_no_descriptor_and_no_thread(segment: Segment) -> None:
    limiter = make(segment)
    asyncio.run(_turns(limiter, 2))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        asyncio.run(_turns(limiter, 2))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    wait_until("nobody watches the segment", lambda: segment not in wait_queue._watches)
    # Of other segments, whose pools live: a thread each.
    wait_until(
        "the thread that watched has ended", lambda: len(_threads()) <= len(wait_queue._watches)
    )


def test_a_watch_has_one_thread(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although an exception struck when its first one had just started."""
    start, keeper, before = wait_queue._start_thread, Keeper(), _threads()

    def interrupted(*args: Any) -> None:
        start(*args)
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(wait_queue, "_start_thread", interrupted)
        with pytest.raises(Interrupted):
            wait_queue.watch(segment, keeper)
    wait_queue.watch(segment, keeper)
    wait_until("one thread is left", lambda: len(_threads() - before) == 1)
    del keeper


def test_loops_in_cycles_leave_no_descriptor(segment: Segment) -> None:
    limiter = make(segment)
    gc.collect()
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            loop = asyncio.new_event_loop()
            loop.itself = loop  # type: ignore[attr-defined]
            loop.run_until_complete(_turns(limiter, 2))
            loop.close()
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    finally:
        gc.enable()


@pytest.mark.parametrize("kept", [False, True], ids=["dropped", "kept"])
def test_a_loop_closed_with_waiters_holds_up_nobody(segment: Segment, kept: bool) -> None:
    """Its tasks may live on, where somebody keeps them."""
    limiter = make(segment)
    permit = limiter.acquire("k")
    loop = asyncio.new_event_loop()
    coroutines = [limiter.wait_async("k") for _ in range(3)]
    tasks: list[Any] = [loop.create_task(each) for each in coroutines]
    loop.run_until_complete(asyncio.sleep(0.01))
    assert limiter.queue_size("k") >= 1
    for task in tasks:
        task._log_destroy_pending = False
    loop.close()
    if not kept:
        del tasks, task, coroutines
        gc.collect()
    permit.release()
    with limiter.slot("k", timeout=PATIENCE):
        pass
    assert asyncio.run(_turns(limiter, 3)) == [0, 1, 2]  # which also forgets the closed loop
    assert limiter.in_flight("k") == 0


def test_two_loops_in_two_threads(segment: Segment) -> None:
    limiter, found = make(segment), []

    def body() -> None:
        found.append(asyncio.run(_turns(limiter, 50)))

    threads = [threading.Thread(target=body) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sorted(each) for each in found] == [list(range(50))] * 2


class _Loop:
    """Of another thread."""

    lines: dict[Any, Any] = {}  # noqa: RUF012


def test_loops_begin_while_others_begin_in_other_threads(segment: Segment) -> None:
    limiter, interval, ends = make(segment), sys.getswitchinterval(), threading.Event()
    others, nothing, failed = [_Loop() for _ in range(9999)], _Loop(), list[BaseException]()

    def begin() -> None:
        while not ends.is_set():
            others.append(_Loop())
            wait_queue._events[others[-1]] = nothing  # type: ignore[assignment]
            del others[9999:]

    def use() -> None:
        try:
            for _ in range(200):
                asyncio.run(_turns(limiter, 2))
        except BaseException as error:
            failed.append(error)

    for each in others:
        wait_queue._events[each] = nothing  # type: ignore[assignment]
    threads = [threading.Thread(target=begin), threading.Thread(target=use)]
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        threads[1].join()
    finally:
        ends.set()
        threads[0].join()
        sys.setswitchinterval(interval)
        for each in others:
            wait_queue._events.pop(each, None)
    assert failed == []


def test_uvloop(segment: Segment) -> None:
    uvloop = pytest.importorskip("uvloop")
    limiter = make(segment)
    for _ in range(3):
        loop = uvloop.new_event_loop()
        assert loop.run_until_complete(_turns(limiter, 20)) == list(range(20))
        loop.close()


def test_a_loop_that_stands_still_holds_up_nobody(segment: Segment) -> None:
    """The program blocks it, while its task is next. It goes on when the loop does."""
    limiter = make(segment)
    permit, over = limiter.acquire("k"), threading.Event()
    got: list[bool] = []

    def other() -> None:
        with limiter.wait("k", PATIENCE) as mine:
            got.append(bool(mine))
        over.set()

    async def main() -> bool:
        task = asyncio.ensure_future(limiter.wait_async("k", PATIENCE))
        await asyncio.sleep(0.01)
        thread.start()
        wait_until("the thread waits", lambda: limiter.queue_size("k") == 2)
        permit.release()
        assert over.wait(PATIENCE)  # and this is what blocks the loop
        mine = await task
        mine.release()
        return bool(mine)

    thread = threading.Thread(target=other)
    assert asyncio.run(main())
    thread.join()
    assert got == [True]


def test_more_keys_than_places(segment_name: str) -> None:
    """4,096 places: callers beyond go by no order, and take no wake-up of a place."""
    segment = Segment(segment_name, capacity=20_000)
    limiter = make(segment)
    keys = [f"{i}" for i in range(4200)]

    async def main() -> None:
        permits = [limiter.acquire(key) for key in keys]
        tasks = [asyncio.ensure_future(limiter.wait_async(key)) for key in keys]
        await asyncio.sleep(0)
        for events in wait_queue._events.values():
            for entry, line in events.listening.items():
                assert line.native is not None
                assert line.native.place.entry == entry and line.native.place.owner
        for permit in permits:
            permit.release()
        for each in await asyncio.gather(*tasks):
            each.release()

    asyncio.run(main())


def test_100_000_keys_leave_nothing(segment: Segment) -> None:
    limiter = make(segment)

    async def one(key: str) -> None:
        async with limiter.slot_async(key):
            waiting = asyncio.ensure_future(limiter.wait_async(key))
            await asyncio.sleep(0)
        (await waiting).release()

    async def main() -> None:
        for i in range(2000):  # by hand: 100,000
            await one(f"{i}")
        for events in wait_queue._events.values():
            assert not events.lines and not events.listening

    asyncio.run(main())


def _fork_while_tasks_wait(name: str) -> list[str]:
    """What is wrong."""
    limiter = make(Segment(name))
    wrong: list[str] = []

    def child() -> int:
        # Wherever the child opens what: nothing is written into it.
        pairs = [socket.socketpair() for _ in range(30)]
        events = list(wait_queue._events.values())
        found = asyncio.run(asyncio.wait_for(_turns(limiter, 5), PATIENCE))
        for left, right in pairs:
            for each in (left, right):
                each.setblocking(False)
                try:
                    each.recv(1)
                    return 3
                except BlockingIOError:
                    pass
        return 0 if sorted(found) == list(range(5)) and not events else 2

    async def main() -> None:
        permit = limiter.acquire("k")
        tasks = [asyncio.ensure_future(limiter.wait_async("k")) for _ in range(20)]
        others = [asyncio.ensure_future(limiter.wait_async(f"{i}")) for i in range(5)]
        await asyncio.sleep(0.01)
        pid = os.fork()
        if not pid:
            status = 1
            try:
                status = child()
            finally:
                os._exit(status)
        permit.release()
        for each in others:
            (await each).release()
        for each in tasks:
            (await each).release()
        _, status = await asyncio.to_thread(lambda: os.waitpid(pid, 0))
        if status:
            wrong.append(f"the child: {os.waitstatus_to_exitcode(status)}")

    asyncio.run(main())
    return wrong


def test_a_fork_while_tasks_wait(segment: Segment) -> None:
    assert run_one(_fork_while_tasks_wait, segment.name, method="fork") == []


def _serve(limiter: ConcurrencyLimiter, ready: int) -> None:
    with limiter.slot("k", timeout=PATIENCE):
        os.write(ready, b"x")
        time.sleep(0.01)


def test_a_wake_up_of_another_process_reaches_the_task(segment: Segment) -> None:
    limiter = make(segment)

    async def main() -> int:
        served = 0
        for _ in range(20):
            read, write = os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    _serve(limiter, write)
                finally:
                    os._exit(0)
            os.read(read, 1)
            async with limiter.slot_async("k", timeout=PATIENCE) as permit:
                served += bool(permit)
            os.waitpid(pid, 0)
            os.close(read)
            os.close(write)
        return served

    assert asyncio.run(main()) == 20


def test_a_caller_that_is_interrupted_holds_up_none_of_its_line(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception before any instruction of the first: the second is served, and no line is left
    behind, nor a place."""
    limiter = make(segment)
    monkeypatch.setattr(sys, "unraisablehook", bool)  # of a destructor: nobody's to catch

    class Run:
        """No function, which at_each_instruction() would interrupt itself."""

        def __call__(self) -> None:
            loop = asyncio.new_event_loop()
            try:  # at once: also an exception within slot() leaves no loop to be closed
                with limiter.slot("k"):
                    first = loop.create_task(limiter.wait_async("k", PATIENCE))
                    second = loop.create_task(limiter.wait_async("k", PATIENCE))
                    with suppress(Interrupted):
                        loop.run_until_complete(asyncio.sleep(0.001))
                        first.cancel()
                        loop.run_until_complete(asyncio.sleep(0.001))
                for task in first, second:
                    with suppress(Interrupted, asyncio.CancelledError):
                        loop.run_until_complete(asyncio.wait([task], timeout=PATIENCE))
                    assert task.done()
                    with suppress(Interrupted, asyncio.CancelledError):
                        assert task.result().release(), "its time was up"
            finally:
                loop.close()

    run = Run()

    def check(where: str) -> None:
        if (_lines(), _watched(), limiter.in_flight("k")) != (0, 0, 0):
            gc.collect()  # a task keeps its exception, and that the frames, in a cycle
        assert limiter.in_flight("k") == 0, where
        assert limiter.queue_size("k") == 0, where
        assert (_lines(), _watched()) == (0, 0), where

    run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert at_each_instruction(run, check, EVERY) > 10
        gc.collect()  # what is left of the last ones


def _collected_in_the_middle(name: str) -> bool:
    limiter = make(Segment(name))
    signal.signal(signal.SIGUSR1, lambda *_: gc.collect(0))

    async def main() -> bool:
        found = await _turns(limiter, 30)
        return found == list(range(30))

    stop = threading.Event()

    def shoot() -> None:
        while not stop.wait(0.01):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=shoot)
    thread.start()
    try:
        return asyncio.run(main())
    finally:
        stop.set()
        thread.join()


def test_handlers_that_run_in_the_middle(segment: Segment) -> None:
    assert run_one(_collected_in_the_middle, segment.name, method="fork")
