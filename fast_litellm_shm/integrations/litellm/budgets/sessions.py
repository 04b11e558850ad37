"""What sessions of agents have used: ``max_iterations`` and ``max_budget_per_session``. LiteLLM
keeps both for an hour in each worker; here they are windows of the segment."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Any

from fast_litellm_shm.integrations.litellm import failures, settings
from fast_litellm_shm.integrations.litellm.window_counter import WindowCounter

_MOST = 2**31 - 1
_MICRO = 10**6  # of a dollar: what is counted

_counters: dict[tuple[str, float], WindowCounter] = {}


def _counter(name: str, limiter: Any) -> WindowCounter | None:
    """None: LiteLLM counts, in its Redis or by the settings."""
    cache = limiter.internal_usage_cache.dual_cache
    if not settings.current().budgets or cache.redis_cache is not None:
        return None
    seconds = float(limiter.ttl)
    found = _counters.get((name, seconds))
    if found is None:
        found = _counters[name, seconds] = WindowCounter(f"litellm {name}", _MOST, seconds)
    return found


def _shared(name: str, own: Callable[..., Awaitable[Any]], count: Callable[..., Any]) -> Any:
    async def replaced(self: Any, *args: Any, **given: Any) -> Any:
        try:
            counter = _counter(name, self)
            if counter is not None:
                return count(counter, *args, **given)
        except Exception as error:
            failures.report(f"counting {name}", error, "LiteLLM's own count holds, in this worker")
        return await own(self, *args, **given)

    return replaced


def counting_iterations(own: Callable[..., Awaitable[Any]]) -> Any:
    return _shared("iterations", own, lambda counter, cache_key: counter.add(cache_key, 1))


def charging(own: Callable[..., Awaitable[Any]]) -> Any:
    def charge(counter: WindowCounter, cache_key: str, amount: float) -> float:
        return counter.add(cache_key, math.ceil(amount * _MICRO)) / _MICRO

    return _shared("session budgets", own, charge)


def reading(own: Callable[..., Awaitable[Any]]) -> Any:
    return _shared(
        "session budgets", own, lambda counter, cache_key: counter.count(cache_key) / _MICRO
    )


def forget() -> None:
    """For tests: of another segment."""
    _counters.clear()
