"""Waiting over many hosts: the callers of a host stand in its queue, in order, by priority."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from support.servers import Server
from support.waiting import PATIENCE, wait_until, wait_until_async

from fast_litellm_shm import ConcurrencyLimiter, Quota, RateLimiter, Segment, Window
from fast_litellm_shm.exceptions import QueueFullError


def _limiters(segment: Segment, url: str, most: int = 1) -> list[Any]:
    return [
        ConcurrencyLimiter(most, name="permits", segment=segment, cluster=url),
        Quota(rpm=10**6, max_parallel=most, name="quota", segment=segment, cluster=url),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["permits", "quota"])
def test_tasks_by_priority_and_threads_too(server: Server, segment: Segment, which: int) -> None:
    limiter = _limiters(segment, server.url)[which]
    order: list[int] = []

    async def one(priority: int) -> None:
        held = await limiter.wait_async("k", timeout=PATIENCE, priority=priority, tenant="t")
        assert held
        order.append(priority)
        held.release()

    def in_thread() -> None:
        held = limiter.wait("k", timeout=PATIENCE, priority=7)
        order.append(7)
        held.release()

    async def main() -> None:
        first = await limiter.wait_async("k")
        thread = threading.Thread(target=in_thread)
        thread.start()
        await wait_until_async("the thread waits", lambda: limiter.queue_size("k") == 1)
        tasks = [asyncio.ensure_future(one(each)) for each in (1, 9, 5)]
        await wait_until_async("all wait", lambda: limiter.queue_size("k") == 4)
        assert limiter.queue_size("k", "t") == 3
        assert not await limiter.wait_async("k", max_waiting=4)
        first.release()
        await asyncio.gather(*tasks)
        await asyncio.to_thread(thread.join)

    asyncio.run(main())
    assert order == [9, 7, 5, 1]
    assert limiter.in_flight("k") == 0


def test_a_permit_of_another_host(server: Server, segment: Segment, other: Segment) -> None:
    here, there = _limiters(segment, server.url)[0], _limiters(other, server.url)[0]
    with there.slot("k"):
        got: list[bool] = []
        thread = threading.Thread(target=lambda: got.append(here.wait("k", PATIENCE).release()))
        thread.start()
        wait_until("it waits", lambda: here.queue_size("k") == 1)
        assert there.queue_size("k") == 0  # a queue is of a host
        with pytest.raises(QueueFullError), here.slot("k", max_waiting=1):
            raise AssertionError("entered")
    thread.join()
    assert got == [True]


def test_rates(server: Server, segment: Segment) -> None:
    limiter = RateLimiter(Window(1, 0.2), name="rate", segment=segment, cluster=server.url)

    async def main() -> list[bool]:
        return [
            bool(each)
            for each in await asyncio.gather(*(limiter.wait_async("k") for _ in range(4)))
        ]

    assert asyncio.run(main()) == [True] * 4
    assert limiter.queue_size("k") == 0
    assert not limiter.wait("k", cost=2)


async def _backlog(limiters: list[Any], callers: list[int], services: int) -> list[int]:
    """Whose callers were served, one host after another, while so many waited on each."""
    served: list[int] = []

    async def caller(host: int) -> None:
        while len(served) < services:
            held = await limiters[host].wait_async("k", timeout=PATIENCE)
            assert held
            served.append(host)
            await asyncio.sleep(0.01)
            if hasattr(held, "release"):
                held.release()

    await asyncio.gather(*(caller(i) for i, count in enumerate(callers) for _ in range(count)))
    return served


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("which", [0, 1], ids=["permits", "quota"])
def test_hosts_whose_callers_wait_share_the_permits(
    server: Server, segment: Segment, other: Segment, most: int, which: int
) -> None:
    """However many callers of each wait; not at once: first, one host has all."""
    hosts = [_limiters(each, server.url, most)[which] for each in (segment, other)]
    served = asyncio.run(_backlog(hosts, [30, 6], 300 * most))
    later = served[len(served) // 2 :]
    assert min(map(later.count, (0, 1))) > len(later) / 3, served
    assert [each.in_flight("k") for each in hosts] == [0, 0]


def test_hosts_whose_callers_wait_for_tokens_are_all_served(
    server: Server, segment: Segment, other: Segment
) -> None:
    """No share is promised: tokens are for the host that asks when they are there."""
    given: dict[str, Any] = {"name": "rate", "cluster": server.url}
    hosts = [RateLimiter(Window(10, 0.1), segment=each, **given) for each in (segment, other)]
    served = asyncio.run(_backlog(hosts, [30, 6], 150))
    assert min(map(served.count, (0, 1))) > 6, served
