"""A router's cache, whose values for routing strategies are those of all workers of the host."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

from litellm.caching.in_memory_cache import InMemoryCache

from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router.cache_values import SharedValues, Value

_OWN = "this worker goes by its own"
_NOT_SHARED = object()

_all: weakref.WeakSet[SharedRoutingCache] = weakref.WeakSet()


class SharedRoutingCache(InMemoryCache):  # type: ignore[misc]
    """The same cache as ``own``: both use the same dictionaries. The values of :mod:`.cache_values`
    are also written to the segment, and read from it. All other methods of the cache call the
    methods below."""

    __slots__ = ("own", "values")

    def __init__(self, own: InMemoryCache, values: SharedValues) -> None:
        object.__setattr__(self, "__dict__", own.__dict__)
        self.own, self.values = own, values
        _all.add(self)

    def get_cache(self, key: Any, **kwargs: Any) -> Any:
        found = self._shared(key, "reading", lambda value: value.read())
        return super().get_cache(key, **kwargs) if found is _NOT_SHARED else found

    def batch_get_cache(self, keys: Any, **kwargs: Any) -> Any:
        try:
            found = self.values.all_in_flight(keys)
            if found is not None:
                return found
        except Exception as error:
            failures.report("reading values of a router", error, _OWN)
        return super().batch_get_cache(keys, **kwargs)

    def increment_cache(self, key: Any, value: float, **kwargs: Any) -> Any:
        own = InMemoryCache.increment_cache(self.own, key, value, **kwargs)
        found = self._shared(key, "counting", lambda shared: shared.increment(value))
        return own if found is _NOT_SHARED else found

    def set_cache(self, key: Any, value: Any, **kwargs: Any) -> None:
        super().set_cache(key, value, **kwargs)
        self._shared(key, "writing", lambda shared: shared.write(value))

    def _shared(self, key: Any, doing: str, use: Callable[[Value], Any]) -> Any:
        """What use() returns for the shared value of the key. _NOT_SHARED: it is not shared, or
        that failed."""
        try:
            value = self.values.of(key)
            return _NOT_SHARED if value is None else use(value)
        except Exception as error:
            failures.report(f"{doing} a value of a router", error, _OWN)
            return _NOT_SHARED


def _after_fork() -> None:
    """Requests in flight in the parent are not in flight in its child."""
    for cache in list(_all):
        for key, value in cache.values.in_flight.items():
            value.forget()
            cache.delete_cache(key)


os.register_at_fork(after_in_child=_after_fork)
