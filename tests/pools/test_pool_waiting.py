"""Callers that wait for a connection: in one queue over all processes, without threads of the
program, and not in vain while another process has an idle connection."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from support import green
from support.children import run
from support.permits import stop
from support.pooled import CountingServer
from support.pooled import close as close_client
from support.pooled import connect as connect_client
from support.waiting import PATIENCE, TooSlow, wait_until, wait_until_async
from support.workers import meet

from fast_litellm_shm import PermitTimeoutError, Segment, SimpleConnectionPool
from fast_litellm_shm._shared.inspection import waiting_callers
from fast_litellm_shm._shared.wait_queue import Place, place_of_thread

A, B, C = "https://a.example", "https://b.example", "https://c.example"


def make(segment: Segment, **options: Any) -> SimpleConnectionPool:
    return SimpleConnectionPool("p", segment=segment, **options)


def counts(of: SimpleConnectionPool) -> tuple[int, int]:
    stats = of.get_stats()
    return stats["active_connections"], stats["idle_connections"]


def waiting(of: SimpleConnectionPool, endpoint: str | None = A) -> int:
    """How many wait for the endpoint; None: for room in the whole pool."""
    if endpoint is None:
        return of._states[1].waiting(b"")
    return of._states[0].waiting(endpoint.encode())


class Opened:
    """Counts what is open."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.lock, self.seconds = threading.Lock(), seconds
        self.now = self.most = self.total = 0

    def connect(self, _: str) -> Opened:
        with self.lock:
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        return self

    def close(self) -> None:
        with self.lock:
            self.now -= 1


# one process -------------------------------------------------------------------------------------


@contextmanager
def _no_thread_starts() -> Iterator[None]:
    """As where the system has no more threads: no address space holds such a stack."""
    before = threading.stack_size(1 << 47)
    try:
        yield
    finally:
        threading.stack_size(before)


@contextmanager
def _no_thread_left() -> Iterator[ThreadPoolExecutor]:
    """An executor whose only thread does not come back."""
    ends = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        executor.submit(ends.wait)
        try:
            yield executor
        finally:
            ends.set()


def test_500_tasks_on_ten_connections_use_no_thread_of_the_program(segment: Segment) -> None:
    of, opened, busy, most = make(segment), Opened(0.001), 0, 0
    of.bind(opened.connect, lambda _: opened.close())

    async def use() -> None:
        nonlocal busy, most
        async with of.connection_async(A, timeout=None):
            busy += 1
            most = max(most, busy)
            await asyncio.sleep(0.005)
            busy -= 1

    async def main() -> None:
        with _no_thread_left() as executor:
            asyncio.get_running_loop().set_default_executor(executor)
            await asyncio.gather(*(use() for _ in range(500)))

    asyncio.run(main())
    assert most == opened.most == opened.total == 10
    assert counts(of) == (0, 10)
    assert waiting(of) == 0


def test_to_thread_of_the_program_is_not_delayed_by_waiting_tasks(segment: Segment) -> None:
    """More tasks wait than the program has threads, and none of them is served meanwhile."""
    of = make(segment, max_per_endpoint=1)

    async def main() -> None:
        async with of.connection_async(A):
            tasks = [asyncio.create_task(_use(of)) for _ in range(100)]
            await wait_until_async("all wait", lambda: waiting(of) == 100)
            assert await asyncio.to_thread(threading.get_ident) != threading.get_ident()
            assert waiting(of) == 100
        await asyncio.gather(*tasks)

    asyncio.run(main())


async def _use(of: SimpleConnectionPool, endpoint: str = A) -> None:
    async with of.connection_async(endpoint, timeout=None):
        await asyncio.sleep(0)


def test_tasks_are_served_in_the_order_in_which_they_came(segment: Segment) -> None:
    of, served = make(segment, max_per_endpoint=1), list[int]()

    async def use(number: int) -> None:
        async with of.connection_async(A, timeout=None):
            served.append(number)
            await asyncio.sleep(0.001)

    async def main() -> None:
        await asyncio.gather(*(use(number) for number in range(50)))

    asyncio.run(main())
    assert served == list(range(50))


