"""Gate: asks the first rule that matches a request, and says how to go on. No framework here."""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any

from fast_litellm_shm import limits
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, SegmentFullError
from fast_litellm_shm.integrations.web import answers
from fast_litellm_shm.integrations.web.keys import client_address
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.integrations.web.rules import Cost, Rule
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument, Grantor, Held
from fast_litellm_shm.limits import InFlight

MARK = "fast_litellm_shm.rate_limit"  # in the ASGI scope or the WSGI environ: the Outcome
_log = logging.getLogger("fast_litellm_shm")
_DRY_RUN_SILENCE, _SHOWN = 1.0, 100  # s; characters of what a client sent
_SILENCE = 10.0  # s between two reports of one kind of failure: clients can cause them at will
_ON_ERROR = ("deny", "allow")
_ON_COST_ERROR = ("deny", "count")
_AMBIGUOUS = ("count", "refuse")
_NO_COST = (TypeError, ValueError, OverflowError)  # what a cost that cannot be charged raises


class Outcome:
    """What became of a request. In ``scope[MARK]`` or ``environ[MARK]`` for whoever comes after.

    rule: the one that matched. key: whom it counted for. decision: None where the limiter could
    not be asked. denied: one of the limits said no. refused: and so it is answered with ``status``;
    not with ``dry_run``.
    """

    __slots__ = (
        "_index",
        "_left",
        "_others",
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
        permit: Held | None,
        policies: tuple[str, ...],
        policy: str,
        denied: bool,
        left: tuple[int, float] = (0, 0.0),
        unasked: int = 503,
    ) -> None:
        self.rule, self.key, self.denied, self._unasked = rule, key, denied, unasked
        self.refused = denied and not rule.dry_run
        self.decision: Decision | None = None if permit is None else permit.decision
        self._policies, self._policy, self._left = policies, policy, left
        self._permit = permit if permit else None  # false: it holds none
        self._others: tuple[Outcome, ...] = ()  # of more rules, where the path may mean several
        self._index = len(policies)  # of the limit that it is about; beyond them: none
        if self.decision is not None:
            last = isinstance(self.decision.limit, InFlight)  # of many hosts, it is the first
            self._index = len(policies) - 1 if last else self.decision.limit_index

    @property
    def holds(self) -> bool:
        """Is a permit held, until release()?"""
        return self._permit is not None or any(each.holds for each in self._others)

    def release(self) -> None:
        """The answer has been sent, or will not be. Twice is harmless."""
        permit, self._permit = self._permit, None
        try:
            if permit is not None:
                permit.release()
        finally:
            for each in self._others:
                each.release()

    @property
    def violated(self) -> str | None:
        """The name of the limit that said no."""
        if self.decision is None or not self.denied:
            return None
        known = self._index < len(self._policies)
        return self._policies[self._index] if known else self.rule.name

    @property
    def status(self) -> int:
        """Of the refusal: 429, or as busy_status; where the limiter could not be asked 503, or 429
        if the segment is full; 400 for a path that may mean several, where those are refused."""
        if self.decision is None:
            return self._unasked
        return self.rule.busy_status if isinstance(self.decision.limit, InFlight) else 429

    def headers(self) -> answers.Headers:
        """For the answer, whoever gives it."""
        if self.rule.dry_run:
            return [("X-RateLimit-Dry-Run", "denied")] if self.denied else []
        if self.decision is None:
            told = self.denied and self._unasked != 400
            return [("Retry-After", str(answers.BUSY_RETRY))] if told else []
        found = [("RateLimit-Policy", self._policy)]
        permits_alone = self.decision.limit is None or (
            isinstance(self.decision.limit, InFlight) and not self.denied
        )
        if not permits_alone and self._index < len(self._policies):
            found += answers.rate_limit(self._policies[self._index], self.decision, *self._left)
        if self.denied:
            retry = answers.retry_after(self.decision)
            if retry is not None:
                found.append(("Retry-After", str(retry)))
        return found

    @property
    def retry_after(self) -> int | None:
        """Of a refusal: whole seconds; None: coming back does not help."""
        if self.decision is None:
            return None if self._unasked == 400 else answers.BUSY_RETRY
        return answers.retry_after(self.decision)

    @property
    def detail(self) -> str:
        """Of a refusal: which limit, and what to do."""
        if self.decision is None and self._unasked == 400:
            return (
                "The path may mean several: write it without repeated slashes, dots and the like."
            )
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
    """A rule and what grants its limits."""

    def __init__(self, rule: Rule, app: str, segment: Segment | None, grantor: Grantor) -> None:
        self.rule = rule
        name, most = f"{app}: {rule.name}", grantor.longest_name(rule.limits)
        if len(name.encode("utf-8", "replace")) > most:
            raise ValueError(
                f"{name!r}, the name of the application and of a rule, has more than {most} bytes; "
                "give the rule a shorter: Rule(..., name=...)"
            )
        # In a flood of new keys those without room are limited together; permits have no such
        # counter, so there a full segment is told as an error, which is logged.
        on_full = "raise" if rule.in_flight is not None else "share"
        self._grantor = grantor.quota(
            rule.limits, name=name, segment=segment, on_full=on_full, settles=False
        )
        self._described: tuple[Any, tuple[str, ...], str] | None = None

    def described(self) -> tuple[tuple[str, ...], str]:
        """Names of the limits, and RateLimit-Policy: of those in force."""
        found = self._grantor.limits  # those in force, which may be changed
        if self._described is None or self._described[0] != found:
            names = answers.policy_names(self.rule.name, found)
            self._described = (found, names, answers.policy(names, found))
        return self._described[1:]

    def admit(self, key: str | bytes, cost: Cost) -> Outcome:
        return self._outcome(key, self._grantor.admit(key, self._costs(cost)))

    async def admit_async(self, key: str | bytes, cost: Cost) -> Outcome:
        """admit() for asyncio: where a server must be asked, a thread does that. Cancelled, it
        holds nothing; what it was granted is consumed."""
        return self._outcome(key, await self._grantor.admit_async(key, self._costs(cost)))

    def _costs(self, cost: Cost) -> Cost:
        """With one for the permit."""
        if isinstance(cost, tuple) and self.rule.in_flight is not None:
            return (*cost, 1)
        return cost

    def _outcome(self, key: str | bytes, permit: Held) -> Outcome:
        decision, described = permit.decision, self.described()
        left = self._left(key, decision, len(described[0]))
        return Outcome(self.rule, key, permit, *described, not decision.allowed, left)

    def _left(self, key: str | bytes, decision: Decision, count: int) -> tuple[int, float]:
        """Of the limit that the decision names: what is left, and seconds until that is all.
        A decision itself tells the least and the longest of all its limits, so where there are
        several it is looked up, by what this host knows."""
        count -= self.rule.in_flight is not None
        if count < 2 or decision.limit_index >= count or self.rule.dry_run:
            return decision.remaining, decision.reset_after
        return self._grantor.of_limit(key, decision)

    def unasked(self, key: str | bytes, denied: bool, status: int = 503) -> Outcome:
        return Outcome(self.rule, key, None, *self.described(), denied, unasked=status)


