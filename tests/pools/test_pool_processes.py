"""One pool, many processes: limits and sums over all of them, connections of their own."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from typing import Any

import pytest
from support.children import run, run_one
from support.locks import is_free_in_a_fork
from support.pooled import CountingServer, ask
from support.workers import meet

from fast_litellm_shm import Segment, SimpleConnectionPool
from fast_litellm_shm.pools import connection_pool as module

A = "https://a.example"
WORKERS = 4


def make(segment: Segment, **options: Any) -> SimpleConnectionPool:
    return SimpleConnectionPool("p", segment=segment, **options)


def counts(of: SimpleConnectionPool) -> tuple[int, int]:
    stats = of.get_stats()
    return stats["active_connections"], stats["idle_connections"]


def _take_all(name: str, endpoints: list[str], tries: int, idle: int) -> tuple[list[str], Any]:
    """Take what is to be had, return so many of them, and wait for the others; the ids, and the
    sums as this process sees them."""
    meet(name, WORKERS)
    of, ids = make(Segment(name)), []
    for i in range(tries):
        found = of.get_connection(endpoints[i % len(endpoints)])
        ids += [] if found is None else [found]
    for one in ids[:idle]:
        of.return_connection(one)
    meet(name, 2 * WORKERS)
    stats = of.get_stats()
    meet(name, 3 * WORKERS)
    return ids, stats


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_ten_to_an_endpoint_over_all_workers(segment: Segment, method: str) -> None:
    found = run(_take_all, [(segment.name, [A], 10, 0)] * WORKERS, method)
    ids = [one for of_one, _ in found for one in of_one]
    assert len(ids) == len(set(ids)) == 10
    for _, stats in found:
        assert stats == {
            "active_connections": 10,
            "idle_connections": 0,
            "total_connections": 10,
            "max_total_connections": 100,
            "endpoints": {A: {"available_connections": 0, "max_connections": 10}},
        }
    assert counts(make(segment)) == (0, 0)  # they are dead


def test_a_hundred_in_all_over_all_workers(segment: Segment) -> None:
    endpoints = [f"https://host{i}" for i in range(20)]
    found = run(_take_all, [(segment.name, endpoints, 60, 0)] * WORKERS, "fork")
    ids = [one for of_one, _ in found for one in of_one]
    assert len(ids) == len(set(ids)) == 100
    assert [stats["active_connections"] for _, stats in found] == [100] * WORKERS


def test_sums_over_processes(segment: Segment) -> None:
    found = run(_take_all, [(segment.name, [A, "https://b"], 4, 1)] * WORKERS, "fork")
    assert [len(ids) for ids, _ in found] == [4] * WORKERS
    for _, stats in found:
        assert (stats["active_connections"], stats["idle_connections"]) == (12, 4)
        assert stats["endpoints"] == {
            A: {"available_connections": 4, "max_connections": 10},
            "https://b": {"available_connections": 0, "max_connections": 10},
        }


def _churn(name: str, turns: int) -> tuple[set[str], int]:
    """All ids that were opened, and how many; some are removed, so that new ones are opened."""
    meet(name, WORKERS)
    of, ids, opened, before = make(Segment(name)), set(), 0, None
    for i in range(turns):
        found = of.get_connection(A)
        if found is None:
            continue
        opened += found != before
        ids.add(found)
        if i % 3:
            of.return_connection(found)
            before = found
        else:
            of.remove_connection(found)
            before = None
    of.close()
    return ids, opened


def test_ids_are_unique_over_processes_and_time(segment: Segment) -> None:
    found = run(_churn, [(segment.name, 3000)] * WORKERS, "fork")
    assert all(len(ids) == opened for ids, opened in found)
    assert sum(opened for _, opened in found) == len(set().union(*(ids for ids, _ in found)))
    assert sum(opened for _, opened in found) > 1000
    assert counts(make(segment)) == (0, 0)


def _of_another(name: str, foreign: str) -> tuple[str | None, bool, tuple[int, int]]:
    of = make(Segment(name))
    for _ in range(2):
        of.return_connection(foreign)
        of.remove_connection(foreign)
    return of.get_connection(A), of.health_check(foreign), counts(of)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_idle_ones_belong_to_their_process(segment: Segment, method: str) -> None:
    of = make(segment)
    busy, idle = of.get_connection(A), of.get_connection(A)
    assert busy is not None
    assert idle is not None
    of.return_connection(idle)
    for foreign in (busy, idle):
        found, healthy, seen = run_one(_of_another, segment.name, foreign, method=method)
        assert found not in (None, busy, idle)
        assert not healthy
        assert seen == (2, 1)
        assert counts(of) == (1, 1)
    assert of.get_connection(A) == idle


def _hold(name: str, count: int, writing: int) -> None:
    of = make(Segment(name))
    ids = [of.get_connection(A) for _ in range(count)]
    of.return_connection(ids[0] or "")
    os.write(writing, b"." if all(ids) else b"x")
    time.sleep(60)


def test_a_dead_workers_connections_are_gone(segment: Segment) -> None:
    of = make(segment)
    kept = of.get_connection(A)
    assert kept is not None
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            _hold(segment.name, 9, writing)
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 1) == b"."
        assert counts(of) == (9, 1)
        assert of.get_connection(A) is None
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        os.close(writing)
    assert counts(of) == (1, 0)
    assert all(of.get_connection(A) for _ in range(9))
    assert of.get_connection(A) is None


def test_fork_with_open_connections(segment: Segment) -> None:
    """The child begins with none, and leaves its parent's alone, socket and count."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        closed: list[int] = []

        def connect(_: str) -> socket.socket:
            return socket.create_connection(server.getsockname())

        def close(line: socket.socket) -> None:
            closed.append(os.getpid())
            line.close()

        of = make(segment, max_per_endpoint=3)
        of.bind(connect, close)
        with of.connection(endpoint) as line:
            peer, _ = server.accept()
            other = of.get_connection(endpoint)
            assert other is not None
            second_peer, _ = server.accept()
            of.return_connection(other)
            pid = os.fork()
            if not pid:
                try:
                    good = of._connections() == {}
                    of.return_connection(other)
                    of.remove_connection(other)
                    good &= of.cleanup() == 0
                    of.close()
                    good &= closed == [] and counts(of) == (1, 1)
                    with of.connection(endpoint) as mine:  # its own, the third
                        good &= mine is not line and counts(of) == (2, 1)
                    good &= of.get_connection(endpoint) is not None
                    good &= of.get_connection(endpoint) is None
                    os._exit(0 if good else 1)
                finally:
                    os._exit(2)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert counts(of) == (1, 1)
            line.sendall(b"still here")
            assert peer.recv(100) == b"still here"
        assert counts(of) == (0, 2)
        for end in (peer, second_peer):
            end.close()
        of.close()
        assert closed == [os.getpid()] * 2


@pytest.mark.parametrize("most", [2, 3])
def test_a_server_never_sees_more_than_the_limit(segment: Segment, most: int) -> None:
    with CountingServer() as server:
        given = [(segment.name, server.url, most, 40, WORKERS)] * WORKERS
        assert run(ask, given, "fork") == [40] * WORKERS
        assert server.most <= most
        assert server.total > 2 * WORKERS  # they did move between the workers


def test_threads_share_a_pool(segment: Segment) -> None:
    of, out, wrong = make(segment, max_per_endpoint=3), set(), []
    lock = threading.Lock()

    def body() -> None:
        for i in range(500):
            found = of.get_connection(A)
            if found is None:
                continue
            with lock:
                wrong.extend([found] if found in out else [])
                out.add(found)
                wrong.extend([f"{len(out)} of 3"] if len(out) > 3 else [])
            with lock:
                out.remove(found)
            if i % 7:
                of.return_connection(found)
            else:
                of.remove_connection(found)

    threads = [threading.Thread(target=body) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    of.close()
    assert counts(of) == (0, 0)


def test_fork_while_another_thread_makes_the_default_pool() -> None:
    assert is_free_in_a_fork(module, "_making")
