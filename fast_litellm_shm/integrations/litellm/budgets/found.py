"""Which budgets a request counts for, read from LiteLLM's own objects."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fast_litellm_shm.integrations.litellm.budgets.spending import Allowance
from fast_litellm_shm.integrations.litellm.budgets.windows import instant, window_of
from fast_litellm_shm.integrations.litellm.subjects import expand_latest

_PREFIX = "spend:"  # of LiteLLM's names of counters

# LiteLLM's kinds of budgets of models: which fields of a request's key say whose it is and what it
# is, and how its message begins.
_MODEL_BUDGETS = (
    ("key", "token", "model_max_budget"),
    ("team", "team_id", "team_model_max_budget"),
    ("user", "user_id", "user_model_max_budget"),
    ("end_user", "end_user_id", "end_user_model_max_budget"),
    ("team_member", "", "team_member_model_max_budget"),
)


def _number(value: Any) -> float | None:
    """None: what is no number, or not finite, LiteLLM takes for no limit."""
    try:
        number = None if value is None else float(value)
    except (TypeError, ValueError):
        return None
    return number if number is not None and math.isfinite(number) else None


def _get(of: Any, name: str) -> Any:
    return of.get(name) if isinstance(of, Mapping) else getattr(of, name, None)


def _period(of: Any) -> tuple[Any, Any]:
    """``budget_duration`` and ``budget_reset_at`` of a key, team or user; or of the budget that an
    organization, tag and so on has."""
    duration, reset_at = _get(of, "budget_duration"), _get(of, "budget_reset_at")
    if duration is None:
        table = _get(of, "litellm_budget_table")
        if table is not None:
            duration, own = _get(table, "budget_duration"), _get(table, "budget_reset_at")
            reset_at = own or reset_at
    return duration, reset_at


def _allowance(
    entity: str, id: str, name: str, usd: float, spent: float, period: tuple[Any, Any], **more: Any
) -> Allowance:
    duration, reset_at = period
    window = window_of(duration, reset_at)
    if window.per is not None:
        ends = instant(reset_at)
        if ends is not None and ends <= time.time():
            spent = 0.0  # LiteLLM is late to end the window before this one: it was spent in that
    return Allowance(entity, id, f"{name}{window.mark}", usd, spent, window, **more)


def _limits_of(owner: Any) -> Iterator[Any]:
    """``budget_limits``: further windows of a key or team."""
    found = _get(owner, "budget_limits")
    if isinstance(found, str):
        found = json.loads(found)
    for each in found or ():
        yield json.loads(each) if isinstance(each, str) else each


def of_counters(
    counters: Iterable[Any], auth: Any, objects: Mapping[str, Any]
) -> Iterator[Allowance]:
    """LiteLLM's own list of a request's budgets, each a ``_BudgetCounter``. objects: what they are
    of, by their names; without one, the budget never ends."""
    for counter in counters:
        usd = _number(counter.max_budget)
        if usd is None:
            continue
        name = counter.counter_key.removeprefix(_PREFIX)
        id = counter.spend_log_entity_id or counter.entity_id
        owner = objects.get(counter.counter_key)
        period: tuple[Any, Any] = (None, None)
        if counter.window_duration is not None:
            for limit in _limits_of(owner):
                if str(_get(limit, "budget_duration")) == counter.window_duration:
                    period = counter.window_duration, _get(limit, "reset_at")
        elif owner is not None:
            period = _period(owner)
        spent = counter.fallback_spend
        yield _allowance(
            counter.entity_type, counter.entity_id, name, usd, spent, period,
            soft=counter.entity_type == "Key" and id == counter.entity_id and _throttles(auth),
        )  # fmt: skip


def _throttles(auth: Any) -> bool:
    """Whether LiteLLM lets a key that has used up its budget go on, with lower limits."""
    if (getattr(auth, "metadata", None) or {}).get("throttle_on_budget_exceeded") is not True:
        return False
    try:
        from litellm.proxy.auth.budget_throttle import should_throttle_budget_exceeded
    except ImportError:
        return False
    return bool(should_throttle_budget_exceeded(auth))


def of_auth(auth: Any, user_budget: bool) -> Iterator[Allowance]:
    """The budgets that are in a ``UserAPIKeyAuth`` itself: all that there is where LiteLLM has no
    database, or a ``custom_auth`` without its checks. user_budget: whether a team's key counts for
    its user's too."""
    token = getattr(auth, "token", None) or auth.api_key
    own = _number(getattr(auth, "max_budget", None))
    spent = _number(getattr(auth, "spend", None)) or 0.0
    if token:
        if own is not None:
            soft = _throttles(auth)
            yield _allowance("Key", token, f"key:{token}", own, spent, _period(auth), soft=soft)
        for limit in _limits_of(auth):
            lasts, most = _get(limit, "budget_duration"), _number(_get(limit, "max_budget"))
            if lasts and most is not None:
                name, period = f"key:{token}:window:{lasts}", (lasts, _get(limit, "reset_at"))
                yield _allowance("Key", f"{token}:{lasts}", name, most, 0.0, period)
    team, user = auth.team_id, auth.user_id
    for entity, id, name, field, so_far in (
        ("Team", team, f"team:{team}", "team_max_budget", "team_spend"),
        ("User", user, f"user:{user}", "user_max_budget", "user_spend"),
        ("EndUser", auth.end_user_id, f"end_user:{auth.end_user_id}", "end_user_max_budget", ""),
        ("Organization", getattr(auth, "org_id", None), f"org:{getattr(auth, 'org_id', None)}",
         "organization_max_budget", ""),
    ):  # fmt: skip
        usd = _number(getattr(auth, field, None))
        if usd is None or not id or (entity == "User" and team and not user_budget):
            continue
        spent = _number(getattr(auth, so_far, None)) or 0.0 if so_far else 0.0
        yield _allowance(entity, id, name, usd, spent, (None, None))


