"""Slots in flight in the segment: never more than the limit, and a dead worker's come back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.connection import Connection

from support.children import run, run_one
from support.permits import Span, most_at_once
from support.waiting import PATIENCE
from support.workers import meet

from fast_litellm_shm import Segment
from fast_litellm_shm.integrations.litellm.builtin_limiter.slots import Refused, Slots

PROCESSES, LIMIT, TTL = 4, 4, 3600.0
A, B = "{api_key:a}", "{team:b}"


def _use(name: str, rounds: int) -> list[Span]:
    meet(name, PROCESSES)
    slots, spans = Slots(Segment(name)), list[Span]()
    end = time.monotonic() + PATIENCE
    while len(spans) < rounds and time.monotonic() < end:
        ids = [f"{os.getpid()}-{len(spans)}-{i}" for i in range(2)]
        got = [i for i in ids if isinstance(slots.acquire([(A, LIMIT)], i, TTL), list)]
        entered = time.monotonic_ns()
        os.sched_yield()
        spans += [(entered, time.monotonic_ns())] * len(got)
        for slot_id in ids:
            slots.release([A], slot_id)
    return spans


def test_processes_hold_up_to_the_limit_and_no_more(segment: Segment) -> None:
    results = run(_use, [(segment.name, 300)] * PROCESSES, "fork")
    assert all(len(spans) >= 300 for spans in results)
    assert most_at_once(span for spans in results for span in spans) <= LIMIT
    slots = Slots(segment)
    assert [slots.acquire([(A, LIMIT)], str(i), TTL) for i in range(LIMIT)] == [[1], [2], [3], [4]]
    assert slots.acquire([(A, LIMIT)], "more", TTL) == Refused(0, LIMIT)


def _hold(ready: Connection, name: str) -> None:
    slots = Slots(Segment(name))
    ready.send([slots.acquire([(A, LIMIT)], str(i), TTL) for i in range(3)])
    signal.pause()


def test_a_killed_worker_gives_its_slots_back(segment: Segment) -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_hold, args=(theirs, segment.name), daemon=True)
    child.start()
    assert mine.poll(PATIENCE) and mine.recv() == [[1], [2], [3]]
    slots = Slots(segment)
    assert slots.acquire([(A, LIMIT)], "mine", TTL) == [4]
    assert slots.acquire([(A, LIMIT)], "more", TTL) == Refused(0, LIMIT)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE)
    assert slots.acquire([(A, LIMIT)], "more", TTL) == [2]


def _release(name: str, slot_id: str) -> int:
    slots = Slots(Segment(name))
    slots.release([A], slot_id)
    assert isinstance(slots.acquire([(A, LIMIT)], "mine", TTL), list)
    count = slots.count(A)
    slots.release([A], "mine")
    return count


def test_a_slot_is_given_back_by_its_id_once_and_only_in_its_process(segment: Segment) -> None:
    slots = Slots(segment)
    slots.acquire([(A, LIMIT)], "one", TTL)
    slots.acquire([(A, LIMIT)], "two", TTL)
    slots.release([A], "unknown")
    assert run_one(_release, segment.name, "one", method="fork") == 3
    assert slots.count(A) == 2
    for _ in range(2):
        slots.release([A], "one")
        assert slots.count(A) == 1
    slots.release([A], "two")
    assert slots.count(A) == 0


def test_all_scopes_or_none(segment: Segment) -> None:
    slots = Slots(segment)
    assert slots.acquire([(A, 5), (B, 1)], "one", TTL) == [1, 1]
    assert slots.acquire([(A, 5), (B, 1)], "two", TTL) == Refused(1, 1)
    assert (slots.count(A), slots.count(B)) == (1, 1)
    slots.release([B], "one")
    assert (slots.count(A), slots.count(B)) == (1, 0)
    assert slots.acquire([(A, 5), (B, 1)], "two", TTL) == [2, 1]


def test_an_id_holds_one_slot_of_a_scope(segment: Segment) -> None:
    slots = Slots(segment)
    assert slots.acquire([(A, 5)], "one", TTL) == [1]
    assert slots.acquire([(A, 5), (B, 5)], "one", TTL) == [1, 1]
    slots.release([A, B], "one")
    assert (slots.count(A), slots.count(B)) == (0, 0)


def test_what_was_forgotten_longer_than_the_ttl_is_given_back(segment: Segment) -> None:
    slots = Slots(segment)
    assert slots.acquire([(A, 1)], "forgotten", TTL) == [1]
    assert slots.acquire([(A, 1)], "next", TTL) == Refused(0, 1)
    assert slots.acquire([(A, 1)], "next", 0.0) == [1]
    slots.release([A], "forgotten")
    assert slots.count(A) == 1


def test_a_limit_that_changes_counts_what_is_in_flight(segment: Segment) -> None:
    slots = Slots(segment)
    assert [slots.acquire([(A, 3)], str(i), TTL) for i in range(3)] == [[1], [2], [3]]
    assert slots.acquire([(A, 2)], "lowered", TTL) == Refused(0, 3)
    assert slots.acquire([(A, 4)], "raised", TTL) == [4]
    assert slots.acquire([(A, 4)], "more", TTL) == Refused(0, 4)
    slots.release([A], "0")
    assert slots.acquire([(A, 4)], "more", TTL) == [4]


def test_of_a_large_limit_the_own_slots_are_shown(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=5000)
    mine, others = Slots(segment), Slots(segment)  # as if of two processes
    assert [mine.acquire([(A, 5000)], str(i), TTL) for i in range(2)] == [[1], [2]]
    assert others.acquire([(A, 5000)], "theirs", TTL) == [1]
    mine.release([A], "0")
    assert (mine.count(A), others.count(A)) == (1, 1)
    assert [mine.acquire([(B, 1500)], str(i), TTL) for i in range(1500)][-1] == [1500]
    assert others.acquire([(B, 1500)], "more", TTL) == Refused(0, 1500)


def test_a_limit_of_nothing_admits_nothing(segment: Segment) -> None:
    assert Slots(segment).acquire([(A, 0)], "one", TTL) == Refused(0, 0)
