"""A storm: workers that are killed and frozen at random moments, and begun again at once.

Each worker counts what it was admitted in memory of its own, after the call. A worker that is
killed between an admission and its count leaves it out of the count, so counts can only fall short,
by at most one for each kill: a count above the limit is an over-admission.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from dataclasses import dataclass, field
from typing import NoReturn

from fast_litellm_shm import Limit, RateLimiter, Segment, Window
from support import churn
from support.workers import now

WORKERS = 4
ROUND = 200_000_000  # ns; every round has a key of its own, which its workers exhaust
ROUND_LIMIT = 1000
HOT_N, HOT_PER = 500, 0.25  # one key for the whole storm
STALL = 30.0  # seconds: a worker that neither moves nor is stopped for so long is held up
STOPPED = 0.3  # seconds that a worker is frozen


@dataclass
class Report:
    """What happened in the storm."""

    kills: int = 0
    stops: int = 0
    elapsed_ns: int = 0
    hot: int = 0
    rounds: list[int] = field(default_factory=list)  # admitted in each round
    exhausted: list[int] = field(default_factory=list)  # in each round that also denied
    churn_keys: int = 0
    churn_most: int = 0  # admissions of one churn key
    steps: int = 0


class Counters:
    """Shared with the workers: for each, one number of steps, of hot admissions, of each round's
    admissions and of its denials; and a byte for each churn key."""

    def __init__(self, seconds: float) -> None:
        self.rounds = int(seconds * 1e9 / ROUND) + 50
        self.keys = (self.rounds * ROUND // churn.TICK) * churn.PER_TICK
        self.words = 2 + 2 * self.rounds
        self._numbers = memoryview(mmap.mmap(-1, 8 * self.words * WORKERS)).cast("Q")
        self._seen = memoryview(mmap.mmap(-1, self.keys * WORKERS))

    def of(self, worker: int) -> tuple[memoryview, memoryview]:
        """Numbers and churn bytes of one worker."""
        numbers = self._numbers[worker * self.words : (worker + 1) * self.words]
        return numbers, self._seen[worker * self.keys : (worker + 1) * self.keys]

    def steps(self) -> list[int]:
        return [self.of(worker)[0][0] for worker in range(WORKERS)]


def limiters_of(segment: Segment) -> tuple[RateLimiter, RateLimiter, RateLimiter]:
    """For the hot key (two limits, so that a kill can come between two charges), the rounds, and
    the churn."""
    hot = RateLimiter(
        Window(HOT_N, HOT_PER), Limit(HOT_N * 1000, 1), name="hot", segment=segment, on_full="raise"
    )
    rounds = RateLimiter(Window(ROUND_LIMIT, 3600), name="rounds", segment=segment, on_full="raise")
    return hot, rounds, churn.limiter_of(segment)


def work(segment: Segment, counters: Counters, worker: int, origin: int, parent: int) -> NoReturn:
    """Until killed. Every other worker opens the segment again, as a new process would."""
    numbers, seen = counters.of(worker)
    if random.random() < 0.5:
        segment = Segment(segment.name)
    hot, rounds, churned = limiters_of(segment)
    i = os.getpid()
    while os.getppid() == parent:
        i += 1
        number = (now() - origin) // ROUND
        admitted = rounds.is_allowed(f"round-{number}")
        if number < counters.rounds:
            numbers[2 + number + (0 if admitted else counters.rounds)] += 1
        if hot.acquire("hot"):
            numbers[1] += 1
        key, counts = churn.step(churned, origin, i)
        if counts and key < counters.keys:
            seen[key] += 1
        numbers[0] += 1
    os._exit(0)


class Herd:
    """The workers, from outside."""

    def __init__(self, segment: Segment, counters: Counters, origin: int) -> None:
        self._given = (segment, counters, origin, os.getpid())
        self.pids = [self._begin(worker) for worker in range(WORKERS)]
        self.stopped: dict[int, float] = {}  # worker: when it goes on
        self._moved = [(0, time.monotonic())] * WORKERS

    def _begin(self, worker: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            random.seed(os.getpid())
            segment, counters, origin, parent = self._given
            work(segment, counters, worker, origin, parent)
        except BaseException as error:
            os.write(2, f"storm worker: {type(error).__name__}: {error}\n".encode())
        os._exit(1)

    def kill(self, worker: int, *, again: bool = True) -> None:
        os.kill(self.pids[worker], signal.SIGKILL)
        _, status = os.waitpid(self.pids[worker], 0)
        died = os.waitstatus_to_exitcode(status)
        assert died == -signal.SIGKILL, f"a worker died by itself: {died}"
        self.stopped.pop(worker, None)
        if again:
            self.pids[worker] = self._begin(worker)
            self._moved[worker] = (self._moved[worker][0], time.monotonic())

    def stop(self, worker: int) -> None:
        os.kill(self.pids[worker], signal.SIGSTOP)
        self.stopped[worker] = time.monotonic() + STOPPED

    def watch(self, steps: list[int]) -> None:
        """Let those go on that were frozen long enough; fail where a free one does not move."""
        for worker, until in list(self.stopped.items()):
            if time.monotonic() >= until:
                os.kill(self.pids[worker], signal.SIGCONT)
                del self.stopped[worker]
                self._moved[worker] = (steps[worker], time.monotonic())
        for worker, count in enumerate(steps):
            before, when = self._moved[worker]
            if count != before or worker in self.stopped:
                self._moved[worker] = (count, time.monotonic())
            elif time.monotonic() - when > STALL:
                raise AssertionError(f"worker {worker} was held up for {STALL} s")


def storm(name: str, seconds: float, seed: int) -> Report:
    """Run it. The last worker is never killed nor frozen: a survivor."""
    segment, counters, report = Segment(name), Counters(seconds), Report()
    chance, origin = random.Random(seed), now()
    limiters_of(segment)
    herd = Herd(segment, counters, origin)
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.0, 0.02))
            herd.watch(counters.steps())
            worker = chance.randrange(WORKERS - 1)
            if chance.random() < 0.8:
                herd.kill(worker)
                report.kills += 1
            elif worker not in herd.stopped and len(herd.stopped) < WORKERS - 2:
                herd.stop(worker)
                report.stops += 1
    finally:
        for worker in range(WORKERS):
            herd.kill(worker, again=False)
    report.elapsed_ns = now() - origin
    for worker in range(WORKERS):
        numbers, seen = counters.of(worker)
        report.steps += numbers[0]
        report.hot += numbers[1]
    for i in range(counters.rounds):
        admitted = sum(counters.of(worker)[0][2 + i] for worker in range(WORKERS))
        denied = sum(counters.of(worker)[0][2 + counters.rounds + i] for worker in range(WORKERS))
        report.rounds.append(admitted)
        if denied:
            report.exhausted.append(admitted)
    seen_by = [bytes(counters.of(worker)[1]) for worker in range(WORKERS)]
    by_key = [sum(of_key) for of_key in zip(*seen_by, strict=True)]
    report.churn_keys = sum(1 for count in by_key if count)
    report.churn_most = max(by_key)
    return report
