"""The subjects that a request counts for (its key, user, team, ...), and the limits of each, read
from LiteLLM's own objects: ``UserAPIKeyAuth`` and deployments."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

GroupOf: TypeAlias = Callable[[str], "str | None"]  # a model's name -> what it is an alias of


def _itself(model: str) -> tuple[str, ...]:
    return (model,)


# A model, and the model that a "-latest" name of LiteLLM's price table stands for.
expand_latest: Callable[[str], tuple[str, ...]] = _itself
with contextlib.suppress(ImportError):  # a release of LiteLLM that has no such names
    from litellm.litellm_core_utils import model_latest_aliases

    expand_latest = model_latest_aliases.expand_model_latest_alias

# A larger number means "unlimited": one host reaches none of these.
_MOST_A_MINUTE = 2**31 - 1
_MOST_PARALLEL = 100_000


class Limits(NamedTuple):
    """Requests and tokens a minute, and calls in parallel. None: no limit; 0: nothing is
    admitted."""

    rpm: int | None = None
    tpm: int | None = None
    max_parallel: int | None = None

    @property
    def zero(self) -> str | None:
        """The name of the first limit of 0; None where there is none."""
        if 0 not in self:
            return None
        return next((name for name in self._fields if getattr(self, name) == 0), None)


class Subject(NamedTuple):
    """kind: LiteLLM's name of it, as in its headers: ``api_key``, ``user``, ``team``,
    ``team_member``, ``end_user``, ``organization``, ``model_per_key``, ``model_per_team``,
    ``model_per_organization``; or ``deployment``. value: its id. calls: how many calls of the
    request count for it."""

    kind: str
    value: str
    limits: Limits
    calls: int = 1


def _whole(value: Any, most: int) -> int | None:
    """A limit, which may be written as text. None: unlimited."""
    if value is None:
        return None
    number = int(value)
    return None if number > most else max(number, 0)


@functools.lru_cache(maxsize=1024)  # each request brings the limits of its key and team again
def limits(rpm: Any = None, tpm: Any = None, max_parallel: Any = None) -> Limits | None:
    """None where nothing is limited. Raises ValueError or TypeError for what is not a number."""
    found = Limits(
        _whole(rpm, _MOST_A_MINUTE),
        _whole(tpm, _MOST_A_MINUTE),
        _whole(max_parallel, _MOST_PARALLEL),
    )
    return None if found == Limits() else found


def _key_limits(auth: Any) -> Limits | None:
    """Of the key itself, reduced where its budget throttles it. A limit of the type ``dynamic`` is
    left to LiteLLM, which lets the key exceed it while the model has no failures."""
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


def _of_name(names: tuple[str, str], source: Any) -> Any:
    """What a dict by model says of the requested name, else of its group."""
    return None if not source else source.get(names[0], source.get(names[1]))


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
    """The limits of a model, for a key (else for its team) and for its organization, from the
    metadata of each. names: the requested name, and its group."""
    of_key, of_team, of_organization = [], [], []
    for field in ("model_rpm_limit", "model_tpm_limit"):
        own = _of_name(names, key.get(field) or _budgeted(auth, field.removeprefix("model_")))
        of_key.append(own)
        of_team.append(_of_name(names, team.get(field)) if own is None else None)
        of_organization.append(_of_name(names, organization.get(field)))
    yield "model_per_key", auth.api_key, limits(*of_key)
    yield "model_per_team", auth.team_id, limits(*of_team)
    yield "model_per_organization", getattr(auth, "org_id", None), limits(*of_organization)


# The kinds of subjects besides the key, the field of their id, and where _NUMBERS has theirs.
_KINDS = (
    ("user", "user_id", 0),
    ("team", "team_id", 2),
    ("team_member", "user_id", 4),
    ("end_user", "end_user_id", 6),
    ("organization", "org_id", 8),
)
# For each kind: requests and tokens a minute.
_NUMBERS = tuple(f"{kind}_{unit}_limit" for kind, _, _ in _KINDS for unit in ("rpm", "tpm"))
_numbers_of_kinds = operator.attrgetter(*_NUMBERS)  # read at once: half the time


def _no_group(model: str) -> None:
    return None


def subjects(auth: Any, requested: str | None, group_of: GroupOf = _no_group) -> list[Subject]:
    """All subjects with limits that a request of this ``UserAPIKeyAuth`` counts for. requested: the
    model's name in the request. group_of is called only where a model has limits."""
    found = []
    limited = _key_limits(auth)
    if limited is not None and auth.api_key:
        found.append(Subject("api_key", auth.api_key, limited))
    try:
        numbers = _numbers_of_kinds(auth)
    except AttributeError:  # a release of LiteLLM that has not all of them
        numbers = tuple(getattr(auth, field, None) for field in _NUMBERS)
    for kind, id_field, at in _KINDS:
        requests, tokens = numbers[at], numbers[at + 1]
        if requests is None and tokens is None:
            continue
        limited = limits(requests, tokens)
        if limited is None:
            continue
        identity = getattr(auth, id_field, None)
        if identity:
            value = f"{auth.team_id}:{identity}" if kind == "team_member" else identity
            found.append(Subject(kind, value, limited))
    return found + of_model(auth, requested, group_of) if requested else found


