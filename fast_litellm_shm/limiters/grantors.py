"""Grantors: who grants what a limiter asks for. The host's own segment (here), a server for many
hosts (:mod:`fast_litellm_shm.cluster.grantor`), or a file that outlives a reboot
(:mod:`fast_litellm_shm.durable.grantor`).

A limiter chooses its grantor once, when it is made (choice.py). From then on it calls the methods
of the classes below, and never asks which grantor it has. The native calls of the segment
(``acquire``, ``is_allowed``) do not pass here: they cost the same as without a grantor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from fast_litellm_shm._shared import log
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm._shared.named_limiter import (
    InnerLimits,
    PermitLimits,
    SharedLimits,
    acquire_many,
    key_bytes,
    reserve,
    states_of,
)
from fast_litellm_shm._shared.native import Decision, Permit, Reservation, lib
from fast_litellm_shm._shared.side_limiters import has_leases
from fast_litellm_shm._shared.states import States
from fast_litellm_shm._shared.wait_queue import Order, Place
from fast_litellm_shm.limiters.waiting import Steps, Waits
from fast_litellm_shm.limits import InFlight, LimitSpec

if TYPE_CHECKING:
    from fast_litellm_shm._shared.segment import Segment
    from fast_litellm_shm.cluster import Cluster
    from fast_litellm_shm.cluster.budget_lease import BudgetLeases
    from fast_litellm_shm.durable import StateFile

Key: TypeAlias = str | bytes
Cost: TypeAlias = int | tuple[int, ...] | list[int]
Answers: TypeAlias = tuple[bytearray, bytearray, bytearray]  # allowed, remaining, retry_after
Limits: TypeAlias = tuple[LimitSpec | InFlight, ...]
# The argument `cluster` of all limiters; and what a limiter is given when it is unpickled.
ClusterArgument: TypeAlias = "Cluster | str | Literal[False] | None"
Replayed: TypeAlias = "Cluster | Literal[False] | None"
DurableArgument: TypeAlias = "StateFile | bool | None"  # `durable` of a limiter

_FOREVER = 2**62  # ns


class Held(Protocol):
    """What a call of a quota holds: a Permit, or what another grantor has for one."""

    @property
    def allowed(self) -> bool: ...
    @property
    def decision(self) -> Decision: ...
    @property
    def in_flight(self) -> int: ...
    def release(self) -> bool: ...
    def __bool__(self) -> bool:
        """Whether a permit was granted."""


def ns_until(deadline: int) -> int:
    """deadline: of monotonic_ns()."""
    return max(deadline - monotonic_ns(), 0)


class Rates:
    """Grants what a RateLimiter asks for, except in native calls. Each method gets the limiter as
    an argument: an object that held the limiter would make a reference cycle."""

    segment_clock = True  # whether the segment's clock decides; else a server's, or a file's
    in_batches = False  # whether tokens come in batches, from a server or a file

    def acquire_many(
        self, limiter: SharedLimits, keys: tuple[Key, ...], costs: int | list[int], out: Answers
    ) -> None:
        """acquire() for each key. out: three arrays to be filled, with 1, 8 and 8 bytes for each
        key."""
        acquire_many(limiter, keys, costs, *out)

    def reserve(
        self, waits: Waits, limiter: SharedLimits, key: Key, cost: Cost, deadline: int
    ) -> Steps[tuple[Decision, int, Reservation | None]]:
        """One step of a wait. Returns the decision, how many ns to sleep, and what is reserved
        until then. If the decision is admitted, the caller is admitted after the sleep (it was
        charged ahead). If it is denied, ask again after the sleep. 0 ns: the decision is final.
        deadline: of monotonic_ns()."""
        yield from ()
        left = ns_until(deadline)
        decision, pause, reserved = reserve(limiter, key, cost, min(left, _FOREVER))
        if not decision:
            retry = decision.retry_after_ns
            pause = retry if retry is not None and retry <= left else 0
        return decision, pause, reserved

    def spend(
        self, limiter: SharedLimits, raw: bytes, cost: Cost
    ) -> tuple[Decision, Callable[[], object]]:
        """acquire(), and what gives back what it consumed. Only of tokens ``in_batches``: the
        segment charges all levels of a hierarchy in one call."""
        raise NotImplementedError

    def is_refused(self, raw: bytes) -> bool:
        """Whether it is known that the key is denied just now."""
        return False

    def block(self, limiter: SharedLimits, raw: bytes, ns: int) -> None:
        """Deny the key for ``ns`` nanoseconds. RateLimiter.block() has checked the arguments."""
        status = states_of(limiter).apply(lib.FSHM_BLOCK, raw, (ns,) * 4).status
        if status != lib.FSHM_ALLOWED:
            states_of(limiter).fail(status)

    def reset(self, limiter: SharedLimits, raw: bytes | None) -> None:
        """Forget what the key, or what all keys, have consumed."""
        states_of(limiter).reset(raw)


class Permits:
    """Grants what a ConcurrencyLimiter asks for. ``limits.admit`` is its ``acquire``."""

    wake_ns = 1_000_000_000  # a waiter sleeps no longer before it looks for dead holders itself

    def __init__(self, limits: InnerLimits) -> None:
        self.limits = limits

    def held(self, permit: Permit) -> str:
        """How many are held, for the message of a PermitTimeoutError."""
        return f"{permit.in_flight} of {self.limits.limits[0].n} are held"


class Quotas:
    """Grants what a Quota, or a rule for web requests, asks for: rates and calls in flight,
    admitted together. tail: bytes that are added to each key; for quotas of one name with different
    numbers (the plugin for LiteLLM)."""

    may_wait = False  # whether admit() may have to wait for a server
    segment_clock = Rates.segment_clock
    wake_ns = Permits.wake_ns

    def __init__(self, limits: InnerLimits, tail: bytes = b"") -> None:
        self._shared, self._states, self._tail = limits, states_of(limits), tail
        self.segment = limits.segment
        if tail:
            limits.end_keys_in(tail)
        # The native methods themselves: a call less for each.
        self.admit = limits.admit  # type: ignore[method-assign, assignment]
        self.settle = limits.settle  # type: ignore[method-assign, assignment]

    @property
    def limits(self) -> tuple[Any, ...]:
        """Those in force."""
        return self._shared.limits

    def _raw(self, key: Key) -> bytes:
        return key_bytes(key) + self._tail

    def place(self, waits: Waits, key: Key, order: Order) -> Place:
        """In the queue of the callers of this host that wait for the key."""
        return waits.place(self._states, self._raw(key), order)

    def waited_for(self, key: Key) -> bool:
        """Whether any caller may wait for the key."""
        return self._states.waited_for(self._raw(key))

    def admit(self, key: Key, costs: Cost) -> Held:
        """Admit, or deny and consume nothing. costs: one for each limit, or one for all."""
        raise NotImplementedError  # __init__() sets the native method of the limits

    async def admit_async(self, key: Key, costs: Cost) -> Held:
        return self.admit(key, costs)

    def admitting(self, waits: Waits, key: Key, costs: Cost) -> Steps[Held]:
        """admit(), as the steps of a call that waits."""
        yield from ()
        return self.admit(key, costs)

    def queue(self, key: Key) -> tuple[States, bytes]:
        """Where callers that wait for the key stand: its states, and the key there."""
        return self._states, self._raw(key)

    def denied(self, key: Key, costs: Cost) -> Held:
        """The answer to a caller whose turn has not come."""
        return self._shared.refused(key, costs)

    def settle(
        self, key: Key, charged: tuple[int, ...], actual: tuple[int, ...], held: Any
    ) -> None:
        """Charge what was used beyond the estimate, into debt if need be; give back what was not
        used, as long as its window lasts. held: of admit()."""
        raise NotImplementedError  # likewise

    def in_flight(self, key: Key) -> int:
        """Calls of the key in flight on this host."""
        return self._shared.in_flight(key)

    def left(self, key: Key, *, ask: bool = False) -> tuple[int, ...]:
        """Tokens left of each rate. ask: if this host does not know, ask the server."""
        return self._shared.remaining(key)

    def of_limit(self, key: Key, decision: Decision) -> tuple[int, float]:
        """``remaining`` and ``reset_after`` of one limit, the one that the decision names. (The
        decision itself has the least ``remaining`` and the longest ``reset_after`` of all
        limits.)"""
        index = decision.limit_index
        if decision.allowed:
            return decision.remaining, self._states.known(self._raw(key))[1][index] / 1e9
        left = dict(enumerate(self._shared.remaining(key)))  # the limits may have changed
        return left.get(index, decision.remaining), decision.reset_after


class Grantor:
    """The segment of this host. A grantor of another kind overrides the methods that differ.
    argument: the ``cluster=`` of a limiter that is unpickled."""

    has_budgets = False  # whether budget() answers anything

    def __init__(self, argument: Replayed = None) -> None:
        self.argument = argument

    def rates(self, limiter: SharedLimits) -> Rates:
        _warn_of_leases(limiter)
        return _RATES

    def permits(self, limit: InFlight, **given: Any) -> Permits:
        """given: as SharedLimits takes it."""
        return Permits(PermitLimits((limit,), **given))

    def quota(self, limits: Limits, *, settles: bool = True, **given: Any) -> Quotas:
        """settles: True: of_limit() is never called. False: settle() and left() are never
        called."""
        shared = InnerLimits(limits, **given)
        _warn_of_leases(shared)
        return Quotas(shared)

    def budget(self, handle: Any, name: str, segment: Segment) -> BudgetLeases | None:
        """What leases money to a budget; None: the segment has all of it. handle: of its
        limiter."""
        return None

    def longest_name(self, limits: Limits) -> int:
        """How many bytes the name of a quota of these limits may have."""
        return int(lib.FSHM_MAX_LIMITER_NAME)


_RATES = Rates()
_warned: set[tuple[int, str]] = set()  # instances of segments, and names


def _warn_of_leases(limiter: SharedLimits) -> None:
    """A limiter of this name spends what a file or server grants: this one does not know of it, so
    the limit holds twice."""
    segment, name = limiter.segment, limiter.name
    which = segment.geometry().instance, name
    if which not in _warned and has_leases(segment, name.encode("utf-8", "surrogatepass")):
        _warned.add(which)
        log.warning(
            "limiter %r in segment %r: a process has made it with durable= or cluster=, and this "
            "one without: each counts apart, so twice the limit can pass. Give all workers the "
            "same arguments; if none has them any more, remove the segment with "
            "`fast-shm rm --name %s`",
            name,
            segment.name,
            segment.name,
        )
