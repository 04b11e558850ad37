"""httpx transports: all workers of a host keep to an upstream's limits together, as one client.

    pip install "fast-litellm-shm[httpx]"

::

    import httpx
    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.httpx import SharedLimitTransport

    transport = SharedLimitTransport(name="crawler", max_in_flight=8, limits=TokenBucket(50, per=1))
    client = httpx.Client(transport=transport)

All workers together have at most 8 requests in flight to each origin (scheme, host and port) and
send at most 50 a second. When an origin answers 429 or 503 with ``Retry-After``, no worker sends it
a request before that: they wait, or raise. See docs/httpx.md.
"""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Generic, TypeVar

try:
    import httpx
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.httpx needs httpx: pip install "fast-litellm-shm[httpx]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import RateLimitExceeded
from fast_litellm_shm.integrations._httpx_upstream import (
    Held,
    Upstream,
    released_on_error,
    retry_after,
)
from fast_litellm_shm.limiters.adaptive import AdaptiveConcurrency
from fast_litellm_shm.limits import Spelled

__all__ = ["AsyncSharedLimitTransport", "SharedLimitTimeout", "SharedLimitTransport"]

_Transport = TypeVar("_Transport", httpx.BaseTransport, httpx.AsyncBaseTransport)
_Sync = TypeVar("_Sync", bound="SharedLimitTransport")
_Async = TypeVar("_Async", bound="AsyncSharedLimitTransport")


class SharedLimitTimeout(RateLimitExceeded, httpx.PoolTimeout):
    """The request was not sent, because it would wait longer than it may: too many requests are in
    flight, or in the period, or its origin asked for a pause. ``retry_after``: seconds until it
    could be sent; 0.0: when another request ends; None: never. For httpx it is a PoolTimeout."""

    def __init__(self, message: str, retry_after: float | None, request: httpx.Request) -> None:
        httpx.PoolTimeout.__init__(self, message, request=request)
        self.args = (message, retry_after, request)
        self.retry_after = retry_after


class _Body:
    """The body of a response. It releases the permit when it is closed."""

    def __init__(self, stream: Any, permit: Held) -> None:
        self._stream, self._permit = stream, permit

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._permit.release()

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._permit.release()


@functools.lru_cache(64)
def _body_type(stream: type) -> Any:
    """A _Body that is a stream of the library of this one: OpenAI's SDK uses httpx2, which accepts
    no other."""
    names = ("SyncByteStream", "AsyncByteStream")
    return type("_Body", (_Body, *(each for each in stream.__mro__ if each.__name__ in names)), {})


class _Limited(Generic[_Transport]):
    """What both transports have."""

    _default: ClassVar[type]

    def __init__(
        self,
        transport: _Transport | None = None,
        *,
        max_in_flight: int | AdaptiveConcurrency | None = None,
        limits: Spelled | Iterable[Spelled] = (),
        max_wait: float | None = None,
        max_retry_after: float = 3600.0,
        name: str,
        segment: Segment | None = None,
    ) -> None:
        if max_wait is not None and (
            isinstance(max_wait, bool) or not isinstance(max_wait, (int, float)) or max_wait < 0
        ):
            raise ValueError(f"max_wait must be a number of seconds of 0 or more, not {max_wait!r}")
        self._upstream = Upstream(limits, max_in_flight, max_retry_after, name, segment)
        self._max_wait = max_wait
        self._transport: _Transport = self._default() if transport is None else transport

    @property
    def upstream(self) -> Upstream:
        """To inspect the limits, and to end a pause: ``blocked(origin)``, ``in_flight(origin)``,
        ``unblock(origin)``; an origin is ``https://example.com:443``."""
        return self._upstream

    def _wait(self, request: httpx.Request) -> float | None:
        """Seconds that a request may wait; None: without end."""
        if self._max_wait is not None:
            return self._max_wait
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        return timeout.get("pool")

    def _received(
        self, origin: str, response: httpx.Response, permit: Held | None, sent: float
    ) -> httpx.Response:
        """The response, whose body keeps the permit until it is closed; a pause that the response
        asks for begins. sent: when, of time.monotonic()."""
        headers = response.headers
        pause = retry_after(headers.get("Retry-After"), headers.get("Date"))
        took, status = time.monotonic() - sent, response.status_code
        self.upstream.ended(origin, permit, status=status, seconds=took, retry_after=pause)
        if permit is not None:
            if response.is_closed:  # read already, as a MockTransport's: it is not closed again
                permit.release()
            else:
                stream: Any = response.stream
                response.stream = _body_type(stream.__class__)(stream, permit)
        return response


def _origin(url: httpx.URL) -> str:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    return f"{url.scheme}://{url.host}:{port}"


@contextmanager
def _timeout_of(request: httpx.Request) -> Iterator[None]:
    try:
        yield
    except RateLimitExceeded as error:
        raise SharedLimitTimeout(str(error), error.retry_after, request) from None


class SharedLimitTransport(_Limited[httpx.BaseTransport], httpx.BaseTransport):
    """Limits what ``transport`` sends (default: a new ``httpx.HTTPTransport``).

    max_in_flight: requests in flight to an origin, over all processes, 1 .. 100,000; a request
    counts until its response is closed; an AdaptiveConcurrency: a limit that is learned; None: no
    such limit. limits: up to 4 of TokenBucket,
    FixedWindow, SlidingWindow, for each origin. max_wait: how many seconds a request may wait for
    all of these; 0: it may not wait; None: as long as its own ``pool`` timeout says (httpx's
    default: 5 s). max_retry_after: the longest pause, in seconds, that a response can ask for; up
    to 30 days. name: processes that use the same name share. segment: default
    ``Segment.default()``.

    Raises SharedLimitTimeout, which is an httpx.PoolTimeout, where a request may not be sent in
    time. A response of 429 or 503 is returned as it is; no request is sent again.
    """

    _default = httpx.HTTPTransport

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        origin = _origin(request.url)
        with _timeout_of(request):
            permit = self.upstream.enter(origin, self._wait(request))
        with released_on_error(permit):
            sent = time.monotonic()
            response = self._transport.handle_request(request)
            return self._received(origin, response, permit, sent)

    # The transport that sends may need its context.

    def __enter__(self: _Sync) -> _Sync:
        self._transport.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._transport.__exit__(*error)

    def close(self) -> None:
        self._transport.close()


class AsyncSharedLimitTransport(_Limited[httpx.AsyncBaseTransport], httpx.AsyncBaseTransport):
    """:class:`SharedLimitTransport` for ``httpx.AsyncClient`` under asyncio (not trio)."""

    _default = httpx.AsyncHTTPTransport

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        origin = _origin(request.url)
        with _timeout_of(request):
            permit = await self.upstream.enter_async(origin, self._wait(request))
        with released_on_error(permit):
            sent = time.monotonic()
            response = await self._transport.handle_async_request(request)
            return self._received(origin, response, permit, sent)

    async def __aenter__(self: _Async) -> _Async:
        await self._transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._transport.__aexit__(*error)

    async def aclose(self) -> None:
        await self._transport.aclose()
