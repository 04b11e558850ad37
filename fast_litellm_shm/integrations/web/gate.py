"""Gate: asks the first rule that matches a request, and says how to go on. No framework here."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from fast_litellm_shm import limits
from fast_litellm_shm.exceptions import FastShmError, SegmentFullError
from fast_litellm_shm.handle import SharedLimits, key_bytes
from fast_litellm_shm.integrations.web import answers
from fast_litellm_shm.integrations.web.keys import client_address
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.integrations.web.rules import Cost, Rule
from fast_litellm_shm.limits import InFlight
from fast_litellm_shm.native import Decision, Permit, lib
from fast_litellm_shm.segment import Segment

MARK = "fast_litellm_shm.rate_limit"  # in the ASGI scope or the WSGI environ: the Outcome
_log = logging.getLogger("fast_litellm_shm")
_SILENCE = 10.0  # s between two reports of one kind of failure: clients can cause them at will
_ON_ERROR = ("deny", "allow")


class Outcome:
    """What became of a request. In ``scope[MARK]`` or ``environ[MARK]`` for whoever comes after.

    rule: the one that matched. key: whom it counted for. decision: None where the limiter could
    not be asked. denied: one of the limits said no. refused: and so it is answered with ``status``;
    not with ``dry_run``.
    """

    __slots__ = (
        "_permit",
        "_policies",
        "_policy",
        "_unasked",
        "decision",
        "denied",
        "key",
        "refused",
        "rule",
    )

    def __init__(
        self,
        rule: Rule,
        key: str | bytes,
        permit: Permit | None,
        policies: tuple[str, ...],
        policy: str,
        denied: bool,
        unasked: int = 503,
    ) -> None:
        self.rule, self.key, self.denied, self._unasked = rule, key, denied, unasked
        self.refused = denied and not rule.dry_run
        self.decision: Decision | None = None if permit is None else permit.decision
        self._policies, self._policy = policies, policy
        self._permit = permit if permit else None  # false: it holds none

    @property
    def holds(self) -> bool:
        """Is a permit held, until release()?"""
        return self._permit is not None

    def release(self) -> None:
        """The answer has been sent, or will not be. Twice is harmless."""
        permit, self._permit = self._permit, None
        if permit is not None:
            permit.release()

    @property
    def violated(self) -> str | None:
        """The name of the limit that said no."""
        if self.decision is None or not self.denied:
            return None
        index = self.decision.limit_index
        return self._policies[index] if index < len(self._policies) else self.rule.name

    @property
    def status(self) -> int:
        """Of the refusal: 429, or as busy_status; where the limiter could not be asked 503, or 429
        if the segment is full."""
        if self.decision is None:
            return self._unasked
        return self.rule.busy_status if isinstance(self.decision.limit, InFlight) else 429

    def headers(self) -> answers.Headers:
        """For the answer, whoever gives it."""
        if self.rule.dry_run:
            return [("X-RateLimit-Dry-Run", "denied")] if self.denied else []
        if self.decision is None:
            return [("Retry-After", str(answers.BUSY_RETRY))] if self.denied else []
        found = [("RateLimit-Policy", self._policy)]
        index = self.decision.limit_index
        permits_alone = self.decision.limit is None or (
            isinstance(self.decision.limit, InFlight) and not self.denied
        )
        if not permits_alone and index < len(self._policies):
            found += answers.rate_limit(self._policies[index], self.decision)
        if self.denied:
            retry = answers.retry_after(self.decision)
            if retry is not None:
                found.append(("Retry-After", str(retry)))
        return found

    @property
    def retry_after(self) -> int | None:
        """Of a refusal: whole seconds; None: coming back does not help."""
        return answers.BUSY_RETRY if self.decision is None else answers.retry_after(self.decision)

    @property
    def detail(self) -> str:
        """Of a refusal: which limit, and what to do."""
        if self.decision is None:
            return "The rate limit cannot be checked at the moment."
        limit, retry = self.decision.limit, self.retry_after
        told = self.rule.name if limit is None else limits.describe(limit)
        if retry is None:
            return f"The limit is {told}. This request is larger than that: it never fits."
        return f"The limit is {told}. Try again in {retry} s."

    def refusal(self) -> tuple[int, answers.Headers, bytes]:
        """Status, headers and body for a refused request."""
        body = answers.problem(self.status, self.violated, self.detail, self.retry_after)
        fixed = [("Content-Type", answers.PROBLEM_TYPE), ("Content-Length", str(len(body)))]
        return self.status, [*self.headers(), *fixed], body


class _Opened:
    """A rule and its limits in the segment."""

    def __init__(self, rule: Rule, app: str, segment: Segment | None) -> None:
        self.rule = rule
        name = f"{app}: {rule.name}"
        if len(name.encode("utf-8", "replace")) > lib.FSHM_MAX_LIMITER_NAME:
            raise ValueError(
                f"{name!r}, the name of the application and of a rule, has more than "
                f"{lib.FSHM_MAX_LIMITER_NAME} bytes; give the rule a shorter: Rule(..., name=...)"
            )
        # A full segment is told as an error, which is logged: nobody's quota is used up.
        self.shared = SharedLimits(rule.limits, name=name, segment=segment, on_full="raise")
        self._described: tuple[Any, tuple[str, ...], str] | None = None

    def described(self) -> tuple[tuple[str, ...], str]:
        """Names of the limits, and RateLimit-Policy: of those in force, which may be changed."""
        found = self.shared.limits
        if self._described is None or self._described[0] is not found:
            names = answers.policy_names(self.rule.name, found)
            self._described = (found, names, answers.policy(names, found))
        return self._described[1:]

    def admit(self, key: str | bytes, cost: Cost) -> Outcome:
        if isinstance(cost, tuple) and self.rule.in_flight is not None:
            cost = (*cost, 1)
        permit = self.shared._admit(key, cost)
        return Outcome(self.rule, key, permit, *self.described(), not permit.decision.allowed)

    def unasked(self, key: str | bytes, denied: bool, error: FastShmError) -> Outcome:
        status = 429 if isinstance(error, SegmentFullError) else 503
        return Outcome(self.rule, key, None, *self.described(), denied, status)


class Gate:
    """rules: the first that matches a request is asked; a request that none matches is not limited.
    name: of the application; gates of the same name in the same segment share their counts.
    segment: default ``Segment.default()``. on_error: ``"deny"`` (503, or 429 where the segment is
    full) or ``"allow"`` what cannot be checked.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
    ) -> None:
        if on_error not in _ON_ERROR:
            raise ValueError(f"on_error must be 'deny' or 'allow', not {on_error!r}")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if not isinstance(rules, Iterable):
            raise TypeError(f"rules must be a list of Rule objects, not {rules!r}")
        found = tuple(rules)
        for rule in found:
            if not isinstance(rule, Rule):
                raise TypeError(f"rules must be Rule objects, not {rule!r}")
        _different_names(found)
        self.rules, self._on_error = found, on_error
        self._reported: dict[str, float] = {}
        self._rules: list[tuple[Rule, _Opened | None]] = [
            (rule, _Opened(rule, name, segment) if rule.limits else None) for rule in found
        ]

    def check(self, request: Request) -> Outcome | None:
        """Ask. None: not limited. Never raises what a key or cost function raises."""
        opened = self._find(request)
        if opened is None:
            return None
        try:
            key = _now(opened.rule.key(request), "key")
            cost = opened.rule.cost
            if callable(cost):
                cost = _now(cost(request), "cost")
        except Exception as error:
            key, cost = self._failing(opened, request, error), 1
        return self._admit(opened, request, key, cost)

    async def check_async(self, request: Request) -> Outcome | None:
        """check() where the key and cost functions may be async."""
        opened = self._find(request)
        if opened is None:
            return None
        try:
            found = opened.rule.key(request)
            key = await found if inspect.isawaitable(found) else found
            cost = opened.rule.cost
            if callable(cost):
                charged = cost(request)
                cost = await charged if inspect.isawaitable(charged) else charged
        except Exception as error:
            key, cost = self._failing(opened, request, error), 1
        return self._admit(opened, request, key, cost)

    def _find(self, request: Request) -> _Opened | None:
        for rule, opened in self._rules:
            if rule.matches(request):
                return opened
        return None

    def _admit(self, opened: _Opened, request: Request, key: Any, cost: Any) -> Outcome | None:
        if key is not None and not isinstance(key, (str, bytes)):
            error = TypeError(f"the key function gave {key!r}, which is no str, bytes or None")
            key, cost = self._failing(opened, request, error), 1
        if key is None or (opened.rule.exempt and key_bytes(key) in opened.rule.exempt):
            return None
        try:
            try:
                outcome = opened.admit(key, cost)
            except (TypeError, ValueError, OverflowError) as wrong:  # such a cost cannot be charged
                key = self._failing(opened, request, wrong)
                outcome = opened.admit(key, 1)
        except FastShmError as error:
            denied = self._on_error == "deny"
            told = "refused" if denied else "let through, uncounted"
            self._report(f"rule {opened.rule.name!r} cannot be checked; requests are {told}", error)
            return opened.unasked(key, denied, error)
        if outcome.denied and outcome.rule.dry_run:
            _log.info(
                "dry run: rule %r would have refused %s for key %r (%s)",
                outcome.rule.name,
                request,
                key,
                outcome.violated,
            )
        return outcome

    def _failing(self, opened: _Opened, request: Request, error: Exception) -> str:
        """A key or cost function failed: the request counts, as 1, for the client's address."""
        self._report(
            f"rule {opened.rule.name!r}: its key or cost function failed; such requests count as "
            "1, for the client's address",
            error,
        )
        return client_address(request)

    def _report(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._reported.get(what, -_SILENCE) >= _SILENCE:
            self._reported[what] = now
            _log.error("%s", what, exc_info=error)


def _different_names(rules: Sequence[Rule]) -> None:
    seen: set[str] = set()
    for rule in rules:
        if rule.limits and rule.name in seen:
            raise ValueError(
                f"two rules have the name {rule.name!r}, by which they are known in the segment; "
                "give one of them another: Rule(..., name=...)"
            )
        seen.add(rule.name)


def _now(value: Any, what: str) -> Any:
    if isinstance(value, Awaitable):
        if inspect.iscoroutine(value):
            value.close()
        raise TypeError(f"the {what} function is async, which only the ASGI middleware can await")
    return value
