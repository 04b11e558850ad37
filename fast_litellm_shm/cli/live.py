"""What the live views show: looks at a segment, one after the other, and what changed between them.

``fast-shm top`` and ``fast-shm dashboard`` are views of it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import Inspection, open_for_reading
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import held, inspect, listing, render
from fast_litellm_shm.cli.keytable import KeyTable, NameCache
from fast_litellm_shm.cli.rates import KeyCounter, KeyRates, Series
from fast_litellm_shm.metrics import health

if TYPE_CHECKING:
    import psutil

_DEPLOYMENTS = 256  # places: layout.h
_NEVER = 2**64 - 1
_ANNOUNCED = 10.0  # seconds for which a new segment is told of


@dataclass(frozen=True)
class Rate:
    """A count, how fast it grows (a second; None: not measured yet), and how fast it did in each
    past sample, oldest first."""

    total: int = 0
    now: float | None = None
    history: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Worker:
    """An attached process. cpu_percent: of one core, since the last sample. None: not known (in
    another container, or not measured yet)."""

    pid: int
    admitted: Rate
    denied: Rate
    memory_bytes: int | None
    cpu_percent: float | None
    attached_seconds: int
    command: str | None


@dataclass(frozen=True)
class LimiterRow:
    """A limiter: its limits in words, how many keys are known, calls a second of them."""

    name: str
    limits: str
    keys: int
    rate: float | None
    denied_rate: float | None


@dataclass(frozen=True)
class DeploymentRow:
    """What routers know of a deployment; name: a hash. Times in seconds, cost in dollars a call;
    None: not known yet."""

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
    """The token memo: lookups, the share that hit in the last seconds and ever (None: none)."""

    lookups: Rate
    hit_rate: float | None
    hit_rate_ever: float | None
    texts: int
    places: int


@dataclass(frozen=True)
class Snapshot:
    """One look. problem: why there is nothing to be seen, in a sentence; then the rest is empty.
    taken: seconds since 1970. stats: Segment.stats(). notice: what has just happened."""

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
    deployments: list[DeploymentRow] = field(default_factory=list)
    keys: KeyTable | None = None

    @property
    def in_flight(self) -> int:
        """Permits that living processes hold."""
        return sum(row["in_flight"] for row in self.permits)


class _Rates:
    """Series by name; those that are not met at a look are forgotten."""

    def __init__(self) -> None:
        self._series: dict[tuple[Any, ...], Series] = {}
        self._met: dict[tuple[Any, ...], Series] = {}
        self._seconds = 0.0

    def begin(self, seconds: float) -> None:
        self._series, self._met, self._seconds = self._met, {}, seconds

    def add(self, total: int, *name: Any) -> Rate:
        series = self._met[name] = self._series.get(name) or Series()
        series.add(total, self._seconds)
        return Rate(total, series.rate, series.history)


class Sampler:
    """Looks at the segment of a name again and again, whatever becomes of it.

    It maps the segment for reading alone. Where there is none, it waits for one; where it was
    removed, it goes on with what its processes still count in until there is another of that name.
    Not for several threads at once. clock: seconds, for tests.
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
        """Of one segment nothing is known that another told."""
        self._at: float | None = None
        self._rates, self._keys, self._names = _Rates(), KeyCounter(), NameCache()

    def open(self) -> None:
        """Attach now, if there is a segment. Raises SegmentError where it cannot be read."""
        try:
            self._attach()
        except exceptions.SegmentNotFoundError:
            return

    def _attach(self) -> Segment:
        """The segment that has the name now, else the one that had it last."""
        if self._segment is not None and not self._segment.unlinked:
            return self._segment
        try:
            found = open_for_reading(self.name, self.allow_other_owner)
        except exceptions.SegmentNotFoundError:
            if self._segment is None or not self._segment.processes():
                self._segment = None
                raise
            return self._segment
        if self._ever_attached:
            text = "this is a new segment of that name: the one before it was removed"
            self._notice = (self._clock(), text)
        self._segment, self._ever_attached = found, True
        self._forget()
        return found

    def sample(self) -> Snapshot:
        """Look now. Never raises because of the segment: what is wrong is told."""
        try:
            segment = self._attach()
            return self._look(segment)
        except exceptions.SegmentNotFoundError:
            problem = f"there is no segment {self.name!r}. Waiting for one. "
            if self._ever_attached:
                problem = f"segment {self.name!r} was removed. Waiting for a new one. "
            problem += listing.names_there_are()
        except exceptions.FastShmError as error:
            problem = str(error)
        except Exception as error:  # its contents are foreign: whatever they break must be told
            problem = f"the segment's contents do not add up: {type(error).__name__}: {error}"
        self._segment = None  # look it up again at the next sample
        self._forget()
        return Snapshot(self.name, time.time(), problem)

    def _look(self, segment: Segment) -> Snapshot:
        inspection = Inspection(segment)
        now = self._clock()
        seconds = now - self._at if self._at is not None else 0.0
        self._at = now
        self._rates.begin(seconds)
        stats = segment.stats()
        attached = inspect.processes_of(segment)
        rates = self._keys.add(inspection.counts, seconds)
        permits, pools = held.held(inspection, None, None)
        announced, notice = self._notice
        return Snapshot(
            name=self.name,
            taken=time.time(),
            notice=notice if notice and now - announced < _ANNOUNCED else None,
            warnings=inspect.warnings_of(stats, attached, segment),
            stats=stats,
            admitted=self._rates.add(stats["admitted"], "admitted"),
            denied=self._rates.add(stats["denied"], "denied"),
            memo=self._memo(segment),
            workers=self._workers(attached),
            limiters=_limiters(inspection, rates),
            permits=permits,
            pools=pools,
            deployments=self._deployments(segment),
            keys=KeyTable(inspection, rates, self._names),
        )

    def _workers(self, attached: list[dict[str, Any]]) -> list[Worker]:
        known = self._system
        self._system = {}
        from fast_litellm_shm._shared.dependencies import psutil

        out = []
        for process in sorted(attached, key=lambda process: process["pid"]):
            pid, cpu = process["pid"], None
            try:
                if pid in known and known[pid].is_running():  # not another of the same number
                    self._system[pid] = known[pid]
                    cpu = known[pid].cpu_percent()
                else:
                    self._system[pid] = psutil.Process(pid)
                    self._system[pid].cpu_percent()  # what it is since is told by the next call
            except psutil.Error:
                pass  # ended since, in another pid namespace, or not ours to look at
            out.append(
                Worker(
                    pid=pid,
                    admitted=self._rates.add(process["admitted"], "worker", pid, "admitted"),
                    denied=self._rates.add(process["denied"], "worker", pid, "denied"),
                    memory_bytes=process["memory_bytes"],
                    cpu_percent=cpu if process["command"] is not None else None,
                    attached_seconds=process["attached_seconds"],
                    command=None
                    if process["command"] is None
                    else render.escaped(process["command"]),
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
        places = ffi.new("uint32_t[]", list(range(_DEPLOYMENTS)))
        found = ffi.new("fshm_deployment_info[]", _DEPLOYMENTS)
        lib.fshm_deployment_look(segment._handle, places, _DEPLOYMENTS, 0, 1, found)
        rows = [
            DeploymentRow(
                name=f"#{info.id:016x}",
                in_flight=info.in_flight,
                records=self._rates.add(info.records, "deployment", info.id),
                latency=None if info.latency_ns == _NEVER else info.latency_ns / 1e9,
                success_rate=info.success_rate,
                cost=None if info.cost == _NEVER else info.cost / 1e9,
                cooldown=info.cooldown_ns / 1e9,
                idle=info.idle_ns / 1e9,
            )
            for info in found
            if info.id
        ]
        return sorted(rows, key=lambda row: row.name)


def _limiters(inspection: Inspection, rates: KeyRates) -> list[LimiterRow]:
    import numpy

    counts, rows = inspection.counts, inspection.limiters()
    by_index = list(inspection.limiter_names())
    sums = [
        numpy.bincount(
            counts.owner, weights=of[counts.cells], minlength=max(by_index, default=0) + 1
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
