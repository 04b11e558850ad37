"""Who has stopped waiting holds nothing: the next caller is admitted as if it had never come."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress

import pytest
from support.children import run_one
from support.permits import wait_until_asleep, wait_until_dead
from support.waiting import comes_true, wait_until

from fast_litellm_shm import Limit, RateLimiter, Segment

INTERVAL = 1.2  # seconds between two tokens
WITHIN = INTERVAL + 1


def make(segment: Segment) -> RateLimiter:
    limiter = RateLimiter(Limit(50, per=60, burst=1), name="ghosts", segment=segment)
    limiter.acquire("k")
    return limiter


def _next_is_admitted(limiter: RateLimiter) -> None:
    left = limiter.peek("k").retry_after
    assert left is not None and left <= WITHIN, "somebody who has gone was charged"
    assert comes_true(lambda: limiter.is_allowed("k"), WITHIN)


async def _many(limiter: RateLimiter, count: int) -> list[asyncio.Task[object]]:
    async def wait() -> object:
        return await limiter.wait_async("k")

    found = [asyncio.create_task(wait()) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    return found


def test_cancelled_tasks(segment: Segment) -> None:
    limiter = make(segment)

    async def main() -> None:
        tasks = await _many(limiter, 2000)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    _next_is_admitted(limiter)


def test_tasks_whose_time_is_up(segment: Segment) -> None:
    limiter = make(segment)

    async def one() -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(limiter.wait_async("k"), 0.2)

    async def main() -> None:
        await asyncio.gather(*(one() for _ in range(2000)))

    asyncio.run(main())
    _next_is_admitted(limiter)


def _interrupted(name: str) -> None:
    limiter = RateLimiter(Limit(50, per=60, burst=1), name="ghosts", segment=Segment(name))

    async def main() -> None:
        tasks = await _many(limiter, 2000)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.gather(*tasks)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())


def test_a_loop_that_was_interrupted(segment: Segment) -> None:
    limiter = make(segment)
    run_one(_interrupted, segment.name, method="fork")
    _next_is_admitted(limiter)


def _wait_and_die(name: str, count: int, tasks: bool) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        limiter = RateLimiter(Limit(50, per=60, burst=1), name="ghosts", segment=Segment(name))
        if tasks:

            async def main() -> None:
                await asyncio.gather(*await _many(limiter, count))

            asyncio.run(main())
        else:
            limiter.wait("k")
        signal.pause()  # it had its turn
    finally:
        os._exit(1)


@pytest.mark.parametrize("tasks", [False, True], ids=["threads", "tasks"])
def test_64_killed_processes(segment: Segment, tasks: bool) -> None:
    limiter = make(segment)
    pids = [_wait_and_die(segment.name, 20, tasks) for _ in range(64)]
    try:
        for pid in pids:
            wait_until_asleep(pid)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            wait_until_dead(pid)
            os.waitpid(pid, 0)
    _next_is_admitted(limiter)
    wait_until("the dead are passed over", lambda: not limiter.queue_size("k"))
    assert limiter.wait("k", timeout=WITHIN)
