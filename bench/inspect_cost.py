"""How long does ``fast-shm inspect`` take where 2 million keys are?

The whole command, from its start to its end, in an interpreter of its own; beside it, what it
takes to print its help.
"""

from __future__ import annotations

import subprocess
import sys
import time

from bench import peers
from bench.result import OURS, Ratio, Result, Row, Settings, Values, asked
from fast_litellm_shm import RateLimiter

KEYS = 2_000_000
GOAL = 0.5  # seconds


def _took(*arguments: str) -> float:
    """Seconds."""
    start = time.perf_counter_ns()
    command = [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return (time.perf_counter_ns() - start) / 1e9


def run(settings: Settings) -> Result:
    """Measure, after one call of each that fills the caches."""
    result, keys = asked(__doc__), settings.pick(KEYS, KEYS // 10)
    with peers.Place(capacity=keys) as place:
        limiter = RateLimiter("1000/day", name="api", segment=place.segment())
        for i in range(keys):
            limiter.is_allowed(f"user-{i}")
        asks = {f"{keys:,} keys": ("--name", place.segment_name), "its help": ("--help",)}
        took: dict[str, list[float]] = {what: [] for what in asks}
        for arguments in asks.values():
            _took(*arguments)
        for _ in range(settings.pick(max(settings.rounds // 2, 3), 2)):
            for what, arguments in asks.items():
                took[what].append(_took(*arguments))
    for what, values in took.items():
        result.rows.append(Row(what, "s", Values(values), OURS, "inspect"))
    found = Values(took[f"{keys:,} keys"])
    promise = "fast-shm inspect of 2 million keys"
    least = Values(took["its help"]).median
    why = f"its help alone takes {least:.2f} s, and numpy and rich are imported after that"
    result.ratios.append(
        Ratio(f"inspect of {keys:,} keys", found, GOAL, False, "s", promise=promise, why=why)
    )
    return result
