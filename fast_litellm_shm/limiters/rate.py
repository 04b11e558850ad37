"""RateLimiter: the limits of a name, enforced together by all processes of the host."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import Decision, Reservation, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limits import LimitSpec, TokenBucket

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from fast_litellm_shm.cluster import Cluster
    from fast_litellm_shm.cluster.token_lease import TokenLeases

Cost: TypeAlias = int | tuple[int, ...] | list[int]

_FOREVER = 2**62  # ns
_SOONEST = 1_000_000  # ns: between two tries of a waiter at a server's limit
_MOST_BLOCKED = 2**55 // 10**9  # s, 416 days
_LATE = 1_000_000_000  # ns: a waiter that wakes this late has lost its turn


class _Nothing:
    """What is reserved where nothing is."""

    def keep(self) -> None: ...

    def cancel(self) -> int:
        return 0


_NOTHING: Any = _Nothing()


class Batch(NamedTuple):
    """The answers of :meth:`RateLimiter.acquire_many`, one element for each key."""

    allowed: NDArray[numpy.bool_]
    remaining: NDArray[numpy.uint64]
    retry_after: NDArray[numpy.float64]  # seconds; inf: never


def deadline_ns(timeout: float | None) -> int:
    """A time-out in seconds as an instant of time.monotonic_ns(); None: never."""
    if timeout is None:
        return _FOREVER * 2
    if not isinstance(timeout, (int, float)) or math.isnan(timeout):
        raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
    return time.monotonic_ns() + round(max(min(timeout, 4e9), 0) * 1e9)


class RateLimiter(SharedLimits):
    """Admit requests by key, under one or several limits, shared by all processes.

    limits: 1 to 4 of TokenBucket, FixedWindow, SlidingWindow; a request is admitted when all of
    them have room, and a denied one consumes nothing. name: processes that use the same name share;
    default: a name made of the limits. The limits belong to the name: setting others (here, or in
    any process) changes them for all at their next call, and what was consumed stays consumed.
    segment: default ``Segment.default()``. on_full: what to do when the segment has no room for
    another key of this limiter: ``"share"``: keys without room share counters, under the same
    limits; ``"deny"`` them (with retry_after 1 s), ``"allow"`` them, or ``"raise"``
    SegmentFullError. See ``docs/limits.md``, "Floods of keys".

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limits hold over all hosts that name the same server, which grants them to each host in batches;
    False: this host alone; default: what FAST_LITELLM_SHM_CLUSTER says, else this host alone. See
    ``docs/cluster.md``.

    Keys are ``str`` or ``bytes`` of any length; a str is the same key as its UTF-8 bytes. A cost is
    an int of 0 or more, or one int for each limit. Safe from any thread and any process; a fork
    needs no care.
    """

    def __init__(
        self,
        *limits_: LimitSpec,
        name: str | None = None,
        segment: Segment | None = None,
        on_full: str = "share",
        cluster: Cluster | str | Literal[False] | None = None,
    ) -> None:
        super().__init__(limits.checked(limits_), name=name, segment=segment, on_full=on_full)
        self._join(cluster)

    _wallet: TokenLeases | None = None
    _here: Literal[False] | None = None  # what a copy is to be given, where there is no wallet

    def _join(self, cluster: Cluster | str | Literal[False] | None) -> None:
        """Where the limits are those of many hosts: what is needed for that."""
        if not settings.names_server(cluster):
            self._here = False if cluster is False else None
            return
        from fast_litellm_shm.cluster import settings as cluster_settings
        from fast_litellm_shm.cluster.token_lease import TokenLeases

        found = cluster_settings.found(cluster)
        self._wallet = TokenLeases(self, found) if found else None

    def _ask(self, op: int, key: str | bytes, cost: object) -> tuple[int, int, int, int, int]:
        """Called by the native part for what this host was not granted."""
        assert self._wallet is not None
        return self._wallet.ask(op, key, cost)

    def _low(self, key: str | bytes, cost: object) -> None:
        """Called by the native part when a call has brought a key's wallet to a low."""
        assert self._wallet is not None
        self._wallet.refill(key, cost)

    async def acquire_async(self, key: str | bytes, cost: Cost = 1) -> Decision:
        """acquire() for asyncio: where the limits are those of many hosts and the server must be
        asked, that is done in a thread; else it is acquire(). Cancelled while it asks, what it is
        granted is consumed."""
        if self._wallet is None:
            return self.acquire(key, cost)
        from fast_litellm_shm.cluster.loops import off_loop

        return await off_loop(lambda: self.acquire(key, cost), lambda _: None)

    def reset(self, key: str | bytes | None = None) -> None:
        """Forget what a key has consumed; None: what all keys of this limiter have. Over many hosts
        it raises ClusterError while the server is away, as block() does."""
        if self._wallet is not None:
            if key is None:
                self._wallet.reset_all()
            else:
                self._wallet.reset(key_bytes(key))
            return
        if key is None:
            status = lib.fshm_reset_all(self._handle)
        else:
            raw = key_bytes(key)
            status = lib.fshm_reset_key(self._handle, raw, len(raw))
        if status != lib.FSHM_OK:
            self._failed(status)

    def block(self, key: str | bytes, seconds: float) -> None:
        """Deny the key, from now on for so many seconds, for all processes: what an upstream that
        answers ``Retry-After`` asks for. Of several blocks the one that ends last stands. Then one
        token fits, and the rest flows back at the limit's rate. ``reset(key)`` ends it. It is kept
        as consumed tokens: whoever changes the limits meanwhile changes how long it lasts, so a
        limiter that is for blocking had better have limits of its own.

        seconds: 0 .. 416 days. At least one of the limits must be a TokenBucket; windows beside it
        stay as they are. Raises ValueError otherwise, and SegmentFullError where there is no room
        for the key, whatever ``on_full`` says.
        """
        raw = key_bytes(key)
        if not isinstance(seconds, (int, float)) or isinstance(seconds, bool):
            raise TypeError(f"seconds must be a number, not {seconds!r}")
        if not 0 <= seconds <= _MOST_BLOCKED:
            raise ValueError(f"seconds must be between 0 and {_MOST_BLOCKED}, not {seconds!r}")
        if self._wallet is not None and any(isinstance(each, TokenBucket) for each in self.limits):
            self._wallet.block(raw, round(seconds * 1e9))
            return
        costs = ffi.new("uint64_t[4]", [round(seconds * 1e9)] * 4)
        decision = ffi.new("fshm_decision *")
        lib.fshm_apply(self._handle, lib.FSHM_BLOCK, raw, len(raw), costs, 0, 0, decision)
        if decision.status == lib.FSHM_E_ARGUMENT:
            raise ValueError(
                f"limiter {self.name!r} cannot block a key: none of its limits is a "
                "TokenBucket; add one, or use a limiter of its own for it"
            )
        if decision.status != lib.FSHM_ALLOWED:
            self._failed(decision.status)

    def acquire_many(self, keys: Sequence[str | bytes], cost: int | Sequence[int] = 1) -> Batch:
        """acquire() for each key, in order. cost: one int for all, or one for each key.

        Returns numpy arrays: allowed, remaining, retry_after (seconds; inf: never).
        """
        import numpy

        keys = tuple(keys)
        costs: int | list[int] = list(cost) if isinstance(cost, Iterable) else cost
        if isinstance(costs, list) and len(costs) != len(keys):
            raise ValueError(
                f"cost has {len(costs)} values for {len(keys)} keys: give one for each"
            )
        count = len(keys)
        allowed, remaining, retry = bytearray(count), bytearray(8 * count), bytearray(8 * count)
        if self._wallet is None:
            self._acquire_many(keys, costs, allowed, remaining, retry)
        else:
            self._acquire_each(keys, costs, allowed, remaining, retry)
        return Batch(
            numpy.frombuffer(allowed, numpy.bool_),
            numpy.frombuffer(remaining, numpy.uint64),
            numpy.frombuffer(retry, numpy.float64),
        )

    def _acquire_each(
        self,
        keys: Sequence[str | bytes],
        costs: int | list[int],
        allowed: bytearray,
        remaining: bytearray,
        retry: bytearray,
    ) -> None:
        """_acquire_many(), where what was granted to this host may not suffice."""
        assert self._wallet is not None
        self._wallet.prepare(keys, costs)
        left, wait = memoryview(remaining).cast("Q"), memoryview(retry).cast("d")
        for i, key in enumerate(keys):
            found = self.acquire(key, costs[i] if isinstance(costs, list) else costs)
            allowed[i], left[i] = found.allowed, found.remaining
            wait[i] = math.inf if found.retry_after is None else found.retry_after

    def wait(self, key: str | bytes, cost: Cost = 1, timeout: float | None = None) -> Decision:
        """Block until admitted; at most ``timeout`` seconds.

        On token buckets the waiter reserves its instant at once, so waiters are served in order,
        and sleeps until then. Denied at once where its turn would come after the deadline, or
        never. An interrupt gives the reservation back, if nobody has reserved after it. With a
        window, it sleeps until there is room and tries again.
        """
        deadline = deadline_ns(timeout)
        while True:
            decision, pause, reserved = self._next(key, cost, deadline)
            due = time.monotonic_ns() + pause
            if pause:
                try:
                    time.sleep(pause / 1e9)
                except BaseException:
                    reserved.cancel()
                    raise
            if not pause or (decision and time.monotonic_ns() - due < _LATE):
                reserved.keep()
                return decision

    async def wait_async(
        self, key: str | bytes, cost: Cost = 1, timeout: float | None = None
    ) -> Decision:
        """wait() for asyncio. Cancelling it gives the reservation back, if it is the last in the
        queue; else its instant passes unused, since those behind it keep theirs."""
        deadline = deadline_ns(timeout)
        while True:
            if self._wallet is None:
                decision, pause, reserved = self._next(key, cost, deadline)
            else:
                decision = await self.acquire_async(key, cost)
                left = max(deadline - time.monotonic_ns(), 0)
                decision, pause, reserved = self._next_granted(decision, left)
            due = time.monotonic_ns() + pause
            if pause:
                try:
                    await asyncio.sleep(pause / 1e9)
                except BaseException:
                    reserved.cancel()
                    raise
            if not pause or (decision and time.monotonic_ns() - due < _LATE):
                reserved.keep()
                return decision

    def _next(
        self, key: str | bytes, cost: Cost, deadline: int
    ) -> tuple[Decision, int, Reservation]:
        """One step of a wait: the decision, how long to sleep, and what is reserved until then.
        After the sleep an admitted decision is the caller's (it was charged ahead), a denied one is
        to be asked again. 0: done."""
        left = max(deadline - time.monotonic_ns(), 0)
        if self._wallet is not None:
            return self._next_granted(self.acquire(key, cost), left)
        decision, pause, reserved = self._reserve(key, cost, min(left, _FOREVER))
        if not decision:
            retry = decision.retry_after_ns
            pause = retry if retry is not None and retry <= left else 0
        return decision, pause, reserved

    @staticmethod
    def _next_granted(decision: Decision, left: int) -> tuple[Decision, int, Reservation]:
        """The same with limits of many hosts: nothing is reserved, who comes first is served."""
        retry = decision.retry_after_ns
        if decision or retry is None or retry > left:
            return decision, 0, _NOTHING
        return decision, max(retry, _SOONEST), _NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        cluster = self._wallet.cluster if self._wallet is not None else self._here
        return (
            _rebuild,
            (type(self), self.limits, self._name, self._segment, self._on_full, cluster),
        )

    def __repr__(self) -> str:
        shown = ", ".join(repr(limit) for limit in self.limits)
        return f"{type(self).__name__}({shown}, name={self._name!r})"


def _rebuild(
    cls: type[RateLimiter],
    found: tuple[LimitSpec, ...],
    name: str,
    segment: Segment,
    on_full: str,
    cluster: Cluster | Literal[False] | None,
) -> RateLimiter:
    limiter = cls.__new__(cls)
    SharedLimits.__init__(limiter, found, name=name, segment=segment, on_full=on_full, keep=True)
    limiter._join(cluster)
    return limiter
