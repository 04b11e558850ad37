"""Who is next: priorities, tenants and their weights; and who is turned away at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.waiting import PATIENCE, wait_until, wait_until_async

from fast_litellm_shm import (
    ConcurrencyLimiter,
    Limit,
    PermitTimeoutError,
    Quota,
    RateLimiter,
    Segment,
    Window,
)
from fast_litellm_shm.exceptions import QueueFullError


def permits(segment: Segment, most: int = 1) -> ConcurrencyLimiter:
    return ConcurrencyLimiter(most, name="fair", segment=segment)


def _limiters(segment: Segment) -> list[Any]:
    return [
        permits(segment),
        RateLimiter(Limit(1, 3600), name="rate", segment=segment),
        Quota(rpm=100, max_parallel=1, name="quota", segment=segment),
    ]


BAD = [
    ({"weight": 0}, ValueError, "weight must be 0.001 to 1000, not 0"),
    ({"weight": 1001}, ValueError, "weight must be 0.001 to 1000, not 1001"),
    ({"weight": float("nan")}, ValueError, "weight must be 0.001 to 1000, not nan"),
    ({"weight": "2"}, TypeError, "weight must be a number, not '2'"),
    ({"weight": True}, TypeError, "weight must be a number, not True"),
    ({"priority": 101}, ValueError, "priority must be -100 to 100, not 101"),
    ({"priority": -101}, ValueError, "priority must be -100 to 100, not -101"),
    ({"priority": 1.5}, TypeError, "priority must be an int, not 1.5"),
    ({"tenant": 5}, TypeError, "tenant must be a str or None, not 5"),
    ({"tenant": ""}, ValueError, "tenant must not be '': leave it out, or name the tenant"),
    ({"max_waiting": -1}, ValueError, "max_waiting must be 0 or more, not -1"),
    ({"max_waiting": 1.0}, TypeError, "max_waiting must be an int or None, not 1.0"),
    ({"on_wait": 1}, TypeError, "on_wait must be a function or None, not 1"),
]


@pytest.mark.parametrize(("given", "kind", "said"), BAD, ids=lambda each: str(each)[:20])
def test_a_bad_argument_is_named(
    segment: Segment, given: dict[str, Any], kind: type[Exception], said: str
) -> None:
    for limiter in _limiters(segment):
        calls: list[Callable[..., Any]] = [
            limiter.wait,
            lambda key, wait=limiter.wait_async, **more: asyncio.run(wait(key, **more)),
        ]
        if isinstance(limiter, ConcurrencyLimiter):
            calls += [limiter.slot, limiter.slot_async]
        for call in calls:
            with pytest.raises(kind) as caught:
                call("k", timeout=0, **given)
            assert str(caught.value) == said
        if "tenant" in given:
            with pytest.raises(kind):
                limiter.queue_size("k", given["tenant"])


Wait = Callable[..., Awaitable[Any]]


async def _served(
    wait: Wait, first: Any, callers: list[dict[str, Any]], over: Callable[[Any], object]
) -> list[int]:
    """The order in which callers are served that came in this order, while `first` was held."""
    order: list[int] = []

    async def one(i: int, given: dict[str, Any]) -> None:
        held = await wait("k", **given)
        assert held
        order.append(i)
        await asyncio.sleep(0)
        over(held)

    tasks = []
    for i, given in enumerate(callers):
        tasks.append(asyncio.ensure_future(one(i, given)))
        await asyncio.sleep(0.002)  # each comes later than the one before
    over(first)
    await asyncio.gather(*tasks)
    return order


def _release(held: Any) -> None:
    held.release()


def test_of_higher_priority_first(segment: Segment) -> None:
    limiter = permits(segment)
    callers: list[dict[str, Any]] = [{"priority": p} for p in (0, -100, 5, 100, 5)]
    found = asyncio.run(_served(limiter.wait_async, limiter.acquire("k"), callers, _release))
    assert found == [3, 2, 4, 0, 1]


def test_tenants_take_turns(segment: Segment) -> None:
    """One has many callers in the queue, the other comes later with few."""
    limiter = permits(segment)
    callers = [{"tenant": "many"}] * 10 + [{"tenant": "few"}] * 3
    found = asyncio.run(_served(limiter.wait_async, limiter.acquire("k"), callers, _release))
    few = [at for at, each in enumerate(found) if each >= 10]
    assert few[-1] <= 6, found
    assert [each for each in found if each < 10] == list(range(10))


def test_a_weight_of_three(segment: Segment) -> None:
    limiter = permits(segment)
    callers: list[dict[str, Any]] = []
    for _ in range(12):
        callers += [{"tenant": "a", "weight": 3}, {"tenant": "b"}]
    found = asyncio.run(_served(limiter.wait_async, limiter.acquire("k"), callers, _release))
    heavy = sum(each % 2 == 0 for each in found[:12])
    assert 8 <= heavy <= 10, found


def _threads(count: int, call: Callable[[int], None]) -> list[threading.Thread]:
    found = [threading.Thread(target=call, args=(i,)) for i in range(count)]
    for each in found:
        each.start()
    return found


def test_threads_and_tasks_in_one_order(segment: Segment) -> None:
    limiter, order = permits(segment), []
    held = limiter.acquire("k")

    def one(i: int) -> None:
        with limiter.slot("k", PATIENCE, priority=i, tenant="t"):
            order.append(i)

    threads = _threads(4, one)

    async def main() -> None:
        async def task() -> None:
            async with limiter.slot_async("k", PATIENCE, priority=2):
                order.append(-1)

        running = asyncio.ensure_future(task())
        await wait_until_async("all wait", lambda: limiter.queue_size("k") == 5)
        assert limiter.queue_size("k", "t") == 4
        assert limiter.queue_size("k", "another") == 0
        held.release()
        await running

    asyncio.run(main())
    for each in threads:
        each.join()
    assert [each for each in order if each >= 0] == [3, 2, 1, 0]
    assert order.index(3) < order.index(-1) < order.index(1)
    assert limiter.queue_size("k") == 0


def test_shed(segment: Segment) -> None:
    limiter, got = permits(segment), []
    held = limiter.acquire("k")
    threads = _threads(3, lambda _: got.append(limiter.wait("k", PATIENCE).release()))
    wait_until("they wait", lambda: limiter.queue_size("k") == 3)
    assert not limiter.wait("k", max_waiting=3)
    assert not limiter.wait("k", max_waiting=0)
    assert not asyncio.run(limiter.wait_async("k", max_waiting=3))
    assert limiter.queue_size("k") == 3
    with pytest.raises(QueueFullError) as caught, limiter.slot("k", max_waiting=2):
        raise AssertionError("entered")
    error = caught.value
    assert isinstance(error, PermitTimeoutError)
    assert (error.place, error.retry_after) == (4, 1.0)
    assert str(error) == (
        "limiter 'fair': 3 callers wait for key 'k' before this one, and it allows no more; try "
        "again in 1 s, or raise max_waiting"
    )

    async def enter() -> None:
        async with limiter.slot_async("k", max_waiting=2):
            raise AssertionError("entered")

    with pytest.raises(QueueFullError):
        asyncio.run(enter())
    # Of a higher priority nobody is before it.
    assert not limiter.wait("k", 0.01, max_waiting=1, priority=1)
    held.release()
    for each in threads:
        each.join()
    assert limiter.wait("k", max_waiting=0).release()


def test_shed_of_rates_and_quotas(segment: Segment) -> None:
    rate = RateLimiter(Limit(1, 3600), name="rate", segment=segment)
    rate.acquire("k")
    assert not rate.wait("k", max_waiting=0)
    assert not asyncio.run(rate.wait_async("k", max_waiting=0))
    quota = Quota(max_parallel=1, name="quota", segment=segment)
    with quota.admit("k"):
        assert not quota.wait("k", max_waiting=0)
        assert not asyncio.run(quota.wait_async("k", max_waiting=0))
    assert quota.in_flight("k") == 0


def test_tasks_are_shed_by_their_place_in_the_line(segment: Segment) -> None:
    limiter = permits(segment)

    async def main() -> list[bool]:
        held = limiter.acquire("k")

        async def one() -> bool:
            found = await limiter.wait_async("k", PATIENCE, max_waiting=5)
            found.release()
            return bool(found)

        tasks = [asyncio.ensure_future(one()) for _ in range(8)]
        await asyncio.sleep(0.01)
        held.release()
        return list(await asyncio.gather(*tasks))

    assert asyncio.run(main()) == [True] * 5 + [False] * 3


def test_tasks_are_counted_as_they_come_and_go(segment: Segment) -> None:
    """Also for callers of another tenant or priority, which stand in another line."""
    limiter = permits(segment)

    async def main() -> list[int]:
        sizes = []
        with limiter.acquire("k"):
            tasks = [asyncio.ensure_future(limiter.wait_async("k", PATIENCE)) for _ in range(8)]
            await asyncio.sleep(0)
            sizes.append(limiter.queue_size("k"))
            assert not await limiter.wait_async("k", PATIENCE, priority=-1, max_waiting=8)
            for each in tasks[2:]:
                each.cancel()
            await asyncio.sleep(0)
            sizes.append(limiter.queue_size("k"))
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return [*sizes, limiter.queue_size("k")]

    assert asyncio.run(main()) == [8, 2, 0]


def test_places_are_told(segment: Segment) -> None:
    limiter = permits(segment)
    told: list[list[int]] = [[], [], []]
    expected: list[float | None] = []

    async def one(i: int) -> None:
        def on_wait(place: int, seconds: float | None) -> None:
            told[i].append(place)
            expected.append(seconds)

        async with limiter.slot_async("k", PATIENCE, on_wait=on_wait):
            await asyncio.sleep(0.01)

    async def main() -> None:
        held = limiter.acquire("k")
        tasks = [asyncio.ensure_future(one(i)) for i in range(3)]
        await asyncio.sleep(0.05)
        assert told == [[1], [2], [3]]
        tasks[1].cancel()
        await wait_until_async("the last is told", lambda: told[2] == [3, 2])
        held.release()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert set(expected) == {None}  # none had been served
        held = limiter.acquire("k")
        task = asyncio.ensure_future(one(0))
        await asyncio.sleep(0.05)
        held.release()
        await task
        assert expected[-1] is not None and expected[-1] > 0

    asyncio.run(main())


def test_a_caller_whose_turn_never_comes_is_denied(segment: Segment) -> None:
    """It stands behind another one when its time is up."""
    limiter = permits(segment)
    with limiter.slot("k"):
        first = _threads(1, lambda _: None if limiter.wait("k", PATIENCE).release() else None)
        wait_until("the other waits", lambda: limiter.queue_size("k") == 1)
        assert not limiter.wait("k", 0.01)
        assert not asyncio.run(limiter.wait_async("k", 0.01))
        with pytest.raises(PermitTimeoutError), limiter.slot("k", 0.01):
            raise AssertionError("entered")
    for each in first:
        each.join()


def test_a_caller_whose_on_wait_raises_leaves(segment: Segment) -> None:
    limiter = permits(segment)
    with limiter.slot("k"), pytest.raises(ZeroDivisionError):
        limiter.wait("k", on_wait=lambda *_: 1 // 0)
    assert limiter.queue_size("k") == 0
    assert limiter.wait("k", 0).release()


# Quota -------------------------------------------------------------------------------------------


def test_a_quota_waits_for_a_permit(segment: Segment) -> None:
    quota = Quota(rpm=100, max_parallel=1, name="quota", segment=segment)
    callers: list[dict[str, Any]] = [{}, {"priority": 1}, {}]
    found = asyncio.run(_served(quota.wait_async, quota.admit("k"), callers, _release))
    assert found == [1, 0, 2]
    assert quota.in_flight("k") == 0


def test_a_quota_waits_for_tokens_that_are_given_back(segment: Segment) -> None:
    quota = Quota(tpm=100, name="quota", segment=segment)
    first = quota.admit("k", tokens=100)

    async def main() -> bool:
        waiting = asyncio.ensure_future(quota.wait_async("k", tokens=50, timeout=PATIENCE))
        await asyncio.sleep(0.01)
        assert not waiting.done()
        first.settle(10)
        return bool(await waiting)

    assert asyncio.run(main())


def test_a_quota_denies_what_never_fits_and_when_the_time_is_up(segment: Segment) -> None:
    quota = Quota(tpm=100, max_parallel=1, name="quota", segment=segment)
    never = quota.wait("k", tokens=101)
    assert not never and never.retry_after is None and never.reason == "tpm"
    with quota.admit("k"):
        late = quota.wait("k", timeout=0.05)
        assert not late and late.reason == "max_parallel"
        assert not asyncio.run(quota.wait_async("k", timeout=0))
    assert quota.in_flight("k") == 0
    assert quota.wait("k").release()


def test_tenants_of_a_quota_are_served_in_tokens(segment: Segment) -> None:
    """One asks for 90 tokens a call, the other for 10."""
    quota = Quota(tpm=100_000, max_parallel=1, name="quota", segment=segment)
    callers: list[dict[str, Any]] = []
    for _ in range(10):
        callers += [{"tenant": "a", "tokens": 90}, {"tenant": "b", "tokens": 10}]
    found = asyncio.run(_served(quota.wait_async, quota.admit("k"), callers, _release))
    light = [at for at, each in enumerate(found) if each % 2]
    assert light[8] <= 10, found  # nine of ten, for one or two of the heavy ones


def test_settled_tokens_correct_the_service(segment: Segment) -> None:
    """Both expect 10 tokens a call; one uses 100 each time."""
    quota = Quota(tpm=100_000, max_parallel=1, name="quota", segment=segment)
    callers = [{"tenant": "ab"[i % 2], "tokens": 10} for i in range(20)]

    order: list[str] = []

    async def one(given: dict[str, Any]) -> None:
        admission = await quota.wait_async("k", **given)
        order.append(given["tenant"])
        admission.settle(100 if given["tenant"] == "a" else 10)
        admission.release()

    async def main() -> None:
        first = quota.admit("k")
        tasks = [asyncio.ensure_future(one(given)) for given in callers]
        await asyncio.sleep(0.01)
        first.release()
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order[:12].count("b") >= 9, order


def test_a_cancelled_caller_of_a_quota_holds_nothing(segment: Segment) -> None:
    quota = Quota(rpm=10, max_parallel=1, name="quota", segment=segment)

    async def main() -> None:
        with quota.admit("k"):
            tasks = [asyncio.ensure_future(quota.wait_async("k")) for _ in range(5)]
            await asyncio.sleep(0.01)
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    assert quota.queue_size("k") == 0
    assert quota.remaining("k") == {"rpm": 9, "max_parallel": 1}


def test_a_window_serves_by_priority(segment: Segment) -> None:
    limiter = RateLimiter(Window(1, 0.1), name="rate", segment=segment)
    callers: list[dict[str, Any]] = [{}, {"priority": 1}, {}]
    first = limiter.acquire("k")
    found = asyncio.run(_served(limiter.wait_async, first, callers, lambda _: None))
    assert found == [1, 0, 2]
