"""The application of ``make soak``: each class of the library, behind WSGI (``app``) and ASGI
(``asgi``). A request with X-Kill kills its worker in the middle of its work."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from support.holders import Holders

from fast_litellm_shm import (
    ConcurrencyLimiter,
    PermitTimeoutError,
    Quota,
    RateLimiter,
    RateLimitExceeded,
    SimpleConnectionPool,
    TokenBucket,
    limited,
)
from fast_litellm_shm.integrations import asgi as of_asgi
from fast_litellm_shm.integrations import wsgi as of_wsgi
from soak import ENDPOINT, KEY, MOST, PATHS, PATIENCE

WORK = 0.002  # seconds

Header = tuple[str, str]
Sent = MutableMapping[str, Any]
Send = Callable[[Sent], Awaitable[None]]
Receive = Callable[[], Awaitable[Sent]]


class Connection:
    """Of the pool; one caller at a time may use it."""

    def __init__(self) -> None:
        self._descriptor = os.open("/dev/null", os.O_RDONLY)
        self._used = threading.Lock()

    def __enter__(self) -> None:
        if not self._used.acquire(blocking=False):
            raise RuntimeError("two callers have one connection")

    def __exit__(self, *exc: object) -> None:
        self._used.release()

    def close(self) -> None:
        os.close(self._descriptor)


rate = RateLimiter(TokenBucket(400, per=1, burst=20), name="soak rate")
calls = RateLimiter(TokenBucket(400, per=1, burst=20), name="soak limited")
permits = ConcurrencyLimiter(MOST["/permits"], name="soak permits")
quota = Quota(rpm=10**6, tpm=10**9, max_parallel=MOST["/quota"], name="soak quota")
pool = SimpleConnectionPool("soak", max_per_endpoint=MOST["/pool"])
pool.bind(lambda _: Connection(), Connection.close)


# What is held at once, by the place of the path in PATHS: where somebody wants to know.
holders = Holders(os.environ["SOAK_HOLDERS"]) if "SOAK_HOLDERS" in os.environ else None


def _holding(path: str) -> AbstractContextManager[None]:
    return nullcontext() if holders is None else holders.holding(PATHS.index(path))


def _dies(kill: bool) -> None:
    if kill:
        os.kill(os.getpid(), signal.SIGKILL)


def work(kill: bool) -> int:
    """Sleeps; a killed worker ends in the middle of it."""
    time.sleep(WORK / 2)
    _dies(kill)
    time.sleep(WORK / 2)
    return 200


async def work_async(kill: bool) -> int:
    """work() for asyncio."""
    await asyncio.sleep(WORK / 2)
    _dies(kill)
    await asyncio.sleep(WORK / 2)
    return 200


limited_work = limited(calls, key=KEY, wait=PATIENCE)(work)
limited_work_async = limited(calls, key=KEY, wait=PATIENCE)(work_async)


def answer(path: str, kill: bool) -> int:
    """The status of a request."""
    try:
        if path == "/rate":
            return work(kill) if rate.wait(KEY, timeout=PATIENCE) else 504
        if path == "/permits":
            with permits.slot(KEY, timeout=PATIENCE), _holding(path):
                return work(kill)
        if path == "/quota":
            with quota.wait(KEY, tokens=100, timeout=PATIENCE) as admission:
                if not admission:
                    return 504
                with _holding(path):
                    status = work(kill)
                admission.settle(50)
                return status
        if path == "/pool":
            taken = pool.connection(ENDPOINT, timeout=PATIENCE)
            with taken as connection, connection, _holding(path):
                return work(kill)
        if path == "/limited":
            return limited_work(kill)
        if path == "/flight":
            with _holding(path):
                return work(kill)
        return work(kill)
    except (PermitTimeoutError, RateLimitExceeded):
        return 504


async def answer_async(path: str, kill: bool) -> int:
    """answer() for asyncio."""
    try:
        if path == "/rate":
            admitted = await rate.wait_async(KEY, timeout=PATIENCE)
            return await work_async(kill) if admitted else 504
        if path == "/permits":
            async with permits.slot_async(KEY, timeout=PATIENCE):
                with _holding(path):
                    return await work_async(kill)
        if path == "/quota":
            async with await quota.wait_async(KEY, tokens=100, timeout=PATIENCE) as admission:
                if not admission:
                    return 504
                with _holding(path):
                    status = await work_async(kill)
                admission.settle(50)
                return status
        if path == "/pool":
            async with pool.connection_async(ENDPOINT, timeout=PATIENCE) as connection:
                with connection, _holding(path):
                    return await work_async(kill)
        if path == "/limited":
            return await limited_work_async(kill)
        if path == "/flight":
            with _holding(path):
                return await work_async(kill)
        return await work_async(kill)
    except (PermitTimeoutError, RateLimitExceeded):
        return 504


def everybody(_: object) -> str:
    """The key of the middleware's rules: no client has another."""
    return KEY


RULES: dict[str, Any] = {
    "in_flight": MOST["/flight"],
    "wait": PATIENCE,
    "key": everybody,
    "path": "/flight",
}


def _wsgi(environ: dict[str, Any], start: Callable[[str, list[Header]], Any]) -> Iterable[bytes]:
    status = answer(environ["PATH_INFO"], "HTTP_X_KILL" in environ)
    start(f"{status} Soak", [("Content-Type", "text/plain")])
    return [str(os.getpid()).encode()]


async def _asgi(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        return
    kill = any(name == b"x-kill" for name, _ in scope["headers"])
    status = await answer_async(scope["path"], kill)
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", b"text/plain")],
        }
    )
    await send({"type": "http.response.body", "body": str(os.getpid()).encode()})


app = of_wsgi.RateLimitMiddleware(_wsgi, name="soak", rules=[of_wsgi.Rule(**RULES)])
asgi = of_asgi.RateLimitMiddleware(_asgi, name="soak", rules=[of_asgi.Rule(**RULES)])
