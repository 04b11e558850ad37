"""Quota: one admission for a whole LLM call: requests and tokens a minute, and calls in
parallel."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm.handle import SharedLimits, key_bytes
from fast_litellm_shm.limits import AnyLimit, InFlight, Window
from fast_litellm_shm.native import Decision, Permit, ffi, lib
from fast_litellm_shm.segment import Segment


def _check_tokens(where: str, tokens: object) -> None:
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise TypeError(f"{where}: tokens must be an int, not {tokens!r}")
    if tokens < 0:
        raise ValueError(f"{where}: tokens must be 0 or more, not {tokens}")
    if tokens >= 2**63:
        raise ValueError(f"{where}: tokens must be below 2**63, not {tokens}")


class Admission:
    """The answer of :meth:`Quota.admit`: true when admitted, until it is released.

    When false: ``reason`` says which limit, ``retry_after`` when to come back (seconds; None:
    never; 0.0: when a call in flight ends), ``in_flight`` how many there are.
    """

    __slots__ = ("_charged", "_key", "_permit", "_quota", "_released", "allowed")

    def __init__(self, quota: Quota, key: str | bytes, permit: Permit, tokens: int) -> None:
        self._quota, self._key, self._permit = quota, key, permit
        self._charged = tokens
        self.allowed = self._permit.decision.allowed
        self._released = not self.allowed

    @property
    def decision(self) -> Decision:
        """The Decision behind it: remaining, retry_after, reset_after, limit."""
        return self._permit.decision

    @property
    def retry_after(self) -> float | None:
        """Seconds until it would be admitted; 0.0 where that hangs on a call in flight."""
        return self._permit.decision.retry_after

    @property
    def in_flight(self) -> int:
        """When too many were in flight: how many."""
        return self._permit.in_flight

    @property
    def reason(self) -> str:
        """ "Request allowed", or which limit denied: "rpm", "tpm" or "max_parallel"."""
        return "Request allowed" if self.allowed else self._quota._limit_name(self.decision)

    def settle(self, tokens: int) -> None:
        """Book the true number of tokens: more than estimated is charged, and may go into debt,
        which the next requests wait out; less is given back, as long as its minute lasts. Can be
        called again, with a later number."""
        _check_tokens("settle", tokens)
        if self.allowed and tokens != self._charged:
            self._quota._settle(self._key, self._charged, tokens, self._permit)
            self._charged = tokens

    def release(self) -> bool:
        """The call is over: give the parallel slot back. Twice is harmless. False where there was
        nothing to give back any more."""
        if self._released:
            return False
        self._released = True
        return self._permit.release() or "max_parallel" not in self._quota._names

    def __bool__(self) -> bool:
        return not self._released

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    async def __aenter__(self) -> Admission:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "admitted" if self else "released" if self.allowed else f"denied by {self.reason}"
        return f"Admission({state}, key={self._key!r})"


class Quota:
    """Requests a minute, tokens a minute and calls in parallel, for each key, over all workers.

    rpm, tpm: windows of 60 seconds that begin at a key's first request; 1 .. 2,147,483,647.
    max_parallel: 1 .. 100,000. At least one of them. name: processes that use the same name share.

    A denial consumes nothing of any of the three. A worker that dies gives its parallel slots back,
    and leaves what it charged charged. The gateway's way of use::

        with quota.admit(key, tokens=estimate) as admission:
            if not admission:
                return too_many_requests(admission.reason, admission.retry_after)
            answer = call()
            admission.settle(tokens=answer.usage.total_tokens)
    """

    def __init__(
        self,
        rpm: int | None = None,
        tpm: int | None = None,
        max_parallel: int | None = None,
        *,
        name: str,
        segment: Segment | None = None,
        on_full: str = "deny",
    ) -> None:
        found: list[AnyLimit | InFlight] = []
        names = []
        for label, value in (("rpm", rpm), ("tpm", tpm)):
            if value is None:
                continue
            try:
                found.append(Window(value, per=60))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Quota: {label}: {error}") from None
            names.append(label)
        if max_parallel is not None:
            found.append(limits.in_flight("Quota", "max_parallel", max_parallel))
            names.append("max_parallel")
        if not found:
            raise ValueError("Quota needs at least one of rpm, tpm and max_parallel")
        self._names = tuple(names)
        self._shared = SharedLimits(tuple(found), name=name, segment=segment, on_full=on_full)
        self._arguments = (rpm, tpm, max_parallel, name, on_full)

    @property
    def name(self) -> str:
        """The name that processes share by."""
        return self._shared.name

    @property
    def segment(self) -> Segment:
        """The segment it lives in."""
        return self._shared.segment

    def admit(self, key: str | bytes, tokens: int = 0) -> Admission:
        """Admit a call that is estimated at ``tokens`` tokens, or say why not."""
        _check_tokens("admit", tokens)
        permit = self._shared._admit(key, self._costs(tokens))
        return Admission(self, key, permit, tokens)

    def in_flight(self, key: str | bytes) -> int:
        """Calls of the key in flight, of living processes."""
        raw = key_bytes(key)
        return int(lib.fshm_in_flight(self._shared._handle, raw, len(raw)))

    def remaining(self, key: str | bytes) -> dict[str, int]:
        """What is left of each limit now, by name: rpm, tpm, max_parallel."""
        raw, left = key_bytes(key), ffi.new("uint64_t[4]")
        count = lib.fshm_remaining(self._shared._handle, raw, len(raw), 0, left)
        out = {self._names[i]: int(left[i]) for i in range(count)}
        if "max_parallel" in self._names:
            most = self._shared.limits[-1].n
            out["max_parallel"] = max(most - self.in_flight(key), 0)
        return out

    def _costs(self, tokens: int) -> tuple[int, ...]:
        if len(self._shared.limits) != len(self._names):
            raise exceptions.SegmentError(
                f"Quota {self.name!r}: another process gave this name other kinds of limits than "
                f"{', '.join(self._names)}; give all workers the same, or another name"
            )
        return tuple(tokens if name == "tpm" else 1 for name in self._names)

    def _settle(self, key: str | bytes, charged: int, actual: int, permit: Permit) -> None:
        raw = key_bytes(key)
        before = ffi.new("uint64_t[4]", self._costs(charged))
        after = ffi.new("uint64_t[4]", self._costs(actual))
        held = ffi.cast("fshm_permit *", permit._address)
        status = lib.fshm_settle(self._shared._handle, raw, len(raw), before, after, held, 0)
        if status != lib.FSHM_ALLOWED:
            self._shared._failed(status)

    def _limit_name(self, decision: Decision) -> str:
        index = decision.limit_index
        return self._names[index] if index < len(self._names) else "limit"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (*self._arguments, self.segment))

    def __repr__(self) -> str:
        shown = ", ".join(limits.describe(limit) for limit in self._shared.limits)
        return f"Quota({shown}, name={self.name!r})"


def _rebuild(
    rpm: int | None,
    tpm: int | None,
    max_parallel: int | None,
    name: str,
    on_full: str,
    segment: Segment,
) -> Quota:
    return Quota(rpm, tpm, max_parallel, name=name, segment=segment, on_full=on_full)
