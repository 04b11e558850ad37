"""The table of keys of the live views: sorted, filtered, with rates."""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.dependencies import numpy
from fast_litellm_shm._shared.inspection import Inspection, KeyRow
from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.rates import KeyRates

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: How keys can be sorted: the greatest first, but names and what is left the smallest first.
SORTS = ("rate", "denied_rate", "admitted", "denied", "left", "key", "limiter")
_ASCENDING = ("left", "key", "limiter")
MOST_SHOWN = 1000  # rows of an order; to find a key further down, filter
_MOST_PEEKED = 2000  # keys that are sorted by what is left: each has to be read


@dataclass(frozen=True)
class LiveKey:
    """A key, with its calls per second now (None: not measured yet) and in each past sample, oldest
    first. ident: stays the same as long as the key has its slot. name: escaped."""

    ident: str
    name: str
    row: KeyRow
    rate: float | None
    denied_rate: float | None
    admitted_history: list[float]
    denied_history: list[float]


def matcher(pattern: str) -> Callable[[str], bool]:
    """A test for names: part of the name, or a glob if it has one of ``*?[``. Ignores case."""
    wanted = pattern.casefold()
    if any(c in wanted for c in "*?["):
        return lambda name: fnmatch.fnmatchcase(name.casefold(), wanted)
    return lambda name: wanted in name.casefold()


class NameCache:
    """The names of keys by slot, each read once; and which of them match a pattern.

    A name that the segment does not have (any more) is read again once its key was used: the call
    may have written it again.
    """

    def __init__(self) -> None:
        self._who: NDArray[numpy.uint64] | None = None
        self._names: NDArray[Any]
        self._known: NDArray[numpy.bool_]
        self._calls: NDArray[numpy.uint64]  # of the key, when its name was read
        self._pattern = ""
        self._fits: NDArray[numpy.int8]  # 0: not tried, 1: matches, -1: does not

    def read(self, inspection: Inspection) -> NDArray[Any]:
        """The name of each slot. Only slots in ``inspection.counts.slots`` have one."""
        counts = inspection.counts
        if self._who is None or self._who.size != counts.who.size:
            self._who = numpy.zeros_like(counts.who)
            self._names = numpy.full(counts.who.size, "", object)
            self._known = numpy.zeros(counts.who.size, bool)
            self._calls = numpy.zeros_like(counts.who)
            self._fits = numpy.zeros(counts.who.size, numpy.int8)
        slots = counts.slots
        calls = counts.admitted[slots] + counts.denied[slots]
        fresh = ~self._known[slots] & (calls != self._calls[slots])
        fresh |= counts.who[slots] != self._who[slots]
        slots = slots[fresh]
        self._calls[slots] = calls[fresh]
        for slot in slots.tolist():
            text, raw = inspection.name(slot)
            self._names[slot] = render.shown_name(text, raw)
            self._known[slot] = bool(raw) or not text
        self._fits[slots] = 0
        self._who[slots] = counts.who[slots]
        return self._names

    def fitting(self, inspection: Inspection, pattern: str) -> NDArray[numpy.int64]:
        """The slots with a key that matches, by its name or by that of its limiter."""
        names, slots = self.read(inspection), inspection.counts.slots
        if pattern != self._pattern:
            self._pattern = pattern
            self._fits[:] = 0
        fits = matcher(pattern)
        for slot in slots[self._fits[slots] == 0].tolist():
            self._fits[slot] = 1 if fits(names[slot]) else -1
        chosen = self._fits[slots] == 1
        for index, name in inspection.limiter_names().items():
            if fits(name):
                chosen |= inspection.counts.owner == index
        found: NDArray[numpy.int64] = slots[chosen]
        return found


