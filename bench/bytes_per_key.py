"""How much memory does a key cost?

Counted from outside the allocators: growth of anonymous memory (RSS without shared pages, so
native heaps are in it) of a child process that asks for so many keys, plus all shared memory: the
whole segment for ours, what Redis says it uses, the pages of LMDB's file. (tracemalloc does not
see native heaps.)
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from multiprocessing.connection import Connection

from bench import peers
from bench.result import Plot, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import SimpleRateLimiter

KEYS = 200_000  # what the default segment has room for
FEWER = {  # those that need kilobytes or 100 microseconds a key
    "pyrate-limiter, memory, token bucket": 20_000,
    "limits, Redis, fixed window": 20_000,
    "throttled-py, Redis, GCRA": 20_000,
}
TARGET = ("ours", "fast-litellm")  # one is divided by the other
PATIENCE = 300.0


def _anonymous() -> int:
    import psutil

    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)


def _redis_bytes(place: peers.Place) -> int:
    client = importlib.import_module("redis").Redis(unix_socket_path=place.redis())
    used = int(client.info("memory")["used_memory"])
    client.close()
    return used


def _measure(name: str, keys: int) -> float:
    """Bytes a key."""
    with peers.Place() as place:
        each = peers.contender(name)
        if name == "ours":
            call: peers.Call = SimpleRateLimiter(60, segment=place.segment()).is_allowed
        else:
            call = each.start(place, 60, 60.0)()
        call("warm-up")
        redis = "Redis" in name
        shared, before = _redis_bytes(place) if redis else 0, _anonymous()
        for i in range(keys):
            call(f"user_{i}")
        grown = _anonymous() - before
        if redis:
            shared = _redis_bytes(place) - shared
        elif name == "ours":
            stats = place.segment().stats()
            assert stats["used"] >= keys, f"only {stats['used']} keys are in the segment"
            shared = int(stats["size_bytes"])
        else:  # files in shared memory, by the pages that are there
            files = [os.path.join(place.folder, file) for file in os.listdir(place.folder)]
            shared = sum(os.stat(file).st_blocks * 512 for file in files)
        return (grown + shared) / keys


def _child(out: Connection, name: str, keys: int) -> None:
    try:
        out.send(_measure(name, keys))
    except peers.MissingError as error:
        out.send(str(error))


def run(settings: Settings) -> Result:
    """Measure, each contender in a fresh process."""
    result = asked(__doc__)
    context = multiprocessing.get_context("spawn")
    tries = settings.pick(settings.share(3), 1)
    for each in peers.contenders(keyed=True):
        keys = FEWER.get(each.name, KEYS)
        if settings.quick and each.name not in TARGET:
            keys //= 4
        found: list[float] = []
        for _ in range(tries):
            mine, theirs = context.Pipe(duplex=False)
            child = context.Process(target=_child, args=(theirs, each.name, keys), daemon=True)
            child.start()
            theirs.close()
            answer = mine.recv() if mine.poll(PATIENCE) else "did not end in time"
            child.join(10)
            if isinstance(answer, str):
                result.missing[each.name] = answer
                break
            found.append(answer)
        if found:
            notes: dict[str, str | float] = {"keys": f"{keys:,}"}
            result.rows.append(
                Row(each.name, "bytes", Values(found), each.who, "memory", notes=notes)
            )
    result.ratios.append(
        ratio(result.rows, "fast-litellm", "ours", 42.0, promise="bytes a key, `SimpleRateLimiter`")
    )
    result.plots.append(
        Plot("bytes_per_key", "bars", "Memory of one key", ("memory",), "bytes a key")
    )
    return result
