"""What does the LiteLLM plugin add to a request, beside a callback that does nothing?

All hooks that LiteLLM calls for one request that is answered, in its order, by the plugin with a
key that has limits of requests, tokens and parallel requests, and one of its team, to a deployment
with limits; and by a callback that has the same hooks and does nothing. Interleaved.
"""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked

TARGET_US = 50.0
_REQUESTS = 200  # a round
_USAGE = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
_DEPLOYMENT = {
    "model_name": "m",
    "litellm_params": {"model": "openai/m", "rpm": 10**6, "max_parallel_requests": 1000},
    "model_info": {"id": "d"},
}


def _user() -> Any:
    names = "metadata team_metadata org_id organization_metadata model_max_budget end_user_id"
    none = dict.fromkeys(names.split())
    for kind in ("user", "team", "team_member", "end_user", "organization"):
        none |= {f"{kind}_rpm_limit": None, f"{kind}_tpm_limit": None}
    return SimpleNamespace(
        **{
            **none,
            **{"api_key": "k", "user_id": "u", "team_id": "t", "budget_throttle_pct": None},
            **{"rpm_limit": 10**6, "tpm_limit": 10**9, "max_parallel_requests": 1000},
            "team_rpm_limit": 10**6,
        }
    )


async def _request(callback: Any, user: Any, id: str) -> None:
    message = {"role": "user", "content": "words of a prompt " * 20}
    data = {"litellm_call_id": id, "model": "m", "messages": [message], "max_tokens": 100}
    answer = {"usage": _USAGE}
    await callback.async_pre_call_hook(user, None, data, "acompletion")
    await callback.async_pre_call_check(_DEPLOYMENT, None)
    await callback.async_post_call_success_hook(data, user, answer)
    await callback.async_post_call_response_headers_hook(data, user, answer)
    kwargs = {
        "litellm_call_id": id,
        "model": "m",
        "litellm_params": {"model_info": {"id": "d"}},
        "standard_logging_object": _USAGE,
    }
    await callback.async_log_success_event(kwargs, answer, None, None)


async def _timed(callback: Any, user: Any) -> list[float]:
    took = []
    for index in range(_REQUESTS):
        start = time.perf_counter_ns()
        await asyncio.create_task(_request(callback, user, str(index)))
        took.append((time.perf_counter_ns() - start) / 1e3)
    return sorted(took)


def run(settings: Settings) -> Result:
    """Measure; nothing where litellm is not installed."""
    result = asked(__doc__)
    try:
        litellm = peers.need("litellm")
    except peers.MissingError as error:
        result.missing["litellm"] = str(error)
        return result
    custom_logger = peers.need("litellm.integrations.custom_logger")
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        from fast_litellm_shm.integrations.litellm import limiter

        litellm.fast_litellm_shm = {"deployment_limits": True}
        hooks = {
            name: getattr(custom_logger.CustomLogger, name)
            for name in (
                "async_pre_call_hook",
                "async_pre_call_check",
                "async_post_call_success_hook",
                "async_post_call_response_headers_hook",
                "async_log_success_event",
            )
        }
        nothing = type("Nothing", (custom_logger.CustomLogger,), hooks)()
        user = _user()
        took: dict[str, list[list[float]]] = {"plugin": [], "nothing": []}

        async def all_rounds() -> None:
            for _ in range(settings.rounds):
                took["plugin"].append(await _timed(limiter, user))
                took["nothing"].append(await _timed(nothing, user))

        asyncio.run(all_rounds())
    parts = {"p50": _REQUESTS // 2, "p99": _REQUESTS * 99 // 100}
    for name, who in (("plugin", OURS), ("nothing", REFERENCE)):
        for part, at in parts.items():
            values = Values(each[at] for each in took[name])
            told = "the plugin" if who == OURS else "a callback that does nothing"
            result.rows.append(Row(f"{told}, {part}", "µs", values, who, "hooks of a request"))
    pairs = zip(took["plugin"], took["nothing"], strict=True)
    added = Values(ours[parts["p50"]] - theirs[parts["p50"]] for ours, theirs in pairs)
    result.ratios.append(Ratio("the plugin adds, at p50", added, TARGET_US, False, "µs"))
    result.plots.append(
        Plot(
            "litellm_plugin",
            "bars",
            "All hooks of one LiteLLM request",
            ("hooks of a request",),
            "microseconds a request",
            log_value=False,
        )
    )
    return result
