"""Turns: what the rate limiters for LangChain and LlamaIndex have in common."""

from __future__ import annotations

from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import RateLimitExceeded
from fast_litellm_shm.limiters.grantors import ClusterArgument
from fast_litellm_shm.limiters.rate import RateLimiter, deadline_ns
from fast_litellm_shm.limits import Spelled


class Turns:
    """Calls of a model, which wait for their turn. limits: 1 to 4 of TokenBucket, FixedWindow,
    SlidingWindow, or text such as ``"500/minute"``. name: processes that use the same name share.
    key: what counts apart, the name of an API key for example. max_wait: how many seconds a call
    may wait for its turn; None: without end. segment, cluster: as of
    :class:`fast_litellm_shm.RateLimiter`.

    A call whose turn would come later than ``max_wait`` raises RateLimitExceeded at once. Callers
    are served in the order in which they came, over all processes."""

    def __init__(
        self,
        *limits: Spelled,
        name: str,
        key: str | bytes = "default",
        max_wait: float | None = None,
        segment: Segment | None = None,
        cluster: ClusterArgument = None,
    ) -> None:
        if not isinstance(key, (str, bytes)):
            raise TypeError(f"key must be a str or bytes, not {key!r}")
        deadline_ns(max_wait)  # of a wrong type: TypeError now, and not at the first call
        self._limiter = RateLimiter(*limits, name=name, segment=segment, cluster=cluster)
        self._key, self._max_wait = key, max_wait

    def _wait(self) -> None:
        self._check(self._limiter.wait(self._key, timeout=self._max_wait))

    async def _wait_async(self) -> None:
        self._check(await self._limiter.wait_async(self._key, timeout=self._max_wait))

    def _check(self, decision: Decision) -> None:
        if decision:
            return
        retry = decision.retry_after
        when = "never" if retry is None else f"in {retry:.3g} s"
        raise RateLimitExceeded(
            f"limiter {self._limiter.name!r} ({decision.limit!r}) is used up for key "
            f"{self._key!r}: the turn of this call would come {when}, and max_wait is "
            f"{self._max_wait} s; wait longer, or raise the limit",
            retry,
        )
