"""Rate limits that all worker processes of a host share, in shared memory, with no server."""

from fast_litellm_shm.exceptions import (
    FastShmError,
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
from fast_litellm_shm.native import Decision
from fast_litellm_shm.segment import Segment
from fast_litellm_shm.simple import SimpleRateLimiter, check_rate_limit, get_rate_limit_stats

__version__ = "0.1.0"
NATIVE_AVAILABLE = True
RUST_ACCELERATION_AVAILABLE = NATIVE_AVAILABLE  # the name in fast-litellm

__all__ = [
    "NATIVE_AVAILABLE",
    "RUST_ACCELERATION_AVAILABLE",
    "Batch",
    "Decision",
    "FastShmError",
    "Limit",
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
    "SimpleRateLimiter",
    "SlidingWindow",
    "Window",
    "check_rate_limit",
    "get_rate_limit_stats",
]
