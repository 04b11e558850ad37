"""Processes with threads, tasks and greenlets that wait for slots, quotas and connections of a few
keys. They are killed, and stopped for a while, at random moments: holders and waiters alike."""

from __future__ import annotations

import asyncio
import importlib
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from fast_litellm_shm import (
    ConcurrencyLimiter,
    PermitTimeoutError,
    Quota,
    Segment,
    SimpleConnectionPool,
)
from support import green
from support.holders import Holders
from support.waiting import PATIENCE, comes_true, wait_until

KINDS = ("threads", "tasks", "gevent", "eventlet", "threads")  # the last one is never harmed
CALLERS = 6  # of each process
STOPPED = 2.0  # seconds
ALMOST_ALL = 0.8  # of the callers wait as long as they must
#: How much there is of each: slots "a" and "b", the quota, the connections to either endpoint, and
#: those of the pool.
MOST = (2, 1, 2, 2, 2, 3)
_SERVED, _LEFT, _TIMED_OUT, _WORDS = 0, 1, 2, 3  # in the counts of a process


@dataclass
class Report:
    """What happened. served: by each process and its successors. left: callers that were not
    served, by their own short time-out. wrong: what must not be."""

    kills: int = 0
    stops: int = 0
    served: list[int] = field(default_factory=list)
    left: int = 0
    most: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


class Things:
    """All that can be waited for, in a process."""

    def __init__(self, segment: Segment) -> None:
        self.a = ConcurrencyLimiter(MOST[0], name="storm a", segment=segment)
        self.b = ConcurrencyLimiter(MOST[1], name="storm b", segment=segment)
        self.quota = Quota(rpm=10**9, max_parallel=MOST[2], name="storm quota", segment=segment)
        self.pool = SimpleConnectionPool(
            "storm", max_per_endpoint=MOST[3], max_total=MOST[5], segment=segment
        )
        self.pool.bind(lambda _: object())

    def enter(self, which: int, timeout: float) -> AbstractContextManager[Any]:
        """Wait for one, and hold it during the block. Raises PermitTimeoutError."""
        if which < 2:
            return (self.a, self.b)[which].slot("k", timeout)
        if which == 2:
            return self._admitted(self.quota.wait("k", timeout=timeout))
        return self.pool.connection(_endpoint(which), timeout=timeout)

    def enter_async(self, which: int, timeout: float) -> Any:
        """enter() for asyncio."""
        if which < 2:
            return (self.a, self.b)[which].slot_async("k", timeout)
        if which == 2:
            return self._admitted_async(timeout)
        return self.pool.connection_async(_endpoint(which), timeout=timeout)

    @staticmethod
    @contextmanager
    def _admitted(admission: Any) -> Any:
        with admission:
            if not admission:
                raise PermitTimeoutError
            yield

    def _admitted_async(self, timeout: float) -> Any:
        from contextlib import asynccontextmanager

        @asynccontextmanager
        async def admitted() -> Any:
            with self._admitted(await self.quota.wait_async("k", timeout=timeout)):
                yield

        return admitted()

    def held(self) -> list[int]:
        """How many are held of each, and how many callers wait for each. Idle connections of
        living processes are held too."""
        stats = self.pool.get_stats()
        limiters = (self.a, self.b, self.quota)
        return [
            *(each.in_flight("k") for each in limiters),
            stats["active_connections"] + stats["idle_connections"],
            *(each.queue_size("k") for each in limiters),
        ]


def _endpoint(which: int) -> str:
    return f"http://{which}.example"


