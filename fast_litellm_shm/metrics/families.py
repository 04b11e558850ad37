"""The metric families: name, unit and help of each number in a snapshot.

Names and units are OpenTelemetry's. Those of Prometheus follow from them by OpenTelemetry's rules:
dots become underscores, and the unit and ``_total`` are added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any, Literal

from fast_litellm_shm.metrics import Snapshot

Kind = Literal["counter", "gauge", "histogram"]

_SUFFIXES = {"s": "_seconds", "By": "_bytes", "1": "_ratio"}


@dataclass(frozen=True)
class Histogram:
    """counts: calls up to the bound of each bucket (cumulative; the last one has all). total: the
    sum of the measured values, in the unit of the family."""

    counts: tuple[int, ...]
    total: float


Value = int | float | Histogram
Row = tuple[tuple[str, ...], Value]


@dataclass(frozen=True)
class Family:
    """The metrics of one name. unit: by UCUM; in braces, what is counted. labels: the names of the
    labels of its rows, without the segment's."""

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...]
    rows: Callable[[Snapshot], Iterable[tuple[tuple[str, ...], Value | None]]]

    @property
    def prometheus(self) -> str:
        """The name in Prometheus, without the suffixes of a histogram's samples."""
        base = self.name.replace(".", "_") + _SUFFIXES.get(self.unit, "")
        return base + "_total" if self.kind == "counter" else base


def collected(
    snapshots: Sequence[tuple[str, Snapshot | None]],
) -> Iterator[tuple[Family, list[Row]]]:
    """Each family with its rows; the labels of a row begin with the segment's name. If a snapshot
    is None (the segment cannot be read), only ``fast_shm.up`` has a row for it: 0."""
    yield UP, [((name,), int(snapshot is not None)) for name, snapshot in snapshots]
    for family in FAMILIES:
        rows: list[Row] = [
            ((name, *labels), value)
            for name, snapshot in snapshots
            if snapshot is not None
            for labels, value in family.rows(snapshot)
            if value is not None
        ]
        yield family, rows


Rows = Iterator[tuple[tuple[str, ...], Value | None]]


class _Each:
    """Makes families of the entries of a snapshot. labels: the fields that identify an entry."""

    def __init__(self, entries: Callable[[Snapshot], Iterable[Any]], *labels: str) -> None:
        self._entries, self._labels = entries, labels

    def __call__(self, name: str, kind: Kind, unit: str, text: str, field: str) -> Family:
        def rows(s: Snapshot) -> Rows:
            for each in self._entries(s):
                yield tuple(getattr(each, label) for label in self._labels), getattr(each, field)

        return Family(name, kind, unit, text, self._labels, rows)


def _state(name: str, text: str, field: str) -> Family:
    def rows(s: Snapshot) -> Rows:
        yield (), int(bool(getattr(s.segment, field)))

    return Family(name, "gauge", "", f"1: {text}. Else 0.", (), rows)


def _durations(s: Snapshot) -> Rows:
    for each in s.operations:
        counts = tuple(accumulate(each.calls_by_duration))
        yield (each.component, each.operation), Histogram(counts, each.seconds)


_segment = _Each(lambda s: [s.segment])
_memo = _Each(lambda s: [SimpleNamespace(**s.memo)])
_limiter = _Each(lambda s: s.limiters, "limiter")
_budget = _Each(lambda s: s.budgets, "limiter")
_spending = _Each(lambda s: s.spending, "limiter", "key")
_permit = _Each(lambda s: s.permits, "limiter")
_waiting = _Each(lambda s: s.waiting, "limiter", "priority")
_pool = _Each(lambda s: s.pools, "pool", "endpoint")
_key = _Each(lambda s: s.keys, "limiter", "key")
_deployment = _Each(lambda s: s.deployments, "router", "deployment")
_operation = _Each(lambda s: s.operations, "component", "operation")

