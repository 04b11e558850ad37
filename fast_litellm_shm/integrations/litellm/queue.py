"""Lets a request wait for its turn instead of denying it, where the setting ``queue`` is given.

A request waits for the subject that has denied it, in the queue of that subject, which is one for
all workers of the host. Of a key, the tenants in the queue are its end users; else they are keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Mapping
from typing import Any, NamedTuple

from fast_litellm_shm._shared import moved_clock
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm._shared.wait_queue import Order, Place
from fast_litellm_shm.integrations.litellm import admission
from fast_litellm_shm.integrations.litellm.admission import Admissions, Denial
from fast_litellm_shm.integrations.litellm.settings import Queue
from fast_litellm_shm.integrations.litellm.subjects import Subject, Subjects
from fast_litellm_shm.limiters import quota as inner
from fast_litellm_shm.limiters.waiting import ASYNCIO, Steps, in_turn, run_async

_LOOK_NS = 1_000_000_000  # a request that waits for a slot looks for dead holders itself
_ASK_NS = 60_000_000  # over many hosts: after as long as a refusal is remembered


class Waited(NamedTuple):
    """position: of the request in its queue, 1 = the next: when it came, or when it gave up.
    seconds: that it waited."""

    position: int
    seconds: float


class _Watched(Place):
    """A place that remembers the position at its first turn."""

    def __init__(self, place: Place) -> None:
        self._place, self.position = place, 0

    def join(self) -> None:
        self._place.join()

    def turn(self) -> bool:
        found = self._place.turn()
        self.position = self.position or self._place.ahead + 1
        return found

    @property
    def ahead(self) -> int:
        return self._place.ahead

    def sleep(self, ns: int) -> Generator[Any, Any, None]:
        return self._place.sleep(ns)

    def served(self, cost: int) -> None:
        self._place.served(cost)

    def leave(self) -> None:
        self._place.leave()


def priority_of(queue: Queue, auth: Any) -> int:
    """The priority of a request: of the first of these names that the setting has: ``priority`` in
    the metadata of the key, and of its team; the key's alias; the team's alias and id. A client can
    choose none of them."""
    names = (
        (auth.metadata or {}).get("priority"),
        (auth.team_metadata or {}).get("priority"),
        *(getattr(auth, field, None) for field in ("key_alias", "team_alias", "team_id")),
    )
    named = (name for name in names if isinstance(name, str) and name in queue.priority_of)
    return next((queue.priority_of[name] for name in named), 0)


def _tenant(auth: Any, subject: Subject) -> int:
    """0: of none."""
    name = auth.end_user_id if subject.kind == "api_key" else auth.api_key
    if not name:
        return 0
    return int.from_bytes(hashlib.blake2b(str(name).encode(), digest_size=8).digest(), "big") >> 1


def _is_waited_for(subject: Subject) -> bool:
    if subject.limits.zero is not None:
        return False
    return inner.is_waited_for(admission.quota_of(subject.limits), admission.key_of(subject))


async def admit(
    subjects: Subjects, tokens: int, queue: Queue, auth: Any
) -> tuple[Admissions | Denial, Waited | None]:
    """Admit a request for all subjects, after those that wait for one of them already. It waits at
    most ``queue.max_wait`` seconds; and not at all where no wait would help. Cancelled, it has
    admitted nothing, and stands in no queue."""
    begun = monotonic_ns()
    deadline = begun + int(queue.max_wait * 1e9)
    found: Admissions | Denial | None = None
    at = next((subject for subject in subjects if _is_waited_for(subject)), None)
    if at is None:
        found = await admission.admit_async(subjects, tokens)
        if not isinstance(found, Denial) or _pause(found, deadline) is None:
            return found, None
        at = found.subject
    position = 0
    while True:
        order = Order(_tenant(auth, at), 1000, priority_of(queue, auth))
        quota, key = admission.quota_of(at.limits), admission.key_of(at)
        place = _Watched(inner.place_of(quota, ASYNCIO, key, order))
        found = await run_async(_in_turn(place, at, subjects, tokens, deadline))
        position = position or place.position
        seconds = (monotonic_ns() - begun) / 1e9
        if isinstance(found, Denial) and found.subject != at and _pause(found, deadline):
            at = found.subject  # it waits for another one by now
            continue
        return found, Waited(place.position if isinstance(found, Denial) else position, seconds)


def _in_turn(
    place: _Watched, at: Subject, subjects: Subjects, tokens: int, deadline: int
) -> Steps[Admissions | Denial]:
    def attempt() -> Steps[tuple[Admissions | Denial, int | None]]:
        found = yield from admission.admit_async(subjects, tokens).__await__()
        if not isinstance(found, Denial):
            place.served(tokens)
            return found, None
        pause = _pause(found, deadline) if found.subject == at else None
        if pause and found.wait:
            moved_clock.jump(admission.quota_of(at.limits).segment, pause)
        return found, pause

    def refused() -> Denial:
        place.position = place.ahead + 1
        return admission.denial_of_waiting(at)

    return in_turn(ASYNCIO, place, attempt, refused, deadline)


def _pause(denial: Denial, deadline: int) -> int | None:
    """For how many ns at most to wait for the next attempt; None: waiting does not help."""
    if denial.wait is None or monotonic_ns() + denial.wait * 1e9 > deadline:
        return None
    if denial.wait:
        return max(int(denial.wait * 1e9), 1_000_000)
    return _ASK_NS if admission.quota_of(denial.subject.limits).over_hosts else _LOOK_NS


def headers_of(waited: Waited | None) -> Mapping[str, str]:
    """What tells the client that it waited, and where."""
    if waited is None:
        return {}
    return {
        "x-ratelimit-queue-position": str(waited.position),
        "x-ratelimit-queue-seconds": f"{waited.seconds:.3f}",
    }
