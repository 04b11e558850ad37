"""What sessions of agents have used: ``max_iterations`` and ``max_budget_per_session``. LiteLLM
keeps both for an hour in each worker; here they are windows of the segment.

LiteLLM looks at what a session has spent, and adds to it when the answer is there: so any number of
calls at once pass. Here a call reserves what it may cost, as of other budgets
(:func:`allowance_of`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fast_litellm_shm.integrations.litellm import failures, settings
from fast_litellm_shm.integrations.litellm.budgets.spending import Allowance, Refusal
from fast_litellm_shm.integrations.litellm.budgets.windows import window_of
from fast_litellm_shm.integrations.litellm.window_counter import WindowCounter

_MOST = 2**31 - 1
_MICRO = 10**6  # of a dollar: what is counted
_SPENT = "session budgets"
_PERIODS = ((3600.0, "1h"), (86400.0, "1d"))  # of the calendar, by the seconds that they last

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

    return _shared(_SPENT, own, charge)


def reading(own: Callable[..., Awaitable[Any]]) -> Any:
    return _shared(_SPENT, own, lambda counter, cache_key: counter.count(cache_key) / _MICRO)


class Refused(Exception):
    """The session has not so much left. error: LiteLLM's own, to be raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _theirs() -> Any:
    return sys.modules.get("litellm.proxy.hooks.max_budget_per_session_limiter")


def allowance_of(auth: Any, data: Mapping[str, Any]) -> Allowance | None:
    """The budget of the session that a request belongs to, as LiteLLM reads it. It is one of a
    period of the calendar that is at least as long as LiteLLM remembers a session, and begins with
    what LiteLLM's counter says."""
    if getattr(auth, "agent_id", None) is None or _theirs() is None:
        return None
    handler = _theirs()._PROXY_MaxBudgetPerSessionHandler
    usd, id = handler._get_max_budget_per_session(None, auth), handler._get_session_id(None, data)
    if usd is None or id is None:
        return None
    key, spent, lasts = handler._make_cache_key(None, id), 0, _PERIODS[0][0]
    for (name, seconds), counter in list(_counters.items()):
        if name == _SPENT:
            spent, lasts = max(spent, counter.count(key)), max(lasts, seconds)
    period = next((text for long, text in _PERIODS if lasts <= long), "1mo")
    window = window_of(period)
    return Allowance("Session", id, f"session:{id}{window.mark}", usd, spent / _MICRO, window)


def refused(refusal: Refusal, model: Any) -> Refused:
    allowance, spent = refusal
    detail = (
        f"Session budget exceeded for session {allowance.id}. Current spend: ${spent:.4f}, "
        f"max_budget_per_session: ${allowance.usd:.2f}."
    )
    module = _theirs()
    make = getattr(module, "ProxyRateLimitError", None)
    if make is None:  # an older release
        from fastapi import HTTPException

        return Refused(HTTPException(429, detail))
    of, provider = module.resolve_llm_provider_for_rate_limit(model)
    kind = module.RateLimitType.BUDGET
    return Refused(make(detail=detail, rate_limit_type=kind, model=of, llm_provider=provider))


def forget() -> None:
    """For tests: of another segment."""
    _counters.clear()
