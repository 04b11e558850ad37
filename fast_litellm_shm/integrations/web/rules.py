"""Rule: which requests, whom they count for, what they cost, and their limits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from typing import TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.integrations.web.keys import KeyFunction, client_address
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.limits import InFlight, LimitSpec

Cost: TypeAlias = int | tuple[int, ...]
CostFunction: TypeAlias = Callable[[Request], Cost | Awaitable[Cost]]

_NAME = re.compile(r"\{\w*\}")
_PERHAPS_EMPTY = "[^/]*?"  # Falcon routes /users/ to /users/{id}
_BUSY = (429, 503)


def pattern(path: str, name: str = "[^/]+?") -> re.Pattern[str]:
    """``{name}`` stands for one segment of the path, ``*`` for anything; all else for itself."""
    if not path.startswith(("/", "*")):
        raise ValueError(f"Rule: path must begin with '/', not {path!r}")
    if set("{}<>") & set(_NAME.sub("", path)):  # else it would match nothing, and limit nobody
        raise ValueError(
            f"Rule: path {path!r} has braces that are no {{name}}; write {{name}} for one segment, "
            "* for anything, or give a compiled regular expression"
        )
    numbers = itertools.count(1)
    first, *others = (_piece(each, name, numbers) for each in re.sub(r"\*+", "*", path).split("*"))
    if not others:
        return re.compile(first)
    *middle, last = others
    fixed = (_once(".*?" + each, numbers) for each in middle)
    return re.compile("".join([first, *fixed, ".*", last]), re.DOTALL)


def _once(expression: str, numbers: Iterator[int]) -> str:
    """Matches at the first end that it finds, and never tries another: here that could gain
    nothing, and takes a power of the length of a path that a client chooses. It is an atomic group,
    in the way that Python 3.10 has them."""
    name = f"_{next(numbers)}"
    return f"(?=(?P<{name}>{expression}))(?P={name})"


def _piece(text: str, name: str, numbers: Iterator[int]) -> str:
    """What stands between two stars."""
    first, *others = _NAME.split(text)
    out = [re.escape(first)]
    for left, each in zip(range(len(others) - 1, -1, -1), others, strict=True):
        part = name + re.escape(each)
        out.append(_once(part, numbers) if left and "/" not in each else part)
    return "".join(out)


def _printable(name: str) -> bool:
    return name.isascii() and name.isprintable()


class Rule:
    """The limits of some requests::

        Rule(TokenBucket(20, per=60), path="/v1/chat/*", methods={"POST"}, key=header("X-Api-Key"))

    limits: 0 to 4 of TokenBucket, FixedWindow, SlidingWindow; a request is admitted when all have
    room. path: ``{name}`` stands for one segment, ``*`` for anything, or a compiled regular
    expression that must match the whole; None: every path. methods: names of methods, GET standing
    for HEAD too; of a websocket's handshake it is ``WEBSOCKET``; None: all. key: whom a request
    counts for, see :mod:`fast_litellm_shm.integrations.web.keys`. cost: what a request charges, 0
    or more; or a function of the request; or a tuple with one for each limit. in_flight: at most so
    many requests of a key are answered at once, until their bodies are sent; counts as one limit.
    busy_status: how those beyond are answered, 429 or 503. exempt: keys that are not limited.
    dry_run: count and mark, and refuse nobody. name: what the limits are called in the segment and
    in the headers; printable ASCII; default: made of methods and path, or ``default``.

    A rule without limits and without in_flight exempts its requests.

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        *limits_: LimitSpec,
        path: str | re.Pattern[str] | None = None,
        methods: Iterable[str] | None = None,
        key: KeyFunction = client_address,
        cost: Cost | CostFunction = 1,
        in_flight: int | None = None,
        busy_status: int = 429,
        exempt: Collection[str | bytes] = (),
        dry_run: bool = False,
        name: str | None = None,
    ) -> None:
        if path is not None and not isinstance(getattr(path, "pattern", path), str):
            raise TypeError(f"Rule: path must be a str or a compiled pattern of str, not {path!r}")
        if isinstance(methods, str) or isinstance(exempt, (str, bytes)):
            which = "methods" if isinstance(methods, str) else "exempt"
            raise TypeError(f"Rule: {which} must be a set or list of names, not one str")
        if not callable(key):
            raise TypeError(f"Rule: key must be a function of a request, not {key!r}")
        if not callable(cost) and not _is_cost(cost):
            raise ValueError(
                f"Rule: cost must be an int of 0 or more, one for each limit, or a function, not "
                f"{cost!r}"
            )
        if busy_status not in _BUSY:
            raise ValueError(f"Rule: busy_status must be 429 or 503, not {busy_status!r}")
        chosen: tuple[LimitSpec | InFlight, ...] = limits.checked(limits_) if limits_ else ()
        if isinstance(cost, tuple) and len(cost) != len(chosen):
            raise ValueError(f"Rule: cost has {len(cost)} values for {len(chosen)} limits")
        if in_flight is not None:
            chosen += (limits.in_flight("Rule", "in_flight", in_flight),)
        if len(chosen) > lib.FSHM_MAX_LIMITS:
            raise ValueError(
                f"Rule: at most {lib.FSHM_MAX_LIMITS} limits, in_flight among them, not "
                f"{len(chosen)}"
            )
        verbs = None if methods is None else frozenset(each.upper() for each in methods)
        compiled = path if isinstance(path, re.Pattern) or path is None else pattern(path)
        loose = compiled
        if isinstance(path, str) and _NAME.search(path):
            loose = pattern(path, _PERHAPS_EMPTY)
        if name is None:
            shown = path.pattern if isinstance(path, re.Pattern) else path
            name = " ".join([*sorted(verbs or ()), *([shown] if shown else [])]) or "default"
            name = name if _printable(name) else ascii(name)
        if not isinstance(name, str) or not name or not _printable(name):
            raise ValueError(f"Rule: name must be printable ASCII, not {name!r}")
        self.limits, self.name = chosen, name
        self.key, self.cost = key, cost
        self.in_flight, self.busy_status = in_flight, busy_status
        self.exempt = frozenset(map(key_bytes, exempt))
        self.dry_run = bool(dry_run)
        self._matches = None if compiled is None else compiled.fullmatch
        self._may_match = None if loose is None else loose.fullmatch
        self._methods = verbs if verbs is None or "GET" not in verbs else verbs | {"HEAD"}

    def matches(self, request: Request) -> bool:
        """Is the request one of its? Where the path may mean several, a rule with limits takes
        each of them; one that exempts wants all."""
        if not self.takes(request.method):
            return False
        readings = request.readings
        if not self.limits:
            return all(map(self.has, readings.routed))
        return any(map(self.may_have, readings.routed)) or any(map(self.has, readings.aliases))

    def takes(self, method: str) -> bool:
        """Is it for this method?"""
        return self._methods is None or method in self._methods

    def has(self, path: str) -> bool:
        """Is it for this path, one reading of a request's?"""
        return self._matches is None or self._matches(path) is not None

    def may_have(self, path: str) -> bool:
        """The same to a router to which ``{name}`` may be empty."""
        return self._may_match is None or self._may_match(path) is not None

    @property
    def websockets_only(self) -> bool:
        """Is it for handshakes of websockets, and for nothing else?"""
        return self._methods == frozenset({"WEBSOCKET"})

    def __repr__(self) -> str:
        shown = ", ".join(limits.describe(limit) for limit in self.limits)
        return f"Rule({self.name!r}: {shown or 'exempt'})"


def _is_cost(value: object) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
