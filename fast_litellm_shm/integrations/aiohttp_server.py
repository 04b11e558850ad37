"""A middleware for aiohttp's server: limits that all workers of the host count together.

    pip install "fast-litellm-shm[aiohttp]"

::

    from aiohttp import web
    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.aiohttp_server import RateLimitMiddleware, Rule

    limit = RateLimitMiddleware([Rule(TokenBucket(100, per=60))], name="shop")
    app = web.Application(middlewares=[limit])

See docs/web.md, and :class:`Rule` for what a rule can say. For aiohttp's client:
:mod:`fast_litellm_shm.integrations.aiohttp`.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, cast

try:
    from aiohttp import web
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.aiohttp_server needs aiohttp: pip install "
        '"fast-litellm-shm[aiohttp]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations import web as rules_of_web
from fast_litellm_shm.integrations.web import (
    Middleware,
    Outcome,
    Request,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.request import AiohttpRequest
from fast_litellm_shm.limiters.grantors import ClusterArgument

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


def _key(name: str) -> Any:
    """A key of a request's storage: aiohttp 3.14 and later warn of a str."""
    kind = getattr(web, "RequestKey", None)
    return name if kind is None else kind(name, Outcome)


#: ``request[MARK]`` is the Outcome.
MARK = _key(rules_of_web.MARK)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class RateLimitMiddleware(Middleware[None]):
    """Checks each request before its handler gets it. The arguments are those of
    :class:`Middleware`, without ``app``. The ``raw`` of a request is aiohttp's.

    A refused request is answered with 429 (or 503) and a JSON body. The result of a check is in
    ``request[MARK]``, an :class:`Outcome`. A websocket handshake is a GET
    request. A permit of ``in_flight`` is held until the response has been sent, or its handler has
    failed. A response that its handler sends itself (a stream, a websocket) gets the headers only
    with ``app.on_response_prepare.append(limit.on_response_prepare)``.

    Rules match the whole path, also in a middleware of a sub-application.
    """

    __middleware_version__ = 1  # of what web.middleware() marks

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        cluster: ClusterArgument = None,
    ) -> None:
        super().__init__(
            None,
            rules,
            name=name,
            segment=segment,
            on_error=on_error,
            on_cost_error=on_cost_error,
            ambiguous_paths=ambiguous_paths,
            cluster=cluster,
        )
        for rule in self.rules:
            if rule.websockets_only:
                raise ValueError(
                    f"rule {rule.name!r} is for WEBSOCKET, and to aiohttp's server a handshake is "
                    "a GET request: give the rule the path of the websocket instead"
                )
        self._told = _key(
            f"{rules_of_web.MARK}.{id(self)}"
        )  # in a request: the outcome whose headers are missing

    async def __call__(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        outcome = await self.check_async(AiohttpRequest(request))
        if outcome is None:
            return await handler(request)
        request[MARK] = request[self._told] = outcome
        if outcome.refused:
            outcome.release()
            status, fields, body = outcome.refusal()
            return web.Response(status=status, headers=dict(fields), body=body)
        try:
            response: Any = await handler(request)
        except web.HTTPException as raised:  # a response too
            if not raised.prepared:
                self._add_headers(request, raised)
            outcome.release()
            raise
        except BaseException:
            outcome.release()
            raise
        if isinstance(response, web.StreamResponse):
            if not response.prepared:
                self._add_headers(request, response)
            if outcome.holds:
                _hold(response, outcome)
        else:  # aiohttp says what is wrong with it
            outcome.release()
        return cast(web.StreamResponse, response)

    async def on_response_prepare(
        self, request: web.BaseRequest, response: web.StreamResponse
    ) -> None:
        """Add the headers to a response that its handler sends."""
        self._add_headers(request, response)

    def _add_headers(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        outcome: Outcome | None = request.get(self._told)
        if outcome is None or outcome.refused:
            return
        del request[self._told]
        for name, value in outcome.headers_beside(response.headers):
            response.headers.add(name, value)


@functools.lru_cache(32)
def _held_type(kind: Any) -> Any:
    """A class of responses that release the permit when they have been sent."""

    class Held(kind):  # type: ignore[misc]
        _fast_shm_outcome: Outcome

        async def prepare(self, request: web.BaseRequest) -> Any:
            try:
                return await super().prepare(request)
            except BaseException:
                self._fast_shm_outcome.release()
                raise

        async def write_eof(self, data: bytes = b"") -> None:
            try:
                await super().write_eof(data)
            finally:
                self._fast_shm_outcome.release()

    Held.__name__ = Held.__qualname__ = kind.__name__
    return Held


def _hold(response: Any, outcome: Outcome) -> None:
    """Release the permit when the response has been sent, or is dropped unsent."""
    response.__class__ = _held_type(response.__class__)
    response._fast_shm_outcome = outcome
    weakref.finalize(response, outcome.release)
