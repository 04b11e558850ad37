"""A rate limiter for LangChain's models, whose limits all workers of a host share.

    pip install "fast-litellm-shm[langchain]"

::

    from fast_litellm_shm.integrations.langchain import SharedRateLimiter

    limiter = SharedRateLimiter("500/minute", name="openai")
    model = init_chat_model("openai:gpt-5", rate_limiter=limiter)

LangChain's own InMemoryRateLimiter counts for one process. See docs/clients.md.
"""

from __future__ import annotations

try:
    from langchain_core.rate_limiters import BaseRateLimiter
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.langchain needs langchain-core: pip install "
        '"fast-litellm-shm[langchain]"'
    ) from error

from fast_litellm_shm.integrations._turns import Turns

__all__ = ["SharedRateLimiter"]


class SharedRateLimiter(Turns, BaseRateLimiter):
    """What LangChain's ``rate_limiter=`` takes. A model asks it before each call.

    limits: 1 to 4 of TokenBucket, FixedWindow, SlidingWindow, or text such as ``"500/minute"``.
    name: processes that use the same name share. key: what counts apart, the name of an API key for
    example. max_wait: how many seconds a call may wait for its turn; None: without end. segment,
    cluster: as of :class:`fast_litellm_shm.RateLimiter`.

    A call whose turn would come later than ``max_wait`` raises RateLimitExceeded at once: LangChain
    does not look at what acquire() returns. Callers are served in the order in which they came,
    over all processes.
    """

    def acquire(self, *, blocking: bool = True) -> bool:
        """Wait for the turn of a call, and return True. blocking=False: do not wait; False: its
        turn has not come."""
        if not blocking:
            return bool(self._limiter.acquire(self._key))
        self._wait()
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        """acquire() for asyncio."""
        if not blocking:
            return bool(await self._limiter.acquire_async(self._key))
        await self._wait_async()
        return True
