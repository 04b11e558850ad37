"""Grantors: who grants what a limiter asks for. The host's own segment (here), or a server for many
hosts (:mod:`fast_litellm_shm.cluster.grantor`).

A limiter chooses its grantor once, when it is made (:func:`chosen`). From then on it calls what the
protocols below name, and never asks which grantor it has. The native calls of the segment
(``acquire``, ``is_allowed``) do not pass here: they cost the same as without a grantor.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.named_limiter import (
    InnerLimits,
    SharedLimits,
    acquire_many,
    key_bytes,
    reserve,
    states_of,
)
from fast_litellm_shm._shared.native import Decision, Permit, Reservation, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.waiting import Steps, Waits
from fast_litellm_shm.limits import InFlight, LimitSpec

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster
    from fast_litellm_shm.cluster.quota import ClusterPermit

Key: TypeAlias = str | bytes
Cost: TypeAlias = int | tuple[int, ...] | list[int]
Answers: TypeAlias = tuple[bytearray, bytearray, bytearray]  # allowed, remaining, retry_after
Next: TypeAlias = tuple[Decision, int, Reservation]
# What a call of a quota holds, and what was charged for it.
Held: TypeAlias = "Permit | ClusterPermit"
# The argument `cluster` of all limiters; and what a limiter is given when it is unpickled.
ClusterArgument: TypeAlias = "Cluster | str | Literal[False] | None"
Replayed: TypeAlias = "Cluster | Literal[False] | None"

_FOREVER = 2**62  # ns
_WAKE_NS = 1_000_000_000  # a waiter looks for dead holders itself, once a second


class RateGrantor(Protocol):
    """Of a RateLimiter, beside the calls that Core answers. limiter: the one that asks."""

    def acquire_many(
        self, limiter: SharedLimits, keys: tuple[Key, ...], costs: int | list[int], out: Answers
    ) -> None:
        """acquire() for each key. out: of 1, 8 and 8 bytes for each, to be filled."""

    def reserve(
        self, waits: Waits, limiter: SharedLimits, key: Key, cost: Cost, deadline: int
    ) -> Steps[Next]:
        """One step of a wait: the decision, ns to sleep, and what is reserved until then. After the
        sleep an admitted decision is the caller's (it was charged ahead), a denied one is to be
        asked again. 0 ns: it is final. deadline: of time.monotonic_ns()."""

    def block(self, limiter: SharedLimits, raw: bytes, ns: int) -> None:
        """Deny the key for so long. Raises ValueError: none of the limits is a TokenBucket."""

    def reset(self, limiter: SharedLimits, raw: bytes | None) -> None:
        """Forget what the key, or what all keys, have consumed."""


class PermitGrantor(Protocol):
    """Of a ConcurrencyLimiter."""

    limits: InnerLimits  # whose ``admit`` is the limiter's ``acquire``
    wake_ns: int  # how long a waiter sleeps at most before it asks again

    def held(self, permit: Permit) -> str:
        """How many are held, for the message of a PermitTimeoutError."""


class QuotaGrantor(Protocol):
    """Of a Quota, or of a rule for web requests: rates and calls in flight, admitted together."""

    segment: Segment
    may_wait: bool  # whether admit() may have to wait for a server

    @property
    def admit(self) -> Callable[[Key, Cost], Held]:
        """Admit, or deny and consume nothing. costs: one for each limit, or one for all."""

    @property
    def admit_async(self) -> Callable[[Key, Cost], Awaitable[Held]]: ...

    @property
    def limits(self) -> tuple[Any, ...]:
        """Those in force."""

    def settle(
        self, key: Key, charged: tuple[int, ...], actual: tuple[int, ...], held: Held
    ) -> None:
        """Charge what was used beyond the estimate, into debt if need be; give back what was not
        used, as long as its window lasts."""

    def in_flight(self, key: Key) -> int:
        """Calls of the key in flight on this host."""

    def left(self, key: Key, *, ask: bool = False) -> tuple[int, ...]:
        """Tokens left of each rate. ask: a server, where this host does not know."""

    def of_limit(self, key: Key, decision: Decision) -> tuple[int, float]:
        """``remaining`` and ``reset_after`` of the limit that the decision names alone. (The
        decision's own are the least and the longest of all its limits.)"""


class Grantor(Protocol):
    argument: Replayed

    def rates(self, limiter: SharedLimits) -> RateGrantor: ...

    def permits(self, limit: InFlight, **given: Any) -> PermitGrantor:
        """given: as SharedLimits takes it."""

    def quota(
        self,
        found: tuple[LimitSpec | InFlight, ...],
        *,
        name: str,
        segment: Segment | None,
        on_full: str,
        settles: bool = True,
    ) -> QuotaGrantor:
        """settles: of_limit() is not called; else settle() and left() are not."""

    def longest_name(self, found: Sequence[LimitSpec | InFlight]) -> int:
        """How many bytes the name of a quota of these limits may have."""


def ns_until(deadline: int) -> int:
    """deadline: of time.monotonic_ns()."""
    return max(deadline - time.monotonic_ns(), 0)


def cannot_block(limiter: SharedLimits) -> ValueError:
    return ValueError(
        f"limiter {limiter.name!r} cannot block a key: none of its limits is a TokenBucket; add "
        "one, or use a limiter of its own for it"
    )


def chosen(cluster: ClusterArgument) -> Grantor:
    """The grantor that a limiter's argument names, or FAST_LITELLM_SHM_CLUSTER."""
    if settings.names_server(cluster):
        from fast_litellm_shm.cluster import grantor
        from fast_litellm_shm.cluster.settings import found

        server = found(cluster)
        if server is not None:
            return grantor.Server(server)
    return Host(False if cluster is False else None)


class Host:
    """The segment of this host."""

    def __init__(self, argument: Literal[False] | None = None) -> None:
        self.argument: Replayed = argument

    def rates(self, limiter: SharedLimits) -> RateGrantor:
        return _RATES

    def permits(self, limit: InFlight, **given: Any) -> PermitGrantor:
        return HostPermits(InnerLimits((limit,), **given))

    def quota(
        self,
        found: tuple[LimitSpec | InFlight, ...],
        *,
        name: str,
        segment: Segment | None,
        on_full: str,
        settles: bool = True,
    ) -> QuotaGrantor:
        return HostQuota(InnerLimits(found, name=name, segment=segment, on_full=on_full))

    def longest_name(self, found: Sequence[LimitSpec | InFlight]) -> int:
        return int(lib.FSHM_MAX_LIMITER_NAME)


class HostRates:
    """Knows nothing of its own: so a limiter of this host is in no garbage cycle."""

    def acquire_many(
        self, limiter: SharedLimits, keys: tuple[Key, ...], costs: int | list[int], out: Answers
    ) -> None:
        acquire_many(limiter, keys, costs, *out)

    def reserve(
        self, waits: Waits, limiter: SharedLimits, key: Key, cost: Cost, deadline: int
    ) -> Steps[Next]:
        yield from ()
        left = ns_until(deadline)
        decision, pause, reserved = reserve(limiter, key, cost, min(left, _FOREVER))
        if not decision:
            retry = decision.retry_after_ns
            pause = retry if retry is not None and retry <= left else 0
        return decision, pause, reserved

    def block(self, limiter: SharedLimits, raw: bytes, ns: int) -> None:
        states = states_of(limiter)
        status = states.apply(lib.FSHM_BLOCK, raw, (ns,) * 4).status
        if status == lib.FSHM_E_ARGUMENT:
            raise cannot_block(limiter)
        if status != lib.FSHM_ALLOWED:
            states.fail(status)

    def reset(self, limiter: SharedLimits, raw: bytes | None) -> None:
        states_of(limiter).reset(raw)


_RATES = HostRates()


class HostPermits:
    wake_ns = _WAKE_NS

    def __init__(self, limits: InnerLimits) -> None:
        self.limits = limits

    def held(self, permit: Permit) -> str:
        return f"{permit.in_flight} of {self.limits.limits[0].n} are held"


class HostQuota:
    """tail: after each key: what keys of limits with these numbers end in, where quotas of one name
    differ in their numbers (the plugin for LiteLLM)."""

    may_wait = False

    def __init__(self, shared: InnerLimits, tail: bytes = b"") -> None:
        self._shared, self._states, self._tail = shared, states_of(shared), tail
        self.segment = shared.segment
        self.admit: Callable[[Key, Cost], Held] = shared.admit
        if tail:
            shared.end_keys_in(tail)
        self.admit_async: Callable[[Key, Cost], Awaitable[Held]] = functools.partial(
            _at_once, self.admit
        )

    @property
    def limits(self) -> tuple[Any, ...]:
        return self._shared.limits

    def settle(
        self, key: Key, charged: tuple[int, ...], actual: tuple[int, ...], held: Held
    ) -> None:
        assert isinstance(held, Permit)
        self._shared.settle(key, charged, actual, held)

    def in_flight(self, key: Key) -> int:
        return self._states.in_flight(key_bytes(key) + self._tail)

    def left(self, key: Key, *, ask: bool = False) -> tuple[int, ...]:
        return self._shared.remaining(key)

    def of_limit(self, key: Key, decision: Decision) -> tuple[int, float]:
        raw, index = key_bytes(key), decision.limit_index
        if decision.allowed:
            return decision.remaining, self._states.known(raw)[1][index] / 1e9
        left = dict(enumerate(self._shared.remaining(raw)))  # the limits may have changed
        return left.get(index, decision.remaining), decision.reset_after


async def _at_once(admit: Callable[[Key, Cost], Held], key: Key, cost: Cost) -> Held:
    return admit(key, cost)
