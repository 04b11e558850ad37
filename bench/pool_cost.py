"""What do a pool's get and return cost together, and a permit's acquire and release?

fast-litellm's pool hands the same id out twice and ignores its limit while connections are out;
ours counts over all processes. All in one process, interleaved.
Plain Python: a lock and two dicts, private to the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Result, Row, Settings, asked, ratio
from bench.timing import Loop, interleaved
from fast_litellm_shm import ConcurrencyLimiter, SimpleConnectionPool

ENDPOINT = "https://api.example.com"


class PlainPool:
    """What one would write without a library: a lock, idle ids by endpoint, and a maximum."""

    def __init__(self, most: int = 10) -> None:
        self._lock = threading.Lock()
        self._most = most
        self._idle: dict[str, list[str]] = {}
        self._out: dict[str, str] = {}
        self._made = 0

    def get_connection(self, endpoint: str) -> str | None:
        """An id; None where all are out."""
        with self._lock:
            idle = self._idle.setdefault(endpoint, [])
            if idle:
                found = idle.pop()
            elif self._made < self._most:
                self._made += 1
                found = f"{endpoint}#{self._made}"
            else:
                return None
            self._out[found] = endpoint
            return found

    def return_connection(self, connection: str | None) -> bool:
        """Whether it was out."""
        with self._lock:
            endpoint = self._out.pop(connection, None) if connection else None
            if endpoint is None or connection is None:
                return False
            self._idle[endpoint].append(connection)
            return True


def _pairs(get: Callable[[str], Any], give_back: Callable[[Any], Any]) -> Loop:
    def loop(calls: int) -> None:
        for _ in range(calls):
            give_back(get(ENDPOINT))

    return loop


def _permits(acquire: Callable[[str], Any]) -> Loop:
    def loop(calls: int) -> None:
        for _ in range(calls):
            acquire(ENDPOINT).release()

    return loop


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    with peers.Place() as place:
        segment = place.segment()
        pool = SimpleConnectionPool(segment=segment)
        limiter = ConcurrencyLimiter(10, name="bench", segment=segment)
        plain = PlainPool()
        loops = {
            "ours pool get + return": _pairs(pool.get_connection, pool.return_connection),
            "ours permit acquire + release": _permits(limiter.acquire),
            "plain Python pool get + return": _pairs(plain.get_connection, plain.return_connection),
        }
        try:
            peer = peers.need("fast_litellm").SimpleConnectionPool()
            loops["fast-litellm pool get + return"] = _pairs(
                peer.get_connection, peer.return_connection
            )
        except peers.MissingError as error:
            result.missing["fast-litellm"] = str(error)
        for name, found in interleaved(loops, settings).items():
            first = name.split()[0]
            who = {"ours": OURS, "plain": REFERENCE}.get(first, first)
            result.rows.append(Row(name, "ns", found, who, "pool"))
        pool.close()
    result.ratios.append(
        ratio(
            result.rows,
            "fast-litellm pool get + return",
            "ours pool get + return",
            1.5,
            promise="pool get + return",
        )
    )
    result.plots.append(
        Plot(
            "pool_cost",
            "bars",
            "A connection got and returned, a permit acquired and released",
            ("pool",),
            "nanoseconds a pair of calls",
            log_value=False,
        )
    )
    return result
