"""A router's cache whose routing numbers are those of all workers of the host."""

from __future__ import annotations

import os
import weakref
from typing import Any

from litellm.caching.in_memory_cache import InMemoryCache

from fast_litellm_shm.integrations.litellm import failures
from fast_litellm_shm.integrations.litellm.router.cache_values import Numbers

_CONSEQUENCE = "this worker's own is used"

_all: weakref.WeakSet[SharedRoutingCache] = weakref.WeakSet()


class SharedRoutingCache(InMemoryCache):  # type: ignore[misc]
    """The same cache as ``own``: it keeps what it holds in the very dictionaries of that. Only the
    numbers that :mod:`fast_litellm_shm.integrations.litellm.router.cache_values` names are read and written in
    the segment besides. All other methods of a cache come back to these."""

    __slots__ = ("own", "numbers")

    def __init__(self, own: InMemoryCache, numbers: Numbers) -> None:
        object.__setattr__(self, "__dict__", own.__dict__)
        self.own, self.numbers = own, numbers
        _all.add(self)

    def get_cache(self, key: Any, **kwargs: Any) -> Any:
        try:
            number = self.numbers.of(key)
            if number is not None:
                return number.read()
        except Exception as error:
            failures.failed("reading a router's number", error, _CONSEQUENCE)
        return super().get_cache(key, **kwargs)

    def batch_get_cache(self, keys: Any, **kwargs: Any) -> Any:
        try:
            found = self.numbers.all_in_flight(keys)
            if found is not None:
                return found
        except Exception as error:
            failures.failed("reading a router's numbers", error, _CONSEQUENCE)
        return super().batch_get_cache(keys, **kwargs)

    def increment_cache(self, key: Any, value: float, **kwargs: Any) -> Any:
        own = InMemoryCache.increment_cache(self.own, key, value, **kwargs)
        try:
            number = self.numbers.of(key)
            if number is not None:
                return number.added(value)
        except Exception as error:
            failures.failed("counting a router's number", error, _CONSEQUENCE)
        return own

    def set_cache(self, key: Any, value: Any, **kwargs: Any) -> None:
        super().set_cache(key, value, **kwargs)
        try:
            number = self.numbers.of(key)
            if number is not None:
                number.wrote(value)
        except Exception as error:
            failures.failed("writing a router's number", error, "the other workers do not know it")


def _forked() -> None:
    """What is in flight in the parent is not so in its child."""
    for cache in list(_all):
        for key, number in cache.numbers.in_flight.items():
            number.forget()
            cache.delete_cache(key)


os.register_at_fork(after_in_child=_forked)
