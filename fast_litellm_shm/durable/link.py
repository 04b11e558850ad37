"""The link of one process to the state file of its segment."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.named_limiter import InnerLimits
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.side_limiters import has_leases, is_planned
from fast_litellm_shm.cluster import algorithms, link, names
from fast_litellm_shm.cluster.algorithms import Answer, Request
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.link import Link, log
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.durable.grants import Grants
from fast_litellm_shm.durable.settings import Place
from fast_litellm_shm.durable.store import Store
from fast_litellm_shm.limits import LimitSpec

COMPONENT, OUTAGES, VALUES = "durable", "durable_outage", "durable_values"
T = TypeVar("T")
_MOST = 200  # requests in one transaction
_CHARGING = ("charge", "fill", "refund")


class _Asked:
    """Requests of one call, which wait for a transaction."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.answers: list[Answer] | None = None
        self.error: Exception | None = None
        self.begun: _Asked | None = None  # whose thread answers it


class FileLink(Link):
    component, outages = COMPONENT, OUTAGES
    noted_as = link.FILE
    no_answer = "cannot be used"
    error = exceptions.StateFileError
    forgets, alone = False, True

    def __init__(self, place: Place, segment: Segment) -> None:
        super().__init__(place, segment)
        self.store = Store(place.path, place.timeout, place.on_outage == "allow")
        self.seal = names.Seal(segment) if segment.geometry().names else None
        self._asked: list[_Asked] = []
        self._asked_lock = threading.Lock()
        self.has_answered = False
        self._limiters: dict[bytes, TokenLeases] = {}  # of any process
        self.not_saved: dict[bytes, int] = {}  # keys that save() could not give back
        self._junk: set[bytes] = set()  # limiters whose junk was logged

    def rule(self, limit: LimitSpec) -> algorithms.Rule:
        return algorithms.unbounded_rule(limit)

    def hosts(self) -> int:
        return 1

    def keys(self, limiter: bytes) -> list[bytes]:
        self.check()
        return self._guarded(lambda: self._keys(limiter))

    def _keys(self, limiter: bytes) -> list[bytes]:
        with self.store.transaction(write=False) as t:
            rows = t.db.execute(
                "SELECT hash FROM key WHERE limiter = (SELECT id FROM limiter WHERE name = ?)",
                (limiter,),
            )
            return [bytes(row[0]) for row in rows]

    # transactions

    def _send(self, requests: Sequence[Request]) -> list[Answer]:
        """Threads that ask at once share a transaction: the first of them makes it."""
        asked = _Asked(requests)
        with self._asked_lock:
            self._asked.append(asked)
        if not self.store.lock.acquire(timeout=self.terms.timeout):
            self._give_up(asked)
            self.store.lock.acquire()
        try:
            if asked.answers is None and asked.error is None:
                self._answer_all(asked)
        finally:
            self.store.lock.release()
        if asked.error is not None:
            raise asked.error
        assert asked.answers is not None
        return asked.answers

    def _give_up(self, asked: _Asked) -> None:
        """Raises StateFileLockedError: a thread is stuck in the file. Not for what that thread is
        charging just now: it may yet succeed."""
        with self._asked_lock:
            waits = asked in self._asked and asked.begun is None
            if waits:
                self._asked.remove(asked)
        if waits or not any(each.operation in _CHARGING for each in asked.requests):
            raise self.store.locked("a write of this process does not end")

    def _answer_all(self, mine: _Asked) -> None:
        with self._asked_lock:
            if mine in self._asked:  # and not where an exception has struck another thread
                self._asked.remove(mine)
            others, count = [], len(mine.requests)
            for each in self._asked:
                count += len(each.requests)
                if count > _MOST:
                    break
                each.begun = mine
                others.append(each)
        all_of_them = [mine, *others]
        try:
            found = self._answers([each.requests for each in all_of_them])
        except Exception as error:
            for each in others:
                each.error = error
            mine.error = error
        else:
            for each, answers in zip(all_of_them, found, strict=True):
                each.answers = answers
        # An exception of a signal's handler: the others' calls are still to be made, by them.
        with self._asked_lock:
            self._asked = [each for each in self._asked if each.begun is not mine]

    def _answers(self, calls: Sequence[Sequence[Request]]) -> list[list[Answer]]:
        write = any(each.operation != "look" for requests in calls for each in requests)
        with self.store.transaction(write) as t:
            grants = Grants(t, None if self.seal is None else self.seal.seal)
            found = [[grants.answer(each) for each in requests] for requests in calls]
        self.has_answered = True
        return found

    def knows(
        self,
        raw: bytes,
        left: Sequence[int],
        request: Callable[[str, bytes, Sequence[int]], tuple[Request, int]],
        learn: Callable[[Request, Answer, int], object],
    ) -> bool:
        """A file that cannot be written can be read, often."""
        if any(left):
            return True
        asked, sent = request("look", raw, (0, 0, 0, 0))
        if not self.store.lock.acquire(blocking=False):
            return False
        try:
            ((found,),) = self._answers([[asked]])
        except Exception:
            return False
        finally:
            self.store.lock.release()
        learn(asked, found, sent)
        return True

    # outages

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except Exception as error:
            self._failed(error, 0)

    def _try(self) -> None:
        with self.store.transaction() as t:
            t.db.execute("INSERT OR REPLACE INTO meta VALUES ('probe', ?)", (t.now,))

    def _is_outage(self, error: Exception) -> bool:
        return isinstance(error, (exceptions.StateFileError, sqlite3.Error, OSError))

    def _shown_error(self, error: Exception) -> str:
        return str(error)

    def _tell_lost(self, error: Exception) -> None:
        log.warning(
            "%s: durable limits go by on_outage=%r until the file can be used", error,
            self.terms.on_outage,
        )  # fmt: skip

    def _tell_back(self, seconds: float) -> None:
        log.warning("%s can be used again, after %.1f s", self.terms.shown, seconds)

    def _fork_begins(self) -> None:
        self.store.fork_begins()

    def _fork_ended(self) -> None:
        self.store.fork_ended()

    def _forked(self) -> None:
        self.store.forked()
        self._asked, self._asked_lock = [], threading.Lock()
        self._limiters.clear()

    def _tell_junk(self, request: Request) -> None:
        self._measured(VALUES, "junk", 0, ok=False)
        if request.limiter not in self._junk:
            self._junk.add(request.limiter)
            log.warning(
                "%s: what it has of a key of limiter %r is no state: the key counts as used up "
                "until its limits have passed, or are reset. `fast-shm state check` looks at all",
                self.terms.shown, request.limiter.decode("utf-8", "backslashreplace"),
            )  # fmt: skip

    # giving back

    def ending(self) -> None:
        """The last process that uses the file gives back what the segment has leased."""
        self.in_use = False
        link.note(self.segment)
        if self.has_answered and self.outage is None and not link.in_use_elsewhere(self.segment):
            self._save()
            self._guarded(self.store.release)
        self.store.close()

    def save(self) -> tuple[int, int, int, int]:
        """Give back all that this host has leased, and no batch of this process is on its way.
        Returns how many tokens, of how many keys; and how many nano-dollars, of how many keys.
        Raises UnreachableError."""
        with self.ensure(Background).reporting:
            return self._save()

    def _save(self) -> tuple[int, int, int, int]:
        from fast_litellm_shm.durable import books

        tokens = keys = 0
        self.not_saved.clear()
        self.check()
        leased = self._guarded(self._leased)
        for at in range(0, len(leased), _MOST):
            asked = []
            for limiter, name, sealed in leased[at : at + _MOST]:
                leases = self._leases_to_save(limiter)
                raw = name if sealed is None or self.seal is None else self.seal.unseal(sealed)
                if leases is None or raw is None:  # of an earlier segment
                    continue
                taken, _ = leases.look(raw, take=True)
                asked.append(leases.request("give", raw, (0,) * len(taken), taken)[0])
                tokens, keys = tokens + max(taken, default=0), keys + any(taken)
            if asked:
                self.call(asked)
        return tokens, keys, *books.save(self)

    def _leases_to_save(self, limiter: bytes) -> TokenLeases | None:
        """One that cannot be used keeps no other one from being saved."""
        try:
            found = self._leases_of(limiter)
        except exceptions.FastShmError as error:
            name, found = limiter.decode("utf-8", "backslashreplace"), None
            log.warning("%s: limiter %r was not saved: %s", self.terms.shown, name, error)
        if found is None and (
            is_planned(self.segment, limiter) or has_leases(self.segment, limiter)
        ):
            self.not_saved[limiter] = self.not_saved.get(limiter, 0) + 1
        return found

    def _leased(self) -> list[tuple[bytes, bytes | None, bytes | None]]:
        with self.store.transaction(write=False) as t:
            return t.db.execute(
                "SELECT limiter.name, key.name, sealed FROM key JOIN limiter "
                "ON limiter.id = key.limiter WHERE leased"
            ).fetchall()

    def _leases_of(self, limiter: bytes) -> TokenLeases | None:
        known = self._limiters.get(limiter)
        if known is None and is_planned(self.segment, limiter):
            return self.planned.get(limiter)  # None: this process does not know its plans
        if known is None and has_leases(self.segment, limiter):
            name = limiter.decode("utf-8", "surrogatepass")
            limits = InnerLimits((), name=name, segment=self.segment, on_full="deny", keep=True)
            known = self._limiters[limiter] = TokenLeases(limits, self)
        return known


def of(place: Place, segment: Segment) -> FileLink:
    """The link of this process to the state file of a segment."""
    return link.of(place, segment, lambda: FileLink(place, segment))