class KeyTable:
    """The keys at one moment. Counts and rates are of that moment. What is left of a limit is read
    when the row is first read."""

    def __init__(self, inspection: Inspection, rates: KeyRates, names: NameCache) -> None:
        self._inspection, self._rates, self._names = inspection, rates, names
        self._rows: dict[int, KeyRow | None] = {}

    @property
    def total(self) -> int:
        """How many keys have statistics."""
        return self._inspection.keys_total

    def order(
        self, sort: str = "rate", *, reverse: bool = False, match: str = ""
    ) -> tuple[list[int], int]:
        """The slots of the first MOST_SHOWN keys, and how many keys match.

        sort: one of SORTS. reverse: the opposite order. match: part of the name of a key or
        limiter, or a glob; case does not matter. Raises ValueError for another sort."""
        if sort not in SORTS:
            raise ValueError(f"sort must be one of {', '.join(SORTS)}, not {sort!r}")
        slots = self._inspection.counts.slots
        if match:
            slots = self._names.fitting(self._inspection, match)
        descending = (sort not in _ASCENDING) != reverse
        if sort == "key":
            return self._by_name(slots, descending), int(slots.size)
        if sort == "left":
            return self._by_left(slots, descending), int(slots.size)
        return self._first(slots, self._weight(sort, slots), descending), int(slots.size)

    def _weight(self, sort: str, slots: NDArray[Any]) -> NDArray[Any]:
        """The values to sort by. If two are equal, the key with more calls comes first: 1e-13 of a
        count is less than any difference of rates."""
        counts, rates = self._inspection.counts, self._rates
        calls = counts.admitted[slots] + counts.denied[slots]
        if sort == "limiter":
            names = self._inspection.limiter_names()
            rank = {index: at for at, index in enumerate(sorted(names, key=names.__getitem__))}
            owner = (counts.meta[slots] >> 20).tolist()
            weight: NDArray[Any] = calls * -1e-13
            return weight + [rank[index] for index in owner]
        if sort == "rate":
            counted: NDArray[Any] = rates.admitted[slots] + rates.denied[slots]
        else:
            of = {"denied_rate": rates.denied, "admitted": counts.admitted, "denied": counts.denied}
            counted = numpy.asarray(of[sort])[slots]
        weight = counted.astype(float) + calls * 1e-13
        return weight

    @staticmethod
    def _first(slots: NDArray[Any], weight: NDArray[Any], descending: bool) -> list[int]:
        weight = -weight if descending else weight
        if slots.size > MOST_SHOWN:
            some = numpy.sort(numpy.argpartition(weight, MOST_SHOWN)[:MOST_SHOWN])
            slots, weight = slots[some], weight[some]
        found: list[int] = slots[numpy.argsort(weight, kind="stable")].tolist()
        return found

    def _by_name(self, slots: NDArray[Any], descending: bool) -> list[int]:
        names = self._names.read(self._inspection)
        choose = heapq.nlargest if descending else heapq.nsmallest
        return choose(MOST_SHOWN, slots.tolist(), key=lambda slot: (names[slot], slot))

    def _by_left(self, slots: NDArray[Any], descending: bool) -> list[int]:
        """By the share of the limit that is left; only the busiest keys, since each is read."""
        weight = -self._weight("rate", slots)
        if slots.size > _MOST_PEEKED:
            slots = slots[numpy.argpartition(weight, _MOST_PEEKED)[:_MOST_PEEKED]]
        shares = []
        for slot in sorted(slots.tolist()):
            row = self._row(slot)
            if row is not None and row.remaining is not None and row.limit:
                shares.append((row.remaining / row.limit, -(row.admitted + row.denied), slot))
        shares.sort(reverse=descending)
        return [slot for _, _, slot in shares[:MOST_SHOWN]]

    def _row(self, slot: int) -> KeyRow | None:
        if slot not in self._rows:
            self._rows[slot] = self._inspection.row(slot)
        return self._rows[slot]

    def rows(self, slots: list[int]) -> list[LiveKey | None]:
        """The keys in these slots, in this order; None if the key has left its slot since."""
        rates = self._rates
        admitted, denied = rates.history(slots)
        out: list[LiveKey | None] = []
        for at, slot in enumerate(slots):
            row = self._row(slot)
            if row is None:
                out.append(None)
                continue
            refused = float(rates.denied[slot])
            out.append(
                LiveKey(
                    ident=f"{int(self._inspection.counts.who[slot]):016x}",
                    name=render.shown_name(row.key, row.raw),
                    row=row,
                    rate=float(rates.admitted[slot]) + refused if rates.measured else None,
                    denied_rate=refused if rates.measured else None,
                    admitted_history=numpy.round(admitted[at], 1).tolist(),
                    denied_history=numpy.round(denied[at], 1).tolist(),
                )
            )
        return out
