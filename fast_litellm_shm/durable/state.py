"""The state of durable limits on this host, for the command line and health checks."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm._shared import performance
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster.state import outage_state
from fast_litellm_shm.durable.link import COMPONENT, OUTAGES


def durable_state(segment: Segment) -> dict[str, Any] | None:
    """None: no limiter here is durable. Else a dict, of what happened since the segment was made.
    transactions, failed: of the state file. granted, given_back: tokens. lag_p50_ms, lag_p99_ms:
    of a transaction. away: None, or as in cluster_state(). lost: how often a process has lost the
    file."""
    stats = performance.segment_stats(segment, COMPONENT).get(COMPONENT)
    if stats is None:
        return None
    operations = stats["operations"]
    lost = performance.segment_stats(segment, OUTAGES).get(OUTAGES, {}).get("operations", {})
    outage = outage_state(segment)
    return {
        "transactions": stats["total_calls"],
        "failed": stats["error_count"],
        "granted": stats["total_output_size"],
        "given_back": operations.get("give", {}).get("total_input_size", 0),
        "lag_p50_ms": stats["p50_duration_ms"],
        "lag_p99_ms": stats["p99_duration_ms"],
        "away": outage if outage is not None and outage["file"] else None,
        "lost": lost.get("lost", {}).get("total_calls", 0),
    }
