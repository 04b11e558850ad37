"""Metrics for OpenTelemetry: observable instruments, with the sums of all workers of the host.

    from fast_litellm_shm.integrations import opentelemetry
    opentelemetry.instrument()

Each worker may call it. One of them reports at a time, since each would report the numbers of the
whole host: the process that holds an advisory lock on the segment's file. The kernel drops the lock
when that process ends, and another one takes it at its next collection. docs/metrics.md has the
list.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping

try:
    from opentelemetry.metrics import CallbackOptions, Meter, Observation, get_meter
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.opentelemetry needs opentelemetry-api: "
        'pip install "fast-litellm-shm[otel]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment, path_of
from fast_litellm_shm.metrics import Snapshot
from fast_litellm_shm.metrics.families import Family, Histogram, Row, Value, collected
from fast_litellm_shm.metrics.source import Sources

__all__ = ["instrument"]

_SCOPE = "fast_shm"  # of the meter, and what attributes begin with
_STALE = 1.0  # seconds: a collection takes less, and the pause between two is longer

_reporters: weakref.WeakSet[_Reporter] = weakref.WeakSet()
_collections: weakref.WeakSet[_Collections] = weakref.WeakSet()


def _after_fork() -> None:
    for reporter in _reporters:
        reporter.unlock()
    for each in _collections:
        each.restart()


os.register_at_fork(after_in_child=_after_fork)


class _Reporter:
    """The lock on a segment's file; its holder reports the segment. (The segment's other locks are
    on a file of their own, and of another kind.)"""

    def __init__(self, name: str) -> None:
        self._path, self._held = path_of(name), -1
        _reporters.add(self)

    def unlock(self) -> None:
        """In a forked child the lock stays with the parent: closing a copy does not drop it."""
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)

    def locked(self) -> bool:
        """Take the lock, if it is free. Does this process hold it? False without such a segment."""
        try:
            named = os.stat(self._path)
        except OSError:
            self.unlock()
            return False
        if self._held >= 0:
            held = os.fstat(self._held)
            if (held.st_dev, held.st_ino) == (named.st_dev, named.st_ino):
                return True
            self.unlock()  # the segment was created again
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
        self.unlock()


class _Collections:
    """Reads the segments once for all instruments of a collection. A new collection begins where an
    instrument that has read already reads again."""

    def __init__(self, sources: Sources, *, once_per_host: bool) -> None:
        self._sources = sources
        self._reporters = {name: _Reporter(name) for name in sources.names} if once_per_host else {}
        self._rows: dict[str, list[Row]] = {}
        self.restart()
        _collections.add(self)

    def restart(self) -> None:
        """Also in a forked child, where the thread that held the lock does not exist."""
        self._lock = threading.Lock()
        self._read: set[tuple[str, str]] = set()
        self._taken = 0.0

    def rows(self, family: str, instrument: str) -> list[Row]:
        """Of one family, for one of its instruments."""
        with self._lock:
            now = time.monotonic()
            reader = family, instrument
            if not self._read or reader in self._read or now - self._taken > _STALE:
                self._rows = {each.name: rows for each, rows in collected(self._snapshots())}
                self._read, self._taken = set(), now
            self._read.add(reader)
            return self._rows[family]

    def _snapshots(self) -> list[tuple[str, Snapshot | None]]:
        locked = {name for name, reporter in self._reporters.items() if reporter.locked()}
        return self._sources.read(locked if self._reporters else None)


def instrument(
    meter: Meter | None = None,
    segment: Segment | str | Iterable[Segment | str] | None = None,
    *,
    keys: int = 0,
    deployments: Mapping[str, Iterable[str]] | None = None,
    once_per_host: bool = True,
) -> None:
    """Create the instruments. meter: default the global provider's. segment: a Segment, a name,
    several of either, or None for the default segment, which need not exist yet. once_per_host: of
    the processes that call this, one reports at a time; False: this one always reports (where it is
    the only one, say). keys, deployments: as in
    :class:`fast_litellm_shm.integrations.prometheus.FastShmCollector`.

    Call it once for each meter. Counters are cumulative, since the segment was created. Raises
    ValueError or TypeError for bad arguments; a collection never raises.
    """
    if meter is None:
        meter = get_meter(_SCOPE)
    sources = Sources(segment, keys=keys, deployments=deployments)
    collections = _Collections(sources, once_per_host=once_per_host)
    create_counter, create_gauge = meter.create_observable_counter, meter.create_observable_gauge
    for family, _ in collected(()):
        parts = [("", family.unit)]
        if family.kind == "histogram":  # none is observable: a count and a sum give the means
            parts = [(".count", "{call}"), (".sum", family.unit)]
        create = create_gauge if family.kind == "gauge" else create_counter
        for part, unit in parts:
            callback = _callback(family, collections, part)
            create(f"{family.name}{part}", [callback], unit, family.help)


def _number(value: Value, part: str) -> int | float:
    if isinstance(value, Histogram):
        return value.counts[-1] if part == ".count" else value.total
    return value


def _callback(
    family: Family, collections: _Collections, part: str
) -> Callable[[CallbackOptions], Iterator[Observation]]:
    names = [f"{_SCOPE}.{label}" for label in ("segment", *family.labels)]

    def observe(_: CallbackOptions) -> Iterator[Observation]:
        for labels, value in collections.rows(family.name, part):
            yield Observation(_number(value, part), dict(zip(names, labels, strict=True)))

    return observe
