"""Router state over workers: cooldowns, requests in flight, latencies and usage of deployments.

A ``litellm.Router`` keeps what it learns of its deployments in its process. Here two of its stores
are put behind shared ones, and nothing else is touched: LiteLLM's own code picks a deployment, by
its own rules and settings, in asynchronous and synchronous calls, and goes by what all workers of
the host know:

- cooldowns, and the failures that lead to one (``allowed_fails``), with every strategy;
- least-busy: requests in flight; those of a dead worker vanish within half a second;
- latency-based-routing: latencies and times to the first token, as decaying means in place of the
  last ten, and usage;
- usage-based-routing, usage-based-routing-v2 and ``enforce_model_rate_limits``: tokens and requests
  of the minute, so that limits of a deployment hold for all workers together.

With each worker stay: the share of failed requests that LiteLLM cools down by without
``allowed_fails``, usage in cost-based routing, affinities and budgets; and in latency-based routing
and usage-based-routing what is known of a team's own model names.

A router that has Redis, or gets it later, is left alone: it shares through that, and over more than
one host.
"""

from __future__ import annotations

import importlib.metadata
import logging
import time
import weakref
from typing import Any

import litellm
from litellm.caching.in_memory_cache import InMemoryCache

from fast_litellm_shm.integrations.litellm import attempts, failures
from fast_litellm_shm.integrations.litellm.router.cache import SharedRoutingCache
from fast_litellm_shm.integrations.litellm.router.cache_values import Numbers
from fast_litellm_shm.integrations.litellm.router.cooldowns import PROTOCOL, SharedCooldowns
from fast_litellm_shm.integrations.litellm.router.deployments import Statistics

_PAUSE = 1.0  # seconds between two tries, where there is no segment, say

_log = logging.getLogger("fast_litellm_shm")


class RouterState:
    """What :func:`fast_litellm_shm.integrations.litellm.share` does for the state of routers."""

    def __init__(self) -> None:
        self._attached: weakref.WeakKeyDictionary[Any, _Replaced] = weakref.WeakKeyDictionary()
        self._last: weakref.ref[Any] | None = None
        self._told: set[str] = set()
        self._again = 0.0  # time.monotonic(), after a fault

    def attach(self, router: Any) -> None:
        """Have a router share its state with those of other workers. A second time does nothing,
        quickly: it may be called with every request. Never raises: where it cannot be done, one
        sentence in the log says what stays with each worker, and a fault of ours is counted and
        logged as all are."""
        if self._last is not None and self._last() is router:
            return
        try:
            if router not in self._attached:
                if time.monotonic() < self._again:
                    return
                self._attached[router] = self._replace(router)
            self._last = weakref.ref(router)
        except Exception as error:
            self._again = time.monotonic() + _PAUSE
            failures.failed("sharing a router's state", error, "it stays with each worker")

    def detach(self, router: Any) -> None:
        """Give the router the very objects back that it had."""
        self._last = None
        replaced = self._attached.pop(router, None)
        if replaced is not None:
            replaced.undo()

    def _replace(self, router: Any) -> _Replaced:
        replaced = _Replaced()
        try:
            health = router.health()
            cache, cooldowns = health.store, health.cooldowns
            own_numbers, own_cooldowns = cache.in_memory_cache, cooldowns.cooldown_store
        except AttributeError:
            self._tell("cooldowns, requests in flight, latencies and usage")
            return replaced
        if cache.redis_cache is not None or isinstance(own_numbers, SharedRoutingCache):
            return replaced
        statistics = Statistics()
        try:
            if type(own_numbers) is InMemoryCache:
                replaced.numbers = Numbers(statistics, _Ids(router))
                shared = SharedRoutingCache(own_numbers, replaced.numbers)
                replaced.put(cache, "in_memory_cache", shared)
            else:
                self._tell("requests in flight, latencies and usage")
            if all(hasattr(own_cooldowns, name) for name in PROTOCOL):
                shared_cooldowns = SharedCooldowns(own_cooldowns, statistics, replaced.undo)
                replaced.put(cooldowns, "cooldown_store", shared_cooldowns)
            else:
                self._tell("cooldowns")
        except BaseException:
            replaced.undo()
            raise
        return replaced

    def _tell(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            version = importlib.metadata.version("litellm")
            _log.warning(
                "litellm %s offers no way to share %s of its router: they stay with each worker",
                version,
                what,
            )


class _Replaced:
    """Objects that were put in the place of others."""

    def __init__(self) -> None:
        self._places: list[tuple[Any, str, Any, Any]] = []
        self.numbers: Numbers | None = None

    def put(self, owner: Any, name: str, shared: Any) -> None:
        self._places.append((owner, name, getattr(owner, name), shared))
        setattr(owner, name, shared)

    def undo(self) -> None:
        """Where somebody else has put another object there since, that one stays."""
        for owner, name, own, shared in reversed(self._places):
            if getattr(owner, name, None) is shared:
                setattr(owner, name, own)
        self._places.clear()
        if self.numbers is not None:
            self.numbers.retire()


class _Ids:
    """The deployment ids of a model group of a router, or of all groups (None)."""

    def __init__(self, router: Any) -> None:
        self._registry = router.registry()  # of the router's core: it does not hold the router

    def __call__(self, group: str | None) -> frozenset[str]:
        if group is None:
            return frozenset(self._registry.names(kind="ids"))
        found = self._registry.names(group, kind="ids")
        return frozenset(found or self._registry.names(group, kind="route_candidates"))


routers = RouterState()

_limited: weakref.WeakSet[Any] = weakref.WeakSet()
_added: Any = None  # the limiter, where it was put into litellm.callbacks here


def share(router: Any, limiter: Any, *, limits: bool = True, state: bool = True) -> None:
    """What :func:`fast_litellm_shm.integrations.litellm.share` does, for the CustomLogger that
    enforces the limits."""
    if state:
        routers.attach(router)
    if limits:
        _limit(router, limiter)


def unshare(router: Any) -> None:
    """The router gets back the very objects that it had; the limiter leaves LiteLLM's callbacks
    with the last router that had it put there, and LiteLLM keeps the limits again."""
    global _added
    routers.detach(router)
    _limited.discard(router)
    if _added is not None and not _limited:
        litellm.logging_callback_manager.drop_callbacks([_added])
        _added = None
        attempts.give_back()


def _limit(router: Any, limiter: Any) -> None:
    global _added
    _limited.add(router)
    if not any(callback is limiter for callback in litellm.callbacks):
        litellm.logging_callback_manager.add_litellm_callback(limiter)
        _added = limiter
