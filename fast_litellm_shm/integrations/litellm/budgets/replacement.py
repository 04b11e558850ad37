"""What stands in the place of LiteLLM's own keeping of budgets, which knows one worker each.

=============================================  ===================================================
``reserve_budget_for_request``                 LiteLLM calls it when it has authenticated a request:
                                               reserves in the segment, or raises LiteLLM's error
``_get_spend_for_model_budget``                what LiteLLM's check of ``model_max_budget`` reads,
                                               which chooses ``budget_fallbacks`` too
``RouterBudgetLimiting``                       budgets of providers, deployments, tags: what it
                                               reads and adds
limiters of sessions of agents                 what they read and add: :mod:`.sessions`
``SpendCounterStore.set``                      called where an operator sets what was spent
=============================================  ===================================================

None of them is a public interface of LiteLLM: :func:`install` first looks whether they are what
they were. Where LiteLLM does not call the first (a ``custom_auth`` without
``custom_auth_run_common_checks``), :func:`reserved_for` reserves in our own hook, by what is in the
``UserAPIKeyAuth``.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Literal

import litellm

from fast_litellm_shm._shared import log
from fast_litellm_shm.integrations.litellm import failures, responses, settings, usage
from fast_litellm_shm.integrations.litellm.budgets import found, sessions, spending
from fast_litellm_shm.integrations.litellm.budgets.spending import Allowance, Refusal, Spending
from fast_litellm_shm.integrations.litellm.budgets.windows import window_of

# What LiteLLM's authentication has had reserved for the request of this context. None: nothing, and
# nobody has asked. False: it has no budgets.
_reserved: ContextVar[Spending | Literal[False] | None] = ContextVar(
    "fast_litellm_shm_budgets", default=None
)
_ROUTER_BUDGETS = ("provider_spend:", "deployment_spend:", "tag_spend:")
# The fields of a UserAPIKeyAuth that have budgets.
_AMOUNTS = (
    *("max_budget", "team_max_budget", "user_max_budget", "end_user_max_budget"),
    "organization_max_budget",
)
_OTHERS = (
    *("budget_limits", "model_max_budget", "team_model_max_budget", "user_model_max_budget"),
    *("end_user_model_max_budget", "team_member_model_max_budget"),
)
_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_NONE = [None] * len(_AMOUNTS)

_theirs: Any = None  # LiteLLM's module, where it is as we know it


def _has_budgets(auth: Any) -> bool:
    """Most requests have none."""
    get = vars(auth).get
    return list(map(get, _AMOUNTS)) != _NONE or any(map(get, _OTHERS))


def _given(function: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of this the function takes: releases differ."""
    return {name: given[name] for name in inspect.signature(function).parameters if name in given}


def error_of(refusal: Refusal, estimate: float) -> Exception:
    """LiteLLM's own."""
    allowance, spent = refusal
    kind: str | None
    if allowance.what is not None:
        message, kind = allowance.what, allowance.entity
    else:
        fits = spent < allowance.usd
        detail = f"Estimated request cost: {estimate}, " if fits else ""
        message = (
            f"Budget has been exceeded! {allowance.entity}={allowance.id} Current cost: {spent}, "
            f"{detail}Max budget: {allowance.usd}"
        )
        kind = getattr(_theirs, "_COUNTER_ENTITY_TYPES", {}).get(allowance.entity)
    error: Exception
    try:
        error = litellm.BudgetExceededError(
            current_cost=spent, max_budget=allowance.usd, message=message,
            entity_type=kind, entity_id=allowance.id,
        )  # fmt: skip
    except TypeError:  # a release without the last two
        error = litellm.BudgetExceededError(
            current_cost=spent, max_budget=allowance.usd, message=message
        )
    return error


def _is_billed(route: str, body: Mapping[str, Any], router: Any) -> Any:
    """The models that a request is made to, as LiteLLM reads them; None: it costs nothing."""
    from litellm.proxy.auth.auth_utils import get_model_from_request
    from litellm.proxy.auth.route_checks import RouteChecks

    unbilled = getattr(RouteChecks, "is_unbilled_route", None) or _theirs._is_unbilled_route
    if not RouteChecks.is_llm_api_route(route=route) or unbilled(route=route):
        return None
    return get_model_from_request(dict(body), route, llm_router=router)


