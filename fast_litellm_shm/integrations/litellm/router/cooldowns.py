"""A router's store of cooldowns, shared by all workers of the host.

LiteLLM's router core reads and writes cooldowns and allowed failures through its store
(``litellm/router_rust/routing_stores.py``). :class:`SharedCooldowns` wraps the router's own store:
every worker leaves out a deployment that any worker cools down, as with Redis, and failures are
counted over all workers.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from typing import Any, TypeAlias

from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router.deployments import Deployments
from fast_litellm_shm.integrations.litellm.window_counter import WindowCounter

#: What a store must have to be wrapped: litellm.redis.stores.router_cooldowns.RouterCooldowns.
PROTOCOL = (
    *("attach_redis", "has_redis", "flush_local_counters", "evict_local", "snapshot"),
    *("put", "async_put", "increment_allowed_fails", "async_increment_allowed_fails"),
    *("active", "active_sync", "minimum"),
)

_MOST_FAILS = 2**20 - 1  # so large a window keeps its end to 2 ms
_MOST_PERIODS = 16  # lengths of windows of failures; each takes a limiter of the segment
_NONE = float("inf")
_OWN = "this worker goes by its own"
_REASON = "another worker of this host cooled it down"

Active: TypeAlias = Sequence[tuple[str, Any]]  # (deployment id, LiteLLM's CooldownCacheValue)


class SharedCooldowns:
    """Wraps ``own``, a router's own store. While ``own`` has Redis, it only passes calls on: Redis
    reaches more than one host. on_redis is called when the router gets Redis."""

    def __init__(
        self, own: Any, deployments: Deployments, on_redis: Callable[[], None] = lambda: None
    ) -> None:
        self.own = own
        self._deployments, self._on_redis = deployments, on_redis
        self._fails: dict[float, WindowCounter] = {}  # by the length of the window

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    def attach_redis(self, redis: Any) -> None:
        self.own.attach_redis(redis)
        if self.own.has_redis:
            self._on_redis()

    # writing --------------------------------------------------------------------------------------

    def put(self, model_id: str, value: Any, ttl: float) -> None:
        self.own.put(model_id, value, ttl)
        self._share(model_id, ttl)

    async def async_put(self, model_id: str, value: Any, ttl: float) -> None:
        await self.own.async_put(model_id, value, ttl)
        self._share(model_id, ttl)

    def _share(self, model_id: str, ttl: float) -> None:
        try:
            if not self.own.has_redis:
                self._deployments.cool(model_id, ttl)
        except Exception as error:
            failures.report("sharing a cooldown", error, "the other workers do not know of it")

    def increment_allowed_fails(self, model_id: str, suffix: str | None, ttl: float) -> int:
        shared = self._count_failure(model_id, suffix, ttl)
        return shared or int(self.own.increment_allowed_fails(model_id, suffix, ttl))

    async def async_increment_allowed_fails(
        self, model_id: str, suffix: str | None, ttl: float
    ) -> int:
        shared = self._count_failure(model_id, suffix, ttl)
        return shared or int(await self.own.async_increment_allowed_fails(model_id, suffix, ttl))

    def _count_failure(self, model_id: str, suffix: str | None, ttl: float) -> int | None:
        """Like INCR of Redis on a key that expires: the failures since the first of them, which was
        at most ttl seconds ago, so 1 or more. None: the router's own store must count."""
        try:
            counter = None if self.own.has_redis else self._counter(ttl)
            if counter is None:
                return None
            return counter.add(model_id if suffix is None else f"{model_id}:{suffix}", 1)
        except Exception as error:
            failures.report("counting a deployment's failure", error, _OWN)
            return None

    def _counter(self, ttl: float) -> WindowCounter | None:
        known = self._fails.get(ttl)
        if known is None and ttl > 0 and len(self._fails) < _MOST_PERIODS:
            known = self._fails[ttl] = WindowCounter(f"litellm fails {ttl:g} s", _MOST_FAILS, ttl)
        return known

    # reading --------------------------------------------------------------------------------------

    def active(self, model_ids: Sequence[str], *, batch: Any) -> Awaitable[Active]:
        return _Merged(self, model_ids, self.own.active(model_ids, batch=batch))

    def active_sync(self, model_ids: Sequence[str]) -> Active:
        return self._merged(model_ids, self.own.active_sync(model_ids))

    def minimum(self, model_ids: Sequence[str], default: float) -> float:
        """Seconds until the first of them may be used again; default where none cools down."""
        known = {model_id for model_id, _ in self.own.active_sync(model_ids)}
        others = (value["cooldown_time"] for _, value in self._of_others(model_ids, known))
        own = self.own.minimum(model_ids, _NONE)
        least = min((float(own), *others))
        return default if least == _NONE else least

    def snapshot(self) -> dict[str, Any]:
        own = dict(self.own.snapshot())
        return {**dict(self._of_others(self._deployments.known_ids(), own)), **own}

    def _merged(self, model_ids: Sequence[str], own: Active) -> Active:
        others = self._of_others(model_ids, {model_id for model_id, _ in own})
        return (*own, *others) if others else own

    def _of_others(self, model_ids: Iterable[str], known: Any) -> list[tuple[str, Any]]:
        """Those of model_ids that other workers cooled down, except the known ones."""
        try:
            cooling = {} if self.own.has_redis else self._deployments.cooling()
            if not cooling:
                return []
            now, wall = time.monotonic_ns(), time.time()
            found = []
            for model_id in model_ids:
                until = cooling.get(self._deployments.hash_of(model_id), 0)
                if until > now and model_id not in known:
                    found.append((model_id, _value((until - now) / 1e9, wall)))
            return found
        except Exception as error:
            failures.report("reading the cooldowns of other workers", error, _OWN)
            return []


class _Merged:
    """An awaitable that may be dropped without a warning, as LiteLLM's own may."""

    def __init__(self, store: SharedCooldowns, ids: Sequence[str], own: Awaitable[Active]) -> None:
        self._store, self._ids, self._own = store, ids, own

    def __await__(self) -> Generator[Any, Any, Active]:
        own = yield from self._own.__await__()
        return self._store._merged(self._ids, own)


def _value(left: float, now: float) -> dict[str, Any]:
    """A CooldownCacheValue of LiteLLM. The exception and its status are known only to the worker
    that met them."""
    return {
        "exception_received": _REASON,
        "status_code": "",
        "timestamp": now,
        "cooldown_time": left,
    }
