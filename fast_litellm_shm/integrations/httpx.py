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

For httpx2, which the SDKs of OpenAI and Anthropic use: :mod:`fast_litellm_shm.integrations.httpx2`.
"""

from __future__ import annotations

try:
    import httpx
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.httpx needs httpx: pip install "fast-litellm-shm[httpx]"'
    ) from error

from fast_litellm_shm.integrations._httpx_transports import (
    NOT_SENT,
    AsyncLimits,
    NotSentTimeout,
    SyncLimits,
)

__all__ = ["NOT_SENT", "AsyncSharedLimitTransport", "SharedLimitTimeout", "SharedLimitTransport"]


class SharedLimitTimeout(NotSentTimeout, httpx.PoolTimeout):
    """The request was not sent, because it would wait longer than it may: too many requests are in
    flight, or in the period, or its origin asked for a pause. ``retry_after``: seconds until it
    could be sent; 0.0: when another request ends; None: never. For httpx it is a PoolTimeout."""


class SharedLimitTransport(SyncLimits, httpx.BaseTransport):
    """Limits what ``transport`` sends (default: a new ``HTTPTransport`` of the client's library,
    httpx or httpx2).

    max_in_flight: requests in flight to an origin, over all processes, 1 .. 100,000; a request
    counts until its response is closed; None: no such limit. limits: up to 4 of TokenBucket,
    FixedWindow, SlidingWindow, or text such as ``"50/second"``, for each origin. max_wait: how many
    seconds a request may wait for all of these; 0: it may not wait; None: as long as its own
    ``pool`` timeout says (httpx's default: 5 s). max_retry_after: the longest pause, in seconds,
    that a response can ask for; up to 30 days. name: processes that use the same name share.
    segment: default ``Segment.default()``.
    on_refusal: what becomes of a request that may not be sent in time. ``"raise"``: it raises
    SharedLimitTimeout, which is a PoolTimeout. ``"respond"``: it gets a response of 429 with
    ``Retry-After``, that the transport makes itself, for SDKs that hide what a transport raises;
    see "The SDKs of OpenAI and Anthropic" in docs/httpx.md.

    A response of 429 or 503 of the origin is returned as it is; no request is sent again.
    """

    _timeout = SharedLimitTimeout


class AsyncSharedLimitTransport(AsyncLimits, httpx.AsyncBaseTransport):
    """:class:`SharedLimitTransport` for ``httpx.AsyncClient`` under asyncio (not trio)."""

    _timeout = SharedLimitTimeout
