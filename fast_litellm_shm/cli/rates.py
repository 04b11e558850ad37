"""Rates, and short histories of them, from counts that are read again and again.

A count only rises. But a process may be moving its count from its own counters to the key
statistics while they are read; then a sample misses it, and the count seems to fall
(inspection.py reads one after the other). So a fall is no news. After it, only what comes on top
of the last value counts; and once the count is above the height that it fell from, only what
comes on top of that. The count of a slot starts again when the slot goes to another key.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from fast_litellm_shm._shared.dependencies import numpy
from fast_litellm_shm._shared.inspection import Counts

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 5.0  # seconds: a rate is the mean over these, else the order of rows never rests
HISTORY = 60  # samples


def _covering(lengths: list[float]) -> int:
    """How many of the last samples cover WINDOW; all of them, if they are fewer."""
    covered = 0.0
    for count, seconds in enumerate(reversed(lengths), start=1):
        covered += seconds
        if covered >= WINDOW - 1e-6:
            return count
    return len(lengths)


class Series:
    """The rate of one count, and the history of the rate."""

    def __init__(self) -> None:
        self.total = 0
        self._high: int | None = None  # before the count fell
        self._last: int | None = None
        self._deltas: deque[tuple[float, int]] = deque(maxlen=HISTORY)

    def add(self, total: int, seconds: float) -> None:
        """Add the present count, ``seconds`` after the last one (ignored for the first)."""
        if self._last is not None and seconds > 0:
            base = self._last
            if self._high is not None and total >= self._high:
                base = self._high
            self._deltas.append((seconds, max(total - base, 0)))
            self._high = self._last if total < self._last else None
        self._last = self.total = total

    @property
    def rate(self) -> float | None:
        """Per second, over the last WINDOW; None before the second sample."""
        if not self._deltas:
            return None
        recent = list(self._deltas)[-_covering([seconds for seconds, _ in self._deltas]) :]
        return sum(delta for _, delta in recent) / sum(seconds for seconds, _ in recent)

    @property
    def history(self) -> list[float]:
        """The rate of each sample, oldest first; at most HISTORY of them."""
        return [delta / seconds for seconds, delta in self._deltas]


class _Sample(NamedTuple):
    """What was counted between two samples, for each slot that changed, in order."""

    number: int
    seconds: float
    slots: NDArray[numpy.int64]
    admitted: NDArray[numpy.uint32]
    denied: NDArray[numpy.uint32]


@dataclass(frozen=True)
class KeyRates:
    """The rates of all keys at one moment, in calls per second, by slot. measured: False before the
    second sample."""

    measured: bool
    admitted: NDArray[numpy.float32]
    denied: NDArray[numpy.float32]
    _samples: tuple[_Sample, ...]
    _since: NDArray[numpy.uint32]

    def history(self, slots: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Admitted and denied calls per second: a row for each of these slots, oldest first."""
        wanted = numpy.asarray(slots, dtype=numpy.int64)
        shape = (len(slots), len(self._samples))
        admitted, denied = numpy.zeros(shape), numpy.zeros(shape)
        for column, sample in enumerate(self._samples):
            if not sample.slots.size or not wanted.size:
                continue
            at = numpy.searchsorted(sample.slots, wanted)
            at[at == sample.slots.size] = 0
            known = (sample.slots[at] == wanted) & (self._since[wanted] <= sample.number)
            for out, counted in ((admitted, sample.admitted), (denied, sample.denied)):
                out[known, column] = counted[at[known]] / sample.seconds
        return admitted, denied


class KeyCounter:
    """Turns successive Counts of one segment into KeyRates.

    It keeps what changed from sample to sample: 16 bytes for each key that was used. Of samples
    before the last WINDOW it keeps only the MOST_KEPT busiest keys, which bounds its memory: a
    minute of a table with a million busy keys fits.
    """

    MOST_KEPT = 20_000

    def __init__(self) -> None:
        self._samples: list[_Sample] = []
        self._number = 0
        self._before: Counts | None = None
        # By slot. who: the key that it has, or had last; since: the sample in which it got the key;
        # high: its counts before they fell, else 0.
        self._who: NDArray[numpy.uint64]
        self._since: NDArray[numpy.uint32]
        self._high: tuple[NDArray[numpy.uint64], NDArray[numpy.uint64]]

    def add(self, counts: Counts, seconds: float) -> KeyRates:
        """Add the present counts, ``seconds`` after the last ones (ignored for the first)."""
        before, self._before = self._before, counts
        if before is None:
            self._who = counts.who
            self._since = numpy.zeros(counts.who.size, numpy.uint32)
            self._high = (numpy.zeros_like(counts.admitted), numpy.zeros_like(counts.denied))
            nothing = numpy.zeros(counts.who.size, numpy.float32)
            return KeyRates(False, nothing, nothing, (), self._since)
        self._number += 1
        another = (counts.who != self._who) & (self._who != 0) & (counts.who != 0)
        self._who = numpy.where(counts.who != 0, counts.who, self._who)
        self._since = numpy.where(another, numpy.uint32(self._number), self._since)
        kept = counts.meta == before.meta
        admitted, high_admitted = self._grown(counts.admitted, before.admitted, self._high[0], kept)
        denied, high_denied = self._grown(counts.denied, before.denied, self._high[1], kept)
        self._high = (high_admitted, high_denied)
        slots = numpy.flatnonzero((admitted + denied) > 0)
        self._samples.append(
            _Sample(
                self._number,
                max(seconds, 1e-3),
                slots,
                admitted[slots].astype(numpy.uint32),
                denied[slots].astype(numpy.uint32),
            )
        )
        del self._samples[:-HISTORY]
        return self._rates(counts.who.size)

    @staticmethod
    def _grown(
        now: NDArray[Any], before: NDArray[Any], high: NDArray[Any], kept: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """How much was counted since, and the heights from which counts fell."""
        base = numpy.where(now >= high, numpy.maximum(high, before), before)
        base *= kept  # the count of another key began at 0
        fell = now < base
        return numpy.where(fell, 0, now - base), numpy.where(fell, base, 0)

    def _rates(self, size: int) -> KeyRates:
        recent = _covering([sample.seconds for sample in self._samples])
        old = len(self._samples) - recent - 1
        if old >= 0 and self._samples[old].slots.size > self.MOST_KEPT:
            self._samples[old] = self._thinned(self._samples[old])
        admitted = numpy.zeros(size, numpy.float32)
        denied = numpy.zeros(size, numpy.float32)
        seconds = 0.0
        for sample in self._samples[-recent:]:
            seconds += sample.seconds
            mine = self._since[sample.slots] <= sample.number
            slots = sample.slots[mine]  # no slot twice, so += adds all
            admitted[slots] += sample.admitted[mine]
            denied[slots] += sample.denied[mine]
        admitted /= seconds
        denied /= seconds
        return KeyRates(True, admitted, denied, tuple(self._samples), self._since)

    def _thinned(self, sample: _Sample) -> _Sample:
        calls = sample.admitted.astype(numpy.int64) + sample.denied
        most = numpy.sort(numpy.argpartition(-calls, self.MOST_KEPT)[: self.MOST_KEPT])
        return sample._replace(
            slots=sample.slots[most], admitted=sample.admitted[most], denied=sample.denied[most]
        )
