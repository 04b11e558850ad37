"""What the integrations for task queues have in common: a limit of tasks, and when a task that it
denied comes back.

A task asks the limiter as it starts, and runs only if it is admitted: that alone keeps the limit,
whenever and wherever a task comes back. A denied task leaves its worker at once, and comes back
later. If all denied tasks came back when the next token is there, one of them would be admitted,
and all others would be sent through the broker once more, again and again. So each gets an instant
of its own, from a token bucket beside the limiter ("line") that only denied tasks charge.

The line reserves nothing of the limit. A reservation would be lost with a task that is revoked or
purged, and would deny others as long as it lasts. So a task that comes in the meantime and finds
room starts at once, before those that wait; and one that finds no room at its instant gets another.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import random
from collections.abc import Callable
from typing import Any

from fast_litellm_shm._shared import log
from fast_litellm_shm._shared.named_limiter import reserve
from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, RateLimitExceeded
from fast_litellm_shm.limiters.grantors import ClusterArgument, Cost
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow, Spelled, TokenBucket, describe, longest

Key = str | bytes
_LONGEST_NAME = 75  # bytes: it fits into the segment, and into the names of a cluster
_AGAIN = 10.0  # s until the next attempt, where the limit cannot be checked
_MOST_HELD = 0.25  # s that a task waits in its worker for a token that comes soon


class TaskLimit:
    """The limit of a function that is a task. function: the arguments of ``limited_task`` and
    ``limited_job`` are described there; owner: its name, for errors."""

    def __init__(
        self,
        owner: str,
        limits: tuple[Spelled, ...],
        *,
        key: Key | Callable[..., Key | None],
        cost: Cost | Callable[..., Cost],
        name: str,
        longest_delay: float,
        held: float | None,
        segment: Segment | None,
        cluster: ClusterArgument,
    ) -> None:
        if not callable(key) and not isinstance(key, (str, bytes)):
            raise TypeError(f"{owner}: key must be a str, bytes or a function, not {key!r}")
        if isinstance(longest_delay, bool) or not isinstance(longest_delay, (int, float)):
            raise TypeError(f"{owner}: longest_delay must be seconds, not {longest_delay!r}")
        if not 1 <= longest_delay < math.inf:
            raise ValueError(f"{owner}: longest_delay must be 1 s or more, not {longest_delay!r}")
        if len(name.encode("utf-8", "surrogatepass")) > _LONGEST_NAME:
            name = f"{owner} {hashlib.blake2s(name.encode(), digest_size=16).hexdigest()}"
        self._key, self._cost, self._longest, self._held = key, cost, float(longest_delay), held
        self._limiter = RateLimiter(*limits, name=name, segment=segment, cluster=cluster)
        self._lines = [
            RateLimiter(
                TokenBucket(each.n, longest(each)),
                name=f"{name} line {number}",
                segment=self._limiter.segment,
                cluster=False,
            )
            for number, each in enumerate(self._limiter.limits, 1)
        ]

    def asked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key | None, Cost]:
        """The key and the cost of a call; the key None: it is not limited."""
        key = self._key(*args, **kwargs) if callable(self._key) else self._key
        cost = self._cost(*args, **kwargs) if callable(self._cost) else self._cost
        return key, cost

    def take(self, function: str, key: Key, cost: Cost) -> None:
        """Of a call that no worker makes: it cannot come back. Raises RateLimitExceeded."""
        decision = self._limiter.acquire(key, cost)
        if not decision:
            raise self._exceeded(function, key, decision)

    def delay(self, function: str, key: Key, cost: Cost) -> float | None:
        """None: the task is admitted. Else it is denied, and has consumed nothing: how many seconds
        later it should come back. Raises RateLimitExceeded where it never fits."""
        try:
            decision = self._limiter.wait(key, cost, self._hold())
            if decision:
                return None
            if decision.retry_after is None:
                raise self._exceeded(function, key, decision)
            return self._instant(key, cost, decision)
        except RateLimitExceeded:
            raise
        except FastShmError as error:  # the task is not lost
            log.warning(
                "%s: its limit cannot be checked; the task comes back in %g s: %s",
                function,
                _AGAIN,
                error,
            )
            return _AGAIN

    def _hold(self) -> float:
        """How long a task may wait for a token in its worker: a task that comes back a moment too
        early need not be sent through the broker once more."""
        if self._held is not None:
            return self._held
        limit = self._limiter.limits[0]
        apart = longest(limit) / (1 if isinstance(limit, FixedWindow) else limit.n)
        return min(apart / 4, _MOST_HELD)

    def _instant(self, key: Key, cost: Cost, decision: Decision) -> float:
        retry, most = decision.retry_after or 0.0, self._longest
        late: float = random.uniform(most / 2, most)
        if retry >= most:
            return late
        index = min(decision.limit_index, len(self._lines) - 1)
        line, limit = self._lines[index], self._limiter.limits[index]
        charged = max(cost if isinstance(cost, int) else cost[index], 1)
        # The line begins where there is room again; if it reaches further, it stays as it is. When
        # a block ends, one token fits, and the others come at the limit's rate.
        line.block(key, max(retry - (charged - 1) * longest(limit) / limit.n, 0))
        found, pause_ns, reserved = reserve(line, key, charged, round(most * 1e9))
        if not found:
            return late
        reserved.keep()
        pause = max(pause_ns / 1e9, retry)
        if isinstance(limit, FixedWindow):  # all of a window comes at once, as it begins
            window = longest(limit)
            pause = retry + (pause - retry + window / limit.n / 2) // window * window
        return min(pause, most)

    def _exceeded(self, function: str, key: Key, decision: Decision) -> RateLimitExceeded:
        retry = decision.retry_after
        when = "its cost never fits: raise the limit"
        if retry is not None:
            when = f"try again in {retry:.3g} s"
        return RateLimitExceeded(
            f"{function}: key {key!r} has used up {describe(decision.limit)} of limiter "
            f"{self._limiter.name!r}; {when}",
            retry,
        )


def name_of(owner: str, function: Any) -> str:
    """The name of a function, as the name of its limiter. Raises TypeError for what cannot be a
    task."""
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise TypeError(f"{owner}: {function.__qualname__} must be a plain function")
    if not inspect.isroutine(function):
        raise TypeError(
            f"{owner} is for a function, not for {function!r}: write it below the decorator that "
            "makes the task"
        )
    return f"{function.__module__}.{function.__qualname__}"
