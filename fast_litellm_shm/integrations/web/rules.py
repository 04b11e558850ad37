"""Rule: the limits of some requests, whom these count for, and what they cost."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.integrations.web.keys import KeyFunction, client_address
from fast_litellm_shm.integrations.web.path_pattern import PathPattern
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.limiters.waiting import wish
from fast_litellm_shm.limits import InFlight, LimitSpec, Spelled

Cost: TypeAlias = int | tuple[int, ...]
CostFunction: TypeAlias = Callable[[Request], Cost | Awaitable[Cost]]
TenantFunction: TypeAlias = Callable[[Request], "str | None | Awaitable[str | None]"]
WeightFunction: TypeAlias = Callable[[Request], "float | Awaitable[float]"]
PriorityFunction: TypeAlias = Callable[[Request], "int | Awaitable[int]"]
_Matcher: TypeAlias = Callable[[str], object]


def _matchers(path: str | re.Pattern[str] | None) -> tuple[str, _Matcher, _Matcher]:
    """How each path begins that matches, the functions that match a path, and the same where a
    ``{name}`` may be empty."""
    if path is None:
        return "", _every, _every
    if not isinstance(path, str):
        return "", path.fullmatch, path.fullmatch
    pattern = PathPattern(path)
    matches = pattern.matches
    if not pattern.has_names:
        return pattern.beginning, matches, matches
    return pattern.beginning, matches, functools.partial(matches, empty_names=True)


def _every(path: str) -> bool:
    return True


def _printable(name: str) -> bool:
    return name.isascii() and name.isprintable()


class Rule:
    """The limits of some requests::

        Rule(TokenBucket(20, per=60), path="/v1/chat/*", methods={"POST"}, key=header("X-Api-Key"))

    limits: 0 to 4 of TokenBucket, FixedWindow, SlidingWindow, or text, such as ``"1000 per day in
    Europe/Berlin"``. A request is admitted when all of them have room.
    path: a pattern, in which ``{name}`` stands for one segment and ``*`` for anything; or a
    compiled regular expression, which must match the whole path; None: every path.
    methods: names of methods; GET includes HEAD; a websocket handshake is ``WEBSOCKET``; None: all.
    key: a function that says whom a request counts for, see ``docs/web.md``. If it returns None,
    the request is **not limited**: the rules after this one are not checked either.
    cost: what a request consumes, 0 or more; or a tuple with one cost for each limit; or a function
    of the request that returns either.
    in_flight: how many requests of a key may be in flight at the same time; a request is in flight
    until its body is sent. It counts as one limit. busy_status: the status of requests beyond that,
    429 or 503.
    wait: how many seconds a request may wait for its turn before it is refused; 0: not at all. A
    request that cannot be admitted in that time is refused at once. Requests wait in the queue of
    their key, over all processes; in ASGI, a request whose client has gone leaves it.
    tenant, weight, priority: of a request that waits, as of ConcurrencyLimiter.wait(): functions of
    the request; or constants, but for the tenant. max_waiting: a request is refused at once, if so
    many would be before it.
    exempt: keys that are not limited, as the key function returns them.
    dry_run: count and log, but refuse no request, and let none wait.
    name: names the limits in the segment and in the headers; printable ASCII; default: the methods
    and the path, or ``default``.

    A rule without limits and without in_flight exempts its requests.

    Raises ValueError or TypeError, which name the argument.
    """

    def __init__(
        self,
        *limits_: Spelled,
        path: str | re.Pattern[str] | None = None,
        methods: Iterable[str] | None = None,
        key: KeyFunction = client_address,
        cost: Cost | CostFunction = 1,
        in_flight: int | None = None,
        busy_status: int = 429,
        wait: float = 0,
        tenant: TenantFunction | None = None,
        weight: float | WeightFunction = 1.0,
        priority: int | PriorityFunction = 0,
        max_waiting: int | None = None,
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
        if busy_status not in (429, 503):
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
        self._check_waiting(wait, tenant, weight, priority, max_waiting, bool(chosen))
        verbs = None if methods is None else frozenset(each.upper() for each in methods)
        self.beginning, self._matches, self._may_match = _matchers(path)
        if name is None:
            shown = path.pattern if isinstance(path, re.Pattern) else path
            name = " ".join([*sorted(verbs or ()), *([shown] if shown else [])]) or "default"
            name = name if _printable(name) else ascii(name)
        if not isinstance(name, str) or not name or not _printable(name):
            raise ValueError(f"Rule: name must be printable ASCII, not {name!r}")
        self.limits, self.name = chosen, name
        self.public_name = name  # in the headers
        self.key, self.cost = key, cost
        self.in_flight, self.busy_status = in_flight, busy_status
        self.wait: float = 0 if dry_run else wait
        self.tenant, self.weight, self.priority = tenant, weight, priority
        self.max_waiting = max_waiting
        self.exempt = frozenset(map(key_bytes, exempt))
        self.dry_run = bool(dry_run)
        self._methods = verbs if verbs is None or "GET" not in verbs else verbs | {"HEAD"}

    @staticmethod
    def _check_waiting(
        wait: float, tenant: Any, weight: Any, priority: Any, max_waiting: Any, limited: bool
    ) -> None:
        if isinstance(wait, bool) or not isinstance(wait, (int, float)):
            raise TypeError(f"Rule: wait must be a number of seconds, not {wait!r}")
        if not 0 <= wait < math.inf:
            raise ValueError(f"Rule: wait must be a number of seconds of 0 or more, not {wait!r}")
        if wait and not limited:
            raise ValueError("Rule: wait is for rules with limits or in_flight, and this has none")
        if tenant is not None and not callable(tenant):
            raise TypeError(f"Rule: tenant must be a function of a request, not {tenant!r}")
        try:
            wish(
                None,
                1.0 if callable(weight) else weight,
                0 if callable(priority) else priority,
                max_waiting,
                None,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"Rule: {error}") from None
        given = {
            "tenant": (tenant, None),
            "weight": (weight, 1.0),
            "priority": (priority, 0),
            "max_waiting": (max_waiting, None),
        }
        for name, (value, default) in given.items():
            if not wait and value != default:
                raise ValueError(
                    f"Rule: {name} is for requests that wait: add wait=5, or leave {name} out"
                )

    def matches(self, request: Request) -> bool:
        """Does the rule apply to the request? Where the path has several readings, a rule with
        limits applies if one of them matches; a rule that exempts, only if all do."""
        if not self.takes(request.method):
            return False
        readings = request.readings
        if not self.limits:
            return all(map(self.has, readings.routed))
        return any(map(self.may_have, readings.routed)) or any(map(self.has, readings.aliases))

    def takes(self, method: str) -> bool:
        """Does the rule apply to the method?"""
        return self._methods is None or method in self._methods

    def has(self, path: str) -> bool:
        """Does the rule apply to the path, which is one reading of a request's path?"""
        return bool(self._matches(path))

    def may_have(self, path: str) -> bool:
        """The same, where a ``{name}`` may be empty: to Falcon, ``/users/`` is ``/users/{id}``."""
        return bool(self._may_match(path))

    @property
    def websockets_only(self) -> bool:
        """Does the rule apply to websocket handshakes alone?"""
        return self._methods == frozenset({"WEBSOCKET"})

    def __repr__(self) -> str:
        shown = ", ".join(limits.describe(limit) for limit in self.limits)
        return f"Rule({self.name!r}: {shown or 'exempt'})"


def _is_cost(value: object) -> bool:
    values = value if isinstance(value, tuple) else (value,)
    return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
