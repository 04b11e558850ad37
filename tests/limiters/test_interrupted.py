"""What a caller holds is given back, wherever an exception out of a signal handler strikes, and
wherever a task is cancelled."""

from __future__ import annotations

import asyncio
import gc
import sys
import warnings
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest
from support.interrupts import EVERY, RAISES, Interrupted, at_each_instruction, by_signals

from fast_litellm_shm import (
    AdvancedRouter,
    ConcurrencyLimiter,
    Limit,
    PermitTimeoutError,
    Quota,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    limited,
)
from fast_litellm_shm._shared.named_limiter import InnerLimits, SharedLimits, states_of
from fast_litellm_shm.cluster.single_flight import SingleFlight
from fast_litellm_shm.integrations.asgi import RateLimitMiddleware as AsgiLimit
from fast_litellm_shm.integrations.httpx import SharedLimitTransport
from fast_litellm_shm.integrations.web.turn import Turns
from fast_litellm_shm.integrations.wsgi import RateLimitMiddleware, Rule
from fast_litellm_shm.limiters import waiting
from fast_litellm_shm.limiters.grantors import Quotas
from fast_litellm_shm.limiters.quota import Admission
from fast_litellm_shm.limits import InFlight

A = "https://a.example"
_NS = 1_000_000  # between tokens of the reservations


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A permit that its last reference gave back is told as a bug, which here it is not. What is
    raised in a destructor is nobody's to catch: pytest's hook for it is Python, and would be
    interrupted too."""
    monkeypatch.setattr(sys, "unraisablehook", bool)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Block:
    """Something to enter and leave, and how much is held of it."""

    def __init__(self, run: Callable[[], object], held: Callable[[], object]) -> None:
        self.run, self.held = run, held

    def check(self, where: str) -> None:
        assert self.held() == 0, where


def _slot(segment: Segment) -> Block:
    limiter = ConcurrencyLimiter(3, name="slot", segment=segment)

    def run() -> None:
        with limiter.slot("k"):
            len("k")

    return Block(run, lambda: limiter.in_flight("k"))


def _permit(segment: Segment) -> Block:
    limiter = ConcurrencyLimiter(3, name="permit", segment=segment)

    def run() -> None:
        with limiter.wait("k", 1):
            len("k")

    return Block(run, lambda: limiter.in_flight("k"))


def _waits_in_vain(segment: Segment) -> Block:
    limiter = ConcurrencyLimiter(1, name="in vain", segment=segment)
    kept = limiter.acquire("k")

    def run() -> None:
        try:
            with limiter.slot("k", timeout=0.0001):
                raise AssertionError
        except PermitTimeoutError:
            pass

    return Block(run, lambda: limiter.in_flight("k") - bool(kept))


def _admission(segment: Segment) -> Block:
    quota = Quota(rpm=2**31 - 1, tpm=2**31 - 1, max_parallel=3, name="quota", segment=segment)

    def run() -> None:
        with quota.admit("k", tokens=10) as admission:
            admission.settle(5)

    return Block(run, lambda: quota.in_flight("k"))


def _connection(segment: Segment) -> Block:
    pool = SimpleConnectionPool("plain", max_per_endpoint=3, segment=segment)

    def run() -> None:
        with pool.connection(A):
            len("k")

    return Block(run, lambda: pool.get_stats()["active_connections"])


class _Wire:
    """A connection. One that is gone is closed too."""

    closed = False

    def __init__(self, _: str) -> None: ...

    def close(self) -> None:
        self.closed = True


def _open(wires: type[_Wire]) -> int:
    return sum(type(each) is wires and not each.closed for each in gc.get_objects())


def _decorated_by_a_pool(segment: Segment) -> Block:
    pool = SimpleConnectionPool("decorator", max_per_endpoint=3, segment=segment)

    @pool.connection(A)
    def call() -> None: ...

    return Block(call, lambda: pool.get_stats()["active_connections"])


def _bound_connection(segment: Segment) -> Block:
    """Connects and closes: each is used once."""

    class Wire(_Wire): ...

    pool = SimpleConnectionPool("bound", max_per_endpoint=3, segment=segment)
    pool.bind(Wire, Wire.close)

    def run() -> None:
        try:
            with pool.connection(A, 1):
                raise ValueError
        except ValueError:
            pass

    return Block(run, lambda: pool.get_stats()["total_connections"] + _open(Wire))


def _waits_for_a_connection(segment: Segment) -> Block:
    """In vain: in the queue of the endpoint, and then in that of the whole pool."""
    pool = SimpleConnectionPool("in vain", max_per_endpoint=1, max_total=2, segment=segment)
    kept = [pool.get_connection(A), pool.get_connection(f"{A}/b")]
    turn = [0]

    def run() -> None:
        turn[0] += 1
        with suppress(PermitTimeoutError), pool.connection(A if turn[0] % 2 else f"{A}/c", 0.0001):
            raise AssertionError

    def held() -> int:
        queues = (pool._slots, A.encode()), (pool._slots, f"{A}/c".encode()), (pool._totals, b"")
        waiting = sum(states_of(of).waiting(raw) for of, raw in queues)
        return int(pool.get_stats()["total_connections"]) - len(kept) + waiting

    return Block(run, held)


def _full_pool(segment: Segment) -> Block:
    """The idle connection to one endpoint is closed to make room for another."""

    class Wire(_Wire): ...

    pool = SimpleConnectionPool("full", max_total=1, segment=segment)
    pool.bind(Wire, Wire.close)
    turn = [0]

    def run() -> None:
        turn[0] += 1
        with pool.connection(f"{A}/{turn[0] % 2}"):
            len("k")

    def held() -> int:
        stats = pool.get_stats()
        return int(stats["active_connections"]) or int(_open(Wire) != stats["idle_connections"])

    return Block(run, held)


def _reservation(segment: Segment) -> Block:
    limiter = RateLimiter(Limit(1000, per=1, burst=1), name="reserved", segment=segment)

    def run() -> None:
        limiter.wait("k")

    return Block(run, lambda: _ahead(limiter))


def _ahead(limiter: RateLimiter) -> int:
    """By how many ns the bucket is charged ahead, beyond the token of the last one that was served:
    something is reserved, and its instant is yet to come. So look at once. 50 us: of clocks."""
    return max(int(limiter.peek("k").retry_after_ns or 0) - _NS - 50_000, 0)


def _decorated(segment: Segment) -> Block:
    limiter = RateLimiter(Limit(1000, per=1, burst=1), name="decorated", segment=segment)

    @limited(limiter, key="k", wait=1)
    def call() -> None: ...

    return Block(call, lambda: _ahead(limiter))


def _wsgi(segment: Segment) -> Block:
    rules = [Rule(in_flight=3, key=lambda _: "k", name="r")]
    answers = RateLimitMiddleware(lambda environ, start: [b"x"], rules, name="w", segment=segment)
    held = ConcurrencyLimiter(3, name="w: r", segment=segment)

    def run() -> None:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": "10.0.0.1"}
        body: Any = answers(environ, lambda *_: lambda _: None)
        body.close()

    return Block(run, lambda: held.in_flight("k"))


def _asgi(segment: Segment) -> Block:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def quiet(*_: Any) -> Any:
        return {}

    rules = [Rule(in_flight=3, key=lambda _: "k", name="r")]
    answers = AsgiLimit(app, rules, name="a", segment=segment)
    held = ConcurrencyLimiter(3, name="a: r", segment=segment)

    def run() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("::1", 1)}
        coroutine = answers(scope, quiet, quiet)
        with suppress(StopIteration):
            coroutine.send(None)

    return Block(run, lambda: held.in_flight("k"))


def _rule_in_vain(segment: Segment) -> Block:
    """A request that waits under a rule, and is refused."""
    rules = [Rule(in_flight=1, key=lambda _: "k", name="r", wait=0.0001, priority=lambda _: 1)]
    answers = RateLimitMiddleware(lambda environ, start: [b"x"], rules, name="w", segment=segment)
    limiter = ConcurrencyLimiter(1, name="w: r", segment=segment)
    kept = limiter.acquire("k")

    def run() -> None:
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": "10.0.0.1"}
        answers(environ, lambda *_: lambda _: None)

    return Block(run, lambda: limiter.in_flight("k") - bool(kept) + limiter.queue_size("k"))


def _rule_in_turn(segment: Segment) -> Block:
    """A request that waits under a rule, and is admitted."""
    limits = InnerLimits((InFlight(1),), name="turn", segment=segment, on_full="deny")
    turns = Turns(Quotas(limits))
    limiter = ConcurrencyLimiter(1, name="turn", segment=segment)

    def run() -> None:
        waiting.run(turns.wait(waiting.BLOCKING, "k", 1, 5, waiting.Wish()).__await__()).release()

    return Block(run, lambda: limiter.in_flight("k") + limiter.queue_size("k"))


def _httpx(segment: Segment) -> Block:
    class Body(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield b"x"

    inner = httpx.MockTransport(lambda _: httpx.Response(200, stream=Body()))
    transport = SharedLimitTransport(inner, max_in_flight=3, name="h", segment=segment)
    request = httpx.Request("GET", A)

    def run() -> None:
        response = transport.handle_request(request)
        response.read()
        response.close()

    return Block(run, lambda: transport.upstream.in_flight("https://a.example:443"))


def _asking(segment: Segment) -> Block:
    """Who asks the server of a cluster for the host."""
    asking = SingleFlight(
        SharedLimits((Limit(1, per=1),), name="n", segment=segment, on_full="deny"), 1
    )

    def run() -> None:
        with asking.turn(b"k"):
            len("k")

    def held() -> int:
        found = asking.begin(b"k")
        if found is None:
            return 1
        asking.end(found)
        return 0

    return Block(run, held)


def _tracked(segment: Segment) -> Block:
    router = AdvancedRouter("least_busy", name="t", segment=segment)

    def run() -> None:
        with router.track("d"):
            len("k")

    def held() -> int:
        found = router.get_stats().get("d")
        return int(found["in_flight"]) if found else 0

    return Block(run, held)


BLOCKS = [
    _slot, _permit, _waits_in_vain, _admission, _connection, _decorated_by_a_pool,
    _bound_connection, _waits_for_a_connection, _full_pool, _reservation, _decorated, _wsgi, _asgi,
    _rule_in_vain, _rule_in_turn, _httpx, _asking, _tracked,
]  # fmt: skip
each_block = pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__[1:])


@each_block
def test_an_exception_at_each_instruction_leaks_nothing(
    segment: Segment, make: Callable[[Segment], Block]
) -> None:
    block = make(segment)
    block.run()
    assert at_each_instruction(block.run, block.check) > 10


@each_block
def test_exceptions_out_of_a_signal_handler_leak_nothing(
    segment: Segment, make: Callable[[Segment], Block]
) -> None:
    block = make(segment)
    waits = make in (_reservation, _decorated)
    in_vain = make in (_waits_in_vain, _waits_for_a_connection, _rule_in_vain)
    longest = 1e-3 if waits or in_vain else 150e-6
    # What was reserved is over by itself, a millisecond later: it is looked for after each raise.
    by_signals(block.run, RAISES, longest, block.check if waits else str)
    block.check("after all")


def test_an_interrupted_connection_is_idle_again_where_its_block_had_not_begun(
    segment: Segment,
) -> None:
    """And closed where it had: nobody knows its state."""
    pool = SimpleConnectionPool("p", segment=segment)
    pool.return_connection(kept := pool.get_connection(A))  # type: ignore[arg-type]
    use = pool.connection(A)
    del use
    assert pool.get_connection(A) == kept
    pool.return_connection(kept)  # type: ignore[arg-type]
    use = pool.connection(A)
    assert use.__enter__() == kept
    del use
    assert pool.get_stats()["total_connections"] == 0


# asyncio -----------------------------------------------------------------------------------------


def _slot_async(segment: Segment) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    limiter = ConcurrencyLimiter(1, name="slot", segment=segment)

    async def run() -> None:
        async with limiter.slot_async("k", 5):
            await asyncio.sleep(0)

    return run, lambda: limiter.in_flight("k")


def _waiting_slot(segment: Segment) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    limiter = ConcurrencyLimiter(1, name="slot", segment=segment)

    async def run() -> None:
        async with limiter.slot_async("k", 5):
            inner = asyncio.create_task(waits())
            await asyncio.sleep(0)
        await inner

    async def waits() -> None:
        async with limiter.slot_async("k", 5):
            await asyncio.sleep(0)

    return run, lambda: limiter.in_flight("k")


def _admission_async(segment: Segment) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    quota = Quota(rpm=2**31 - 1, max_parallel=3, name="quota", segment=segment)

    async def run() -> None:
        async with await quota.admit_async("k"):
            await asyncio.sleep(0)

    return run, lambda: quota.in_flight("k")


def _connection_async(segment: Segment) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    pool = SimpleConnectionPool("p", max_per_endpoint=1, segment=segment)
    pool.bind(_Wire, _Wire.close)

    async def run() -> None:
        async with pool.connection_async(A, 5):
            await asyncio.sleep(0)

    return run, lambda: int(pool.get_stats()["active_connections"])


def _waiting_connection(
    segment: Segment,
) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    pool = SimpleConnectionPool("waiting", max_per_endpoint=1, segment=segment)
    pool.bind(_Wire, _Wire.close)

    async def run() -> None:
        async with pool.connection_async(A, 5):
            inner = asyncio.create_task(waits())
            await asyncio.sleep(0)
        await inner

    async def waits() -> None:
        async with pool.connection_async(A, 5):
            await asyncio.sleep(0)

    return run, lambda: int(pool.get_stats()["active_connections"])


def _reservation_async(segment: Segment) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    """One that is served, and one that is given up: its instant would come in an hour."""
    served = RateLimiter(Limit(1000, per=1, burst=1), name="served", segment=segment)
    given_up = RateLimiter(Limit(1, per=3600, burst=1), name="given up", segment=segment)
    given_up.acquire("k")

    async def run() -> None:
        await served.wait_async("k")
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(given_up.wait_async("k"), 0.01)

    return run, lambda: int(given_up.peek("k").retry_after_ns or 0) > 3600 * 10**9


def _waiting_request(segment: Segment) -> tuple[Callable[[], Awaitable[None]], Callable[[], int]]:
    """Of two requests, one waits under a rule."""
    rules = [Rule(in_flight=1, key=lambda _: "k", name="r", wait=5)]
    limiter = ConcurrencyLimiter(1, name="a: r", segment=segment)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)

    async def quiet(*_: Any) -> Any:
        await asyncio.sleep(60)

    async def run() -> None:
        answers = AsgiLimit(app, rules, name="a", segment=segment)
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("::1", 1)}
        await asyncio.gather(*(answers(dict(scope), quiet, quiet) for _ in range(2)))

    return run, lambda: limiter.in_flight("k") + limiter.queue_size("k")


TASKS = [_slot_async, _waiting_slot, _admission_async, _connection_async, _reservation_async]
# Cancelled only: these take long, at each instruction.
LONG = [_waiting_connection, _waiting_request]
each_task = pytest.mark.parametrize("make", TASKS, ids=lambda make: make.__name__[1:])


async def _until_none(held: Callable[[], int], where: str) -> None:
    """A thread that connects, or sleeps, for a task that is gone gives back what it yet gets."""
    for _ in range(2000):
        if not held():
            return
        await asyncio.sleep(0.005)
    assert held() == 0, where


@pytest.mark.parametrize("make", [*TASKS, *LONG], ids=lambda make: make.__name__[1:])
def test_a_task_cancelled_at_each_step_leaks_nothing(segment: Segment, make: Any) -> None:
    run, held = make(segment)

    async def cancelled_after(steps: int) -> bool:
        task = asyncio.ensure_future(run())
        for _ in range(steps):
            await asyncio.sleep(0 if steps < 40 else 0.0005)
        over: bool = task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        del task
        await _until_none(held, f"cancelled after {steps} steps")
        return over

    async def main() -> None:
        waits = range(40, 80, 4)  # from there on the steps are of a clock
        assert any([await cancelled_after(steps) for steps in (*range(40), *waits)])

    asyncio.run(main())


@each_task
def test_an_exception_at_each_instruction_of_a_task_leaks_nothing(
    segment: Segment, make: Any
) -> None:
    run, held = make(segment)

    def whole() -> None:
        async def main() -> None:
            try:
                await run()
            except Interrupted:
                await asyncio.sleep(0)
                raise

        asyncio.run(main())

    def check(where: str) -> None:
        if held():  # asyncio keeps an exception, and its frames, in a cycle
            gc.collect()
        asyncio.run(_until_none(held, where))

    whole()
    assert at_each_instruction(whole, check, EVERY) > 10


def test_a_call_that_is_interrupted_once_it_is_admitted_holds_nothing(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also as long as its task is kept: an exception keeps the local variables of the frames that
    it came through."""
    limiter = Quota(rpm=10, max_parallel=1, name="q", segment=segment)
    begin, calls = Admission.__init__, iter([Interrupted])

    def strike(*given: Any) -> None:
        for error in calls:
            raise error
        begin(*given)

    async def main() -> None:
        task = asyncio.create_task(limiter.wait_async("k"))
        await asyncio.wait([task])
        assert isinstance(task.exception(), Interrupted)
        assert limiter.in_flight("k") == 0
        assert limiter.remaining("k") == {"rpm": 10, "max_parallel": 1}

    monkeypatch.setattr(Admission, "__init__", strike)
    asyncio.run(main())
