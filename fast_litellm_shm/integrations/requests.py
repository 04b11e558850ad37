"""A transport adapter for requests: all workers of a host keep to an upstream's limits together.

    pip install "fast-litellm-shm[requests]"

::

    import requests
    from fast_litellm_shm.integrations.requests import SharedLimitAdapter

    session = requests.Session()
    limit = SharedLimitAdapter(name="crawler", max_in_flight=8, limits="50/second")
    session.mount("https://", limit)

All workers together have at most 8 requests in flight to each origin (scheme, host and port) and
send at most 50 a second. When an origin answers 429 or 503 with ``Retry-After``, no worker sends it
a request before that: they wait, or raise. See docs/clients.md.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

try:
    import requests
    from requests.adapters import BaseAdapter, HTTPAdapter
    from requests.utils import rewind_body
    from urllib3.util.retry import Retry
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.requests needs requests: pip install "
        '"fast-litellm-shm[requests]"'
    ) from error

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations._httpx_upstream import (
    Call,
    LimitedClient,
    NotSentError,
    origin_of,
)
from fast_litellm_shm.limits import Spelled

__all__ = ["SharedLimitAdapter", "SharedLimitTimeout"]


class SharedLimitTimeout(NotSentError, requests.exceptions.ConnectTimeout):
    """The request was not sent, because it would wait longer than it may: too many requests are in
    flight, or in the period, or its origin asked for a pause. ``retry_after``: seconds until it
    could be sent; 0.0: when another request ends; None: never. For requests it is a
    ConnectTimeout, which says that it is safe to try again."""

    def __init__(
        self,
        message: str,
        retry_after: float | None,
        request: requests.PreparedRequest | None = None,
    ) -> None:
        requests.exceptions.ConnectTimeout.__init__(self, message, request=request)
        self.args = (message, retry_after)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (*self.args, self.request)


class _AgainError(Exception):
    """urllib3 would send the request again now."""


class _Sending:
    """One call of SharedLimitAdapter.send(). call: of the attempt that is on its way. retries:
    those that are left; None: all."""

    def __init__(self) -> None:
        self.call: Call | None = None
        self.retries: Any = None

    def answered(self, response: Any) -> None:
        if self.call is not None:
            found = response.headers
            self.call.answered(response.status, found.get("Retry-After"), found.get("Date"))


_sending: ContextVar[_Sending | None] = ContextVar("fast_litellm_shm_sending", default=None)


class _Counted:
    """Comes before the class of a Retry. Where urllib3 would send the request again, after it has
    slept as the Retry says, SharedLimitAdapter does so: each attempt then counts as a request."""

    def increment(
        self, method: Any = None, url: Any = None, response: Any = None, *more: Any, **options: Any
    ) -> Any:
        sending = _sending.get()
        if sending is None:  # the adapter is used without ours
            return super().increment(method, url, response, *more, **options)  # type: ignore[misc]
        if response is not None:
            sending.answered(response)
        left: Any = super(_Counted, self if sending.retries is None else sending.retries)
        sending.retries = left.increment(method, url, response, *more, **options)
        return sending.retries

    def is_retry(self, *args: Any, **options: Any) -> bool:
        sending = _sending.get()
        retries = None if sending is None else sending.retries
        left: Any = super(_Counted, self if retries is None else retries)
        return bool(left.is_retry(*args, **options))

    def sleep(self, response: Any = None) -> None:
        sending = _sending.get()
        if sending is not None and sending.call is not None:
            sending.call.end()  # the response was read, or its connection failed
        super().sleep(response)  # type: ignore[misc]
        if sending is not None:
            raise _AgainError

    def __reduce__(self) -> tuple[Any, ...]:
        plain: Any = object.__new__(type(self).__mro__[2])
        plain.__dict__.update(self.__dict__)
        return _counted, (plain,)


@functools.lru_cache(8)
def _counted_type(retry: Any) -> Any:
    return type("CountedRetry", (_Counted, retry), {})


def _counted(retry: Any) -> Any:
    found = copy.copy(retry)
    found.__class__ = _counted_type(retry.__class__)
    return found


class _Raw:
    """Comes before the class of a urllib3 response: ends the call when that is closed, read to its
    end, or gives its connection back."""

    _fast_shm_call: Call

    def stream(self, *args: Any, **options: Any) -> Iterator[bytes]:
        yield from super().stream(*args, **options)  # type: ignore[misc]
        self._fast_shm_call.end()

    def release_conn(self) -> None:
        try:
            super().release_conn()  # type: ignore[misc]
        finally:
            self._fast_shm_call.end()

    def close(self) -> None:
        try:
            super().close()  # type: ignore[misc]
        finally:
            self._fast_shm_call.end()


@functools.lru_cache(8)
def _raw_type(raw: Any) -> Any:
    return type(raw.__name__, (_Raw, raw), {})


class SharedLimitAdapter(LimitedClient, BaseAdapter):
    """Limits what ``adapter`` sends (default: a new ``requests.adapters.HTTPAdapter``, which has no
    retries).

    The options are those of :class:`fast_litellm_shm.integrations.httpx.SharedLimitTransport`:
    max_in_flight: requests in flight to an origin, over all processes, 1 .. 100,000; a request
    counts until its response is read to its end or closed; None: no such limit. limits: up to 4 of
    TokenBucket, FixedWindow, SlidingWindow, or text such as ``"50/second"``, for each origin.
    max_wait: how many seconds a request may wait for all of these; 0: it may not wait; None: as
    long as its own ``timeout`` says for the connection, and without end if it has none.
    max_retry_after: the longest pause, in seconds, that a response can ask for; up to 30 days.
    name: processes that use the same name share. segment: default ``Segment.default()``.

    Retries of the adapter (``HTTPAdapter(max_retries=Retry(...))``) are requests like others: each
    counts, and waits for its turn. The adapter belongs to this one from now on.

    Raises SharedLimitTimeout, which is a requests.exceptions.ConnectTimeout, where a request may
    not be sent in time.
    """

    def __init__(
        self,
        adapter: BaseAdapter | None = None,
        *,
        max_in_flight: int | None = None,
        limits: Spelled | Iterable[Spelled] = (),
        max_wait: float | None = None,
        max_retry_after: float = 3600.0,
        name: str,
        segment: Segment | None = None,
    ) -> None:
        BaseAdapter.__init__(self)
        LimitedClient.__init__(
            self,
            max_in_flight=max_in_flight,
            limits=limits,
            max_wait=max_wait,
            max_retry_after=max_retry_after,
            name=name,
            segment=segment,
        )
        self._adapter = HTTPAdapter() if adapter is None else adapter
        retries = getattr(self._adapter, "max_retries", None)
        if isinstance(retries, Retry) and not isinstance(retries, _Counted):
            self._adapter.max_retries = _counted(retries)  # type: ignore[attr-defined]

    def send(
        self,
        request: requests.PreparedRequest,
        stream: bool = False,
        timeout: Any = None,
        verify: bool | str = True,
        cert: Any = None,
        proxies: Mapping[str, str] | None = None,
    ) -> requests.Response:
        origin, wait = origin_of(str(request.url)), self._wait(_connect_timeout(timeout))
        options = {"timeout": timeout, "verify": verify, "cert": cert, "proxies": proxies}
        sending = _Sending()
        while True:
            try:
                call = self._upstream.begin(origin, wait)
            except NotSentError as error:
                raise SharedLimitTimeout(str(error), error.retry_after, request) from None
            sending.call = call
            try:
                with call:
                    return self._send_once(sending, call, request, stream, options)
            except _AgainError:
                if request._body_position is not None:  # type: ignore[attr-defined,unused-ignore]
                    rewind_body(request)

    def _send_once(
        self,
        sending: _Sending,
        call: Call,
        request: requests.PreparedRequest,
        stream: bool,
        options: Mapping[str, Any],
    ) -> requests.Response:
        token = _sending.set(sending)
        try:
            response: requests.Response = self._adapter.send(request, stream, **options)
        finally:
            _sending.reset(token)
        headers = response.headers
        call.answered(response.status_code, headers.get("Retry-After"), headers.get("Date"))
        raw: Any = response.raw
        if sending.retries is not None and hasattr(raw, "retries"):
            raw.retries = sending.retries  # with the history of all attempts
        if call.holds:
            try:
                raw.__class__ = _raw_type(raw.__class__)
                raw._fast_shm_call = call
            except TypeError:  # nothing of urllib3: no connection that we know of
                call.end()
        return response

    def close(self) -> None:
        """Close the adapter that sends."""
        self._adapter.close()


def _connect_timeout(timeout: Any) -> float | None:
    """Of a ``timeout`` of requests: seconds, a pair of connect and read, or urllib3's Timeout."""
    if isinstance(timeout, tuple):
        timeout = timeout[0]
    found = getattr(timeout, "connect_timeout", timeout)
    return found if isinstance(found, (int, float)) else None
