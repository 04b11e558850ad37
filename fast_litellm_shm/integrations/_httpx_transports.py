"""The transports for httpx and httpx2: all that both have in common. It imports neither.

httpx2 goes on from httpx, with the same names; the SDKs of OpenAI and Anthropic use it. A request,
a response and a stream must be of the same library.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations._httpx_upstream import (
    Call,
    LimitedClient,
    NotSentError,
    origin_of,
)
from fast_litellm_shm.limits import Spelled

#: In the extensions of a response that a transport made itself: the SharedLimitTimeout.
NOT_SENT = "fast_litellm_shm.not_sent"

_Sync = TypeVar("_Sync", bound="SyncLimits")
_Async = TypeVar("_Async", bound="AsyncLimits")


class NotSentTimeout(NotSentError):  # noqa: N818 - a PoolTimeout, named as that is
    """What SharedLimitTimeout is, but for the PoolTimeout of its library, which comes after it."""

    def __init__(self, message: str, retry_after: float | None, request: Any) -> None:
        Exception.__init__(self, message, retry_after, request)
        self.retry_after, self.request = retry_after, request

    def __reduce__(self) -> tuple[Any, ...]:
        return _timeout, (getattr(self, "_own", type(self)), *self.args)


def _library(request: Any) -> Any:
    """The module that a request is of: httpx or httpx2."""
    return sys.modules[type(request).__module__.partition(".")[0]]


@functools.lru_cache(8)
def _timeout_type(own: Any, library: Any) -> Any:
    if issubclass(own, library.PoolTimeout):
        return own
    return type(own.__name__, (own, library.PoolTimeout), {"_own": own})


def _timeout(own: Any, message: str, retry_after: float | None, request: Any) -> NotSentTimeout:
    found: NotSentTimeout = _timeout_type(own, _library(request))(message, retry_after, request)
    return found


def _refusal(error: NotSentTimeout, request: Any) -> Any:
    """A response of 429 that says what the error says, in the form that the SDKs of OpenAI and
    Anthropic read. They neither wait nor try again where ``x-should-retry`` says so."""
    headers = {"x-should-retry": "false"}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(math.ceil(error.retry_after), 1))
    said = {"type": "rate_limit_error", "code": "not_sent", "param": None, "message": str(error)}
    return _library(request).Response(
        429,
        headers=headers,
        json={"type": "error", "error": said},
        request=request,
        extensions={NOT_SENT: error},
    )


class _Body:
    """The body of a response. It ends the call when it is closed."""

    def __init__(self, stream: Any, call: Call) -> None:
        self._stream, self._call = stream, call

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._stream:
            yield part

    def close(self) -> None:
        try:
            self._stream.close()
        finally:
            self._call.end()

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        finally:
            self._call.end()


@functools.lru_cache(64)
def _body_type(stream: type) -> Any:
    """A _Body that is a stream of the library of this one, since httpx2 accepts no other."""
    names = ("SyncByteStream", "AsyncByteStream")
    return type("_Body", (_Body, *(each for each in stream.__mro__ if each.__name__ in names)), {})


class Limits(LimitedClient):
    """What both transports have."""

    _default: ClassVar[str]  # the class of the transport that sends, where none is given
    _timeout: ClassVar[type[NotSentTimeout]]

    def __init__(
        self,
        transport: Any = None,
        *,
        max_in_flight: int | None = None,
        limits: Spelled | Iterable[Spelled] = (),
        max_wait: float | None = None,
        max_retry_after: float = 3600.0,
        on_refusal: str = "raise",
        name: str,
        segment: Segment | None = None,
    ) -> None:
        if on_refusal not in ("raise", "respond"):
            raise ValueError(f'on_refusal must be "raise" or "respond", not {on_refusal!r}')
        super().__init__(
            max_in_flight=max_in_flight,
            limits=limits,
            max_wait=max_wait,
            max_retry_after=max_retry_after,
            name=name,
            segment=segment,
        )
        self._responds = on_refusal == "respond"
        self._given = transport
        self._made: dict[Any, Any] = {}  # where none was given: one for each library

    def _sends(self, request: Any) -> Any:
        """The transport that sends the request. Where none was given: one of the request's library,
        which is known only now."""
        if self._given is not None:
            return self._given
        library = _library(request)
        if library not in self._made:  # of two threads, both get that of the first
            self._made.setdefault(library, getattr(library, self._default)())
        return self._made[library]

    def _all(self) -> list[Any]:
        return list(self._made.values()) if self._given is None else [self._given]

    def _timeout_of(self, request: Any) -> float | None:
        """Seconds that a request may wait; None: without end."""
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        return self._wait(timeout.get("pool"))

    def _refused(self, request: Any, error: NotSentError) -> Any:
        found = _timeout(self._timeout, str(error), error.retry_after, request)
        if not self._responds:
            raise found from None
        return _refusal(found, request)

    @staticmethod
    def _received(response: Any, call: Call) -> Any:
        """The response, whose body ends the call when it is closed."""
        headers = response.headers
        call.answered(response.status_code, headers.get("Retry-After"), headers.get("Date"))
        if not call.holds:
            return response
        if response.is_closed:  # read already, as a MockTransport's: it is not closed again
            call.end()
        else:
            stream: Any = response.stream
            response.stream = _body_type(stream.__class__)(stream, call)
        return response


class SyncLimits(Limits):
    """SharedLimitTransport, without its base class."""

    _default = "HTTPTransport"

    def handle_request(self, request: Any) -> Any:
        try:
            call = self._upstream.begin(origin_of(str(request.url)), self._timeout_of(request))
        except NotSentError as error:
            return self._refused(request, error)
        with call:
            return self._received(self._sends(request).handle_request(request), call)

    # The transport that sends may need its context.

    def __enter__(self: _Sync) -> _Sync:
        for transport in self._all():
            transport.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for transport in self._all():
            transport.__exit__(*error)

    def close(self) -> None:
        for transport in self._all():
            transport.close()


class AsyncLimits(Limits):
    """AsyncSharedLimitTransport, without its base class."""

    _default = "AsyncHTTPTransport"

    async def handle_async_request(self, request: Any) -> Any:
        origin, timeout = origin_of(str(request.url)), self._timeout_of(request)
        try:
            call = await self._upstream.begin_async(origin, timeout)
        except NotSentError as error:
            return self._refused(request, error)
        with call:
            response = await self._sends(request).handle_async_request(request)
            return self._received(response, call)

    async def __aenter__(self: _Async) -> _Async:
        for transport in self._all():
            await transport.__aenter__()
        return self

    async def __aexit__(self, *error: Any) -> None:
        for transport in self._all():
            await transport.__aexit__(*error)

    async def aclose(self) -> None:
        for transport in self._all():
            await transport.aclose()
