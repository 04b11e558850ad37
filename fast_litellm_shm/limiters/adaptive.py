"""AdaptiveConcurrency: a limit of calls in flight that all processes learn together."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AsyncContextDecorator, ContextDecorator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import Permit, Slot, address, ffi, lib
from fast_litellm_shm._shared.retry_after import retry_after as seconds_of
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm._shared.side_limiters import LEARNED
from fast_litellm_shm._shared.states import States, open_beside
from fast_litellm_shm.limiters.concurrency import ConcurrencyLimiter
from fast_litellm_shm.limiters.waiting import OnWait, Shed, Wish, wish
from fast_litellm_shm.limits import Granted

Key: TypeAlias = str | bytes
Algorithm: TypeAlias = Literal["aimd", "gradient"]

THROTTLED = (429, 503)  # statuses by which an upstream says: too much
_ALGORITHMS: dict[str, int] = {"aimd": lib.FSHM_AIMD, "gradient": lib.FSHM_GRADIENT}
_ONE = 1024  # of fshm_adaptive.tolerance
_LONGEST_PAUSE = 86_400 * 30  # s
_LONGEST_CALL = 2**62  # ns
_PHASES = {
    lib.FSHM_PHASE_START: "start",
    lib.FSHM_PHASE_REFUSED: "refused",
    lib.FSHM_PHASE_MEASURE: "measuring",
    lib.FSHM_PHASE_STEADY: "steady",
}


@dataclass(frozen=True)
class LearnedLimit:
    """What is known of a key, and how it came. Times are in seconds."""

    #: The limit now.
    limit: int
    #: The last turn: "start" (none yet: it grows), "refused" (it was lowered, and grows along the
    #: curve), "measuring" (gradient: it is halved while the base latency is measured), "steady".
    phase: str
    #: How long ago that was; None: there was no turn.
    since: float | None
    #: What was in flight, less one, when the upstream last refused a call.
    best: int
    #: Since the turn: rounds (of as many successful calls as the limit), and calls of this round.
    rounds: int
    calls: int
    #: For how long no call may begin; 0.0: no pause.
    blocked: float
    #: gradient: the latency without a queue, and the mean of this round; None: not known yet.
    base_latency: float | None
    latency: float | None
    #: False: the limit fell, and more calls may be in flight still, from before.
    exact: bool


class AdaptiveConcurrency(InSegment):
    """At most as many calls in flight for each key as its upstream takes: a limit that all
    processes of the host learn together, from how their calls end.

    name: processes that use the same name learn together. initial, min, max: the limit of a new
    key, and the bounds of any; 1 .. 10,000. A process that sets ``max`` sets it for all of the
    name; ``min`` is kept by each process for what its own calls teach.

    algorithm: "aimd" learns from refusals: a limit grows slowly and falls by a tenth when the
    upstream refuses (additive increase, multiplicative decrease: Chiu and Jain 1989), along the
    curve of CUBIC (RFC 9438), so that it stays near the last refusal and seldom probes.
    "gradient" learns from latency, too: it falls before the upstream refuses, as soon as calls
    queue there (Netflix/concurrency-limits: Gradient2Limit; Envoy: adaptive concurrency).
    tolerance: for "gradient", how many times the latency without a queue is no queue yet; 1 .. 4.

    max_retry_after: the longest pause, in seconds, that a refusal can ask for; up to 30 days.
    segment: default ``Segment.default()``. Each host learns for itself.

    What is learned of a key is forgotten after a week without its calls, by :meth:`reset`, and when
    the segment is removed. Permits of processes that die come back as those of ConcurrencyLimiter.
    See ``docs/adaptive.md``. Do not use it for an upstream whose limit you know: that is what
    ConcurrencyLimiter and RateLimiter are for.

    Raises ValueError or TypeError for bad arguments, SegmentFullError where the segment has no room
    for the name.
    """

    def __init__(
        self,
        *,
        name: str,
        initial: int = 20,
        min: int = 1,
        max: int = 200,
        algorithm: Algorithm = "aimd",
        tolerance: float = 1.25,
        max_retry_after: float = 3600.0,
        segment: Segment | None = None,
        _keep: bool = False,  # where the name exists, leave its `max` as it is
    ) -> None:
        for argument, value in (("initial", initial), ("min", min), ("max", max)):
            _check_int(argument, value)
        if not min <= initial <= max:
            raise ValueError(
                f"initial must be from min to max, and is not: min={min}, initial={initial}, "
                f"max={max}"
            )
        if algorithm not in _ALGORITHMS:
            raise ValueError(f"algorithm must be 'aimd' or 'gradient', not {algorithm!r}")
        _check_number("tolerance", tolerance, 1, 4)
        _check_number("max_retry_after", max_retry_after, 0, _LONGEST_PAUSE)
        most = lib.FSHM_MAX_LIMITER_NAME - len(LEARNED)
        if isinstance(name, str) and len(name.encode("utf-8", "surrogatepass")) > most:
            raise ValueError(f"name must be 1 to {most} bytes of UTF-8, not {name!r}")
        self._given = {
            "initial": initial,
            "min": min,
            "max": max,
            "algorithm": algorithm,
            "tolerance": tolerance,
            "max_retry_after": max_retry_after,
        }
        settings = (initial, min, max, _ALGORITHMS[algorithm], round(tolerance * _ONE))
        self._permits = _Permits(max, settings, name=name, segment=segment, _keep=_keep)
        self._name, self._segment = self._permits.name, self._permits.segment
        self._settings = ffi.new("fshm_adaptive *", settings)
        self._longest = max_retry_after

    # calls

    def slot(
        self,
        key: Key,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> _Slot:
        """``with limit.slot(key, timeout=5) as call:`` one call of the upstream. Waits until one
        more may be in flight; the arguments are those of ``ConcurrencyLimiter.slot``. Raises
        PermitTimeoutError, with ``retry_after``; QueueFullError for ``max_waiting``.

        The end of the block teaches: no exception is a success, and its duration counts. An
        exception with a status of 429 or 503 (``status_code``, ``status`` or ``code``, its own or
        its ``response``'s) is a refusal, with the ``Retry-After`` of its headers. Any other says
        nothing of the upstream's limit. ``call.ok()``, ``call.failed()`` and ``call.throttled()``
        say so before, and the first of them counts.
        """
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return _Slot(self, key, timeout, wished)

    def slot_async(
        self,
        key: Key,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> _AsyncSlot:
        """``async with limit.slot_async(key, timeout=5) as call:`` slot() for asyncio."""
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return _AsyncSlot(self, key, timeout, wished)

    def acquire(self, key: Key) -> AdaptiveCall:
        """A call, without waiting; false if it may not begin now. Say how it ended, and release
        it: ``with call:`` does both."""
        return AdaptiveCall(self, key, self._permits.acquire(key))

    def wait(self, key: Key, timeout: float | None = None) -> AdaptiveCall:
        """acquire(), but waits, at most ``timeout`` seconds; false if it may not begin by then."""
        return AdaptiveCall(self, key, self._permits.wait(key, timeout))

    async def wait_async(self, key: Key, timeout: float | None = None) -> AdaptiveCall:
        """wait() for asyncio. It needs no thread."""
        return AdaptiveCall(self, key, await self._permits.wait_async(key, timeout))

    # what is known

    def limit(self, key: Key) -> int:
        """How many calls of the key may be in flight now."""
        return self.learned(key).limit

    def in_flight(self, key: Key) -> int:
        """How many calls of the key are in flight, over all processes."""
        return self._permits.in_flight(key)

    def queue_size(self, key: Key, tenant: str | None = None) -> int:
        """How many callers of all processes wait for the key; tenant: of this one only."""
        return self._permits.queue_size(key, tenant)

    def blocked(self, key: Key) -> float:
        """Seconds until calls of the key may begin again; 0.0: there is no pause."""
        return self.learned(key).blocked

    def learned(self, key: Key) -> LearnedLimit:
        """What is known of the key, and how it came."""
        raw, out = key_bytes(key), ffi.new("fshm_learned *")
        self._call(lib.fshm_adaptive_look, raw, len(raw), 0, out)
        return learned_from(out, self._settings.initial, self._settings.most)

    # what it is told

    def block(self, key: Key, seconds: float) -> None:
        """Begin a pause: no process begins a call of the key for so long. An earlier pause that
        ends later stays."""
        _check_number("seconds", seconds, 0, _LONGEST_PAUSE)
        self._pause(key, round(seconds * 1e9))

    def unblock(self, key: Key) -> None:
        """End the pause of the key."""
        self._pause(key, 0)

    def reset(self, key: Key) -> None:
        """Forget what is learned of the key, and end its pause."""
        raw = key_bytes(key)
        status = lib.fshm_adaptive_forget(
            self._permits._shared._handle,
            self._permits.learning.handle,
            self._settings,
            raw,
            len(raw),
        )
        self._check(status)

    def _pause(self, key: Key, ns: int) -> None:
        raw, permits = key_bytes(key), self._permits
        self._check(
            lib.fshm_adaptive_pause(
                permits._shared._handle, permits.learning.handle, raw, len(raw), ns, 0
            )
        )

    def _ended(self, key: Key, sample: tuple[int, int, int, int], pause: float) -> None:
        """sample: fshm_sample."""
        raw, permits = key_bytes(key), self._permits
        self._check(
            lib.fshm_adaptive_end(
                permits._shared._handle,
                permits.learning.handle,
                self._settings,
                raw,
                len(raw),
                ffi.new("fshm_sample *", sample),
                round(min(pause, self._longest) * 1e9),
                0,
            )
        )

    def _call(self, function: Callable[..., int], *arguments: object) -> None:
        self._check(function(self._permits.learning.handle, *arguments))

    def _check(self, status: int) -> None:
        if status != lib.FSHM_OK:
            self._permits.learning.fail(status)

    def __reduce__(self) -> tuple[Any, ...]:
        options = {"name": self.name, "segment": self.segment, **self._given}
        return (_rebuild, (type(self), options))

    def __repr__(self) -> str:
        given = self._given
        return (
            f"{type(self).__name__}(name={self.name!r}, initial={given['initial']}, "
            f"min={given['min']}, max={given['max']}, algorithm={given['algorithm']!r})"
        )


class AdaptiveCall:
    """A call of an upstream. True when it may be made, also after its release.

    Say once how it ended: :meth:`ok`, :meth:`failed` or :meth:`throttled`; what comes later is
    ignored. Then :meth:`release` it. ``with`` does both.
    """

    __slots__ = ("_began", "_key", "_limit", "_permit", "_said")

    def __init__(self, limit: AdaptiveConcurrency, key: Key, permit: Permit) -> None:
        self._permit = permit  # first: an exception finds it here
        self._limit, self._key, self._said = limit, key, False
        self._began = limit._permits.learning.now()

    @property
    def in_flight(self) -> int:
        """How many calls of the key were in flight when this one began, with it; where it may not
        begin: without it."""
        return self._permit.in_flight

    @property
    def retry_after(self) -> float:
        """Where it may not begin: seconds until the pause ends; 0.0: when another call ends."""
        return self._permit.decision.retry_after or 0.0

    def ok(self, seconds: float | None = None) -> None:
        """The upstream served it. seconds: how long that took; default: until now."""
        if seconds is not None:
            _check_number("seconds", seconds, 0, math.inf)
        self._end(seconds, False, 0.0)

    def failed(self) -> None:
        """It failed for a reason that says nothing of the upstream's limit."""
        self._said = True

    def throttled(self, retry_after: float | None = None) -> None:
        """The upstream refused it: too many requests. retry_after: no process begins a call of the
        key for so many seconds."""
        if retry_after is not None:
            _check_number("retry_after", retry_after, 0, math.inf)
        self._end(None, True, retry_after or 0.0)

    def _end(self, seconds: float | None, throttled: bool, pause: float) -> None:
        if self._said or not self._permit:
            return
        self._said = True
        if seconds is None:
            spent = self._limit._permits.learning.now() - self._began
        else:
            spent = round(min(seconds * 1e9, _LONGEST_CALL))
        sample = (self._began, max(spent, 0), self._permit.in_flight, throttled)
        self._limit._ended(self._key, sample, pause)

    def ended(self, error: BaseException | None) -> None:
        """Say how it ended by an exception, as the end of a block does; None: ok()."""
        refused, pause = (False, None) if error is None else refusal(error)
        if refused:
            self.throttled(pause)
        elif error is None:
            self.ok()
        else:
            self.failed()

    def release(self) -> bool:
        """Give the permit back. True if it was held."""
        return self._permit.release()

    def __bool__(self) -> bool:
        return bool(self._permit)

    def __enter__(self) -> AdaptiveCall:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.ended(error)
        finally:
            self._permit.release()

    def __repr__(self) -> str:
        if not self._permit:
            return f"AdaptiveCall(denied, in_flight={self.in_flight})"
        return f"AdaptiveCall({'released' if self._permit.released else 'held'})"


def refusal(error: BaseException) -> tuple[bool, float | None]:
    """Whether an exception of an HTTP library or SDK says that the upstream refused the call (429
    or 503), and its ``Retry-After`` in seconds."""
    if isinstance(error, exceptions.FastShmError) or not isinstance(error, Exception):
        return False, None
    response = getattr(error, "response", None)
    for source in (error, response):
        for attribute in ("status_code", "status", "code"):
            if getattr(source, attribute, None) in THROTTLED:
                return True, _header(getattr(response, "headers", None)) or _header(
                    getattr(error, "headers", None)
                )
    return False, None


def _header(headers: Any) -> float | None:
    get = getattr(headers, "get", None)
    if get is None:
        return None
    value, date = get("Retry-After"), get("Date")
    return seconds_of(value, date) if isinstance(value, str) else None


def learned_from(found: Any, initial: int, most: int) -> LearnedLimit:
    """Of a ``fshm_learned``. initial: the limit of a key of which nothing is known."""
    known = found.limit > 0
    limit = min(found.limit, most) if known else initial
    return LearnedLimit(
        limit=limit,
        phase=_PHASES[found.phase],
        since=found.turn_ns / 1e9 if found.turn_ns else None,
        best=found.best if known else limit,
        rounds=found.rounds,
        calls=found.calls,
        blocked=found.paused_ns / 1e9,
        base_latency=found.base_ns / 1e9 if found.base_ns else None,
        latency=found.mean_ns / 1e9 if found.mean_ns else None,
        exact=bool(found.exact) or not known,
    )


class _Permits(ConcurrencyLimiter):
    """The permits of an AdaptiveConcurrency, below the limit that is learned."""

    learning: States

    def __init__(
        self,
        most: int,
        settings: tuple[int, ...],
        *,
        name: str,
        segment: Segment | None,
        _keep: bool,
    ) -> None:
        super().__init__(most, name=name, segment=segment, cluster=False, _keep=_keep)
        self.learning = open_beside(self.segment, name + LEARNED, (Granted(),), name)
        handle = self.learning.handle
        self._shared._bind_adaptive(handle, address(handle), *settings)

    def _enter(self, key: Key, timeout: float | None, wished: Wish) -> Permit:
        if self._in_vain(key, timeout):
            return self.acquire(key)
        return super()._enter(key, timeout, wished)

    async def _enter_async(self, key: Key, timeout: float | None, wished: Wish) -> Permit:
        if self._in_vain(key, timeout):
            return self.acquire(key)
        return await super()._enter_async(key, timeout, wished)

    def _in_vain(self, key: Key, timeout: float | None) -> bool:
        """Whether the key is paused for longer than the call may wait."""
        if timeout is None:
            return False
        raw, out = key_bytes(key), ffi.new("fshm_learned *")
        lib.fshm_adaptive_look(self.learning.handle, raw, len(raw), 0, out)
        return bool(out.paused_ns > timeout * 1e9)

    def _again_ns(self, permit: Permit) -> int:
        pause: int | None = permit.decision.retry_after_ns
        return pause or super()._again_ns(permit)

    def _or_raise(self, permit: Permit, key: Key, timeout: float | None) -> Permit:
        if permit:
            return permit
        pause = permit.decision.retry_after
        if pause:
            why = (
                f"the upstream asked for a pause, of which {pause:.3g} s are left; come back then, "
                "or wait longer"
            )
        else:
            why = (
                f"{permit.in_flight} in flight, and the limit that was learned is "
                f"{self._limit_of(key)}; wait longer, or see docs/adaptive.md if that is too low"
            )
        error = exceptions.PermitTimeoutError(
            f"limiter {self.name!r}: no call of key {key!r} may begin within {timeout} s: {why}"
        )
        error.retry_after = pause or 0.0
        raise error

    def _limit_of(self, key: Key) -> int:
        raw, out = key_bytes(key), ffi.new("fshm_learned *")
        lib.fshm_adaptive_look(self.learning.handle, raw, len(raw), 0, out)
        return int(min(out.limit, self.max_in_flight))


class _Slot(Slot, ContextDecorator):
    """Of slot(). As a decorator: each call has a slot of its own."""

    def __init__(
        self, limit: AdaptiveConcurrency, key: Key, timeout: float | None, wished: Wish
    ) -> None:
        super().__init__(limit._permits, key, (timeout, wished))
        self._given = limit, key, timeout, wished
        self._call: AdaptiveCall | None = None

    def _recreate_cm(self) -> _Slot:
        return _Slot(*self._given)

    def __enter__(self) -> AdaptiveCall:  # type: ignore[override]
        permit = super().__enter__()
        try:
            self._call = AdaptiveCall(self._given[0], self._given[1], permit)
            return self._call
        except BaseException:
            super().__exit__()
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            call, self._call = self._call, None
            if call is not None:
                call.ended(error[1])
        finally:
            super().__exit__(*error)


class _AsyncSlot(AsyncContextDecorator):
    def __init__(
        self, limit: AdaptiveConcurrency, key: Key, timeout: float | None, wished: Wish
    ) -> None:
        self._given = limit, key, timeout, wished
        self._call: AdaptiveCall | None = None

    def _recreate_cm(self) -> _AsyncSlot:
        return _AsyncSlot(*self._given)

    async def __aenter__(self) -> AdaptiveCall:
        if self._call is not None:
            raise RuntimeError("the slot is held: call slot_async() for each block")
        limit, key, timeout, wished = self._given
        permits = limit._permits
        try:
            found = await permits._enter_async(key, timeout, wished)
        except Shed as shed:
            raise permits._queue_full(key, shed) from None
        self._call = AdaptiveCall(limit, key, permits._or_raise(found, key, timeout))
        return self._call

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        call, self._call = self._call, None
        if call is not None:
            call.__exit__(kind, error, trace)


def _check_int(argument: str, value: object) -> None:
    most = lib.FSHM_MAX_ADAPTIVE
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument} must be an int, not {value!r}")
    if not 1 <= value <= most:
        raise ValueError(f"{argument} must be 1 to {most:,}, not {value!r}")


def _check_number(argument: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number, not {value!r}")
    if not least <= value <= most:  # nan, too
        upper = "or more" if most == math.inf else f"to {most:,}"
        raise ValueError(f"{argument} must be {least:,} {upper}, not {value!r}")


def _rebuild(cls: type[AdaptiveConcurrency], options: dict[str, Any]) -> AdaptiveConcurrency:
    limit = cls.__new__(cls)
    AdaptiveConcurrency.__init__(limit, **options, _keep=True)
    return limit
