"""What does the import of a rate limiter add to the start of Python?

A new interpreter for each value, in turn with one that imports nothing. The difference is of the
same round.
"""

from __future__ import annotations

import subprocess
import sys
import time

from bench.result import Ratio, Result, Row, Settings, Values, asked

GOAL = 40.0  # ms beyond Python's own start
PROGRAMS = {
    "Python alone": "pass",
    "ours": "from fast_litellm_shm import RateLimiter, Window",
}


def _started(program: str) -> float:
    """Milliseconds."""
    start = time.perf_counter_ns()
    subprocess.run([sys.executable, "-c", program], check=True)
    return (time.perf_counter_ns() - start) / 1e6


def run(settings: Settings) -> Result:
    """Measure, after one start of each that fills the caches."""
    result = asked(__doc__)
    took: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for program in PROGRAMS.values():
        _started(program)
    for _ in range(settings.pick(max(settings.rounds, 15), 5)):
        for name, program in PROGRAMS.items():
            took[name].append(_started(program))
    for name, values in took.items():
        result.rows.append(Row(name, "ms", Values(values), group="start"))
    more = Values(a - b for a, b in zip(took["ours"], took["Python alone"], strict=True))
    result.ratios.append(Ratio("ours - Python alone", more, GOAL, False, "ms"))
    return result