class Caller:
    """One thread, task or greenlet of a worker."""

    def __init__(self, holders: Holders, counts: memoryview, over: memoryview) -> None:
        self._holders, self._counts, self._over = holders, counts, over
        self._chance = random.Random()
        self._parent = os.getppid()

    def _goes_on(self) -> bool:
        return not self._over[0] and os.getppid() == self._parent

    def _choose(self) -> tuple[int, float, float]:
        """What to wait for, how long at most, and how long to keep it."""
        chance = self._chance
        patient = chance.random() < ALMOST_ALL
        return chance.randrange(5), PATIENCE if patient else 0.05, chance.random() * 0.004

    @contextmanager
    def _holding(self, which: int) -> Any:
        with ExitStack() as stack:
            stack.enter_context(self._holders.holding(which))
            if which > 2:
                stack.enter_context(self._holders.holding(5))
            yield
        self._counts[_SERVED] += 1

    def _not_served(self, timeout: float) -> None:
        self._counts[_LEFT if timeout < PATIENCE else _TIMED_OUT] += 1

    def run(self, things: Things) -> None:
        """Until the storm is over."""
        while self._goes_on():
            which, timeout, pause = self._choose()
            try:
                with things.enter(which, timeout), self._holding(which):
                    time.sleep(pause)
            except PermitTimeoutError:
                self._not_served(timeout)

    async def run_async(self, things: Things) -> None:
        """run() for asyncio."""
        while self._goes_on():
            which, timeout, pause = self._choose()
            try:
                async with things.enter_async(which, timeout):
                    with self._holding(which):
                        await asyncio.sleep(pause)
            except PermitTimeoutError:
                self._not_served(timeout)


def work(kind: str, segment: Segment, path: str, counts: memoryview, over: memoryview) -> NoReturn:
    """A worker, until it is killed, or the storm is over."""
    library = green.patch(kind, looks=True) if kind in green.HUBS else None
    things = Things(segment)
    callers = [Caller(Holders(path), counts, over)]
    callers += [Caller(callers[0]._holders, counts, over) for _ in range(CALLERS - 1)]

    async def all_of_them() -> None:
        await asyncio.gather(*(each.run_async(things) for each in callers))

    calls: list[Callable[[], None]] = [partial(each.run, things) for each in callers]
    _run_all(library, all_of_them if kind == "tasks" else None, calls)
    things.pool.close()
    os._exit(0)


def use_once(kind: str, name: str, whiches: tuple[int, ...], seconds: float = 0.0) -> None:
    """A process that waits for some of the things at once, and keeps them for so long."""
    library = green.patch(kind, looks=True) if kind in green.HUBS else None
    things = Things(Segment(name))

    def one(which: int) -> None:
        with things.enter(which, PATIENCE):
            time.sleep(seconds)

    async def one_async(which: int) -> None:
        async with things.enter_async(which, PATIENCE):
            await asyncio.sleep(seconds)

    async def all_of_them() -> None:
        await asyncio.gather(*(one_async(which) for which in whiches))

    _run_all(library, all_of_them if kind == "tasks" else None, [partial(one, w) for w in whiches])
    things.pool.close()


def _run_all(
    library: Any, tasks: Callable[[], Any] | None, calls: list[Callable[[], None]]
) -> None:
    """In tasks, if these are given; or in greenlets of the library; or in threads."""
    if tasks is not None:
        asyncio.run(tasks())
    elif library is not None:
        green.together(library, calls)
    else:
        threads = [threading.Thread(target=call) for call in calls]
        for each in threads:
            each.start()
        for each in threads:
            each.join()


