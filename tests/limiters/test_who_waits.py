"""Every call of the package that waits stands in the queue: it is seen there, as a thread and as a
task."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from support.waiting import PATIENCE, wait_until_async

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window, limited
from fast_litellm_shm.integrations.httpx import AsyncSharedLimitTransport, SharedLimitTransport
from fast_litellm_shm.integrations.web import Request, Rule
from fast_litellm_shm.integrations.web.gate import Gate

ORIGIN = "https://a.example:443"


def _decorated(segment: Segment) -> tuple[Any, Any, Any, Callable[[], object]]:
    limiter = RateLimiter(Window(2, 30), name="w", segment=segment)

    @limited(limiter, key=ORIGIN, wait=PATIENCE)
    def call() -> None: ...

    @limited(limiter, key=ORIGIN, wait=PATIENCE)
    async def call_async() -> None: ...

    assert limiter.acquire(ORIGIN, cost=2)
    return limiter, call, call_async, lambda: limiter.reset(ORIGIN)


def _transports(segment: Segment) -> tuple[Any, Any, Any, Callable[[], object]]:
    inner = httpx.MockTransport(lambda _: httpx.Response(200))
    given: dict[str, Any] = {"max_in_flight": 1, "name": "w", "segment": segment}
    here, there = SharedLimitTransport(inner, **given), AsyncSharedLimitTransport(inner, **given)
    limiter = here.upstream._permits
    assert isinstance(limiter, ConcurrencyLimiter)
    request = httpx.Request("GET", "https://a.example/")

    def call() -> None:
        response = here.handle_request(request)
        response.read()
        response.close()

    async def call_async() -> None:
        response = await there.handle_async_request(request)
        await response.aread()
        await response.aclose()

    return limiter, call, call_async, limiter.acquire(ORIGIN).release


def _rules(segment: Segment) -> tuple[Any, Any, Any, Callable[[], object]]:
    rule = Rule(in_flight=1, wait=PATIENCE, key=lambda _: ORIGIN)
    gate, request = Gate(None, [rule], name="w", segment=segment), Request("GET", "/", None, None)
    limiter = ConcurrencyLimiter(1, name="w: default", segment=segment)

    def call() -> None:
        outcome = gate.check(request)
        assert outcome is not None and outcome.holds
        outcome.release()

    async def call_async() -> None:
        outcome = await gate.check_async(request)
        assert outcome is not None and outcome.holds
        outcome.release()

    return limiter, call, call_async, limiter.acquire(ORIGIN).release


@pytest.mark.parametrize("make", [_decorated, _transports, _rules])
def test_it_stands_in_the_queue(segment: Segment, make: Any) -> None:
    limiter, call, call_async, release = make(segment)

    async def main() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        task = asyncio.ensure_future(call_async())
        await wait_until_async("both wait", lambda: limiter.queue_size(ORIGIN) == 2)
        release()
        await task
        await asyncio.to_thread(thread.join)

    asyncio.run(main())
    assert limiter.queue_size(ORIGIN) == 0
