"""The plugin's settings, in LiteLLM's own configuration file::

    litellm_settings:
      callbacks: fast_litellm_shm.integrations.litellm.limiter
      fast_litellm_shm:          # all of it may be left out
        mode: hooks
        fail_open: true
        router_state: false
        deployment_limits: null
        cluster: null
        queue: null
        budgets: true

LiteLLM sets what it finds under ``litellm_settings`` as attributes of its module. So the plugin
reads ``litellm.fast_litellm_shm``, which programs without the proxy may set themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import litellm

from fast_litellm_shm._shared.settings import warn_once
from fast_litellm_shm.cluster import settings as cluster_settings
from fast_litellm_shm.cluster.settings import Cluster

ATTRIBUTE = "fast_litellm_shm"
MODES = ("hooks", "native")
_MOST_WAIT = 3600  # seconds


@dataclass(frozen=True)
class Queue:
    """max_wait: seconds that a request may wait for its turn. priority_of: -100 .. 100 by the names
    that :func:`.queue.priority_of` looks up; higher is first, and what has no name there has 0."""

    max_wait: float = 20.0
    priority_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """mode: ``hooks``: the plugin counts, called by LiteLLM's documented hooks; ``native``:
    LiteLLM's built-in limiter counts, in the segment. fail_open: a request that cannot be checked
    passes; false: it is refused with 503. router_state: workers share requests in flight,
    latencies, usage and cooldowns of deployments. deployment_limits: whether ``rpm`` and ``tpm`` of
    deployments are limits; None: if ``enforce_model_rate_limits`` is set. cluster: the URL of a
    Redis or Valkey, so that limits hold over many hosts (mode ``hooks`` only); None:
    FAST_LITELLM_SHM_CLUSTER, else this host alone. queue: requests beyond a limit wait (mode
    ``hooks`` only); None: they are denied. budgets: LiteLLM's budgets hold over all workers of the
    host; false: in each worker."""

    mode: str = "hooks"
    fail_open: bool = True
    router_state: bool = False
    deployment_limits: bool | None = None
    cluster: str | None = field(default=None, repr=False)  # it may contain a password
    queue: Queue | None = None
    budgets: bool = True


_DEFAULTS = Settings()
_of_litellm = vars(litellm)
_read: tuple[Any, Settings] = (None, _DEFAULTS)


def current() -> Settings:
    """The settings in force. Where one is wrong, one warning names it and its value, and the
    default applies: a worker must not die of a setting."""
    global _read
    # not getattr(): what litellm does not have, it looks for among its lazy imports each time
    given = _of_litellm.get(ATTRIBUTE)
    if given is not _read[0]:
        _read = given, _checked(given)
    return _read[1]


def cluster() -> Cluster | Literal[False]:
    """The server that keeps the limits of many hosts; False: limits are of this host. Where the
    server cannot be used (a bad URL, no redis library), one warning says so and this host counts
    alone: else every request would pass, or none."""
    try:
        found = cluster_settings.found(current().cluster)
        if found is not None:
            found.check()
            return found
    except (ImportError, TypeError, ValueError) as error:
        warn_once("limits count on this host alone, not over many", error)
    return False


def _checked(given: Any) -> Settings:
    where = f"litellm_settings.{ATTRIBUTE}"
    if given is None:
        return _DEFAULTS
    if not isinstance(given, dict):
        warn_once(f"{where} must be a mapping, not {given!r}; the defaults apply")
        return _DEFAULTS
    defaults = {field.name: field.default for field in fields(Settings)}
    found: dict[str, Any] = {}
    for name, value in given.items():
        default = defaults.get(name)
        if name not in defaults:
            warn_once(
                f"{where}: there is no {name!r}, it is ignored; known are {', '.join(defaults)}"
            )
        elif name == "cluster":
            found[name] = _url(f"{where}.{name}", value)
        elif name == "queue":
            found[name] = _queue(f"{where}.{name}", value)
        elif value in MODES if name == "mode" else isinstance(value, bool) or value is default:
            found[name] = value
        else:
            wanted = f"one of {', '.join(MODES)}" if name == "mode" else "true or false"
            warn_once(f"{where}.{name} must be {wanted}, not {value!r}; {default} applies")
    return Settings(**found)


def _queue(where: str, value: Any) -> Queue | None:
    if value is None:
        return None
    try:
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping, such as {{max_wait: 20}}, not {value!r}")
        odd = value.keys() - {"max_wait", "priority_of"}
        if odd:
            raise ValueError(f"has no {min(odd, key=str)!r}; known are max_wait, priority_of")
        max_wait, priorities = value.get("max_wait", 20.0), value.get("priority_of") or {}
        if not _is_number(max_wait) or not 0 < max_wait <= _MOST_WAIT:
            raise ValueError(
                f"max_wait must be a number of seconds up to {_MOST_WAIT}, not {max_wait!r}"
            )
        if not isinstance(priorities, dict):
            raise ValueError(f"priority_of must be a mapping, not {priorities!r}")
        for name, priority in priorities.items():
            if type(priority) is not int or not -100 <= priority <= 100:
                raise ValueError(
                    f"priority_of: {name!r} must have a whole number from -100 to 100, not "
                    f"{priority!r}"
                )
    except ValueError as error:
        warn_once(f"{where}: {error}; requests beyond a limit are denied, and do not wait")
        return None
    return Queue(float(max_wait), {str(name): n for name, n in priorities.items()})


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _url(where: str, value: Any) -> str | None:
    if value is None:
        return None
    otherwise = "FAST_LITELLM_SHM_CLUSTER applies, else each host counts alone"
    if not isinstance(value, str):
        warn_once(f"{where} must be a URL, not {value!r}; {otherwise}")
        return None
    try:
        cluster_settings.found(value)
    except ValueError as error:
        warn_once(f"{where}: {error}; {otherwise}")
        return None
    return value
