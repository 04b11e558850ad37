"""Outcome: the result of checking a request, and what the response says about it."""

from __future__ import annotations

from collections.abc import Iterable

from fast_litellm_shm import limits
from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm.integrations.web import responses
from fast_litellm_shm.integrations.web.rules import Rule
from fast_litellm_shm.limiters.grantors import Held
from fast_litellm_shm.limits import InFlight

MARK = "fast_litellm_shm.rate_limit"  # in the ASGI scope or the WSGI environ: the Outcome


class Outcome:
    """The result of checking a request; for the application, in ``scope[MARK]`` or
    ``environ[MARK]``.

    rule: the rule that applied. key: whom the request counted for. decision: None where the limits
    could not be checked. denied: a limit denied the request. refused: the request is therefore
    answered with ``status``; always False with ``dry_run``. expected: where it was refused because
    as many wait as may: seconds until it would have been served; None: not known.
    """

    __slots__ = (
        "_error_status",
        "_index",
        "_left",
        "_others",
        "_permit",
        "_policies",
        "_policy",
        "decision",
        "denied",
        "expected",
        "key",
        "refused",
        "rule",
    )

    def __init__(
        self,
        rule: Rule,
        key: str | bytes,
        admission: Held | None,
        policies: tuple[str, ...],
        policy: str,
        denied: bool,
        left: tuple[int, float] = (0, 0.0),
        error_status: int = 503,
    ) -> None:
        self.rule, self.key, self.denied, self._error_status = rule, key, denied, error_status
        self.refused = denied and not rule.dry_run
        self.decision: Decision | None = None if admission is None else admission.decision
        self._policies, self._policy, self._left = policies, policy, left
        self._permit = admission if admission else None
        self.expected: float | None = None
        self._others: tuple[Outcome, ...] = ()  # of more rules, where the path has several readings
        self._index = len(policies)  # of the limit that the decision names; len(policies): none
        if self.decision is not None:
            last = isinstance(self.decision.limit, InFlight)  # with a cluster, it is the first
            self._index = len(policies) - 1 if last else self.decision.limit_index

    @property
    def holds(self) -> bool:
        """Is a permit held, until release()?"""
        return self._permit is not None or any(each.holds for each in self._others)

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
        known = self._index < len(self._policies)
        return self._policies[self._index] if known else self.rule.public_name

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
        if self.rule.dry_run:
            return [("X-RateLimit-Dry-Run", "denied")] if self.denied else []
        retry = self.retry_after if self.denied else None
        retry_fields = [] if retry is None else [("Retry-After", str(retry))]
        if self.decision is None:
            return retry_fields
        found = [("RateLimit-Policy", self._policy)]
        permits_alone = self.decision.limit is None or (
            isinstance(self.decision.limit, InFlight) and not self.denied
        )
        if not permits_alone and self._index < len(self._policies):
            found += responses.rate_limit(self._policies[self._index], self.decision, *self._left)
        return found + retry_fields

    def headers_beside(self, present: Iterable[str]) -> responses.Headers:
        """The headers to add to a response that has those in ``present``. Headers that are present
        stay as they are. Only lists get more elements: an inner middleware may have begun them."""
        names = {name.lower() for name in present}
        return [
            (name, value)
            for name, value in self.headers()
            if name.lower() in responses.LISTS or name.lower() not in names
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
