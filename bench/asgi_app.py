"""The application of end_to_end.py: answers “hello”, behind the limiter that BENCH_LIMITER names
(none, ours, redis). A limiter that says no answers 429, which the client takes for a fault."""

from __future__ import annotations

import importlib
import os
from collections.abc import Awaitable, Callable
from typing import Any

N, PER = 10**9, 1  # a limit that nobody meets

_Allowed = Callable[[str], Awaitable[bool]]


def _ours() -> Callable[[str], bool]:
    from fast_litellm_shm import Limit, RateLimiter

    return RateLimiter(Limit(N, per=PER), name="bench").is_allowed


def _redis() -> _Allowed:
    """limits over Redis, its asyncio side, a round trip for each request."""
    limits = importlib.import_module("limits")
    storage = importlib.import_module("limits.aio.storage").RedisStorage(
        f"async+redis+unix://{os.environ['BENCH_REDIS']}", implementation="redispy"
    )
    strategies = importlib.import_module("limits.aio.strategies")
    hit, item = strategies.FixedWindowRateLimiter(storage).hit, limits.RateLimitItemPerSecond(N)

    async def allowed(key: str) -> bool:
        return bool(await hit(item, key))

    return allowed


_which = os.environ["BENCH_LIMITER"]
_sync = _ours() if _which == "ours" else None
_async = _redis() if _which == "redis" else None


async def app(scope: Any, receive: Any, send: Any) -> None:
    """ASGI."""
    if scope["type"] != "http":
        return
    key = scope["path"]
    allowed = True
    if _sync is not None:
        allowed = _sync(key)
    elif _async is not None:
        allowed = await _async(key)
    status = 200 if allowed else 429
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"6")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello\n"})
