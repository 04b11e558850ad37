"""Programs that gevent or eventlet patch after they have imported the package; each in a process of
its own. To wait for ever is the failure of most: support.children ends it."""

from __future__ import annotations

import asyncio
import importlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fast_litellm_shm import (
    ConcurrencyLimiter,
    EncodingUnavailableError,
    PermitTimeoutError,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    Window,
)
from fast_litellm_shm._shared import greenlets
from fast_litellm_shm.cluster.single_flight import SingleFlight
from fast_litellm_shm.limiters.grantors import Permits
from fast_litellm_shm.tokens import encoding
from support.permits import Span
from support.waiting import PATIENCE
from support.workers import meet

HUBS = ("gevent", "eventlet")
ORIGIN = "http://example.com"


def patch(hub: str, looks: bool = False) -> Any:
    """The module gevent or eventlet. looks: whether who waits also looks by itself once a second;
    else who goes on was woken."""
    if not looks:
        Permits.wake_ns = 3600 * 10**9
    library = importlib.import_module(hub)
    if hub == "gevent":
        importlib.import_module("gevent.monkey").patch_all()
    else:
        # httpcore imports it where it is there, and eventlet's sockets break that import.
        sys.modules["trio"] = None  # type: ignore[assignment]
        library.monkey_patch()
    return library


def together(library: Any, calls: list[Callable[[], Any]]) -> list[Any]:
    """What each of them returns, all at once in greenlets."""
    started = [library.spawn(call) for call in calls]
    return [each.get() if hasattr(each, "get") else each.wait() for each in started]


def _span(held: Any) -> Span:
    with held:
        start = time.monotonic_ns()
        time.sleep(0.001)
        return start, time.monotonic_ns()


def _turns(use: Callable[[], Any], count: int) -> list[Span]:
    return [_span(use()) for _ in range(count)]


