"""A WSGI app guarded by one limiter; the worker's pid tells who admitted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

from fast_litellm_shm import RateLimiter, Window

limiter = RateLimiter(Window(int(os.environ["APP_LIMIT"]), 3600), name="app")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    allowed = limiter.acquire("everybody").allowed
    start_response(
        "200 OK" if allowed else "429 Too Many Requests", [("Content-Type", "text/plain")]
    )
    return [str(os.getpid()).encode()]
