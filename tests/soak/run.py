"""``make soak``: one application with each class of the library. gunicorn runs it with gthread,
gevent and uvicorn workers at the same time, over one segment. Workers are replaced after 2,000
requests, and one request in 2,000 kills its worker. It prints what came of it. It exits with 1 if
anything is held, or any caller waits, when all has ended; or if a request failed."""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from support.names import remove, unique_name

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.cli import permits_and_pools
from soak import PATHS, PATIENCE

KINDS = {
    "gthread": ("soak.app:app", "--worker-class=gthread", "--threads=8"),
    "gevent": ("soak.app:app", "--worker-class=gevent"),
    "uvicorn": ("soak.app:asgi", "--worker-class=soak.workers.Uvicorn"),
}
WORKERS, CLIENTS = 2, 24  # of each kind
REQUESTS = 2000  # of a worker, after which it is replaced; and for one that kills its worker
LEAVES = 50  # one client in so many does not wait for its answer
SAMPLES = 20  # lines of the report
BACK_WITHIN = 3.0  # seconds: 1 is promised, and this is a busy machine
_HEALTHY = {"answered", "busy", "left", "connection lost"}


@dataclass
class Worker:
    """What clients saw of a process."""

    kind: str
    first: float
    last: float
    answers: int = 0
    longest_gap: float = 0.0

    def answered(self, now: float) -> None:
        self.longest_gap = max(self.longest_gap, now - self.last)
        self.last = now
        self.answers += 1

    @property
    def rate(self) -> float:
        return self.answers / max(self.last - self.first, 0.001)


@dataclass
class Tally:
    """Of all clients."""

    kinds: dict[str, Counter[str]] = field(default_factory=lambda: {k: Counter() for k in KINDS})
    paths: Counter[tuple[str, str]] = field(default_factory=Counter)
    workers: dict[int, Worker] = field(default_factory=dict)
    slowest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PATHS, 0.0))
    kills: int = 0
    sent: int = 0

    def count(self, kind: str, path: str, what: str) -> None:
        self.kinds[kind][what] += 1
        self.paths[path, what] += 1

    @property
    def answered(self) -> int:
        return sum(counts["answered"] for counts in self.kinds.values())


def _named(status: int) -> str:
    return {200: "answered", 429: "busy", 503: "busy", 504: "timed out"}.get(status, str(status))


async def _request(tally: Tally, kind: str, socket: str, paths: list[str]) -> None:
    path = random.choice(paths)
    tally.sent += 1
    kills = tally.sent % REQUESTS == 0
    leaves = random.randrange(LEAVES) == 0
    begun, pid, what = time.monotonic(), 0, "connection lost"
    try:
        reader, writer = await asyncio.open_unix_connection(socket)
    except OSError:
        tally.count(kind, path, "not connected")
        await asyncio.sleep(0.1)
        return
    try:
        kill = "X-Kill: 1\r\n" if kills else ""
        writer.write(
            f"GET {path} HTTP/1.1\r\nHost: soak\r\n{kill}Connection: close\r\n\r\n".encode()
        )
        if leaves and not kills:
            await asyncio.sleep(random.random() * 0.02)
            what = "left"
            return
        tally.kills += kills
        said = await asyncio.wait_for(reader.read(), PATIENCE * 2)
        head, _, body = said.partition(b"\r\n\r\n")
        if head:
            what, pid = _named(int(head.split()[1])), int(body or 0) if body.isdigit() else 0
    except asyncio.TimeoutError:
        what = "no answer"
    except OSError:
        pass
    finally:
        writer.close()
        now = time.monotonic()
        tally.count(kind, path, what)
        if pid:
            tally.workers.setdefault(pid, Worker(kind, begun, now)).answered(now)
        tally.slowest[path] = max(tally.slowest[path], now - begun)
    if what == "busy":
        await asyncio.sleep(0.005)


