"""Limiters whose limits come with the calls: those of integrations/limits.py.

Each is only a name in the segment, and a key ends in its own limit, as PyPI's ``limits`` writes it:
``LIMITER/1.2.3.4/index/100/1/minute``.
"""

from __future__ import annotations

import re

from fast_litellm_shm.limits import SlidingWindow, Window

FIXED, SLIDING, MOVING = "limits fixed window", "limits sliding window", "limits moving window"
NAMES = (FIXED, SLIDING, MOVING)

_SECONDS = {
    b"second": 1,
    b"minute": 60,
    b"hour": 3600,
    b"day": 86_400,
    b"month": 2_592_000,
    b"year": 31_104_000,
}
_TAIL = re.compile(rb"/([0-9]{1,18})/([0-9]{1,9})/(second|minute|hour|day|month|year)\Z")


def limit_of(limiter: str, key: bytes) -> Window | SlidingWindow | None:
    """The limit that a key of one of NAMES names. None: it names none, or none that can be kept."""
    found = _TAIL.search(key)
    if found is None:
        return None
    amount, multiples = int(found[1]), int(found[2])
    try:
        kind = SlidingWindow if limiter == SLIDING else Window
        return kind(amount, multiples * _SECONDS[found[3]])
    except ValueError:
        return None


def without_limit(key: str) -> str:
    """A key as it is shown, without the limit at its end."""
    found = _TAIL.search(key.encode())
    return key.encode()[: found.start()].decode() if found else key
