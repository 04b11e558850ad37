"""Single flight: one process of a host asks the server about a key, and the others wait for its
answer. And the names of the limiters that keep something beside another one."""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.side_limiters import LONGEST, SINGLE_FLIGHT
from fast_litellm_shm._shared.states import Spec, States, open_beside
from fast_litellm_shm.limiters.waiting import BLOCKING, NEVER, Steps, in_turn, run
from fast_litellm_shm.limits import InFlight

MOST_NAME = lib.FSHM_MAX_LIMITER_NAME - LONGEST  # bytes


def beside(limiter: SharedLimits, suffix: str, specs: Sequence[Spec]) -> States:
    """The states of a limiter of the name ``limiter.name + suffix``. Raises ValueError: that is too
    long."""
    name = limiter.name + suffix
    if len(name.encode("utf-8", "surrogatepass")) > lib.FSHM_MAX_LIMITER_NAME:
        raise ValueError(
            f"name must be at most {MOST_NAME} bytes for durable limits and for limits over many "
            f"hosts, not {limiter.name!r}"
        )
    return open_beside(limiter.segment, name, specs, limiter.name)


class SingleFlight:
    """A permit for each key, held by the process that asks. It ends with the process."""

    def __init__(self, limiter: SharedLimits, timeout: float) -> None:
        self.states, self._timeout = beside(limiter, SINGLE_FLIGHT, [InFlight(1)]), timeout
        self._spare = deque[Any]()  # permits that are not held

    def begin(self, raw: bytes) -> Any:
        """A permit, or None: another process asks."""
        return self._try(raw)[1]

    def _try(self, raw: bytes) -> tuple[int, Any]:
        limiter = self.states.handle
        decision, held = ffi.new("fshm_decision *"), ffi.new("uint32_t *")
        try:
            permit = self._spare.pop()
        except IndexError:
            # Its end gives it back, where an exception strikes before end() can.
            give_back = functools.partial(lib.fshm_permit_release, limiter)
            permit = owned(ffi.new("fshm_permit *"), give_back)
        lib.fshm_admit(limiter, raw, len(raw), ffi.NULL, 0, permit, decision, held)
        if decision.status == lib.FSHM_ALLOWED:
            return lib.FSHM_ALLOWED, permit
        self._spare.append(permit)
        return decision.status, None

    def end(self, permit: Any) -> None:
        lib.fshm_permit_release(self.states.handle, permit)
        self._spare.append(permit)

    def _wait(self, raw: bytes, deadline: int) -> Steps[tuple[int, Any]]:
        def attempt() -> Steps[tuple[tuple[int, Any], int | None]]:
            yield from ()
            status, permit = self._try(raw)
            return (status, permit), NEVER if status == lib.FSHM_DENIED else None

        place = BLOCKING.place(self.states, raw)
        refused = (lib.FSHM_DENIED, None)
        return (yield from in_turn(BLOCKING, place, attempt, lambda: refused, deadline))

    @contextmanager
    def turn(self, raw: bytes) -> Iterator[tuple[bool, bool]]:
        """Whether this caller asks for the whole host, and whether it has waited for another
        process. A caller that waits longer than the time-out asks for itself alone, so a stopped
        process delays the others no longer than that. So does a caller for whose permit the segment
        has no room."""
        deadline, waited = time.monotonic_ns() + round(self._timeout * 1e9), False
        status, permit = self._try(raw)
        if status == lib.FSHM_DENIED:
            waited = True
            status, permit = run(self._wait(raw, deadline))
        try:
            yield permit is not None, waited
        finally:
            if permit is not None:
                self.end(permit)
