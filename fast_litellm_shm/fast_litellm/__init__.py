"""What PyPI's fast-litellm offers, by its names. Each name is loaded when it is first used."""

from typing import TYPE_CHECKING

from fast_litellm_shm import __version__
from fast_litellm_shm._shared.later import loader

if TYPE_CHECKING:
    from fast_litellm_shm._shared.features import get_feature_status, is_enabled, reset_errors
    from fast_litellm_shm._shared.performance import (
        compare_implementations,
        export_performance_data,
        get_performance_stats,
        record_performance,
    )
    from fast_litellm_shm.fast_litellm.acceleration import (
        apply_acceleration,
        get_patch_status,
        remove_acceleration,
    )
    from fast_litellm_shm.fast_litellm.simple import (
        SimpleRateLimiter,
        check_rate_limit,
        get_rate_limit_stats,
    )
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

__all__: list[str] = [
    "AdvancedRouter",
    "NATIVE_AVAILABLE",
    "RUST_ACCELERATION_AVAILABLE",
    "SimpleConnectionPool",
    "SimpleRateLimiter",
    "SimpleTokenCounter",
    "__version__",
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
    "record_performance",
    "remove_acceleration",
    "remove_connection",
    "reset_errors",
    "return_connection",
    "rust_acceleration_available",
]

# Where each name is, below fast_litellm_shm.
MODULES = {
    "_shared.features": "get_feature_status is_enabled reset_errors",
    "_shared.performance": "compare_implementations export_performance_data get_performance_stats "
    "record_performance",
    "fast_litellm.acceleration": "apply_acceleration get_patch_status remove_acceleration",
    "fast_litellm.simple": "SimpleRateLimiter check_rate_limit get_rate_limit_stats",
    "metrics.health": "NATIVE_AVAILABLE RUST_ACCELERATION_AVAILABLE health_check "
    "rust_acceleration_available",
    "metrics.recommendations": "get_recommendations",
    "pools.connection_pool": "SimpleConnectionPool cleanup_expired_connections get_connection "
    "get_connection_pool_stats health_check_connection remove_connection return_connection",
    "routing.router": "AdvancedRouter get_available_deployment",
    "tokens.counter": "SimpleTokenCounter",
    "tokens.prices": "get_pricing_status",
}

if not TYPE_CHECKING:  # with it, a type checker would accept every name
    __getattr__ = loader(__name__, MODULES)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
