"""The limits that a limiter enforces: TokenBucket, FixedWindow, SlidingWindow."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from fast_litellm_shm._shared import limit_grammar, zones
from fast_litellm_shm._shared.native import ffi, lib

if TYPE_CHECKING:
    from decimal import Decimal

__all__ = [
    "FixedWindow",
    "Limit",
    "SlidingWindow",
    "TokenBucket",
    "Window",
    "describe",
    "parse",
    "parse_all",
]

_NS = 1_000_000_000
_PERIOD_NAMES = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}
# Of the calendar: the usual length, in seconds, and the longest.
_CALENDAR = {
    "hour": (3600, 5400),
    "day": (86_400, 90_000),
    "week": (7 * 86_400, 7 * 86_400 + 3600),
    "month": (30 * 86_400, 31 * 86_400 + 3600),
    "year": (365 * 86_400, 366 * 86_400),
}
_CALENDAR_NAMES = {usual: name for name, (usual, _) in _CALENDAR.items()}


def _whole(owner: str, name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be an int, not {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{owner}: {name} must be an int, not {value!r}") from None


def check_tokens(name: str, value: object) -> None:
    """Raises TypeError or ValueError for what is no number of tokens."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, not {value!r}")
    if value < 0:
        raise ValueError(f"{name} must be 0 or more, not {value!r}")
    if value >= 2**63:
        raise ValueError(f"{name} must be below 2**63, not {value!r}")


def _seconds(owner: str, value: object) -> float:
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        named = ", or 'hour', 'day', 'week', 'month' or 'year'" if owner == "FixedWindow" else ""
        raise TypeError(
            f"{owner}: per must be a number of seconds or a timedelta{named}, not {value!r}"
        )
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int that is too large for a float
        finite = False
    if not finite or value <= 0:
        raise ValueError(
            f"{owner}: per must be a positive, finite number of seconds, not {value!r}"
        )
    return value


def _check(owner: str, kind: int, n: int, per: float, burst: int, strict: bool) -> int:
    """The period in ns. Raises ValueError, which names the argument that is out of range."""
    if n < 1:
        raise ValueError(f"{owner}: n must be at least 1, not {n}")
    per_ns = round(per * _NS)
    least, most = (16_384 if kind == lib.FSHM_SLIDING else 1_000), 2**55
    if not least <= per_ns <= most:
        raise ValueError(
            f"{owner}: per must be between {least / 1e9:g} s and {most // _NS} s (416 days), "
            f"not {per!r}"
        )
    if kind == lib.FSHM_BUCKET and not 1 <= burst <= n:
        raise ValueError(f"{owner}: burst must be between 1 and n = {n}, not {burst}")
    if kind == lib.FSHM_BUCKET and strict and burst * per_ns // (n - burst + 1) >= 2**56 - 2**30:
        raise ValueError(
            f"{owner}: burst must be smaller for a strict limit of {n} in {per!r} s: {burst} would "
            "take more than 2 years to refill"
        )
    largest = ffi.new("uint64_t *")
    raw = ffi.new("fshm_limit *", (min(n, 2**63), per_ns, min(burst, 2**63), kind, strict))
    if lib.fshm_limit_check(raw, largest) != lib.FSHM_OK:
        hint = "" if kind == lib.FSHM_BUCKET else "; a TokenBucket can count more"
        raise ValueError(
            f"{owner}: n must be at most {largest[0]} for per = {per!r}, not {n}{hint}"
        )
    return per_ns


