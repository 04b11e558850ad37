"""Whom a request counts for, and what each of them may: LiteLLM's own settings, read from its own
objects (``UserAPIKeyAuth``, deployments)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

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
    ``model_per_organization``. value: which one."""

    kind: str
    value: str
    limits: Limits


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


def _models(auth: Any, requested: str, group: str) -> Iterator[tuple[str, Any, Limits | None]]:
    """Limits of the requested model, of a key (else of its team) and of its organization."""
    names = requested, group
    key, team = auth.metadata or {}, auth.team_metadata or {}
    organization = getattr(auth, "organization_metadata", None) or {}
    if not (key or team or organization or getattr(auth, "model_max_budget", None)):
        return
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


def subjects(auth: Any, requested: str | None, group: str | None = None) -> list[Subject]:
    """All that a request of this ``UserAPIKeyAuth`` counts for. requested: the model's name in the
    request; group: what that is an alias of, if it is one."""
    found = [
        ("api_key", auth.api_key, _key_limits(auth)),
        ("user", auth.user_id, limits(auth.user_rpm_limit, auth.user_tpm_limit)),
        ("team", auth.team_id, limits(auth.team_rpm_limit, auth.team_tpm_limit)),
        (
            "team_member",
            f"{auth.team_id}:{auth.user_id}" if auth.user_id else None,
            limits(auth.team_member_rpm_limit, auth.team_member_tpm_limit),
        ),
        (
            "end_user",
            auth.end_user_id,
            limits(auth.end_user_rpm_limit, auth.end_user_tpm_limit),
        ),
        (
            "organization",
            getattr(auth, "org_id", None),
            limits(
                getattr(auth, "organization_rpm_limit", None),
                getattr(auth, "organization_tpm_limit", None),
            ),
        ),
    ]
    if requested:
        model = group or requested
        found += [
            (kind, f"{who}:{model}" if who else None, limited)
            for kind, who, limited in _models(auth, requested, model)
        ]
    return [Subject(kind, who, of) for kind, who, of in found if who and of is not None]


def _first(deployment: Mapping[str, Any], field: str) -> Any:
    for place in (
        deployment,
        deployment.get("litellm_params") or {},
        deployment.get("model_info") or {},
    ):
        value = place.get(field)
        if value is not None:
            return value
    return None


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
