"""Metrics for OpenTelemetry: observable instruments that tell the sums of all workers of the host.

    from fast_litellm_shm.integrations import opentelemetry
    opentelemetry.instrument()

Each worker may call it. Of those that do, one reports at a time, else each would report the whole
host's numbers: whichever holds an advisory lock on the segment's file. The kernel drops the lock
when that process ends, and another goes on at its next collection. docs/metrics.md has the list.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

try:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.opentelemetry needs opentelemetry-api: "
        'pip install "fast-litellm-shm[otel]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment, path_of
from fast_litellm_shm.metrics.families import Family, Row, collected
from fast_litellm_shm.metrics.model import Snapshot
from fast_litellm_shm.metrics.source import Sources

_SCOPE = "fast_shm"  # of the meter, and what attributes begin with
_STALE = 1.0  # seconds: a collection takes less, and pauses between two are longer

_turns: weakref.WeakSet[_Turn] = weakref.WeakSet()
_collections: weakref.WeakSet[_Collections] = weakref.WeakSet()


def _after_fork() -> None:
    for turn in _turns:
        turn.forget()
    for each in _collections:
        each.begin_anew()


os.register_at_fork(after_in_child=_after_fork)


class _Turn:
    """Whose turn it is to report a segment: the holder of a lock on its file. (The segment's other
    locks are on a file of their own, and of another kind.)"""

    def __init__(self, name: str) -> None:
        self._path, self._held = path_of(name), -1
        _turns.add(self)

    def forget(self) -> None:
        """In a forked child: the lock is the parent's, which keeps it when a copy is closed."""
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)

    def ours(self) -> bool:
        """Take it, if nobody has it. False where there is no such segment."""
        try:
            named = os.stat(self._path)
        except OSError:
            self.forget()
            return False
        if self._held >= 0:
            locked = os.fstat(self._held)
            if (locked.st_dev, locked.st_ino) == (named.st_dev, named.st_ino):
                return True
            self.forget()  # the segment was made anew
        try:
            found = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(found)
            return False
        self._held = found
        return True

    def __del__(self) -> None:
        self.forget()


class _Collections:
    """One look at the segments for all instruments of a collection: a new one begins where an
    instrument asks that has asked already."""

    def __init__(self, sources: Sources, *, once_per_host: bool) -> None:
        self._sources = sources
        self._turns = {name: _Turn(name) for name in sources.names} if once_per_host else {}
        self._rows: dict[str, list[Row]] = {}
        self.begin_anew()
        _collections.add(self)

    def begin_anew(self) -> None:
        """In a forked child too: whoever held the lock does not live there."""
        self._lock = threading.Lock()
        self._asked: set[tuple[str, str]] = set()
        self._taken = 0.0

    def rows(self, family: str, asks: str) -> list[Row]:
        """Of one family. asks: which of its instruments."""
        with self._lock:
            now = time.monotonic()
            if not self._asked or (family, asks) in self._asked or now - self._taken > _STALE:
                self._rows = {each.name: rows for each, rows in collected(self._look())}
                self._asked, self._taken = set(), now
            self._asked.add((family, asks))
            return self._rows[family]

    def _look(self) -> list[tuple[str, Snapshot | None]]:
        ours = {name for name, turn in self._turns.items() if turn.ours()}
        return self._sources.read(ours if self._turns else None)


def instrument(
    meter: Meter | None = None,
    segment: Segment | str | Iterable[Segment | str] | None = None,
    *,
    keys: int = 0,
    deployments: Mapping[str, Iterable[str]] | None = None,
    once_per_host: bool = True,
) -> None:
    """Make the instruments. meter: default the global provider's. segment: a Segment, a name,
    several of either, or None for the default segment, which need not exist yet. once_per_host:
    only one of the processes that are instrumented reports at a time; False: this one does,
    whatever others do (where only one is instrumented, say). keys, deployments: as in
    :class:`fast_litellm_shm.integrations.prometheus.FastShmCollector`.

    Call it once for each meter. Counters are cumulative, since the segment was made. Raises
    ValueError or TypeError for bad arguments; a collection never raises.
    """
    if meter is None:
        meter = get_meter(_SCOPE)
    sources = Sources(segment, keys=keys, deployments=deployments)
    collections = _Collections(sources, once_per_host=once_per_host)
    for family, _ in collected(()):
        if family.kind == "gauge":
            callback = _callback(family, collections, _number)
            meter.create_observable_gauge(family.name, [callback], family.unit, family.help)
        elif family.kind == "counter":
            callback = _callback(family, collections, _number)
            meter.create_observable_counter(family.name, [callback], family.unit, family.help)
        else:  # there are no observable histograms: a count and a sum, from which means follow
            for name, unit, part in (("count", "{call}", _count), ("sum", family.unit, _total)):
                meter.create_observable_counter(
                    f"{family.name}.{name}",
                    [_callback(family, collections, part, name)],
                    unit,
                    family.help,
                )


def _count(value: Any) -> int:
    return int(value.counts[-1])


def _total(value: Any) -> float:
    return float(value.total)


def _number(value: Any) -> int | float:
    return value  # type: ignore[no-any-return]


def _callback(
    family: Family, collections: _Collections, part: Callable[[Any], int | float], asks: str = ""
) -> Callable[[CallbackOptions], Iterator[Observation]]:
    names = [f"{_SCOPE}.{label}" for label in ("segment", *family.labels)]

    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for labels, value in collections.rows(family.name, asks):
            yield Observation(part(value), dict(zip(names, labels, strict=True)))

    return observe
