"""A rate limiter for LlamaIndex's models, whose limits all workers of a host share.

    pip install "fast-litellm-shm[llama-index]"

::

    from fast_litellm_shm.integrations.llama_index import SharedRateLimiter

    limiter = SharedRateLimiter("500/minute", name="openai")
    llm = OpenAI(model="gpt-5", rate_limiter=limiter)

LlamaIndex's own limiters count for one process. See docs/clients.md.
"""

from __future__ import annotations

try:
    from llama_index.core.rate_limiter import BaseRateLimiter
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.llama_index needs llama-index-core 0.14.16 or later: pip "
        'install "fast-litellm-shm[llama-index]"'
    ) from error

from fast_litellm_shm.integrations._turns import Turns

__all__ = ["SharedRateLimiter"]


class SharedRateLimiter(Turns, BaseRateLimiter):
    """What LlamaIndex's ``rate_limiter=`` takes, of a model and of an embedding model, which ask it
    before each call.

    limits: 1 to 4 of TokenBucket, FixedWindow, SlidingWindow, or text such as ``"500/minute"``.
    name: processes that use the same name share. key: what counts apart, the name of an API key for
    example. max_wait: how many seconds a call may wait for its turn; None: without end. segment,
    cluster: as of :class:`fast_litellm_shm.RateLimiter`.

    It counts calls: LlamaIndex (0.14) tells its limiters no number of tokens. A call whose turn
    would come later than ``max_wait`` raises RateLimitExceeded at once. Callers are served in the
    order in which they came, over all processes.
    """

    def acquire(self, num_tokens: int = 0) -> None:
        """Wait for the turn of a call. num_tokens is not used."""
        self._wait()

    async def async_acquire(self, num_tokens: int = 0) -> None:
        """acquire() for asyncio."""
        await self._wait_async()
