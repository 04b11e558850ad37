"""Windows and counters in the segment: processes that count at once lose no count, and get none
twice."""

from __future__ import annotations

import random
import time

import pytest
from support.children import run
from support.waiting import wait_until
from support.workers import meet

from fast_litellm_shm import Segment, exceptions
from fast_litellm_shm.integrations.litellm.builtin_limiter.windows import MOST, OpenWindow, Windows

PROCESSES = 4
SCOPE = "{api_key:k}"


def _until_over(windows: Windows, window: OpenWindow) -> None:
    wait_until("the window ends", lambda: windows.opened(SCOPE, window.size) != window)


def _add(name: str, attempts: int) -> list[tuple[OpenWindow, int]]:
    meet(name, PROCESSES)
    windows, found = Windows(Segment(name)), []
    for _ in range(attempts):
        window = windows.open(SCOPE, 60)
        found.append((window, windows.add(window, SCOPE, "requests", 1)))
    return found


def test_each_of_many_gets_another_count_in_one_window(segment: Segment) -> None:
    results = run(_add, [(segment.name, 500)] * PROCESSES, "fork")
    counts = sorted(count for found in results for _, count in found)
    assert counts == list(range(1, 500 * PROCESSES + 1))
    assert len({window.end for found in results for window, _ in found}) == 1


def _take(name: str, costs: tuple[int, ...], attempts: int, limit: int) -> list[int]:
    meet(name, PROCESSES)
    windows, choose, taken = Windows(Segment(name)), random.Random(1), []
    for _ in range(attempts):
        cost = choose.choice(costs)
        if windows.take(SCOPE, "tokens", 60, cost, limit).allowed:
            taken.append(cost)
    return taken


@pytest.mark.parametrize(("costs", "limit"), [((1,), 100), ((7,), 1000), ((1, 13, 40), 1000)])
def test_processes_take_up_to_the_limit_and_no_further(
    segment: Segment, costs: tuple[int, ...], limit: int
) -> None:
    results = run(_take, [(segment.name, costs, 2000, limit)] * PROCESSES, "fork")
    total, windows = sum(map(sum, results)), Windows(segment)
    assert limit - min(costs) < total <= limit
    assert windows.count(windows.open(SCOPE, 60), SCOPE, "tokens") == total


def test_the_next_window_begins_at_nothing_and_the_old_one_cannot_reach_it(
    segment: Segment,
) -> None:
    windows = Windows(segment)
    old = windows.take(SCOPE, "requests", 1, 3, 3).window
    assert old is not None and not windows.take(SCOPE, "requests", 1, 1, 3).allowed
    _until_over(windows, old)
    assert windows.take(SCOPE, "requests", 1, 2, 3) == (True, 2, windows.opened(SCOPE, 1))
    new = windows.open(SCOPE, 1)
    assert new.end >= old.end + 1_000_000_000
    windows.give_back(old, SCOPE, "requests", 3)  # a settlement that comes late
    windows.add(old, SCOPE, "requests", 5)  # a worker that was stopped before it counted
    assert windows.count(new, SCOPE, "requests") == 2


@pytest.mark.parametrize("size", [1, 60, 86400])
def test_what_is_given_back_at_once_comes_back_whole(segment: Segment, size: int) -> None:
    windows = Windows(segment)
    window = windows.open(SCOPE, size)
    assert windows.add(window, SCOPE, "tokens", 1000) == 1000
    windows.give_back(window, SCOPE, "tokens", 400)
    assert windows.count(window, SCOPE, "tokens") == 600
    windows.give_back(window, SCOPE, "tokens", 10**6)
    assert windows.count(window, SCOPE, "tokens") == 0
    assert windows.add(window, SCOPE, "tokens", 5) == 5


def test_what_does_not_fit_counts_nothing_and_opens_no_window(segment: Segment) -> None:
    windows = Windows(segment)
    assert windows.take(SCOPE, "tokens", 60, 11, 10) == (False, 0, None)
    assert windows.opened(SCOPE, 60) is None
    assert windows.take(SCOPE, "tokens", 60, 8, 10).total == 8
    assert windows.take(SCOPE, "tokens", 60, 3, 10)[:2] == (False, 8)
    assert windows.take(SCOPE, "tokens", 60, 2, 10)[:2] == (True, 10)


def test_a_cost_of_nothing_asks_for_room_and_takes_none(segment: Segment) -> None:
    windows = Windows(segment)
    assert windows.take(SCOPE, "tokens", 60, 0, 2)[:2] == (True, 0)
    assert windows.take(SCOPE, "tokens", 60, 2, 2).allowed
    assert windows.take(SCOPE, "tokens", 60, 0, 2)[:2] == (False, 2)


def test_lost_races_are_taken_back(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the charge another one takes the room."""
    windows, others = Windows(segment), Windows(segment)
    real = windows.add

    def late(window: OpenWindow, scope: str, kind: str, cost: int) -> int:
        others.add(window, scope, kind, 8)
        return real(window, scope, kind, cost)

    monkeypatch.setattr(windows, "add", late)
    assert windows.take(SCOPE, "tokens", 60, 5, 10)[:2] == (False, 8)
    assert others.count(others.open(SCOPE, 60), SCOPE, "tokens") == 8


def test_a_counter_ends_at_the_largest_limit_that_is_enforced(segment: Segment) -> None:
    windows = Windows(segment)
    window = windows.open(SCOPE, 60)
    assert windows.add(window, SCOPE, "tokens", MOST - 5) == MOST - 5
    assert windows.take(SCOPE, "tokens", 60, 6, MOST)[:2] == (False, MOST - 5)
    assert windows.add(window, SCOPE, "tokens", 10) == MOST + 5
    assert windows.count(window, SCOPE, "tokens") == MOST - 5
    assert windows.take(SCOPE, "tokens", 60, 5, MOST)[:2] == (True, MOST)


def test_windows_are_found_by_their_start_and_without_their_size(segment: Segment) -> None:
    windows = Windows(segment)
    before = time.time()
    day = windows.open(SCOPE, 86400)
    assert before - 2 <= day.start <= time.time() + 1
    assert windows.find(SCOPE) == day == windows.find(SCOPE, 60, str(day.start))
    assert windows.find(SCOPE, None, str(day.start - 86400)) is None
    assert windows.find("{api_key:other}") is None
    assert Windows(segment).find(SCOPE, 86400) is not None  # another process, which knows the size


@pytest.mark.parametrize(
    ("size", "start", "same"),
    [(60, "1000", True), (60, "1001", True), (60, "1060", False), (1, "1001", False)],
)
def test_a_second_more_or_less_is_the_same_window(size: int, start: str, same: bool) -> None:
    assert OpenWindow(size, 0, 1000).began_at(start) is same


def test_only_admissions_are_counted_as_calls(segment: Segment) -> None:
    """In what operators see, a look is not a call, and a full counter is not a denial."""
    windows = Windows(segment)
    for _ in range(5):
        windows.open(SCOPE, 60)
        windows.take(SCOPE, "requests", 60, 1, 3)
    stats = segment.stats()
    assert (stats["admitted"], stats["denied"]) == (1 + 3, 0)  # the window, and three requests


def test_a_full_segment_raises(segment_name: str) -> None:
    small = Segment(segment_name, capacity=1)
    windows = Windows(small)
    with pytest.raises(exceptions.SegmentFullError, match="no room"):
        for i in range(10_000):
            windows.open(f"{{api_key:{i}}}", 60)
