"""What does one admitted check of a hot key cost, beside its peers?

All in one process, interleaved. The peers' state is private to the process; ours is shared.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from bench.timing import Timed, interleaved, loop_of
from fast_litellm_shm import Limit, RateLimiter, Segment

HUGE = 10**9


def contenders(segment: Segment) -> tuple[dict[str, Any], list[str]]:
    """Callables by name, and the peers that are not installed."""
    ours = RateLimiter(Limit(HUGE, per=1), name="bench", segment=segment)
    calls: dict[str, Any] = {
        "ours is_allowed": ours.is_allowed,
        "ours check": ours.check,
        "ours acquire": ours.acquire,
    }
    missing = []
    try:
        os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
        fast = importlib.import_module("fast_litellm").SimpleRateLimiter(HUGE)
        calls["fast-litellm is_allowed"] = fast.is_allowed
        calls["fast-litellm check"] = fast.check
    except ImportError:
        missing.append("fast-litellm")
    try:
        rust = importlib.import_module("rust_py_rate_limit")
        calls["rust-py-rate-limit allow"] = rust.RateLimiter(limit=HUGE, window_seconds=1).allow
    except ImportError:
        missing.append("rust-py-rate-limit")
    return calls, missing


def run(*, calls: int = 20_000, rounds: int = 41) -> dict[str, Any]:
    """Measure; returns rows and ratios. fast-litellm honours its own rate for one key only,
    "default", so the hot key is that one, for everybody."""
    segment = Segment(f"bench-{os.getpid()}")
    try:
        found, missing = contenders(segment)
        hot = interleaved(
            {name: loop_of(call, ["default"] * 100) for name, call in found.items()},
            calls=calls,
            rounds=rounds,
        )
    finally:
        segment.remove()
    ns = {row.name: row.median for row in hot}
    ratios = {}
    for ours, peer, target in (
        ("ours is_allowed", "fast-litellm is_allowed", 8.0),
        ("ours check", "fast-litellm check", 5.0),
        ("ours is_allowed", "rust-py-rate-limit allow", 2.0),
    ):
        if peer in ns:
            ratios[f"{peer} / {ours}"] = (ns[peer] / ns[ours], target)
    return {"rows": hot, "ratios": ratios, "missing": missing}


def show(result: dict[str, Any]) -> None:
    """Print what run() found."""
    row: Timed
    for row in result["rows"]:
        print(f"{row.name:28} {row.median:8.1f} ns  ({row.low:.1f} to {row.high:.1f})")
    for name, (ratio, target) in result["ratios"].items():
        verdict = "reached" if ratio >= target else "NOT REACHED"
        print(f"{name:52} {ratio:6.2f}x  target {target:g}x  {verdict}")
    for peer in result["missing"]:
        print(f"{peer}: not installed, not measured")


if __name__ == "__main__":
    show(run())
