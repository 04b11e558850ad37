"""The upstream of adaptive.py: an HTTP server with a limit that its clients do not know, and that
halves. A process of its own, so that it counts undisturbed.

refuses: serves so many requests at a time, and answers any other 429. rate: begins so many a second
(a token bucket with room for a tenth of a second), and answers any other 429. queues: serves so
many at a time; others wait in line, up to four times as many, and any other is answered 503.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

SERVED = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
REFUSED = b"HTTP/1.1 %d \r\ncontent-length: 0\r\n\r\n"


@dataclass
class Counts:
    """Of one second."""

    served: int = 0
    refused: int = 0
    busy: float = 0.0  # seconds of serving
    waited: float = 0.0  # seconds in line


@dataclass
class Upstream:
    kind: str
    limit: int  # requests at a time; of a rate: what that many would serve
    seconds: float  # that a request takes
    begun: float = field(default_factory=time.monotonic)
    counts: list[Counts] = field(default_factory=list)
    serving: int = 0
    line: deque[asyncio.Future[None]] = field(default_factory=deque)
    tokens: float = 0.0
    filled: float = field(default_factory=time.monotonic)

    def now(self) -> Counts:
        second = int(time.monotonic() - self.begun)
        while len(self.counts) <= second:
            self.counts.append(Counts())
        return self.counts[second]

    def _has_token(self) -> bool:
        now, rate = time.monotonic(), self.limit / self.seconds
        self.tokens = min(self.tokens + (now - self.filled) * rate, rate)
        self.filled = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True

    async def answer(self) -> bytes:
        if self.kind == "rate":
            if not self._has_token():
                self.now().refused += 1
                return REFUSED % 429
        elif self.kind == "refuses":
            if self.serving >= self.limit:
                self.now().refused += 1
                return REFUSED % 429
        elif self.serving >= self.limit:
            if len(self.line) >= 4 * self.limit:
                self.now().refused += 1
                return REFUSED % 503
            turn, came = asyncio.get_running_loop().create_future(), time.monotonic()
            self.line.append(turn)
            await turn
            self.now().waited += time.monotonic() - came
        self.serving += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.serving -= 1
            while self.line and self.serving < self.limit:
                turn = self.line.popleft()
                if not turn.done():
                    turn.set_result(None)
                    break  # it counts itself when it runs: one at a time
        counts = self.now()
        counts.served += 1
        counts.busy += self.seconds
        return SERVED


class _Server(asyncio.Protocol):
    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:  # a request is one segment: it has no body
        task = asyncio.ensure_future(self.upstream.answer())
        task.add_done_callback(self._send)

    def _send(self, task: asyncio.Task[bytes]) -> None:
        if not task.cancelled() and not self.transport.is_closing():
            self.transport.write(task.result())


async def _serve(path: str, upstream: Upstream, change: float, end: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(lambda: _Server(upstream), path)
    async with server:
        await asyncio.sleep(change)
        upstream.limit //= 2
        await asyncio.sleep(end - change)


def serve(
    out: Connection, path: str, kind: str, limit: int, took: float, when: float, end: float
) -> None:
    """Serve until the end, halve the limit at `when`; then send the counts of each second."""
    upstream = Upstream(kind, limit, took)
    asyncio.run(_serve(path, upstream, when, end))
    out.send([(each.served, each.refused, each.busy, each.waited) for each in upstream.counts])
