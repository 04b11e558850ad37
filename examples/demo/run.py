"""make demo: one limit, four gunicorn workers.

Sends several hundred requests over fresh connections, shows what each worker admitted, looks into
the segment with ``fast-shm inspect``, and does it once more with a limiter that is not shared.
Exits with status 1 where the workers together admitted another number than the limit.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from rich.console import Console
from rich.table import Table
from server import WORKERS, ServerError, ask, gunicorn

from fast_litellm_shm import Segment, SegmentNotFoundError

LIMIT = 100
REQUESTS = 600
CONNECTIONS = 16  # at a time

console = Console(highlight=False)


def send(port: int) -> tuple[Counter[int], Counter[int]]:
    """All requests; what each worker admitted, and denied."""
    admitted, denied = Counter[int](), Counter[int]()
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for pid, allowed in pool.map(lambda _: ask(port, "/"), range(REQUESTS)):
            (admitted if allowed else denied)[pid] += 1
    return admitted, denied


def show(admitted: Counter[int], denied: Counter[int]) -> None:
    table = Table("worker", "admitted", "denied", show_footer=True)
    table.columns[0].footer = "together"
    for column, counts in zip(table.columns[1:], (admitted, denied), strict=True):
        column.justify, column.footer = "right", str(counts.total())
    for pid in sorted(admitted.keys() | denied.keys()):
        table.add_row(f"pid {pid}", str(admitted[pid]), str(denied[pid]))
    console.print(table)


def shared(segment: str) -> bool:
    """The run that counts; True where the workers admitted exactly the limit."""
    console.print(
        f"[bold]{WORKERS} gunicorn workers, one limit of {LIMIT} an hour[/], "
        f"{REQUESTS} requests over fresh connections\n",
        soft_wrap=True,
    )
    with gunicorn("app:application", LIMIT, segment) as port:
        admitted, denied = send(port)
        show(admitted, denied)
        exact = admitted.total() == LIMIT
        verdict = "[green]exactly the limit[/]" if exact else "[red]NOT the limit[/]"
        console.print(f"admitted {admitted.total()}, the limit is {LIMIT}: {verdict}\n")
        console.print(f"[bold]$ fast-shm inspect --name {segment}[/]")
        subprocess.run(
            [sys.executable, "-m", "fast_litellm_shm.cli", "inspect", "--name", segment], check=True
        )
    return exact


def unshared(segment: str) -> None:
    """The same with a counter in each worker's own memory."""
    with gunicorn("unshared:application", LIMIT, segment) as port:
        total = send(port)[0].total()
    console.print(
        f"\nThe same app, each worker counting for itself: [bold]{total} admitted[/], "
        f"{total / LIMIT:.1f} times the limit",
        soft_wrap=True,
    )


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, as Ctrl-C does
    segment = f"demo-{os.getpid()}"
    try:
        exact = shared(segment)
        unshared(segment)
    except (ServerError, subprocess.CalledProcessError) as problem:
        console.print(f"[red]the demo failed:[/] {problem}")
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; the server is stopped and the segment removed")
        return 130
    finally:
        with contextlib.suppress(SegmentNotFoundError):  # it failed before any worker made it
            Segment(segment, create=False).remove()
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
