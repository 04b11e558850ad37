"""How fast do connections of a pool go from caller to caller, where more callers come than there
are connections?

gunicorn with 6 gthread workers of 4 threads holds a connection for 1 ms in each request: of a pool
of 5, and of one whose limit is never met. One client asks both servers in turn, with 24 requests at
a time, each over a connection of its own, as a proxy does. 5 connections serve 4,700 requests a
second at most. Opened anew: the part of the requests that opened a pooled connection.
Then 500 asyncio tasks hold one of 10 connections for 5 ms each, beside an asyncio.Semaphore; and
what asyncio.to_thread takes meanwhile. The 500 tasks take 250 ms at least.
"""

from __future__ import annotations

import asyncio
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import SimpleConnectionPool

ENDPOINT = "https://api.example.com"
WORKERS, THREADS, MOST, MANY = 6, 4, 5, 100
MET, UNMET = "a pool of 5", "a pool of 100"
TASKS, HELD, TASKS_MOST = 500, 0.005, 10
IDEAL = TASKS * HELD / TASKS_MOST * 1e3  # ms
PAUSE = 0.005  # seconds between two calls of to_thread
PATIENCE = 60.0

Slot = Callable[[], AbstractAsyncContextManager[Any]]


class _Request(asyncio.Protocol):
    """One, over a connection of its own."""

    def __init__(self) -> None:
        self.answer, self.done = b"", asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"GET / HTTP/1.1\r\nhost: bench\r\nconnection: close\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        self.answer += data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


async def _load(socket: str, seconds: float) -> tuple[float, list[float]]:
    """Requests a second, and what each took, sorted, in ms."""
    loop, took = asyncio.get_running_loop(), list[float]()
    begun = time.perf_counter()

    async def client() -> None:
        while (now := time.perf_counter()) < begun + seconds:
            _, request = await loop.create_unix_connection(_Request, socket)
            await asyncio.wait_for(request.done, PATIENCE)
            if not request.answer.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"answered {request.answer[:60]!r}")
            took.append((time.perf_counter() - now) * 1e3)

    await asyncio.gather(*(client() for _ in range(WORKERS * THREADS)))
    return len(took) / (time.perf_counter() - begun), sorted(took)


def _answers(socket: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until it does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            asyncio.run(_load(socket, 0.2))
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("gunicorn did not start") from None
            time.sleep(0.1)


def _serve(place: peers.Place, most: int, socket: str, opened: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "BENCH_MOST": str(most),
        "BENCH_OPENED": opened,
        "FAST_LITELLM_SHM_NAME": place.segment_name,
    }
    options = ("--worker-class=gthread", f"--workers={WORKERS}", f"--threads={THREADS}")
    return subprocess.Popen(
        [sys.executable, "-m", "gunicorn", "bench.pool_app:app", f"--bind=unix:{socket}", *options]
        + ["--log-level=warning"],
        env=environment,
    )


def _opened(path: str) -> int:
    return os.stat(path).st_size if os.path.exists(path) else 0


def _over_processes(place: peers.Place, settings: Settings, result: Result) -> None:
    rounds, seconds = settings.pick((max(2, settings.rounds // 5), 1.5), (3, 0.5))
    most = {MET: MOST, UNMET: MANY}
    sockets, files = ({name: place.path() for name in most} for _ in range(2))
    rates: dict[str, list[float]] = {name: [] for name in most}
    slow: dict[str, list[float]] = {name: [] for name in most}
    anew: dict[str, list[float]] = {name: [] for name in most}
    servers: list[subprocess.Popen[bytes]] = []
    try:
        for name, connections in most.items():
            servers.append(_serve(place, connections, sockets[name], files[name]))
            _answers(sockets[name], servers[-1])
        rng = random.Random(42)
        for _ in range(rounds):
            for name in rng.sample(list(most), len(most)):
                before = _opened(files[name])
                rate, took = asyncio.run(_load(sockets[name], seconds))
                rates[name].append(rate)
                slow[name].append(took[len(took) * 99 // 100])
                anew[name].append(100 * (_opened(files[name]) - before) / len(took))
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
    for group, unit, found in (
        ("requests a second", "requests/s", rates),
        ("p99", "ms", slow),
        ("opened anew", "% of requests", anew),
    ):
        result.rows += [
            Row(name, unit, Values(found[name]), REFERENCE if name == UNMET else OURS, group)
            for name in most
        ]
    group = "requests a second"
    result.ratios += [
        ratio(result.rows, MET, UNMET, 0.5, group=group),
        Ratio(f"{MET}, 24 threads", Values(rates[MET]), 2000, unit="requests/s"),
    ]


async def _crowd(slot: Slot) -> tuple[float, float]:
    """What the tasks took together, and what a call of to_thread took meanwhile; in ms."""
    calls: list[float] = []

    async def use() -> None:
        async with slot():
            await asyncio.sleep(HELD)

    async def beside() -> None:
        while True:
            begun = time.perf_counter()
            await asyncio.to_thread(os.getpid)
            calls.append((time.perf_counter() - begun) * 1e3)
            await asyncio.sleep(PAUSE)

    other = asyncio.create_task(beside())
    await asyncio.sleep(2 * PAUSE)  # its thread has begun
    calls.clear()
    begun = time.perf_counter()
    await asyncio.gather(*(use() for _ in range(TASKS)))
    took = (time.perf_counter() - begun) * 1e3
    other.cancel()
    return took, statistics.median(calls)


def _on_a_loop(place: peers.Place, settings: Settings, result: Result) -> None:
    pool = SimpleConnectionPool(max_per_endpoint=TASKS_MOST, segment=place.segment())
    pool.bind(lambda _: object())
    names = {"our pool": OURS, "asyncio.Semaphore": REFERENCE}
    took: dict[str, list[float]] = {name: [] for name in names}
    beside: dict[str, list[float]] = {name: [] for name in names}

    async def once(name: str) -> None:
        semaphore = asyncio.Semaphore(TASKS_MOST)
        slots: dict[str, Slot] = {
            "our pool": lambda: pool.connection_async(ENDPOINT, timeout=None),
            "asyncio.Semaphore": lambda: semaphore,
        }
        whole, call = await _crowd(slots[name])
        took[name].append(whole)
        beside[name].append(call)

    rng = random.Random(43)
    for _ in range(settings.pick(max(2, settings.rounds // 5), 3)):
        for name in rng.sample(list(names), len(names)):
            asyncio.run(once(name))
    pool.close()
    for group, unit, found in (
        ("500 tasks", "ms", took),
        ("to_thread beside them", "ms", beside),
    ):
        result.rows += [
            Row(name, unit, Values(found[name]), who, group) for name, who in names.items()
        ]
    result.ratios += [
        Ratio(
            "500 tasks, our pool / ideal",
            Values(each / IDEAL for each in took["our pool"]),
            2.0,
            at_least=False,
        ),
        Ratio(
            "to_thread beside 500 tasks of our pool",
            Values(beside["our pool"]),
            1.0,
            at_least=False,
            unit="ms",
        ),
    ]


def run(settings: Settings) -> Result:
    """Measure; the servers only where gunicorn is installed."""
    result = asked(__doc__)
    with peers.Place() as place:
        try:
            peers.need("gunicorn")
            _over_processes(place, settings, result)
        except peers.MissingError as error:
            result.missing["gunicorn"] = str(error)
        _on_a_loop(place, settings, result)
    result.plots = [
        Plot(
            "pool_waiting",
            "bars",
            "24 threads of 6 processes, 1 ms each",
            ("requests a second",),
            "requests a second",
            log_value=False,
            better="more is better",
        )
    ]
    return result
