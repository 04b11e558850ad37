"""Metrics of a host's segment, its health, and recommendations; here: the types of a snapshot.

Prometheus, OpenTelemetry and ``fast-shm export`` all show these numbers. ``source.Source`` and
``snapshot`` read them, ``families`` names them. Reading writes nothing to the segment, and what
takes long runs without the interpreter's lock.

Calls and durations are counters: they begin at 0 with the segment and never fall, even if a process
is killed (``csrc/DESIGN.md``, "Counters"). All other numbers are as of the moment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm._shared.native import lib

OTHERS = "(other)"  # the sum of the names beyond a bound
#: Upper bounds of a histogram's buckets, in seconds; the last bucket has none.
DURATION_BOUNDS = tuple(128e-9 * 2**i for i in range(lib.FSHM_OCTAVES - 1))


@dataclass(frozen=True)
class SegmentMetrics:
    """The segment as a whole. created: seconds since 1970. used, capacity: slots of the hash table.
    admitted, denied, refused (those that met a full table; also counted as denied): calls by all
    processes since the segment was made. damaged, liveness_unknown: a sentence, or None. unlinked:
    the segment was removed while processes use it, as far as this process knows."""

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
    shared: int = 0  # calls of keys without a slot, decided by shared counters


@dataclass(frozen=True)
class LimiterMetrics:
    """A limiter. keys: those that have consumed something; None with names "off".
    Calls are counted for each of the first 15 limiters of a segment, and together, as ``(other)``,
    for all others, which have None. Calls of a token lease, ``NAME (wallet)``, count for NAME."""

    limiter: str
    limits: tuple[str, ...]
    admitted: int | None
    denied: int | None
    refused: int | None
    keys: int | None
    shared: int | None = None  # calls of keys without a slot, decided by shared counters


@dataclass(frozen=True)
class BudgetMetrics:
    """A budget, in the present window. Amounts: dollars; limit: of each key, spent and reserved: of
    all keys. keys: those that have spent or reserved anything; warned: those that got a warning;
    used_up: those with nothing left. resets: when the window ends, seconds since 1970; None:
    never."""

    limiter: str
    limit: float
    spent: float
    reserved: float
    keys: int
    warned: int
    used_up: int
    resets: float | None


@dataclass(frozen=True)
class SpendingMetrics:
    """One of the keys that have used the largest part of their budget. Amounts: dollars."""

    limiter: str
    key: str
    limit: float
    spent: float
    reserved: float


@dataclass(frozen=True)
class PermitMetrics:
    """The permits of a limiter. in_flight: held by living processes. max_per_key: None if not
    known. dead: held by dead processes; they do not count against the limit."""

    limiter: str
    in_flight: int
    max_per_key: int | None
    dead: int
    oldest_seconds: int


@dataclass(frozen=True)
class WaitingMetrics:
    """Callers that wait for keys of a limiter, of one priority; every limiter has a row for 0.
    stale: those of stopped or dead processes; they are not among the callers."""

    limiter: str
    priority: str
    callers: int = 0
    longest_seconds: float = 0.0
    stale: int = 0


@dataclass(frozen=True)
class PoolMetrics:
    """The connections of a pool to an endpoint; ``(other)``: to all beyond the first 100."""

    pool: str
    endpoint: str
    active: int
    idle: int
    dead: int
    max_connections: int | None


@dataclass(frozen=True)
class KeyMetrics:
    """One of the busiest keys. Its counts are no counters: they restart when its slot went to
    another key and came back."""

    limiter: str
    key: str
    admitted: int
    denied: int


@dataclass(frozen=True)
class DeploymentMetrics:
    """A deployment of a router. router, deployment: the names that the reader gave; else "" and
    ``#`` with a keyed hash. latency_seconds: decaying mean over successes, None: not known.
    success_ratio: a decaying mean, too."""

    router: str
    deployment: str
    in_flight: int
    requests: int
    latency_seconds: float | None
    success_ratio: float
    cooldown_seconds: float


@dataclass(frozen=True)
class OperationMetrics:
    """The durations of one (component, operation). calls_by_duration: calls in each bucket between
    DURATION_BOUNDS, not cumulative. Operations of this library are sampled, with weights."""

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
    waiting: tuple[WaitingMetrics, ...]
    pools: tuple[PoolMetrics, ...]
    keys: tuple[KeyMetrics, ...]
    memo: Mapping[str, Any]
    feature_errors: Mapping[str, int]
    deployments: tuple[DeploymentMetrics, ...]
    operations: tuple[OperationMetrics, ...]
    budgets: tuple[BudgetMetrics, ...] = ()
    spending: tuple[SpendingMetrics, ...] = ()
