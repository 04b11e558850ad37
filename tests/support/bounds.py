"""Judge a limit from outside, by the times around each admitted call.

The library decides at some instant between the time read before the call and the time read after
it. So a set of admissions certainly lies within [earliest before, latest after], and only that
interval is held against the limit: were the later's before-time and the earlier's after-time used,
a process that was descheduled between the two clocks would look like a fault of the limiter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy

Times = list[tuple[int, int]]  # (before, after) of each admission, ns


def worst_excess(times: Times, allowed: Callable[[numpy.ndarray], numpy.ndarray]) -> int:
    """The most by which any interval holds more admissions, for certain, than ``allowed`` of its
    length in ns. 0 or less: the bound was kept."""
    table = numpy.array(sorted(times), dtype=numpy.int64).reshape(-1, 2)
    before, after = table[:, 0], table[:, 1]
    worst = -(2**62)
    for i, start in enumerate(before):
        ends = numpy.sort(after[i:])  # those that began no earlier than start
        counts = numpy.arange(1, ends.size + 1)
        worst = max(worst, int((counts - allowed(ends - start)).max()))
    return worst


def bucket(n: int, per: float, burst: int) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """burst + rate * t"""
    return lambda ns: numpy.floor(burst + ns * (n / (per * 1e9)))


def strict(n: int, per: float) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """n in any interval of length per; nothing is said of longer ones but what follows from it."""
    return lambda ns: n * numpy.maximum(numpy.ceil(ns / (per * 1e9)), 1)


def sliding_counter(times: Times, n: int, per: float, origin: int) -> int:
    """Excess over n by the counter's own rule: of one window with the part of the one before that
    is still inside. origin: when the segment's time was 0; 0.1 ms of uncertainty is left out."""
    length = round(per * 1e9)
    table = numpy.array(sorted(times), dtype=numpy.int64).reshape(-1, 2) - origin
    window = table[:, 0] // length
    sure = window == table[:, 1] // length
    worst = -float(n)
    for k in numpy.unique(window[sure]):
        before, after = table[sure & (window == k)].T
        earlier = numpy.searchsorted(numpy.sort(after), before, side="right")
        left = numpy.maximum(length - after % length - 100_000, 0) / length
        previous = numpy.count_nonzero(sure & (window == k - 1))
        worst = max(worst, (earlier + 1 + previous * left - n).max())
    return math.ceil(worst)


def windows(times: Times, n: int, per: float) -> int:
    """Excess over n for each window that can have begun since the first admission: a window lasts
    at least per, and the first begins with it."""
    start = min(before for before, _ in times)
    ends = numpy.sort(numpy.array([after for _, after in times]))
    most = n * (numpy.floor((ends - start) / (per * 1e9)) + 1)
    return int((numpy.arange(1, ends.size + 1) - most).max())
