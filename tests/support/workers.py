"""What child processes run. Importable, so that spawned ones find it."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from fast_litellm_shm import Limit, RateLimiter, Segment, Window
from support.waiting import wait_until


def meet(name: str, parties: int) -> None:
    """Wait until this many processes are here, so that they contend from the first call. They meet
    in the segment under test, by a key that nobody else uses."""
    place = RateLimiter(Window(1_000_000, 3600), name="meeting", segment=Segment(name))
    place.acquire("here")
    wait_until(
        "the other processes come",
        lambda: 1_000_000 - place.peek("here", cost=0).remaining >= parties,
        every=0.001,
    )


def attempt(name: str, limits: tuple[Any, ...], key: str, attempts: int, parties: int) -> int:
    """How many of so many attempts were admitted."""
    meet(name, parties)
    limiter = RateLimiter(*limits, name="exact", segment=Segment(name))
    return sum(limiter.is_allowed(key) for _ in range(attempts))


def attempt_in_threads(
    name: str, limits: tuple[Any, ...], key: str, attempts: int, parties: int, threads: int
) -> int:
    """The same, spread over threads."""
    meet(name, parties)
    limiter = RateLimiter(*limits, name="exact", segment=Segment(name))
    counts = [0] * threads

    def body(i: int) -> None:
        counts[i] = sum(bool(limiter.acquire(key)) for _ in range(attempts // threads))

    running = [threading.Thread(target=body, args=(i,)) for i in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts)


def now() -> int:
    """The library's clock."""
    return time.clock_gettime_ns(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def admitted_times(
    name: str, limits: tuple[Any, ...], keys: list[str], seconds: float, parties: int, on_full: str
) -> list[tuple[str, int, int]]:
    """Hammer the keys; for each admission: key, time before the call, time after it."""
    meet(name, parties)
    limiter = RateLimiter(*limits, name="times", segment=Segment(name), on_full=on_full)
    out: list[tuple[str, int, int]] = []
    end = now() + int(seconds * 1e9)
    i = os.getpid()  # not all at the same key at once
    while True:
        i += 1
        key = keys[i % len(keys)]
        before = now()
        if before > end:
            return out
        if limiter.acquire(key):
            out.append((key, before, now()))


def set_limits(name: str, limiter: str, limits: tuple[Any, ...]) -> None:
    """Change a limiter's limits."""
    RateLimiter(*limits, name=limiter, segment=Segment(name))


def keep_changing(
    name: str, limiter: str, choices: list[tuple[Any, ...]], seconds: float, parties: int
) -> int:
    """Set one of these limits after the other, about a thousand times a second. How many times."""
    segment, changes = Segment(name), 0
    meet(name, parties)
    end = now() + int(seconds * 1e9)
    while now() < end:
        RateLimiter(
            *choices[(changes * 7 + os.getpid()) % len(choices)], name=limiter, segment=segment
        )
        changes += 1
        time.sleep(0.0005)
    return changes


def block_for(name: str, limiter: str, key: str, seconds: float, parties: int) -> None:
    """Block a key, all at once."""
    blocking = RateLimiter(Limit(10, 60), name=limiter, segment=Segment(name))
    meet(name, parties)
    blocking.block(key, seconds)


def acquire_with(limiter: RateLimiter, key: str, cost: int) -> tuple[bool, int, str, Any]:
    """Use a limiter that came by pickle."""
    decision = limiter.acquire(key, cost=cost)
    return decision.allowed, decision.remaining, limiter.name, limiter.limits
