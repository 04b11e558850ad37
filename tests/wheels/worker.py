"""What an installed package is asked to do, by one process of several: each line of the input is a
call, and its answer is a line of the output. The segment is that of FAST_LITELLM_SHM_NAME."""

import sys
from typing import Any

from fast_litellm_shm import ConcurrencyLimiter, FixedWindow, RateLimiter, Segment

limit = int(sys.argv[1])
rates = RateLimiter(FixedWindow(limit, per=86400), name="rates")
permits = ConcurrencyLimiter(1, name="permits")
held: list[Any] = []


def admitted() -> int:
    """Of as many attempts as the whole limit."""
    return sum(rates.is_allowed("user-1") for _ in range(limit))


def acquire() -> bool:
    held.append(permits.acquire("k"))
    return bool(held[-1])


def wait() -> bool:
    """Sleeps until there is a permit."""
    print("waits", flush=True)
    held.append(permits.wait("k", timeout=60))
    return bool(held[-1])


def release() -> bool:
    held.pop().release()
    return True


def remove() -> None:
    Segment.default().remove()


print("ready", flush=True)
for line in sys.stdin:
    print(globals()[line.strip()](), flush=True)
