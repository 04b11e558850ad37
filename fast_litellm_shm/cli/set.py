"""``fast-shm set``: the limits of one key, in place of its plan's."""

from __future__ import annotations

import argparse
import os

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared.inspection import limiters_in
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import render, segments
from fast_litellm_shm.limiters import overrides


class _Named:
    """A limiter of the segment, by its name alone."""

    def __init__(self, segment: Segment, name: str) -> None:
        known = {
            raw: (bool(info.planned), bool(info.limits_count) and info.limits[0].kind)
            for _, raw, info in limiters_in(segment)
        }
        raw = name.encode("utf-8", "surrogatepass")
        if raw not in known:
            names = [each.decode("utf-8", "replace") for each in known]
            raise segments.no_such_limiter(name, segment, names)
        planned, kind = known[raw]
        if not planned:
            raise exceptions.SegmentError(
                f"limiter {name!r} in segment {segment.name!r}: all its keys have the same limits; "
                + (
                    "it is a budget, which add(key, usd) raises for one key"
                    if kind == lib.FSHM_MONEY
                    else "only the keys of a RateLimiter can have limits of their own: make it "
                    "with plans= or plan_of= (plans={} if there are none)"
                )
            )
        out = ffi.new("fshm_limiter **")
        status = lib.fshm_limiter_find(segment._handle, raw, len(raw), out)
        if status != lib.FSHM_OK:
            raise exceptions.SegmentDamagedError(
                f"limiter {name!r} in segment {segment.name!r} cannot be opened (error {status})"
            )
        self.name, self.segment = name, segment
        self._handle = owned(out[0], lib.fshm_limiter_close, segment._handle)


def run(args: argparse.Namespace) -> int:
    """Set or remove the override of a key, and print what it has now."""
    segment = segments.open_for_writing(args.name, args.allow_other_owner)
    limiter, key = _Named(segment, args.limiter), os.fsencode(args.key)
    shown = f"key '{render.escaped(key)}' of limiter '{render.escaped(args.limiter)}'"
    if args.plan:
        had = overrides.get(limiter, key)
        overrides.put(limiter, key, ())
        said = "has the limits of its plan again" if had else "had no limits of its own"
        print(f"{shown[0].upper()}{shown[1:]} {said}.")
        return 0
    found = limits.checked(args.limit)
    overrides.put(limiter, key, found)
    its = " + ".join(map(limits.describe, found))
    print(f"{shown[0].upper()}{shown[1:]} has {its} from now on, until `fast-shm set --plan`.")
    return 0
