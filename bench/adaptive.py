"""Do four workers find the limit of an upstream that they do not know, and that halves?

An HTTP server serves 64 requests of 250 ms at a time, and after a while 32. It refuses what comes
beyond (429), or it begins as many a second as that makes and refuses the others, or it lets 4 times
as many wait in line. Four processes with 32 asyncio tasks each send requests all the time, over
connections of their own, through one AdaptiveConcurrency with initial=20. Counted by the server:
how much of its limit was used, and which part of the requests it refused, in the 10 s after the
change and from then on. Settled: seconds after the change from which on each 5 s have at least 90 %
used and 2 % refused at most. For comparison: each worker alone, with a limit of its own.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import pathlib
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from bench.adaptive_upstream import serve
from bench.result import OURS, REFERENCE, Ratio, Result, Row, Settings, Values, asked
from fast_litellm_shm import AdaptiveConcurrency, PermitTimeoutError, Segment

LIMIT, TOOK = 64, 0.25
WORKERS, TASKS = 4, 32
SETTLED = 10  # s after the change
FULL, QUICK = (20, 50), (12, 30)  # s: the change, the end
REQUEST = b"GET / HTTP/1.1\r\nhost: bench\r\n\r\n"
CASES = (("refuses", "aimd"), ("rate", "aimd"), ("queues", "gradient"), ("queues", "aimd"))
PATIENCE, CAPACITY = 30.0, 5000

Seconds = Sequence[tuple[int, int, float, float]]


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self.answer: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_result(int(data[9:12]))

    async def get(self) -> int:
        self.answer = asyncio.get_running_loop().create_future()
        self.transport.write(REQUEST)
        return await asyncio.wait_for(self.answer, PATIENCE)


async def _load(path: str, limit: AdaptiveConcurrency, end: float) -> None:
    async def task() -> None:
        _, connection = await asyncio.get_running_loop().create_unix_connection(_Connection, path)
        while (left := end - time.monotonic()) > 0:
            try:
                async with limit.slot_async("upstream", timeout=left) as call:
                    if await connection.get() != 200:
                        call.throttled()
            except PermitTimeoutError:
                break
        connection.transport.close()

    await asyncio.gather(*(task() for _ in range(TASKS)))


def _worker(segment: str, path: str, algorithm: Any, end: float) -> None:
    limit = AdaptiveConcurrency(
        name="bench",
        initial=20,
        max=200,
        algorithm=algorithm,
        segment=Segment(segment, capacity=CAPACITY),
    )
    asyncio.run(_load(path, limit, end))


def measure(kind: str, algorithm: str, change: float, end: float, shared: bool = True) -> Seconds:
    """What the server counted in each second."""
    context = multiprocessing.get_context("spawn")
    names = [
        f"bench-adaptive-{time.monotonic_ns()}-{i}" for i in range(WORKERS if not shared else 1)
    ]
    segments = [Segment(name, capacity=CAPACITY) for name in names]
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "upstream")
        mine: Connection
        mine, theirs = context.Pipe(duplex=False)
        server = context.Process(target=serve, args=(theirs, path, kind, LIMIT, TOOK, change, end))
        server.start()
        deadline = time.monotonic() + PATIENCE
        while not pathlib.Path(path).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        stop = time.monotonic() + end - 0.5
        workers = [
            context.Process(target=_worker, args=(names[i % len(names)], path, algorithm, stop))
            for i in range(WORKERS)
        ]
        try:
            for worker in workers:
                worker.start()
            if not mine.poll(end + PATIENCE):
                raise RuntimeError("the server sent no counts")
            counts: Seconds = mine.recv()
        finally:
            for process in (*workers, server):
                process.join(5)
                process.kill()
            for segment in segments:
                segment.remove()
        return counts


def use(seconds: Seconds, limit: int) -> float:
    """The part of the limit that was used, in %."""
    return 100 * sum(each[2] for each in seconds) / (limit * len(seconds)) if seconds else 0.0


def refused(seconds: Seconds) -> float:
    """The part of the requests that was refused, in %."""
    all_ = sum(each[0] + each[1] for each in seconds)
    return 100 * sum(each[1] for each in seconds) / all_ if all_ else 0.0


def settled(seconds: Seconds, limit: int, width: int = 5) -> float:
    """From which of these seconds on each `width` are good; inf: none."""
    good = [
        use(part, limit) >= 90 and refused(part) <= 2
        for part in (seconds[i : i + width] for i in range(len(seconds) - width + 1))
    ]
    bad = [i for i, each in enumerate(good) if not each]
    last = bad[-1] + 1 if bad else 0
    return float("inf") if last == len(good) else float(last)


def run(settings: Settings) -> Result:
    """Once in each pass: what it finds are means over seconds."""
    result = asked(__doc__)
    change, end = settings.pick(FULL, QUICK)
    for kind, algorithm in CASES:
        for shared in (True, False):
            if not shared and (kind, algorithm) != CASES[0]:
                continue
            counts = measure(kind, algorithm, change, end, shared)
            after, late = counts[change : change + SETTLED], counts[change + SETTLED : end - 1]
            before = counts[change - SETTLED : change]
            name = f"{algorithm}, upstream {kind}" + ("" if shared else ", each worker alone")
            who = OURS if shared else REFERENCE
            served = sum(each[0] for each in late) or 1
            notes: dict[str, str | float] = {
                "used before the change, %": round(use(before, LIMIT), 1),
                "refused before the change, %": round(refused(before), 2),
                "settled after, s": settled(counts[change : end - 1], LIMIT // 2),
                "waited in line, ms": round(1e3 * sum(each[3] for each in late) / served, 1),
            }
            used = Values([use(late, LIMIT // 2)])
            parts = Values([refused(late)]), Values([refused(after)])
            result.rows += [
                Row(f"{name}: used", "%", used, who, "used", notes=notes),
                Row(f"{name}: refused", "%", parts[0], who, "refused"),
                Row(f"{name}: refused in the first 10 s", "%", parts[1], who, "refused"),
            ]
            if shared:
                result.ratios += [
                    Ratio(f"{name}: used, from 10 s on", used, 90, unit="%"),
                    Ratio(f"{name}: refused, from 10 s on", parts[0], 2, at_least=False, unit="%"),
                ]
    return result
