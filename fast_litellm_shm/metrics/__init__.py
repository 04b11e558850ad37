"""Metrics of a host's segment, its health, and recommendations.

The types of a snapshot are importable from here; ``source.Source`` reads one.
"""

from fast_litellm_shm.metrics.model import (
    DURATION_BOUNDS,
    OTHERS,
    DeploymentMetrics,
    KeyMetrics,
    LimiterMetrics,
    OperationMetrics,
    PermitMetrics,
    PoolMetrics,
    SegmentMetrics,
    Snapshot,
)

__all__ = [
    "DURATION_BOUNDS",
    "OTHERS",
    "DeploymentMetrics",
    "KeyMetrics",
    "LimiterMetrics",
    "OperationMetrics",
    "PermitMetrics",
    "PoolMetrics",
    "SegmentMetrics",
    "Snapshot",
]
