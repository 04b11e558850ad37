"""What does the LiteLLM plugin add to a request, beside a callback that does nothing?

All hooks that LiteLLM calls for one request that is answered, in its order, by the plugin with a
key that has limits of requests, tokens and parallel requests, and one of its team, to a deployment
with limits, and LiteLLM's own limiter asking which of them are left to it; and by a callback that
has the same hooks and does nothing, and a limiter that nobody asks. Beside them, what the plugin
asks of the segment for that request: three admissions, settled and released. Interleaved.
"""

from __future__ import annotations

import asyncio
import os
import time
from types import SimpleNamespace
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked
from fast_litellm_shm import Quota

TARGET_US = 25.0
PROMISE = "LiteLLM plugin, all hooks of a request"
_REQUESTS = 200  # a round
_TOLD = {  # of what is measured: its row, and whose it is
    "plugin": ("the plugin", OURS),
    "nothing": ("a callback that does nothing", REFERENCE),
    "segment": ("its three admissions alone", REFERENCE),
}
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


class Theirs:
    """Stands for LiteLLM's limiter, whose limits the plugin takes out of what it finds."""

    async def async_pre_call_hook(self) -> None: ...

    async def _build_request_rate_limit_descriptors(
        self, user: Any, data: dict[str, Any], call_type: str
    ) -> list[dict[str, Any]]:
        return [
            {
                "key": "api_key",
                "value": user.api_key,
                "rate_limit": {
                    "requests_per_unit": user.rpm_limit,
                    "tokens_per_unit": user.tpm_limit,
                    "max_parallel_requests": user.max_parallel_requests,
                },
            },
            {
                "key": "team",
                "value": user.team_id,
                "rate_limit": {"requests_per_unit": user.team_rpm_limit, "tokens_per_unit": None},
            },
        ]


async def _request(callback: Any, theirs: Any, user: Any, id: str) -> None:
    message = {"role": "user", "content": "words of a prompt " * 20}
    data = {"litellm_call_id": id, "model": "m", "messages": [message], "max_tokens": 100}
    answer = {"usage": _USAGE}
    await callback.async_pre_call_hook(user, None, data, "acompletion")
    await theirs._build_request_rate_limit_descriptors(user, data, "acompletion")
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


def _admissions(quotas: list[Any]) -> list[float]:
    """µs of each: what the plugin asks of the segment for one request, and nothing else."""
    took = []
    for _ in range(_REQUESTS):
        start = time.perf_counter_ns()
        held = [quota.admit("k", 100) for quota in quotas]
        for each in held:
            each.settle(30)
            each.release()
        took.append((time.perf_counter_ns() - start) / 1e3)
    return sorted(took)


async def _timed(callback: Any, theirs: Any, user: Any) -> list[float]:
    took = []
    for index in range(_REQUESTS):
        start = time.perf_counter_ns()
        await asyncio.create_task(_request(callback, theirs, user, str(index)))
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
        from fast_litellm_shm.integrations.litellm.builtin_limiter import replacement
        from fast_litellm_shm.integrations.litellm.limiter import found_for

        theirs = replacement._reduced(Theirs, found_for)()
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
        took: dict[str, list[list[float]]] = {"plugin": [], "nothing": [], "segment": []}
        given: dict[str, Any] = {"segment": place.segment()}
        quotas = [
            Quota(10**6, 10**9, 1000, name="key", **given),
            Quota(10**6, name="team", **given),
            Quota(10**6, max_parallel=1000, name="deployment", **given),
        ]

        async def all_rounds() -> None:
            for _ in range(settings.rounds):
                took["plugin"].append(await _timed(limiter, theirs, user))
                took["nothing"].append(await _timed(nothing, Theirs(), user))
                took["segment"].append(_admissions(quotas))

        asyncio.run(all_rounds())
    parts = {"p50": _REQUESTS // 2, "p99": _REQUESTS * 99 // 100}
    for name, (told, who) in _TOLD.items():
        for part, at in parts.items():
            values = Values(each[at] for each in took[name])
            result.rows.append(Row(f"{told}, {part}", "µs", values, who, "hooks of a request"))
    pairs = zip(took["plugin"], took["nothing"], strict=True)
    added = Values(ours[parts["p50"]] - theirs[parts["p50"]] for ours, theirs in pairs)
    segment = Values(each[parts["p50"]] for each in took["segment"]).median
    why = (
        f"{segment:.1f} µs of it are the three admissions, settled and released. The rest is "
        "Python that finds what LiteLLM's objects say: 78 calls of Python functions a request "
        "(on 2026-12-02), none of which is more than 5 % of them"
    )
    result.ratios.append(
        Ratio("the plugin adds, at p50", added, TARGET_US, False, "µs", promise=PROMISE, why=why)
    )
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