@dataclass(frozen=True)
class TokenBucket:
    """A token bucket: ``n`` tokens every ``per`` seconds, at most ``burst`` at one instant.

    In any interval of t seconds at most ``burst + n/per * t`` tokens are admitted. With
    ``strict=True`` the bucket refills more slowly, at ``(n - burst + 1) / per``, so that **any**
    interval of ``per`` seconds admits at most ``n``.

    n: at least 1, and at most one token a nanosecond. per: seconds (or a timedelta), 1 µs .. 416
    days. burst: 1 .. n, default n. Algorithm: GCRA, ITU-T I.371.

    Raises ValueError or TypeError naming the argument, its value and what is allowed.
    """

    n: int
    per: float = 60.0
    burst: int = field(default=None, kw_only=True)  # type: ignore[assignment]
    strict: bool = field(default=False, kw_only=True)
    _per_ns: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = _whole("TokenBucket", "n", self.n)
        per = _seconds("TokenBucket", self.per)
        burst = n if self.burst is None else _whole("TokenBucket", "burst", self.burst)
        strict = bool(self.strict)
        per_ns = _check("TokenBucket", lib.FSHM_BUCKET, n, per, burst, strict)
        vars(self).update(n=n, per=per, burst=burst, strict=strict, _per_ns=per_ns)  # it is frozen

    def _raw(self, segment: Any = None) -> tuple[int, int, int, int, int]:
        return (self.n, self._per_ns, self.burst, lib.FSHM_BUCKET, int(self.strict))


@dataclass(frozen=True)
class _Counted:
    _KIND: ClassVar[int]

    n: int
    per: float = 60.0
    _per_ns: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        n, per = _whole(owner, "n", self.n), _seconds(owner, self.per)
        per_ns = _check(owner, self._KIND, n, per, 0, False)
        vars(self).update(n=n, per=per, _per_ns=per_ns)

    def _raw(self, segment: Any = None) -> tuple[int, int, int, int, int]:
        return (self.n, self._per_ns, 0, self._KIND, 0)


