"""Limiters beside another one, for what is known of the same keys; and who of a host asks the
server about a key just now."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fast_litellm_shm._shared import greenlets
from fast_litellm_shm._shared.inspection import ASKING, HELD, LEASED, LOCAL, REFUSED, TOLD
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm.limits import InFlight

MOST_NAME = lib.FSHM_MAX_LIMITER_NAME - max(
    len(suffix) for suffix in (HELD, LEASED, REFUSED, ASKING, LOCAL, TOLD)
)  # bytes


def open_limiter(shared: SharedLimits, suffix: str, limits: Sequence[Any]) -> Any:
    """A limiter beside another one: what it does is no call of its own, and counted nowhere."""
    name = (shared.name + suffix).encode("utf-8", "surrogatepass")
    if len(name) > lib.FSHM_MAX_LIMITER_NAME:
        raise ValueError(
            f"name must be at most {MOST_NAME} bytes for limits over many hosts, not "
            f"{shared.name!r}"
        )
    raw, out = ffi.new("fshm_limit[]", [each._raw() for each in limits]), ffi.new("fshm_limiter **")
    handle = shared.segment._handle
    status = lib.fshm_limiter_open_beside(handle, name, len(name), raw, len(limits), out)
    if status != lib.FSHM_OK:
        shared._failed(status)
    return owned(out[0], lib.fshm_limiter_close, handle)


class SingleFlight:
    """A permit for each key, that the one holds who asks. Of a dead process it is nobody's."""

    def __init__(self, shared: SharedLimits, timeout: float) -> None:
        self._limiter, self._timeout = open_limiter(shared, ASKING, [InFlight(1)]), timeout

    def begin(self, raw: bytes) -> Any:
        """A permit, or None: somebody else asks."""
        return self._try(raw)[1]

    def _try(self, raw: bytes) -> tuple[int, Any]:
        told, held = ffi.new("fshm_decision *"), ffi.new("uint32_t *")
        # Its end gives it back, where an exception strikes before end() can.
        give_back = functools.partial(lib.fshm_permit_release, self._limiter)
        permit = owned(ffi.new("fshm_permit *"), give_back)
        lib.fshm_admit(self._limiter, raw, len(raw), ffi.NULL, 0, permit, told, held)
        return told.status, permit if told.status == lib.FSHM_ALLOWED else None

    def end(self, permit: Any) -> None:
        lib.fshm_permit_release(self._limiter, permit)

    @contextmanager
    def turn(self, raw: bytes) -> Iterator[tuple[bool, bool]]:
        """Whether this caller asks for the host, and whether it has waited for another one. Who
        waits in vain asks for itself alone: a process that is stopped holds up nobody longer. So
        does at once who finds no room in the segment to say that it asks."""
        deadline, waited = time.monotonic_ns() + round(self._timeout * 1e9), False
        while True:
            armed = lib.fshm_bell_arm(self._limiter, raw, len(raw)) if waited else 0
            status, permit = self._try(raw)
            left = deadline - time.monotonic_ns()
            if status != lib.FSHM_DENIED or left <= 0:
                break
            if waited:
                greenlets.bell_wait(self._limiter, raw, armed, left)
            waited = True
        try:
            yield permit is not None, waited
        finally:
            if permit is not None:
                self.end(permit)
