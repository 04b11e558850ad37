"""The states of a limiter's keys, for the package's own modules: one method for each call of the
core, and the errors that such calls end in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.segment import Segment

Spec = limits.LimitSpec | limits.InFlight | limits.Granted
Numbers = tuple[int, ...]  # four: one for each limit that there can be

_NUMBERS = ffi.typeof("uint64_t[4]")


class States:
    """Of the limiter that ``handle`` owns. shown: what errors call it. Times are in ns: instants of
    the segment's clock (:meth:`now`), or spans from now on."""

    def __init__(self, handle: Any, segment: Segment, shown: str) -> None:
        self.handle, self.segment, self._shown = handle, segment, shown

    def now(self) -> int:
        return int(lib.fshm_now(self.segment._handle))

    def wall(self) -> int:
        """The time of day that all processes of the segment go by: ns since 1970."""
        return int(lib.fshm_wall(self.segment._handle, 0))

    def apply(self, operation: int, raw: bytes, costs: Sequence[int]) -> Any:
        """A ``fshm_decision``."""
        out = ffi.new("fshm_decision *")
        lib.fshm_apply(self.handle, operation, raw, len(raw), ffi.new(_NUMBERS, costs), 0, 0, out)
        return out

    def known(self, raw: bytes) -> tuple[Numbers, Numbers]:
        """Tokens used, and ns until that is over, of each limit."""
        used, left = ffi.new(_NUMBERS), ffi.new(_NUMBERS)
        lib.fshm_known(self.handle, raw, len(raw), 0, used, left)
        return tuple(used), tuple(left)

    def learn(self, raw: bytes, used: Sequence[int], left: Sequence[int], since: int) -> None:
        """Take over what a server says: :meth:`known`, as of the instant ``since``."""
        numbers = ffi.new(_NUMBERS, used), ffi.new(_NUMBERS, left)
        lib.fshm_learn(self.handle, raw, len(raw), *numbers, since)

    def remaining(self, raw: bytes) -> Numbers:
        """Of each limit, without one of calls in flight."""
        left = ffi.new(_NUMBERS)
        count = lib.fshm_remaining(self.handle, raw, len(raw), 0, left)
        if count < 0:
            self.fail(count)
        return tuple(left)[:count]

    def count(self, raw: bytes, status: int) -> None:
        """In the statistics of the key: a call that was decided elsewhere."""
        lib.fshm_count_call(self.handle, raw, len(raw), status)

    def in_flight(self, raw: bytes) -> int:
        return int(lib.fshm_in_flight(self.handle, raw, len(raw)))

    def reset(self, raw: bytes | None = None) -> None:
        """None: all keys."""
        if raw is None:
            status = lib.fshm_reset_all(self.handle)
        else:
            status = lib.fshm_reset_key(self.handle, raw, len(raw))
        if status != lib.FSHM_OK:
            self.fail(status)

    # a limiter of limits.Granted: tokens that a server has leased to this host, or refused

    def leased(self, raw: bytes, take: bool = False) -> tuple[Numbers, Numbers]:
        """Tokens that are left, and for how many ns. take: and take them out."""
        left, ns = ffi.new(_NUMBERS), ffi.new(_NUMBERS)
        lib.fshm_token_lease_look(self.handle, raw, len(raw), take, 0, left, ns)
        return tuple(left), tuple(ns)

    def refuse(self, raw: bytes, costs: Sequence[int], ns: int) -> None:
        """Remember that these costs were refused, for so long."""
        lib.fshm_token_lease_refuse(self.handle, raw, len(raw), ffi.new(_NUMBERS, costs), ns, 0)

    # callers that wait for a key

    def waited_for(self, raw: bytes) -> bool:
        """Whether any caller, of any process, waits for the key."""
        return bool(lib.fshm_is_waited_for(self.handle, raw, len(raw)))

    def waiting(self, raw: bytes, tenant: int | None = None) -> int:
        """How many callers wait for the key; tenant: of this one."""
        out, of = ffi.new("fshm_turn *"), ffi.NULL
        if tenant is not None:
            of = ffi.new("uint64_t *", tenant)
        lib.fshm_waiting(self.handle, raw, len(raw), of, 0, out)
        return int(out.callers)

    def fail(self, status: int) -> NoReturn:
        raise failure(status, self._shown, self.segment)


