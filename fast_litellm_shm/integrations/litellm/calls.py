"""Calls in flight in this process: what each of them holds in the segment, and when it gives it
back, exactly once. Nobody finds one by its id: clients can choose the ``litellm_call_id``, also of
requests that were not admitted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import keyed
from fast_litellm_shm.integrations.litellm import failures, settings, usage
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subject
from fast_litellm_shm.limiters.quota import Admission, Quota

_TYPES = {"rpm": "requests", "tpm": "tokens", "max_parallel": "max_parallel_requests"}

_MOST_QUOTAS = 1024  # that this process keeps at hand
_ALONE = "limits of this host alone, not over many"

_quotas: dict[tuple[Limits, str | None], Quota] = {}


def quota_of(limits: Limits) -> Quota:
    """The quota of these limits. A key whose limits change begins anew.

    All sets of limits that have the same of rpm, tpm and max_parallel are one limiter of the
    segment, whatever their numbers are: there is no number of sets that could run out. Over many
    hosts each set takes up to nine places in the segment's table. Where that is full, a set is kept
    on this host alone, which is told."""
    chosen = settings.current().cluster
    found = _quotas.get((limits, chosen))
    if found is None:
        if len(_quotas) >= _MOST_QUOTAS:
            _quotas.clear()  # what calls hold stays with them
        found = _quotas[limits, chosen] = _over_hosts(limits) or _here(limits)
    return found


def _here(limits: Limits) -> Quota:
    name = keyed.name_for(unit for unit, n in zip(limits._fields, limits, strict=True) if n)
    return Quota(*limits, name=name, on_full="raise", cluster=False, _numbered=True)


def _over_hosts(limits: Limits) -> Quota | None:
    server = settings.cluster()
    if server is False:
        return None
    parts = (f"{n} {name}" for name, n in zip(limits._fields, limits, strict=True) if n)
    name = f"litellm {' '.join(parts)}"
    if not _quotas:  # before sets can have filled the table, all that this host alone could need
        for units in itertools.product((1, None), repeat=3):
            if any(units):
                _here(Limits(*units))
    try:
        return Quota(*limits, name=name, on_full="raise", cluster=server)
    except exceptions.SegmentFullError as error:
        failures.failed("keeping limits over many hosts", error, "they are " + _ALONE)
        return None


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


# What the call was charged, one for each subject; behind these, of a request that makes several
# calls, what holds the parallel slots of the others.
Admitted: TypeAlias = "list[Admission] | Denial"


def _key(subject: Subject) -> str:
    return f"{subject.kind}:{subject.value}"


def _tokens(subject: Subject, each: int) -> int:
    """each: of one call."""
    if subject.calls == 1:
        return each
    return min(each * subject.calls, subject.limits.tpm or 0)


def _more_slots(subject: Subject) -> int:
    return subject.calls - 1 if subject.limits.max_parallel else 0


def admit(subjects: Sequence[Subject], tokens: int) -> Admitted:
    """Admit a request for all of them, or for none. Where one denies, what the others before it
    have booked is given back: it can have denied another call in between, and can never have let
    too many pass. tokens: of one call. Over many hosts this waits for the server where it has to be
    asked."""
    return _admit(subjects, _quotas_of(subjects), tokens)


def _quotas_of(subjects: Sequence[Subject]) -> list[Quota | None]:
    """Of each; None: its limits admit nothing."""
    chosen, known = settings.current().cluster, _quotas.get
    return [
        known((s.limits, chosen)) or (quota_of(s.limits) if s.limits.nothing is None else None)
        for s in subjects
    ]


def _admit(subjects: Sequence[Subject], quotas: Sequence[Quota | None], tokens: int) -> Admitted:
    admitted: list[Admission] = []
    others: list[Admission] = []
    try:
        for subject, quota in zip(subjects, quotas, strict=True):
            if quota is None:
                return _refused(subject, None, admitted + others)
            key, several = _key(subject), subject.calls
            each = tokens if several == 1 else _tokens(subject, tokens)
            admission = quota._admit(key, each, several)
            admitted.append(admission)
            for _ in range(0 if several == 1 else _more_slots(subject)):
                if not admission.allowed:
                    break
                admission = quota._admit(key, 0, 0)
                others.append(admission)
            if not admission.allowed:
                return _refused(subject, admission, admitted + others)
    except BaseException:
        _cancel(admitted + others)
        raise
    return admitted + others if others else admitted


def admit_here(subjects: Sequence[Subject], tokens: int) -> Admitted | None:
    """admit(), where no server has to be asked; else None, and nothing is charged."""
    quotas = _quotas_of(subjects)
    for quota in quotas:
        if quota is not None and quota.over_hosts:
            return None
    return _admit(subjects, quotas, tokens)


async def admit_async(subjects: Sequence[Subject], tokens: int) -> Admitted:
    """admit(), which never makes an event loop wait. Cancelled, it has admitted none of them."""
    quotas = _quotas_of(subjects)
    admitted: list[Admission] = []
    others: list[Admission] = []
    try:
        for subject, quota in zip(subjects, quotas, strict=True):
            if quota is None:
                return _refused(subject, None, admitted + others)
            key = _key(subject)
            admission = await quota._admit_async(key, _tokens(subject, tokens), subject.calls)
            admitted.append(admission)
            for _ in range(_more_slots(subject)):
                if not admission.allowed:
                    break
                admission = await quota._admit_async(key, 0, 0)
                others.append(admission)
            if not admission.allowed:
                return _refused(subject, admission, admitted + others)
    except BaseException:
        _cancel(admitted + others)
        raise
    return admitted + others


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

    def settle(self, tokens: int, calls: int = 1) -> None:
        """All calls used so many tokens. Of several such reports the last one holds. Who was
        counted for some of the calls only is charged that part."""
        self._settled = True
        for subject, admission in zip(self.subjects, self._admitted, strict=False):
            part = tokens if subject.calls >= calls else -(-tokens * subject.calls // calls)
            admission.settle(part)

    def count_try(self) -> Denial | None:
        """Count another try of a call as another request; or who has none left for it. Nothing is
        asked of a server: over many hosts that is what this one has last heard."""
        limited = [
            (subject, admission)
            for subject, admission in zip(self.subjects, self._admitted, strict=False)
            if subject.limits.rpm is not None
        ]
        for subject, admission in limited:
            if admission._quota._left(admission._key)["rpm"] < 1:
                return _denial(subject, "rpm", 0, None)
        for _, admission in limited:
            admission._count_request()
        return None

    def requests_left(self) -> int | None:
        """Of whoever has least of them; None: they are not limited."""
        return min((left["rpm"] for _, left in self.remaining() if "rpm" in left), default=None)

    def remaining(self) -> list[tuple[Subject, dict[str, int]]]:
        """What each of those it counts for has left now, by ``rpm`` and ``tpm``."""
        return [
            (subject, admission._quota._left(admission._key))
            for subject, admission in zip(self.subjects, self._admitted, strict=False)
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
    makes it. outer: the call that it was made for (the embedding of a prompt, say). free: so many
    tries are the request's; each more counts as another; None: all are. told: whether its whole
    answer has told its tokens. left: whether its task has ended, and perhaps not all its
    attempts. more: what it holds besides, for models that it fell back to."""

    __slots__ = (
        *("attempts", "by", "finished", "free", "guess", "held", "id", "left", "more"),
        *("outer", "told", "tries"),
    )

    def __init__(
        self,
        id: str,
        held: Held,
        guess: usage.Guess,
        by: object = None,
        outer: Call | None = None,
    ) -> None:
        self.id, self.held, self.guess, self.by, self.outer = id, held, guess, by, outer
        self.free: int | None = None
        self.tries = 0
        self.attempts: list[Attempt] = []
        self.more: list[Held] = []
        self.finished = self.left = self.told = False

    def attempt_at(self, deployment: str) -> Attempt | None:
        """Its newest attempt there that has not ended."""
        found = (a for a in reversed(self.attempts) if a.deployment == deployment and not a.ended)
        return next(found, None)

    def counts_for(self) -> set[tuple[str, str]]:
        """Kind and value of all that it counts for."""
        return {subject[:2] for held in (self.held, *self.more) for subject in held.subjects}

    def finish(self) -> None:
        """It is over. Its attempts are too. Its true tokens may yet be told."""
        self.finished = True
        for attempt in self.attempts:
            attempt.end(None)
        for held in (self.held, *self.more):
            held.over()

    def settle(self, tokens: int) -> None:
        """Its true tokens, of all its calls."""
        made = self.guess.made
        if made.fastest:  # one answer tells, the others were asked for and left
            tokens *= made.calls
        if not self.held.settled:
            self.guess.learn(tokens)
        self.held.settle(tokens, made.calls)
        for held in self.more:
            held.settle(tokens)

    def cancel(self) -> None:
        """It will not be made after all: its request is given back too."""
        for held in (self.held, *self.more):
            held.cancel()
        self.finish()

    def fail(self) -> None:
        """It is over and failed: where nobody has told tokens, it used none."""
        for held in (self.held, *self.more):
            if not held.settled:
                held.settle(0)
        self.finish()
