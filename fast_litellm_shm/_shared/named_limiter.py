"""SharedLimits: the part that all limiters share: a name in a segment, and its limits, which may
change."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NoReturn

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import log, performance
from fast_litellm_shm._shared.native import Core, address, ffi, lib, owned
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm._shared.states import States, failure
from fast_litellm_shm.limits import Granted, InFlight, LimitSpec

_ON_FULL = {"deny": 0, "allow": 1, "raise": 2, "share": 3}
_TELL_SECONDS = 60  # between two log lines about one limiter, in one process
_told: dict[tuple[str, str], float] = {}  # of limiters, when


def _default_name(found: tuple[LimitSpec | InFlight, ...]) -> str:
    """A name made of the limits: equal limits, equal names."""
    name = " + ".join(limits.describe(limit) for limit in found)
    if len(name) > lib.FSHM_MAX_LIMITER_NAME:
        import hashlib

        name = f"limits {hashlib.blake2s(name.encode(), digest_size=16).hexdigest()}"
    return name


class SharedLimits(Core, InSegment):
    """Opens a limiter by name, and keeps its Python objects in step with the segment.

    The methods that begin with an underscore and take a status are called by the native part.
    """

    _component = "rate_limiter"  # as which its calls are measured

    def __init__(
        self,
        found: tuple[LimitSpec | InFlight, ...],
        *,
        name: str | None,
        segment: Segment | None,
        on_full: str,
        keep: bool = False,  # where the name exists, leave its limits as they are
        shown: str | None = None,  # what errors call it, where the user gave another name
        # The limits of this object's keys; those of the name are upper bounds of the same kinds. A
        # key must keep to one such set.
        numbered: tuple[LimitSpec | InFlight, ...] | None = None,
        # The limits are those of a plan: the name has none, and each key comes with its plan's.
        planned: bool = False,
    ) -> None:
        if name is None:
            name = _default_name(found)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        encoded = name.encode("utf-8", "surrogatepass")
        self._shown = name if shown is None else shown
        if not 1 <= len(encoded) <= lib.FSHM_MAX_LIMITER_NAME:
            raise ValueError(
                f"name must be 1 to {lib.FSHM_MAX_LIMITER_NAME} bytes of UTF-8, not {name!r}"
            )
        if on_full not in _ON_FULL:
            raise ValueError(
                f"on_full must be 'share', 'deny', 'allow' or 'raise', not {on_full!r}"
            )
        if segment is not None and not isinstance(segment, Segment):
            raise TypeError(f"segment must be a Segment or None, not {segment!r}")
        if hasattr(self, "_handle"):
            raise RuntimeError(f"limiter {self._shown!r} is open already: make another object")
        self._name, self._on_full = name, on_full
        self._segment = Segment.default() if segment is None else segment
        if not keep and self._takes_over(found, self._kinds_of(encoded)):
            self._failed(lib.FSHM_E_ARGUMENT)
        out = ffi.new("fshm_limiter **")
        status = lib.FSHM_E_NOT_FOUND
        if keep:
            status = lib.fshm_limiter_find(self._segment._handle, encoded, len(encoded), out)
        if status == lib.FSHM_E_NOT_FOUND:
            raw = ffi.new("fshm_limit[]", [limit._raw(self._segment) for limit in found])
            open_ = lib.fshm_plan_open if planned else lib.fshm_limiter_open
            status = open_(self._segment._handle, encoded, len(encoded), raw, len(found), out)
        if status == lib.FSHM_CONTENDED:
            raise exceptions.SegmentError(
                f"limiter {self._shown!r} in segment {self._segment.name!r}: several processes "
                "are changing its limits at this moment; set them in one place, or try again"
            )
        if status != lib.FSHM_OK:
            self._failed(status)
        self._handle: Any = owned(out[0], lib.fshm_limiter_close, self._segment._handle)
        self._numbered = numbered
        self._planned = found if planned else None
        if numbered is not None:
            self._number([limit.n for limit in numbered])
        self._limits_changed()
        self._measure(*performance.measured_by(self._component, "acquire", self._segment))

    def _kinds_of(self, encoded: bytes) -> list[int]:
        """Of the limits that the name has now; [] if it is new, or has those of plans."""
        out = ffi.new("fshm_limiter **")
        if lib.fshm_limiter_find(self._segment._handle, encoded, len(encoded), out) != lib.FSHM_OK:
            return []
        handle = owned(out[0], lib.fshm_limiter_close, self._segment._handle)
        raw, version = ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS), ffi.new("uint64_t *")
        return [raw[i].kind for i in range(lib.fshm_limiter_limits(handle, raw, version))]

    @staticmethod
    def _takes_over(found: tuple[LimitSpec | InFlight, ...], kinds: list[int]) -> bool:
        """Whether a name with limits of these kinds is another limiter's, whose calls would all
        fail, or count as calls of this one: rates on one side, calls in flight alone on the other.
        (The library lets any of them follow each other: a Quota may change all that it has.)"""
        of_permits = len(found) == 1 and isinstance(found[0], InFlight)
        if of_permits:
            return any(kind != lib.FSHM_PERMITS for kind in kinds)
        return kinds == [lib.FSHM_PERMITS]

    def _number(self, numbers: list[int]) -> None:
        status = lib.fshm_limiter_number(self._handle, numbers, len(numbers))
        if status == lib.FSHM_E_ARGUMENT:
            raise exceptions.SegmentError(
                f"limiter {self._shown!r} in segment {self._segment.name!r}: another process gave "
                "this name other kinds of limits; give its limiter another name"
            )
        if status != lib.FSHM_OK:
            self._failed(status)

    def _limits_changed(self, _status: int = 0) -> None:
        """Called by the native part when it meets another version of the limits."""
        raw, version = ffi.new("fshm_limit[4]"), ffi.new("uint64_t *")
        count = lib.fshm_limiter_limits(self._handle, raw, version)
        if self._planned is not None and version[0]:
            self._bind_limits(self._planned, version[0])
            return
        if count < 1:
            self._failed(lib.FSHM_E_DAMAGED)
        try:
            read = [limits.from_raw(raw[i], self._segment) for i in range(count)]
        except ValueError:  # numbers that no program can have set
            self._failed(lib.FSHM_E_DAMAGED)
        found = tuple(each for each in read if not isinstance(each, limits.Money))
        if len(found) != count:  # it is a budget's
            self._failed(lib.FSHM_E_ARGUMENT)
        if self._numbered is not None and len(found) == len(self._numbered):
            found = self._numbered
        self._bind_limits(found, version[0])

    @property
    def planned(self) -> bool:
        """Whether its limits are those of a plan."""
        return self._planned is not None

    def _bind_limits(self, found: tuple[LimitSpec | InFlight | Granted, ...], version: int) -> None:
        self._bind(
            self._handle,
            address(self._handle),
            found,
            self._reasons(found),
            version,
            _ON_FULL[self._on_full],
        )

    def _shares(self, _status: int) -> None:
        """Called by the native part, once a minute at most, when a shared counter has decided."""
        which, now = (self._segment.name, self._name), time.monotonic()
        if now - _told.get(which, -_TELL_SECONDS) < _TELL_SECONDS:
            return
        _told[which] = now
        log.warning(
            "limiter %r in segment %r: new keys find no room and share counters, so honest ones "
            "among them may be denied. Either a client makes keys up (limit by something that it "
            "cannot choose), or the segment is too small: `fast-shm inspect` tells",
            self._shown,
            self._segment.name,
        )

    @staticmethod
    def _reasons(found: tuple[LimitSpec | InFlight | Granted, ...]) -> tuple[str, ...]:
        """What check() says when each limit denies."""
        return tuple(limits.reason(limit) for limit in found)

    def _failed(self, status: int) -> NoReturn:
        """Called by the native part when a call neither admits nor denies."""
        raise failure(status, self._shown, self._segment)


class InnerLimits(SharedLimits):
    """Limits that a part of the package holds, and no user."""

    admit = Core._admit
    refused = Core._refused_permit
    in_flight = Core._in_flight
    settle = Core._settle
    remaining = Core._remaining
    end_keys_in = Core._end_keys_in

    @property
    def on_full(self) -> str:
        return self._on_full

    @staticmethod
    def _takes_over(found: tuple[LimitSpec | InFlight, ...], kinds: list[int]) -> bool:
        return False


class PermitLimits(InnerLimits):
    """One limit, of calls in flight."""

    _takes_over = staticmethod(SharedLimits._takes_over)


reserve, acquire_many, refused = Core._reserve, Core._acquire_many, Core._refused


def states_of(limiter: SharedLimits) -> States:
    """The states of its keys, for the package's own modules."""
    return States(limiter._handle, limiter._segment, limiter._shown)


def lease_from(
    limiter: SharedLimits,
    leased: States,
    refused: States,
    *keys: dict[Any, int],
    **hooks: Callable[..., Any],
) -> None:
    """From now on a server grants, and the limiter spends what this host has leased of it. keys:
    with permits in use. hooks: what the native part calls, by name (csrc/python/py_cluster.h)."""
    for name, hook in hooks.items():
        setattr(limiter, name, hook)
    handles = leased.handle, refused.handle
    limiter._bind_cluster(handles[0], address(handles[0]), handles[1], address(handles[1]), *keys)


def key_bytes(key: object) -> bytes:
    """A key as the native part sees it: bytes, or the UTF-8 of a str (lone surrogates too)."""
    raw = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    if not isinstance(raw, bytes):
        raise TypeError(f"key must be a str or bytes, not {key!r}")
    return raw
