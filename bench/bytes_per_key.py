"""How much memory does a key of SimpleRateLimiter cost, at 200,000 keys?

Counted from outside the allocators: growth of anonymous memory (RSS without shared pages) of a
child process, plus, for ours, the whole shared-memory segment. (tracemalloc does not see native
heaps.)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from typing import Any

KEYS = 200_000
TARGET = 42.0


def _anonymous() -> int:
    import psutil

    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def _fill(limiter: Any, keys: int) -> int:
    limiter.is_allowed("warm-up")
    before = _anonymous()
    for i in range(keys):
        limiter.is_allowed(f"user_{i}")
    return _anonymous() - before


def _ours(keys: int, out: Any) -> None:
    from fast_litellm_shm import Segment, SimpleRateLimiter

    segment = Segment(f"bench-{os.getpid()}")
    try:
        limiter = SimpleRateLimiter(60, segment=segment)
        private = _fill(limiter, keys)
        stats = segment.stats()
        assert stats["used"] >= keys, f"only {stats['used']} keys are in the segment"
        out.put(private + stats["size_bytes"])
    finally:
        segment.remove()


def _fast_litellm(keys: int, out: Any) -> None:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        module = importlib.import_module("fast_litellm")
    except ImportError:
        out.put(None)
        return
    out.put(_fill(module.SimpleRateLimiter(60), keys))


def run(*, keys: int = KEYS) -> dict[str, float | None]:
    """Bytes a key by contender, each in a fresh process; None where it is not installed."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, float | None] = {}
    for name, target in (("ours", _ours), ("fast-litellm", _fast_litellm)):
        queue = context.Queue()
        child = context.Process(target=target, args=(keys, queue))
        child.start()
        total = queue.get(timeout=300)
        child.join()
        found[name] = None if total is None else total / keys
    return found


def show(result: dict[str, float | None]) -> None:
    """Print what run() found."""
    for name, value in result.items():
        shown = "not installed, not measured" if value is None else f"{value:8.1f} bytes a key"
        print(f"{name:28} {shown}")
    ours, peer = result["ours"], result["fast-litellm"]
    if ours and peer:
        verdict = "reached" if peer / ours >= TARGET else "NOT REACHED"
        print(f"fast-litellm / ours {peer / ours:6.2f}x  target {TARGET:g}x  {verdict}")


if __name__ == "__main__":
    show(run())
