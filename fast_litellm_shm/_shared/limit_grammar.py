"""The words of a limit that is written as text: ``docs/limits.md``, "Limits as text"."""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn

# What a period may be called. Of the calendar: those that one of is a window of it.
SECONDS = {
    "s": 1, "sec": 1, "second": 1, "m": 60, "min": 60, "minute": 60, "h": 3600, "hr": 3600,
    "hour": 3600, "d": 86_400, "day": 86_400, "week": 7 * 86_400,
}  # fmt: skip
CALENDAR = ("hour", "day", "week", "month", "year")
_OPTIONS = ("burst", "strict", "window", "sliding", "nodelay")
_FORMS = (
    "'100 per minute', '100 per 30 s burst 10', '1000 per day in Europe/Berlin', '100 per minute "
    "window' or '100 per minute sliding'"
)
_WORD = re.compile(r"[A-Za-z_][\w+/-]*")


class Words(NamedTuple):
    """times: None where the text has none. zone, burst: None likewise. kind: window, sliding, or
    None. nginx: it begins with ``rate=``."""

    n: int
    times: float | None
    unit: str
    zone: str | None
    burst: int | None
    strict: bool
    kind: str | None
    nginx: bool


class BadText(ValueError):  # noqa: N818 - callers of the package see its base class
    """start, end: of what is wrong in the text."""

    def __init__(self, said: str, start: int, end: int) -> None:
        super().__init__(said)
        self.start, self.end = start, end

    def pointing(self, text: str, offset: int = 0) -> str:
        """The message, with the place below the text. offset: of this limit in the text."""
        if "\n" in text or not text.isprintable():
            return str(self)
        start, end = self.start + offset, self.end + offset
        return f"{self}\n  {text}\n  {' ' * start}{'^' * max(end - start, 1)}"


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.skip()

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def take(self, pattern: str) -> str | None:
        """What matches here, in any case; the reader goes on behind it, and behind spaces."""
        found = re.compile(pattern, re.IGNORECASE | re.ASCII).match(self.text, self.at)
        if found is None:
            return None
        self.at = found.end()
        self.skip()
        return found[0]

    def fail(self, why: str, start: int | None = None) -> NoReturn:
        """The word that begins here is wrong. Raises BadText."""
        at = self.at if start is None else start
        found = re.compile(r"[^\s=/]+|\S").match(self.text, at)
        end = at if found is None else found.end()
        raise BadText(f"a limit must be written as {_FORMS}, not {self.text!r}: {why}", at, end)

    def number(self, what: str) -> int:
        found = self.take(r"\d+(?![\d.])")
        if found is None:
            self.fail(f"{what} must be a whole number")
        if len(found) > 19:
            self.fail(f"{what} is too large", self.at - len(found))
        return int(found)


def read(text: str) -> Words:
    """The words of one limit. Raises BadText."""
    reader = _Reader(text)
    nginx = reader.take(r"rate\s*=") is not None
    n = reader.number("how many")
    reader.take(r"(?:r|reqs?|requests?)\b")
    if reader.take(r"/|per(?![a-z])") is None:
        reader.fail("'/' or 'per' must follow the number" + _meant(reader, ("per",)))
    times = reader.take(r"\d+(?:\.\d+)?")
    unit = _unit(reader)
    options = _Options(reader, nginx)
    while reader.at < len(reader.text):
        options.take()
    options.check()
    times_given = None if times is None else float(times)
    return Words(
        n, times_given, unit, options.zone, options.burst, options.strict, options.kind, nginx
    )


class _Options:
    """What follows the period, in any order that makes sense."""

    def __init__(self, reader: _Reader, nginx: bool) -> None:
        self._reader, self._nginx, self._nodelay = reader, nginx, False
        self.zone: str | None = None
        self.burst: int | None = None
        self.strict = False
        self.kind: str | None = None

    def take(self) -> None:
        """The next word."""
        reader = self._reader
        start, found = reader.at, _WORD.match(reader.text, reader.at)
        word = "" if found is None else found[0]
        said = word.lower()
        if said in _OPTIONS:
            reader.take(re.escape(word))
            self._option(said, start)
        elif self.zone is None and (said == "in" or word[:1].isupper()):
            self._zone(said)
        elif said == "zone":
            reader.fail("nginx's zone is the name of the limiter here; leave it out", start)
        else:
            reader.fail("this word is not known" + _meant(reader, (*_OPTIONS, "in")), start)

    def _option(self, said: str, start: int) -> None:
        if said == "burst" and self.burst is None and self.kind is None:
            self._reader.take("=")
            self.burst = self._reader.number("burst")
        elif said == "strict" and self.kind is None:
            self.strict = True
        elif said == "nodelay" and self._nginx:
            self._nodelay = True
        elif said == "nodelay":
            self._reader.fail("nodelay belongs to nginx's 'rate=10r/s burst=20 nodelay'", start)
        elif said in ("window", "sliding") and not (self.kind or self.burst or self.strict):
            self.kind = said
        else:
            self._reader.fail(f"{said!r} does not go with what is before it", start)

    def _zone(self, said: str) -> None:
        if said == "in":
            self._reader.take("in")
        self.zone = self._reader.take(_WORD.pattern)
        if self.zone is None:
            self._reader.fail("'in' goes with a time zone, such as Europe/Berlin")

    def check(self) -> None:
        """At the end of the text."""
        if not self._nginx:
            return
        if self.burst is not None and not self._nodelay:
            self._reader.fail(
                "without nodelay, nginx delays the requests of the burst; here a call waits where "
                "it is made to: write nodelay, or leave out burst and let calls wait (wait=)",
                0,
            )
        if self.zone is not None or self.kind is not None or self.strict:
            self._reader.fail("nginx's 'rate=' goes with burst and nodelay alone", 0)


def _unit(reader: _Reader) -> str:
    start = reader.at
    given = reader.take(r"[a-z]+")
    if given is None:
        reader.fail("a period must follow, such as minute")
    unit = given.lower()
    for each in (unit, unit.removesuffix("s")):
        if each in SECONDS or each in CALENDAR:
            return each
    raise BadText(
        "the period of a limit must be in seconds, minutes, hours, days or weeks, or one month or "
        f"year of the calendar, not {reader.text!r}{_near(unit, (*SECONDS, *CALENDAR))}",
        start,
        start + len(given),
    )


def _meant(reader: _Reader, known: tuple[str, ...]) -> str:
    found = _WORD.match(reader.text, reader.at)
    return "" if found is None else _near(found[0].lower(), known)


def _near(word: str, known: tuple[str, ...]) -> str:
    import difflib

    near = difflib.get_close_matches(word, known, 1)
    return f": do you mean {near[0]}?" if near else ""
