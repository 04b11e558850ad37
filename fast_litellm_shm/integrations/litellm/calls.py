"""Calls in flight in this process: what each of them holds in the segment, and when it gives it
back, exactly once. Nobody finds one by its id: clients can choose the ``litellm_call_id``, also of
requests that were not admitted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from fast_litellm_shm.integrations.litellm import settings, usage
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subject
from fast_litellm_shm.quota import Admission, Quota

_TYPES = {"rpm": "requests", "tpm": "tokens", "max_parallel": "max_parallel_requests"}

_quotas: dict[tuple[Limits, str | None], Quota] = {}


def quota_of(limits: Limits) -> Quota:
    """The quota of these limits. All keys that have the same limits are keys of one quota: the
    segment has room for an 800th of its capacity in sets of limits, at most 2,048 (250 by
    default; over many hosts one takes up to nine places), never gives one back, and has room for as
    many keys as its capacity says. A key whose limits change begins anew."""
    chosen = settings.current().cluster
    found = _quotas.get((limits, chosen))
    if found is None:
        parts = (f"{n} {name}" for name, n in zip(limits._fields, limits, strict=True) if n)
        name = f"litellm {' '.join(parts)}"
        found = Quota(*limits, name=name, on_full="raise", cluster=settings.cluster())
        _quotas[limits, chosen] = found
    return found


class Denial(NamedTuple):
    """Which limit of whom denied. type: ``requests``, ``tokens`` or ``max_parallel_requests``, as
    LiteLLM calls them. remaining: what is left of it; of tokens that can be some, if too few.
    retry_after: seconds, at least 1."""

    subject: Subject
    type: str
    limit: int
    remaining: int
    retry_after: int


def _denial(subject: Subject, name: str, remaining: int, retry_after: float | None) -> Denial:
    seconds = 60 if retry_after is None else max(1, -int(-retry_after // 1))
    return Denial(subject, _TYPES[name], getattr(subject.limits, name), remaining, seconds)


Admitted: TypeAlias = "list[Admission] | Denial"


def _key(subject: Subject) -> str:
    return f"{subject.kind}:{subject.value}"


def admit(subjects: Sequence[Subject], tokens: int) -> Admitted:
    """Admit a call for all of them, or for none. Where one denies, what the others before it have
    booked is given back: it can have denied another call in between, and can never have let too
    many pass. Over many hosts this waits for the server where it has to be asked."""
    admitted: list[Admission] = []
    try:
        for subject in subjects:
            if subject.limits.nothing is not None:
                return _refused(subject, None, admitted)
            admission = quota_of(subject.limits).admit(_key(subject), tokens)
            if not admission.allowed:
                return _refused(subject, admission, admitted)
            admitted.append(admission)
    except BaseException:
        _cancel(admitted)
        raise
    return admitted


async def admit_async(subjects: Sequence[Subject], tokens: int) -> Admitted:
    """admit(), which never makes an event loop wait. Cancelled, it has admitted none of them."""
    known = _quotas.get((subjects[0].limits, settings.current().cluster)) if subjects else None
    if known is not None and not known.over_hosts:
        return admit(subjects, tokens)  # which waits for nobody, and costs less
    admitted: list[Admission] = []
    try:
        for subject in subjects:
            if subject.limits.nothing is not None:
                return _refused(subject, None, admitted)
            admission = await quota_of(subject.limits).admit_async(_key(subject), tokens)
            if not admission.allowed:
                return _refused(subject, admission, admitted)
            admitted.append(admission)
    except BaseException:
        _cancel(admitted)
        raise
    return admitted


def _refused(subject: Subject, by: Admission | None, admitted: list[Admission]) -> Denial:
    """by: None: its limit is 0."""
    _cancel(admitted)
    if by is None:
        return _denial(subject, str(subject.limits.nothing), 0, None)
    # the decision's own remaining is that of whichever limit has least, requests perhaps
    left = quota_of(subject.limits)._left(_key(subject))["tpm"] if by.reason == "tpm" else 0
    return _denial(subject, by.reason, left, by.retry_after)


def _cancel(admitted: list[Admission]) -> None:
    for admission in admitted:
        admission.cancel()


class Held:
    """What a call, or one attempt of it at a deployment, holds. ``over()`` gives the parallel slots
    back, ``settle()`` books the true tokens; each can come first, more than once, or never."""

    __slots__ = ("_admitted", "_settled", "subjects")

    def __init__(self, subjects: Sequence[Subject], admitted: list[Admission]) -> None:
        self.subjects, self._admitted = subjects, admitted
        self._settled = False

    def __del__(self) -> None:  # nobody is left who could end it
        self.over()

    def cancel(self) -> None:
        """It will not be made after all."""
        _cancel(self._admitted)

    @property
    def settled(self) -> bool:
        """Whether somebody has told the true tokens."""
        return self._settled

    def over(self) -> None:
        """It is over: others may have its slots."""
        for admission in self._admitted:
            admission.release()

    def settle(self, tokens: int) -> None:
        """It used so many tokens. Of several such reports the last one holds."""
        self._settled = True
        for admission in self._admitted:
            admission.settle(tokens)

    def remaining(self) -> list[tuple[Subject, dict[str, int]]]:
        """What each of those it counts for has left now, by ``rpm`` and ``tpm``."""
        return [
            (subject, admission._quota._left(admission._key))
            for subject, admission in zip(self.subjects, self._admitted, strict=True)
        ]

    @property
    def counts_tokens(self) -> bool:
        """Whether any of those it counts for has a limit of tokens."""
        return any(subject.limits.tpm is not None for subject in self.subjects)


class Attempt:
    """One try of a call at one deployment."""

    __slots__ = ("deployment", "ended", "held")

    def __init__(self, deployment: str, held: Held) -> None:
        self.deployment, self.held = deployment, held
        self.ended = False

    def end(self, tokens: int | None) -> None:
        """It is over, having used so many tokens (None: not known, or not yet)."""
        if tokens is not None:
            self.held.settle(tokens)
        if not self.ended:
            self.ended = True
            self.held.over()


class Call:
    """One request to the proxy. guess: of the tokens it will use. by: LiteLLM's object of whoever
    makes it. outer: the call that it was made for (the embedding of a prompt, say). told: whether
    its whole answer has told its tokens. left: whether its task has ended, and perhaps not all its
    attempts."""

    __slots__ = ("attempts", "by", "finished", "guess", "held", "id", "left", "outer", "told")

    def __init__(
        self, id: str, held: Held, guess: usage.Guess, by: object = None, outer: Call | None = None
    ) -> None:
        self.id, self.held, self.guess, self.by, self.outer = id, held, guess, by, outer
        self.attempts: list[Attempt] = []
        self.finished = self.left = self.told = False

    def attempt_at(self, deployment: str) -> Attempt | None:
        """Its newest attempt there that has not ended."""
        found = (a for a in reversed(self.attempts) if a.deployment == deployment and not a.ended)
        return next(found, None)

    def finish(self) -> None:
        """It is over. Its attempts are too. Its true tokens may yet be told."""
        self.finished = True
        for attempt in self.attempts:
            attempt.end(None)
        self.held.over()

    def settle(self, tokens: int) -> None:
        """Its true tokens."""
        if not self.held.settled:
            self.guess.learn(tokens)
        self.held.settle(tokens)

    def cancel(self) -> None:
        """It will not be made after all: its request is given back too."""
        self.held.cancel()
        self.finish()

    def fail(self) -> None:
        """It is over and failed: where nobody has told tokens, it used none."""
        if not self.held.settled:
            self.held.settle(0)
        self.finish()