UP = Family("fast_shm.up", "gauge", "", "1: the segment can be read. Else 0.", (), lambda s: ())
# fmt: off
FAMILIES: tuple[Family, ...] = (
    _segment("fast_shm.admitted", "counter", "{call}",
             "Calls admitted, by all processes.", "admitted"),
    _segment("fast_shm.denied", "counter", "{call}",
             "Calls denied, by all processes.", "denied"),
    _segment("fast_shm.refused", "counter", "{call}",
             "Calls that met a full table; they are among the denied.", "refused"),
    _segment("fast_shm.shared", "counter", "{call}",
             "Calls of keys without a slot, decided by shared counters.", "shared"),
    _limiter("fast_shm.limiter.admitted", "counter", "{call}",
             "Calls that the limiter admitted.", "admitted"),
    _limiter("fast_shm.limiter.denied", "counter", "{call}",
             "Calls that the limiter denied.", "denied"),
    _limiter("fast_shm.limiter.refused", "counter", "{call}",
             "Calls of the limiter that met a full table; they are among the denied.", "refused"),
    _limiter("fast_shm.limiter.shared", "counter", "{call}",
             "Calls of the limiter whose key had no slot, decided by shared counters.", "shared"),
    _limiter("fast_shm.limiter.keys", "gauge", "{key}",
             "Keys that have consumed something of the limiter.", "keys"),
    _permit("fast_shm.permits.in_flight", "gauge", "{permit}",
            "Permits that living processes hold.", "in_flight"),
    _permit("fast_shm.permits.key.max", "gauge", "{permit}",
            "Permits that may be held at the same time, for each key.", "max_per_key"),
    _permit("fast_shm.permits.dead", "gauge", "{permit}",
            "Permits of dead processes; they are given back when a caller needs one.", "dead"),
    _permit("fast_shm.permits.oldest.age", "gauge", "s",
            "Age of the oldest permit that a living process holds.", "oldest_seconds"),
    _waiting("fast_shm.waiting.callers", "gauge", "{caller}",
             "Callers that wait for a permit or for tokens.", "callers"),
    _waiting("fast_shm.waiting.longest", "gauge", "s",
             "How long the first of them has waited.", "longest_seconds"),
    _waiting("fast_shm.waiting.stale", "gauge", "{caller}",
             "Callers of stopped or dead processes; the others pass them.", "stale"),
    _pool("fast_shm.pool.active", "gauge", "{connection}",
          "Connections in use.", "active"),
    _pool("fast_shm.pool.idle", "gauge", "{connection}",
          "Open connections that are not in use.", "idle"),
    _pool("fast_shm.pool.dead", "gauge", "{connection}",
          "Connections of dead processes; they are given back when a caller needs one.", "dead"),
    _pool("fast_shm.pool.max", "gauge", "{connection}",
          "Most connections to the endpoint, idle ones included.", "max_connections"),
    _key("fast_shm.key.remembered.admitted", "gauge", "{call}",
         "Calls of one of the busiest keys admitted since the key has its slot.", "admitted"),
    _key("fast_shm.key.remembered.denied", "gauge", "{call}",
         "Calls of one of the busiest keys denied since the key has its slot.", "denied"),
    _budget("fast_shm.budget.limit.usd", "gauge", "{USD}",
            "Dollars that each key of the budget may spend in a window.", "limit"),
    _budget("fast_shm.budget.spent.usd", "gauge", "{USD}",
            "Dollars that all keys have spent in the present window.", "spent"),
    _budget("fast_shm.budget.reserved.usd", "gauge", "{USD}",
            "Dollars reserved by calls that are not settled.", "reserved"),
    _budget("fast_shm.budget.keys", "gauge", "{key}",
            "Keys that have spent or reserved anything in the present window.", "keys"),
    _budget("fast_shm.budget.keys.warned", "gauge", "{key}",
            "Keys that have reached warn_at in the present window.", "warned"),
    _budget("fast_shm.budget.keys.used_up", "gauge", "{key}",
            "Keys of which nothing is left in the present window.", "used_up"),
    _budget("fast_shm.budget.reset.timestamp", "gauge", "s",
            "When the present window ends, since 1970.", "resets"),
    _spending("fast_shm.budget.key.limit.usd", "gauge", "{USD}",
              "Dollars that one of the keys with the largest share used may spend in the present "
              "window.", "limit"),
    _spending("fast_shm.budget.key.spent.usd", "gauge", "{USD}",
              "Dollars that one of the keys with the largest share used has spent in the present "
              "window.", "spent"),
    _spending("fast_shm.budget.key.reserved.usd", "gauge", "{USD}",
              "Dollars reserved of one of the keys with the largest share used.", "reserved"),
    _segment("fast_shm.processes", "gauge", "{process}",
             "Living processes that use the segment.", "processes"),
    _segment("fast_shm.capacity", "gauge", "{place}",
             "Slots for keys and permits.", "capacity"),
    _segment("fast_shm.used", "gauge", "{place}",
             "Slots in use.", "used"),
    _segment("fast_shm.utilization", "gauge", "1",
             "Slots in use, as a share of the capacity.", "utilization"),
    _segment("fast_shm.size", "gauge", "By",
             "Size of the segment.", "size_bytes"),
    _segment("fast_shm.created.timestamp", "gauge", "s",
             "When the segment was made, since 1970.", "created"),
    _state("fast_shm.damaged", "the segment is damaged: something overwrote it", "damaged"),
    _state("fast_shm.unlinked", "the segment was removed while processes use it", "unlinked"),
    _state("fast_shm.liveness_unknown", "it is not known which processes are alive",
           "liveness_unknown"),
    _memo("fast_shm.memo.hits", "counter", "{text}",
          "Texts whose tokens a worker had counted before.", "hits"),
    _memo("fast_shm.memo.misses", "counter", "{text}",
          "Texts whose tokens had to be counted.", "misses"),
    _memo("fast_shm.memo.texts", "gauge", "{text}",
          "Texts in the memo.", "texts"),
    _memo("fast_shm.memo.places", "gauge", "{text}",
          "Texts that the memo has room for.", "places"),
    Family("fast_shm.feature.errors", "gauge", "{error}",
           "Errors of the feature since reset_errors().", ("feature",),
           lambda s: [((name,), errors) for name, errors in s.feature_errors.items()]),
    _deployment("fast_shm.deployment.requests", "counter", "{request}",
                "Requests that have ended.", "requests"),
    _deployment("fast_shm.deployment.in_flight", "gauge", "{request}",
                "Requests in flight.", "in_flight"),
    _deployment("fast_shm.deployment.latency", "gauge", "s",
                "Latency of successful requests, a decaying mean.", "latency_seconds"),
    _deployment("fast_shm.deployment.success", "gauge", "1",
                "Share of requests that succeeded, a decaying mean.", "success_ratio"),
    _deployment("fast_shm.deployment.cooldown", "gauge", "s",
                "How long routers will not pick the deployment; 0: they may.", "cooldown_seconds"),
    Family("fast_shm.operation.duration", "histogram", "s",
           "Durations of the operation. Operations of this library are sampled, with weights.",
           ("component", "operation"), _durations),
    _operation("fast_shm.operation.errors", "counter", "{call}",
               "Calls of the operation that failed.", "errors"),
    _segment("fast_shm.read.duration", "gauge", "s",
             "How long reading these numbers took.", "read_seconds"),
)
# fmt: on
