"""Outcome: the result of checking a request, and what the response says about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import AnyStr, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm.integrations.web import responses
from fast_litellm_shm.integrations.web.rules import Rule
from fast_litellm_shm.limiters.grantors import Held
from fast_litellm_shm.limits import InFlight

MARK = "fast_litellm_shm.rate_limit"  # in the ASGI scope or the WSGI environ: the Outcome


Left: TypeAlias = tuple[int, float] | tuple[None, None]  # how much, and seconds until all is


class Outcome:
    """The result of checking a request; for the application, in ``scope[MARK]`` or
    ``environ[MARK]``.

    rule: the rule that applied. key: whom the request counted for. decision: None where the limits
    could not be checked. denied: a limit denied the request. refused: the request is therefore
    answered with ``status``; always False with ``dry_run``. expected: where it was refused because
    as many wait as may: seconds until it would have been served; None: not known.
    """

    __slots__ = ("__dict__", "_permit", "_policies", "decision", "denied", "key", "rule")

    expected: float | None = None
    #: Of the limit that the decision names; (None, None): what the decision has.
    left: Left = (None, None)
    _others: tuple[Outcome, ...] = ()  # of more rules, where the path has several readings
    _error_status = 503

    def __init__(
        self,
        rule: Rule,
        key: str | bytes,
        admission: Held | None,
        policies: responses.Policies,
        denied: bool,
    ) -> None:
        self.rule, self.key, self.denied = rule, key, denied
        self.decision: Decision | None = None if admission is None else admission.decision
        self._policies = policies
        self._permit = admission if admission else None

    @classmethod
    def unchecked(
        cls, rule: Rule, key: str | bytes, policies: responses.Policies, denied: bool, status: int
    ) -> Outcome:
        """Where the limits could not be checked. status: of a refusal."""
        outcome = cls(rule, key, None, policies, denied)
        outcome._error_status = status
        return outcome

    @property
    def refused(self) -> bool:
        return self.denied and not self.rule.dry_run

    def _place(self, decision: Decision) -> int:
        """Of the limit that the decision names, among the rule's; their number: none."""
        if isinstance(decision.limit, InFlight):  # with a cluster, it is the first
            return len(self._policies.names) - 1
        return decision.limit_index

    @property
    def holds(self) -> bool:
        """Is a permit held, until release()?"""
        if self._others:
            return self._permit is not None or any(each.holds for each in self._others)
        return self._permit is not None

    def release(self) -> None:
        """Release the permits: the response has been sent, or will not be. A second call does
        nothing."""
        permit, self._permit = self._permit, None
        try:
            if permit is not None:
                permit.release()
        finally:
            for each in self._others:
                each.release()

    @property
    def violated(self) -> str | None:
        """The name of the limit that denied the request."""
        if self.decision is None or not self.denied:
            return None
        names, place = self._policies.names, self._place(self.decision)
        return names[place] if place < len(names) else self.rule.public_name

    @property
    def status(self) -> int:
        """Of a refusal: 429, or the rule's busy_status. Where the limits could not be checked: 503,
        or 429 if the segment is full. 400 for a path with several readings, where those are
        refused."""
        if self.decision is None:
            return self._error_status
        return self.rule.busy_status if isinstance(self.decision.limit, InFlight) else 429

    def headers(self) -> responses.Headers:
        """The headers for the response, whether the application or the middleware made it."""
        return self._headers(self._policies.text, responses.as_text)

    def _headers(
        self,
        rendered: responses.Rendered[AnyStr],
        made: Callable[[str, str], tuple[AnyStr, AnyStr]],
    ) -> list[tuple[AnyStr, AnyStr]]:
        decision, denied = self.decision, self.denied
        if self.rule.dry_run:
            return [made("X-RateLimit-Dry-Run", "denied")] if denied else []
        found = []
        if decision is not None:
            policy, fields = rendered
            found.append(policy)
            limit, place = decision.limit, decision.limit_index
            if limit is None:
                place = len(fields)
            elif isinstance(limit, InFlight):
                place = self._place(decision) if denied else len(fields)
            if place < len(fields):
                policies = self._policies
                field = (
                    fields[place]
                    if policies.found[place] is limit
                    else responses.fields_of(policies.names[place], limit, made)  # as it was then
                )
                left, until_all = self.left
                field.add(found, decision, left, until_all, time.time())
        if denied and (retry := self.retry_after) is not None:
            found.append(made("Retry-After", str(retry)))
        return found

    def headers_beside(self, present: Iterable[str]) -> responses.Headers:
        """The headers to add to a response that has those in ``present``. Headers that are present
        stay as they are. Only lists get more elements: an inner middleware may have begun them."""
        names, found = {name.lower() for name in present}, self.headers()
        return [
            field
            for field in found
            if field[0].lower() in responses.LISTS or field[0].lower() not in names
        ]

    def pairs_with(self, present: Iterable[tuple[str, str]]) -> responses.Headers:
        """The headers of a response that has these, with ours."""
        present = list(present)  # PEP 3333 wants a list; servers take anything
        usual = self._policies.usual_text
        if usual is not None and (found := usual(present, self.decision, time.time())) is not None:
            return found
        names = (name for name, *_ in present if isinstance(name, str))
        return [*present, *self.headers_beside(names)]

    def raw_headers_with(self, present: Iterable[tuple[bytes, bytes]]) -> responses.RawHeaders:
        """The same, as ASGI has headers."""
        present = list(present)
        usual = self._policies.usual_raw
        if usual is not None and (found := usual(present, self.decision, time.time())) is not None:
            return found
        ours = self._headers(self._policies.raw, responses.as_bytes)
        names = {name.lower() for name, *_ in present if isinstance(name, bytes)}
        return [
            *present,
            *(field for field in ours if field[0] in responses.RAW_LISTS or field[0] not in names),
        ]

    @property
    def retry_after(self) -> int | None:
        """Of a refusal, in whole seconds; None: a later request is refused too."""
        if self.decision is None:
            return None if self._error_status == 400 else responses.BUSY_RETRY
        if self.expected is not None and self.decision.retry_after is not None:
            return responses.seconds(self.expected)
        return responses.retry_after(self.decision)

    @property
    def detail(self) -> str:
        """Of a refusal: which limit it is, and what to do."""
        if self.decision is None and self._error_status == 400:
            return "The path has several readings: write it without repeated slashes and dots."
        if self.decision is None:
            return "The rate limit cannot be checked at the moment."
        limit, retry = self.decision.limit, self.retry_after
        shown = self.rule.public_name if limit is None else limits.describe(limit)
        if retry is None:
            return f"The limit is {shown}. This request is larger than that: it never fits."
        return f"The limit is {shown}. Try again in {retry} s."

    def refusal(self) -> tuple[int, responses.Headers, bytes]:
        """Status, headers and body of the response to a refused request."""
        status = self.status
        fields, body = responses.problem(status, self.violated, self.detail, self.retry_after)
        return status, [*self.headers(), *fields], body


def combined(outcomes: list[Outcome], failed: bool = False) -> Outcome | None:
    """One outcome for a request that counts under several rules: the outcome of the rule that
    denied it, else the first one. If the request is refused, or could not be checked to the end
    (failed), all permits are released. What was consumed stays consumed."""
    if not outcomes:
        return None
    shown = next((each for each in reversed(outcomes) if each.denied), outcomes[0])
    if failed or shown.refused:
        for each in outcomes:
            each.release()
    elif len(outcomes) > 1:
        shown._others = tuple(each for each in outcomes if each is not shown)
    return shown