def of_model(auth: Any, requested: str, group_of: GroupOf = _no_group) -> list[Subject]:
    """The subjects of a call to this model alone: model_per_key, model_per_team,
    model_per_organization. "-latest" names count for themselves and for the model that they stand
    for. Several names of one group: the smallest limits hold, as with LiteLLM."""
    key, team = auth.metadata or {}, auth.team_metadata or {}
    organization = getattr(auth, "organization_metadata", None) or {}
    if not (key or team or organization or getattr(auth, "model_max_budget", None)):
        return []
    found: list[Subject] = []
    for name in expand_latest(requested):
        group = group_of(name) or name
        for kind, identity, limited in _models(auth, key, team, organization, (name, group)):
            if identity and limited is not None:
                found.append(Subject(kind, f"{identity}:{group}", limited))
    return _merged(found)


def of_calls(auth: Any, models: Mapping[str, int], group_of: GroupOf = _no_group) -> list[Subject]:
    """:func:`subjects` of a request that makes several calls. models: how many to each."""
    several = sum(models.values())
    found = [subject._replace(calls=several) for subject in subjects(auth, None)]
    return found + _merged(
        (
            subject._replace(calls=calls)
            for model, calls in models.items()
            for subject in of_model(auth, model, group_of)
        ),
        add_calls=True,
    )


def _merged(found: Iterable[Subject], add_calls: bool = False) -> list[Subject]:
    """Each subject once, with the smallest of its limits."""
    out: dict[tuple[str, str], Subject] = {}
    for subject in found:
        known = out.setdefault(subject[:2], subject)
        if known is not subject:
            least = _least(known.limits, subject.limits)
            calls = known.calls + subject.calls if add_calls else subject.calls
            out[subject[:2]] = subject._replace(limits=least, calls=calls)
    return list(out.values())


def _least(one: Limits, other: Limits) -> Limits:
    given = ([n for n in both if n is not None] for both in zip(one, other, strict=True))
    return Limits(*(min(both, default=None) for both in given))


def _first(field: str, *places: Mapping[str, Any]) -> Any:
    for place in places:
        value = place.get(field)
        if value is not None:
            return value
    return None


def id_of_deployment(deployment: Mapping[str, Any]) -> str:
    return str((deployment.get("model_info") or {}).get("id"))


def of_deployment(deployment: Mapping[str, Any], per_minute: bool) -> Subject | None:
    """A deployment as a subject; None where it has no limits, or no id. per_minute: whether its rpm
    and tpm are limits; else they are LiteLLM's weights for routing."""
    params, info = deployment.get("litellm_params") or {}, deployment.get("model_info") or {}
    found = limits(
        _first("rpm", deployment, params, info) if per_minute else None,
        _first("tpm", deployment, params, info) if per_minute else None,
        params.get("max_parallel_requests"),
    )
    identity = info.get("id")
    return Subject("deployment", str(identity), found) if found is not None and identity else None
