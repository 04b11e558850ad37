"""Attempts at deployments: ``rpm``, ``tpm`` and ``max_parallel_requests`` of each, for all workers.

One that a limit denies is answered with 429, as LiteLLM's own limits in a worker do; where it is
``max_parallel_requests``, the router may try another deployment of the group.

LiteLLM's own check (``enforce_model_rate_limits``) leaves ``rpm`` and ``tpm`` to us meanwhile. It
has them back with :func:`give_back`, and those of a deployment while its attempts cannot be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import litellm

from fast_litellm_shm.integrations.litellm import calls
from fast_litellm_shm.integrations.litellm.calls import Attempt, Call, Denial, Held
from fast_litellm_shm.integrations.litellm.subjects import Subject, of_deployment, of_model

_quiet: Any = None  # LiteLLM's check whose limits we keep
# Ids of deployments whose newest attempt could not be judged. By deployment, not by context: their
# check may be asked before ours.
_unjudged: set[str] = set()
_MOST_UNJUDGED = 4096


def keeps_per_minute(chosen: bool | None) -> bool:
    """Whether rpm and tpm of deployments are limits. chosen: the setting ``deployment_limits``;
    None: where ``optional_pre_call_checks: ["enforce_model_rate_limits"]`` says so. LiteLLM's check
    then leaves them to us: it counts in each worker, by minutes of the clock, and would deny what
    the host's count has room for."""
    theirs = next(
        (cb for cb in litellm.callbacks if type(cb).__name__ == "ModelRateLimitingCheck"), None
    )
    keeps = theirs is not None if chosen is None else chosen
    if _quiet is not (theirs if keeps else None):
        give_back()
        if keeps:
            _silence(theirs)
    return keeps


def _silence(check: Any) -> None:
    """check: not None. Where it has another way to read limits, it counts besides."""
    global _quiet
    own = getattr(check, "_get_deployment_limits", None)  # (tpm, rpm); its limits by day stay
    if own is not None:

        def left(deployment: Any) -> Any:
            return own(deployment) if _unjudged and _id(deployment) in _unjudged else (None, None)

        check._get_deployment_limits = left
    _quiet = check


def give_back() -> None:
    """LiteLLM's check keeps ``rpm`` and ``tpm`` again."""
    global _quiet
    if _quiet is not None:
        vars(_quiet).pop("_get_deployment_limits", None)
    _quiet = None


def _id(deployment: Mapping[str, Any]) -> str:
    return str((deployment.get("model_info") or {}).get("id"))


def judged(deployment: Mapping[str, Any], by_us: bool) -> None:
    """by_us: False: an attempt at it could not be judged, and passes: LiteLLM's check keeps its
    limits until one can, each worker for itself, so that no deployment is without any."""
    if not by_us:
        if len(_unjudged) >= _MOST_UNJUDGED:
            _unjudged.clear()
        _unjudged.add(_id(deployment))
    elif _unjudged:
        _unjudged.discard(_id(deployment))


def begin(
    deployment: Mapping[str, Any], per_minute: bool, call: Call | None
) -> Attempt | Denial | None:
    """Admit an attempt. call: of which it is one, if that is known; else it counts as one token
    until its tokens are known, so that it passes while the deployment has any left, as with
    LiteLLM's own check. None where the deployment has no limits."""
    subject = subject_of(deployment, per_minute)
    if subject is None:
        return None
    return begun(subject, calls.admit([subject], tokens_of(subject, call)), call)


def counts_alone(deployment: Mapping[str, Any], call: Call) -> bool:
    """Whether an attempt counts for its deployment only: :func:`also_counts` has nothing to do then
    but to count it."""
    model = deployment.get("model_name")
    named = model in call.guess.made.models or not isinstance(model, str) or call.by is None
    return named and call.free is None


async def also_counts(
    deployment: Mapping[str, Any], call: Call, group_of: Callable[[str], str | None]
) -> Denial | None:
    """What an attempt counts for besides its deployment: a model that the request did not name, but
    falls back to, has limits too; and where the client asks for more tries than the router makes,
    each of them is another request."""
    call.tries += 1
    if call.free is not None and call.tries > call.free:
        denial = call.held.count_try()
        if denial is not None:
            return denial
    model = deployment.get("model_name")
    if not isinstance(model, str) or model in call.guess.made.models or call.by is None:
        return None
    known = call.counts_for()
    more = [s for s in of_model(call.by, model, group_of) if s[:2] not in known]
    if not more:
        return None
    least = min((s.limits.tpm for s in more if s.limits.tpm), default=None)
    admitted = await calls.admit_async(more, 0 if least is None else call.guess.within(least))
    if isinstance(admitted, Denial):
        return admitted
    call.more.append(Held(more, admitted))
    return None


def subject_of(deployment: Mapping[str, Any], per_minute: bool) -> Subject | None:
    found = of_deployment(deployment, per_minute)
    return None if found is None else Subject("deployment", *found)


def tokens_of(subject: Subject, call: Call | None) -> int:
    limit = subject.limits.tpm
    if not limit:
        return 0
    return 1 if call is None else call.guess.within(limit)


def begun(subject: Subject, admitted: calls.Admitted, call: Call | None) -> Attempt | Denial:
    if isinstance(admitted, Denial):
        return admitted
    attempt = Attempt(subject.value, Held([subject], admitted))
    if call is not None:
        call.attempts.append(attempt)
    return attempt
