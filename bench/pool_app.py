"""The application of pool_waiting.py: holds a pooled connection for 1 ms, and answers “hello”. A
time-out is a 504, which the client takes for a fault."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from fast_litellm_shm import PermitTimeoutError, SimpleConnectionPool

ENDPOINT = "https://api.example.com"
HELD = 0.001  # seconds
PATIENCE = 20.0

_opened = os.open(os.environ["BENCH_OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_most = int(os.environ["BENCH_MOST"])
_pool = SimpleConnectionPool(f"bench {_most}", max_per_endpoint=_most)
_pool.bind(lambda _: os.write(_opened, b"."))  # the file's size says how many were opened


def app(_: dict[str, Any], start: Callable[[str, list[tuple[str, str]]], Any]) -> Iterable[bytes]:
    """WSGI."""
    status = "200 OK"
    try:
        with _pool.connection(ENDPOINT, timeout=PATIENCE):
            time.sleep(HELD)
    except PermitTimeoutError:
        status = "504 Gateway Timeout"
    start(status, [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]