def open_beside(
    segment: Segment, name: str, specs: Sequence[Spec], shown: str | None = None
) -> States:
    """A limiter that keeps something for another one, ``shown``: its calls are counted nowhere."""
    encoded = name.encode("utf-8", "surrogatepass")
    raw, out = (
        ffi.new("fshm_limit[]", [each._raw(segment) for each in specs]),
        ffi.new("fshm_limiter **"),
    )
    status = lib.fshm_limiter_open_beside(
        segment._handle, encoded, len(encoded), raw, len(specs), out
    )
    if status != lib.FSHM_OK:
        raise failure(status, shown or name, segment)
    return States(owned(out[0], lib.fshm_limiter_close, segment._handle), segment, shown or name)


def failure(status: int, shown: str, segment: Segment) -> exceptions.FastShmError:
    """What a call of the core that neither admits nor denies raises."""
    where = f"limiter {shown!r} in segment {segment.name!r}"
    if status == lib.FSHM_E_LIMITERS:
        return exceptions.SegmentFullError(
            f"{where}: the segment's table of limiters is full ({segment.geometry().limiters}); "
            "use fewer names, or a larger capacity"
        )
    if status == lib.FSHM_E_PROCESSES:
        geometry, living = segment.geometry(), len(segment.processes())
        if living < geometry.processes // 2:  # and not that some have joined or gone meanwhile
            return exceptions.SegmentFullError(
                f"{where}: no place in the segment's process table is free, though {living} of "
                f"{geometry.processes} are living processes, and a permit needs an owner in "
                f"it; something else has locked {segment.path}."
                f"{geometry.instance:016x}.lock: `lslocks` tells what, end that"
            )
        return exceptions.SegmentFullError(
            f"{where}: the segment's process table is full "
            f"({geometry.processes} living processes), and a permit needs "
            "an owner in it; use fewer processes for one segment"
        )
    if status == lib.FSHM_E_LOCK_FILE:
        kind, why = segment._liveness() or (exceptions.SegmentError, "try again")
        return kind(f"{where}: no permit can be owned by this process: {why}")
    if status in (lib.FSHM_FULL, lib.FSHM_CONTENDED):
        return exceptions.SegmentFullError(
            f"{where}: no room for another key (capacity {segment.geometry().capacity}); remove "
            "the segment and make it with a larger FAST_LITELLM_SHM_CAPACITY, or use shorter "
            "periods"
        )
    if status == lib.FSHM_E_DAMAGED:
        known = segment.damaged or (
            "its limits could not be read; if it happens again, stop the workers and remove "
            f"the segment with `fast-shm rm --name {segment.name}`"
        )
        return exceptions.SegmentDamagedError(f"{where} cannot be used: {known}")
    if status == lib.FSHM_E_RECORDS:
        return exceptions.SegmentFullError(
            f"{where}: the plans of this segment have had too many different token buckets, or no "
            "memory is free for another one; give plans FixedWindow or SlidingWindow limits, of "
            "which there may be any number, or remove the segment with "
            f"`fast-shm rm --name {segment.name}` once no worker uses it"
        )
    if status == lib.FSHM_E_ARGUMENT:
        return exceptions.SegmentError(
            f"{where}: it exists, with another kind of limits. A name keeps its kind (rates, "
            "plans of keys, a budget, or calls in flight alone): give all workers the same "
            "arguments, or give this limiter another name"
        )
    return exceptions.SegmentError(f"{where}: unexpected error {status}")