def test_a_cancelled_crowd_leaks_nothing(segment: Segment) -> None:
    of, opened, chance = (
        make(segment, max_per_endpoint=3, max_total=4),
        Opened(0.005),
        random.Random(1),
    )
    of.bind(opened.connect, lambda _: opened.close())

    async def use() -> None:
        async with of.connection_async(chance.choice((A, B)), timeout=None):
            await asyncio.sleep(chance.random() * 0.002)
            if chance.random() < 0.2:
                raise ValueError  # its connection is closed

    async def main() -> None:
        for _ in range(4):
            tasks = [asyncio.create_task(use()) for _ in range(100)]
            while not all(task.done() for task in tasks):
                await asyncio.sleep(0.002)
                chance.choice(tasks).cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        # A thread may yet connect for a task that is gone.
        await wait_until_async("none is in use", lambda: counts(of)[0] == 0)

    asyncio.run(main())
    assert [waiting(of, each) for each in (A, B, None)] == [0, 0, 0]
    assert opened.most <= 4
    assert counts(of) == (0, opened.now)


def test_a_task_that_is_cancelled_before_its_thread_connects_gives_its_permits_back(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fast_litellm_shm.limiters import waiting as module

    of = make(segment, max_per_endpoint=1)
    of.bind(lambda _: pytest.fail("connected"))

    async def main() -> None:
        with _no_thread_left() as executor:
            monkeypatch.setitem(module._executors, "fast-shm-connect", executor)
            task = asyncio.create_task(_use(of))
            await wait_until_async("it has its permits", lambda: counts(of) == (1, 0))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert counts(of) == (0, 0)

    asyncio.run(main())


def test_a_task_whose_thread_cannot_start_gives_its_permits_back(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what the executor kept is not done later, by a thread that starts then."""
    from fast_litellm_shm.limiters import waiting as module

    monkeypatch.setattr(module, "_executors", {})
    of, opened = make(segment, max_per_endpoint=1), Opened()
    of.bind(opened.connect)

    async def main() -> None:
        with _no_thread_starts(), pytest.raises(RuntimeError, match="can't start new thread"):
            await _use(of)
        assert counts(of) == (0, 0)
        await _use(of)

    asyncio.run(main())
    assert (opened.total, counts(of)) == (1, (0, 1))


def test_a_waiter_behind_one_whose_server_does_not_answer_is_served(segment: Segment) -> None:
    """Its permits are given back, and the next caller gets them."""
    of, ends = make(segment, max_total=1), threading.Event()

    def connect(endpoint: str) -> str:
        if endpoint == B:
            assert ends.wait(PATIENCE)
            raise OSError("refused")
        return endpoint

    of.bind(connect)

    async def main() -> None:
        async with of.connection_async(A):
            wrong = asyncio.create_task(_use(of, B))
            await wait_until_async("the first waits", lambda: waiting(of, None) == 1)
            right = asyncio.create_task(_use(of, C))
            await wait_until_async("both wait", lambda: waiting(of, None) == 2)
        await wait_until_async("only the second waits", lambda: waiting(of, None) == 1)
        assert not right.done()
        ends.set()
        await right
        with pytest.raises(OSError, match="refused"):
            await wrong

    asyncio.run(main())


def test_a_waiter_for_a_full_endpoint_does_not_hold_up_the_pool(segment: Segment) -> None:
    of = make(segment, max_per_endpoint=1, max_total=2)

    async def main() -> None:
        async with of.connection_async(A):
            async with of.connection_async(B):
                first = asyncio.create_task(_use(of, A))
                await wait_until_async("it waits for A", lambda: waiting(of, A) == 1)
                second = asyncio.create_task(_use(of, C))
                await wait_until_async("it waits for room", lambda: waiting(of, None) == 1)
            await second  # the idle connection to B was closed for it
            assert waiting(of, A) == 1
        await first

    asyncio.run(main())
    assert counts(of)[0] == 0


def test_a_busy_endpoint_does_not_starve_a_caller_that_waits_for_room(segment: Segment) -> None:
    """Callers wait for the busy one all the time, and use what is returned."""
    of, ends = make(segment, max_total=2, max_per_endpoint=2), threading.Event()

    def keep_busy() -> None:
        while not ends.is_set():
            with of.connection(A, timeout=PATIENCE):
                time.sleep(0.0005)

    threads = [threading.Thread(target=keep_busy) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            wait_until("they wait", lambda: waiting(of))
            with of.connection(B, timeout=PATIENCE):
                pass
    finally:
        ends.set()
        for thread in threads:
            thread.join()


def test_threads_that_wait_get_what_becomes_idle(segment: Segment) -> None:
    of, opened, done = make(segment, max_per_endpoint=2), Opened(), list[int]()
    of.bind(opened.connect, lambda _: opened.close())

    def body() -> None:
        for _ in range(20):
            with of.connection(A, timeout=PATIENCE):
                time.sleep(0.0005)
        done.append(20)

    threads = [threading.Thread(target=body) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == 160
    assert opened.most == opened.total == 2  # they were never closed for one of this process


def test_two_pools_of_a_name_in_one_process(segment: Segment) -> None:
    """What one keeps idle is closed for a caller of the other."""
    one, other = make(segment, max_per_endpoint=1), make(segment, max_per_endpoint=1)
    with one.connection(A):
        pass
    assert counts(other) == (0, 1)
    with other.connection(A, timeout=PATIENCE):
        assert counts(other) == (1, 0)
    with one.connection(B), other.connection(C):
        pass
    assert counts(one) == (0, 3)


# over processes ----------------------------------------------------------------------------------


def _take_turns(name: str, parties: int, threads: int, turns: int) -> tuple[int, list[str]]:
    meet(name, parties)
    of, served, wrong = make(Segment(name), max_per_endpoint=5), list[int](), list[str]()
    of.bind(lambda _: object())

    def body() -> None:
        try:
            for _ in range(turns):
                with of.connection(A, timeout=PATIENCE):
                    time.sleep(0.001)
                served.append(1)
        except BaseException as error:
            wrong.append(repr(error))

    started = [threading.Thread(target=body) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    meet(name, 2 * parties)
    return len(served), wrong


def test_callers_while_another_thread_makes_pools(segment: Segment) -> None:
    of, interval = make(segment, max_per_endpoint=1), sys.getswitchinterval()
    ends: list[bool] = []
    others = [SimpleConnectionPool(f"other {i % 7}", segment=segment) for i in range(2000)]

    def make_pools() -> None:
        while not ends:
            others.append(SimpleConnectionPool("other", segment=segment))
            del others[2000:]

    maker = threading.Thread(target=make_pools)
    sys.setswitchinterval(1e-6)
    try:
        maker.start()
        with of.connection(A):
            for _ in range(1000):
                with pytest.raises(PermitTimeoutError), of.connection(A):
                    raise AssertionError("entered")
    finally:
        ends.append(True)
        maker.join()
        sys.setswitchinterval(interval)


def test_six_workers_of_four_threads_on_five_connections(segment: Segment) -> None:
    """Finding 42: some of them starved, since the connections lay idle in other workers."""
    found = run(_take_turns, [(segment.name, 6, 4, 40)] * 6, "fork")
    assert found == [(160, [])] * 6


@contextmanager
def _owner(
    of: SimpleConnectionPool, endpoint: str, count: int, idle: int
) -> Iterator[tuple[int, Callable[[], None], int]]:
    """A process that has connections, some of them idle, and then sleeps in the kernel: its pid; a
    call that ends its sleep; what it writes to when it closes one."""
    told, tell = os.pipe()
    wakes, wake = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(wake)
            of.bind(lambda _: object(), lambda _: os.write(tell, b"c"))
            ids = [of.get_connection(endpoint) for _ in range(count)]
            for each in ids[:idle]:
                of.return_connection(each or "")
            os.write(tell, b"." if all(ids) else b"x")
            os.read(wakes, 1)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(tell)
    try:
        assert os.read(told, 1) == b"."
        yield pid, lambda: os.close(wake), told
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_an_idle_connection_of_another_process_is_closed_while_its_owner_sleeps(
    segment: Segment,
) -> None:
    of = make(segment, max_per_endpoint=2)
    with _owner(of, A, 2, 2) as (_, _, told):
        assert counts(of) == (0, 2)
        with of.connection(A, timeout=PATIENCE):
            assert os.read(told, 1) == b"c"
            assert counts(of) == (1, 1)  # it closed one, and kept the other


def test_an_idle_connection_to_any_endpoint_is_closed_for_room_in_the_pool(
    segment: Segment,
) -> None:
    of = make(segment, max_total=2)
    with _owner(of, B, 2, 1) as (_, _, told):

        async def use() -> None:
            async with of.connection_async(A, timeout=PATIENCE):
                assert os.read(told, 1) == b"c"
                assert counts(of) == (2, 0)

        asyncio.run(use())
        with pytest.raises(PermitTimeoutError), of.connection(A), of.connection(A, timeout=0.3):
            raise AssertionError("the other is in use")


def test_a_connection_that_is_returned_is_closed_for_another_process_that_waits(
    segment: Segment,
) -> None:
    of = make(segment, max_per_endpoint=1)
    kept = of.get_connection(A)
    assert kept is not None
    pid = os.fork()
    if not pid:
        try:
            with of.connection(A, timeout=PATIENCE):
                os._exit(0 if counts(of) == (1, 0) else 1)
        finally:
            os._exit(2)
    wait_until("the child waits", lambda: waiting(of) == 1)
    of.return_connection(kept)
    assert not of.health_check(kept)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@contextmanager
def _first_of_another_process(of: SimpleConnectionPool) -> Iterator[int]:
    """A process whose caller waits, and gets a connection in the end: its pid."""
    pid = os.fork()
    if not pid:
        try:
            with of.connection(A, timeout=PATIENCE):
                os._exit(0)
        finally:
            os._exit(1)
    wait_until("the child waits", lambda: waiting(of) == 1)
    yield pid
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _joined(of: SimpleConnectionPool, later: float) -> Place:
    """A place of this process, of a caller that came so many seconds after the only one."""
    took = now = 0
    while not 0 < took < 2_000_000:  # until nothing came between the two readings of the clock
        now = of._states[0].now()
        (waited,) = [each.waited_ns for each in waiting_callers(of._segment)]
        took = of._states[0].now() - now
    came = now - int(waited - later * 1e9)
    place = place_of_thread(of._states[0], A.encode(), since=came)
    place.join()
    return place


def _returned(of: SimpleConnectionPool, connection: str) -> bool:
    """Return it: whether it stays."""
    of.return_connection(connection)
    if any(each.stale for each in waiting_callers(of._segment)):
        raise TooSlow("the callers do not beat, so they do not count")
    return of.health_check(connection)


def test_a_connection_stays_for_a_caller_that_came_little_later(segment: Segment) -> None:
    of = make(segment, max_per_endpoint=1)
    kept = of.get_connection(A)
    assert kept is not None
    with _first_of_another_process(of) as pid:
        stop(pid)  # else it asks again, 0.2 s later: on a busy machine before this process is done
        try:
            own = _joined(of, 0.01)
            use = of.connection(A)
            assert not own.turn()
            assert _returned(of, kept)
            if own.turn():  # it is not first, and was woken for what is idle here
                raise TooSlow("the other process is passed over, since it is stopped for too long")
            assert use._idle()
            own.took()
            own.leave()
        finally:
            os.kill(pid, signal.SIGCONT)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        del use  # gives it back: nobody of this process waits
        assert not of.health_check(kept)


def test_a_connection_is_closed_for_a_caller_that_came_much_earlier(segment: Segment) -> None:
    of = make(segment, max_per_endpoint=1)
    kept = of.get_connection(A)
    assert kept is not None
    with _first_of_another_process(of):
        own = _joined(of, 0.03)
        assert not _returned(of, kept)
    own.leave()


@pytest.mark.parametrize("leaves", [False, True])
def test_a_caller_that_was_woken_and_takes_nothing_strands_no_connection(
    segment: Segment, leaves: bool
) -> None:
    """It leaves the queue; or it does nothing at all, as a task of a loop that is blocked."""
    of = make(segment, max_per_endpoint=1)
    kept = of.get_connection(A)
    assert kept is not None
    with of.connection(B):  # it has begun to listen to other processes
        pass
    with _first_of_another_process(of):
        own = _joined(of, 0.01)
        of.return_connection(kept)
        if leaves:
            own.leave()
    own.leave()
    assert not of.health_check(kept)


def test_of_two_connections_one_stays_for_the_only_caller_here(segment: Segment) -> None:
    of = make(segment, max_per_endpoint=2)
    kept = [of.get_connection(A) or "", of.get_connection(A) or ""]
    with _first_of_another_process(of):
        own = _joined(of, 0.01)
        assert _returned(of, kept[0])
        of.return_connection(kept[1])
        assert sum(map(of.health_check, kept)) == 1
    own.leave()


def _dies_having_woken(name: str, parties: int) -> None:
    of = make(Segment(name), max_per_endpoint=1)
    kept = of.get_connection(A)
    meet(name, parties)
    wait_until("another process waits", lambda: waiting(of) == 1)
    own = _joined(of, 0.01)
    of.return_connection(kept or "")
    if of.health_check(kept or "") and own.came:
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_process_of_a_caller_that_was_just_woken_is_killed(segment: Segment) -> None:
    of = make(segment, max_per_endpoint=1)
    pid = os.fork()
    if not pid:
        try:
            _dies_having_woken(segment.name, 2)
        finally:
            os._exit(1)
    meet(segment.name, 2)
    with of.connection(A, timeout=PATIENCE):
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        assert counts(of) == (1, 0)


@pytest.mark.parametrize("stopped", [False, True])
def test_connections_of_an_owner_that_is_killed_while_another_waits(
    segment: Segment, stopped: bool
) -> None:
    """A stopped owner closes nothing. Its end gives the permits back."""
    of, served = make(segment, max_per_endpoint=2), list[str]()
    with _owner(of, A, 2, 1 if stopped else 0) as (pid, _, _):
        if stopped:
            stop(pid)

        def use() -> None:
            with of.connection(A, timeout=PATIENCE) as found:
                served.append(found)

        thread = threading.Thread(target=use)
        thread.start()
        wait_until("it waits", lambda: waiting(of) == 1)
        assert served == []
        os.kill(pid, signal.SIGKILL)
        thread.join()
        assert len(served) == 1


def _serve_some(name: str, url: str, parties: int, threads: int) -> int:
    meet(name, parties)
    of, served = make(Segment(name), max_per_endpoint=3), list[bool]()
    of.bind(connect_client, close_client)

    def body() -> None:
        for _ in range(10):
            with of.connection(url, timeout=PATIENCE) as client:
                served.append(client.get("/").text == "ok")

    started = [threading.Thread(target=body) for _ in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    meet(name, 2 * parties)
    of.close()
    return sum(served)


def test_a_server_never_sees_more_than_the_limit_when_connections_are_handed_on(
    segment: Segment,
) -> None:
    with CountingServer() as server:
        found = run(_serve_some, [(segment.name, server.url, 3, 3)] * 3, "fork")
        assert found == [30] * 3
        assert server.most <= 3


def _serve_some_on_loops(name: str, url: str, parties: int, loops: int) -> int:
    meet(name, parties)
    of, served = make(Segment(name), max_per_endpoint=3), list[bool]()
    of.bind(connect_client, close_client)

    async def use() -> None:
        for _ in range(5):
            async with of.connection_async(url, timeout=PATIENCE) as client:
                served.append(client.get("/").text == "ok")
                await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(use() for _ in range(4)))

    started = [threading.Thread(target=asyncio.run, args=(main(),)) for _ in range(loops)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    meet(name, 2 * parties)
    of.close()
    return sum(served)


def test_tasks_of_several_event_loops_in_several_processes(segment: Segment) -> None:
    with CountingServer() as server:
        found = run(_serve_some_on_loops, [(segment.name, server.url, 3, 2)] * 3, "fork")
        assert found == [40] * 3
        assert server.most <= 3


@pytest.mark.parametrize("hub", green.HUBS)
def test_an_idle_connection_of_a_patched_program_is_closed_by_a_greenlet(
    hub: str, segment: Segment
) -> None:
    found = run(_keeps_or_waits, [(hub, segment.name), ("", segment.name)], "spawn")
    assert found == [True, True]


def _connect_by_the_hub(endpoint: str) -> str:
    time.sleep(0.01)
    return endpoint


def _keeps_or_waits(hub: str, name: str) -> bool:
    """A patched program keeps an idle connection; another one waits for it. Whether the first has
    closed it in the thread of its hub; whether the second was served."""
    of, closed = make(Segment(name), max_per_endpoint=1), list[int]()
    if not hub:
        meet(name, 2)
        with of.connection(A, timeout=PATIENCE):
            meet(name, 4)
        return True
    green.patch(hub)
    of.bind(_connect_by_the_hub, lambda _: closed.append(threading.get_native_id()))
    with of.connection(A):
        pass
    meet(name, 2)
    wait_until("it is closed", lambda: closed)  # sleeps in the hub
    meet(name, 4)
    return closed == [threading.get_native_id()]