async def _client(tally: Tally, server: Server, paths: list[str], until: float) -> None:
    while time.monotonic() < until:
        await _request(tally, server.kind, server.socket, paths)


class Server:
    """gunicorn with workers of one kind."""

    def __init__(self, kind: str, segment: str, folder: Path) -> None:
        self.kind, self.socket = kind, str(folder / kind)
        self._log = folder / f"{kind}.log"
        tests = str(Path(__file__).parents[1])
        path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
        options = (
            f"--workers={WORKERS}",
            f"--max-requests={REQUESTS}",
            f"--max-requests-jitter={REQUESTS // 10}",
            f"--bind=unix:{self.socket}",
            "--timeout=60",
            "--log-level=warning",
        )
        with open(self._log, "wb") as log:
            self.master = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *KINDS[kind], *options],
                env=os.environ | {"FAST_LITELLM_SHM_NAME": segment, "PYTHONPATH": path},
                stderr=log,
                stdout=log,
            )

    async def ready(self) -> None:
        """Until it accepts connections."""
        deadline = time.monotonic() + PATIENCE
        while True:
            with suppress(OSError):
                _, writer = await asyncio.open_unix_connection(self.socket)
                writer.close()
                return
            if time.monotonic() > deadline or self.master.poll() is not None:
                raise SystemExit(f"gunicorn ({self.kind}) has not started:\n{self.log()}")
            await asyncio.sleep(0.05)

    def workers(self) -> list[psutil.Process]:
        """Its processes."""
        with suppress(psutil.Error):
            return psutil.Process(self.master.pid).children()
        return []

    def stop(self) -> None:
        """Ends it, and its workers."""
        self.master.send_signal(signal.SIGTERM)
        try:
            self.master.wait(PATIENCE * 2)
        except subprocess.TimeoutExpired:
            print(f"{self.kind}: gunicorn did not end within {PATIENCE * 2:.0f} s")
            for worker in self.workers():
                with suppress(psutil.Error):
                    worker.kill()
            self.master.kill()
            self.master.wait()

    def log(self) -> str:
        """What it wrote."""
        return self._log.read_text(errors="replace")


def _used(server: Server) -> tuple[float, int]:
    """The memory (MiB) and descriptors of the worker that has most of each."""
    memory, descriptors = 0.0, 0
    for worker in server.workers():
        with suppress(psutil.Error):
            memory = max(memory, worker.memory_info().rss / 2**20)
            descriptors = max(descriptors, worker.num_fds())
    return memory, descriptors


def _left(segment: Segment, idle_too: bool) -> Iterator[str]:
    """What is held, and who waits. Idle connections are, while their workers live."""
    look = Inspection(segment)
    permits, pools = permits_and_pools.held(look, None, None)
    for row in permits:
        if row["in_flight"]:
            yield f"{row['limiter']}, {row['key']}: {row['in_flight']} held by {row['pids']}"
    for row in pools:
        if used := row["active"] + (row["idle"] if idle_too else 0):
            yield f"pool {row['pool']}, {row['endpoint']}: {used} held by {row['pids']}"
    for row in look.waiting():
        if row["callers"]:
            yield (
                f"{row['limiter']}, {row['key']}: {row['callers']} wait, the first for "
                f"{row['longest_seconds']:.1f} s, in {row['pids']}"
            )


def _nothing_is_left(segment: Segment, when: str, idle_too: bool) -> bool:
    deadline = time.monotonic() + BACK_WITHIN
    while left := list(_left(segment, idle_too)):
        if time.monotonic() > deadline:
            print(f"{when}:", *left, sep="\n  ")
            return False
        time.sleep(0.1)
    print(f"{when}: nothing is held, and nobody waits")
    return True


