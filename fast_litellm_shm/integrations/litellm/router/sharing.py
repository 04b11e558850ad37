"""Has a ``litellm.Router`` share its state with those of other workers, and undoes that.

A router keeps what it learns of its deployments in its process. Two of its stores are wrapped by
shared ones, and nothing else is changed: LiteLLM's own code still picks the deployment, by its own
rules and settings, in asynchronous and synchronous calls. It then knows from all workers of the
host:

- cooldowns, and the failures that lead to one (``allowed_fails``), with every strategy;
- least-busy: requests in flight; those of a dead worker vanish within half a second;
- latency-based-routing: latencies and times to the first token, as decaying means in place of the
  last ten, and usage;
- usage-based-routing, usage-based-routing-v2 and ``enforce_model_rate_limits``: tokens and requests
  of the minute, so that limits of a deployment hold for all workers together.

Each worker keeps to itself: the share of failed requests that cools a deployment down without
``allowed_fails``, usage in cost-based routing, affinities, budgets; and what is known of a team's
own model names in latency-based-routing and usage-based-routing.

A router that has Redis, or gets it later, is left alone: it shares through Redis, over all hosts.
"""

from __future__ import annotations

import importlib.metadata
import time
import weakref
from collections.abc import Callable
from typing import Any

import litellm
from litellm.caching.in_memory_cache import InMemoryCache
from litellm.integrations.custom_logger import CustomLogger

from fast_litellm_shm._shared import log
from fast_litellm_shm.integrations.litellm import attempts, failures
from fast_litellm_shm.integrations.litellm.router.cache import SharedRoutingCache
from fast_litellm_shm.integrations.litellm.router.cache_values import SharedValues
from fast_litellm_shm.integrations.litellm.router.cooldowns import PROTOCOL, SharedCooldowns
from fast_litellm_shm.integrations.litellm.router.deployments import Deployments

_RETRY_SECONDS = 1.0  # between two attempts, where there is no segment for example

_CALLBACKS = (
    *("callbacks", "input_callback", "success_callback", "failure_callback"),
    *("_async_success_callback", "_async_failure_callback"),
)


class RouterState:
    """Shares the state of routers: ``state=True`` of
    :func:`fast_litellm_shm.integrations.litellm.share`."""

    def __init__(self) -> None:
        self._attached: weakref.WeakKeyDictionary[Any, _Replaced] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Any] | None = None
        self._logged: set[str] = set()
        self._retry_at = 0.0  # time.monotonic(), after a failure

    def attach(self, router: Any) -> None:
        """Have a router share its state. A second call does nothing, quickly: the plugin calls it
        with every request. Never raises: where LiteLLM has no such store, one log line says what
        each worker keeps to itself; a failure of ours is reported by :mod:`.failures`."""
        if self._last is not None and self._last() is router:
            return
        try:
            if router not in self._attached:
                if time.monotonic() < self._retry_at:
                    return
                self._attached[router] = self._replace(router)
            self._last = weakref.ref(router)
        except Exception as error:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            failures.report("sharing a router's state", error, "each worker keeps it to itself")

    def detach(self, router: Any) -> None:
        """Give the router back the very objects that it had."""
        self._last = None
        replaced = self._attached.pop(router, None)
        if replaced is not None:
            replaced.undo()

    def _replace(self, router: Any) -> _Replaced:
        replaced = _Replaced()
        try:
            health = router.health()
            cache, cooldowns = health.store, health.cooldowns
            own_cache, own_cooldowns = cache.in_memory_cache, cooldowns.cooldown_store
        except AttributeError:
            self._log_missing("cooldowns, requests in flight, latencies and usage")
            return replaced
        if cache.redis_cache is not None or isinstance(own_cache, SharedRoutingCache):
            return replaced
        deployments = Deployments()
        try:
            if type(own_cache) is InMemoryCache:
                replaced.values = SharedValues(deployments, _ids_of(router))
                shared = SharedRoutingCache(own_cache, replaced.values)
                replaced.put(cache, "in_memory_cache", shared)
            else:
                self._log_missing("requests in flight, latencies and usage")
            if all(hasattr(own_cooldowns, name) for name in PROTOCOL):
                shared_cooldowns = SharedCooldowns(own_cooldowns, deployments, replaced.undo)
                replaced.put(cooldowns, "cooldown_store", shared_cooldowns)
            else:
                self._log_missing("cooldowns")
        except BaseException:
            replaced.undo()
            raise
        return replaced

    def _log_missing(self, what: str) -> None:
        if what not in self._logged:
            self._logged.add(what)
            log.warning(
                "litellm %s offers no way to share %s of its router: each worker keeps them to "
                "itself. See docs/litellm.md for the versions of LiteLLM that are supported",
                importlib.metadata.version("litellm"),
                what,
            )


class _Replaced:
    """The objects of a router that were replaced by shared ones."""

    def __init__(self) -> None:
        self._places: list[tuple[Any, str, Any, Any]] = []
        self.values: SharedValues | None = None

    def put(self, owner: Any, name: str, shared: Any) -> None:
        self._places.append((owner, name, getattr(owner, name), shared))
        setattr(owner, name, shared)

    def undo(self) -> None:
        """Another object that was put there since stays."""
        for owner, name, own, shared in reversed(self._places):
            if getattr(owner, name, None) is shared:
                setattr(owner, name, own)
        self._places.clear()
        if self.values is not None:
            self.values.retire()


def _ids_of(router: Any) -> Callable[[str | None], frozenset[str]]:
    """Returns the deployment ids of a model group; for None, those of all."""
    names = router.registry().names  # of the router's core: it holds no reference to router

    def ids(group: str | None) -> frozenset[str]:
        if group is None:
            return frozenset(names(kind="ids"))
        return frozenset(names(group, kind="ids") or names(group, kind="route_candidates"))

    return ids


routers = RouterState()

_limited: weakref.WeakSet[Any] = weakref.WeakSet()  # routers
_added: CustomLogger | None = None  # the limiter, where it was added to litellm.callbacks here


def share(router: Any, limiter: CustomLogger, *, limits: bool = True, state: bool = True) -> None:
    """:func:`fast_litellm_shm.integrations.litellm.share`, with the CustomLogger that enforces the
    limits."""
    global _added
    if state:
        routers.attach(router)
    if limits:
        _limited.add(router)
        if not any(callback is limiter for callback in litellm.callbacks):
            litellm.logging_callback_manager.add_litellm_callback(limiter)
            _added = limiter


def unshare(router: Any) -> None:
    """Undo :func:`share`: the router has the very objects back that it had. With the last router
    that :func:`share` added the limiter for, the limiter leaves LiteLLM's callbacks, and LiteLLM
    keeps the limits again."""
    global _added
    routers.detach(router)
    _limited.discard(router)
    if _added is not None and not _limited:
        for name in _CALLBACKS:  # LiteLLM copies a callback to the other lists
            setattr(litellm, name, [each for each in getattr(litellm, name) if each is not _added])
        _added = None
        attempts.restore_check()