def of_models(auth: Any, model: str, limiter: Any) -> Iterator[Allowance]:
    """The budgets of a model: ``model_max_budget`` of the key, its team, user, end user and team
    member. limiter: LiteLLM's module of them, which says which entry governs the model."""
    for kind, field, budgets in _MODEL_BUDGETS:
        given = getattr(auth, budgets, None)
        if not isinstance(given, Mapping) or not given:
            continue
        id, shown = _get(auth, field) if field else None, ""
        if kind == "team":
            given = _team_entries(limiter, model, given, auth)
        elif kind == "team_member":
            user, team = auth.user_id, auth.team_id
            if user and team:
                id = f"{len(user)}:{user}:{team}"
                shown = f"LiteLLM Team Member: user={user}, team={team}"
        if not id:
            continue
        for named in expand_latest(model):
            found = _resolve(limiter, named, given, auth.team_id)
            if found is None:
                continue
            config = found.budget_config
            if _number(config.max_budget) is None or config.max_budget < 0:
                continue
            yield of_model_budget(kind, id, found, shown or _owner_of_model(kind, id, auth), named)


def of_model_budget(kind: str, id: str, found: Any, shown: str, named: str) -> Allowance:
    """found: LiteLLM's ``ResolvedModelBudget``."""
    config, model = found.budget_config, found.budget_model
    name = f"{kind}:{id}:model:{model}:{config.budget_duration}"
    window = window_of(config.budget_duration)
    what = f"{shown}, exceeded budget for model={named}"
    if model != named:
        what += f", budget_model={model}"
    key = f"{name}{window.mark}"
    return Allowance(kind, id, key, float(config.max_budget), 0.0, window, what=what)


def _owner_of_model(kind: str, id: str, auth: Any) -> str:
    if kind == "key":
        return f"LiteLLM Virtual Key: {id}, key_alias: {getattr(auth, 'key_alias', None)}"
    return f"LiteLLM {kind.replace('_', ' ').title()}: {id}"


def _team_entries(limiter: Any, model: str, given: Any, auth: Any) -> Any:
    """Without those which the key's own replace."""
    own = getattr(auth, "model_max_budget", None)
    entries = getattr(limiter, "team_model_budget_entries", None)
    if entries is None:  # a release before 1.110: all of them, or none
        applies = getattr(limiter, "team_model_budget_applies", None)
        return given if applies is None or applies(model, own) else {}
    return entries(model=model, team_model_max_budget=given, key_model_max_budget=own)


def _resolve(limiter: Any, model: str, given: Any, team: str | None) -> Any:
    if hasattr(limiter, "proxy_model_access_groups"):
        return limiter.resolve_model_budget(model=model, model_max_budget=given, team_id=team)
    return limiter.resolve_model_budget(model=model, model_max_budget=given)
