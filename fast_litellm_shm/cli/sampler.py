"""Samples of a segment, one after the other, with rates: what ``top`` and ``dashboard`` show."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import spending
from fast_litellm_shm._shared.dependencies import numpy, psutil
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.native import why_no_descriptor
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.spending import SpendingRow
from fast_litellm_shm.cli import permits_and_pools, problems, render, segments
from fast_litellm_shm.cli.key_table import MOST_SHOWN, KeyTable, NameCache
from fast_litellm_shm.cli.rates import KeyCounter, KeyRates, Series
from fast_litellm_shm.metrics import health
from fast_litellm_shm.metrics.snapshot import UNKNOWN, deployments_of
from fast_litellm_shm.metrics.source import newest

_ANNOUNCED = 10.0  # seconds for which a new segment is announced
_REMOVED_EVERY = 10.0  # seconds: looking for users of removed segments reads much of /proc


@dataclass(frozen=True)
class Rate:
    """A count; its growth per second now (None: not measured yet), and in each past sample, oldest
    first."""

    total: int = 0
    now: float | None = None
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Worker:
    """A process that uses the segment. cpu_percent: of one core, since the last sample. None: not
    known (the process is in another container, or not measured yet)."""

    pid: int
    admitted: Rate
    denied: Rate
    memory_bytes: int | None
    cpu_percent: float | None
    attached_seconds: int
    command: str | None

    @property
    def rate(self) -> float | None:
        """Calls per second."""
        if self.admitted.now is None or self.denied.now is None:
            return None
        return self.admitted.now + self.denied.now


@dataclass(frozen=True)
class LimiterRow:
    """A limiter: its limits as text, the number of its keys, and their calls per second."""

    name: str
    limits: str
    keys: int
    rate: float | None
    denied_rate: float | None


@dataclass(frozen=True)
class DeploymentRow:
    """What routers know about a deployment. name: its hash. latency, cooldown, idle: seconds; cost:
    dollars per call. None: not known yet."""

    name: str
    in_flight: int
    records: Rate
    latency: float | None
    success_rate: float
    cost: float | None
    cooldown: float
    idle: float


@dataclass(frozen=True)
class Memo:
    """The token memo: lookups; the share of them that hit, in the last seconds and ever (None: no
    lookup); texts in it, and its size."""

    lookups: Rate
    hit_rate: float | None
    hit_rate_ever: float | None
    texts: int
    places: int


@dataclass(frozen=True)
class Snapshot:
    """One sample. taken: seconds since 1970. stats: Segment.stats(). notice: what has happened just
    now. problem: why the segment cannot be read, in a sentence; then the rest is empty."""

    name: str
    taken: float
    problem: str | None = None
    notice: str | None = None
    warnings: list[str] = field(default_factory=list)
    stats: dict[str, Any] | None = None
    admitted: Rate = Rate()
    denied: Rate = Rate()
    memo: Memo | None = None
    workers: list[Worker] = field(default_factory=list)
    limiters: list[LimiterRow] = field(default_factory=list)
    permits: list[dict[str, Any]] = field(default_factory=list)
    pools: list[dict[str, Any]] = field(default_factory=list)
    waits: list[dict[str, Any]] = field(default_factory=list)
    deployments: list[DeploymentRow] = field(default_factory=list)
    keys: KeyTable | None = None
    spending: list[SpendingRow] = field(default_factory=list)  # the first MOST_SHOWN
    spending_total: int = 0

    @property
    def in_flight(self) -> int:
        """Permits that living processes hold."""
        return sum(row["in_flight"] for row in self.permits)

    @property
    def waiting(self) -> int:
        """Callers that wait."""
        return sum(row["callers"] for row in self.waits)


class _Rates:
    """Series by name. A series that a sample does not add to is forgotten."""

    def __init__(self) -> None:
        self._series: dict[tuple[Any, ...], Series] = {}
        self._added: dict[tuple[Any, ...], Series] = {}
        self._seconds = 0.0

    def begin(self, seconds: float) -> None:
        self._series, self._added, self._seconds = self._added, {}, seconds

    def add(self, total: int, *name: Any) -> Rate:
        series = self._added[name] = self._series.get(name) or Series()
        series.add(total, self._seconds)
        return Rate(total, series.rate, series.history)


class Sampler:
    """Reads the segment of a name again and again.

    If there is none, it waits for one. If the segment is removed while processes use it, it goes on
    reading that one until there is a new segment of the name. It maps segments for reading alone.
    Not thread-safe. clock: a clock in seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        *,
        allow_other_owner: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.allow_other_owner = name, allow_other_owner
        self._clock = clock
        self._segment: Segment | None = None
        self._ever_attached = False
        self._system: dict[int, psutil.Process] = {}
        self._notice: tuple[float, str] = (0.0, "")
        self._forget()

    def _forget(self) -> None:
        """Drop all counts: those of one segment say nothing about another."""
        self._at: float | None = None
        self._rates, self._keys, self._names = _Rates(), KeyCounter(), NameCache()
        self._removed_users: tuple[float, list[int]] = (-math.inf, [])

    def open(self) -> None:
        """Attach now, if there is a segment. Raises SegmentError if it cannot be read."""
        try:
            self._attach()
        except exceptions.SegmentNotFoundError:
            return

    def _attach(self) -> Segment:
        """The segment that has the name now, else the one that had it last, if it is in use."""
        found = newest(self._segment, self.name, self.allow_other_owner)
        if found is self._segment:
            if found.unlinked and not found.processes():
                raise exceptions.SegmentNotFoundError(f"segment {self.name!r} was removed")
            return found
        if self._ever_attached:
            text = "this is a new segment of that name: the old one was removed"
            self._notice = (self._clock(), text)
        self._segment, self._ever_attached = found, True
        self._forget()
        return found

    def sample(self) -> Snapshot:
        """Read the segment now. Does not raise if that fails: ``problem`` says why."""
        try:
            segment = self._attach()
            return self._look(segment)
        except exceptions.SegmentNotFoundError:
            problem = f"there is no segment {self.name!r}. Waiting for one. "
            if self._ever_attached:
                problem = f"segment {self.name!r} was removed. Waiting for a new one. "
            problem += segments.hint(self.name)
        except exceptions.FastShmError as error:
            problem = str(error)
        except OSError as error:
            why = why_no_descriptor(error.errno or 0) or error.strerror or str(error)
            problem = f"cannot read segment {self.name!r}: {why}. Trying again"
        except Exception as error:  # other processes write its contents, and may break anything
            problem = f"the segment's contents do not add up: {type(error).__name__}: {error}"
        self._segment = None  # attach again at the next sample
        self._forget()
        return Snapshot(self.name, time.time(), problem)

    def _look(self, segment: Segment) -> Snapshot:
        inspection = Inspection(segment)
        now = self._clock()
        seconds = now - self._at if self._at is not None else 0.0
        self._at = now
        self._rates.begin(seconds)
        stats = segment._stats(inspection.damaged)
        attached = segments.processes_of(segment)
        rates = self._keys.add(inspection.counts, seconds)
        permits, pools = permits_and_pools.held(inspection, None, None)
        announced, notice = self._notice
        return Snapshot(
            name=self.name,
            taken=time.time(),
            notice=notice if notice and now - announced < _ANNOUNCED else None,
            warnings=problems.warnings_of(
                stats, attached, inspection.limiters(), segment, self._users_of_removed(now)
            ),
            stats=stats,
            admitted=self._rates.add(stats["admitted"], "admitted"),
            denied=self._rates.add(stats["denied"], "denied"),
            memo=self._memo(segment),
            workers=self._workers(attached),
            limiters=_limiters(inspection, rates),
            permits=permits,
            pools=pools,
            waits=permits_and_pools.waiting(inspection, None, None),
            deployments=self._deployments(segment),
            keys=KeyTable(inspection, rates, self._names),
            spending=list(spending.rows(segment, inspection.spending, MOST_SHOWN)),
            spending_total=sum(budget.keys for budget in inspection.spending),
        )

    def _users_of_removed(self, now: float) -> list[int]:
        if now - self._removed_users[0] >= _REMOVED_EVERY:
            self._removed_users = (now, segments.removed_users(self.name))
        return self._removed_users[1]

    def _workers(self, attached: list[dict[str, Any]]) -> list[Worker]:
        known = self._system
        self._system = {}
        out = []
        for process in sorted(attached, key=lambda process: process["pid"]):
            pid, cpu = process["pid"], None
            try:
                if pid in known and known[pid].is_running():  # the pid was not reused
                    self._system[pid] = known[pid]
                    cpu = known[pid].cpu_percent()
                else:
                    self._system[pid] = psutil.Process(pid)
                    self._system[pid].cpu_percent()  # the next call tells what was used since
            except psutil.Error:
                pass  # it has ended, or is in another pid namespace, or is another user's
            out.append(
                Worker(
                    pid=pid,
                    admitted=self._rates.add(process["admitted"], "worker", pid, "admitted"),
                    denied=self._rates.add(process["denied"], "worker", pid, "denied"),
                    memory_bytes=process["memory_bytes"],
                    cpu_percent=cpu if process["command"] is not None else None,
                    attached_seconds=process["attached_seconds"],
                    command=process["command"] and render.escaped(process["command"]),
                )
            )
        return out

    def _memo(self, segment: Segment) -> Memo:
        state = health.memo_state(segment)
        hits = self._rates.add(state["hits"], "memo", "hits")
        lookups = self._rates.add(state["hits"] + state["misses"], "memo", "lookups")
        recent = None
        if hits.now is not None and lookups.now:
            recent = min(hits.now / lookups.now, 1.0)
        return Memo(lookups, recent, state["hit_rate"], state["texts"], state["places"])

    def _deployments(self, segment: Segment) -> list[DeploymentRow]:
        rows = [
            DeploymentRow(
                name=f"#{info.id:016x}",
                in_flight=info.in_flight,
                records=self._rates.add(info.records, "deployment", info.id),
                latency=None if info.latency_ns == UNKNOWN else info.latency_ns / 1e9,
                success_rate=info.success_rate,
                cost=None if info.cost == UNKNOWN else info.cost / 1e9,
                cooldown=info.cooldown_ns / 1e9,
                idle=info.idle_ns / 1e9,
            )
            for info in deployments_of(segment)
        ]
        return sorted(rows, key=lambda row: row.name)


def _limiters(inspection: Inspection, rates: KeyRates) -> list[LimiterRow]:
    counts, rows = inspection.counts, inspection.limiters()
    by_index = list(inspection.limiter_names())
    sums = [
        numpy.bincount(
            counts.owner, weights=of[counts.slots], minlength=max(by_index, default=0) + 1
        )
        for of in (rates.admitted, rates.denied)
    ]
    out = []
    for index, row in zip(by_index, rows, strict=True):
        admitted, denied = float(sums[0][index]), float(sums[1][index])
        out.append(
            LimiterRow(
                name=render.escaped(row["name"]),
                limits=" + ".join(row["limits"]),
                keys=row["keys"],
                rate=admitted + denied if rates.measured else None,
                denied_rate=denied if rates.measured else None,
            )
        )
    return sorted(out, key=lambda row: row.name)
