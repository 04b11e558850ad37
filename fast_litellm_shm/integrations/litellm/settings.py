"""What the operator has set, in LiteLLM's own configuration file::

    litellm_settings:
      callbacks: fast_litellm_shm.integrations.litellm.limiter
      fast_litellm_shm:          # all of it may be left out
        mode: hooks
        fail_open: true
        router_state: false
        deployment_limits: null
        cluster: null

LiteLLM sets what it finds under ``litellm_settings`` as attributes of its module, so this reads
``litellm.fast_litellm_shm``, which users of the SDK may set themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import litellm

from fast_litellm_shm._shared import settings
from fast_litellm_shm.cluster import settings as cluster_settings
from fast_litellm_shm.cluster.settings import Cluster

ATTRIBUTE = "fast_litellm_shm"
MODES = ("hooks", "native")


@dataclass(frozen=True)
class Settings:
    """mode: ``hooks`` (this package's limits, by LiteLLM's documented hooks) or ``native``
    (LiteLLM's own limiter, over our store). fail_open: a request that cannot be judged passes;
    false: it is refused with 503. router_state: in-flight requests, latencies, usage and cooldowns
    of deployments are shared. deployment_limits: whether ``rpm`` and ``tpm`` of deployments are
    enforced; None: where ``enforce_model_rate_limits`` asks LiteLLM to. cluster: the URL of a Redis
    or Valkey, over which limits hold for many hosts (mode ``hooks``); None: what
    FAST_LITELLM_SHM_CLUSTER says, else this host alone."""

    mode: str = "hooks"
    fail_open: bool = True
    router_state: bool = False
    deployment_limits: bool | None = None
    cluster: str | None = field(default=None, repr=False)  # it may have a password


_DEFAULTS = Settings()
_of_litellm = vars(litellm)
_read: tuple[Any, Settings] = (None, _DEFAULTS)


def current() -> Settings:
    """The settings in force. What is wrong in them is told in one warning that names the field and
    the value, and its default applies: a worker must not die of a setting."""
    global _read
    # not getattr(): what litellm does not have, it looks for among its lazy imports, each time
    given = _of_litellm.get(ATTRIBUTE)
    if given is not _read[0]:
        _read = given, _checked(given)
    return _read[1]


def cluster() -> Cluster | Literal[False]:
    """The server that keeps the limits for many hosts; False: they are this host's. Where it cannot
    be used, that is told once, and this host counts alone: else every request would pass, or none.
    """
    try:
        found = cluster_settings.found(current().cluster)
        if found is not None:
            found.check()
            return found
    except (ImportError, TypeError, ValueError) as error:
        settings.warn_once(f"limits count on this host alone, not over many: {error}")
    return False


def _checked(given: Any) -> Settings:
    where = f"litellm_settings.{ATTRIBUTE}"
    if given is None:
        return _DEFAULTS
    if not isinstance(given, dict):
        settings.warn_once(f"{where} must be a mapping, not {given!r}; the defaults apply")
        return _DEFAULTS
    known = {field.name: field.default for field in fields(Settings)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name not in known:
            settings.warn_once(
                f"{where}: there is no {name!r}, it is ignored; known are {', '.join(known)}"
            )
        elif name == "mode" and value not in MODES:
            settings.warn_once(
                f"{where}.mode must be one of {', '.join(MODES)}, not {value!r}; "
                f"{known['mode']} applies"
            )
        elif name == "cluster":
            found[name] = _url(f"{where}.{name}", value)
        elif name != "mode" and not isinstance(value, bool) and value is not known[name]:
            settings.warn_once(
                f"{where}.{name} must be true or false, not {value!r}; {known[name]} applies"
            )
        else:
            found[name] = value
    return Settings(**found)


def _url(where: str, value: Any) -> str | None:
    if value is None:
        return None
    consequence = "what FAST_LITELLM_SHM_CLUSTER says applies, else each host counts alone"
    if not isinstance(value, str):
        settings.warn_once(f"{where} must be a URL, not {value!r}; {consequence}")
        return None
    try:
        cluster_settings.found(value)
    except ValueError as error:
        settings.warn_once(f"{where}: {error}; {consequence}")
        return None
    return value