class Gate:
    """rules: the first that matches a request is asked; a request that none matches is not limited.
    name: of the application; gates of the same name in the same segment share their counts.
    segment: default ``Segment.default()``. on_error: ``"deny"`` (503, or 429 where the segment is
    full) or ``"allow"`` what cannot be checked. on_cost_error, ambiguous_paths, cluster: as of the
    middleware.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment.
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        cluster: ClusterArgument = None,
    ) -> None:
        _one_of("on_error", on_error, _ON_ERROR)
        _one_of("on_cost_error", on_cost_error, _ON_COST_ERROR)
        _one_of("ambiguous_paths", ambiguous_paths, _AMBIGUOUS)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if not isinstance(rules, Iterable):
            raise TypeError(f"rules must be a list of Rule objects, not {rules!r}")
        found = tuple(rules)
        for rule in found:
            if not isinstance(rule, Rule):
                raise TypeError(f"rules must be Rule objects, not {rule!r}")
        _different_names(found)
        self.rules, self._on_error, self._on_cost_error = found, on_error, on_cost_error
        self._refuses = Rule(name="ambiguous path") if ambiguous_paths == "refuse" else None
        self._reported: dict[str, float] = {}
        self._dry_runs: dict[str, tuple[float, int]] = {}  # when last told, how many not since
        grantor = chosen(cluster)
        self._rules: list[tuple[Rule, _Opened | None]] = [
            (rule, _Opened(rule, name, segment, grantor) if rule.limits else None) for rule in found
        ]

    def check(self, request: Request) -> Outcome | None:
        """Ask. None: not limited. Never raises what a key or cost function raises. Over many hosts
        it may wait for the server."""
        if self._refuses is not None and len(request.readings.routed) > 1:
            return Outcome(self._refuses, "", None, (), "", True, unasked=400)
        outcomes: list[Outcome] = []
        try:
            for opened in self._find(request):
                outcome = self._check(opened, request)
                if outcome is not None:
                    outcomes.append(outcome)
                    if outcome.refused:
                        break
        except BaseException:
            _together(outcomes, refused=True)
            raise
        return _together(outcomes)

    async def check_async(self, request: Request) -> Outcome | None:
        """check() where the key and cost functions may be async. Waits for nobody but by await."""
        if self._refuses is not None and len(request.readings.routed) > 1:
            return Outcome(self._refuses, "", None, (), "", True, unasked=400)
        outcomes: list[Outcome] = []
        try:
            for opened in self._find(request):
                outcome = await self._check_async(opened, request)
                if outcome is not None:
                    outcomes.append(outcome)
                    if outcome.refused:
                        break
        except BaseException:  # cancelled, for one
            _together(outcomes, refused=True)
            raise
        return _together(outcomes)

    def _check(self, opened: _Opened, request: Request) -> Outcome | None:
        key: Any
        try:
            key = _now(opened.rule.key(request), "key")
        except Exception as error:
            key = self._no_key(opened, request, error)
        key = self._checked(opened, request, key)
        if key is None:
            return None
        cost = opened.rule.cost
        try:
            if callable(cost):
                cost = _now(cost(request), "cost")
        except Exception as error:
            if self._no_cost(opened, error):
                return opened.unasked(key, True)
            key, cost = client_address(request), 1
        try:
            try:
                outcome = opened.admit(key, cost)
            except _NO_COST as error:
                if self._no_cost(opened, error):
                    return opened.unasked(key, True)
                outcome = opened.admit(client_address(request), 1)
        except FastShmError as error:
            return self._unasked(opened, key, error)
        return self._told(outcome, request)

    async def _check_async(self, opened: _Opened, request: Request) -> Outcome | None:
        key: Any
        try:
            found = opened.rule.key(request)
            key = await found if inspect.isawaitable(found) else found
        except Exception as error:
            key = self._no_key(opened, request, error)
        key = self._checked(opened, request, key)
        if key is None:
            return None
        cost = opened.rule.cost
        try:
            if callable(cost):
                charged = cost(request)
                cost = await charged if inspect.isawaitable(charged) else charged
        except Exception as error:
            if self._no_cost(opened, error):
                return opened.unasked(key, True)
            key, cost = client_address(request), 1
        try:
            try:
                outcome = await opened.admit_async(key, cost)
            except _NO_COST as error:
                if self._no_cost(opened, error):
                    return opened.unasked(key, True)
                outcome = await opened.admit_async(client_address(request), 1)
        except FastShmError as error:
            return self._unasked(opened, key, error)
        return self._told(outcome, request)

    def _find(self, request: Request) -> list[_Opened]:
        """The first rule of each path by which the request may be routed; and before it those with
        limits that know that path by another name."""
        routed, aliases = request.readings.routed, request.readings.aliases
        found = []
        for rule, opened in self._rules:
            if not rule.takes(request.method):
                continue
            left = tuple(path for path in routed if not rule.has(path))
            if opened is not None and (
                left != routed or any(map(rule.may_have, routed)) or any(map(rule.has, aliases))
            ):
                found.append(opened)
            routed = left
            if not routed:
                break
        return found

    def _checked(self, opened: _Opened, request: Request, key: Any) -> str | bytes | None:
        """Whom to ask for, by what the function gave; None: the key is not limited."""
        if key is not None and not isinstance(key, (str, bytes)):
            error = TypeError(f"the key function gave {key!r}, which is no str, bytes or None")
            key = self._no_key(opened, request, error)
        if key is not None and opened.rule.exempt and key_bytes(key) in opened.rule.exempt:
            key = None
        found: str | bytes | None = key
        return found

    def _unasked(self, opened: _Opened, key: str | bytes, error: FastShmError) -> Outcome:
        denied = self._on_error == "deny"
        told = "refused" if denied else "let through, uncounted"
        self._report(f"rule {opened.rule.name!r} cannot be checked; requests are {told}", error)
        return opened.unasked(key, denied, 429 if isinstance(error, SegmentFullError) else 503)

    def _no_key(self, opened: _Opened, request: Request, error: Exception) -> str:
        """A key function failed: the request counts for the client's address."""
        self._report(
            f"rule {opened.rule.name!r}: its key function failed; such requests count for the "
            "client's address",
            error,
        )
        return client_address(request)

    def _no_cost(self, opened: _Opened, error: Exception) -> bool:
        """A cost function failed, or gave what cannot be charged. Is the request refused for it?"""
        denied = self._on_cost_error == "deny"
        told = "are refused" if denied else "count as 1, for the client's address"
        self._report(
            f"rule {opened.rule.name!r}: its cost function failed; such requests {told}", error
        )
        return denied

    def _report(self, what: str, error: Exception) -> None:
        now = time.monotonic()
        if now - self._reported.get(what, -_SILENCE) >= _SILENCE:
            self._reported[what] = now
            _log.error("%s", what, exc_info=error)

    def _told(self, outcome: Outcome, request: Request) -> Outcome:
        """The log says whom a dry run would have refused: of each rule one a second, and how many
        more there were. Clients cause such lines at will, and choose what is in them."""
        if outcome.denied and outcome.rule.dry_run:
            now, rule = time.monotonic(), outcome.rule.name
            last, more = self._dry_runs.get(rule, (-_DRY_RUN_SILENCE, 0))
            if now - last < _DRY_RUN_SILENCE:
                self._dry_runs[rule] = last, more + 1
                return outcome
            self._dry_runs[rule] = now, 0
            _log.info(
                "dry run: rule %r would have refused %s for key %s (%s)%s",
                rule,
                _cut(str(request)),
                _cut(repr(outcome.key)),
                outcome.violated,
                f"; and {more} more since the last such line" if more else "",
            )
        return outcome


def _one_of(argument: str, value: object, known: tuple[str, str]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be {known[0]!r} or {known[1]!r}, not {value!r}")


def _together(outcomes: list[Outcome], refused: bool = False) -> Outcome | None:
    """One outcome for a request that counts under several rules: that of the rule which denied,
    else of the first. Where it is refused, what the others hold is released; what they charged
    stays charged."""
    if not outcomes:
        return None
    told = next((each for each in reversed(outcomes) if each.denied), outcomes[0])
    if refused or told.refused:
        for each in outcomes:
            each.release()
    elif len(outcomes) > 1:
        told._others = tuple(each for each in outcomes if each is not told)
    return told


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


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
