"""Hosts of a cluster, each a segment of its own with real worker processes."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from fast_litellm_shm import RateLimiter, Segment
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.limits import LimitSpec
from support.names import remove, unique_name
from support.waiting import PATIENCE, wait_until

_context = multiprocessing.get_context("fork")
_WAIT, _GO, _STOP = 0, 1, 2
_LOOK = 0.001  # seconds
_TIMES = 20_000  # admissions whose times a worker can note


class Fleet:
    """``hosts`` segments, with ``workers`` processes each, that ask for one key as they can.

    cluster: one for each host, where they differ. pause: seconds between two calls of a worker.
    attempts: how often a worker of each host asks before it only waits; None: until the end.
    times: note when each admission was: ``times()``.
    enter: for each host, what its workers call before anything else.
    """

    def __init__(
        self,
        cluster: Cluster | str | Sequence[Cluster],
        limits: Sequence[LimitSpec],
        hosts: int = 4,
        workers: int = 2,
        attempts: Sequence[int | None] | None = None,
        cost: int = 1,
        times: bool = False,
        pause: float = 0.0,
        enter: Sequence[Callable[[], None]] | None = None,
    ) -> None:
        self._clusters: list[Cluster | str]
        if isinstance(cluster, (Cluster, str)):
            self._clusters = [cluster] * hosts
        else:
            self._clusters = list(cluster)
        self._limits, self._cost, self._times, self._enter = limits, cost, times, enter
        self.names = [unique_name(f"host{i}") for i in range(hosts)]
        self._attempts = attempts or [None] * hosts
        self._workers = workers
        self.admitted: Any = _context.Array(ctypes.c_int64, hosts * workers, lock=False)
        self.asked: Any = _context.Array(ctypes.c_int64, hosts * workers, lock=False)
        size = 2 * _TIMES * hosts * workers if times else 1
        self._noted: Any = _context.Array(ctypes.c_int64, size, lock=False)
        # Plain words: a killed worker would leave a multiprocessing.Event locked.
        self._ready: Any = _context.Array(ctypes.c_int64, hosts * workers, lock=False)
        self._state: Any = _context.Value(ctypes.c_int64, _WAIT, lock=False)
        self._pause: Any = _context.Value(ctypes.c_double, pause, lock=False)
        self.processes: list[Any] = []

    def __enter__(self) -> Fleet:
        for i in range(len(self.names) * self._workers):
            process = _context.Process(target=self._work, args=(i,), daemon=True)
            process.start()
            self.processes.append(process)
        self.until(lambda: all(self._ready), "all workers have started")
        self._state.value = _GO
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._state.value = _STOP
        for process in self.processes:
            if process.pid and process.exitcode is None:
                os.kill(process.pid, signal.SIGCONT)
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        for name in self.names:
            remove(name)

    def _work(self, i: int) -> None:
        host = i // self._workers
        if self._enter is not None:
            self._enter[host]()
        segment = Segment(self.names[host], capacity=1000)
        limiter = RateLimiter(
            *self._limits, name="fleet", segment=segment, cluster=self._clusters[host]
        )
        attempts, asked, noted = self._attempts[host], 0, 0
        self._ready[i] = 1
        while self._state.value == _WAIT:
            time.sleep(_LOOK)
        while self._state.value == _GO:
            if attempts is not None and asked >= attempts:
                time.sleep(_LOOK)  # it lives, and asks no more
                continue
            if self._pause.value:
                time.sleep(self._pause.value)
            before = time.monotonic_ns()
            if limiter.acquire("key", self._cost):
                self.admitted[i] += 1
                if self._times and noted < _TIMES:
                    at = 2 * (i * _TIMES + noted)
                    self._noted[at], self._noted[at + 1] = before, time.monotonic_ns()
                    noted += 1
            asked += 1
            self.asked[i] = asked

    # what came of it

    def pause(self, seconds: float) -> None:
        """From now on, between two calls of a worker."""
        self._pause.value = seconds

    @property
    def total(self) -> int:
        return sum(self.admitted)

    def times(self) -> list[tuple[int, int]]:
        """Before and after each admission."""
        found = []
        for i in range(len(self.processes)):
            for k in range(min(self.admitted[i], _TIMES)):
                at = 2 * (i * _TIMES + k)
                found.append((self._noted[at], self._noted[at + 1]))
        return found

    def until(self, reached: Callable[[], bool], what: str) -> None:
        wait_until(lambda: f"{what}; {list(self.admitted)}", reached, every=_LOOK)

    def go_on(self, attempts: int = 20_000) -> None:
        """Until each worker that still asks has asked as often again."""
        asking = [i for i, process in enumerate(self.processes) if process.is_alive()]
        asking = [i for i in asking if self._attempts[i // self._workers] is None]
        goal = {i: self.asked[i] + attempts for i in asking}
        self.until(lambda: all(self.asked[i] >= goal[i] for i in asking), "more attempts")

    def kill(self, i: int, number: int = signal.SIGKILL) -> None:
        os.kill(self.processes[i].pid, number)
        if number == signal.SIGKILL:
            self.processes[i].join(PATIENCE)
