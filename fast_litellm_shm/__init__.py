"""Rate limits that all worker processes of a host share, in shared memory, with no server."""

from fast_litellm_shm.concurrency import ConcurrencyLimiter
from fast_litellm_shm.exceptions import (
    FastShmError,
    PermitTimeoutError,
    SegmentCapacityError,
    SegmentClockError,
    SegmentDamagedError,
    SegmentError,
    SegmentFullError,
    SegmentLayoutError,
    SegmentLinkError,
    SegmentNotFoundError,
    SegmentOwnerError,
    SegmentPermissionError,
    SegmentSpaceError,
)
from fast_litellm_shm.limiter import Batch, RateLimiter
from fast_litellm_shm.limits import Limit, SlidingWindow, Window
from fast_litellm_shm.native import Decision, Permit
from fast_litellm_shm.pool import (
    SimpleConnectionPool,
    cleanup_expired_connections,
    get_connection,
    get_connection_pool_stats,
    health_check_connection,
    remove_connection,
    return_connection,
)
from fast_litellm_shm.quota import Admission, Quota
from fast_litellm_shm.segment import Segment
from fast_litellm_shm.simple import SimpleRateLimiter, check_rate_limit, get_rate_limit_stats

__version__ = "0.1.0"
NATIVE_AVAILABLE = True
RUST_ACCELERATION_AVAILABLE = NATIVE_AVAILABLE  # the name in fast-litellm

__all__ = [
    "NATIVE_AVAILABLE",
    "RUST_ACCELERATION_AVAILABLE",
    "Admission",
    "Batch",
    "ConcurrencyLimiter",
    "Decision",
    "FastShmError",
    "Limit",
    "Permit",
    "PermitTimeoutError",
    "Quota",
    "RateLimiter",
    "Segment",
    "SegmentCapacityError",
    "SegmentClockError",
    "SegmentDamagedError",
    "SegmentError",
    "SegmentFullError",
    "SegmentLayoutError",
    "SegmentLinkError",
    "SegmentNotFoundError",
    "SegmentOwnerError",
    "SegmentPermissionError",
    "SegmentSpaceError",
    "SimpleConnectionPool",
    "SimpleRateLimiter",
    "SlidingWindow",
    "Window",
    "check_rate_limit",
    "cleanup_expired_connections",
    "get_connection",
    "get_connection_pool_stats",
    "get_rate_limit_stats",
    "health_check_connection",
    "remove_connection",
    "return_connection",
]
