"""RateLimitCache: a cache backend that counts, for django-ratelimit.

It has what django-ratelimit calls (``add``, ``incr``, ``get``), and what its users call in tests
(``delete``, ``clear``). It is no cache: it keeps counts, and no values.
"""

from __future__ import annotations

from typing import Any, NoReturn

from django.core.cache.backends.base import DEFAULT_TIMEOUT, BaseCache
from django.core.exceptions import ImproperlyConfigured

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError
from fast_litellm_shm.integrations.web.log import Log
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow

_MOST = 2**31 - 1
_DAY = 86_400  # s, of the limiter's own limit, which no call uses
_SECOND = 1_000_000_000  # ns


class RateLimitCache(BaseCache):
    """In ``settings.py``::

        CACHES = {
            "default": {...},  # what you have
            "limits": {"BACKEND": "fast_litellm_shm.integrations.django.RateLimitCache"},
        }
        RATELIMIT_USE_CACHE = "limits"
        SILENCED_SYSTEM_CHECKS = ["django_ratelimit.W001"]  # it knows three backends by name

    LOCATION: the name of the segment; default: the user's. OPTIONS: ``capacity``, ``mode``,
    ``names`` and ``allow_other_owner`` of :class:`fast_litellm_shm.Segment`. A count is an int of 0
    to 2,147,483,647, and ends after its time-out, which is above 0 and up to 416 days.

    Where the segment is full or damaged, ``add`` returns False and ``incr`` raises ValueError, as
    Django's caches do for a key that they do not have: then django-ratelimit refuses the request,
    or admits it with ``RATELIMIT_FAIL_OPEN``. The log says why. What the backend does not do raises
    NotImplementedError.
    """

    def __init__(self, location: str, params: dict[str, Any]) -> None:
        super().__init__(params)
        options = params.get("OPTIONS") or {}
        try:
            segment = Segment(location or None, **options)
        except (TypeError, ValueError) as error:
            raise ImproperlyConfigured(f"CACHES, RateLimitCache: {error}") from error
        self._counts = RateLimiter(
            FixedWindow(_MOST, _DAY),
            name="django cache",
            segment=segment,
            on_full="raise",
            cluster=False,
        )
        self._log = Log()

    def _count(self, key: str, cost: int, most: int, per_ns: int) -> tuple[bool, int]:
        """Charge ``cost`` if the count stays within ``most``. Whether it was, and the count."""
        raw = key.encode("utf-8", "surrogatepass")
        limit = ffi.new("fshm_limit *", (most, per_ns, 0, lib.FSHM_WINDOW, 0))
        found = ffi.new("fshm_counted *")
        lib.fshm_count(self._counts._handle, raw, len(raw), limit, cost, 0, found)
        if found.status not in (lib.FSHM_ALLOWED, lib.FSHM_DENIED):
            self._counts._failed(found.status)
        return found.status == lib.FSHM_ALLOWED, int(found.count)

    def add(
        self, key: str, value: object, timeout: object = DEFAULT_TIMEOUT, version: Any = None
    ) -> bool:
        """Begin to count at ``value``, if the key has no count. Returns whether it had none."""
        name = self.make_and_validate_key(key, version=version)
        start, seconds = _whole("add", value), self._seconds(timeout)
        try:
            if start == 0 or seconds <= 0:  # a count of 0 is no count
                return self._count(name, 0, _MOST, _SECOND)[1] == 0
            # Within `start` there is room for `start` only where nothing is counted.
            return self._count(name, start, start, round(seconds * _SECOND))[0]
        except FastShmError as error:
            self._log.failure("RateLimitCache.add() failed, and has not counted", error)
            return False

    def incr(self, key: str, delta: int = 1, version: Any = None) -> int:
        """Count ``delta`` more; returns the count. Raises ValueError where the key has no count."""
        name = self.make_and_validate_key(key, version=version)
        more = _whole("incr", delta)
        try:
            before = self._count(name, 0, _MOST, _SECOND)[1]
            if before:
                # A count that has ended since then begins anew here, and ends in a second.
                counted, count = self._count(name, more, _MOST, _SECOND)
                if counted and (count > more or not more):
                    return count
                if not counted:
                    return min(count + more, _MOST)
        except FastShmError as error:
            self._log.failure("RateLimitCache.incr() failed, and has not counted", error)
            raise ValueError(f"key {key!r} cannot be counted: {error}") from error
        raise ValueError(f"key {key!r} has no count")

    def get(self, key: str, default: Any = None, version: Any = None) -> Any:
        """The count; ``default``: there is none, or it cannot be read."""
        name = self.make_and_validate_key(key, version=version)
        try:
            return self._count(name, 0, _MOST, _SECOND)[1] or default
        except FastShmError as error:
            self._log.failure("RateLimitCache.get() failed", error)
            return None

    def has_key(self, key: str, version: Any = None) -> bool:
        return bool(self.get(key, version=version))

    def delete(self, key: str, version: Any = None) -> bool:
        """Forget a count. Returns whether there was one."""
        name = self.make_and_validate_key(key, version=version)
        found = self._count(name, 0, _MOST, _SECOND)[1] > 0
        self._counts.reset(name)
        return found

    def clear(self) -> None:
        """Forget all counts."""
        self._counts.reset()

    def _seconds(self, timeout: object) -> float:
        if timeout is DEFAULT_TIMEOUT:
            timeout = self.default_timeout
        if timeout is None or isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
            raise ValueError(
                f"RateLimitCache: a count needs a time-out in seconds, not {timeout!r}; it is no "
                "cache, and keeps nothing for ever"
            )
        if timeout > 2**55 // _SECOND:
            raise ValueError(f"RateLimitCache: a time-out is up to 416 days, not {timeout!r} s")
        return timeout

    def set(
        self, key: str, value: object, timeout: object = DEFAULT_TIMEOUT, version: Any = None
    ) -> NoReturn:
        _is_no_cache("set")

    def touch(self, key: str, timeout: object = DEFAULT_TIMEOUT, version: Any = None) -> NoReturn:
        _is_no_cache("touch")

    def decr(self, key: str, delta: int = 1, version: Any = None) -> NoReturn:
        _is_no_cache("decr")


def _is_no_cache(call: str) -> NoReturn:
    raise NotImplementedError(
        f"RateLimitCache.{call}(): it counts for django-ratelimit, and is no cache; give it an "
        "alias of its own in CACHES, name that in RATELIMIT_USE_CACHE, and leave 'default' to a "
        "cache"
    )


def _whole(call: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise NotImplementedError(
            f"RateLimitCache.{call}() takes an int, not {value!r}: it counts for django-ratelimit, "
            "and is no cache; give it an alias of its own in CACHES"
        )
    if not 0 <= value <= _MOST:
        raise ValueError(f"RateLimitCache.{call}() counts from 0 to {_MOST}, not {value!r}")
    return value
