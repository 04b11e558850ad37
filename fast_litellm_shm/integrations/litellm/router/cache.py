"""A router's cache, in which the values of routing strategies are those of all workers of the host."""

from __future__ import annotations

import os
import weakref
from typing import Any

from litellm.caching.in_memory_cache import InMemoryCache

from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router.cache_values import SharedValues

_OWN = "this worker goes by its own"

_all: weakref.WeakSet[SharedRoutingCache] = weakref.WeakSet()


class SharedRoutingCache(InMemoryCache):  # type: ignore[misc]
    """The same cache as ``own``: both use the same dictionaries. The values that :mod:`.cache_values`
    names are also written to the segment, and read from it. All other methods of the cache call
    the methods below."""

    __slots__ = ("own", "values")

    def __init__(self, own: InMemoryCache, values: SharedValues) -> None:
        object.__setattr__(self, "__dict__", own.__dict__)
        self.own, self.values = own, values
        _all.add(self)

    def get_cache(self, key: Any, **kwargs: Any) -> Any:
        try:
            value = self.values.of(key)
            if value is not None:
                return value.read()
        except Exception as error:
            failures.report("reading a value of a router", error, _OWN)
        return super().get_cache(key, **kwargs)

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
        try:
            shared = self.values.of(key)
            if shared is not None:
                return shared.increment(value)
        except Exception as error:
            failures.report("counting a value of a router", error, _OWN)
        return own

    def set_cache(self, key: Any, value: Any, **kwargs: Any) -> None:
        super().set_cache(key, value, **kwargs)
        try:
            shared = self.values.of(key)
            if shared is not None:
                shared.write(value)
        except Exception as error:
            failures.report("writing a value of a router", error, "the other workers do not know it")


def _after_fork() -> None:
    """Requests in flight in the parent are not in flight in its child."""
    for cache in list(_all):
        for key, value in cache.values.in_flight.items():
            value.forget()
            cache.delete_cache(key)


os.register_at_fork(after_in_child=_after_fork)
