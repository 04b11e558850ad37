"""Worker processes that make the calls that a test orders."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from support.children import PATIENCE

_SCRIPT = """
import json, sys
from fast_litellm_shm.tokens import counter as tokens
from fast_litellm_shm import AdvancedRouter, ConcurrencyLimiter, Limit, RateLimiter, Segment
from fast_litellm_shm import SimpleConnectionPool, Window

segment = Segment(sys.argv[1])
chat = RateLimiter(Window(10, 3600), name="chat", segment=segment)
wide = RateLimiter(Limit(1_000_000, 3_600_000), name="wide", segment=segment)
gpu = ConcurrencyLimiter(3, name="gpu", segment=segment)
pool = SimpleConnectionPool("web", segment=segment)
router = AdvancedRouter("least_busy", segment=segment)
memo = tokens.make_memo(segment, "test", len, "count_tokens")
held = []


def acquire(limiter, keys, times):
    of = {"chat": chat, "wide": wide}[limiter]
    return [sum(of.is_allowed(key) for _ in range(times)) for key in keys]


def hold(key):
    held.append(gpu.acquire(key))
    return bool(held[-1])


def connect(endpoint):
    held.append(pool.get_connection(endpoint))


def route(name):
    router.record(name, 12.0, True)


def count(text, times):
    return [memo(text) for _ in range(times)]


for line in sys.stdin:
    name, arguments = json.loads(line)
    print(json.dumps(globals()[name](*arguments)), flush=True)
"""


class Puppet:
    """One process, attached to a segment. Limiters: chat (a window of 10 an hour), wide (a million
    in 1,000 hours), gpu (3 permits); pool web; a router; a memo."""

    def __init__(self, segment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SCRIPT, segment],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self("acquire", "chat", [], 0)  # it is there

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Do it, and wait until it is done."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([name, arguments]) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def kill(self) -> None:
        """As the out-of-memory killer does."""
        self._process.kill()
        self._process.communicate()

    def end(self) -> None:
        """Let it end."""
        if self._process.poll() is None:
            self._process.communicate(timeout=PATIENCE)
