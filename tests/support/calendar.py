"""The calendar of a time zone by zoneinfo alone: what the core's windows are held against."""

from __future__ import annotations

import functools
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

PERIODS = ("hour", "day", "week", "month", "year")
USUAL = {"hour": 3600, "day": 86_400, "week": 604_800, "month": 2_592_000, "year": 31_536_000}
_EPOCH = datetime(1970, 1, 1)


def local(zone: ZoneInfo, minute: int) -> datetime:
    """The clock on the wall, so many minutes after 1970."""
    return datetime.fromtimestamp(minute * 60, zone).replace(tzinfo=None, fold=0)


@functools.lru_cache(maxsize=100_000)
def first_reached(zone: ZoneInfo, wall: datetime) -> int:
    """The first minute at which that clock shows this time, or a later one."""
    guess = (wall - _EPOCH) // timedelta(minutes=1)
    start = guess - 15 * 60
    while local(zone, start + 60) < wall:
        start += 60
    return next(at for at in range(start, start + 24 * 60) if local(zone, at) >= wall)


def midnight(zone: ZoneInfo, *day: int) -> int:
    """The first minute of a day: year, month, day."""
    return first_reached(zone, datetime(*day))  # type: ignore[arg-type]


def begins(per: str, day: date) -> date:
    """The first day of the period that the day is in."""
    if per == "week":
        return day - timedelta(days=day.weekday())
    if per == "month":
        return day.replace(day=1)
    return day.replace(month=1, day=1) if per == "year" else day


def following(per: str, day: date) -> date:
    """The first day of the next period."""
    lengths = {"day": 1, "week": 7, "month": 32, "year": 370}
    return begins(per, begins(per, day) + timedelta(days=lengths[per]))


def end(per: str, zone: ZoneInfo, minute: int) -> int:
    """When the window of this minute ends."""
    if per == "hour":
        at = minute + 1
        while local(zone, at).minute and (local(zone, at - 1).minute + 1) % 60:
            at += 1
        return at
    day = local(zone, minute).date()
    while True:
        day = following(per, day)
        found = first_reached(zone, datetime(day.year, day.month, day.day))
        if found > minute:
            return found


def minute_of(*wall: int, zone: str = "UTC") -> int:
    """Minutes since 1970 at this time of the zone's clock."""
    return int(datetime(*wall, tzinfo=ZoneInfo(zone)).timestamp()) // 60  # type: ignore[misc,arg-type]
