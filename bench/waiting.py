"""How long do callers wait for a permit, and whom do they delay?

Tasks that hold a permit, or a pooled connection, for 5 ms, beside asyncio.Semaphore, which knows
its own process only; asyncio.to_thread beside them. A slot of key B beside 256 callers of 8
processes x 32 threads that wait for key A, by itself and handed over between two processes. A
denial where 10 to 50,000 permits are held. The next caller after waiters that were cancelled, or
killed. Two tenants over 4 processes, of 10 to 400 tokens a request and 8 permits: the served
tokens of one less those of the other, over any interval; and one tenant alone, beside callers of
none that wait for another key. A tenant of few requests, while another
keeps the 8 permits busy, by itself or with 1,000 more that wait. Contenders take turns.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from bench.timing import Loop, calls_in, interleaved, loop_of
from fast_litellm_shm import ConcurrencyLimiter, Limit, Quota, RateLimiter, Segment
from fast_litellm_shm import SimpleConnectionPool as Pool

PATIENCE = 30.0  # seconds for one answer: only a hang comes near it
PROMISE = "callers that wait"
HOLD = 0.005  # seconds
ENDPOINT = "https://api.example.com"
PROCESSES, THREADS = 8, 32  # that wait for key A
KEYS = [f"B{i}" for i in range(16)]
HELD = (10, 1_000, 50_000)
INTERVAL = 1.0  # seconds between two tokens of a key whose waiters have gone
LARGEST, TENANT_PERMITS = 400, 8  # tokens
SERVICE, BUSY = 0.01, 8  # of the tenant of few requests: seconds, permits
START = 0.7  # seconds that processes have until they are measured
ALONE, ASYNCIO = "alone", "asyncio.Semaphore"

clock = time.monotonic_ns  # the same in all processes
at_most = partial(Ratio, at_least=False, promise=PROMISE)
Enter = Callable[[], AbstractAsyncContextManager[Any]]


@contextmanager
def _children(count: int, target: Callable[..., None], *given: Any) -> Iterator[list[Any]]:
    """Processes of ``target(end, *given)``: each process, and our end of its pipe."""
    context, found = multiprocessing.get_context("fork"), []
    try:
        for _ in range(count):
            mine, theirs = context.Pipe()
            child = context.Process(target=target, args=(theirs, *given), daemon=True)
            child.start()
            theirs.close()
            found.append((child, mine))
        yield found
    finally:
        for child, mine in found:
            child.kill()
            child.join()
            mine.close()


def _answer(end: Connection) -> Any:
    if not end.poll(PATIENCE):
        raise TimeoutError(f"did not answer within {PATIENCE:g} s")
    return end.recv()


def _until(what: str, condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {PATIENCE:g} s: {what}")
        time.sleep(0.002)


# tasks --------------------------------------------------------------------------------------------


async def _through(enter: Enter, tasks: int) -> float:
    """Seconds that so many tasks take."""

    async def one() -> None:
        async with enter():
            await asyncio.sleep(HOLD)

    begun = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(tasks)))
    return time.perf_counter() - begun


async def _to_thread(beside: Callable[[], Any]) -> tuple[float, float]:
    """Of asyncio.to_thread, while ``beside()`` runs: the median delay in µs. And its result."""
    delays, task = [], asyncio.ensure_future(beside())
    await asyncio.sleep(0)
    while not task.done():
        begun = time.perf_counter()
        await asyncio.to_thread(int)
        delays.append(time.perf_counter() - begun)
        await asyncio.sleep(0.001)
    return 1e6 * statistics.median(delays), await task


def tasks(settings: Settings, segment: Segment, result: Result) -> None:
    """Through a semaphore."""
    limiter = ConcurrencyLimiter(50, name="tasks", segment=segment)
    counts = settings.pick((4_000, 10_000), (4_000,))
    took: dict[tuple[str, int], list[float]] = {}
    for _ in range(settings.pick(settings.share(6), 3)):
        for count in counts:
            took.setdefault((OURS, count), []).append(
                asyncio.run(_through(lambda: limiter.slot_async("k"), count))
            )
            semaphore = asyncio.Semaphore(50)
            took.setdefault((ASYNCIO, count), []).append(
                asyncio.run(_through(lambda found=semaphore: found, count))  # type: ignore[misc]
            )
    for (who, count), found in took.items():
        ideal, group = count * HOLD / 50, f"{count:,} tasks of 5 ms, 50 permits"
        notes: dict[str, str | float] = {"ideal, s": ideal}
        result.rows.append(Row(who, "s", Values(found), who, group, notes=notes))
    four, ten = (f"{count:,} tasks of 5 ms, 50 permits" for count in (4_000, 10_000))
    result.ratios.append(
        ratio(
            result.rows, OURS, ASYNCIO, 1.5, at_least=False, group=four, promise=PROMISE,
            name=f"{four}: ours / {ASYNCIO}",
        )
    )  # fmt: skip
    if (OURS, 10_000) in took:
        times = Values(each / (10_000 * HOLD / 50) for each in took[OURS, 10_000])
        result.ratios.append(at_most(f"{ten}: ours / the ideal", times, 2.0))


def pooled(settings: Settings, segment: Segment, result: Result) -> None:
    """On pooled connections, with asyncio.to_thread beside them."""
    pool = Pool("bench", max_per_endpoint=10, segment=segment)
    pool.bind(lambda endpoint: object())
    group, beside = "500 tasks of 5 ms, 10 connections", "asyncio.to_thread beside them"
    took: dict[str, list[float]] = {OURS: [], ASYNCIO: []}
    delays: dict[str, list[float]] = {OURS: [], ASYNCIO: [], ALONE: []}
    for _ in range(settings.pick(settings.share(6), 3)):
        semaphore = asyncio.Semaphore(10)
        enters: dict[str, Enter] = {
            OURS: lambda: pool.connection_async(ENDPOINT, None),
            ASYNCIO: lambda found=semaphore: found,  # type: ignore[misc]
        }
        for who, enter in enters.items():
            delay, seconds = asyncio.run(_to_thread(partial(_through, enter, 500)))
            took[who].append(seconds)
            delays[who].append(delay)
        delays[ALONE].append(asyncio.run(_to_thread(partial(asyncio.sleep, 0.1, 0.0)))[0])
    pool.close()
    result.rows += [Row(who, "s", Values(found), who, group) for who, found in took.items()]
    for who, found in delays.items():
        name = f"beside {who}" if who != ALONE else who
        result.rows.append(Row(name, "µs", Values(found), who, beside))
    times = Values(each / (500 * HOLD / 10) for each in took[OURS])
    result.ratios += [
        at_most(f"{group}: ours / the ideal", times, 2.0),
        ratio(
            result.rows, f"beside {OURS}", f"beside {ASYNCIO}", 1.5, at_least=False, group=beside,
            promise=PROMISE, name=f"{beside}: ours / {ASYNCIO}",
        ),
    ]  # fmt: skip


# key B beside the waiters of key A ----------------------------------------------------------------


def _wait_for_a(orders: Connection, name: str) -> None:
    limiter = ConcurrencyLimiter(1, name="keys", segment=Segment(name))

    def one() -> None:
        limiter.wait("A").release()

    while True:
        orders.recv()
        threads = [threading.Thread(target=one) for _ in range(THREADS)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        orders.send(None)


def _take_b(orders: Connection, name: str) -> None:
    limiter = ConcurrencyLimiter(1, name="keys", segment=Segment(name))
    while True:
        key, times = orders.recv()
        for left in reversed(range(times)):
            with limiter.slot(key):
                while left and not limiter.queue_size(key):  # the other is there: it is handed over
                    os.sched_yield()
        orders.send(None)


def _slots(limiter: ConcurrencyLimiter) -> Loop:
    def slot(key: str) -> None:
        with limiter.slot(key):
            pass

    return loop_of(slot, KEYS)


def other_keys(settings: Settings, segment: Segment, result: Result) -> None:
    """Key B."""
    limiter = ConcurrencyLimiter(1, name="keys", segment=segment)
    loop, times = _slots(limiter), settings.pick(500, 100)
    calls = calls_in(loop, 4_000_000)
    beside = f"beside {PROCESSES} × {THREADS} waiters of key A"
    found: dict[tuple[str, str], list[float]] = {}
    many = _children(PROCESSES, _wait_for_a, segment.name)
    with many as waiting, _children(2, _take_b, segment.name) as two:

        def measure(who: str, number: int) -> None:
            begun = time.perf_counter_ns()
            loop(calls)
            pair = (time.perf_counter_ns() - begun) / calls
            begun = time.perf_counter_ns()
            for _, end in two:
                end.send((KEYS[number % len(KEYS)], times))
            for _, end in two:
                _answer(end)
            over = (time.perf_counter_ns() - begun) / (2 * times)
            found.setdefault((who, "taken and released"), []).append(pair / 1000)
            found.setdefault((who, "handed over between 2 processes"), []).append(over / 1000)

        measure("warm", 0)
        for number in range(settings.pick(settings.share(10), 3)):
            measure(ALONE, number)
            with limiter.slot("A"):
                for _, end in waiting:
                    end.send(None)
                _until("all wait", lambda: limiter.queue_size("A") == PROCESSES * THREADS)
                measure(beside, number)
            for _, end in waiting:
                _answer(end)
    for (who, what), values in found.items():
        if who == "warm":
            continue
        group = f"a slot of key B, {what}"
        result.rows.append(Row(who, "µs", Values(values), OURS, group))
        if who == beside:
            result.ratios.append(
                ratio(
                    result.rows, beside, ALONE, 2.0, at_least=False, group=group, promise=PROMISE,
                    name=f"{group}: {beside} / {ALONE}",
                )
            )  # fmt: skip


# denials ------------------------------------------------------------------------------------------


def denials(settings: Settings, segment: Segment, result: Result) -> None:
    """By a semaphore whose permits are all held."""
    full = threading.Semaphore(0)
    loops = {"threading.Semaphore": loop_of(lambda _: full.acquire(blocking=False), ["k"])}
    limiters = [ConcurrencyLimiter(n, name=f"held-{n}", segment=segment) for n in HELD]
    held = [
        limiter.acquire("k") for limiter, n in zip(limiters, HELD, strict=True) for _ in range(n)
    ]
    for limiter, n in zip(limiters, HELD, strict=True):
        loops[f"a denial, {n:,} held"] = loop_of(limiter.acquire, ["k"])
        loops[f"in_flight, {n:,} held"] = loop_of(limiter.in_flight, ["k"])
    for name, found in interleaved(loops, settings).items():
        ours = "held" in name
        group = "all permits are held"
        result.rows.append(Row(name, "ns", found, OURS if ours else REFERENCE, group))
        if ours:
            result.ratios.append(at_most(name, found, 150, unit="ns"))
    for permit in held:
        permit.release()


# waiters that have gone ---------------------------------------------------------------------------


def _wait_for_ever(orders: Connection, name: str) -> None:
    limiter = _one_a_second(Segment(name), "killed")
    while True:
        limiter.wait("k")


def _one_a_second(segment: Segment, name: str) -> RateLimiter:
    return RateLimiter(Limit(60, 60 * INTERVAL, burst=1), name=name, segment=segment)


async def _cancelled(limiter: RateLimiter, count: int) -> None:
    async def one() -> None:
        await limiter.wait_async("k")

    waiting = [asyncio.create_task(one()) for _ in range(count)]
    for _ in range(3):
        await asyncio.sleep(0)
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


def ghosts(settings: Settings, segment: Segment, result: Result) -> None:
    """The next caller."""
    found: dict[str, list[float]] = {"64 killed waiters": [], "2,000 cancelled waiters": []}
    killed, cancelled = (_one_a_second(segment, name) for name in ("killed", "cancelled"))

    def next_of(limiter: RateLimiter) -> float:
        begun = time.perf_counter()
        limiter.wait("k")
        return time.perf_counter() - begun

    for _ in range(settings.pick(settings.share(2), 1)):
        with _children(64, _wait_for_ever, segment.name) as waiting:
            _until("all wait", lambda: killed.queue_size("k") >= 64)
            for child, _ in waiting:
                child.kill()
            found["64 killed waiters"].append(next_of(killed))
        cancelled.acquire("k")
        asyncio.run(_cancelled(cancelled, 2_000))
        found["2,000 cancelled waiters"].append(next_of(cancelled))
    for name, values in found.items():
        told = f"the next of a key of one token a second, after {name}"
        result.rows.append(Row(f"after {name}", "s", Values(values), OURS, "the next caller waits"))
        result.ratios.append(
            at_most(told, Values([max(values)]), INTERVAL + 1, unit="s", worst=True)
        )


# tenants ------------------------------------------------------------------------------------------


class Calls(NamedTuple):
    """Of a tenant: so many tasks, which call again and again. pause: seconds between two calls of a
    task, on average."""

    tenant: str | None
    tasks: int
    least: int  # tokens of a call
    most: int
    pause: float = 0.0
    key: str = "k"


class Served(NamedTuple):
    """A call that was admitted. waited: ns."""

    when: int
    tenant: str | None
    tokens: int
    waited: int


def _serve(
    out: Connection, name: str, permits: int, service: float, calls: Sequence[Calls], end: int
) -> None:
    quota = Quota(max_parallel=permits, name=f"tenants-{permits}", segment=Segment(name))
    served: list[Served] = []

    async def call(of: Calls, rng: random.Random) -> None:
        while (came := clock()) < end:
            if of.pause:
                await asyncio.sleep(2 * of.pause * rng.random())
                came = clock()
            tokens = rng.randint(of.least, of.most)
            timeout = max(end - came, 0) / 1e9
            async with await quota.wait_async(
                of.key, tokens, timeout, tenant=of.tenant
            ) as admission:
                if admission:
                    now = clock()
                    served.append(Served(now, of.tenant, tokens, now - came))
                    await asyncio.sleep(service)

    async def main() -> None:
        rng = random.Random(multiprocessing.current_process().pid)
        await asyncio.gather(*(call(of, rng) for of in calls for _ in range(of.tasks)))

    asyncio.run(main())
    out.send([each for each in served if each.when < end])


def _served(
    segment: Segment,
    permits: int,
    service: float,
    seconds: float,
    calls: Sequence[Calls],
    *more: Sequence[Calls],
) -> list[Served]:
    """By 4 processes that make the same calls, and one for each of ``more``."""
    end = clock() + round((seconds + START) * 1e9)
    given = segment.name, permits, service
    start = end - round(seconds * 1e9)
    found: list[Served] = []
    with ExitStack() as stack:
        made = (_children(1, _serve, *given, each, end) for each in (*[calls] * 4, *more))
        children = [child for one in made for child in stack.enter_context(one)]
        for _, pipe in children:
            found += _answer(pipe)
    return sorted((each for each in found if each.when > start), key=lambda each: each.when)


def two_tenants(settings: Settings, segment: Segment, result: Result) -> None:
    """Both have callers in the queue all the time; and one alone."""
    seconds, times = settings.pick((1.0, settings.share(2)), (0.5, 1))
    both = [Calls("a", 8, 10, LARGEST), Calls("b", 8, 10, LARGEST // 4)]
    apart, sums = [], []
    for _ in range(times):
        served = _served(segment, TENANT_PERMITS, HOLD, seconds, both)
        differences, now = [0], 0
        for each in served:
            now += each.tokens if each.tenant == "a" else -each.tokens
            differences.append(now)
        apart.append(max(differences) - min(differences))
        sums.append(sum(each.tokens for each in served) / 2)
    bound = 2 * LARGEST * TENANT_PERMITS
    notes: dict[str, str | float] = {"served of each, tokens": statistics.median(sums)}
    group = "two tenants over 4 processes"
    result.rows.append(Row("differ at most by", "tokens", Values(apart), OURS, group, notes=notes))
    told = f"{group}: served to one less served to the other"
    result.ratios.append(at_most(told, Values([max(apart)]), bound, unit="tokens", worst=True))
    rates: dict[str, list[float]] = {"of one tenant": [], "of no tenant": []}
    lone = [Calls("a", 8, 100, 100, key="one"), Calls(None, 8, 100, 100, key="none")]
    for _ in range(settings.pick(settings.share(4), 2)):
        lone.reverse()
        served = _served(segment, TENANT_PERMITS, SERVICE, 1.0, lone)
        counts = Counter(each.tenant for each in served)
        rates["of one tenant"].append(counts["a"])
        rates["of no tenant"].append(counts[None])
    group = "callers of two keys at once, 4 processes, 8 permits each"
    result.rows += [Row(name, "admitted/s", Values(v), OURS, group) for name, v in rates.items()]
    result.ratios.append(
        ratio(result.rows, "of one tenant", "of no tenant", 0.99, promise=PROMISE, group=group)
    )


def _p99(served: list[Served]) -> tuple[float, float]:
    """Of the waits of the light tenant that began in the time: median and 99th percentile, ms."""
    light = [each for each in served if each.tenant == "light"]
    waits = sorted(each.waited / 1e6 for each in light if each.when - each.waited > light[0].when)
    return statistics.median(waits), waits[min(int(0.99 * len(waits)), len(waits) - 1)]


def light_tenant(settings: Settings, segment: Segment, result: Result) -> None:
    """Beside a heavy one."""
    seconds = settings.pick(2.0, 0.7)
    light = [Calls("light", 4, 10, 100, 0.01)]
    waits: dict[str, list[tuple[float, float]]] = {"no other waits": [], "1,000 others wait": []}
    for _ in range(settings.pick(settings.share(2), 1)):
        for heavy, found in zip((0, 1_000), waits.values(), strict=True):
            # those that hold the permits, and those that wait
            calls = [Calls("heavy", (BUSY + heavy) // 4, LARGEST, LARGEST)]
            found.append(_p99(_served(segment, BUSY, SERVICE, seconds, calls, light)))
    group = "a light tenant waits, beside a heavy one"
    for part in (0, 1):
        for name, both in waits.items():
            values = Values(each[part] for each in both)
            told = f"{('median', 'p99')[part]}, {name}"
            result.rows.append(Row(told, "ms", values, OURS, group))
    moved = [(after[1] - before[1]) / 1e3 for before, after in zip(*waits.values(), strict=True)]
    told = "p99 of a light tenant, moved by 1,000 requests of another that wait"
    services = Values(each / SERVICE for each in moved)
    result.ratios.append(at_most(told, services, 1.0, unit="services"))


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    with peers.Place(capacity=2 * HELD[-1]) as place:
        segment = place.segment()
        # those that fork before those that start threads
        for part in (other_keys, two_tenants, light_tenant, ghosts, tasks, pooled, denials):
            part(settings, segment, result)
    result.plots.append(
        Plot(
            "waiting",
            "bars",
            "4,000 and 10,000 tasks of 5 ms through 50 permits",
            ("4,000 tasks of 5 ms, 50 permits", "10,000 tasks of 5 ms, 50 permits"),
            "seconds",
            log_value=False,
        )
    )
    return result
