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
    found = of_deployment(deployment, per_minute)
    if found is None:
        return None
    identity, limits = found
    tokens = call.guess.within(limits.tpm) if limits.tpm and call is not None else 0
    subject = Subject("deployment", identity, limits)
    admitted = calls.admit([subject], tokens)
    if isinstance(admitted, Denial):
        return admitted
    attempt = Attempt(identity, Held([subject], admitted))
    if call is not None:
        call.attempts.append(attempt)
    return attempt
