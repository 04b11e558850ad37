"""Quota on an event loop, over many hosts: it never waits there, and a cancelled call takes
nothing."""

from __future__ import annotations

import asyncio
import ctypes
import multiprocessing
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support import servers
from support.leases import connection_of, tokens_of
from support.names import remove, unique_name
from support.permits import most_at_once
from support.waiting import PATIENCE, ticking, wait_until, wait_until_async

from fast_litellm_shm import Quota, RateLimiter, Segment, Window
from fast_litellm_shm._shared import performance as monitoring
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster import Cluster, link
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.cluster.settlement import Settlement
from fast_litellm_shm.limiters.quota import Admission

HOSTS, WORKERS, CALLERS = 2, 2, 8
MINUTE = 60
LONG = 30.0  # a time-out that nothing here reaches
_context = multiprocessing.get_context("fork")


def quota_of(segment: Segment, url: str, **cluster: Any) -> Quota:
    server = Cluster(url, **({"timeout": LONG} | cluster))
    return Quota(rpm=10, tpm=1000, max_parallel=3, name="api", segment=segment, cluster=server)


@pytest.fixture
def hosts(server: servers.Server, segment: Segment, other: Segment) -> tuple[Quota, Quota]:
    return quota_of(segment, server.url), quota_of(other, server.url)


@pytest.fixture
def names() -> Iterator[list[str]]:
    made = [unique_name(f"host{i}") for i in range(HOSTS)]
    yield made
    for name in made:
        remove(name)


# exactness -----------------------------------------------------------------------------------


class Counts:
    """What workers share: admissions of each, and the times of what they held."""

    def __init__(self, notes: int = 0) -> None:
        self.notes = notes
        self.admitted: Any = _context.Array(ctypes.c_int64, HOSTS * WORKERS, lock=False)
        self.asked: Any = _context.Array(ctypes.c_int64, HOSTS * WORKERS, lock=False)
        self.times: Any = _context.Array(ctypes.c_int64, 2 * max(notes, 1) * HOSTS * WORKERS)
        self.stop: Any = _context.Value(ctypes.c_int64, 0, lock=False)


def run_workers(
    counts: Counts, work: Callable[[int, Counts], Any], done: Callable[[], bool]
) -> None:
    processes = [
        _context.Process(target=lambda i: asyncio.run(work(i, counts)), args=(i,), daemon=True)
        for i in range(HOSTS * WORKERS)
    ]
    for process in processes:
        process.start()
    try:
        asyncio.run(wait_until_async(f"enough is admitted: {list(counts.admitted)}", done))
    finally:
        counts.stop.value = 1
        for process in processes:
            process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0] * len(processes)


