"""Rate limits that all worker processes of a host share, in shared memory, with no server."""

import importlib
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.features import get_feature_status, is_enabled, reset_errors
from fast_litellm_shm._shared.native import Decision, Permit
from fast_litellm_shm._shared.performance import (
    compare_implementations,
    export_performance_data,
    get_performance_stats,
    record_performance,
)
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import (
    EncodingUnavailableError,
    FastShmError,
    PermitTimeoutError,
    PriceFileError,
    RateLimitExceeded,
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
    UnknownModelError,
)
from fast_litellm_shm.fast_litellm.acceleration import (
    apply_acceleration,
    get_patch_status,
    on_import,
    remove_acceleration,
)
from fast_litellm_shm.fast_litellm.simple import (
    SimpleRateLimiter,
    check_rate_limit,
    get_rate_limit_stats,
)
from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
from fast_litellm_shm.limiters.decorators import limited
from fast_litellm_shm.limiters.quota import Admission, Quota
from fast_litellm_shm.limiters.rate import Batch, RateLimiter
from fast_litellm_shm.limits import FixedWindow, Limit, SlidingWindow, TokenBucket, Window
from fast_litellm_shm.metrics.health import (
    NATIVE_AVAILABLE,
    RUST_ACCELERATION_AVAILABLE,
    health_check,
    rust_acceleration_available,
)
from fast_litellm_shm.metrics.recommendations import get_recommendations
from fast_litellm_shm.pools.connection_pool import (
    SimpleConnectionPool,
    cleanup_expired_connections,
    get_connection,
    get_connection_pool_stats,
    health_check_connection,
    remove_connection,
    return_connection,
)
from fast_litellm_shm.routing.router import AdvancedRouter, get_available_deployment
from fast_litellm_shm.tokens.counter import SimpleTokenCounter
from fast_litellm_shm.tokens.prices import get_pricing_status

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "AdvancedRouter",
    "Batch",
    "ConcurrencyLimiter",
    "Decision",
    "EncodingUnavailableError",
    "FastShmError",
    "Limit",
    "TokenBucket",
    "NATIVE_AVAILABLE",
    "Permit",
    "PermitTimeoutError",
    "PriceFileError",
    "Quota",
    "RUST_ACCELERATION_AVAILABLE",
    "RateLimitExceeded",
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
    "SimpleTokenCounter",
    "SlidingWindow",
    "UnknownModelError",
    "FixedWindow",
    "Window",
    "apply_acceleration",
    "check_rate_limit",
    "cleanup_expired_connections",
    "compare_implementations",
    "export_performance_data",
    "get_available_deployment",
    "get_connection",
    "get_connection_pool_stats",
    "get_feature_status",
    "get_patch_status",
    "get_performance_stats",
    "get_pricing_status",
    "get_rate_limit_stats",
    "get_recommendations",
    "health_check",
    "health_check_connection",
    "is_enabled",
    "limited",
    "record_performance",
    "remove_acceleration",
    "remove_connection",
    "reset_errors",
    "return_connection",
    "rust_acceleration_available",
]

if not TYPE_CHECKING:  # a type checker would believe in every name

    def __getattr__(name: str) -> Any:
        """The modules that `import fast_litellm` brings along, when they are first used."""
        if name in ("_rust", "enhanced_monkeypatch", "feature_flags"):
            return importlib.import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


on_import()
