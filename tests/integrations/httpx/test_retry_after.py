"""What a Retry-After means: whatever a server writes there."""

from __future__ import annotations

import email.utils
import time

import pytest

from fast_litellm_shm.integrations._httpx_upstream import retry_after

DATE = "Sun, 06 Nov 1994 08:49:37 GMT"
VALUES = {
    "0": 0.0,
    "120": 120.0,
    "  7 ": 7.0,
    "9" * 5000: 999_999_999_999_999_999.0,
    "-5": None,
    "1.5": None,
    "": None,
    "soon": None,
    "١٢": None,  # digits, and not ASCII
    "\x00": None,
    "Sun, 06 Nov 1994 08:49:47 GMT": 10.0,
    "Sunday, 06-Nov-94 08:49:47 GMT": 10.0,  # obsolete forms, which RFC 9110 has read all the same
    "Sun Nov  6 08:49:47 1994": 10.0,
    "Sun, 06 Nov 1994 08:00:00 GMT": 0.0,  # over
    "Sun, 99 Nov 1994 08:49:47 GMT": None,
    "Sun, 06 Nov 99999999999 08:49:47 GMT": None,
}


@pytest.mark.parametrize("value", VALUES, ids=lambda value: value[:30] or "empty")
def test_values(value: str) -> None:
    assert retry_after(value, DATE) == VALUES[value]


def test_none() -> None:
    assert retry_after(None, DATE) is None


@pytest.mark.parametrize("date", [None, "garbage"])
def test_a_date_by_our_own_clock(date: str | None) -> None:
    found = retry_after(email.utils.formatdate(time.time() + 100, usegmt=True), date)
    assert found is not None and 90 < found <= 100