def _is_free(route: str, models: Any, router: Any, body: Mapping[str, Any]) -> bool:
    """Whether LiteLLM checks no budget for it: models without a price. Where LiteLLM authenticates,
    it has looked before."""
    from litellm.proxy.auth import auth_checks

    skips = getattr(auth_checks, "request_skips_budget_checks", None)
    if skips is None:
        return False
    given = {"route": route, "model": models, "llm_router": router, "request_body": body}
    return bool(skips(**_given(skips, given)))


def _of_models(auth: Any, models: Any) -> Iterator[Allowance]:
    limiter = sys.modules.get("litellm.proxy.hooks.model_max_budget_limiter")
    if limiter is None:
        return
    for model in dict.fromkeys([models] if isinstance(models, str) else models):
        yield from found.of_models(auth, model, limiter)


def _with_one_cap(body: Mapping[str, Any]) -> dict[str, Any]:
    """LiteLLM takes the first cap of the output that it finds, also one below 0. Here it is the
    largest: which of them the model obeys is not known."""
    caps = []
    for field in _CAPS:
        with contextlib.suppress(TypeError, ValueError):
            caps.append(int(body.get(field) or 0))
    most = max(caps, default=0)
    out = {name: value for name, value in body.items() if name not in _CAPS}
    return {**out, "max_tokens": most} if most > 0 else out


async def _estimate(given: Mapping[str, Any]) -> float:
    """LiteLLM's estimate: its tokens, and ``max_tokens`` or the most that the model answers, at the
    prices of the group's dearest deployment. 0: the model's prices are not known."""
    body, is_chat = given["request_body"], "chat/completions" in given["route"]
    try:
        body = _with_one_cap(body)
        counts = await _theirs.count_request_input_tokens(
            **_given(_theirs.count_request_input_tokens, given)
        )
        one = _theirs.estimate_request_max_cost(
            request_body=body, route=given["route"],
            llm_router=given["llm_router"], input_token_counts=counts,
        )  # fmt: skip
        return max(one or 0.0, 0.0) * usage.calls_of(body, "acompletion" if is_chat else "").total
    except Exception:  # no client gets past a budget by its body: it takes all that is left
        return math.inf


async def _reserve(allowances: list[Allowance], given: Mapping[str, Any], strict: bool) -> Spending:
    estimate = await _estimate(given)
    got = spending.reserve(allowances, estimate, strict)
    if isinstance(got, Refusal):
        raise error_of(got, estimate)
    return got


