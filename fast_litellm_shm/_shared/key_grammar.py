"""The grammar of keys that end in their own limit, so that one limiter serves any number of limits.

integrations/limits.py: PyPI's ``limits`` gives a limit with each call, and its keys end in it:
``LIMITER/1.2.3.4/index/100/1/minute`` (100 in 1 minute).

The LiteLLM plugin: quotas of one name differ in their numbers, and their keys end in them:
``api_key:K/10 rpm/1000 tpm``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from fast_litellm_shm.limits import FixedWindow, SlidingWindow

# The three limiters of integrations/limits.py, by strategy.
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
_LIMIT = re.compile(rb"/([0-9]{1,18})/([0-9]{1,9})/(second|minute|hour|day|month|year)\Z")

_UNITS = ("rpm", "tpm", "max_parallel")
_NUMBER = re.compile(rb"/([0-9]{1,10}) (rpm|tpm|max_parallel)\Z")
NATIVE = "litellm parallel"  # of the plugin's mode "native": max_parallel alone


def name_for(units: Iterable[str]) -> str:
    """The plugin's limiter of quotas that have these units: rpm, tpm, max_parallel."""
    return f"litellm {' '.join(units)}"


_UNITS_OF = {
    name_for(units): units for n in (1, 2, 3) for units in itertools.combinations(_UNITS, n)
} | {NATIVE: ("max_parallel",)}


def units_of(limiter: str) -> tuple[str, ...]:
    """The units that the keys of a limiter end in; () for a limiter that is not the plugin's."""
    return _UNITS_OF.get(limiter, ())


def tail_of(units: Iterable[str], numbers: Iterable[int]) -> str:
    """The end of a key, for example ``/10 rpm/1000 tpm``."""
    return "".join(f"/{number} {unit}" for unit, number in zip(units, numbers, strict=True))


def numbers_of(limiter: str, key: bytes) -> tuple[int, ...] | None:
    """The numbers at the end of a key of one of the plugin's limiters; None: it has none."""
    found: list[int] = []
    for unit in reversed(units_of(limiter)):
        number = _NUMBER.search(key)
        if number is None or number[2] != unit.encode():
            return None
        found.append(int(number[1]))
        key = key[: number.start()]
    return tuple(reversed(found))


def limit_of(limiter: str, key: bytes) -> FixedWindow | SlidingWindow | None:
    """The limit at the end of a key of one of NAMES. None: there is none, or it is out of range."""
    found = _LIMIT.search(key)
    if found is None:
        return None
    amount, multiples = int(found[1]), int(found[2])
    try:
        kind = SlidingWindow if limiter == SLIDING else FixedWindow
        return kind(amount, multiples * _SECONDS[found[3]])
    except ValueError:
        return None


def without_limit(key: str) -> str:
    """A key as it is shown: without the limit at its end."""
    raw = key.encode()
    while found := _LIMIT.search(raw) or _NUMBER.search(raw):
        raw = raw[: found.start()]
    return raw.decode()
