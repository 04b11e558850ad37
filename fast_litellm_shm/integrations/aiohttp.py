"""A middleware for aiohttp's client: all workers of a host keep to an upstream's limits together.

    pip install "fast-litellm-shm[aiohttp]"

::

    import aiohttp
    from fast_litellm_shm.integrations.aiohttp import SharedLimitMiddleware

    limit = SharedLimitMiddleware(name="crawler", max_in_flight=8, limits="50/second")
    async with aiohttp.ClientSession(middlewares=[limit]) as session: ...

All workers together have at most 8 requests in flight to each origin (scheme, host and port) and
send at most 50 a second. When an origin answers 429 or 503 with ``Retry-After``, no worker sends it
a request before that: they wait, or raise. See docs/clients.md. For aiohttp's server:
:mod:`fast_litellm_shm.integrations.aiohttp_server`.
"""

from __future__ import annotations

from typing import Any

try:
    import aiohttp
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.aiohttp needs aiohttp 3.12 or later: pip install "
        '"fast-litellm-shm[aiohttp]"'
    ) from error

from fast_litellm_shm.integrations._httpx_upstream import LimitedClient, NotSentError, origin_of

__all__ = ["SharedLimitMiddleware", "SharedLimitTimeout"]


class SharedLimitTimeout(NotSentError, aiohttp.ConnectionTimeoutError):
    """The request was not sent, because it would wait longer than it may: too many requests are in
    flight, or in the period, or its origin asked for a pause. ``retry_after``: seconds until it
    could be sent; 0.0: when another request ends; None: never. For aiohttp it is a
    ConnectionTimeoutError, and so an asyncio.TimeoutError."""


class SharedLimitMiddleware(LimitedClient):
    """Limits the requests of an ``aiohttp.ClientSession(middlewares=[...])``, or of one call
    (``session.get(url, middlewares=[...])``). Each redirect is a request of its own.

    max_in_flight: requests in flight to an origin, over all processes, 1 .. 100,000; a request
    counts until its response is read to its end or released, a websocket until it is closed; None:
    no such limit. limits: up to 4 of TokenBucket, FixedWindow, SlidingWindow, or text such as
    ``"50/second"``, for each origin. max_wait: how many seconds a request may wait for all of
    these; 0: it may not wait; None: as long as the ``timeout`` of the session says, ``connect``, or
    else ``total`` (aiohttp's default: 300 s). max_retry_after: the longest pause, in seconds, that
    a response can ask for; up to 30 days. name: processes that use the same name share. segment:
    default ``Segment.default()``.

    Raises SharedLimitTimeout, which is an aiohttp.ConnectionTimeoutError, where a request may not
    be sent in time. A response of 429 or 503 is returned as it is; no request is sent again.
    """

    async def __call__(self, request: ClientRequest, handler: ClientHandlerType) -> ClientResponse:
        timeout = request.session.timeout
        own = timeout.connect or timeout.total or None  # to aiohttp, 0 is no time-out
        try:
            call = await self._upstream.begin_async(origin_of(str(request.url)), self._wait(own))
        except NotSentError as error:
            raise SharedLimitTimeout(str(error), error.retry_after) from None
        with call:
            response = await handler(request)
            headers: Any = response.headers
            call.answered(response.status, headers.get("Retry-After"), headers.get("Date"))
            connection = response.connection
            if connection is None:  # the response has been read
                call.end()
            else:
                connection.add_callback(call.end)
            return response
