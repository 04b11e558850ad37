"""Routing by what other processes have seen, and what becomes of it when they die."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest
from support.children import run, run_one
from support.routed import (
    deployments,
    ids,
    pick_ids,
    record_all,
    take_turns,
    tracking,
    wait_for_the_next_minute_if_it_is_near,
)
from support.waiting import comes_true

from fast_litellm_shm import AdvancedRouter, Segment
from fast_litellm_shm.routing import router as routing

ALL = tuple(routing.STRATEGIES)


def test_least_busy_over_all_processes(segment: Segment) -> None:
    held = [["d0", "d1"], ["d0", "d1", "d3"], ["d1", "d3"], ["d0"]]  # 3, 3, 0 and 2
    with tracking(segment.name, held):
        assert set(run_one(pick_ids, segment.name, "least_busy", 4, 50)) == {"d2"}
        router = AdvancedRouter("least_busy", segment=segment)
        assert set(ids(router, deployments(4), 50, "d2")) == {"d3"}
        stats = router.get_stats()
        assert [stats[f"d{i}"]["in_flight"] for i in range(4)] == [3, 3, 0, 2]


def test_a_killed_workers_requests_vanish_within_a_second(segment: Segment) -> None:
    router, listed = AdvancedRouter("least_busy", segment=segment), deployments(2)
    with tracking(segment.name, [["d0"] * 5, ["d1"]]) as running:
        assert set(ids(router, listed, 20)) == {"d1"}
        running[0][0].kill()
        running[0][0].join()
        # By itself, without get_stats().
        assert comes_true(lambda: set(ids(router, listed, 20)) == {"d0"}, 1)
        running[1][0].kill()
        running[1][0].join()
        assert [found["in_flight"] for found in router.get_stats().values()] == [0, 0]


def test_latencies_of_one_process_steer_another(segment: Segment) -> None:
    run(record_all, [(segment.name, [(f"d{i}", 100.0 - 10 * i, True, None)]) for i in range(4)],
        "spawn")  # fmt: skip
    assert set(run_one(pick_ids, segment.name, "latency_based", 4, 50)) == {"d3"}


def test_costs_of_one_process_steer_another(segment: Segment) -> None:
    run(record_all, [(segment.name, [(f"d{i}", None, True, 0.5 - 0.1 * i)]) for i in range(4)],
        "spawn")  # fmt: skip
    assert set(run_one(pick_ids, segment.name, "cost_based", 4, 50)) == {"d3"}


@pytest.mark.parametrize("strategy", ALL)
def test_a_cooldown_is_seen_by_all(segment: Segment, strategy: str) -> None:
    wait_for_the_next_minute_if_it_is_near(segment)
    failures: list[Any] = [("d0", 1.0, False, None)] * 2
    run(record_all, [(segment.name, failures)] * 2, "fork")  # 4 in all: one too many, of any one
    assert set(run_one(pick_ids, segment.name, strategy, 2, 100)) == {"d1"}


def test_shuffle_of_forked_workers_is_not_in_step(segment: Segment) -> None:
    chosen = run(pick_ids, [(segment.name, "simple_shuffle", 8, 200)] * 4, "fork")
    assert len({tuple(each) for each in chosen}) == 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_in_flight_adds_up_to_nothing_afterwards(segment: Segment, method: str) -> None:
    rounds, parties = 2000, 4
    run(take_turns, [(segment.name, 5, rounds, parties)] * parties, method)
    router = AdvancedRouter(segment=segment)
    router.get_available_deployment(deployments(5), "m")
    stats = router.get_stats().values()
    assert sum(found["in_flight"] for found in stats) == 0
    assert sum(found["requests"] for found in stats) == rounds * parties


def test_a_forked_child_does_not_end_its_parents_request(segment: Segment) -> None:
    router = AdvancedRouter(segment=segment)
    with router.track("d0"):
        with contextlib.ExitStack() as stack:
            inherited = stack.enter_context(router.track("d0"))
            child = os.fork()
            if child == 0:
                inherited.__exit__(None, None, None)
                inherited.__exit__(ValueError, None, None)
                with router.track("d0"):
                    seen = router.get_stats()["d0"]["in_flight"]
                os._exit(0 if seen == 3 and router.get_stats()["d0"]["in_flight"] == 2 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            assert router.get_stats()["d0"]["in_flight"] == 2
        assert router.get_stats()["d0"]["in_flight"] == 1
    stats = router.get_stats()["d0"]
    assert (stats["in_flight"], stats["requests"]) == (0, 3)  # the child's own, and the parent's
