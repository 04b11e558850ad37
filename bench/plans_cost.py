"""What does a check cost where each key has a plan of its own?

100,000 keys in one limiter, with 3,000 different plans, asked for at random. Beside it the same
keys in a limiter that has one limit for all, in the same process and segment, a round of one after
a round of the other. And, hot, one key with a plan. All limits are token buckets whose tokens come
back so slowly (20 s and more) that no key's state ends before it is asked for again: a key whose
state has ended takes a slot anew, in either limiter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import RateLimiter

KEYS, PLANS = 100_000, 3_000
HOT, HOT_LIMIT = "the hot key", 1_000_000_000


def _round(call: Callable[[str], Any], keys: Sequence[str]) -> float:
    """ns a call."""
    start = time.perf_counter_ns()
    for key in keys:
        call(key)
    return (time.perf_counter_ns() - start) / len(keys)


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    rng = random.Random(20)
    keys = [f"customer-{i}" for i in range(KEYS)]
    plan = {key: f"plan {i % PLANS}" for i, key in enumerate(keys)}
    many = {f"plan {i}": f"{1_000 + i} per day burst {1_000 + i}" for i in range(PLANS)}
    plan[HOT], many[HOT] = HOT, f"{HOT_LIMIT} per day burst {HOT_LIMIT}"
    with peers.Place(capacity=4 * KEYS) as place:
        segment = place.segment()
        planned = RateLimiter(
            name="plans", segment=segment, plans=many, plan_of=plan.__getitem__, plan_age=86_400
        )
        plain = RateLimiter("1000 per day burst 1000", name="plain", segment=segment)
        hot = RateLimiter(many[HOT], name="hot", segment=segment)
        for key in keys:
            planned.acquire(key)
            plain.acquire(key)
        for method in ("is_allowed", "acquire"):
            found: dict[str, list[float]] = {"plans": [], "plain": [], "hot": [], "hot plain": []}
            one, other = getattr(planned, method), getattr(plain, method)
            hot_plain = getattr(hot, method)
            for number in range(settings.pick(settings.share(21), 7) * 2):
                # In turn first: the second finds in the caches what both need.
                order = [("plans", one), ("plain", other)]
                rng.shuffle(keys)
                for name, call in order if number % 2 else order[::-1]:
                    found[name].append(_round(call, keys))
                found["hot"].append(_round(one, [HOT] * 100_000))
                found["hot plain"].append(_round(hot_plain, [HOT] * 100_000))
            for name, what, who in (
                ("plans", f"{method}(), {KEYS:,} keys with {PLANS:,} plans", OURS),
                ("plain", f"{method}(), {KEYS:,} keys, one limit", REFERENCE),
                ("hot", f"{method}(), one key with a plan", OURS),
                ("hot plain", f"{method}(), one key", REFERENCE),
            ):
                group = f"{method}(), {'one key' if name.startswith('hot') else 'many keys'}"
                result.rows.append(Row(what, "ns", Values(found[name]), who, group))
    result.ratios.append(
        ratio(
            result.rows,
            f"is_allowed(), {KEYS:,} keys with {PLANS:,} plans",
            f"is_allowed(), {KEYS:,} keys, one limit",
            1.5,
            at_least=False,
            promise="100,000 keys with 3,000 plans, over a plain check",
            why="it takes a cache line more, and the handle of the plan",
        )
    )
    result.plots.append(
        Plot(
            "plans_cost",
            "bars",
            "One check of a key with a plan",
            tuple(dict.fromkeys(row.group for row in result.rows)),
            "nanoseconds a check",
        )
    )
    return result
