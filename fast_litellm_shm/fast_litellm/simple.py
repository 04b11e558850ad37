"""The rate limiting API of the PyPI package fast-litellm, with limits that all workers share."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import Granted, InFlight, LimitSpec, SlidingWindow, TokenBucket

# The fixed limits of check_rate_limit(); settings.rate_defaults() has the others.
_PER_SECOND, _PER_HOUR = 10, 10_000
_TOTALS = ("total_checks", "allowed_count", "denied_count")


class RateLimitStats(dict[str, Any]):
    """Statistics by key. The totals over all keys (total_checks, allowed_count, denied_count) are
    read like keys. Iteration and len() have the keys alone, and a key of such a name hides the
    total."""

    totals: dict[str, int]

    def __missing__(self, name: str) -> int:
        if name in _TOTALS:
            return self.totals[name]
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As dict.get(), with the totals."""
        return self[name] if name in self else default  # noqa: SIM401 - dict.get would call itself

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in _TOTALS

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()


def _stats(limiter: RateLimiter, config: dict[str, int], strict: bool) -> RateLimitStats:
    out = RateLimitStats()
    out.totals = dict.fromkeys(_TOTALS, 0)
    per_minute, per_hour = config["requests_per_minute"], config["requests_per_hour"]
    remaining = ffi.new("uint64_t[4]")
    for row in Inspection(limiter.segment).keys(limiter=limiter.name):
        left = row.remaining or 0  # never None: the limits are the limiter's own
        raw = row.raw or row.key.encode("utf-8", "surrogatepass")
        if not strict and lib.fshm_remaining(limiter._handle, raw, len(raw), 0, remaining) == 3:
            bucket, minute, hour = remaining[0], remaining[1], remaining[2]
        else:
            bucket = left
            used = config["burst_size"] - bucket
            minute, hour = max(per_minute - used, 0), max(per_hour - used, 0)
        out[row.key] = {
            "config": dict(config),
            "remaining_requests": left,
            "bucket_tokens": bucket,
            "minute_remaining": minute,
            "hour_remaining": hour,
            "total_checks": row.admitted + row.denied,
            "allowed_count": row.admitted,
            "denied_count": row.denied,
        }
        for name in _TOTALS:
            out.totals[name] += out[row.key][name]
    return out


class SimpleRateLimiter(RateLimiter):
    """At most ``requests_per_minute`` in **any** 60 seconds for each key, over all workers
    together.

    requests_per_minute: 1 or more. burst: how many at one instant; default requests_per_minute /
    10, rounded up. A new key may make ``burst`` requests at once, then one every 60 /
    (requests_per_minute - burst + 1) seconds.

    name: limiters of one name count together. Without a name, those of equal settings do: in all
    processes, also of unrelated programs of the same user. So name them, or give each program a
    FAST_LITELLM_SHM_NAME.

    Raises ValueError or TypeError for bad arguments, SegmentError where no segment can be opened.
    """

    def __init__(
        self,
        requests_per_minute: int = 60,
        *,
        name: str | None = None,
        burst: int | None = None,
        segment: Segment | None = None,
        on_full: str = "share",
    ) -> None:
        if isinstance(requests_per_minute, bool) or not isinstance(requests_per_minute, int):
            raise TypeError(f"requests_per_minute must be an int, not {requests_per_minute!r}")
        if requests_per_minute < 1:
            raise ValueError(f"requests_per_minute must be at least 1, not {requests_per_minute}")
        if burst is None:
            burst = -(-requests_per_minute // 10)
        limit = TokenBucket(requests_per_minute, per=60, burst=burst, strict=True)
        if name is None:
            name = f"simple {requests_per_minute}/min burst {limit.burst}"
        super().__init__(limit, name=name, segment=segment, on_full=on_full)

    def get_stats(self) -> RateLimitStats:
        """Statistics of this limiter by key, as :func:`get_rate_limit_stats` has them."""
        limit = self.limits[0]
        config = {
            "requests_per_second": -(-limit.n // 60),
            "requests_per_minute": limit.n,
            "requests_per_hour": limit.n * 60,
            "burst_size": limit.burst if isinstance(limit, TokenBucket) else limit.n,
        }
        return _stats(self, config, True)


class _DefaultLimiter(RateLimiter):
    """Its bucket is 20 every 2 seconds: 10 a second with a burst of 20. check() says "second"."""

    @staticmethod
    def _reasons(found: tuple[LimitSpec | InFlight | Granted, ...]) -> tuple[str, ...]:
        periods = ("second", "minute", "hour")
        return tuple(f"Rate limit exceeded (requests per {period})" for period in periods)


@functools.cache
def _limiter() -> RateLimiter:
    chosen = settings.rate_defaults()
    return _DefaultLimiter(
        TokenBucket(chosen.burst_size, per=chosen.burst_size / _PER_SECOND),
        SlidingWindow(chosen.requests_per_minute, per=60),
        SlidingWindow(_PER_HOUR, per=3600),
        name="check_rate_limit",
    )


def check_rate_limit(key: str | bytes) -> dict[str, Any]:
    """Check a key against 10 a second (burst 20), 600 a minute and 10,000 an hour, over all
    workers: all programs of the user that share a segment. The file that
    FAST_LITELLM_FEATURE_CONFIG names may have another ``burst_size`` and ``requests_per_minute``,
    under ``features.rust_rate_limiting.config``.

    Returns a dict: allowed, reason, remaining_requests, and retry_after_ms when denied.
    """
    return _limiter().check(key)


def get_rate_limit_stats() -> RateLimitStats:
    """Statistics of :func:`check_rate_limit` by key: config, remaining_requests, bucket_tokens,
    minute_remaining, hour_remaining, total_checks, allowed_count, denied_count. The last three are
    also totals over all keys: ``get_rate_limit_stats()["total_checks"]``."""
    limiter = _limiter()
    burst, minute, hour = (limit.n for limit in limiter.limits)
    config = {
        "requests_per_second": _PER_SECOND,
        "requests_per_minute": minute,
        "requests_per_hour": hour,
        "burst_size": burst,
    }
    return _stats(limiter, config, False)
