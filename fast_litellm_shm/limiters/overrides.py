"""Overrides: limits of one key in place of its plan's, which any process sets in the segment."""

from __future__ import annotations

from typing import Any, Protocol

from fast_litellm_shm import limits
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.states import failure
from fast_litellm_shm.limits import LimitSpec


class Planned(Protocol):
    """A limiter whose keys have plans."""

    @property
    def name(self) -> str: ...
    @property
    def segment(self) -> Segment: ...
    @property
    def _handle(self) -> Any: ...


def put(limiter: Planned, key: str | bytes, its: tuple[LimitSpec, ...]) -> None:
    """From the next call on, in every process, the key has these limits (at most 3); (): those of
    its plan. Raises ValueError for more, SegmentFullError if there is no room."""
    raw = key_bytes(key)
    if len(its) > lib.FSHM_MAX_OVERRIDE:
        raise ValueError(
            f"an override takes at most {lib.FSHM_MAX_OVERRIDE} limits, not {len(its)}: give the "
            "key a plan instead"
        )
    array = ffi.new("fshm_limit[]", [each._raw(limiter.segment) for each in its] or 1)
    status = lib.fshm_override_set(limiter._handle, raw, len(raw), array, len(its))
    if status != lib.FSHM_OK:
        raise failure(status, limiter.name, limiter.segment)


def get(limiter: Planned, key: str | bytes) -> tuple[LimitSpec, ...]:
    """The limits of the key's override; (): it has none."""
    raw, out = key_bytes(key), ffi.new("fshm_limit[]", lib.FSHM_MAX_OVERRIDE)
    count = lib.fshm_override_get(limiter._handle, raw, len(raw), out)
    try:
        return limits.checked(limits.from_raw(out[i], limiter.segment) for i in range(count))
    except (TypeError, ValueError):  # none; or numbers that no program can have set
        return ()
