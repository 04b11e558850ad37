"""httpx transports: one client's manners for all workers of the host.

    pip install "fast-litellm-shm[httpx]"

::

    import httpx
    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.httpx import SharedLimitTransport

    transport = SharedLimitTransport(name="crawler", max_in_flight=8, limits=TokenBucket(50, per=1))
    client = httpx.Client(transport=transport)

All workers together have at most 8 requests in flight to each origin (scheme, host and port) and
send at most 50 a second. Where an origin answers 429 or 503 with ``Retry-After``, none of them asks
it again before that: they wait, or raise. See docs/httpx.md.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

try:
    import httpx
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.httpx needs httpx: pip install "fast-litellm-shm[httpx]"'
    ) from error

from fast_litellm_shm._shared.native import Permit
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, RateLimitExceeded
from fast_litellm_shm.integrations.upstream import Upstream, retry_after
from fast_litellm_shm.limits import LimitSpec

__all__ = ["AsyncSharedLimitTransport", "SharedLimitTimeout", "SharedLimitTransport"]

_PAUSES = (429, 503)
_log = logging.getLogger("fast_litellm_shm")
_Sync = TypeVar("_Sync", bound="SharedLimitTransport")
_Async = TypeVar("_Async", bound="AsyncSharedLimitTransport")


class SharedLimitTimeout(RateLimitExceeded, httpx.PoolTimeout):
    """The request may not be sent within the time it may wait: too many in flight, too many in the
    period, or its origin asked for a pause. It was not sent. ``retry_after``: seconds until it
    could be; 0.0: when another ends; None: never. For httpx it is a PoolTimeout."""

    def __init__(self, message: str, retry_after: float | None, request: httpx.Request) -> None:
        httpx.PoolTimeout.__init__(self, message, request=request)
        self.args = (message, retry_after, request)
        self.retry_after = retry_after


class _Shared:
    """What both transports have."""

    def __init__(
        self,
        limits: LimitSpec | Iterable[LimitSpec],
        max_in_flight: int | None,
        max_wait: float | None,
        max_retry_after: float,
        name: str,
        segment: Segment | None,
    ) -> None:
        if max_wait is not None and (
            isinstance(max_wait, bool) or not isinstance(max_wait, (int, float)) or max_wait < 0
        ):
            raise ValueError(f"max_wait must be a number of seconds of 0 or more, not {max_wait!r}")
        self.upstream = Upstream(limits, max_in_flight, max_retry_after, name, segment)
        self._max_wait = max_wait

    def wait(self, request: httpx.Request) -> float | None:
        if self._max_wait is not None:
            return self._max_wait
        timeout: dict[str, Any] = request.extensions.get("timeout", {})
        return timeout.get("pool")

    def answered(self, origin: str, response: httpx.Response) -> None:
        if response.status_code not in _PAUSES:
            return
        headers = response.headers
        pause = retry_after(headers.get("Retry-After"), headers.get("Date"))
        if not pause:
            return
        try:
            self.upstream.block(origin, pause)
        except FastShmError as error:  # the answer is good all the same
            _log.error(
                "%s asks for a pause of %s s, and the other workers cannot be told",
                origin,
                pause,
                exc_info=error,
            )


def _origin(url: httpx.URL) -> str:
    port = url.port or {"http": 80, "https": 443}.get(url.scheme, 0)
    return f"{url.scheme}://{url.host}:{port}"


class _Stream(httpx.SyncByteStream):
    """The body, which lets go of the permit when it is closed."""

    def __init__(self, stream: httpx.SyncByteStream, permit: Permit) -> None:
        self._stream, self._permit = stream, permit

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._permit.release()


class _AsyncStream(httpx.AsyncByteStream):
    """_Stream for asyncio."""

    def __init__(self, stream: httpx.AsyncByteStream, permit: Permit) -> None:
        self._stream, self._permit = stream, permit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._permit.release()


class SharedLimitTransport(httpx.BaseTransport):
    """Stands before ``transport`` (default: a new ``httpx.HTTPTransport``).

    max_in_flight: requests in flight to an origin at once, over all processes, 1 .. 100,000; a
    request counts until its answer is closed; None: no such limit. limits: up to 4 of TokenBucket,
    FixedWindow, SlidingWindow, for each origin. max_wait: how many seconds a request may wait for
    all that; 0: not at all; None: as long as its own ``pool`` timeout says (httpx's default: 5 s).
    max_retry_after: the longest pause, in seconds, that an answer can ask for; up to 30 days. name:
    processes that use the same name share. segment: default ``Segment.default()``.

    Raises SharedLimitTimeout, which is an httpx.PoolTimeout, where a request may not be sent in
    time. An answer of 429 or 503 is handed on as it is; nothing is sent again.
    """

    def __init__(
        self,
        transport: httpx.BaseTransport | None = None,
        *,
        max_in_flight: int | None = None,
        limits: LimitSpec | Iterable[LimitSpec] = (),
        max_wait: float | None = None,
        max_retry_after: float = 3600.0,
        name: str,
        segment: Segment | None = None,
    ) -> None:
        self._shared = _Shared(limits, max_in_flight, max_wait, max_retry_after, name, segment)
        self._transport = httpx.HTTPTransport() if transport is None else transport

    @property
    def upstream(self) -> Upstream:
        """To look in, and to lift a pause: ``blocked(origin)``, ``in_flight(origin)``,
        ``unblock(origin)``; an origin is ``https://example.com:443``."""
        return self._shared.upstream

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        origin = _origin(request.url)
        try:
            permit = self.upstream.enter(origin, self._shared.wait(request))
        except RateLimitExceeded as error:
            raise SharedLimitTimeout(str(error), error.retry_after, request) from None
        try:
            response = self._transport.handle_request(request)
            self._shared.answered(origin, response)
            if permit is not None:
                if response.is_closed:  # read already, as a MockTransport's: nobody closes it again
                    permit.release()
                else:
                    response.stream = _Stream(response.stream, permit)  # type: ignore[arg-type]
            return response
        except BaseException:
            if permit is not None:
                permit.release()
            raise

    # What sends may need its context.

    def __enter__(self: _Sync) -> _Sync:
        self._transport.__enter__()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        self._transport.__exit__(exc_type, exc_value, traceback)

    def close(self) -> None:
        self._transport.close()


class AsyncSharedLimitTransport(httpx.AsyncBaseTransport):
    """:class:`SharedLimitTransport` for ``httpx.AsyncClient`` under asyncio (not trio)."""

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        max_in_flight: int | None = None,
        limits: LimitSpec | Iterable[LimitSpec] = (),
        max_wait: float | None = None,
        max_retry_after: float = 3600.0,
        name: str,
        segment: Segment | None = None,
    ) -> None:
        self._shared = _Shared(limits, max_in_flight, max_wait, max_retry_after, name, segment)
        self._transport = httpx.AsyncHTTPTransport() if transport is None else transport

    @property
    def upstream(self) -> Upstream:
        """As of :class:`SharedLimitTransport`."""
        return self._shared.upstream

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        origin = _origin(request.url)
        try:
            permit = await self.upstream.enter_async(origin, self._shared.wait(request))
        except RateLimitExceeded as error:
            raise SharedLimitTimeout(str(error), error.retry_after, request) from None
        try:
            response = await self._transport.handle_async_request(request)
            self._shared.answered(origin, response)
            if permit is not None:
                if response.is_closed:
                    permit.release()
                else:
                    response.stream = _AsyncStream(response.stream, permit)  # type: ignore[arg-type]
            return response
        except BaseException:
            if permit is not None:
                permit.release()
            raise

    async def __aenter__(self: _Async) -> _Async:
        await self._transport.__aenter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self._transport.__aexit__(exc_type, exc_value, traceback)

    async def aclose(self) -> None:
        await self._transport.aclose()
