"""The LiteLLM plugin: LiteLLM's limits hold over all workers of a host, without Redis::

    litellm_settings:
      callbacks: fast_litellm_shm.integrations.litellm.limiter

This covers the limits in LiteLLM's own settings: requests and tokens a minute, and parallel
requests, of keys, users, teams, team members, end users, organizations, of their models, and of
deployments. With FAST_LITELLM_SHM_CLUSTER, they hold over all hosts. And it covers LiteLLM's
budgets. For operators, with all settings: docs/litellm.md.

Without the proxy, :func:`share` does the same for a ``litellm.Router`` in the workers of any
application.
"""

from __future__ import annotations

from typing import Any

from fast_litellm_shm.integrations.litellm.budgets import replacement as budgets
from fast_litellm_shm.integrations.litellm.builtin_limiter import replacement
from fast_litellm_shm.integrations.litellm.limiter import SharedLimiter, found_for, limiter
from fast_litellm_shm.integrations.litellm.router import sharing

__all__ = ["SharedLimiter", "limiter", "share", "unshare"]


def share(router: Any, *, limits: bool = True, state: bool = True) -> None:
    """Have a ``litellm.Router`` share what it counts with other workers of the host.

    limits: ``max_parallel_requests`` of its deployments hold for all workers together. So do
    ``rpm`` and ``tpm``, if the router has ``optional_pre_call_checks=
    ["enforce_model_rate_limits"]``, or ``litellm.fast_litellm_shm = {"deployment_limits": True}``
    is set. state: it picks deployments by what all workers know: cooldowns, requests in flight,
    latencies and usage (docs/litellm.md).

    Call it in each worker, or before they fork; a second call is harmless. It needs no segment yet,
    and never raises: what cannot be shared is logged, and each worker keeps it to itself.
    """
    sharing.share(router, limiter, limits=limits, state=state)


unshare = sharing.unshare


replacement.install(found_for)
budgets.install()
