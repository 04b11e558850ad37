"""What responses say about limits: header fields, and the body of a refusal.

- ``RateLimit-Policy`` and ``RateLimit``: draft-ietf-httpapi-ratelimit-headers-11, as lists of
  structured fields (RFC 9651).
- ``X-RateLimit-Limit``, ``-Remaining``, ``-Reset`` (Unix time): what most clients read.
- ``Retry-After``: whole seconds, rounded up (RFC 9110).
- The body: a problem (RFC 9457), of the type that the draft registers.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from http.client import responses
from typing import Any, AnyStr, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared.native import Decision, Fields
from fast_litellm_shm.limits import InFlight, LimitSpec

PROBLEM_TYPE = "application/problem+json"
_REGISTRY = "https://iana.org/assignments/http-problem-types#"
_CONCURRENT = 'qu="concurrent-requests"'  # the unit of a limit of requests in flight
_LARGEST = 999_999_999_999_999  # of an Integer in a structured field
#: Fields that are lists: an inner middleware may have added its own.
LISTS = frozenset({"ratelimit", "ratelimit-policy"})
#: Fields that a response may have already: the application's stay.
#: All begin with an x or an r, as csrc/python/py_fields.c expects.
SINGLE = frozenset(
    (*("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"),
     *("x-ratelimit-dry-run", "retry-after"))
)  # fmt: skip
RAW_LISTS, RAW_SINGLE = (frozenset(map(str.encode, names)) for names in (LISTS, SINGLE))
TRY_LATER = 1013  # closes a websocket: Try Again Later, of RFC 6455's registry
BUSY_RETRY = 1  # s: when a request in flight ends is not known

Headers = list[tuple[str, str]]
RawHeaders = list[tuple[bytes, bytes]]
Rendered: TypeAlias = "tuple[tuple[AnyStr, AnyStr], tuple[Fields[AnyStr], ...]]"
# The fields that a response has, the decision and Unix time; all fields of the response, or None.
Usual: TypeAlias = (
    "Callable[[list[tuple[AnyStr, AnyStr]], Decision | None, float], "
    "list[tuple[AnyStr, AnyStr]] | None]"
)


def answers_handshake(scope: Mapping[str, Any]) -> bool:
    """Can this server answer a websocket handshake with a status and headers?"""
    return "websocket.http.response" in (scope.get("extensions") or {})


def policy_names(rule: str, found: Iterable[LimitSpec | InFlight]) -> tuple[str, ...]:
    """A name for each limit of a rule, which both RateLimit fields use."""
    chosen = tuple(found)
    if len(chosen) == 1:
        return (rule,)
    return tuple(f"{rule} {limits.describe(limit)}" for limit in chosen)


def _string(text: str) -> str:
    """A String of structured fields; the text is printable ASCII."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def policy(names: Iterable[str], found: Iterable[LimitSpec | InFlight]) -> str:
    """The value of RateLimit-Policy."""
    items = []
    for name, limit in zip(names, found, strict=True):
        unit = _CONCURRENT if isinstance(limit, InFlight) else f"w={seconds(limits.longest(limit))}"
        items.append(f"{_string(name)};q={min(limit.n, _LARGEST)};{unit}")
    return ", ".join(items)


def seconds(value: float) -> int:
    """Whole seconds, rounded up, at least 1: a client must not retry too early."""
    return max(math.ceil(value), 1)


def as_text(name: str, value: str) -> tuple[str, str]:
    return name, value


def as_bytes(name: str, value: str) -> tuple[bytes, bytes]:
    """As ASGI has them."""
    return name.lower().encode(), value.encode()


def fields_of(
    name: str, limit: LimitSpec | InFlight, made: Callable[[str, str], tuple[AnyStr, AnyStr]]
) -> Fields[AnyStr]:
    """RateLimit and X-RateLimit-* of a limit, rendered but for the numbers of a request. made: of
    a field: as_text, or as_bytes."""
    return Fields(
        *made("RateLimit", f"{_string(name)};r="),
        made("X-RateLimit-Limit", str(limit.n)),
        made("X-RateLimit-Remaining", "")[0],
        made("X-RateLimit-Reset", "")[0],
        0.0 if isinstance(limit, InFlight) else limits.longest(limit),
    )


class Policies:
    """What responses say of the limits of a rule, whatever the request is. found: those in force;
    names: theirs; text and raw: RateLimit-Policy, and the fields of each limit. usual_text and
    usual_raw: the native call that adds all fields to those of a response, where a rule has one
    limit, which is not of requests in flight, and the request was admitted under it; None: of
    another rule, or of one with ``dry_run``."""

    def __init__(
        self, rule: str, found: tuple[LimitSpec | InFlight, ...], dry_run: bool = False
    ) -> None:
        self.found, self.names = found, policy_names(rule, found)
        self.text, self.raw = self._rendered(as_text), self._rendered(as_bytes)
        self.usual_text: Usual[str] | None = None
        self.usual_raw: Usual[bytes] | None = None
        if len(found) == 1 and not isinstance(found[0], InFlight) and not dry_run:
            (policy_text, (text,)), (policy_raw, (raw,)) = self.text, self.raw
            self.usual_text = functools.partial(text.all_with, SINGLE, policy_text, found[0])
            self.usual_raw = functools.partial(raw.all_with, RAW_SINGLE, policy_raw, found[0])

    def _rendered(self, made: Callable[[str, str], tuple[AnyStr, AnyStr]]) -> Rendered[AnyStr]:
        each = zip(self.names, self.found, strict=True)
        return (
            made("RateLimit-Policy", policy(self.names, self.found)),
            tuple(fields_of(*pair, made) for pair in each),
        )


NO_POLICIES = Policies("", ())


def rate_limit(name: str, decision: Decision, left: int, until_all: float) -> Headers:
    """RateLimit and X-RateLimit-*, of the limit that denied or that has least left. left: how much;
    until_all: seconds until nothing of it is used."""
    found: Headers = []
    fields_of(name, decision.limit, as_text).add(found, decision, left, until_all, time.time())
    return found


def retry_after(decision: Decision) -> int | None:
    """Whole seconds; None: a later request is denied too."""
    if isinstance(decision.limit, InFlight):
        return BUSY_RETRY
    retry = decision.retry_after
    return None if retry is None else seconds(retry)


def problem(
    status: int, violated: str | None, detail: str, retry: int | None
) -> tuple[Headers, bytes]:
    """The body of a problem, as JSON, and its headers. violated: the name of the policy that denied
    the request; None: no policy did."""
    kind = "about:blank"
    title = responses[status]
    if violated is not None:
        kind = _REGISTRY + ("quota-exceeded" if status == 429 else "temporary-reduced-capacity")
        title = (
            "Request cannot be satisfied as assigned quota has been exceeded"
            if status == 429
            else "Request cannot be satisfied due to temporary server capacity constraints"
        )
    found: dict[str, object] = {"type": kind, "title": title, "status": status, "detail": detail}
    if violated is not None:
        found["violated-policies"] = [violated]
    if retry is not None:
        found["retry-after"] = retry
    body = json.dumps(found).encode()
    return [("Content-Type", PROBLEM_TYPE), ("Content-Length", str(len(body)))], body