def slots(hub: str, name: str, parties: int, count: int, each: int) -> list[Span]:
    """Greenlets of several processes take turns at one slot; without a hub, threads do."""
    limiter = ConcurrencyLimiter(1, name="slots", segment=Segment(name))
    library = patch(hub) if hub else None
    meet(name, parties)

    def turns() -> list[Span]:
        return _turns(lambda: limiter.slot("k"), each)

    if library is not None:
        return sum(together(library, [turns] * count), [])
    found: list[Span] = []
    threads = [threading.Thread(target=lambda: found.extend(turns())) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def _connect(endpoint: str) -> str:
    time.sleep(0.01)
    return endpoint


def connections(hub: str, name: str, count: int, each: int) -> list[Span]:
    """One connection, which all greenlets use, and which takes a while to open."""
    pool = SimpleConnectionPool("green", max_per_endpoint=1, segment=Segment(name))
    library = patch(hub)
    pool.bind(_connect)

    def turns() -> list[Span]:
        return _turns(lambda: pool.connection(ORIGIN, timeout=None), each)

    return sum(together(library, [turns] * count), [])


def requests(hub: str, name: str, origin: str, count: int) -> list[int]:
    """One request in flight at once; the statuses."""
    import httpx

    from fast_litellm_shm.integrations.httpx import SharedLimitTransport

    library = patch(hub)
    transport = SharedLimitTransport(
        httpx.HTTPTransport(verify=False), max_in_flight=1, name="green", segment=Segment(name)
    )
    with httpx.Client(transport=transport, timeout=None) as client:
        return together(library, [lambda: client.get(origin).status_code] * count)


def times_out(hub: str, name: str) -> int:
    """How often another greenlet ran while one waited in vain."""
    limiter = ConcurrencyLimiter(1, name="times out", segment=Segment(name))
    library = patch(hub)
    ran, over = 0, False

    def run() -> None:
        nonlocal ran
        while not over:
            time.sleep(0.01)
            ran += 1

    def wait() -> None:
        nonlocal over
        try:
            with limiter.slot("k", timeout=0.5):
                raise AssertionError("there is no second slot")
        except PermitTimeoutError:
            over = True

    with limiter.slot("k"):
        together(library, [run, wait])
    return ran


def _taken_away(library: Any, use: Callable[[], Any], seed: int) -> tuple[int, int]:
    """Greenlets that a Timeout or a kill takes away at any instant, wherever they are: how many
    that were, and how many had their turn."""
    chance, gone, served = random.Random(seed), 0, 0

    def once(longest: float) -> None:
        nonlocal gone, served
        try:
            with library.Timeout(chance.random() * longest), use():
                time.sleep(chance.random() * 0.003)
            served += 1
        except library.Timeout:
            gone += 1

    for _ in range(10):
        together(library, [partial(once, 0.05)] * 20)
    started = [library.spawn(once, 10.0) for _ in range(20)]
    time.sleep(0.003)
    for each in started[::2]:
        each.kill()
    for each in started[1::2]:
        each.get() if hasattr(each, "get") else each.wait()
    return gone, served


def left(hub: str, name: str, seed: int) -> tuple[int, int, int]:
    """_taken_away() with slots, and how many are held at the end."""
    limiter = ConcurrencyLimiter(2, name="left", segment=Segment(name))
    library = patch(hub)
    gone, served = _taken_away(library, lambda: limiter.slot("k"), seed)
    return gone, served, limiter.in_flight("k")


def left_connections(hub: str, name: str, seed: int) -> tuple[int, int, int]:
    """_taken_away() with connections, and how many are in use at the end."""
    pool = SimpleConnectionPool("left", max_per_endpoint=2, segment=Segment(name))
    library = patch(hub)
    pool.bind(_connect)
    found = _taken_away(library, lambda: pool.connection(ORIGIN, timeout=None), seed)
    return *found, int(pool.get_stats()["active_connections"])


def in_real_threads(hub: str, name: str) -> tuple[bool, bool, bool]:
    """A thread without a hub waits while a greenlet has the slot. Whether the thread had to yield;
    whether the greenlet has to; whether the thread got the slot."""
    limiter = ConcurrencyLimiter(1, name="thread", segment=Segment(name))
    library = patch(hub)

    def wait() -> tuple[bool, bool]:
        with limiter.wait("k") as permit:
            return greenlets.must_yield(), bool(permit)

    if hub == "gevent":
        execute = library.get_hub().threadpool.apply
    else:
        execute = importlib.import_module("eventlet.tpool").execute

    def hold() -> bool:
        with limiter.slot("k"):
            time.sleep(0.2)
            return greenlets.must_yield()

    here, (there, got) = together(library, [hold, lambda: execute(wait)])
    return there, here, got


def beside_another(hub: str, name: str) -> list[bool]:
    """Where the other library is imported too, and patches nothing, greenlets wait by their own
    hub, and are woken by a thread of the system."""
    other = next(each for each in HUBS if each != hub)
    importlib.import_module("gevent.monkey" if other == "gevent" else "eventlet.patcher")
    limiter = ConcurrencyLimiter(1, name="beside", segment=Segment(name))
    library = patch(hub)

    def use() -> bool:
        with limiter.slot("k", PATIENCE):
            time.sleep(0.01)
        return True

    return together(library, [use] * 5)


def tasks(hub: str, name: str, count: int) -> int:
    """An event loop in a patched program, whose tasks wait for a slot, and for a connection."""
    segment = Segment(name)
    limiter = ConcurrencyLimiter(1, name="tasks", segment=segment)
    pool = SimpleConnectionPool("tasks", max_per_endpoint=1, segment=segment)
    patch(hub)
    done = 0

    async def use() -> None:
        nonlocal done
        async with limiter.slot_async("k"):
            await asyncio.sleep(0.001)
        async with pool.connection_async(ORIGIN, timeout=None):
            await asyncio.sleep(0.001)
        done += 1

    async def use_all() -> None:
        await asyncio.gather(*(use() for _ in range(count)))

    asyncio.run(use_all())
    return done


def asks(hub: str, name: str) -> list[tuple[bool, bool]]:
    """One greenlet asks the server for all others of the host, and is answered while they wait."""
    limiter = RateLimiter(Window(1, 60), name="asks", segment=Segment(name))
    asking = SingleFlight(limiter, timeout=3600.0)
    library = patch(hub)

    def ask() -> tuple[bool, bool]:
        with asking.turn(b"k") as (alone, waited):
            time.sleep(0.01)
            return alone, waited

    return together(library, [ask] * 10)


def locked(hub: str) -> int:
    """A lock that was made before the program was patched, held over a sleep. The most who held it
    at once."""
    lock = greenlets.Lock()
    library = patch(hub)
    now = most = 0

    def hold() -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
            time.sleep(0.005)
            now -= 1

    together(library, [hold] * 10)
    return most


def encodings(hub: str, folder: str, proxy: str) -> list[str]:
    """Greenlets that all need an encoding which is nowhere here, nor to be downloaded: what they
    are told."""
    os.environ |= {"TIKTOKEN_CACHE_DIR": folder, "https_proxy": proxy}
    library = patch(hub)

    def load() -> str:
        try:
            return str(encoding.load("gpt2"))
        except EncodingUnavailableError as error:
            return str(error)

    return together(library, [load] * 5)


def over_hosts(
    hub: str, name: str, url: str, parties: int, keys: int, each: int
) -> tuple[list[bool], int]:
    """Greenlets of several processes of a host use limits that a server keeps, made before the
    program is patched: which of their calls were admitted, when all have had their turns at one
    slot too; and how many threads of this process would lead the host."""
    segment = Segment(name)
    limiter = RateLimiter(Window(each, 3600), name="over hosts", segment=segment, cluster=url)
    slot = ConcurrencyLimiter(1, name="slot over hosts", segment=segment, cluster=url)
    library = patch(hub)
    meet(name, parties)

    def call(key: int) -> list[bool]:
        admitted = [bool(limiter.acquire(f"{key}")) for _ in range(each)]
        with slot.slot("k"):
            time.sleep(0.001)
        return admitted

    found = together(library, [partial(call, i % keys) for i in range(4 * keys)])
    leaders = [each for each in threading.enumerate() if each.name == "fast-shm-cluster_lead"]
    return sum(found, []), len(leaders)
