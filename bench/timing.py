"""Interleaved timing: every contender in turn, many rounds, medians. The machine is noisy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timed:
    """Nanoseconds a call: median over rounds, and the spread (10th to 90th percentile)."""

    name: str
    median: float
    low: float
    high: float


def interleaved(
    contenders: dict[str, Callable[[int], object]], *, calls: int, rounds: int
) -> list[Timed]:
    """Time each contender's ``loop(calls)`` once in each round, in turn."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for loop in contenders.values():
        loop(min(calls, 1000))
    for _ in range(rounds):
        for name, loop in contenders.items():
            start = time.perf_counter_ns()
            loop(calls)
            took[name].append((time.perf_counter_ns() - start) / calls)
    out = []
    for name, values in took.items():
        tenths = statistics.quantiles(values, n=10)
        out.append(Timed(name, statistics.median(values), tenths[0], tenths[-1]))
    return out


def loop_of(call: Callable[[str], object], keys: list[str]) -> Callable[[int], None]:
    """A loop that calls ``call(key)`` over the keys, and does as little else as Python can."""

    def loop(calls: int) -> None:
        whole, rest = divmod(calls, len(keys))
        for _ in range(whole):
            for key in keys:
                call(key)
        for key in keys[:rest]:
            call(key)

    return loop
