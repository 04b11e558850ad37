"""What bench/threads.py runs on a Python without the GIL: JSON, checks a second of 1 to 8 threads.

python -m bench.no_gil SECONDS ROUNDS: of each round, all cells in turn.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from itertools import repeat
from typing import Any

from fast_litellm_shm import RateLimiter, Segment, TokenBucket

COUNTS = (1, 2, 4, 8)
AT_ONCE = 100  # calls between two looks at the clock
PATIENCE = 60.0
Call = Callable[[str], Any]


def for_a_time(call: Call, key: str, end: float) -> int:
    """Ask until then; how often it was admitted."""
    admitted = 0
    while time.perf_counter() < end:
        for each in repeat(key, AT_ONCE):
            if call(each):
                admitted += 1
    return admitted


def rate(calls: list[Call], keys: list[str], seconds: float) -> float:
    """Admitted a second, by a thread for each call, all at once."""
    start, admitted = threading.Barrier(len(calls) + 1), []

    def body(call: Call, key: str) -> None:
        start.wait(PATIENCE)
        admitted.append(for_a_time(call, key, time.perf_counter() + seconds))

    threads = [threading.Thread(target=body, args=pair) for pair in zip(calls, keys, strict=True)]
    for thread in threads:
        thread.start()
    start.wait(PATIENCE)
    begun = time.perf_counter()
    for thread in threads:
        thread.join(PATIENCE)
    return sum(admitted) / (time.perf_counter() - begun)


def patterns(limiter: RateLimiter) -> dict[str, Callable[[int], tuple[list[Call], list[str]]]]:
    """By name: the call and the key of each of so many threads. A key is a str of its thread, and
    so is the bound method, where it is not said otherwise."""
    shared = limiter.is_allowed

    def own(count: int) -> list[str]:
        return [f"user {i}" for i in range(count)]

    return {
        "is_allowed, one key": lambda n: ([limiter.is_allowed for _ in range(n)], ["hot"] * n),
        "is_allowed, own keys": lambda n: ([limiter.is_allowed for _ in range(n)], own(n)),
        "is_allowed, own keys, one bound method": lambda n: ([shared] * n, own(n)),
        "acquire, own keys": lambda n: ([limiter.acquire for _ in range(n)], own(n)),
    }


def main() -> None:
    """Measure, and print."""
    seconds, rounds = float(sys.argv[1]), int(sys.argv[2])
    assert not vars(sys)["_is_gil_enabled"](), "the GIL is on: PYTHON_GIL=0"
    name = f"bench-no-gil-{os.getpid()}"
    segment = Segment(name)
    try:
        limiter = RateLimiter(TokenBucket(10**9, per=1), name="x", segment=segment)
        made = patterns(limiter)
        cells = [(pattern, count) for pattern in made for count in COUNTS]
        found: dict[str, dict[int, list[float]]] = {p: {n: [] for n in COUNTS} for p in made}
        for _ in range(rounds):
            for pattern, count in random.sample(cells, len(cells)):
                found[pattern][count].append(rate(*made[pattern](count), seconds))
    finally:
        segment.remove()
    json.dump({"python": sys.version.split()[0], "rates": found}, sys.stdout)


if __name__ == "__main__":
    main()
