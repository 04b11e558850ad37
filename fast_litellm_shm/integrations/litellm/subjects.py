"""The subjects that a request counts for (its key, user, team, ...), and the limits of each, read
from LiteLLM's own objects: ``UserAPIKeyAuth`` and deployments."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
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


class Subjects(tuple[Subject, ...]):
    """What a request counts for. Equal requests nearly always have this very object, so what is
    found of it is kept in it.

    prepared: of :func:`.admission.admit_here`."""

    prepared: Any = None

    @functools.cached_property
    def least_tokens(self) -> int:
        """The smallest limit of tokens; 0: there is none."""
        return min((each.limits.tpm for each in self if each.limits.tpm), default=0)

    @functools.cached_property
    def limits_of(self) -> dict[tuple[str, str], Limits]:
        """The limits, by kind and value."""
        return {subject[:2]: subject.limits for subject in self}


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


# The kinds of subjects besides the key, and the field of their id.
_KINDS = (
    ("user", "user_id"),
    ("team", "team_id"),
    ("team_member", "user_id"),
    ("end_user", "end_user_id"),
    ("organization", "org_id"),
)
# For each kind: requests and tokens a minute.
_NUMBERS = tuple(f"{kind}_{unit}_limit" for kind, _ in _KINDS for unit in ("rpm", "tpm"))

# What its subjects depend on, where no table below has a limit.
_FACTS = (
    *("api_key", "rpm_limit", "tpm_limit", "max_parallel_requests", "budget_throttle_pct"),
    *_NUMBERS,
    *dict.fromkeys(("team_id", *(field for _, field in _KINDS))),
)
# Tables of a key, its team, its organization, and of its budgets by model; and the fields of the
# first three that limit anything.
_TABLES = ("metadata", "team_metadata", "organization_metadata", "model_max_budget")
_LIMITING = frozenset(("rpm_limit_type", "tpm_limit_type", "model_rpm_limit", "model_tpm_limit"))
_facts_of, _tables_of = operator.attrgetter(*_FACTS), operator.attrgetter(*_TABLES)


def _no_group(model: str) -> None:
    return None


def subjects(auth: Any, requested: str | None, group_of: GroupOf = _no_group) -> Subjects:
    """All subjects with limits that a request of this ``UserAPIKeyAuth`` counts for. requested: the
    model's name in the request. group_of is called only where a model has limits."""
    try:
        key, team, organization, budgets = _tables_of(auth)
        limiting = _LIMITING
        if (
            not (key and not limiting.isdisjoint(key))
            and not (team and not limiting.isdisjoint(team))
            and not (organization and not limiting.isdisjoint(organization))
            and not budgets
        ):
            return _by_facts(_facts_of(auth))
    except (AttributeError, TypeError, ValueError):  # a release of LiteLLM that has not all of them
        pass  # or a limit that is no number
    found = _own(auth)
    return Subjects(found + of_model(auth, requested, group_of) if requested else found)


@functools.lru_cache(maxsize=4096)  # each request brings all that is known of its key again
def _by_facts(facts: tuple[Any, ...]) -> Subjects:
    return Subjects(_own(SimpleNamespace(metadata=None, **dict(zip(_FACTS, facts, strict=True)))))


def _own(auth: Any) -> list[Subject]:
    """Those that have limits whatever the model is."""
    found = []
    limited = _key_limits(auth)
    if limited is not None and auth.api_key:
        found.append(Subject("api_key", auth.api_key, limited))
    for kind, id_field in _KINDS:
        given = (getattr(auth, f"{kind}_{unit}_limit", None) for unit in ("rpm", "tpm"))
        limited = limits(*given)
        if limited is None:
            continue
        identity = getattr(auth, id_field, None)
        if identity:
            value = f"{auth.team_id}:{identity}" if kind == "team_member" else identity
            found.append(Subject(kind, value, limited))
    return found


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


def of_calls(auth: Any, models: Mapping[str, int], group_of: GroupOf = _no_group) -> Subjects:
    """:func:`subjects` of a request that makes several calls. models: how many to each."""
    several = sum(models.values())
    found = [subject._replace(calls=several) for subject in subjects(auth, None)]
    of_models = (
        subject._replace(calls=calls)
        for model, calls in models.items()
        for subject in of_model(auth, model, group_of)
    )
    return Subjects(found + _merged(of_models, add_calls=True))


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


def of_deployment(deployment: Mapping[str, Any], per_minute: bool) -> Subjects:
    """A deployment as the one subject of an attempt at it; none where it has no limits, or no id.
    per_minute: whether its rpm and tpm are limits; else they are LiteLLM's weights for routing."""
    params, info = deployment.get("litellm_params") or {}, deployment.get("model_info") or {}
    identity = info.get("id")
    return _deployment(
        str(identity) if identity else None,
        _first("rpm", deployment, params, info) if per_minute else None,
        _first("tpm", deployment, params, info) if per_minute else None,
        params.get("max_parallel_requests"),
    )


@functools.lru_cache(maxsize=1024)
def _deployment(identity: str | None, *given: Any) -> Subjects:
    found = limits(*given)
    if found is None or not identity:
        return Subjects()
    return Subjects([Subject("deployment", identity, found)])
