"""A segment in which there is something of everything that monitoring tells."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import (
    AdvancedRouter,
    Budget,
    ConcurrencyLimiter,
    Limit,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    Window,
)
from fast_litellm_shm._shared.native import lib
from support.names import remove, unique_name

# What a label of any format must stand: quotes, backslashes, ends of lines, other scripts.
AWKWARD = 'a "quoted" \\n back\\slash\nline\r\t{le="1"} # ключ \u202e'
DURATIONS_NS = (100, 1_000, 1_000_000, 3_600 * 10**9)


@dataclass
class Scene:
    segment: Segment
    limiter: RateLimiter
    pool: SimpleConnectionPool
    kept: list[Any]


@contextmanager
def _dies_at_the_end(segment: Segment) -> Iterator[None]:
    """A process that holds a permit and a connection during the block, and then dies."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        held = ConcurrencyLimiter(3, name="gpu", segment=segment).acquire("a")
        pool = SimpleConnectionPool("web", max_per_endpoint=5, segment=segment)
        pool.get_connection("https://one.example")
        os.write(told, b"." if held else b"")
        while True:
            signal.pause()
    assert os.read(ready, 1)
    os.close(ready)
    os.close(told)
    yield
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def measure(segment: Segment, component: str, operation: str, *took_ns: int) -> None:
    first, second = component.encode(), operation.encode()
    metric = lib.fshm_metric_open(segment._handle, first, len(first), second, len(second))
    for ns in took_ns:
        lib.fshm_metric_record(segment._handle, metric, ns, 1, ns < 10**9, 0, 0)


@contextmanager
def scene() -> Iterator[Scene]:
    """3 admitted and 2 denied by "chat", 4 and 0 by a limiter with an awkward name (its key too),
    some refused by "full"; of "gpu" 2 permits and a dead process's; of the pool "web" one active
    and a dead process's connection to one.example, an idle one to two.example; of the budget
    "money" $8.5 of 10 spent and 1 reserved; and statistics."""
    name = unique_name("scene")
    segment = Segment(name, capacity=60)
    chat = RateLimiter(Limit(3, per=86400), name="chat", segment=segment)
    for _ in range(5):
        chat.is_allowed("busy")
    awkward = RateLimiter(Window(5, per=86400), name=AWKWARD, segment=segment)
    for _ in range(4):
        awkward.is_allowed(AWKWARD)
    gpu = ConcurrencyLimiter(3, name="gpu", segment=segment)
    pool = SimpleConnectionPool("web", max_per_endpoint=5, segment=segment)
    money = Budget(10, "day", name="money", segment=segment, warn_at=0.8, on_warn=lambda *_: None)
    money.charge("busy", "8.5")
    kept: list[Any] = [gpu.acquire("b"), gpu.acquire("c"), money.reserve("busy", usd=1)]
    pool.get_connection("https://one.example")
    idle = pool.get_connection("https://two.example")
    assert idle is not None
    pool.return_connection(idle)
    router = AdvancedRouter(name="eu", allowed_fails=0, cooldown_seconds=3600, segment=segment)
    router.record("gpt-a", latency_ms=120)
    router.record("gpt-b", success=False)
    kept.append(router.track("gpt-a").__enter__())
    measure(segment, "component", AWKWARD, *DURATIONS_NS)
    lib.fshm_memo_count(segment._handle, 300, 100)
    lib.fshm_feature_error(segment._handle, 1)
    full = RateLimiter(Limit(3, per=86400), name="full", segment=segment, on_full="deny")
    with _dies_at_the_end(segment):  # not before: who needs room takes what is a dead process's
        for i in range(200):  # more than it holds
            full.is_allowed(f"key {i}")
    yield Scene(segment, chat, pool, kept)
    *permits, tracked = kept
    tracked.__exit__(None, None, None)
    for permit in permits:
        permit.release()
    pool.close()
    remove(name)
