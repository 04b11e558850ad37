"""Rates from counts that fall, that are new, and whose slot goes to another key."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from fast_litellm_shm._shared.inspection import Counts
from fast_litellm_shm.cli.rates import HISTORY, KeyCounter, KeyRates, Series


def counts(*slots: tuple[int, int, int], meta: int | None = None) -> Counts:
    """Counts with one slot for each triple: the key (0: none), admitted, denied. meta: the key that
    the counts belong to, if it is another one."""
    who = numpy.array([who for who, _, _ in slots], numpy.uint64)
    known = numpy.flatnonzero(who)
    return Counts(
        slots=known,
        owner=numpy.zeros(known.size, numpy.int64),
        who=who,
        meta=who.astype(numpy.uint32) if meta is None else numpy.array([meta], numpy.uint32),
        admitted=numpy.array([admitted for _, admitted, _ in slots], numpy.uint64),
        denied=numpy.array([denied for _, _, denied in slots], numpy.uint64),
    )


def histories(rates: KeyRates, slot: int) -> tuple[list[float], list[float]]:
    admitted, denied = rates.history([slot])
    return admitted[0].tolist(), denied[0].tolist()


def test_series() -> None:
    series = Series()
    series.add(1000, 0)
    assert (series.total, series.rate, series.history) == (1000, None, [])
    series.add(1010, 2)
    assert (series.rate, series.history) == (5.0, [5.0])
    for _ in range(HISTORY):
        series.add(series.total + 3, 1)
    assert (series.rate, series.history) == (3.0, [3.0] * HISTORY)
    for _ in range(4):
        series.add(series.total, 1)
    assert series.rate == 3 / 5  # the mean of 5 seconds
    series.add(series.total, 1)
    assert series.rate == 0.0


@pytest.mark.parametrize(
    ("totals", "rates"),
    [
        ([10, 20, 4, 30], [10, 0, 10]),  # a look that missed some: they were counted before
        ([10, 20, 4, 6, 9], [10, 0, 2, 3]),  # it began afresh
        ([10, 20, 4, 6, 30], [10, 0, 2, 24]),
        ([10, 20, 15, 18, 16, 25], [10, 0, 3, 0, 7]),
    ],
)
def test_what_falls_is_no_news(totals: list[int], rates: list[float]) -> None:
    series, keys = Series(), KeyCounter()
    for total in totals:
        series.add(total, 1)
        found = keys.add(counts((7, total, 0), (8, 0, total)), 1)
    assert series.history == rates
    nothing = [0.0] * len(rates)
    assert histories(found, 0) == (rates, nothing)
    assert histories(found, 1) == (nothing, rates)


def test_keys() -> None:
    keys = KeyCounter()
    first = keys.add(counts((7, 100, 50), (0, 0, 0)), 0)
    assert not first.measured and first.admitted.tolist() == [0, 0]
    second = keys.add(counts((7, 110, 50), (9, 4, 6)), 2)
    assert second.measured
    assert (second.admitted.tolist(), second.denied.tolist()) == ([5, 2], [0, 3])
    third = keys.add(counts((7, 110, 50), (9, 4, 6)), 2)
    assert (third.admitted.tolist(), third.denied.tolist()) == ([2.5, 1], [0, 1.5])
    assert histories(third, 1) == ([2, 0], [3, 0])
    assert second.admitted.tolist() == [5, 2], "an old moment stays as it was"


def test_a_cell_that_went_to_another_key() -> None:
    keys = KeyCounter()
    keys.add(counts((7, 1000, 0)), 0)
    keys.add(counts((7, 1020, 0)), 1)
    moved = keys.add(counts((8, 3, 1)), 1)  # its counts began at 0
    assert histories(moved, 0) == ([0, 3], [0, 1]), "the past is the other key's"
    assert (moved.admitted[0], moved.denied[0]) == (1.5, 0.5)
    empty = keys.add(counts((0, 3, 1), meta=8), 1)
    assert empty.admitted[0] == 1
    back = keys.add(counts((8, 5, 1)), 1)
    assert histories(back, 0) == ([0, 3, 0, 2], [0, 1, 0, 0]), "it was away, and is the same key"
    keys.add(counts((0, 5, 1), meta=8), 1)
    through_empty = keys.add(counts((9, 1, 0)), 1)
    assert histories(through_empty, 0) == ([0] * 5 + [1], [0] * 6)


def test_histories_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeyCounter, "MOST_KEPT", 3)
    keys = KeyCounter()
    totals = numpy.zeros(10, int)
    for _ in range(HISTORY + 20):
        totals += numpy.arange(10)
        found = keys.add(counts(*((i + 1, int(total), 0) for i, total in enumerate(totals))), 1)
    assert found.admitted.tolist() == list(range(10)), "of the last seconds all are known"
    assert histories(found, 9)[0] == [9.0] * HISTORY
    assert histories(found, 2)[0] == [0.0] * (HISTORY - 5) + [2.0] * 5


def test_no_keys() -> None:
    keys, none = KeyCounter(), counts()
    keys.add(none, 0)
    found: Any = keys.add(none, 1)
    assert [rows.shape for rows in found.history([])] == [(0, 1), (0, 1)]
