"""What is left of an ASGI application's speed behind a limiter: requests a second, and p99?

uvicorn with 2 workers on a Unix socket answers “hello”: without a limiter, with ours, and with the
package limits over Redis (asyncio, one round trip a request). The three servers run all the while
and are asked in turn, by 16 connections of one client that send the next request when they have
the answer to the last. The client takes a core's time too, on the same machine.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
import time

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Result, Row, Settings, Values, asked, ratio

CONNECTIONS, WORKERS = 16, 2
PATIENCE = 60.0


class _Client(asyncio.Protocol):
    """One connection that asks again and again."""

    def __init__(self, number: int, until: int, took: list[int]) -> None:
        self.request = f"GET /user-{number} HTTP/1.1\r\nhost: bench\r\n\r\n".encode()
        self.until, self.took, self.begun, self.answer = until, took, 0, b""
        self.transport: asyncio.Transport | None = None
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def _ask(self) -> None:
        assert self.transport is not None
        self.answer, self.begun = b"", time.perf_counter_ns()
        self.transport.write(self.request)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter_ns()
        self.answer += data
        if not self.answer.endswith(b"hello\n"):
            return  # there is more to come
        if not self.answer.startswith(b"HTTP/1.1 200"):
            self._end(RuntimeError(f"answered {self.answer[:60]!r}"))
            return
        self.took.append(now - self.begun)
        if now < self.until:
            self._ask()
        else:
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or RuntimeError("the server closed the connection"))

    def _end(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)
        if self.transport is not None:
            self.transport.close()


async def _load(socket: str, seconds: float) -> tuple[float, list[int]]:
    """Requests a second, and what each took, sorted, in ns."""
    loop, took = asyncio.get_running_loop(), []  # type: tuple[asyncio.AbstractEventLoop, list[int]]
    start = time.perf_counter_ns()
    until = start + int(seconds * 1e9)
    clients = []
    for i in range(CONNECTIONS):

        def made(number: int = i) -> _Client:
            return _Client(number, until, took)

        clients.append((await loop.create_unix_connection(made, socket))[1])
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), PATIENCE)
    return len(took) * 1e9 / (time.perf_counter_ns() - start), sorted(took)


def _serve(place: peers.Place, limiter: str, socket: str, redis: str) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "BENCH_LIMITER": limiter,
        "BENCH_REDIS": redis,
        "FAST_LITELLM_SHM_NAME": place.segment_name,
    }
    command = ["uvicorn", "bench.asgi_app:app", "--uds", socket, "--workers", str(WORKERS)]
    return subprocess.Popen(
        [sys.executable, "-m", *command, "--no-access-log", "--log-level", "warning"],
        env=environment,
    )


def _answers(socket: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until it does."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            asyncio.run(_load(socket, 0.2))
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("uvicorn did not start") from None
            time.sleep(0.1)


def run(settings: Settings) -> Result:
    """Measure; nothing where uvicorn is not installed."""
    result = asked(__doc__)
    contenders = {"no limiter": REFERENCE, "ours": OURS}
    try:
        peers.need("uvicorn")
    except peers.MissingError as error:
        result.missing["uvicorn"] = str(error)
        return result
    rounds, seconds = settings.pick((max(2, settings.rounds // 5), 1.0), (3, 0.3))
    with peers.Place() as place:
        redis = ""
        try:
            peers.need("limits.aio"), peers.need("redis")
            redis = place.redis()
            contenders["limits, Redis"] = "limits"
        except peers.MissingError as error:
            result.missing["limits, Redis"] = str(error)
        servers: dict[str, subprocess.Popen[bytes]] = {}
        sockets = {name: place.path() for name in contenders}
        kinds = {"no limiter": "none", "ours": "ours", "limits, Redis": "redis"}
        rates: dict[str, list[float]] = {name: [] for name in contenders}
        tails: dict[str, list[float]] = {name: [] for name in contenders}
        middles: dict[str, list[float]] = {name: [] for name in contenders}
        try:
            for name, socket in sockets.items():
                servers[name] = _serve(place, kinds[name], socket, redis)
            for name, socket in sockets.items():
                _answers(socket, servers[name])
            rng = random.Random(15)
            for _ in range(rounds):
                for name in rng.sample(list(contenders), len(contenders)):
                    rate, took = asyncio.run(_load(sockets[name], seconds))
                    rates[name].append(rate)
                    middles[name].append(took[len(took) // 2] / 1e6)
                    tails[name].append(took[len(took) * 99 // 100] / 1e6)
        finally:
            for server in servers.values():
                server.terminate()
            for server in servers.values():
                try:
                    server.wait(20)
                except subprocess.TimeoutExpired:
                    server.kill()
                    server.wait()
    for group, unit, found in (
        ("throughput", "requests/s", rates),
        ("p50", "ms", middles),
        ("p99", "ms", tails),
    ):
        result.rows += [
            Row(name, unit, Values(values), contenders[name], group)
            for name, values in found.items()
        ]
    throughput = [row for row in result.rows if row.group == "throughput"]
    result.ratios = [
        ratio(throughput, "ours", other, None)
        for other in ("no limiter", "limits, Redis")
        if other in contenders
    ]
    result.plots = [
        Plot(
            "end_to_end_throughput",
            "bars",
            "An ASGI application of 2 workers behind a limiter",
            ("throughput",),
            "requests a second",
            log_value=False,
            better="more is better",
        ),
        Plot(
            "end_to_end_latency",
            "bars",
            "An ASGI application of 2 workers behind a limiter",
            ("p50", "p99"),
            "milliseconds a request",
            log_value=False,
        ),
    ]
    return result
