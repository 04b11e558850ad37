"""The same application with a limiter in the worker's own memory, as most are: for comparison."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import app

limit = int(os.environ["DEMO_LIMIT"])
admitted: Counter[str] = Counter()


def admit() -> bool:
    """At most ``limit`` for each key, as far as this process knows."""
    if admitted["user-1"] >= limit:
        return False
    admitted["user-1"] += 1
    return True


def application(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """WSGI, as app.application."""
    return app.application(environ, start_response, admit)
