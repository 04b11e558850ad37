"""``fast_litellm.feature_flags``: the feature flags of this package, in the shape of that module.

The states are those of the host; docs/performance.md says how to set them. So a process has no
manager of its own (``FeatureFlagManager``, ``FeatureConfig``).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from fast_litellm_shm._shared import features, performance
from fast_litellm_shm._shared.features import is_enabled, record_error, reset_errors

__all__ = [
    "FeatureState",
    "get_status",
    "is_enabled",
    "record_error",
    "record_performance",
    "reset_errors",
]

_OPERATION = "call"  # which record_performance() counts


class FeatureState(Enum):
    """The states of a feature in get_status(). No feature here is ever ``shadow``."""

    DISABLED = "disabled"
    ENABLED = "enabled"
    CANARY = "canary"
    SHADOW = "shadow"
    GRADUAL_ROLLOUT = "gradual_rollout"


_STATES = {
    features.DISABLED: FeatureState.DISABLED,
    features.AFTER_ERRORS: FeatureState.DISABLED,
    features.ENABLED: FeatureState.ENABLED,
    features.CANARY: FeatureState.CANARY,
    features.ROLLOUT: FeatureState.GRADUAL_ROLLOUT,
}


def record_performance(feature_name: str, duration_ms: float) -> None:
    """Count a call of a feature, for the host. Slow calls do not switch it off."""
    performance.record_performance(feature_name, _OPERATION, duration_ms)


def get_status() -> dict[str, Any]:
    """``features``: by name, state, rollout_percentage, error_count, avg_performance_ms (of the
    calls given to record_performance()), dependencies (none). ``global_status``: total_features,
    enabled_features, error_count."""
    found = features.get_feature_status()
    recorded = performance.get_performance_stats()
    by_name = {
        name: {
            "state": _STATES[one["state"]].value,
            "rollout_percentage": one["rollout_percentage"],
            "error_count": one["error_count"],
            "avg_performance_ms": recorded.get(name, {}).get("average_duration_ms", 0.0),
            "dependencies": [],
        }
        for name, one in found.items()
    }
    disabled = FeatureState.DISABLED.value
    return {
        "features": by_name,
        "global_status": {
            "total_features": len(by_name),
            "enabled_features": sum(one["state"] != disabled for one in by_name.values()),
            "error_count": sum(one["error_count"] for one in by_name.values()),
        },
    }
