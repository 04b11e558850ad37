"""Processes that hold permits, and how to end them."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import psutil

from fast_litellm_shm import ConcurrencyLimiter, Segment
from support.waiting import PATIENCE, wait_until

Span = tuple[int, int]  # CLOCK_MONOTONIC: after it was admitted, before it was released


def most_at_once(spans: Iterable[Span]) -> int:
    """How many spans overlapped at the worst instant. A span lies within the time that the permit
    was held, so more of them than the limit at one instant is an over-admission for certain."""
    events = sorted(event for start, end in spans for event in ((start, 1), (end, -1)))
    most = now = 0
    for _, change in events:  # at equal times the ends sort first
        now += change
        most = max(most, now)
    return most


def wait_until_asleep(pid: int) -> None:
    """Until the process sleeps in the kernel, as one does that waits for a permit."""
    seen = 0

    def sleeps() -> bool:
        nonlocal seen
        asleep = psutil.Process(pid).status() == psutil.STATUS_SLEEPING
        seen = seen + 1 if asleep else 0
        return seen == 5  # it may sleep for a moment elsewhere

    wait_until(f"process {pid} sleeps", sleeps, every=0.01)


def stop(pid: int) -> None:
    """Stop a child of this process. The signal alone says little: until the thread that gets it
    runs, the others go on, and may take what is released meanwhile."""
    os.kill(pid, signal.SIGSTOP)
    _, status = os.waitpid(pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status), f"process {pid} has ended instead: {status}"


def wait_until_dead(pid: int) -> None:
    """Until the kernel has ended it, which may take a busy machine a while after the signal. What
    it holds it holds until then. Whether somebody has reaped it does not matter."""

    def is_dead() -> bool:
        try:
            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    wait_until(f"process {pid} is dead", is_dead, every=0.001)


class Holder:
    """A forked child that takes ``count`` permits of the key and keeps them until it is ended."""

    def __init__(self, name: str, most: int, key: str, count: int) -> None:
        context = multiprocessing.get_context("fork")
        self._mine, theirs = context.Pipe()
        self._process = context.Process(
            target=_hold, args=(theirs, name, most, key, count), daemon=True
        )
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.held = self.ask("held")

    def ask(self, order: str) -> Any:
        """Give the child an order; its answer."""
        self._mine.send(order)
        if not self._mine.poll(PATIENCE):
            raise AssertionError(f"the holder did not answer {order!r}")
        return self._mine.recv()

    def order(self, order: str) -> None:
        """An order that ends the child, so that no answer comes."""
        self._mine.send(order)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def join(self) -> int | None:
        """Its exit code, or minus the signal that ended it."""
        self._process.join(PATIENCE)
        return self._process.exitcode

    def __enter__(self) -> Holder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._mine.close()


def _hold(orders: Connection, name: str, most: int, key: str, count: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # pytest's: dying is what the child is for
    limiter = ConcurrencyLimiter(most, name="held", segment=Segment(name))
    permits = [limiter.acquire(key) for _ in range(count)]
    while True:
        order = orders.recv()
        if order == "held":
            orders.send(sum(map(bool, permits)))
        elif order == "release":
            orders.send(sum(permit.release() for permit in permits))
        elif order == "take":
            permits.append(limiter.acquire(key))
            orders.send(bool(permits[-1]))
        elif order == "segv":
            ctypes.string_at(0)
        elif order == "os._exit":
            os._exit(7)
        elif order == "abort":
            os.abort()


def kill_at_random(name: str, kills: int, seed: int) -> tuple[int, list[str]]:
    """Children that take, release, wait and look as fast as they can, all on one key; each is
    killed at a random moment. After each batch nothing is held but what the survivor holds, and
    that is what the count says. Returns kills done and what was wrong."""
    most, batch = 12, 4
    limiter = ConcurrencyLimiter(most, name="storm", segment=Segment(name))
    chance, done = random.Random(seed), 0
    kept: list[Any] = []
    wrong: list[str] = []
    while done < kills and not wrong:
        wanted = chance.randrange(most // 2)
        while len(kept) > wanted:
            kept.pop().release()
        kept += [limiter.acquire("k") for _ in range(wanted - len(kept))]
        if not all(kept):
            wrong.append(f"after {done} kills: denied with {len(kept)} of {most} held")
        pids = [_hammer(limiter, chance.random()) for _ in range(batch)]
        for pid in pids:
            time.sleep(chance.random() ** 2 * 0.004)
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if died != -signal.SIGKILL:
                wrong.append(f"after {done} kills: a child ended by itself: {died}")
        done += batch
        found = limiter.in_flight("k")
        if found != len(kept):
            wrong.append(f"after {done} kills: {len(kept)} held, in_flight says {found}")
    kept += [limiter.acquire("k") for _ in range(most - len(kept))]
    if not all(kept) or limiter.acquire("k"):
        wrong.append(f"at the end not exactly {most} could be taken")
    for permit in kept:
        permit.release()
    return done, wrong


def _hammer(limiter: ConcurrencyLimiter, seed: float) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        chance = random.Random(seed)
        while True:
            permits = [limiter.acquire("k") for _ in range(chance.randrange(1, 5))]
            with limiter.slot("k", timeout=PATIENCE):
                limiter.in_flight("k")
                for permit in permits:
                    permit.release()
    except BaseException as error:
        os.write(2, f"hammer: {type(error).__name__}: {error}\n".encode())
    os._exit(1)
