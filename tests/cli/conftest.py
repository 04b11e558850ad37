"""The real command in a real child, and workers that are alive while it looks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support.children import PATIENCE

Command = Callable[..., "subprocess.CompletedProcess[str]"]
COMMAND = [sys.executable, "-m", "fast_litellm_shm.cli"]

_WORKER = """
import sys
from fast_litellm_shm import Limit, RateLimiter, Segment, Window

chat = RateLimiter(Limit(10, per=3600), Window(500, per=3600), name="chat",
                   segment=Segment(sys.argv[1], capacity=1000))
for _ in range(6):
    chat.acquire("busy")
chat.acquire("user-" + sys.argv[2])
print("ready", flush=True)
sys.stdin.read()
"""


_HOLDER = """
import sys
from fast_litellm_shm import ConcurrencyLimiter, Quota, Segment, SimpleConnectionPool

segment = Segment(sys.argv[1], capacity=1000)
gpu = ConcurrencyLimiter(3, name="gpu", segment=segment)
quota = Quota(rpm=100, tpm=10_000, max_parallel=4, name="gpt", segment=segment)
pool = SimpleConnectionPool("web", max_per_endpoint=5, segment=segment)
held = [gpu.acquire("a"), quota.admit("team", tokens=10)]
pool.get_connection("https://one.example")
pool.return_connection(pool.get_connection("https://two.example"))
print("ready", flush=True)
for line in sys.stdin:
    print(" ".join(str(bool(each.release())) for each in held), flush=True)
"""


def environment(**more: str) -> dict[str, str]:
    """The test's own, without what would change how the command prints."""
    hidden = ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    return {k: v for k, v in os.environ.items() if k not in hidden} | more


@pytest.fixture
def fast_shm() -> Command:
    """Runs ``fast-shm ARGUMENTS``, not on a terminal."""

    def run(*arguments: str | bytes, **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("env", environment())
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [*COMMAND, *arguments],
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=PATIENCE,
            check=False,
            **options,
        )

    return run


def _started(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )


@contextmanager
def _ready(children: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        for child in children:
            assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        yield
    finally:
        for child in children:
            child.communicate(timeout=PATIENCE)  # closes its stdin, which ends it


@pytest.fixture
def holders(segment_name: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two processes, each of which holds one of 3 permits of the limiter "gpu" (key "a"), one of 4
    of the quota "gpt" (key "team"), and of the pool "web" an active connection to one.example and
    an idle one to two.example. A line to its stdin makes one release the first two, and say of
    each whether it was still held."""
    children = [_started(_HOLDER, segment_name) for _ in range(2)]
    with _ready(children):
        yield children


@pytest.fixture
def workers(segment_name: str) -> Iterator[list[int]]:
    """Three processes that share the limiter "chat" (10 at once): the key "busy" was asked for 18
    times, "user-0", "user-1" and "user-2" once each. Their pids; they live until the test ends."""
    children = [_started(_WORKER, segment_name, str(i)) for i in range(3)]
    with _ready(children):
        yield [child.pid for child in children]
