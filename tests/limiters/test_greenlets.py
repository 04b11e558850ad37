"""Whoever waits in a patched program of gevent or eventlet lets the others of its thread run."""

from __future__ import annotations

from pathlib import Path

import pytest
from integrations.httpx.server import upstream_server
from support import green
from support.children import run, run_one
from support.gunicorn import WORKERS, Server
from support.permits import most_at_once, wait_until_dead
from support.waiting import PATIENCE

from fast_litellm_shm import Segment

pytestmark = pytest.mark.parametrize("hub", green.HUBS)


@pytest.mark.parametrize("preload", [False, True], ids=["lazy", "preload"])
def test_gunicorn_serves_many_through_one_slot(hub: str, preload: bool, segment_name: str) -> None:
    """No worker stands still until gunicorn replaces it: the first four give all answers."""
    options = ("--worker-class", hub)
    with Server(segment_name, limit=1, preload=preload, options=options) as server:
        first = set(server.workers)
        answers = server.ask(200, "/slot", at_once=100)
        assert [status for status, _ in answers] == [200] * 200
        pids = {pid for _, pid in answers}
        assert len(pids) > 1, "one worker alone has answered"
        assert pids <= first and len(first) == WORKERS
    for pid in first:
        wait_until_dead(pid)


def test_workers_take_turns_at_one_slot(hub: str, segment_name: str) -> None:
    """Two that are patched, and one with threads, whose waiters sleep in the kernel."""
    Segment(segment_name, capacity=1000)
    parties = [(each, segment_name, 3, 10, 10) for each in (hub, hub, "")]
    found = run(green.slots, parties, "spawn", PATIENCE)
    assert [len(spans) for spans in found] == [100] * 3
    assert most_at_once(sum(found, [])) == 1


def test_greenlets_share_one_connection(hub: str, segment_name: str) -> None:
    spans = run_one(green.connections, hub, segment_name, 10, 5, patience=PATIENCE)
    assert len(spans) == 50
    assert most_at_once(spans) == 1


@pytest.mark.parametrize("seed", range(2))
def test_a_connection_whose_user_is_taken_away(hub: str, seed: int, segment_name: str) -> None:
    gone, served, active = run_one(
        green.left_connections, hub, segment_name, seed, patience=PATIENCE
    )
    assert gone > 10 and served > 0
    assert active == 0


def test_the_httpx_transport_waits_for_its_turn(hub: str, segment_name: str) -> None:
    with upstream_server() as server:
        found = run_one(green.requests, hub, segment_name, server.origin, 20, patience=PATIENCE)
        assert found == [200] * 20
        assert server.most == 1


def test_others_run_while_one_waits_in_vain(hub: str, segment_name: str) -> None:
    assert run_one(green.times_out, hub, segment_name, patience=PATIENCE) > 1


@pytest.mark.parametrize("seed", range(2))
def test_a_waiter_that_is_taken_away_holds_nothing(hub: str, seed: int, segment_name: str) -> None:
    gone, served, held = run_one(green.left, hub, segment_name, seed, patience=PATIENCE)
    assert gone > 10 and served > 0
    assert held == 0


def test_a_thread_without_a_hub_sleeps_in_the_kernel(hub: str, segment_name: str) -> None:
    there, here, got = run_one(green.in_real_threads, hub, segment_name, patience=PATIENCE)
    assert (there, here, got) == (False, True, True)


def test_the_other_library_is_imported_too(hub: str, segment_name: str) -> None:
    found = run_one(green.beside_another, hub, segment_name, patience=PATIENCE)
    assert found == [True] * 5


def test_an_event_loop_waits(hub: str, segment_name: str) -> None:
    assert run_one(green.tasks, hub, segment_name, 20, patience=PATIENCE) == 20


def test_one_asks_the_server_for_all(hub: str, segment_name: str) -> None:
    found = run_one(green.asks, hub, segment_name, patience=PATIENCE)
    assert sorted(found) == [(True, False)] + [(True, True)] * 9


def test_a_lock_is_held_over_a_sleep(hub: str) -> None:
    assert run_one(green.locked, hub, patience=PATIENCE) == 1


def test_an_encoding_is_looked_for_once(hub: str, tmp_path: Path) -> None:
    with upstream_server() as server:  # which is no proxy, and says so
        told = run_one(green.encodings, hub, str(tmp_path), server.origin, patience=PATIENCE)
    assert len(told) == 5 and len(set(told)) == 1
    assert "its download fails" in told[0]
