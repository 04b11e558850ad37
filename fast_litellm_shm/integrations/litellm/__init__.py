"""LiteLLM on many workers without Redis: one line of its configuration makes every limit what it
says, over all workers of the host::

    litellm_settings:
      callbacks: fast_litellm_shm.integrations.litellm.limiter

Limits of keys, users, teams, team members, end users, organizations and of their models (requests
and tokens a minute, and parallel requests of a key), as LiteLLM's own settings give them, and of
deployments. With FAST_LITELLM_SHM_CLUSTER, over all hosts. What else can be set:
:mod:`fast_litellm_shm.integrations.litellm.settings`. For operators: docs/litellm.md.

Without the proxy, :func:`share` does it for a ``litellm.Router`` in workers of any app.
"""

from __future__ import annotations

from typing import Any

from fast_litellm_shm.integrations.litellm.builtin_limiter import replacement
from fast_litellm_shm.integrations.litellm.limiter import SharedLimiter, found_for, limiter
from fast_litellm_shm.integrations.litellm.router import sharing

__all__ = ["SharedLimiter", "limiter", "share", "unshare"]


def share(router: Any, *, limits: bool = True, state: bool = True) -> None:
    """Have a ``litellm.Router`` share what it counts with those of other workers of the host.

    limits: ``max_parallel_requests`` of its deployments hold for all workers together; so do
    ``rpm`` and ``tpm``, where the router has ``optional_pre_call_checks=
    ["enforce_model_rate_limits"]`` or ``litellm.fast_litellm_shm = {"deployment_limits": True}`` is
    set. state: it picks deployments by what all workers know: cooldowns, requests in flight,
    latencies and usage (:mod:`.router.sharing` has the details).

    Call it in each worker, or before they fork; again is harmless. Needs no segment yet, and never
    raises: what cannot be shared is told in the log, and stays with each worker.
    """
    sharing.share(router, limiter, limits=limits, state=state)


def unshare(router: Any) -> None:
    """Undo :func:`share`: the router has the very objects back that it had."""
    sharing.unshare(router)


replacement.install(found_for)
