"""The windows of LiteLLM's budgets: ``budget_duration``, and ``budget_reset_at`` where its database
has one."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import Any, NamedTuple

import litellm
from litellm.litellm_core_utils import duration_parser

# LiteLLM begins these with the clock: its "30d" ends on the first of the month, its "7d" on Monday.
_CALENDAR = {
    **dict.fromkeys(("1h", "60m", "hourly"), "hour"),
    **dict.fromkeys(("1d", "24h", "daily"), "day"),
    **dict.fromkeys(("7d", "1w", "weekly"), "week"),
    **dict.fromkeys(("30d", "1mo", "monthly"), "month"),
}
CALENDAR = {"hour": "1h", "day": "1d", "week": "7d", "month": "30d"}
_MOST = 1024  # windows that are remembered
_NEVER = float("inf")


class Window(NamedTuple):
    """per, timezone: of the Budget that keeps it. mark: of a window that is none of the calendar's:
    what tells it from others of the same budget; it is part of the key. until: seconds since 1970;
    later, it is another window. ends: when it should, by its mark."""

    per: str | None = None
    timezone: str = "UTC"
    mark: str = ""
    until: float = _NEVER
    ends: float = _NEVER


FOREVER = Window()
_known: dict[tuple[Any, Any, Any, Any], Window] = {}


def instant(moment: Any) -> float | None:
    """A time of LiteLLM's, which may be written as text, as seconds since 1970. Without a zone it
    is UTC. None: it is none."""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment.replace("Z", "+00:00"))
        except ValueError:
            return None
    if not isinstance(moment, datetime):
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def window_of(duration: Any, reset_at: Any = None) -> Window:
    """The window that it is now. Where LiteLLM's database says when it ends, it is LiteLLM's own,
    also while LiteLLM is late to end it."""
    if not duration:
        return FOREVER
    zone, begins = getattr(litellm, "timezone", None), getattr(litellm, "budget_reset_time", None)
    asked = duration, reset_at, zone, begins
    found = _known.get(asked)
    if found is None or time.time() >= found.until:
        if len(_known) >= _MOST:
            _known.clear()
        found = _known[asked] = _window(str(duration).strip().lower(), reset_at, zone, begins)
    return found


def _window(duration: str, reset_at: Any, zone: Any, begins: Any) -> Window:
    now, ends = time.time(), instant(reset_at)
    per = None if begins else _CALENDAR.get(duration)
    if per is not None:
        zone = zone if isinstance(zone, str) and zone else "UTC"
        until = duration_parser.get_next_standardized_reset_time(
            CALENDAR[per], datetime.now(timezone.utc), zone
        ).timestamp()
        if ends is None or ends <= now or abs(ends - until) < 1:
            return Window(per, zone, "", until)
    if ends is not None:
        return Window(mark=f" until {_text(ends)}", ends=ends)
    try:
        seconds = duration_parser.duration_in_seconds(duration)
    except ValueError:
        return FOREVER
    if seconds <= 0:
        return FOREVER
    until = float((now // seconds + 1) * seconds)  # as all workers count it, since 1970
    return Window(mark=f" until {_text(until)}", until=until, ends=until)


def _text(at: float) -> str:
    return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