class Workers:
    """The processes, from outside."""

    def __init__(self, name: str, path: str) -> None:
        self._segment, self._path = Segment(name), path
        shared = memoryview(mmap.mmap(-1, 8 * (1 + _WORDS * len(KINDS)))).cast("Q")
        self.over, self._counts = shared[:1], shared[1:]
        self._served_before = [0] * len(KINDS)  # by the predecessors of each
        self.pids = [self._begin(number) for number in range(len(KINDS))]
        self.stopped: dict[int, float] = {}  # number: when it goes on

    def counts(self, number: int) -> memoryview:
        return self._counts[number * _WORDS : (number + 1) * _WORDS]

    def has_served(self, number: int) -> bool:
        """Since it began. Greenlets need a while for that."""
        return self.counts(number)[_SERVED] > self._served_before[number]

    def _begin(self, number: int) -> int:
        self._served_before[number] = self.counts(number)[_SERVED]
        pid = os.fork()
        if pid:
            return pid
        try:
            random.seed(os.getpid())
            work(KINDS[number], self._segment, self._path, self.counts(number), self.over)
        except BaseException as error:
            os.write(2, f"{KINDS[number]} worker: {type(error).__name__}: {error}\n".encode())
        os._exit(1)

    def kill(self, number: int, again: bool = True) -> None:
        os.kill(self.pids[number], signal.SIGKILL)
        self.ended(number, -signal.SIGKILL)
        self.stopped.pop(number, None)
        if again:
            self.pids[number] = self._begin(number)

    def ended(self, number: int, how: int) -> None:
        found = os.waitstatus_to_exitcode(os.waitpid(self.pids[number], 0)[1])
        assert found == how, f"the worker with {KINDS[number]} ended by itself: {found}"

    def stop(self, number: int) -> None:
        os.kill(self.pids[number], signal.SIGSTOP)
        self.stopped[number] = time.monotonic() + STOPPED

    def go_on(self, at_once: bool = False) -> None:
        """Those that were stopped long enough."""
        for number, until in list(self.stopped.items()):
            if at_once or time.monotonic() >= until:
                os.kill(self.pids[number], signal.SIGCONT)
                del self.stopped[number]


def storm(name: str, path: str, seconds: float, seed: int) -> Report:
    """Run it, and see that nothing is left. In a process without threads."""
    for module in ("gevent.monkey", "eventlet"):  # once, and not in each worker
        importlib.import_module(module)
    report, chance = Report(), random.Random(seed)
    counted, workers = Holders(path, holds=False), Workers(name, path)
    try:
        wait_until("all have begun", lambda: all(map(workers.has_served, range(len(KINDS)))))
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.0, 0.1))
            workers.go_on()
            number = chance.randrange(len(KINDS) - 1)
            if chance.random() < 0.7:
                if workers.has_served(number) or chance.random() < 0.1:
                    workers.kill(number)
                    report.kills += 1
            elif number not in workers.stopped and len(workers.stopped) < 2:
                workers.stop(number)
                report.stops += 1
        workers.go_on(at_once=True)
        for number in (0, 2):
            workers.kill(number, again=False)
        _end(workers, (1, 3, 4))
    except BaseException:
        for pid in workers.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        raise
    for number in range(len(KINDS)):
        served, left, late = workers.counts(number)
        report.served.append(served)
        report.left += left
        if late:
            report.wrong.append(f"{late} callers of {KINDS[number]} waited for {PATIENCE} s")
    report.most = [counted.most(which) for which in range(len(MOST))]
    _nothing_is_left(Things(Segment(name)), report.wrong)
    return report


def _end(workers: Workers, living: tuple[int, ...]) -> None:
    """They end by themselves, when each of their callers has had its turn."""
    workers.over[0] = 1
    left = set(living)

    def all_have_ended() -> bool:
        for number in list(left):
            pid, status = os.waitpid(workers.pids[number], os.WNOHANG)
            if pid:
                assert status == 0, f"the worker with {KINDS[number]} ended: {status}"
                left.discard(number)
        return not left

    wait_until(lambda: f"{[KINDS[each] for each in left]} end", all_have_ended)


def _nothing_is_left(things: Things, wrong: list[str]) -> None:
    if not comes_true(lambda: not any(things.held()), 1.0):
        wrong.append(f"a second later {things.held()} are held, or wait")
    for which in range(5):
        before = time.monotonic()
        with things.enter(which, PATIENCE):
            seconds = time.monotonic() - before
        if seconds > 1.0:
            wrong.append(f"the next caller of {which} waited for {seconds:.1f} s")
