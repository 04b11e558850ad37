"""What child processes do with routers, features and metrics, and the lists they route by."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from fast_litellm_shm import AdvancedRouter, ConcurrencyLimiter, Segment
from fast_litellm_shm._shared import features
from fast_litellm_shm._shared import performance as monitoring
from support.workers import meet

PICKS = 6000


def deployments(count: int, **params: Any) -> list[dict[str, Any]]:
    """A model list: model "m", ids d0, d1, ..."""
    return [
        {
            "model_name": "m",
            "litellm_params": {"model": f"openai/x{i}", **params},
            "model_info": {"id": f"d{i}"},
        }
        for i in range(count)
    ]


def track_and_wait(name: str, held: list[str], connection: Any) -> None:
    """Have one request in flight to each of these ids, say so, and wait to be told to end."""
    router = AdvancedRouter(segment=Segment(name))
    tracked = [router.track(deployment) for deployment in held]
    for request in tracked:
        request.__enter__()
    connection.send("tracking")
    connection.recv()
    for request in tracked:
        request.__exit__(None, None, None)
    connection.send("ended")


def record_all(name: str, records: list[tuple[str, float | None, bool, float | None]]) -> None:
    """Record what the others will route by."""
    router = AdvancedRouter(segment=Segment(name))
    for deployment, latency_ms, success, cost in records:
        router.record(deployment, latency_ms, success, cost)


def pick_ids(name: str, strategy: str, count: int, picks: int) -> list[str]:
    """The ids that a router of another process picks."""
    router = AdvancedRouter(strategy, segment=Segment(name))
    listed = deployments(count)
    return [router.get_available_deployment(listed, "m")["model_info"]["id"] for _ in range(picks)]


def take_turns(name: str, count: int, rounds: int, parties: int) -> int:
    """Route by least_busy and track, all at once; how many were tracked."""
    meet(name, parties)
    router = AdvancedRouter("least_busy", segment=Segment(name))
    listed = deployments(count)
    done = 0
    for _ in range(rounds):
        with router.track(router.get_available_deployment(listed, "m")):
            done += 1
    return done


def record_durations(name: str, count: int, parties: int, seed: int) -> list[float]:
    """Record random durations in the default segment, which must be `name`; these durations."""
    import numpy

    assert os.environ["FAST_LITELLM_SHM_NAME"] == name
    meet(name, parties)
    durations: list[float] = numpy.random.default_rng(seed).lognormal(1, 1.5, count).tolist()
    for i, duration in enumerate(durations):
        monitoring.record_performance(
            "shared", "odd" if i % 2 else "even", duration, i % 10 != 0, 3, 1
        )
    return durations


def record_errors(feature: str, count: int) -> bool:
    """Count errors of a feature; whether it is on then."""
    for i in range(count):
        features.record_error(feature, ValueError(f"error {i}"))
    return features.is_enabled(feature)


def is_on(feature: str, request_ids: list[str]) -> list[bool]:
    """Whether it is on for each request."""
    return [features.is_enabled(feature, request_id) for request_id in request_ids]


def hold_and_die(name: str, limiter: str, count: int) -> None:
    """Be killed with so many permits held."""
    permits = [
        ConcurrencyLimiter(count, name=limiter, segment=Segment(name)).acquire("k")
        for _ in range(count)
    ]
    assert all(permits)
    os.kill(os.getpid(), signal.SIGKILL)


def ids(router: AdvancedRouter, listed: Any, picks: int, *blocked: str) -> Counter[str]:
    return Counter(
        router.get_available_deployment(listed, "m", list(blocked))["model_info"]["id"]
        for _ in range(picks)
    )


def near(found: int, share: float, of: int = PICKS) -> bool:
    """Within 6 standard deviations: by chance wrong in one of a thousand million runs."""
    return bool(abs(found - of * share) <= 6 * (of * share * (1 - share)) ** 0.5)


@contextlib.contextmanager
def tracking(name: str, held: list[list[str]]) -> Iterator[list[Any]]:
    """Processes that have requests in flight to these ids; yields (process, connection) of each."""
    context = multiprocessing.get_context("spawn")
    running = []
    for each in held:
        mine, theirs = context.Pipe()
        process = context.Process(target=track_and_wait, args=(name, each, theirs), daemon=True)
        process.start()
        running.append((process, mine))
    try:
        for process, connection in running:
            assert connection.poll(60), f"process {process.pid} hung"
            assert connection.recv() == "tracking"
        yield running
    finally:
        for process, _ in running:
            process.kill()
            process.join()


def wait_for_the_next_minute_if_it_is_near(segment: Segment) -> None:
    left = 60 - segment.geometry().time_ns / 1e9 % 60
    if left < 5:
        time.sleep(left)
