"""The side limiters of a limiter, over many hosts or with a limit that is learned: each keeps one
thing more for each of its keys.

A side limiter has the name of its limiter and one of these suffixes: ``api (wallet)`` is one of
``api``. A limiter that a user calls ``api (local)`` is one too, if ``api`` has leases.
"""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.native import ffi, lib

if TYPE_CHECKING:
    from fast_litellm_shm._shared.segment import Segment

# The suffixes are part of names in the segment, which workers of other versions use, too.
TOKEN_LEASES = " (wallet)"  # tokens that the server granted to this host, and are not used yet
PERMIT_LEASES = " (leases)"  # permits, likewise
REFUSED = " (refused)"  # back-off after a denial by the server
SINGLE_FLIGHT = " (asking)"  # one process asks the server for a key
LOCAL = " (local)"  # the limits during an outage, by this host's share
REPORTED = " (told)"  # what was reported of a sliding window
LEARNED = " (learned)"  # of AdaptiveConcurrency: the limits, and how they came
NOTE = "(cluster)"  # of no single limiter: the number of hosts

_HIDDEN = (PERMIT_LEASES, REFUSED, SINGLE_FLIGHT, LOCAL, REPORTED)
LONGEST = max(map(len, (TOKEN_LEASES, *_HIDDEN)))  # bytes


def has_leases(segment: Segment, limiter: bytes, suffix: str = TOKEN_LEASES) -> bool:
    """Whether the segment has a limiter of that name, with leases. (A limiter of a user's may have
    such a name, and has none.)"""
    out, name = ffi.new("fshm_limiter **"), limiter + suffix.encode()
    info = ffi.new("fshm_limiter_info *")
    if lib.fshm_limiter_find(segment._handle, name, len(name), out) != lib.FSHM_OK:
        return False
    found = lib.fshm_limiter_describe(out[0], info)
    lib.fshm_limiter_close(out[0])
    return bool(found == lib.FSHM_OK and are_leases(info))


def are_leases(info: Any) -> bool:
    """Of a ``fshm_limiter_info``: whether its limits are leases."""
    return bool(info.limits_count and info.limits[0].kind == lib.FSHM_LEASE)


def is_planned(segment: Segment, limiter: bytes) -> bool:
    """Whether the keys of the limiter have plans: then its name has no limits."""
    out, info = ffi.new("fshm_limiter **"), ffi.new("fshm_limiter_info *")
    if lib.fshm_limiter_find(segment._handle, limiter, len(limiter), out) != lib.FSHM_OK:
        return False
    found = lib.fshm_limiter_describe(out[0], info)
    lib.fshm_limiter_close(out[0])
    return bool(found == lib.FSHM_OK and info.planned)


def is_side_limiter(name: str, names: Container[str]) -> bool:
    """Whether a limiter is hidden in lists, among ``names``: all but the token leases, which show
    what this host may use."""
    if name == NOTE:
        return True
    if name.endswith(LEARNED) and name.removesuffix(LEARNED) in names:
        return True
    for suffix in _HIDDEN:
        base = name.removesuffix(suffix)
        if name.endswith(suffix) and base in names:
            return base + TOKEN_LEASES in names or base + PERMIT_LEASES in names
    return False
