"""Limiters whose keys bring their own limits: each is only a name in the segment.

Of integrations/limits.py, whose limits come with the calls. A key ends in its own limit, as PyPI's
``limits`` writes it: ``LIMITER/1.2.3.4/index/100/1/minute``.

Of the LiteLLM plugin, whose quotas of one name differ in their numbers. A key ends in them:
``api_key:K/10 rpm/1000 tpm``. So any number of different limits are one limiter.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from fast_litellm_shm.limits import FixedWindow, SlidingWindow

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


_UNITS = ("rpm", "tpm", "max_parallel")
_NUMBER = re.compile(rb"/([0-9]{1,10}) (rpm|tpm|max_parallel)\Z")
NATIVE = "litellm parallel"  # of mode native, max_parallel alone


def name_for(units: Iterable[str]) -> str:
    """The plugin's limiter of quotas that have these: rpm, tpm, max_parallel."""
    return f"litellm {' '.join(units)}"


_UNITS_OF = {
    name_for(units): units for n in (1, 2, 3) for units in itertools.combinations(_UNITS, n)
} | {NATIVE: ("max_parallel",)}


def units_of(limiter: str) -> tuple[str, ...]:
    """What a limiter's keys have numbers of; none, where it is none of the plugin's."""
    return _UNITS_OF.get(limiter, ())


def tail_of(units: Iterable[str], numbers: Iterable[int]) -> str:
    """What a key ends in."""
    return "".join(f"/{number} {unit}" for unit, number in zip(units, numbers, strict=True))


def numbers_of(limiter: str, key: bytes) -> tuple[int, ...] | None:
    """The numbers that a key of one of the plugin's limiters ends in; None: it does not."""
    found: list[int] = []
    for unit in reversed(units_of(limiter)):
        number = _NUMBER.search(key)
        if number is None or number[2] != unit.encode():
            return None
        found.append(int(number[1]))
        key = key[: number.start()]
    return tuple(reversed(found))


def limit_of(limiter: str, key: bytes) -> FixedWindow | SlidingWindow | None:
    """The limit that a key of one of NAMES names. None: it names none, or none that can be kept."""
    found = _TAIL.search(key)
    if found is None:
        return None
    amount, multiples = int(found[1]), int(found[2])
    try:
        kind = SlidingWindow if limiter == SLIDING else FixedWindow
        return kind(amount, multiples * _SECONDS[found[3]])
    except ValueError:
        return None


def without_limit(key: str) -> str:
    """A key as it is shown, without the limit at its end."""
    raw = key.encode()
    while found := _TAIL.search(raw) or _NUMBER.search(raw):
        raw = raw[: found.start()]
    return raw.decode()
