"""The guarded application: one limiter, made when the worker imports it, used for each request.

``GET /`` asks the limiter and answers 200 or 429. ``GET /ready`` does not ask it, so that the demo
can find out that all workers are up.
"""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any

from fast_litellm_shm import FixedWindow, RateLimiter

limiter = RateLimiter(FixedWindow(int(os.environ["DEMO_LIMIT"]), per=3600), name="demo")


def admit() -> bool:
    """The only line that differs between this and unshared.py."""
    return bool(limiter.acquire("user-1"))


def application(
    environ: dict[str, Any],
    start_response: Callable[..., object],
    admit: Callable[[], bool] = admit,
) -> Iterable[bytes]:
    """WSGI. The answer names the worker."""
    time.sleep(0.002)  # the work, so that one fast worker does not take all connections
    allowed = environ["PATH_INFO"] == "/ready" or admit()
    body = str(os.getpid()).encode()
    start_response(
        "200 OK" if allowed else "429 Too Many Requests",
        [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))],
    )
    return [body]
