"""The header ``Retry-After``: how long a server wants to be left alone."""

from __future__ import annotations

import email.utils
import time
from datetime import timezone


def retry_after(value: str | None, date: str | None = None) -> float | None:
    """A ``Retry-After``, in seconds from now: of a number, or of an HTTP date (RFC 9110, 10.2.3).

    date: the ``Date`` of the response; with it, the server's clock need not agree with ours.
    None: there is no such header, or it cannot be read. 0.0: that time has passed.
    """
    if value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text[:18])  # 30 thousand million years are enough
    until = _instant(text)
    if until is None:
        return None
    now = _instant(date) if date is not None else None
    return max(until - (time.time() if now is None else now), 0.0)


def _instant(text: str) -> float | None:
    try:
        found = email.utils.parsedate_to_datetime(text.strip())
        if found.tzinfo is None:  # "-0000", and the obsolete forms: UTC all the same
            found = found.replace(tzinfo=timezone.utc)
        return found.timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