async def _objects(counters: list[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What LiteLLM's counters are of: that says how long their windows are."""
    held = {
        "Key": given["valid_token"],
        "Team": given["team_object"],
        "User": given["user_object"],
        "EndUser": given.get("end_user_object"),
    }
    out = {}
    for counter in counters:
        owner = held.get(counter.entity_type)
        if owner is None and counter.source_cache_key is not None:
            owner = await given["user_api_key_cache"].async_get_cache(key=counter.source_cache_key)
        out[counter.counter_key] = owner
    return out


async def _reserve_authenticated(given: dict[str, Any]) -> Spending | Literal[False]:
    auth, body, route = given["valid_token"], given["request_body"], given["route"]
    models = None if auth is None else _is_billed(route, body, given["llm_router"])
    if models is None:
        return False
    counters = await _theirs._get_budget_counters(**_given(_theirs._get_budget_counters, given))
    allowances: list[Allowance] = []
    if counters:
        allowances += found.of_counters(counters, auth, await _objects(counters, given))
    if _has_budgets(auth):
        allowances += _of_models(auth, models)
    if not allowances:
        return False
    given = {**given, "team_id": auth.team_id}
    strict = given.get("fail_closed_budget_enforcement", False)
    return await _reserve(allowances, given, strict)


def _proxy(name: str, otherwise: Any = None) -> Any:
    return getattr(sys.modules.get("litellm.proxy.proxy_server"), name, otherwise)


def _route_of(auth: Any, data: Mapping[str, Any]) -> str:
    route = getattr(auth, "request_route", None)
    if not route:
        asked = data.get("proxy_server_request")
        url = asked.get("url") if isinstance(asked, Mapping) else None
        route = "/" + str(url).split("://", 1)[-1].partition("/")[2].partition("?")[0]
    return str(route)


def has_none(auth: Any) -> bool:
    """Whether :func:`reserved_for` has nothing to do for the request that our hook is called for.
    That is so for most requests, and takes a third of the time."""
    return (
        getattr(auth, "agent_id", None) is None
        and (_theirs is None or not _has_budgets(auth))
        and _reserved.get() is None
    )


async def reserved_for(auth: Any, data: Mapping[str, Any]) -> Spending | None:
    """What is reserved of the budgets of the request that our hook is called for, and of the one of
    its session. Raises LiteLLM's BudgetExceededError, or sessions.Refused."""
    held = await _reserved_for(auth, data)
    session = sessions.allowance_of(auth, data) if settings.current().budgets else None
    if session is None or not _reserves():
        return held
    got: Spending | Refusal | None = None
    try:
        got = spending.reserve([session], await _estimate(_of_hook(auth, data)))
        if isinstance(got, Refusal):
            raise sessions.refused(got, data.get("model"))
    finally:
        if held is not None and not isinstance(got, Spending):
            held.release()
    if held is None:
        return got
    held.add(got)
    return held


def _reserves() -> bool:
    return (_proxy("general_settings") or {}).get("disable_budget_reservation") is not True


def _of_hook(auth: Any, data: Mapping[str, Any]) -> dict[str, Any]:
    """What an estimate is made of."""
    return {
        **{"request_body": dict(data), "route": _route_of(auth, data), "raw_body": None},
        **{"llm_router": _proxy("llm_router"), "team_id": auth.team_id},
    }


async def _reserved_for(auth: Any, data: Mapping[str, Any]) -> Spending | None:
    asked = _reserved.get()
    if asked is not None:
        _reserved.set(False)  # another request in this context is part of it
        return asked or None
    if _theirs is None or not settings.current().budgets or not _has_budgets(auth):
        return None
    general = _proxy("general_settings") or {}
    if not _reserves():
        return None
    router, route = _proxy("llm_router"), _route_of(auth, data)
    models = _is_billed(route, data, router)
    if models is None or _is_free(route, models, router, data):
        return None
    allowances = [
        *found.of_auth(auth, general.get("apply_user_budget_to_team_keys") is True),
        *_of_models(auth, models),
    ]
    if not allowances:
        return None
    strict = general.get("fail_closed_budget_enforcement") is True
    return await _reserve(allowances, _of_hook(auth, data), strict)


def _reserving(own: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    names = tuple(inspect.signature(own).parameters)

    async def reserve_budget_for_request(*args: Any, **kwargs: Any) -> Any:
        if not settings.current().budgets:
            return await own(*args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        try:
            _reserved.set(await _reserve_authenticated(given))
        except litellm.BudgetExceededError:
            raise
        except Exception as error:
            if settings.current().fail_open:
                failures.report("checking a budget", error, "LiteLLM's own holds, in this worker")
                _reserved.set(False)
                return await own(*args, **kwargs)
            failures.report("checking a budget", error, "it is refused (fail_open is false)")
            raise responses.unchecked(error) from error
        return None  # LiteLLM has nothing to settle

    return reserve_budget_for_request


def _reading(own: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def _get_spend_for_model_budget(
        self: Any, entity_type: Any, entity_id: Any, model: str, resolved: Any
    ) -> Any:
        if settings.current().budgets and entity_id and resolved.budget_config.max_budget:
            try:
                kind = str(getattr(entity_type, "value", entity_type))
                return spending.used(found.of_model_budget(kind, entity_id, resolved, "", model))
            except Exception as error:
                failures.report("reading a budget", error, "LiteLLM's own holds, in this worker")
        return await own(
            self, entity_type=entity_type, entity_id=entity_id, model=model, resolved=resolved
        )

    return _get_spend_for_model_budget


def _setting(own: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def set(self: Any, counter: str, spend: float, ttl: float | None = None) -> Any:
        if settings.current().budgets:
            try:
                spending.set_spent(counter.removeprefix("spend:"), spend)
            except Exception as error:
                failures.report("setting a budget", error, "what was spent stays as it was")
        return await own(self, counter, spend, ttl)

    return set


def _keeps_router_budget(limiter: Any, key: str) -> bool:
    """Not where LiteLLM has a Redis, which it shares them by."""
    shared = getattr(limiter.dual_cache, "redis_cache", None) is not None
    return settings.current().budgets and not shared and key.startswith(_ROUTER_BUDGETS)


def _filtering(own: Callable[..., Any]) -> Callable[..., Any]:
    def _filter_out_deployments_above_budget(self: Any, **given: Any) -> Any:
        spent = given["spend_map"]
        for key in spent:
            if _keeps_router_budget(self, key):
                try:
                    window = window_of(key.rpartition(":")[2])
                    spent[key] = spending.spent_of(window, key + window.mark)
                except Exception as error:
                    failures.report("reading a budget", error, "this worker's own spend counts")
        return own(self, **given)

    return _filter_out_deployments_above_budget


def _adding(own: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def add(self: Any, **given: Any) -> Any:
        key = given["spend_key"]
        if _keeps_router_budget(self, key):
            try:
                window = window_of(key.rpartition(":")[2])
                spending.charge(window, key + window.mark, given["response_cost"] or 0.0)
            except Exception as error:
                failures.report("charging a budget", error, "only this worker counts it")
        return await own(self, **given)

    return add


# The class or module, what of it is replaced, by what, and the arguments that it must take.
_REPLACED: tuple[tuple[str, str, str, Callable[[Any], Any], tuple[str, ...]], ...] = (
    (
        "litellm.proxy.spend_tracking.budget_reservation", "", "reserve_budget_for_request",
        _reserving, ("request_body", "route", "llm_router", "valid_token", "team_object",
                     "user_object", "user_api_key_cache"),
    ),
    (
        "litellm.proxy.hooks.model_max_budget_limiter", "_PROXY_VirtualKeyModelMaxBudgetLimiter",
        "_get_spend_for_model_budget", _reading, ("entity_type", "entity_id", "model", "resolved"),
    ),
    (
        "litellm.router_strategy.budget_limiter", "RouterBudgetLimiting",
        "_filter_out_deployments_above_budget", _filtering, ("spend_map",),
    ),
    (
        "litellm.router_strategy.budget_limiter", "RouterBudgetLimiting",
        "_increment_spend_in_current_window", _adding, ("spend_key", "response_cost"),
    ),
    (
        "litellm.router_strategy.budget_limiter", "RouterBudgetLimiting",
        "_handle_new_budget_window", _adding, ("spend_key", "response_cost"),
    ),
    (
        "litellm.proxy.hooks.max_iterations_limiter", "_PROXY_MaxIterationsHandler",
        "_in_memory_increment", sessions.counting_iterations, ("cache_key",),
    ),
    (
        "litellm.proxy.hooks.max_budget_per_session_limiter", "_PROXY_MaxBudgetPerSessionHandler",
        "_in_memory_increment_spend", sessions.charging, ("cache_key", "amount"),
    ),
    (
        "litellm.proxy.hooks.max_budget_per_session_limiter", "_PROXY_MaxBudgetPerSessionHandler",
        "_get_current_spend", sessions.reading, ("cache_key",),
    ),
    (
        "litellm.redis.stores.spend_counters", "SpendCounterStore", "set", _setting,
        ("counter", "spend", "ttl"),
    ),
)  # fmt: skip
_NEEDED = ("_get_budget_counters", "count_request_input_tokens", "estimate_request_max_cost")


def install() -> None:
    """Replace them, where this LiteLLM has them; one log line says what it has not."""
    global _theirs
    if "litellm.proxy.proxy_server" not in sys.modules:
        return
    for module, owner, name, make, arguments in _REPLACED:
        try:
            of = __import__(module, fromlist=["*"])
            if not owner:
                for each in _NEEDED:
                    inspect.signature(getattr(of, each))
            holder = getattr(of, owner) if owner else of
            own = getattr(holder, name)
            if hasattr(own, _OURS):
                continue
            missing = set(arguments) - set(inspect.signature(own).parameters)
            if missing:
                raise TypeError(f"it takes no {', '.join(sorted(missing))}")
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            log.warning(
                "the budgets of this litellm cannot be shared by its %s (%s): what it keeps by "
                "that, each worker keeps alone. See docs/litellm.md for the versions that are "
                "supported",
                f"{owner}.{name}" if owner else name,
                error,
            )
            continue
        made = make(own)
        setattr(made, _OURS, True)
        setattr(holder, name, made)
        if not owner:
            _theirs = of


_OURS = "_fast_litellm_shm"