async def _report(tally: Tally, servers: list[Server], seconds: float) -> None:
    heads = [f"{server.kind}: MiB  files" for server in servers]
    print(f"{'s':>6} {'requests/s':>10} " + " ".join(f"{head:>20}" for head in heads), flush=True)
    begun, before = time.monotonic(), 0
    every = seconds / SAMPLES
    for number in range(1, SAMPLES + 1):
        await asyncio.sleep(max(begun + number * every - time.monotonic(), 0))
        used = [_used(server) for server in servers]
        cells = " ".join(f"{memory:>13.1f} {files:>6}" for memory, files in used)
        print(
            f"{time.monotonic() - begun:>6.0f} {(tally.answered - before) / every:>10.0f} {cells}",
            flush=True,
        )
        before = tally.answered


async def _load(servers: list[Server], paths: list[str], seconds: float) -> Tally:
    tally, until = Tally(), time.monotonic() + seconds
    clients = [_client(tally, server, paths, until) for server in servers for _ in range(CLIENTS)]
    await asyncio.gather(_report(tally, servers, seconds), *clients)
    return tally


def _print(tally: Tally, seconds: float) -> None:
    print(f"\n{tally.answered / seconds:.0f} requests a second; {tally.kills} workers killed")
    for kind, counts in tally.kinds.items():
        print(f"  {kind:9}", ", ".join(f"{n} {what}" for what, n in counts.most_common()))
    for path in PATHS:
        if not tally.slowest[path]:
            continue
        found = {what: n for (at, what), n in sorted(tally.paths.items()) if at == path}
        said = ", ".join(f"{n} {what}" for what, n in found.items())
        print(f"  {path:9} {said}; the slowest took {tally.slowest[path]:.2f} s")
    for kind in KINDS:
        of_kind = [w for w in tally.workers.values() if w.kind == kind and w.answers > 1]
        if of_kind:
            rates = sorted(worker.rate for worker in of_kind)
            gap = max(worker.longest_gap for worker in of_kind)
            print(
                f"  {kind}: {len(rates)} workers; requests a second of the poorest "
                f"{rates[0]:.0f}, the middle one {rates[len(rates) // 2]:.0f}, the best "
                f"{rates[-1]:.0f}; the longest pause of one {gap:.2f} s"
            )


def _failures(tally: Tally, servers: list[Server]) -> list[str]:
    out = []
    for kind, counts in ((server.kind, tally.kinds[server.kind]) for server in servers):
        odd = {what: n for what, n in counts.items() if what not in _HEALTHY}
        if odd:
            out.append(f"{kind}: {odd}")
        if not counts["answered"]:
            out.append(f"{kind}: no request was answered")
    for server in servers:
        if "Traceback" in server.log():
            out.append(f"{server.kind}: exceptions in its log:\n{server.log()[-4000:]}")
    return out


async def _soak(segment: Segment, folder: Path, args: Any) -> bool:
    servers = [Server(kind, segment.name, folder) for kind in args.kind or KINDS]
    try:
        await asyncio.gather(*(server.ready() for server in servers))
        tally = await _load(servers, args.path or list(PATHS), args.seconds)
        _print(tally, args.seconds)
        good = _nothing_is_left(segment, "the clients have gone", False)
    finally:
        for server in servers:
            await asyncio.to_thread(server.stop)
    good &= _nothing_is_left(segment, "the workers have ended", True)
    for failure in _failures(tally, servers):
        print("FAILED", failure)
        good = False
    return good


def main() -> int:
    """Soak, and say how it went."""
    parser = argparse.ArgumentParser(prog="python -m soak.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--kind", action="append", choices=KINDS, help="default: all three")
    parser.add_argument("--path", action="append", choices=PATHS, help="default: all")
    args: Any = parser.parse_args()
    name = unique_name("soak")
    folder = Path(f"/tmp/{name}")
    folder.mkdir()
    os.environ["FAST_LITELLM_SHM_NAME"] = name
    segment = Segment(name)
    try:
        good = asyncio.run(_soak(segment, folder, args))
    finally:
        remove(name)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return not good


if __name__ == "__main__":
    sys.exit(main())
