"""What a web application answers where RateLimitExceeded is raised, by ``@limited`` for example.

Without this, frameworks answer 500. It imports no framework: an application has imported its own.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fast_litellm_shm.exceptions import RateLimitExceeded
from fast_litellm_shm.integrations.web.responses import TRY_LATER, Headers, problem, seconds

_App = TypeVar("_App")


def answer_429(app: _App) -> _App:
    """Answer 429 with ``Retry-After`` where RateLimitExceeded reaches ``app``, and return ``app``::

        app = answer_429(FastAPI())

    app: of FastAPI, Starlette, Flask, Quart or aiohttp's server. Litestar takes it as
    ``Litestar(..., on_app_init=[answer_429])``. Django has no application object: add
    ``"fast_litellm_shm.integrations.web.DjangoAnswer429"`` to ``MIDDLEWARE``.

    The body is that of the middlewares, a problem in JSON, and names neither limiter nor key. Where
    the exception is one of an outgoing client (SharedLimitTimeout), the answer is 503: the upstream
    has no room, and the client has done nothing wrong. Raises TypeError for other objects.
    """
    for (module, name), register in _REGISTER.items():
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(app, kind):
            register(app)
            return app
    raise TypeError(
        "answer_429 takes an application of FastAPI, Starlette, Flask, Quart or aiohttp, not "
        f"{app!r}; Litestar takes on_app_init=[answer_429], and Django has "
        "fast_litellm_shm.integrations.web.DjangoAnswer429 for MIDDLEWARE"
    )


def answer(error: RateLimitExceeded) -> tuple[int, Headers, bytes]:
    """Status, headers and body."""
    status = error.http_status
    said = "Too many requests." if status == 429 else "What this request needs is busy."
    if error.retry_after is None:
        retry, said = None, f"{said} This request never fits."
    else:
        retry = seconds(error.retry_after)
        said = f"{said} Try again in {retry} s."
    fields, body = problem(status, None, said, retry)
    return status, fields if retry is None else [*fields, ("Retry-After", str(retry))], body


class DjangoAnswer429:
    """For Django's ``MIDDLEWARE``: answers 429 where a view raises RateLimitExceeded. Sync and
    async. See :func:`answer_429`."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Callable[[Any], Any]) -> None:
        from asgiref.sync import iscoroutinefunction, markcoroutinefunction

        self._get_response = get_response
        if iscoroutinefunction(get_response):
            markcoroutinefunction(self)

    def __call__(self, request: Any) -> Any:
        return self._get_response(request)

    def process_exception(self, request: Any, error: Exception) -> Any:
        """Called by Django with what a view raised."""
        if not isinstance(error, RateLimitExceeded):
            return None
        from django.http import HttpResponse

        status, fields, body = answer(error)
        return HttpResponse(body, status=status, headers=dict(fields))


def _starlette(app: Any) -> None:
    from starlette.responses import Response

    async def handler(connection: Any, error: RateLimitExceeded) -> Response | None:
        if connection.scope["type"] == "websocket":
            await connection.close(TRY_LATER, "rate limit")
            return None
        status, fields, body = answer(error)
        return Response(body, status, dict(fields))

    app.add_exception_handler(RateLimitExceeded, handler)


def _flask(app: Any) -> None:
    def handler(error: RateLimitExceeded) -> Any:
        status, fields, body = answer(error)
        return app.response_class(body, status, dict(fields))

    app.register_error_handler(RateLimitExceeded, handler)


def _litestar(config: Any) -> None:
    from litestar import Response

    def handler(request: Any, error: RateLimitExceeded) -> Any:
        status, fields, body = answer(error)
        return Response(body, status_code=status, headers=dict(fields))

    config.exception_handlers.setdefault(RateLimitExceeded, handler)


def _aiohttp(app: Any) -> None:
    from aiohttp import web

    @web.middleware
    async def middleware(request: Any, handler: Callable[[Any], Awaitable[Any]]) -> Any:
        try:
            return await handler(request)
        except RateLimitExceeded as error:
            status, fields, body = answer(error)
            return web.Response(status=status, headers=dict(fields), body=body)

    app.middlewares.append(middleware)


_REGISTER: dict[tuple[str, str], Callable[[Any], None]] = {
    ("starlette.applications", "Starlette"): _starlette,  # FastAPI's are Starlette's
    ("flask", "Flask"): _flask,
    ("quart", "Quart"): _flask,
    ("litestar.config.app", "AppConfig"): _litestar,
    ("aiohttp.web", "Application"): _aiohttp,
}
