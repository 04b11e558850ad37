"""Attempts at deployments: ``rpm``, ``tpm`` and ``max_parallel_requests`` of each, for all workers.

One that a limit denies is answered with 429, as LiteLLM's own limits in a worker do; where it is
``max_parallel_requests``, the router may try another deployment of the group.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import litellm

from fast_litellm_shm.integrations.litellm import calls
from fast_litellm_shm.integrations.litellm.calls import Attempt, Call, Denial, Held
from fast_litellm_shm.integrations.litellm.subjects import Subject, of_deployment

_quiet: Any = None  # LiteLLM's check whose limits we keep


def keeps_per_minute(chosen: bool | None) -> bool:
    """Whether rpm and tpm of deployments are limits. chosen: the setting ``deployment_limits``;
    None: where ``optional_pre_call_checks: ["enforce_model_rate_limits"]`` says so. LiteLLM's check
    then leaves them to us: it counts in each worker, by minutes of the clock, and would deny what
    the host's count has room for."""
    theirs = next(
        (cb for cb in litellm.callbacks if type(cb).__name__ == "ModelRateLimitingCheck"), None
    )
    if chosen is False or (chosen is None and theirs is None):
        return False
    _silence(theirs)
    return True


def _silence(check: Any) -> None:
    global _quiet
    if check is None or check is _quiet:
        return
    if hasattr(check, "_get_deployment_limits"):  # (tpm, rpm); its limits by day stay
        check._get_deployment_limits = _no_limits
    _quiet = check


def _no_limits(deployment: Any) -> tuple[None, None]:
    return None, None


def begin(
    deployment: Mapping[str, Any], per_minute: bool, call: Call | None
) -> Attempt | Denial | None:
    """Admit an attempt. call: of which it is one, if that is known; else its tokens are booked when
    they are. None where the deployment has no limits."""
    subject = _subject(deployment, per_minute)
    if subject is None:
        return None
    return _begun(subject, calls.admit([subject], _tokens(subject, call)), call)


async def begin_async(
    deployment: Mapping[str, Any], per_minute: bool, call: Call | None
) -> Attempt | Denial | None:
    """begin(), which never makes an event loop wait."""
    subject = _subject(deployment, per_minute)
    if subject is None:
        return None
    return _begun(subject, await calls.admit_async([subject], _tokens(subject, call)), call)


def _subject(deployment: Mapping[str, Any], per_minute: bool) -> Subject | None:
    found = of_deployment(deployment, per_minute)
    return None if found is None else Subject("deployment", *found)


def _tokens(subject: Subject, call: Call | None) -> int:
    limit = subject.limits.tpm
    return call.guess.within(limit) if limit and call is not None else 0


def _begun(subject: Subject, admitted: calls.Admitted, call: Call | None) -> Attempt | Denial:
    if isinstance(admitted, Denial):
        return admitted
    attempt = Attempt(subject.value, Held([subject], admitted))
    if call is not None:
        call.attempts.append(attempt)
    return attempt
