"""Admits a request for all of its subjects, or for none; and what it then holds in the segment."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import key_grammar
from fast_litellm_shm.integrations.litellm import failures, settings
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subject, Subjects
from fast_litellm_shm.limiters import quota as inner
from fast_litellm_shm.limiters.quota import Admission, Quota
from fast_litellm_shm.limiters.waiting import run

NAMES = {"rpm": "requests", "tpm": "tokens", "max_parallel": "max_parallel_requests"}  # LiteLLM's
_MOST_QUOTAS = 1024  # that this process keeps open

_quotas: dict[tuple[Limits, str | None], Quota] = {}
_opened = object()  # another one when quotas are opened anew


def forget() -> None:
    """Open the quotas anew. Calls in flight keep those that they use."""
    global _opened
    _quotas.clear()
    _opened = object()


def quota_of(limits: Limits) -> Quota:
    """The quota of these limits. A key whose limits change begins anew.

    On one host, sets of limits that differ only in their numbers share one limiter of the segment,
    so there may be any number of sets. Over many hosts each set takes up to nine entries of the
    segment's table of limiters. Where the table is full, the set is kept on this host alone, and
    :mod:`.failures` reports that."""
    server = settings.current().cluster
    found = _quotas.get((limits, server))
    if found is None:
        if len(_quotas) >= _MOST_QUOTAS:
            forget()
        found = _quotas[limits, server] = _over_hosts(limits) or _on_this_host(limits)
    return found


def _on_this_host(limits: Limits) -> Quota:
    name = key_grammar.name_for(unit for unit, n in zip(limits._fields, limits, strict=True) if n)
    return inner.numbered_quota(*limits, name=name, on_full="raise")


def _over_hosts(limits: Limits) -> Quota | None:
    server = settings.cluster()
    if server is False:
        return None
    parts = (f"{n} {name}" for name, n in zip(limits._fields, limits, strict=True) if n)
    name = f"litellm {' '.join(parts)}"
    if not _quotas:  # before sets can fill the table: all limiters that this host alone may need
        for units in itertools.product((1, None), repeat=3):
            if any(units):
                _on_this_host(Limits(*units))
    try:
        return Quota(*limits, name=name, on_full="raise", cluster=server)
    except exceptions.SegmentFullError as error:
        alone = "they are limits of this host alone, not over many"
        failures.report("keeping limits over many hosts", error, alone)
        return None


class Denial(NamedTuple):
    """Which limit of which subject denied the request. type: ``requests``, ``tokens`` or
    ``max_parallel_requests``, LiteLLM's names. remaining: what is left of the limit; of tokens
    there may be some, but too few. retry_after: seconds, at least 1. wait: seconds until it may be
    admitted; 0.0: when a call in flight ends; None: never."""

    subject: Subject
    type: str
    limit: int
    remaining: int
    retry_after: int
    wait: float | None = None


def _denial(subject: Subject, name: str, remaining: int, retry_after: float | None) -> Denial:
    seconds = 60 if retry_after is None else max(1, -int(-retry_after // 1))
    limit = getattr(subject.limits, name)
    return Denial(subject, NAMES[name], limit, remaining, seconds, retry_after)


def denial_of_waiting(subject: Subject) -> Denial:
    """Of a request whose turn did not come in time: others wait for the subject before it."""
    names = reversed(Limits._fields)
    name = next(name for name in names if getattr(subject.limits, name) is not None)
    return _denial(subject, name, 0, 1.0)


def key_of(subject: Subject) -> str:
    """Its key in the quota of its limits."""
    return f"{subject.kind}:{subject.value}"


def _cancel(charges: Iterable[tuple[Subject, Admission]], slots: Iterable[Admission] = ()) -> None:
    for _, admission in charges:
        admission.cancel()
    for admission in slots:
        admission.cancel()


class Admissions:
    """What a request, or one attempt of it at a deployment, was admitted with. ``release()`` gives
    the parallel slots back, ``settle()`` charges the tokens that were used. Either may come first,
    more than once, or never. Nothing is given back twice.

    charges: each subject, and the admission that carries its charge. slots: of a request that makes
    several calls, those that hold the parallel slots of the other calls."""

    __slots__ = ("_charges", "_released", "_slots", "settled", "subjects")

    def __init__(
        self,
        subjects: Subjects,
        charges: Sequence[tuple[Subject, Admission]],
        slots: Sequence[Admission] = (),
    ) -> None:
        self.subjects, self._charges, self._slots = subjects, charges, slots
        self.settled = False  # whether the tokens that were used are known
        self._released = False

    def cancel(self) -> None:
        """The calls will not be made: the requests and tokens are given back too."""
        _cancel(self._charges, self._slots)

    def release(self) -> None:
        """The calls are over: other requests may have the slots."""
        if self._released:
            return
        for _, admission in self._charges:
            admission.release()
        for admission in self._slots:
            admission.release()
        self._released = True  # after it: an exception may strike in between

    __del__ = release  # no hook can reach them any more

    def settle(self, tokens: int, calls: int = 1) -> None:
        """The calls of the request together used so many tokens. Of several reports the last one
        holds. A subject that only some of the calls count for is charged their part."""
        self.settled = True
        for subject, admission in self._charges:
            part = tokens if subject.calls >= calls else -(-tokens * subject.calls // calls)
            admission.settle(part)

    def count_try(self) -> Denial | None:
        """Count another try of a call as another request; or say which subject has none left. No
        server is asked: over many hosts this goes by what it has last reported to this host."""
        limited = [each for each in self._charges if each[0].limits.rpm is not None]
        for subject, admission in limited:
            if inner.left_of(admission)[0] < 1:
                return _denial(subject, "rpm", 0, None)
        for _, admission in limited:
            inner.count_request(admission)
        return None

    def requests_left(self) -> int | None:
        """The fewest that a subject has left; None where none limits requests."""
        found = self.remaining()
        return min((left[0] for each, left in found if each.limits.rpm and left), default=None)

    def remaining(self) -> list[tuple[Subject, tuple[int, ...]]]:
        """What each subject has left now, of requests and tokens, if these are limited."""
        return [(subject, inner.left_of(admission)) for subject, admission in self._charges]


_Ask: TypeAlias = Callable[[Quota, str, int, int], Awaitable[Admission]]


async def _admit(subjects: Subjects, tokens: int, ask: _Ask) -> Admissions | Denial:
    """Where it is denied, or an exception strikes, it gives back what was admitted before."""
    charges: list[tuple[Subject, Admission]] = []
    slots: list[Admission] = []
    done = False
    try:
        for subject in subjects:
            limits = subject.limits
            if limits.zero is not None:
                return _denial(subject, limits.zero, 0, None)
            quota, key = quota_of(limits), key_of(subject)
            charge = tokens if subject.calls == 1 else min(tokens * subject.calls, limits.tpm or 0)
            more_slots = subject.calls - 1 if limits.max_parallel else 0  # one for each call
            admission = await ask(quota, key, charge, subject.calls)
            charges.append((subject, admission))
            for _ in range(more_slots if admission.allowed else 0):
                admission = await ask(quota, key, 0, 0)
                slots.append(admission)
                if not admission.allowed:
                    break
            if not admission.allowed:
                return _denied(subject, admission)
        done = True
        return Admissions(subjects, charges, slots)
    finally:
        if not done:
            _cancel(charges, slots)


def _denied(subject: Subject, by: Admission) -> Denial:
    # the decision's own remaining is of the limit that has least, maybe requests
    left = inner.left_of(by)[-1] if by.reason == "tpm" else 0
    return _denial(subject, by.reason, left, by.retry_after)


class _Prepared(NamedTuple):
    """What is asked of the segment for the same subjects each time, until quotas are opened anew,
    or the setting names another server. It keeps no quotas but those."""

    opened: object
    server: str | None
    asked: tuple[tuple[Subject, Quota, str], ...]


def _prepared(subjects: Subjects, server: str | None) -> _Prepared | None:
    asked, opened = [], _opened
    for subject in subjects:
        quota = _quotas.get((subject.limits, server))
        if quota is None or quota.over_hosts or subject.calls != 1:
            return None
        asked.append((subject, quota, key_of(subject)))
    return _Prepared(opened, server, tuple(asked))


def admit_here(subjects: Subjects, tokens: int) -> Admissions | Denial | None:
    """:func:`admit`, for nearly all requests, at half the cost: they make one call, and no server
    has to be asked. None: the request is another one, and nothing is charged."""
    server, prepared = settings.current().cluster, subjects.prepared
    if prepared is None or prepared[0] is not _opened or prepared[1] != server:
        prepared = subjects.prepared = _prepared(subjects, server)
        if prepared is None:
            return None
    charges: list[tuple[Subject, Admission]] = []
    done = False
    try:
        for subject, quota, key in prepared[2]:
            admission = inner.admit_calls(quota, key, tokens, 1)
            charges.append((subject, admission))
            if not admission.allowed:
                return _denied(subject, admission)
        done = True
        return Admissions(subjects, charges)
    finally:
        if not done:
            _cancel(charges)


def admit(subjects: Subjects, tokens: int) -> Admissions | Denial:
    """Admit a request for all subjects, or for none. tokens: the estimate of one call. Where one
    subject denies, the charges of those before it are given back: meanwhile they may have denied
    another request, but never admitted too many. Over many hosts this blocks where the server must
    be asked."""
    return run(_admit(subjects, tokens, _ask_here).__await__())


async def _ask_here(quota: Quota, key: str, tokens: int, requests: int) -> Admission:
    return inner.admit_calls(quota, key, tokens, requests)


async def admit_async(subjects: Subjects, tokens: int) -> Admissions | Denial:
    """:func:`admit`, which never blocks the event loop. Cancelled, it has admitted nothing."""
    return await _admit(subjects, tokens, inner.admit_calls_async)
