"""httpx2 transports: all workers of a host keep to an upstream's limits together, as one client.

    pip install "fast-litellm-shm[httpx2]"

httpx2 goes on from httpx; the SDKs of OpenAI and Anthropic use it::

    import openai
    from fast_litellm_shm.integrations.httpx2 import SharedLimitTransport

    transport = SharedLimitTransport(name="openai", limits="50/second", on_refusal="respond")
    client = openai.OpenAI(http_client=openai.DefaultHttpxClient(transport=transport))

The transports are those of :mod:`fast_litellm_shm.integrations.httpx`. See docs/httpx.md.
"""

from __future__ import annotations

try:
    import httpx2
except ImportError as error:
    raise ImportError(
        'fast_litellm_shm.integrations.httpx2 needs httpx2: pip install "fast-litellm-shm[httpx2]"'
    ) from error

from fast_litellm_shm.integrations._httpx_transports import (
    NOT_SENT,
    AsyncLimits,
    NotSentTimeout,
    SyncLimits,
)

__all__ = ["NOT_SENT", "AsyncSharedLimitTransport", "SharedLimitTimeout", "SharedLimitTransport"]


class SharedLimitTimeout(NotSentTimeout, httpx2.PoolTimeout):
    """The request was not sent, because it would wait longer than it may: too many requests are in
    flight, or in the period, or its origin asked for a pause. ``retry_after``: seconds until it
    could be sent; 0.0: when another request ends; None: never. For httpx2 it is a PoolTimeout."""


class SharedLimitTransport(SyncLimits, httpx2.BaseTransport):
    """:class:`fast_litellm_shm.integrations.httpx.SharedLimitTransport` for ``httpx2.Client``: all
    is said there."""

    _timeout = SharedLimitTimeout


class AsyncSharedLimitTransport(AsyncLimits, httpx2.AsyncBaseTransport):
    """:class:`SharedLimitTransport` for ``httpx2.AsyncClient`` under asyncio (not trio)."""

    _timeout = SharedLimitTimeout
