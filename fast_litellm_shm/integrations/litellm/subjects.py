"""Whom a request counts for, and what each of them may: LiteLLM's own settings, read from its own
objects (``UserAPIKeyAuth``, deployments)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple


def _itself(model: str) -> tuple[str, ...]:
    return (model,)


# A model, and what a "-latest" of LiteLLM's price table stands for.
_meant: Callable[[str], tuple[str, ...]] = _itself
with contextlib.suppress(ImportError):  # by a release that has none
    from litellm.litellm_core_utils import model_latest_aliases

    _meant = model_latest_aliases.expand_model_latest_alias

# Beyond these a limit cannot be reached within a minute, or by one host: people write them for
# "unlimited".
_MOST_A_MINUTE = 2**31 - 1
_MOST_PARALLEL = 100_000


class Limits(NamedTuple):
    """Requests and tokens a minute, and calls in parallel; None: no limit, 0: nothing is
    admitted."""

    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None

    @property
    def nothing(self) -> str | None:
        """The name of a limit of 0."""
        if 0 not in self:
            return None
        return next((name for name in self._fields if getattr(self, name) == 0), None)


class Subject(NamedTuple):
    """kind: LiteLLM's name of it, as in its headers: ``api_key``, ``user``, ``team``,
    ``team_member``, ``end_user``, ``organization``, ``model_per_key``, ``model_per_team``,
    ``model_per_organization``. value: which one. calls: how many calls of the request count for
    it."""

    kind: str
    value: str
    limits: Limits
    calls: int = 1


def _whole(value: Any, most: int) -> int | None:
    """A limit as it may be written: a number, or a number as text. None where it is none."""
    if value is None:
        return None
    number = int(value)
    return None if number > most else max(number, 0)


def limits(rpm: Any = None, tpm: Any = None, max_parallel: Any = None) -> Limits | None:
    """None where nothing is limited. Raises ValueError or TypeError for what is no number."""
    if rpm is None and tpm is None and max_parallel is None:
        return None
    return _read(rpm, tpm, max_parallel)


@functools.lru_cache(maxsize=1024)  # each request brings those of its key and team again
def _read(rpm: Any, tpm: Any, max_parallel: Any) -> Limits | None:
    found = Limits(
        _whole(rpm, _MOST_A_MINUTE),
        _whole(tpm, _MOST_A_MINUTE),
        _whole(max_parallel, _MOST_PARALLEL),
    )
    return None if found == _UNLIMITED else found


_UNLIMITED = Limits()


def _key_limits(auth: Any) -> Limits | None:
    """Of the key itself, throttled where its budget says so. What is of the type ``dynamic`` is
    left to LiteLLM, which lets such a key exceed it while the model has no failures."""
    rpm, tpm = auth.rpm_limit, auth.tpm_limit
    share = getattr(auth, "budget_throttle_pct", None)
    if share is not None:
        rpm, tpm = (None if n is None else max(1, int(n * share)) for n in (rpm, tpm))
    kinds = auth.metadata or {}
    return limits(
        None if kinds.get("rpm_limit_type") == "dynamic" else rpm,
        None if kinds.get("tpm_limit_type") == "dynamic" else tpm,
        auth.max_parallel_requests,
    )


def _of_model(names: tuple[str, str], *sources: Any) -> list[Any]:
    """Of each source (a dict by model), what it says of the requested name, else of its group."""
    return [
        None if not source else source.get(names[0], source.get(names[1])) for source in sources
    ]


def _budgeted(auth: Any, field: str) -> dict[str, Any]:
    budgets = getattr(auth, "model_max_budget", None) or {}
    return {
        model: budget[field]
        for model, budget in budgets.items()
        if isinstance(budget, dict) and budget.get(field) is not None
    }


def _models(
    auth: Any, key: Any, team: Any, organization: Any, names: tuple[str, str]
) -> Iterator[tuple[str, Any, Limits | None]]:
    """Limits of a model, of a key (else of its team) and of its organization, by their metadata.
    names: as it is requested, and its group."""
    of_key, of_team = [], []
    for field in ("model_rpm_limit", "model_tpm_limit"):
        own = key.get(field) or _budgeted(auth, field.removeprefix("model_"))
        (mine,) = _of_model(names, own)
        (theirs,) = _of_model(names, team.get(field))
        of_key.append(mine)
        of_team.append(theirs if mine is None else None)
    yield "model_per_key", auth.api_key, limits(*of_key)
    yield "model_per_team", auth.team_id, limits(*of_team)
    fields = ("model_rpm_limit", "model_tpm_limit")
    of_organization = _of_model(names, *(organization.get(field) for field in fields))
    yield "model_per_organization", getattr(auth, "org_id", None), limits(*of_organization)


# Kinds of subjects besides the key, and their fields: which one, requests and tokens a minute.
_KINDS = tuple(
    (kind, who, f"{prefix}_rpm_limit", f"{prefix}_tpm_limit")
    for kind, who, prefix in (
        ("user", "user_id", "user"),
        ("team", "team_id", "team"),
        ("team_member", "user_id", "team_member"),
        ("end_user", "end_user_id", "end_user"),
        ("organization", "org_id", "organization"),
    )
)


def _no_group(model: str) -> None:
    return None


def subjects(
    auth: Any, requested: str | None, group_of: Callable[[str], str | None] = _no_group
) -> list[Subject]:
    """All that a request of this ``UserAPIKeyAuth`` counts for. requested: the model's name in the
    request. group_of: what a name is an alias of, if it is one; asked where models have limits."""
    found = []
    limited = _key_limits(auth)
    if limited is not None and auth.api_key:
        found.append(Subject("api_key", auth.api_key, limited))
    for kind, which, rpm, tpm in _KINDS:
        requests, tokens = getattr(auth, rpm, None), getattr(auth, tpm, None)
        limited = None if requests is None and tokens is None else limits(requests, tokens)
        if limited is None:
            continue
        who = getattr(auth, which, None)
        if who:
            value = f"{auth.team_id}:{who}" if kind == "team_member" else who
            found.append(Subject(kind, value, limited))
    return found + of_model(auth, requested, group_of) if requested else found


def of_model(
    auth: Any, requested: str, group_of: Callable[[str], str | None] = _no_group
) -> list[Subject]:
    """What a call to this model counts for besides."""
    key, team = auth.metadata or {}, auth.team_metadata or {}
    organization = getattr(auth, "organization_metadata", None) or {}
    if key or team or organization or getattr(auth, "model_max_budget", None):
        return _of_models(auth, key, team, organization, requested, group_of)
    return []


def of_calls(
    auth: Any, models: Mapping[str, int], group_of: Callable[[str], str | None] = _no_group
) -> list[Subject]:
    """subjects() of a request that makes several calls. models: how many to each."""
    several = sum(models.values())
    found = [subject._replace(calls=several) for subject in subjects(auth, None)]
    of_models: dict[tuple[str, str], Subject] = {}
    for model, calls in models.items():
        for subject in of_model(auth, model, group_of):
            known = of_models.get(subject[:2])
            counted = subject._replace(calls=calls)
            if known is not None:  # two names of one group
                both = _least(known.limits, subject.limits)
                counted = subject._replace(calls=calls + known.calls, limits=both)
            of_models[subject[:2]] = counted
    return found + list(of_models.values())


def _of_models(
    auth: Any,
    key: Any,
    team: Any,
    organization: Any,
    requested: str,
    group_of: Callable[[str], str | None],
) -> list[Subject]:
    """Limits of the requested model and of what it stands for; of each group the least, as with
    LiteLLM."""
    found: dict[tuple[str, str], Limits] = {}
    for name in _meant(requested):
        group = group_of(name) or name
        for kind, who, limited in _models(auth, key, team, organization, (name, group)):
            if who and limited is not None:
                identity = kind, f"{who}:{group}"
                known = found.get(identity)
                found[identity] = limited if known is None else _least(known, limited)
    return [Subject(kind, value, limited) for (kind, value), limited in found.items()]


def _least(one: Limits, other: Limits) -> Limits:
    return Limits(
        *(
            min((n for n in both if n is not None), default=None)
            for both in zip(one, other, strict=True)
        )
    )


def _first(deployment: Mapping[str, Any], field: str) -> Any:
    value = deployment.get(field)
    if value is None:
        value = (deployment.get("litellm_params") or {}).get(field)
    return (deployment.get("model_info") or {}).get(field) if value is None else value


def of_deployment(deployment: Mapping[str, Any], per_minute: bool) -> tuple[str, Limits] | None:
    """The id of a deployment and its limits, as LiteLLM looks for them; None where it has none.
    per_minute: whether its rpm and tpm are to be kept, which LiteLLM else takes for weights."""
    params = deployment.get("litellm_params") or {}
    found = limits(
        _first(deployment, "rpm") if per_minute else None,
        _first(deployment, "tpm") if per_minute else None,
        params.get("max_parallel_requests"),
    )
    identity = (deployment.get("model_info") or {}).get("id")
    return (str(identity), found) if found is not None and identity else None
