"""What do a pool's get and return cost together, and a permit's acquire and release?

fast-litellm's pool hands the same id out twice and ignores its limit while connections are out;
ours counts over all processes. All in one process, interleaved.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

from bench.timing import Timed, interleaved
from fast_litellm_shm import ConcurrencyLimiter, Segment, SimpleConnectionPool

TARGET = 1.5
ENDPOINT = "https://api.example.com"


def _pairs(get: Callable[[str], Any], give_back: Callable[[Any], Any]) -> Callable[[int], None]:
    def loop(calls: int) -> None:
        for _ in range(calls):
            give_back(get(ENDPOINT))

    return loop


def _permits(acquire: Callable[[str], Any]) -> Callable[[int], None]:
    def loop(calls: int) -> None:
        for _ in range(calls):
            acquire(ENDPOINT).release()

    return loop


def run(*, calls: int = 20_000, rounds: int = 41) -> dict[str, Any]:
    """Measure; returns rows and the ratio to fast-litellm's, None where that is not installed."""
    segment = Segment(f"bench-{os.getpid()}")
    try:
        pool = SimpleConnectionPool(segment=segment)
        limiter = ConcurrencyLimiter(10, name="bench", segment=segment)
        contenders: dict[str, Callable[[int], object]] = {
            "ours pool get + return": _pairs(pool.get_connection, pool.return_connection),
            "ours permit acquire + release": _permits(limiter.acquire),
        }
        try:
            os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
            peer = importlib.import_module("fast_litellm").SimpleConnectionPool()
            contenders["fast-litellm pool get + return"] = _pairs(
                peer.get_connection, peer.return_connection
            )
        except ImportError:
            pass
        rows = interleaved(contenders, calls=calls, rounds=rounds)
        pool.close()
    finally:
        segment.remove()
    ns = {row.name: row.median for row in rows}
    theirs = ns.get("fast-litellm pool get + return")
    return {"rows": rows, "ratio": theirs / ns["ours pool get + return"] if theirs else None}


def show(result: dict[str, Any]) -> None:
    """Print what run() found."""
    row: Timed
    for row in result["rows"]:
        print(f"{row.name:32} {row.median:8.1f} ns  ({row.low:.1f} to {row.high:.1f})")
    if result["ratio"] is None:
        print("fast-litellm: not installed, not measured")
        return
    verdict = "reached" if result["ratio"] >= TARGET else "NOT REACHED"
    print(
        f"fast-litellm / ours, get + return {result['ratio']:6.2f}x  target {TARGET:g}x  {verdict}"
    )


if __name__ == "__main__":
    show(run())
