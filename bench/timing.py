"""Interleaved timing: every contender in turn, many rounds. The machine is noisy."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.result import Settings, Values

Loop = Callable[[int], object]

SLICE_NS, QUICK_SLICE_NS = 4_000_000, 1_000_000  # a contender's turn: far above the clock's cost


def calls_in(loop: Loop, slice_ns: int) -> int:
    """How many calls fill a slice, by the quicker of two tries: the first may be held up by what
    is done once. Warms up as it tries."""
    calls = 1
    while True:
        took = slice_ns
        for _ in range(2):
            start = time.perf_counter_ns()
            loop(calls)
            took = min(took, time.perf_counter_ns() - start)
        if took >= slice_ns / 4:
            return max(1, round(calls * slice_ns / took))
        calls *= 4


def interleaved(contenders: dict[str, Loop], settings: Settings) -> dict[str, Values]:
    """Nanoseconds a call, by contender: each ``loop(calls)`` once in each round, in an order of
    the round's own, with as many calls as fill its turn."""
    slice_ns = settings.pick(SLICE_NS, QUICK_SLICE_NS)
    calls = {name: calls_in(loop, slice_ns) for name, loop in contenders.items()}
    took: dict[str, list[float]] = {name: [] for name in contenders}
    rng = random.Random(5)
    for _ in range(settings.rounds):
        for name in rng.sample(list(contenders), len(contenders)):
            loop, count = contenders[name], calls[name]
            start = time.perf_counter_ns()
            loop(count)
            took[name].append((time.perf_counter_ns() - start) / count)
    return {name: Values(values) for name, values in took.items()}


def loop_of(call: Callable[[Any], object], keys: Sequence[Any]) -> Loop:
    """A loop that calls ``call(key)`` over the keys, and does as little else as Python can."""

    def loop(calls: int) -> None:
        whole, rest = divmod(calls, len(keys))
        for _ in range(whole):
            for key in keys:
                call(key)
        for key in keys[:rest]:
            call(key)

    return loop
