"""Attempts at deployments: ``rpm``, ``tpm`` and ``max_parallel_requests`` of each, for all workers.

An attempt that a limit denies is answered with 429, as LiteLLM's own limits of one worker answer.
Where the limit is ``max_parallel_requests``, the router may try another deployment of the group.

Meanwhile LiteLLM's own check (``enforce_model_rate_limits``) leaves ``rpm`` and ``tpm`` to the
plugin. It keeps them again after :func:`restore_check`, and for a deployment whose attempts could
not be checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import litellm

from fast_litellm_shm.integrations.litellm import admission, settings
from fast_litellm_shm.integrations.litellm.admission import Admissions, Denial
from fast_litellm_shm.integrations.litellm.calls import Attempt, Call
from fast_litellm_shm.integrations.litellm.subjects import (
    GroupOf,
    Subjects,
    id_of_deployment,
    of_deployment,
    of_model,
)

_silenced: Any = None  # LiteLLM's check, where the plugin keeps its limits
# Ids of deployments whose newest attempt could not be checked. By deployment, not by context:
# LiteLLM's check may be called before ours.
_unchecked: set[str] = set()
_MOST_UNCHECKED = 4096


def _keeps_per_minute() -> bool:
    """Whether rpm and tpm of deployments are limits, by the setting ``deployment_limits``; None:
    where ``optional_pre_call_checks`` has ``enforce_model_rate_limits``. LiteLLM's check then
    leaves them to the plugin: it counts in each worker, by minutes of the clock, and would deny
    what the host has room for."""
    chosen = settings.current().deployment_limits
    check = None
    for callback in litellm.callbacks:
        if type(callback).__name__ == "ModelRateLimitingCheck":
            check = callback
            break
    keeps = check is not None if chosen is None else chosen
    if _silenced is not (check if keeps else None):
        restore_check()
        if keeps:
            _silence(check)
    return keeps


def _silence(check: Any) -> None:
    """A release of LiteLLM whose check reads its limits in another way counts besides."""
    global _silenced
    own = getattr(check, "_get_deployment_limits", None)  # (tpm, rpm). Limits by day stay
    if own is not None:

        def left(deployment: Any) -> Any:
            unchecked = _unchecked and id_of_deployment(deployment) in _unchecked
            return own(deployment) if unchecked else (None, None)

        check._get_deployment_limits = left
    _silenced = check


def restore_check() -> None:
    """LiteLLM's check keeps ``rpm`` and ``tpm`` again."""
    global _silenced
    if _silenced is not None:
        vars(_silenced).pop("_get_deployment_limits", None)
    _silenced = None


def note(deployment: Mapping[str, Any], checked: bool) -> None:
    """Whether an attempt at the deployment could be checked. One that could not passes, and
    LiteLLM's check keeps the deployment's limits in each worker until one can: so no deployment is
    without limits."""
    if not checked:
        if len(_unchecked) >= _MOST_UNCHECKED:
            _unchecked.clear()
        _unchecked.add(id_of_deployment(deployment))
    elif _unchecked:
        _unchecked.discard(id_of_deployment(deployment))


def subjects_of(deployment: Mapping[str, Any]) -> Subjects:
    """What an attempt at the deployment counts for; empty where that has no limits."""
    return of_deployment(deployment, _keeps_per_minute())


def is_named(deployment: Mapping[str, Any], call: Call) -> bool:
    """Whether an attempt is at a model that its request named, and is charged for."""
    model = deployment.get("model_name")
    return not isinstance(model, str) or model in call.estimate.calls.models or call.auth is None


async def charge_request(
    deployment: Mapping[str, Any], call: Call, group_of: GroupOf
) -> Denial | None:
    """Charge what an attempt adds to its request: a model that the request did not name, but falls
    back to, has limits of its own; and where the client asks for more tries than the router makes,
    each of them is another request."""
    if call.free_tries is not None and call.tries > call.free_tries:
        denial = call.admissions.count_try()
        if denial is not None:
            return denial
    if is_named(deployment, call):
        return None
    known, found = call.counts_for(), of_model(call.auth, deployment["model_name"], group_of)
    more = Subjects(subject for subject in found if subject[:2] not in known)
    if not more:
        return None
    admitted = await admission.admit_async(more, call.estimate.for_subjects(more))
    if isinstance(admitted, Denial):
        return admitted
    call.fallbacks.append(admitted)
    return None


def tokens_of(subjects: Subjects, call: Call | None) -> int:
    """What an attempt is charged. call: the request that makes it, where that is known. Else it is
    one token until its usage is known: it passes while the deployment has any left, as with
    LiteLLM's own check."""
    if call is None:
        return 1 if subjects.least_tokens else 0
    return call.estimate.for_subjects(subjects)


def begun(admitted: Admissions | Denial, call: Call | None) -> Attempt | Denial:
    """The attempt that was admitted, as one of its request."""
    if isinstance(admitted, Denial):
        return admitted
    attempt = Attempt(admitted.subjects[0].value, admitted)
    if call is not None:
        call.attempts.append(attempt)
    return attempt
