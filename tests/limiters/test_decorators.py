"""@limited, around functions of each kind."""

from __future__ import annotations

import asyncio
import functools
import inspect
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from fast_litellm_shm import (
    Limit,
    RateLimiter,
    RateLimitExceeded,
    Segment,
    TokenBucket,
    Window,
    limited,
)


@pytest.fixture
def limiter(segment: Segment) -> RateLimiter:
    return RateLimiter(Window(2, 3600), name="t", segment=segment)


def test_a_function(limiter: RateLimiter) -> None:
    calls = []

    @limited(limiter)
    def double(x: int) -> int:
        """Twice."""
        calls.append(x)
        return 2 * x

    assert [double(1), double(2)] == [2, 4]
    with pytest.raises(RateLimitExceeded, match=r"double: key 'default' has used up limiter 't'"):
        double(3)
    assert calls == [1, 2]
    assert double.__doc__ == "Twice."


def test_a_coroutine_function(limiter: RateLimiter) -> None:
    @limited(limiter, key=lambda user: user)
    async def greet(user: str) -> str:
        await asyncio.sleep(0)
        return f"hello {user}"

    async def both() -> list[Any]:
        calls = [greet(user) for user in ("a", "b", "a", "a")]
        return await asyncio.gather(*calls, return_exceptions=True)

    assert inspect.iscoroutinefunction(greet)
    *admitted, denied = asyncio.run(both())
    assert admitted == ["hello a", "hello b", "hello a"]
    assert isinstance(denied, RateLimitExceeded)
    assert denied.retry_after is not None and 3500 < denied.retry_after <= 3600


def test_a_method_is_given_self(limiter: RateLimiter) -> None:
    class Account:
        def __init__(self, name: str) -> None:
            self.name = name

        @limited(limiter, key=lambda self, n: self.name, cost=lambda self, n: n)
        def spend(self, n: int) -> int:
            return n

    assert Account("a").spend(2) + Account("b").spend(1) == 3
    with pytest.raises(RateLimitExceeded):
        Account("a").spend(1)
    assert limiter.peek("b").remaining == 1


def test_a_cost_that_never_fits(limiter: RateLimiter) -> None:
    @limited(limiter, cost=3)
    def never() -> None: ...

    with pytest.raises(RateLimitExceeded, match="its cost never fits; raise the limit") as caught:
        never()
    assert caught.value.retry_after is None
    assert limiter.peek("default").remaining == 2


def test_none_is_not_limited(limiter: RateLimiter) -> None:
    @limited(limiter, key=lambda user: None if user == "root" else user)
    def work(user: str) -> str:
        return user

    assert [work("root") for _ in range(5)] == ["root"] * 5


def test_a_generator_is_limited_where_it_is_made(limiter: RateLimiter) -> None:
    @limited(limiter)
    def count() -> Iterator[int]:
        yield from range(3)

    assert list(count()) + list(count()) == [0, 1, 2] * 2
    with pytest.raises(RateLimitExceeded):
        count()


@pytest.mark.parametrize("wait", [60, None])
def test_waiting_for_its_turn(segment: Segment, wait: float | None) -> None:
    """As many as the burst at once, and each other after its interval: all get through."""
    limiter = RateLimiter(Limit(100, per=1, burst=1), name="t", segment=segment)

    @limited(limiter, wait=wait)
    def work() -> int:
        return 1

    @limited(limiter, wait=wait)
    async def work_async() -> int:
        return 1

    async def many() -> int:
        return sum(await asyncio.gather(*(work_async() for _ in range(5))))

    assert sum(work() for _ in range(5)) + asyncio.run(many()) == 10


def test_waiting_no_longer_than_asked(limiter: RateLimiter) -> None:
    @limited(limiter, wait=5)
    def work() -> None: ...

    work()
    work()
    with pytest.raises(RateLimitExceeded):  # at once: there is room in an hour
        work()


def test_what_is_called_and_has_no_name(limiter: RateLimiter) -> None:
    work = limited(limiter)(functools.partial(int, "7"))
    assert [work(), work()] == [7, 7]
    with pytest.raises(RateLimitExceeded, match=r"functools.partial\(.*key 'default'"):
        work()


def test_an_object_whose_call_is_async(segment: Segment) -> None:
    """It waits in asyncio, and does not hold up the event loop."""

    class Work:
        async def __call__(self) -> int:
            return 7

    work = limited(RateLimiter(Window(1, 3600), name="t", segment=segment))(Work())
    assert inspect.iscoroutinefunction(work)
    assert asyncio.run(work()) == 7


def test_the_error_survives_pickle(limiter: RateLimiter) -> None:
    error = pickle.loads(pickle.dumps(RateLimitExceeded("no", 1.5)))
    assert (str(error), error.retry_after) == ("no", 1.5)


def test_a_limit_in_place_of_a_limiter() -> None:
    @limited("2 per minute")
    def text() -> int:
        return 1

    @limited(TokenBucket(1, per=60), name="named", key=lambda user: user)
    def named(user: str) -> int:
        return 2

    assert [text(), text(), named("a"), named("b")] == [1, 1, 2, 2]
    with pytest.raises(RateLimitExceeded, match=r"test_decorators.*\.text"):
        text()
    with pytest.raises(RateLimitExceeded, match="limiter 'named'"):
        named("a")
    with pytest.raises(ValueError, match="do you mean minute"):
        limited("2 per minut")


def test_a_name_is_for_a_limit(limiter: RateLimiter) -> None:
    with pytest.raises(ValueError, match="has a name already"):
        limited(limiter, name="other")


def test_bad_arguments(limiter: RateLimiter) -> None:
    bad: list[dict[str, Any]] = [{"key": 5}, {"wait": "5"}]
    for arguments in bad:
        with pytest.raises(TypeError, match="must be"):
            limited(limiter, **arguments)
    with pytest.raises(TypeError, match="limiter must be a RateLimiter"):
        limited(5)  # type: ignore[arg-type]

    async def stream() -> AsyncIterator[int]:
        yield 1

    with pytest.raises(TypeError, match="is an async generator"):
        limited(limiter)(stream)
