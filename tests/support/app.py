"""A WSGI app guarded by one limiter; the worker's pid tells who admitted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Window

limiter = RateLimiter(Window(int(os.environ["APP_LIMIT"]), 3600), name="app")
slots = ConcurrencyLimiter(1, name="app slots")


def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    if environ["PATH_INFO"] == "/ready":
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]
    if environ["PATH_INFO"] == "/slot":
        with slots.slot("k"):
            time.sleep(0.002)
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]
    time.sleep(0.001)  # meanwhile others take what comes in: one worker cannot serve it all
    allowed = limiter.acquire("everybody").allowed
    start_response(
        "200 OK" if allowed else "429 Too Many Requests", [("Content-Type", "text/plain")]
    )
    return [str(os.getpid()).encode()]
