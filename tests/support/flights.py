"""Hosts of a cluster whose workers hold permits, each as many as it is told to, and note when."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from fast_litellm_shm import ConcurrencyLimiter, Segment
from fast_litellm_shm.cluster import Cluster
from support.names import remove, unique_name
from support.permits import Span, most_at_once
from support.waiting import PATIENCE, wait_until

_context = multiprocessing.get_context("fork")
_LOOK = 0.001  # seconds
_NOTES = 30_000  # permits of a worker that are noted


class Flights:
    """``hosts`` segments with ``workers`` processes each. cluster: one for each host, where they
    differ. turns: seconds that a worker holds a permit before it takes another one; None: for
    good."""

    def __init__(
        self,
        cluster: Cluster | str | Sequence[Cluster | str],
        most: int,
        hosts: int = 4,
        workers: int = 2,
        turns: float | None = 0.02,
    ) -> None:
        several = not isinstance(cluster, (Cluster, str))
        self._clusters: list[Any] = list(cluster) if several else [cluster] * hosts  # type: ignore[arg-type]
        self._most, self._workers, self._turns = most, workers, turns
        self.names = [unique_name(f"host{i}") for i in range(hosts)]
        count = hosts * workers
        self._wanted: Any = _context.Array(ctypes.c_int64, count, lock=False)
        self.held: Any = _context.Array(ctypes.c_int64, count, lock=False)
        self.asked: Any = _context.Array(ctypes.c_int64, count, lock=False)
        self._notes: Any = _context.Array(ctypes.c_int64, 2 * _NOTES * count, lock=False)
        self._noted: Any = _context.Array(ctypes.c_int64, count, lock=False)
        self._ready: Any = _context.Array(ctypes.c_int64, count, lock=False)
        self._stop: Any = _context.Value(ctypes.c_int64, 0, lock=False)
        self._killed: dict[int, int] = {}
        self.processes: list[Any] = []

    def __enter__(self) -> Flights:
        for i in range(len(self.names) * self._workers):
            process = _context.Process(target=self._work, args=(i,), daemon=True)
            process.start()
            self.processes.append(process)
        self.until(lambda: all(self._ready), "all workers have started")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.value = 1
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
        segment = Segment(self.names[host], capacity=2000)
        limiter = ConcurrencyLimiter(
            self._most, name="flights", segment=segment, cluster=self._clusters[host]
        )
        held: deque[tuple[Any, int, int]] = deque()  # permit, its note, when it is given back

        def release() -> None:
            permit, note, _ = held.popleft()
            self.held[i] -= 1
            if note < _NOTES:
                self._notes[2 * (i * _NOTES + note) + 1] = time.monotonic_ns()
            permit.release()

        self._ready[i] = 1
        while not self._stop.value:
            now = time.monotonic_ns()
            while held and (len(held) > self._wanted[i] or held[0][2] < now):
                release()
            if len(held) < self._wanted[i]:
                permit = limiter.acquire("key")
                self.asked[i] += 1
                if permit:
                    note = self._noted[i]
                    now = time.monotonic_ns()
                    if note < _NOTES:
                        self._notes[2 * (i * _NOTES + note)] = now
                    self._noted[i] = note + 1
                    turn = 2**60 if self._turns is None else round(self._turns * 1e9)
                    held.append((permit, note, now + turn))
                    self.held[i] += 1
                    continue
            time.sleep(_LOOK)
        while held:
            release()

    # what to do, and what came of it

    def want(self, *count: int) -> None:
        """So many permits, for each worker; of one number: for all."""
        for i in range(len(self.processes)):
            self._wanted[i] = count[i] if len(count) > 1 else count[0]

    @property
    def total(self) -> int:
        """Held now by those who live: each of them at an instant of its own."""
        living = [i for i in range(len(self.processes)) if i not in self._killed]
        return sum(self.held[i] for i in living)

    def most(self) -> int:
        """How many were held at the worst instant."""
        spans: list[Span] = []
        for i in range(len(self.processes)):
            assert self._noted[i] < _NOTES, "more were taken than can be noted"
            for note in range(self._noted[i]):
                start, end = self._notes[2 * (i * _NOTES + note) : 2 * (i * _NOTES + note) + 2]
                spans.append((start, end or self._killed.get(i, 2**62)))
        return most_at_once(spans)

    def until(self, reached: Callable[[], bool], what: str) -> None:
        wait_until(lambda: f"{what}; {list(self.held)}", reached, every=_LOOK)

    def go_on(self, asked: int = 200) -> None:
        """Until each worker that lives and wants more has asked as often again."""
        goal = {i: self.asked[i] + asked for i in range(len(self.processes))}
        self.until(
            lambda: all(
                self.asked[i] >= goal[i] or i in self._killed or self.held[i] >= self._wanted[i]
                for i in goal
            ),
            "more attempts",
        )

    def kill(self, i: int, number: int = signal.SIGKILL) -> None:
        if number == signal.SIGKILL:
            self._killed[i] = time.monotonic_ns()
        os.kill(self.processes[i].pid, number)
        if number == signal.SIGKILL:
            self.processes[i].join(PATIENCE)
