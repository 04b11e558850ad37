"""Keys that come and go: a few new ones every tick, used by all processes at once, then never
again.

A key's window outlasts its tick, so within ``WINDOW`` of the tick's beginning it admits once. What
a process admits later than that (it was descheduled, or stopped) is not counted: the window may be
over.
"""

from __future__ import annotations

import os
from typing import Any

from fast_litellm_shm import RateLimiter, Segment, Window
from support.workers import meet, now

TICK, WINDOW = 10_000_000, 50_000_000  # ns
PER_TICK = 30
LIVE = PER_TICK * (WINDOW // TICK + 2)  # the most keys that are live at once


def limiter_of(segment: Segment) -> RateLimiter:
    """Its limiter: refusing a key for want of room is an error here."""
    return RateLimiter(Window(1, WINDOW / 1e9), name="churn", segment=segment, on_full="raise")


def step(limiter: RateLimiter, origin: int, i: int) -> tuple[int, bool]:
    """One attempt at one of the present tick's keys: its number, and whether it counts."""
    tick = (now() - origin) // TICK
    number = tick * PER_TICK + i % PER_TICK
    admitted = limiter.is_allowed(f"churn-{number}")
    return number, admitted and now() < origin + tick * TICK + WINDOW


def churn(name: str, origin: int, seconds: float, parties: int) -> tuple[list[int], int]:
    """Numbers of the keys that this process was admitted to, and how often it was refused."""
    meet(name, parties)
    segment = Segment(name)
    limiter, out, i = limiter_of(segment), [], os.getpid()
    end = now() + int(seconds * 1e9)
    while now() < end:
        i += 1
        number, counts = step(limiter, origin, i)
        if counts:
            out.append(number)
    mine: list[dict[str, Any]] = [p for p in segment.processes() if p["pid"] == os.getpid()]
    return out, mine[0]["refused_full"]