@dataclass(frozen=True, repr=False)
class FixedWindow(_Counted):
    """A fixed window: at most ``n`` tokens in each window of ``per`` seconds, or in each
    ``"hour"``, ``"day"``, ``"week"``, ``"month"`` or ``"year"`` of the calendar.

    n: 1 .. 2,147,483,647. per in seconds (or a timedelta), 1 µs .. 416 days: a key's window begins
    with its first request; the next one begins with the first request after the end. The end of a
    window is rounded up, by at most 2n nanoseconds.

    per by name: windows begin when the clock on the wall of ``timezone`` says so, for all keys: at
    midnight, on Mondays, on the first of the month, on January 1. timezone: a name of the tz
    database, such as ``"Europe/Berlin"``, or a ``zoneinfo.ZoneInfo``; default UTC. See
    ``docs/limits.md``, "The calendar".
    """

    _KIND = lib.FSHM_WINDOW

    per: float | str = 60.0  # type: ignore[assignment]
    timezone: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.per, str) or self.per not in _CALENDAR:
            if self.timezone is not None:
                raise ValueError(
                    f"FixedWindow: timezone goes with per='hour', 'day', 'week', 'month' or "
                    f"'year', not with per={self.per!r}"
                )
            super().__post_init__()
            return
        n, usual = _whole("FixedWindow", "n", self.n), _CALENDAR[self.per][0]
        _check("FixedWindow", lib.FSHM_CALENDAR, n, usual, 0, False)
        zone = zones.UTC if self.timezone is None else zones.name_of("FixedWindow", self.timezone)
        vars(self).update(n=n, timezone=zone, _per_ns=usual * _NS)  # it is frozen

    def _raw(self, segment: Any = None) -> tuple[int, int, int, int, int]:
        if self.timezone is None:
            return super()._raw()
        return (
            self.n, self._per_ns, 0, lib.FSHM_CALENDAR, zones.index_of(segment, self.timezone),
        )  # fmt: skip

    def __repr__(self) -> str:
        zone = "" if self.timezone is None else f", timezone={self.timezone!r}"
        return f"FixedWindow(n={self.n!r}, per={self.per!r}{zone})"

    @classmethod
    def _of(cls, n: int, per_ns: int, zone: str) -> FixedWindow:
        """One that is in a segment: this process's tz database may not know its zone."""
        found = object.__new__(cls)
        per = _CALENDAR_NAMES[per_ns // _NS]
        vars(found).update(n=n, per=per, timezone=zone, _per_ns=per_ns)
        return found


@dataclass(frozen=True)
class SlidingWindow(_Counted):
    """A sliding window counter: of the previous window's count, it counts the part that lies within
    the last ``per`` seconds.

    ``current + previous * (that part, 0 .. 1) <= n``. n: up to about 120,000 a second (a
    TokenBucket can count more). per: seconds, 16.4 µs .. 416 days. The previous count is exact up
    to 255. A larger one is rounded up, by at most 0.8 %.
    """

    _KIND = lib.FSHM_SLIDING


@dataclass(frozen=True)
class InFlight:
    """At most ``n`` permits held at once: the limit of ConcurrencyLimiter and Quota(max_parallel=).
    n: 1 .. 100,000."""

    n: int

    def _raw(self, segment: Any = None) -> tuple[int, int, int, int, int]:
        return (self.n, 0, 0, lib.FSHM_PERMITS, 0)


@dataclass(frozen=True)
class Granted:
    """The token leases of a limit over many hosts (cluster/): what the server granted to this host.
    ``n``: the most tokens that one key's lease can hold."""

    n: int = 2**24 - 2

    def _raw(self, segment: Any = None) -> tuple[int, int, int, int, int]:
        return (self.n, 0, 0, lib.FSHM_LEASE, 0)


_FOREVER = 2**55  # per_ns of Money whose window never ends


@dataclass(frozen=True)
class Money:
    """At most ``n`` nano-dollars in each window of the calendar: the limit of a Budget. per: as of
    FixedWindow; None: one window that never ends."""

    n: int
    per: str | None
    timezone: str = zones.UTC

    def __post_init__(self) -> None:
        if self.per is not None and self.per not in _CALENDAR:
            raise ValueError(
                f"Budget: per must be 'hour', 'day', 'week', 'month', 'year' or None, not "
                f"{self.per!r}"
            )
        vars(self).update(timezone=zones.name_of("Budget", self.timezone))

    @property
    def _per_ns(self) -> int:
        return _FOREVER if self.per is None else _CALENDAR[self.per][0] * _NS

    def _raw(self, segment: Any = None) -> tuple[int, int, int, int, int]:
        zone = zones.index_of(segment, self.timezone)
        return (self.n, self._per_ns, 0, lib.FSHM_MONEY, zone)


NANO = 10**9  # nano-dollars of a dollar


def dollars(amount: int) -> Decimal:
    """Nano-dollars as dollars, exact, without zeros at the end: ``Decimal("0.0134")``."""
    from decimal import Decimal  # not for each worker that imports the package

    whole, rest = divmod(amount, NANO)
    if not rest:
        return Decimal(whole)
    return Decimal(f"{whole}.{rest:09}".rstrip("0"))


def in_flight(owner: str, name: str, n: object) -> InFlight:
    """An InFlight, or an error that names the argument."""
    found = _whole(owner, name, n)
    if not 1 <= found <= 100_000:
        raise ValueError(f"{owner}: {name} must be between 1 and 100,000, not {found}")
    return InFlight(found)


# Their first names, which stay.
Limit = TokenBucket
Window = FixedWindow

LimitSpec: TypeAlias = TokenBucket | FixedWindow | SlidingWindow
Spelled: TypeAlias = LimitSpec | str  # a str: parse_all() reads it

_BETWEEN = re.compile("[;,|]")


def parse(text: str) -> LimitSpec:
    """A limit that is written as text, as in a file of settings::

        100 per minute            TokenBucket(100, per=60)
        100 per 30 s burst 10     TokenBucket(100, per=30, burst=10); "strict" may follow
        1000 per day              FixedWindow(1000, per="day"): hour, day, week, month or year of
        1000 per day in Asia/Tokyo    the calendar, in UTC or in another time zone
        1000 per 24 hours window  FixedWindow(1000, per=86400)
        100 per minute sliding    SlidingWindow(100, per=60)
        rate=10r/s burst=20 nodelay   as nginx has it: 10 a second, and 21 at one instant

    ``/`` is short for ``per``, and ``describe()`` writes what it reads. What is counted may be said
    as requests (``5 requests per second``, ``5r/s``). Words may be in capitals. Raises ValueError,
    which points at the word that is wrong."""
    _check_text("parse", text)
    try:
        return _of_text(text)
    except limit_grammar.BadText as error:
        raise ValueError(error.pointing(text)) from None


def parse_all(text: str) -> tuple[LimitSpec, ...]:
    """Limits that are written as one text, with ``;``, ``,`` or ``|`` between them, as PyPI's
    ``limits`` has it: ``"10 per second; 1000 per day"``. Raises ValueError: it names the part, and
    points at the word."""
    _check_text("parse_all", text)
    parts, found, offset = _BETWEEN.split(text), [], 0
    if len(parts) == 1:
        return (parse(text),)
    for number, part in enumerate(parts, 1):
        where = f"limit {number} of {text!r}: "
        try:
            found.append(_of_text(part))
        except limit_grammar.BadText as error:
            raise ValueError(where + error.pointing(text, offset)) from None
        except ValueError as error:
            raise ValueError(where + str(error)) from None
        offset += len(part) + 1
    return tuple(found)


def _check_text(owner: str, text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"{owner}: a limit must be a str, such as '100 per minute', not {text!r}")


def _of_text(text: str) -> LimitSpec:
    words = limit_grammar.read(text)
    n, unit, zone = words.n, words.unit, words.zone
    if words.nginx:
        return _of_nginx(text, words)
    bucket = words.burst is not None or words.strict
    if words.times is None and unit in _CALENDAR and not bucket and words.kind != "sliding":
        return FixedWindow(n, per=unit, timezone=zone)
    whole = (0, len(text))
    if zone is not None:
        raise limit_grammar.BadText(
            f"a time zone goes with one hour, day, week, month or year, and no other kind of limit "
            f"than a window: '1000 per day in {zone}', not {text!r}",
            *whole,
        )
    if unit not in limit_grammar.SECONDS:
        days = {"month": 30, "year": 365}[unit] * (words.times or 1)
        raise limit_grammar.BadText(
            f"a month or a year is one of the calendar, and a window: '{n} per {unit}'; else write "
            f"days, such as '{n} per {days:g} days', not {text!r}",
            *whole,
        )
    seconds = (1.0 if words.times is None else words.times) * limit_grammar.SECONDS[unit]
    per = int(seconds) if seconds.is_integer() else seconds
    if words.kind is not None:
        return (SlidingWindow if words.kind == "sliding" else FixedWindow)(n, per)
    return TokenBucket(n, per, burst=words.burst, strict=words.strict)  # type: ignore[arg-type]


def _of_nginx(text: str, words: limit_grammar.Words) -> TokenBucket:
    """``rate=10r/s burst=20 nodelay``: at one instant, one request and the burst."""
    at_once = 1 + (words.burst or 0)
    if words.n < 1 or words.unit not in ("s", "m") or words.times is not None:
        raise limit_grammar.BadText(
            f"nginx's rate is 1 or more r/s or r/m, not {text!r}", 0, len(text)
        )
    longer = -(-at_once // words.n)  # periods that hold the burst
    per = limit_grammar.SECONDS[words.unit]
    return TokenBucket(words.n * longer, per * longer, burst=at_once)


def is_calendar(per_ns: int) -> bool:
    """Whether a window of the calendar has this usual length."""
    return per_ns % _NS == 0 and per_ns // _NS in _CALENDAR_NAMES


def longest(limit: LimitSpec) -> float:
    """Seconds that its ``per`` lasts at most."""
    if isinstance(limit.per, str):
        return float(_CALENDAR[limit.per][1])
    return limit.per


def from_raw(raw: Any, segment: Any) -> LimitSpec | InFlight | Granted | Money:
    """The limit that a ``fshm_limit`` of this segment describes. Raises ValueError."""
    if raw.kind == lib.FSHM_PERMITS:
        return InFlight(raw.n)
    if raw.kind == lib.FSHM_LEASE:
        return Granted(raw.n)
    if raw.kind == lib.FSHM_MONEY:
        money = object.__new__(Money)
        named = None if raw.per_ns == _FOREVER else _CALENDAR_NAMES[raw.per_ns // _NS]
        vars(money).update(n=raw.n, per=named, timezone=zones.name_at(segment, raw.strict))
        return money
    if raw.kind == lib.FSHM_CALENDAR:
        return FixedWindow._of(raw.n, raw.per_ns, zones.name_at(segment, raw.strict))
    seconds = raw.per_ns / _NS
    per: float = int(seconds) if seconds.is_integer() else seconds
    if raw.kind == lib.FSHM_BUCKET:
        return TokenBucket(raw.n, per, burst=raw.burst, strict=bool(raw.strict))
    if raw.kind == lib.FSHM_WINDOW:
        return FixedWindow(raw.n, per)
    return SlidingWindow(raw.n, per)


def reason(limit: LimitSpec | InFlight | Granted | Money) -> str:
    """The ``reason`` of ``check()`` when this limit denies."""
    if isinstance(limit, Money):
        return "Budget exceeded"
    if isinstance(limit, InFlight):
        return "Too many requests in flight"
    if isinstance(limit, Granted):
        return "Nothing granted"
    if isinstance(limit.per, str):
        return f"Rate limit exceeded (requests per {limit.per})"
    per = limit._per_ns / _NS
    period = _PERIOD_NAMES.get(int(per)) if per.is_integer() else None
    return f"Rate limit exceeded (requests per {period or f'{per:g} seconds'})"


def describe(limit: LimitSpec | InFlight | Granted | Money) -> str:
    """A short form for tables and for the default name of a limiter: ``100/60s burst 10``."""
    if isinstance(limit, InFlight):
        return f"{limit.n} in flight"
    if isinstance(limit, Money):
        period = "" if limit.per is None else f"/{limit.per} {limit.timezone}"
        return f"{dollars(limit.n):f} USD{period}"
    if isinstance(limit, Granted):
        return "granted"
    if isinstance(limit, FixedWindow) and limit.timezone is not None:
        return f"{limit.n}/{limit.per} {limit.timezone} window"
    per = limit._per_ns / _NS
    text = f"{limit.n}/{int(per) if per.is_integer() else per}s"
    if isinstance(limit, TokenBucket):
        text += f" burst {limit.burst}" if limit.burst != limit.n else ""
        return text + (" strict" if limit.strict else "")
    return text + (" window" if isinstance(limit, FixedWindow) else " sliding")


def described(limits: Sequence[LimitSpec | InFlight | Granted | Money]) -> list[str]:
    """describe() of the limits of a name. Of a budget, those after the first are its accounts."""
    shown = limits[:1] if limits and isinstance(limits[0], Money) else limits
    return [describe(limit) for limit in shown]


def checked(limits: Iterable[object]) -> tuple[LimitSpec, ...]:
    """The limits of a limiter, as objects or as text. Raises ValueError for none or more than 4,
    and for a text that is no limit; TypeError for others."""
    found: list[object] = []
    for given in limits:
        found += parse_all(given) if isinstance(given, str) else (given,)
    most = lib.FSHM_MAX_LIMITS
    if not 1 <= len(found) <= most:
        raise ValueError(f"a limiter takes 1 to {most} limits, not {len(found)}")
    for limit in found:
        if not isinstance(limit, (TokenBucket, FixedWindow, SlidingWindow)):
            raise TypeError(
                f"limits must be TokenBucket, FixedWindow or SlidingWindow, not {limit!r}"
            )
    return tuple(found)  # type: ignore[arg-type]
