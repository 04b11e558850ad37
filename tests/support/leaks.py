"""Every class of the extension, used right and wrong again and again; for the leak sanitizer, which
tells at the end of the process what nobody refers to any more (make sanitize-py, expect.sh). What
spends from a server's grants (limits over many hosts) is not here.

``leaks.py FAULT``: ``c`` and ``object`` leak on purpose; ``none-but-calls`` does not.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

from limits import parse, strategies

from fast_litellm_shm import (
    AdvancedRouter,
    ConcurrencyLimiter,
    Limit,
    Quota,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    SimpleRateLimiter,
    SlidingWindow,
    Window,
)
from fast_litellm_shm._shared.native import Memo, Recorder, address, ffi, lib
from fast_litellm_shm.integrations.limits import ShmStorage
from support.names import unique_name

ROUNDS = 30


def failing(call: Callable[..., Any], *args: Any) -> None:
    with contextlib.suppress(Exception):
        call(*args)
        raise SystemExit(f"{call!r} takes {args!r}")


def use_limiter(segment: Segment) -> None:
    limiter = RateLimiter(
        Limit(1000, per=1), Window(500, per=1), SlidingWindow(100, per=1), name="l", segment=segment
    )
    for key in ("k", b"k", "\udc80"):
        for decision in (limiter.acquire(key), limiter.acquire(key, (1, 2, 0)), limiter.peek(key)):
            repr(decision)
            _ = decision.limit, decision.remaining, decision.retry_after, decision.reset_after
        limiter.charge(key, 3)
        limiter.refund(key, cost=[1, 1, 1])
        limiter.check(key)
        limiter.is_allowed(key)
        limiter.get_remaining(key)
        with contextlib.suppress(TimeoutError):
            limiter.wait(key, timeout=0)
    _ = limiter.limits, limiter.acquire_many(["a", "b"]), limiter.acquire_many(["a", "b"], [1, 2])
    failing(limiter.acquire)
    failing(limiter.acquire, 1)
    failing(limiter.acquire, "k", -1)
    failing(limiter.acquire, "k", (1, 2))
    failing(limiter.acquire, "k", (1, 2, "x"))
    failing(limiter.acquire, "\udc80", "x")
    failing(limiter.acquire_many, ["a", 1])
    failing(limiter.acquire_many, ["a", "b"], [1])
    failing(lambda: limiter.acquire("k", nonsense=1))  # type: ignore[call-arg]
    limiter.reset("k")
    limiter.reset()


def use_permits(segment: Segment) -> None:
    permits = ConcurrencyLimiter(1, name="c", segment=segment)
    with permits.slot("k"):
        denied = permits.acquire("k")
        _ = bool(denied), denied.in_flight, denied.decision, repr(denied)
        permits.in_flight("k")
    held = permits.acquire("k")
    held.release()
    held.release()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        permits.acquire("k")  # dropped without release()
    quota = Quota(tpm=100_000, max_parallel=2, name="q", segment=segment)
    with quota.admit("k", tokens=10) as admission:
        admission.settle(20)
    failing(permits.acquire, None)
    failing(permits.acquire, "k", "x")


def use_pool(segment: Segment) -> None:
    pool = SimpleConnectionPool("p", segment=segment, max_per_endpoint=2, max_total=3)
    pool.bind(lambda endpoint: [endpoint])
    a, b = (pool.get_connection("https://a.example") for _ in range(2))
    assert a is not None
    assert b is not None
    pool.get_connection("https://a.example")
    pool.return_connection(a)
    pool.get_connection("https://a.example")
    pool.return_connection(a)
    pool.object_of(b)
    with pool.connection("https://b.example"):
        pool.get_stats()
    pool.remove_connection(b)
    pool.return_connection(b)
    pool.cleanup()
    pool.close()
    failing(pool.get_connection, [])
    failing(pool.get_connection, "no URL")
    failing(pool.object_of, "none")


class Text(str):
    __slots__ = ()


def use_router(segment: Segment) -> None:
    deployments = [
        {
            "model_name": "m",
            "litellm_params": {"model": f"x/{i}", "weight": i + 1},
            "model_info": {"id": f"d{i}"},
        }
        for i in range(6)
    ]
    for strategy in ("simple_shuffle", "least_busy", "latency_based", "cost_based"):
        router = AdvancedRouter(strategy, segment=segment)
        pick: Any = router.get_available_deployment
        for blocked in (None, [], ["d1"], ["d1", "d2", Text("d3"), "d4", "d5"], ("d1",)):
            pick(deployments, Text("m"), blocked)
        pick(tuple(deployments), "m")
        pick([], "m")
        for wrong in ((1, "m"), (deployments, 1), ([1], "m"), (deployments, "m", [1]), ()):
            failing(pick, *wrong)
        with router.track(deployments[0]) as request:
            request.cost = 0.1
        router.record(deployments[1], 3.0, False)
    router.get_stats()


def use_memo(segment: Segment) -> None:
    handle = int(ffi.cast("uintptr_t", segment._handle))
    memo = Memo(segment, handle, 7, len)
    for text in ("a", "b", "a", "\udc80", Text("a"), "x" * 70_000):
        with contextlib.suppress(UnicodeEncodeError):
            memo.count(text)
            memo(text)
    assert memo.count_for("q", "tenant") == memo.count_for("q", "tenant") == 1
    failing(memo.count, 3)
    failing(Memo, 1)
    failing(Memo(segment, handle, 9, lambda text: 1 // 0).count, "a text")


def use_recorder(segment: Segment) -> None:
    recorder: Any = Recorder()
    for _ in range(2):  # what it knew of the first is dropped
        recorder._set(segment._handle, address(segment._handle))
        recorder.record("a", "b", 1.0)
        recorder.record("a", Text("c"), 1, success=False, input_size=3, output_size=4, metadata={})
    failing(recorder.record, 1, "b", 1.0)
    failing(recorder.record, "a", "b", "x")
    failing(recorder.record, "a", "b", -1.0)
    failing(recorder.record, "a", "b", 1.0, True, "x")
    failing(recorder._set, "x")


def use_storage(segment: Segment) -> None:
    storage = ShmStorage(f"shm://{segment.name}")
    for kind in (
        strategies.FixedWindowRateLimiter,
        strategies.MovingWindowRateLimiter,
        strategies.SlidingWindowCounterRateLimiter,
    ):
        limiter, item = kind(storage), parse("5/minute")
        limiter.hit(item, "a")
        limiter.test(item, "a")
        limiter.get_window_stats(item, "a")
        limiter.clear(item, "a")
    failing(storage.incr, "k", -1)
    failing(storage.incr, 1, 1)
    failing(storage.acquire_entry, "k", -1, 1)


def leak_in_c(segment: Segment) -> None:
    limit = ffi.new("fshm_limit *", {"n": 1, "per_ns": 1_000_000, "burst": 1})
    out = ffi.new("fshm_limiter **")
    for _ in range(10):  # the last one's address may still lie about
        lib.fshm_limiter_open(segment._handle, b"x", 1, limit, 1, out)


def leak_an_object(segment: Segment) -> None:
    limiter = RateLimiter(Limit(1000, per=1), name="l", segment=segment)
    for _ in range(10):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(limiter.acquire("k")))


def main(fault: str) -> None:
    name = os.environ["FAST_LITELLM_SHM_NAME"] = unique_name("leaks")  # also what looks for flags
    segment = Segment(name, capacity=100)
    try:
        for _ in range(ROUNDS if fault == "none-but-calls" else 1):  # each is slow, stack by stack
            use_limiter(segment)
            use_permits(segment)
            use_pool(segment)
            use_router(segment)
            use_memo(segment)
            use_recorder(segment)
            use_storage(segment)
            SimpleRateLimiter(requests_per_minute=10, segment=segment).check("k")
        # A thread that still runs when Python ends keeps what it has.
        for thread in threading.enumerate():
            if thread is not threading.current_thread():
                thread.join(30)
        {"c": leak_in_c, "object": leak_an_object, "none-but-calls": use_memo}[fault](segment)
    finally:
        segment.remove()


if __name__ == "__main__":
    main(sys.argv[1])
