"""What happens in a segment, in numbers for monitoring: one typed snapshot of the host.

Prometheus, OpenTelemetry and ``fast-shm export`` all show these numbers; ``metric_snapshot`` and
``metric_source`` read them, ``metric_families`` names them. Reading disturbs nobody: the segment is
mapped for reading alone, and what takes long runs without the interpreter's lock.

Calls and durations are counters: they begin at 0 with the segment and never fall, whoever is killed
(``csrc/DESIGN.md``, "Tallies"). All else is as it is at the moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm._shared.native import lib

OTHERS = "(other)"  # what a bound on the number of names leaves out, summed
#: Upper bounds of a histogram's buckets, in seconds; the last bucket has none.
DURATION_BOUNDS = tuple(128e-9 * 2**i for i in range(lib.FSHM_OCTAVES - 1))


@dataclass(frozen=True)
class SegmentMetrics:
    """damaged, liveness_unknown: a sentence, or None. unlinked: processes are still attached to a
    removed segment, as far as this process knows. created: seconds since 1970. used, of capacity:
    places. calls: by all processes that ever were; refused (met a full table) are denied too."""

    name: str
    size_bytes: int
    created: float
    capacity: int
    used: int
    utilization: float
    processes: int
    admitted: int
    denied: int
    refused: int
    damaged: str | None
    unlinked: bool
    liveness_unknown: str | None
    read_seconds: float
    shared: int = 0  # calls decided by counters that keys without room share


@dataclass(frozen=True)
class LimiterMetrics:
    """keys: that have consumed something; None where the segment keeps nothing of keys. Calls are
    counted apart for the first 15 limiters of a segment; the others' are those of ``(other)``, and
    those of a ``NAME (wallet)`` are NAME's."""

    limiter: str
    limits: tuple[str, ...]
    admitted: int | None
    denied: int | None
    refused: int | None
    keys: int | None
    shared: int | None = None  # calls decided by counters that keys without room share


@dataclass(frozen=True)
class PermitMetrics:
    """Permits of a limiter. in_flight: of living processes. max_per_key: None where it is not
    known. dead: of processes that died; they count no more."""

    limiter: str
    in_flight: int
    max_per_key: int | None
    dead: int
    oldest_seconds: int


@dataclass(frozen=True)
class PoolMetrics:
    """Connections to an endpoint; in all to those beyond the first 100: ``(other)``."""

    pool: str
    endpoint: str
    active: int
    idle: int
    dead: int
    max_connections: int | None


@dataclass(frozen=True)
class KeyMetrics:
    """One of the busiest keys. Its counts begin again when its place has gone to another key in
    between, so they are no counters."""

    limiter: str
    key: str
    admitted: int
    denied: int


@dataclass(frozen=True)
class DeploymentMetrics:
    """router and deployment: as named by who asks, else "" and a ``#`` with a keyed hash.
    latency_seconds: decaying mean of successes, None: not known. success_ratio: decaying."""

    router: str
    deployment: str
    in_flight: int
    requests: int
    latency_seconds: float | None
    success_ratio: float
    cooldown_seconds: float


@dataclass(frozen=True)
class OperationMetrics:
    """Durations of one (component, operation). calls_by_duration: of each bucket, not cumulative;
    its bounds are DURATION_BOUNDS. The library's own are samples, each with its weight."""

    component: str
    operation: str
    calls_by_duration: tuple[int, ...]
    errors: int
    seconds: float


@dataclass(frozen=True)
class Snapshot:
    """A segment at one moment."""

    segment: SegmentMetrics
    limiters: tuple[LimiterMetrics, ...]
    permits: tuple[PermitMetrics, ...]
    pools: tuple[PoolMetrics, ...]
    keys: tuple[KeyMetrics, ...]
    memo: Mapping[str, Any]
    feature_errors: Mapping[str, int]
    deployments: tuple[DeploymentMetrics, ...]
    operations: tuple[OperationMetrics, ...]
