"""WSGI middleware: limits for Flask, Django, Pyramid, Bottle and every other WSGI application.

It needs no extra package. All workers of the host count together::

    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.wsgi import RateLimitMiddleware, Rule

    rules = [Rule(TokenBucket(100, per=60))]
    app.wsgi_app = RateLimitMiddleware(app.wsgi_app, rules, name="shop")  # Flask
    application = RateLimitMiddleware(application, rules, name="shop")  # any other

See docs/web.md, and :class:`Rule` for what a rule can say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from http.client import responses
from types import TracebackType
from typing import Any, TypeAlias

from fast_litellm_shm.integrations.web import (
    MARK,
    Middleware,
    Outcome,
    Request,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.request import WsgiRequest, wsgi_asked

__all__ = [
    "MARK",
    "Outcome",
    "RateLimitMiddleware",
    "Request",
    "Rule",
    "client_address",
    "client_network",
    "forwarded_for",
    "header",
]

Environ: TypeAlias = dict[str, Any]
ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType] | tuple[None, None, None] | None
)
StartResponse: TypeAlias = Callable[..., Any]
App: TypeAlias = Callable[[Environ, StartResponse], Iterable[bytes]]


class RateLimitMiddleware(Middleware[App]):
    """Checks each request before ``app`` gets it. The arguments are those of :class:`Middleware`.

    A refused request is answered with 429 (or 503) and a JSON body. The result of a check is in
    ``environ["fast_litellm_shm.rate_limit"]``, an :class:`Outcome`. A permit is held until the
    server closes the response body, which it does also when the client has gone. With a cluster, a
    request may wait for the server: see "Over many hosts" in ``docs/web.md``. Safe before and after
    a fork.
    """

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        outcome: Any = False
        if self.has_usual:
            outcome = self.usual(wsgi_asked(environ), environ.get("REMOTE_ADDR") or None)
        if outcome is False:
            outcome = self.check(WsgiRequest(environ))
        if outcome is None:
            return self.app(environ, start_response)

        def start(
            status: str, headers: list[tuple[str, str]], exc_info: ExcInfo = None
        ) -> Callable[[bytes], object]:
            more = outcome.pairs_with(headers)
            write: Callable[[bytes], object] = (
                start_response(status, more, exc_info) if exc_info else start_response(status, more)
            )
            return write

        environ[MARK] = outcome
        if not (outcome.denied or outcome.holds):
            return self.app(environ, start)
        try:
            if outcome.refused:
                refused, fields, body = outcome.refusal()
                start_response(f"{refused} {responses[refused]}", fields)
                return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
            answer = self.app(environ, start)
            return _Body(answer, outcome) if outcome.holds else answer
        except BaseException:
            outcome.release()
            raise


class _Body:
    """The response body of the application. It releases the permit when the server closes it."""

    def __init__(self, body: Iterable[bytes], outcome: Outcome) -> None:
        self._body, self._outcome = body, outcome

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            self._outcome.release()
