"""Time zones, for windows of the calendar: what the tz database says, as the core keeps it."""

from __future__ import annotations

import functools
from datetime import datetime, timedelta, timezone, tzinfo
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.native import ffi, lib

UTC = "UTC"
# The years of which the core knows each change of a zone's clock. A segment lasts 4.5 years at most
# (csrc/DESIGN.md), and what lies beyond goes by the last change that is known.
_FIRST, _LAST = 2025, 2064
_STEP = timedelta(days=2)  # no zone changes its clock twice in so short a time
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MINUTE = timedelta(minutes=1)


def name_of(owner: str, zone: object) -> str:
    """The name of a zone that is given by name, or as a ``zoneinfo.ZoneInfo``. Raises TypeError or
    ValueError."""
    name = UTC if zone is timezone.utc else getattr(zone, "key", zone)
    if not isinstance(name, str):
        raise TypeError(f"{owner}: timezone must be a name such as 'Europe/Berlin', not {zone!r}")
    if name != UTC:
        _zone(owner, name)
    return name


def _zone(owner: str, name: str) -> tzinfo:
    import zoneinfo

    try:
        if 0 < len(name) <= 40:
            return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        pass
    raise ValueError(
        f"{owner}: timezone must be a name of the tz database, such as 'Europe/Berlin', not "
        f"{name!r} (where the system has no tz database: pip install tzdata)"
    )


@functools.lru_cache(maxsize=256)
def spans(name: str) -> tuple[int, ...]:
    """Each span of time in which the zone's clock differs from UTC by the same: the minute since
    1970 at which it begins, << 16, and the minutes east of UTC, + 32768."""
    zone = _zone("FixedWindow", name)

    def east(at: datetime) -> int:
        offset = at.astimezone(zone).utcoffset() or timedelta()
        return offset // _MINUTE

    at = datetime(_FIRST, 1, 1, tzinfo=timezone.utc)
    end = datetime(_LAST + 1, 1, 1, tzinfo=timezone.utc)
    now = east(at)
    found = [now + 32768]
    while at < end:
        next_at = at + _STEP
        if east(next_at) != now:
            before, after = at, next_at
            while after - before > _MINUTE:
                middle = before + (after - before) / 2 // _MINUTE * _MINUTE
                before, after = (middle, after) if east(middle) == now else (before, middle)
            now = east(after)
            found.append((after - _EPOCH) // _MINUTE << 16 | now + 32768)
            next_at = after
        at = next_at
    return tuple(found)


def index_of(segment: Any, name: str) -> int:
    """The index of a zone in a segment."""
    if name == UTC:
        return 0
    raw, known = name.encode(), spans(name)
    words = ffi.new("uint64_t[]", known)
    index = int(lib.fshm_zone(segment._handle, raw, len(raw), words, len(known)))
    if index == lib.FSHM_E_LIMITERS:
        raise exceptions.SegmentFullError(
            f"segment {segment.name!r} has no room for another time zone ({name!r}): it keeps 63; "
            "use fewer, or another segment"
        )
    if index < 1:
        raise ValueError(f"time zone {name!r} changes its clock too often (error {index})")
    return index


def name_at(segment: Any, index: int) -> str:
    """The name of the zone with this index. Raises ValueError: there is none."""
    if index == 0:
        return UTC
    out = ffi.new("char[41]")
    if lib.fshm_zone_name(segment._handle, index, out, 41) != lib.FSHM_OK:
        raise ValueError(f"no time zone {index}")
    found: bytes = ffi.string(out)
    return found.decode("utf-8", "replace")