@pytest.mark.parametrize(("rpm", "tpm"), [(120, None), (1000, 1200)])
def test_rates_over_two_hosts_of_two_workers(
    server: servers.Server, names: list[str], rpm: int, tpm: int | None
) -> None:
    """Exactly 120, of rpm or of 10 tokens each: nothing more, and nothing is left lying."""
    counts = Counts()

    async def work(i: int, counts: Counts) -> None:
        segment = Segment(names[i // WORKERS], capacity=1000)
        cluster = Cluster(server.url, timeout=LONG)
        quota = Quota(rpm, tpm, 5, name="api", segment=segment, cluster=cluster)

        async def call() -> None:
            async with await quota.admit_async("key", 10) as admission:
                counts.admitted[i] += admission.allowed
            counts.asked[i] += 1
            await asyncio.sleep(0)

        async def caller() -> None:
            while not counts.stop.value:
                await call()

        while not counts.admitted[i]:
            await call()
        await wait_until_async("all workers take part", lambda: all(counts.admitted))
        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    began = time.monotonic()

    def all_and_more() -> bool:
        if sum(counts.admitted) < 120:
            counts.asked[:] = [0] * len(counts.asked)
        return all(each > 50 for each in counts.asked)

    run_workers(counts, work, all_and_more)
    minutes = int((time.monotonic() - began) // MINUTE) + 1  # another one began meanwhile
    assert sum(counts.admitted) == 120 or 120 < sum(counts.admitted) <= 120 * minutes


def test_calls_in_parallel_over_two_hosts_of_two_workers(
    server: servers.Server, names: list[str]
) -> None:
    counts = Counts(notes=20_000)

    async def work(i: int, counts: Counts) -> None:
        segment = Segment(names[i // WORKERS], capacity=1000)
        cluster = Cluster(server.url, timeout=LONG)
        quota = Quota(rpm=10**6, max_parallel=5, name="api", segment=segment, cluster=cluster)

        async def caller() -> None:
            while not counts.stop.value:
                async with await quota.admit_async("key") as admission:
                    if admission:
                        began = time.monotonic_ns()
                        await asyncio.sleep(random.random() / 100)
                        note = counts.admitted[i]
                        if note < counts.notes:
                            at = 2 * (i * counts.notes + note)
                            counts.times[at : at + 2] = [began, time.monotonic_ns()]
                            counts.admitted[i] = note + 1
                await asyncio.sleep(0.001)

        await asyncio.gather(*(caller() for _ in range(CALLERS)))

    run_workers(counts, work, lambda: min(counts.admitted) > 50)
    spans = []
    for i in range(HOSTS * WORKERS):
        for note in range(counts.admitted[i]):
            at = 2 * (i * counts.notes + note)
            spans.append((counts.times[at], counts.times[at + 1]))
    assert most_at_once(spans) == 5


# the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("asks", ["permits", "rates"])
def test_the_loop_goes_on_while_the_server_is_asked(
    server: servers.Server, hosts: tuple[Quota, Quota], asks: str
) -> None:
    quota = hosts[0]
    assert quota.admit("key", 10).release()  # a permit is granted, and tokens beyond these 10

    async def scenario() -> None:
        server.freeze()
        pending = quota.admit_async("key" if asks == "rates" else "another", 900)
        task = asyncio.create_task(pending)
        async with ticking() as ticks:
            await wait_until_async("the loop comes round", lambda: ticks() > 1000)
            assert not task.done()
            server.thaw()
            async with await task as admission:
                assert admission and quota.in_flight("key") + quota.in_flight("another") == 1

    asyncio.run(scenario())


def test_a_call_that_asks_counts_once(
    server: servers.Server,
    segment: Segment,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In what people look at: it is made again in a thread, and has not failed before."""
    (tmp_path / "c.json").write_text('{"monitoring": {"sample_rate": 1}}')
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(tmp_path / "c.json"))
    quota = Quota(rpm=1, name="api", segment=segment, cluster=server.url)

    async def scenario() -> None:
        for i in range(5):
            assert await quota.admit_async(f"key {i}")

    asyncio.run(scenario())
    found = monitoring.segment_stats(segment, "rate_limiter")["rate_limiter"]
    assert (found["total_calls"], found["error_count"]) == (5, 0)


def test_what_is_done_after_it_asks_nobody(
    server: servers.Server, hosts: tuple[Quota, Quota]
) -> None:
    """settle, up and down, cancel and release, with a server that does not answer."""
    first, second = hosts

    async def admitted() -> Admission:
        return await first.admit_async("key", 200)

    held = [asyncio.run(admitted()) for _ in range(2)]
    assert all(held)
    server.freeze()
    held[0].settle(600)
    held[1].settle(50)
    held[1].cancel()
    assert held[0].release()
    assert connection_of(first).outage is None  # nobody has waited in vain
    server.thaw()

    async def scenario() -> None:
        await wait_until_async("it is booked", lambda: first.remaining("key")["tpm"] == 400)
        await wait_until_async(
            "the other one is given back", lambda: first.remaining("key")["rpm"] == 9
        )
        await wait_until_async(
            "the other host is told", lambda: second.remaining("key")["tpm"] <= 400
        )
        found = [await second.admit_async("key", 401)]
        assert not found[0] and found[0].reason == "tpm"

        async def admits() -> None:
            while not found[-1]:
                found.append(await second.admit_async("key", 400))
                await asyncio.sleep(0.005)

        await asyncio.wait_for(admits(), PATIENCE)  # what the first has got back is recalled
        found[-1].release()

    asyncio.run(scenario())


def test_what_is_given_back_pays_debts_first(hosts: tuple[Quota, Quota]) -> None:
    """As on one host: 900 and 100 are used, and nothing is left for another 400."""
    first, second = hosts

    async def scenario() -> None:
        more, less = await first.admit_async("key", 500), await first.admit_async("key", 500)
        assert more and less
        more.settle(900)
        await wait_until_async("it is told", lambda: not first.remaining("key")["tpm"])
        less.settle(100)
        for each in (more, less):
            each.release()
        await wait_until_async("both are told", lambda: not connection_of(first).settlements)
        for quota in hosts:
            denied = await quota.admit_async("key", 1)
            assert not denied and (denied.retry_after or 99) <= MINUTE

    asyncio.run(scenario())


def test_nothing_is_given_back_to_the_window_after(
    server: servers.Server, segment: Segment
) -> None:
    """Of what was charged in a window that is over, and is told when the next one is used up."""
    cluster = Cluster(server.url, timeout=LONG)
    limiter = RateLimiter(Window(100, 1), name="short", segment=segment, cluster=cluster)
    wallet = tokens_of(limiter)

    def used_up() -> int:
        """All of a window that has just begun; when it ends."""
        wait_until("another window begins", lambda: limiter.acquire("key", 100))
        return int(lib.fshm_now(segment._handle)) + 10**9

    end = used_up()
    used_up()
    wallet.settle(
        Settlement(wallet, b"key", (0,), (50,), (end,)), False
    )  # over, as this host knows
    look, _ = wallet.request("look", b"key", (0,))
    (found,) = wallet.connection.call([look])
    late, _ = wallet.refund_request(look, found, (50,))
    used_up()
    wallet.connection.call([late])
    assert not limiter.acquire("key", 1)


def test_a_child_that_runs_no_atexit_has_told_what_it_used(
    server: servers.Server, segment: Segment, other: Segment
) -> None:
    def child() -> None:
        async def scenario() -> None:
            quota = quota_of(Segment(segment.name), server.url)
            async with await quota.admit_async("key", 100) as admission:
                admission.settle(900)

        asyncio.run(scenario())

    process = _context.Process(target=child)
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    assert quota_of(other, server.url).remaining("key")["tpm"] <= 100


def test_the_collector_comes_upon_a_call_at_any_line(hosts: tuple[Quota, Quota]) -> None:
    """What it finds is booked without a lock: it may have come within the lines that hold one."""
    quota = hosts[0]

    async def scenario() -> Admission:
        return await quota.admit_async("key", 100)

    admission = asyncio.run(scenario())
    mine = connection_of(quota)
    with link.starting, mine.ensure(Background).reporting, mine._lock:
        admission.settle(900)  # as from a finalizer
        admission.settle(50)
        assert len(mine.settlements) == 2
    wait_until("it is told", lambda: quota.remaining("key")["tpm"] == 950)
    admission.release()


def test_a_process_that_ends_has_told_what_it_used(
    server: servers.Server, segment: Segment, other: Segment
) -> None:
    code = (
        "from fast_litellm_shm import Quota, Segment\n"
        f"quota = Quota(rpm=10, tpm=1000, name='api', segment=Segment({segment.name!r}),\n"
        f"              cluster={server.url!r})\n"
        "quota.admit('key', 100).settle(900)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    found = Quota(rpm=10, tpm=1000, name="api", segment=other, cluster=server.url)
    assert found.remaining("key")["tpm"] <= 100


# cancelled -----------------------------------------------------------------------------------


async def nothing_is_used(first: Quota, second: Quota) -> None:
    """All of it is to be had, by another host."""
    found: list[Admission] = []

    async def admits() -> None:
        while not found or not found[-1]:
            found.append(await second.admit_async("key", 1000))
            await asyncio.sleep(0.005)

    await asyncio.wait_for(admits(), PATIENCE)
    assert second.remaining("key") == {"rpm": 9, "tpm": 0, "max_parallel": 2}
    assert first.in_flight("key") == 0
    found[-1].release()


def test_cancelled_at_any_time(hosts: tuple[Quota, Quota]) -> None:
    first, second = hosts

    async def scenario() -> None:
        async def call() -> None:
            (await first.admit_async("key", 10)).cancel()

        for turn in range(150):
            tasks = [asyncio.create_task(call()) for _ in range(3)]
            for _ in range(turn % 30):
                await asyncio.sleep(0.0002 if turn % 2 else 0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await wait_until_async(
            "threads have given theirs back", lambda: first.in_flight("key") == 0
        )
        await nothing_is_used(first, second)

    asyncio.run(scenario())


@pytest.mark.parametrize("warm", [False, True])
def test_cancelled_while_it_asks(
    server: servers.Server, hosts: tuple[Quota, Quota], warm: bool
) -> None:
    """What the server grants to a thread that nobody waits for is given back, once."""
    first, second = hosts
    if warm:  # the permit is granted: it is the rates that ask
        first.admit("key", 10).cancel()

    async def scenario() -> None:
        server.freeze()
        task = asyncio.create_task(first.admit_async("key", 900))
        async with ticking() as ticks:
            await wait_until_async("the loop comes round", lambda: ticks() > 200)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.thaw()
        await nothing_is_used(first, second)

    asyncio.run(scenario())


# outages -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "admitted"), [("deny", 0), ("allow", 30), ("local", 10)])
def test_outages(server: servers.Server, segment: Segment, policy: str, admitted: int) -> None:
    """One host of one, so that its share is all of it."""
    quota = quota_of(segment, server.url, on_outage=policy, timeout=0.2)

    async def scenario() -> None:
        async with await quota.admit_async("other") as admission:
            assert admission
        await wait_until_async(
            "the leader has told how many hosts are", lambda: host_count(segment) == 1
        )
        server.kill()
        found = 0
        for _ in range(30):
            async with await quota.admit_async("key", 10) as admission:
                found += admission.allowed
                admission.settle(20)
        assert found == admitted
        denied = await quota.admit_async("key", 10)
        assert bool(denied) == (policy == "allow")
        if not denied:
            assert denied.retry_after is not None and denied.retry_after > 0
        denied.release()

    asyncio.run(scenario())


def test_on_one_host_nothing_is_awaited(segment: Segment) -> None:
    quota = Quota(rpm=2, name="api", segment=segment)
    call = quota.admit_async("key")
    with pytest.raises(StopIteration) as stop:
        call.send(None)
    assert stop.value.value
    with pytest.raises(TypeError, match="admit_async: tokens"):
        asyncio.run(quota.admit_async("key", "1"))  # type: ignore[arg-type]
