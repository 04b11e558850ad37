"""A WSGI application with one limit, for the files in this folder; no framework.

gunicorn --workers 4 app:application
curl -i localhost:8000/
curl -i localhost:8000/healthz
"""

from collections.abc import Callable, Iterable
from typing import Any

from fast_litellm_shm import FixedWindow, RateLimiter

limiter = RateLimiter(FixedWindow(100, per=60), name="shop")


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Admits 100 requests a minute of each client, over all workers. /healthz is not limited: a
    probe must not use up a limit, nor fail by one."""
    text = [("Content-Type", "text/plain")]
    if environ["PATH_INFO"] == "/healthz":
        start_response("200 OK", text)
        return [b"ok\n"]
    decision = limiter.acquire(environ.get("REMOTE_ADDR") or "-")
    if not decision:
        after = str(int(decision.retry_after or 0) + 1)
        start_response("429 Too Many Requests", [*text, ("Retry-After", after)])
        return [b"slow down\n"]
    start_response("200 OK", text)
    return [f"{decision.remaining} left\n".encode()]
