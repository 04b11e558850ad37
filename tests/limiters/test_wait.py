"""wait and wait_async: in order, given back when cancelled or late, and everybody gets through."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest
from support.children import run
from support.waiting import wait_until
from support.workers import now

from fast_litellm_shm import ConcurrencyLimiter, Limit, RateLimiter, Segment, SlidingWindow, Window

SLOW = Limit(10, 36000)  # a token every hour


def make(segment: Segment, *limits: Any) -> RateLimiter:
    return RateLimiter(*limits, name="t", segment=segment)


@pytest.mark.parametrize("limit", [SLOW, Window(10, 36000), SlidingWindow(10, 36000)], ids=repr)
def test_with_room_it_does_not_wait(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    assert limiter.wait("k", cost=10, timeout=0)
    assert limiter.peek("k").remaining == 0


@pytest.mark.parametrize("limit", [SLOW, Window(10, 36000), SlidingWindow(10, 36000)], ids=repr)
def test_denied_at_once_where_the_deadline_comes_first(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    limiter.acquire("k", cost=10)
    for timeout in (0, 0.01, 5, -1):
        decision = limiter.wait("k", timeout=timeout)
        assert not decision
        assert decision.retry_after is not None
        assert decision.retry_after > 60
    decision = asyncio.run(limiter.wait_async("k", timeout=1))
    assert not decision
    limiter.refund("k", 10)
    assert limiter.peek("k").remaining == 10  # nothing stayed reserved


@pytest.mark.parametrize("limit", [SLOW, Window(10, 36000), SlidingWindow(10, 36000)], ids=repr)
def test_never_is_denied_at_once(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    decision = limiter.wait("k", cost=11)
    assert not decision
    assert decision.retry_after is None
    assert not asyncio.run(limiter.wait_async("k", cost=11))


@pytest.mark.parametrize("bad", ["5", [1], float("nan")])
def test_a_bad_timeout(segment: Segment, bad: Any) -> None:
    with pytest.raises(TypeError) as caught:
        make(segment, SLOW).wait("k", timeout=bad)
    assert str(caught.value) == f"timeout must be a number of seconds or None, not {bad!r}"


def test_a_bad_timeout_is_found_although_there_is_room(segment: Segment) -> None:
    """Else a program learns of it under load."""
    limiter = ConcurrencyLimiter(1, name="permits", segment=segment)
    calls: tuple[Callable[[], object], ...] = (
        lambda: limiter.wait("k", "5"),  # type: ignore[arg-type]
        lambda: asyncio.run(limiter.wait_async("k", float("nan"))),
        lambda: limiter.slot("k", "5").__enter__(),  # type: ignore[arg-type]
        lambda: asyncio.run(limiter.slot_async("k", "5").__aenter__()),  # type: ignore[arg-type]
    )
    for call in calls:
        with pytest.raises(TypeError, match="timeout must be a number of seconds or None, not"):
            call()
    assert limiter.in_flight("k") == 0
    assert limiter.wait("k", 10**400).release()


def test_an_infinite_timeout_is_none_at_all(segment: Segment) -> None:
    limiter = make(segment, Limit(100, 1, burst=1))
    assert limiter.wait("k", timeout=float("inf"))
    assert limiter.wait("k", timeout=float("inf"))


LIMITS: list[Any] = [Limit(1, 0.02), Window(1, 0.02), SlidingWindow(1, 0.02)]


@pytest.mark.parametrize("limit", LIMITS, ids=repr)
def test_it_waits_until_its_turn(segment: Segment, limit: Any) -> None:
    limiter = make(segment, limit)
    before = now()
    assert all(limiter.wait("k") for _ in range(6))
    # five periods lie between the first and the last; a window of the clock may have begun before
    assert now() - before >= (5 if limit != LIMITS[2] else 4) * 20_000_000


def _wait_many(name: str, limit: Any, count: int) -> int:
    limiter = make(Segment(name), limit)
    admitted = [False] * count

    def body(i: int) -> None:
        admitted[i] = bool(limiter.wait("k"))

    threads = [threading.Thread(target=body, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(admitted)


@pytest.mark.parametrize(
    "limit", [Limit(50, 1, burst=1), Limit(50, 1, burst=5, strict=True), Window(10, 0.2)], ids=repr
)
def test_fifty_waiters_of_two_processes_all_get_through(segment: Segment, limit: Any) -> None:
    before = now()
    assert run(_wait_many, [(segment.name, limit, 25)] * 2, "fork") == [25, 25]
    # not faster than the limit lets them
    assert now() - before >= (800_000_000 if isinstance(limit, Window) else 900_000_000)


@pytest.mark.parametrize("limit", [Limit(100, 1, burst=1), Window(1, 0.01)], ids=repr)
def test_fifty_async_waiters_are_served_in_order(segment: Segment, limit: Any) -> None:
    """The instants of a bucket are in order. A loop that was held up may come to several that have
    passed at once, in any order."""
    limiter = make(segment, limit)
    served: list[int] = []

    async def one(i: int) -> None:
        assert await limiter.wait_async("k")
        served.append(i)

    async def everybody() -> None:
        await asyncio.gather(*(one(i) for i in range(50)))

    before = now()
    asyncio.run(everybody())
    assert sorted(served) == list(range(50))
    if isinstance(limit, Window):
        assert served == list(range(50))
    assert now() - before >= 480_000_000


def test_a_cancelled_waiter_was_charged_nothing(segment: Segment) -> None:
    limiter = make(segment, SLOW)
    limiter.acquire("k", cost=10)

    async def cancelled() -> list[float]:
        waiting = [asyncio.ensure_future(limiter.wait_async("k", cost=2)) for _ in range(3)]
        await asyncio.sleep(0.01)  # they stand in the queue
        seen = [limiter.peek("k").retry_after or 0]
        for each in waiting:
            each.cancel()
            with pytest.raises(asyncio.CancelledError):
                await each
            seen.append(limiter.peek("k").retry_after or 0)
        return seen

    assert all(0 < each <= 3600 for each in asyncio.run(cancelled()))
    assert limiter.queue_size("k") == 0


SOON = Limit(1, 0.2, burst=1)


def test_cancelled_in_its_last_milliseconds_it_gives_back(segment: Segment) -> None:
    """Charged 50 ms ahead, at most; nobody has charged the key since."""
    limiter = make(segment, SOON)
    limiter.acquire("k")

    async def cancelled() -> None:
        waiting = asyncio.ensure_future(limiter.wait_async("k"))
        while (limiter.peek("k").retry_after or 0) <= 0.2 and not waiting.done():
            await asyncio.sleep(0)
        waiting.cancel()

    asyncio.run(cancelled())
    assert (limiter.peek("k").retry_after or 0) <= 0.2


class _InterruptedError(Exception):
    pass


def test_an_interrupt_gives_back(segment: Segment) -> None:
    limiter = make(segment, SLOW)
    limiter.acquire("k", cost=10)

    def interrupt(*_: object) -> None:
        raise _InterruptedError

    old = signal.signal(signal.SIGUSR1, interrupt)

    def when_it_waits() -> None:
        wait_until("it waits", lambda: limiter.queue_size("k"))
        os.kill(os.getpid(), signal.SIGUSR1)

    other = threading.Thread(target=when_it_waits)
    other.start()
    try:
        with pytest.raises(_InterruptedError):
            limiter.wait("k")
    finally:
        other.join()
        signal.signal(signal.SIGUSR1, old)
    assert limiter.queue_size("k") == 0
    retry = limiter.peek("k").retry_after
    assert retry is not None
    assert 0 < retry <= 3600


def test_waiting_under_several_limits(segment: Segment) -> None:
    limiter = make(segment, Limit(100, 1, burst=1), Limit(1000, 1, burst=3))
    before = now()
    assert all(limiter.wait("k") for _ in range(11))
    assert now() - before >= 100_000_000


def test_a_bucket_and_a_window(segment: Segment) -> None:
    limiter = make(segment, Limit(100, 1, burst=1), Window(3, 0.05))
    before = now()
    assert all(limiter.wait("k") for _ in range(10))
    assert now() - before >= 150_000_000


def test_wait_is_counted_once(segment: Segment) -> None:
    limiter = make(segment, Limit(100, 1, burst=1))
    for _ in range(3):
        limiter.wait("k")
    assert segment.stats()["admitted"] == 3
