"""Requests to the proxy in flight in this process, and their attempts at deployments: what each has
in the segment, and when it gives that back.

No hook looks a request up by its id alone: clients can choose the ``litellm_call_id``, also that of
a request which was not admitted."""

from __future__ import annotations

from fast_litellm_shm.integrations.litellm.admission import Admissions
from fast_litellm_shm.integrations.litellm.budgets.spending import Spending
from fast_litellm_shm.integrations.litellm.queue import Waited
from fast_litellm_shm.integrations.litellm.usage import Estimate


class Attempt:
    """One try of a call at one deployment."""

    __slots__ = ("admissions", "deployment", "ended")

    def __init__(self, deployment: str, admissions: Admissions) -> None:
        self.deployment, self.admissions = deployment, admissions
        self.ended = False

    def end(self, tokens: int | None) -> None:
        """The attempt is over. tokens: that it used; None: not known, or not yet."""
        if tokens is not None:
            self.admissions.settle(tokens)
        if not self.ended:
            self.ended = True
            self.admissions.release()


class Call:
    """One request to the proxy.

    auth: its ``UserAPIKeyAuth``. outer: the request that it was made for, such as the chat whose
    prompt an embedding serves. attempts: at deployments. fallbacks: the admissions for models that
    it fell back to. free_tries: so many tries belong to the request, each more counts as another
    request; None: all belong to it. usage_known: its whole answer has said how many tokens it used.
    waited: where it stood in a queue. spending: what it has reserved of budgets; that outlives its
    end, since LiteLLM says later what it cost. task_ended: its task has ended, but maybe not all of
    its attempts.
    """

    __slots__ = (
        *("admissions", "attempts", "auth", "estimate", "fallbacks", "finished", "free_tries"),
        *("id", "outer", "spending", "task_ended", "tries", "usage_known", "waited"),
    )

    def __init__(
        self,
        id: str,
        admissions: Admissions,
        estimate: Estimate,
        auth: object = None,
        outer: Call | None = None,
    ) -> None:
        self.id, self.admissions, self.estimate = id, admissions, estimate
        self.auth, self.outer = auth, outer
        self.free_tries: int | None = None
        self.tries = 0
        self.waited: Waited | None = None
        self.spending: Spending | None = None
        self.attempts: list[Attempt] = []
        self.fallbacks: list[Admissions] = []
        self.finished = self.task_ended = self.usage_known = False

    def attempt_at(self, deployment: str) -> Attempt | None:
        """Its newest attempt at the deployment that has not ended."""
        found = (a for a in reversed(self.attempts) if a.deployment == deployment and not a.ended)
        return next(found, None)

    def all_admissions(self) -> tuple[Admissions, ...]:
        return self.admissions, *self.fallbacks

    def counts_for(self) -> set[tuple[str, str]]:
        """Kind and value of all its subjects."""
        return {subject[:2] for each in self.all_admissions() for subject in each.subjects}

    def finish(self) -> None:
        """The request is over, and so are its attempts. Its usage may still be reported."""
        self.finished = True
        for attempt in self.attempts:
            attempt.end(None)
        for each in self.all_admissions():
            each.release()

    def settle(self, tokens: int) -> None:
        """All its calls together used so many tokens."""
        calls = self.estimate.calls
        if calls.fastest:  # only one answer is known: the others were asked for, and dropped
            tokens *= calls.total
        if not self.admissions.settled:
            self.estimate.learn(tokens)
        self.admissions.settle(tokens, calls.total)
        for each in self.fallbacks:
            each.settle(tokens)

    def cancel(self) -> None:
        """The request will not be made: it is given back too."""
        for each in self.all_admissions():
            each.cancel()
        self._spent_nothing()
        self.finish()

    def fail(self) -> None:
        """The request failed. Where no usage was reported, it used no tokens."""
        for each in self.all_admissions():
            if not each.settled:
                each.settle(0)
        self._spent_nothing()
        self.finish()

    def _spent_nothing(self) -> None:
        if self.spending is not None:
            self.spending.release()
