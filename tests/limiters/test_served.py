"""Real servers of each kind, whose workers wait in every way there is: for slots, rates, quotas,
connections, and under a rule of the web middleware."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from soak import ENDPOINT, KEY, MOST, PATHS
from support.gunicorn import Server
from support.holders import Holders
from support.waiting import wait_until

from fast_litellm_shm import (
    ConcurrencyLimiter,
    Quota,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    TokenBucket,
)
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.cli import permits_and_pools

WORKERS, WAITING, REQUESTS = 2, 12, 60
SERVERS = {
    "gthread": ("soak.app:app", "--worker-class=gthread", f"--threads={2 * WAITING}"),
    "gevent": ("soak.app:app", "--worker-class=gevent"),
    "eventlet": ("soak.app:app", "--worker-class=eventlet"),
    "uvicorn": ("soak.app:asgi", "--worker-class=soak.workers.Uvicorn"),
}


def _take_all(segment: Segment, path: str, stack: ExitStack) -> None:
    """Until the stack ends, there is nothing left of what the path needs."""
    if path == "/pool":
        pool = SimpleConnectionPool("soak", max_per_endpoint=MOST[path], segment=segment)
        pool.bind(lambda _: object())
        stack.callback(pool.close)
        for _ in range(MOST[path]):
            stack.enter_context(pool.connection(ENDPOINT))
    elif path == "/rate":
        rate = RateLimiter(TokenBucket(400, per=1, burst=20), name="soak rate", segment=segment)
        rate.block(KEY, 20)
        stack.callback(rate.reset, KEY)
    elif path == "/quota":
        quota = Quota(10**6, 10**9, MOST[path], name="soak quota", segment=segment)
        for _ in range(MOST[path]):
            assert stack.enter_context(quota.admit(KEY))
    else:
        name = "soak permits" if path == "/permits" else "soak: /flight"
        limiter = ConcurrencyLimiter(MOST[path], name=name, segment=segment)
        for _ in range(MOST[path]):
            assert stack.enter_context(limiter.acquire(KEY))


def _callers(segment: Segment) -> int:
    return sum(row["callers"] for row in Inspection(segment).waiting())


def _in_flight(segment: Segment) -> int:
    return sum(row["in_flight"] for row in Inspection(segment).in_flight())


def _held(segment: Segment) -> list[dict[str, Any]]:
    """Idle connections of workers that live are no fault."""
    permits, pools = permits_and_pools.held(Inspection(segment), None, None)
    return [row for row in permits if row["in_flight"]] + [row for row in pools if row["active"]]


@pytest.mark.parametrize("kind", SERVERS)
def test_all_who_wait_are_served_and_nobody_else_is_held_up(
    kind: str, segment_name: str, tmp_path: Path
) -> None:
    app, *options = SERVERS[kind]
    segment, counted = Segment(segment_name), str(tmp_path / "held")
    with Server(
        segment_name, app=app, workers=WORKERS, options=options, SOAK_HOLDERS=counted
    ) as server:
        for path in ("/rate", *MOST):
            _waits_and_serves(server, segment, path)
        wait_until("nothing is held", lambda: not _held(segment))
        assert _callers(segment) == 0
        counts = Holders(counted, holds=False)
        for path, most in MOST.items():
            assert counts.most(PATHS.index(path)) == most, path
    wait_until("no connection is left", lambda: not _in_flight(segment))


def _waits_and_serves(server: Server, segment: Segment, path: str) -> None:
    waiting: list[tuple[int, int]] = []

    def ask(count: int) -> None:
        waiting.extend(server.ask(count, path, at_once=count))

    with ExitStack() as stack:
        _take_all(segment, path, stack)
        thread = threading.Thread(target=ask, args=(WAITING,))
        thread.start()
        wait_until(f"{path}: all wait", lambda: _callers(segment) == WAITING)
        free: set[int] = set()

        def all_workers_answer() -> bool:
            free.update(pid for _, pid in server.ask(4 * WORKERS, "/ready"))
            return free >= server.workers

        wait_until(f"{path}: the workers answer others meanwhile", all_workers_answer)
        assert _callers(segment) == WAITING and not waiting
    thread.join()
    ask(REQUESTS)
    assert [status for status, _ in waiting] == [200] * (WAITING + REQUESTS), path
    assert len({pid for _, pid in waiting}) > 1, f"{path}: one worker alone has answered"
