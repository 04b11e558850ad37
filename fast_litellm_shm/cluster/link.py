"""The link of one process to what grants its tokens: a server (connection.py), or a file
(fast_litellm_shm/durable). Calls, their metrics, and whether there is an outage."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import greenlets, performance
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster import algorithms, budgets, permits
from fast_litellm_shm.cluster.settings import OUTAGE
from fast_litellm_shm.limits import LimitSpec

# one call of a grantor
Question: TypeAlias = algorithms.Request | permits.Request | budgets.Request
log = logging.getLogger("fast_litellm_shm")

PROBE = 0.2  # seconds between two tries during an outage
# Seconds that the grantor must have answered before an outage is over: by then all processes of all
# hosts have noticed, and have reported what they admitted meanwhile.
PROBATION = 1.0
MOST, _MOST_REPORTED = 200, 500  # requests in one call; at the end of an outage
# In the note of a process: what it has lost; and that it uses a state file.
USES_FILE, SERVER, FILE = 1 << 29, 1 << 30, 1 << 31


class UnreachableError(exceptions.ClusterError):
    """The grantor does not answer, or not as it should."""


class Terms(Protocol):
    """How a grantor is used: :class:`Cluster`, or ``StateFile``."""

    @property
    def on_outage(self) -> str: ...
    @property
    def timeout(self) -> float: ...
    @property
    def shown(self) -> str: ...


class Learner(Protocol):
    """TokenLeases or PermitLeases, which learn from answers."""

    def learn(self, request: Any, answer: Any, noted: Any, /) -> object:
        """noted: what they noted when they made the request."""


class Unreported(Protocol):
    """What one limiter admitted during an outage."""

    def take_unreported(self) -> list[Any]:
        """Requests that report it. They are this caller's now, unless it puts them back."""

    def put_back(self, requests: Sequence[Any]) -> None:
        """They could not be sent."""

    def forked(self) -> None:
        """In a child: the parent reports its own."""


class Threads(Protocol):
    def start(self) -> None: ...


AnyThreads = TypeVar("AnyThreads", bound=Threads)


class Link:
    """Of all limiters of a process that share a grantor and a segment. Subclasses say how a grantor
    is asked: the methods that raise NotImplementedError."""

    component: ClassVar[str]  # of the metrics: calls of the grantor
    outages: ClassVar[str]  # likewise: outages
    noted_as: ClassVar[int] = SERVER
    no_answer: ClassVar[str] = "does not answer"  # what an outage is called in errors
    error: ClassVar[type[exceptions.FastShmError]] = exceptions.ClusterError
    # Whether the grantor may lose its state, and must be told what this host knows of a key.
    forgets: ClassVar[bool] = True
    # Whether a settlement may be booked in the token lease: this host alone has leases.
    alone: ClassVar[bool] = False
    # What asks about keys in a short way, of a limiter (questions.py). None: all need the long one.
    questions: Callable[..., Any] | None = None
    lead: Callable[[Any], None] | None = None  # what the thread that may lead this host runs

    def __init__(self, terms: Terms, segment: Segment) -> None:
        self.terms, self.segment = terms, segment
        self._lock = greenlets.Lock()
        self._since = self._answers_since = 0.0
        self._since_ns = 0  # segment time
        self.outage: str | None = None  # the error, during an outage
        self.on_lost: Callable[[], None] = lambda: None
        self.unreported: weakref.WeakSet[Unreported] = weakref.WeakSet()
        self.budgets: dict[bytes, Any] = {}  # by name; a budget may be gone before its lease is
        # Of limiters whose keys have plans, one each: a leader finds no limits by the name.
        self.planned: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()
        self.settlements = deque[Any]()  # settlement.Settlement, left to a thread
        self._metric = functools.cache(functools.partial(performance.metric, segment))
        self._threads: dict[Any, Any] = {}
        self.in_use = False  # by calls of this process
        self.closed = False  # close_all(): its threads end

    # what grantors differ in

    def _send(self, requests: Sequence[Any]) -> list[Any]:
        """The answers of the grantor, to all of them."""
        raise NotImplementedError

    def _try(self) -> None:
        """Do what calls need, during an outage. Raises what they would raise."""
        raise NotImplementedError

    def keys(self, limiter: bytes) -> list[bytes]:
        """The keys that the grantor knows of a limiter, for Request.at. Raises
        UnreachableError."""
        raise NotImplementedError

    def budget_keys(self, budget: bytes) -> list[bytes]:
        """The same of a budget, in all windows."""
        raise NotImplementedError

    def rule(self, limit: LimitSpec) -> algorithms.Rule:
        """Raises ValueError: the grantor cannot count such a limit."""
        raise NotImplementedError

    def hosts(self) -> int:
        """How many hosts share the limits; 0: not known."""
        raise NotImplementedError

    def _is_outage(self, error: Exception) -> bool:
        """Whether limits go by ``on_outage`` for it."""
        raise NotImplementedError

    def _shown_error(self, error: Exception) -> str:
        return f"{type(error).__name__}: {error}"

    def _cause(self, error: Exception) -> BaseException | None:
        """To raise another one from."""
        return error

    def _tell_lost(self, error: Exception) -> None:
        """Log the begin of an outage."""
        raise NotImplementedError

    def _tell_back(self, seconds: float) -> None:
        raise NotImplementedError

    def _tell_junk(self, request: Any) -> None:
        """What the grantor had of the request's key was not ours."""

    def ending(self) -> None:
        """This process ends. Raises UnreachableError."""

    def knows(
        self,
        raw: bytes,
        left: Sequence[int],
        request: Callable[[str, bytes, Sequence[int]], tuple[Any, int]],
        learn: Callable[[Any, Any, int], object],
    ) -> bool:
        """During an outage: whether this host knows what is left of a key. left: ns that it knows
        something of it for. request, learn: of TokenLeases."""
        return True

    def _fork_begins(self) -> None:
        """In the parent, before a fork."""

    def _fork_ended(self) -> None:
        """In the parent, after it."""

    def _forked(self) -> None:
        """In a child: drop what belongs to the parent."""

    # calls

    def ensure(self, kind: Callable[[Any], AnyThreads]) -> AnyThreads:
        """The threads of a kind. They do not survive a fork, and are started anew in a child."""
        known: AnyThreads | None = self._threads.get(kind)
        if known is None:
            with starting:
                known = self._threads.get(kind)
                if known is None:
                    # Known before they start: meanwhile other greenlets run and come here, and a
                    # lock that was made before the program was patched does not keep them out.
                    known = self._threads[kind] = kind(self)
                    try:
                        if not self.in_use:
                            self.in_use = True
                            note(self.segment)
                        known.start()
                    except BaseException:
                        del self._threads[kind]
                        raise
        return known

    def call(self, requests: Sequence[Question]) -> list[Any]:
        """One round trip for all of them. Raises UnreachableError, at once during an outage."""
        self.check()
        return self._call(requests)

    def call_all(self, asked: Iterable[tuple[Learner, Question, Any]]) -> None:
        """Call for each request, many in one round trip: its leases learn from the answer, with
        what they noted. Raises UnreachableError."""
        asked = iter(asked)
        while part := list(itertools.islice(asked, MOST)):
            answers = self.call([request for _, request, _ in part])
            for (leases, request, noted), answer in zip(part, answers, strict=True):
                leases.learn(request, answer, noted)

    def _call(self, requests: Sequence[Question]) -> list[Any]:
        began = time.monotonic_ns()
        try:
            answers = self._send(requests)
        except Exception as error:
            self._record(requests, [], began)
            self._failed(error, began)
        self._record(requests, answers, began)
        for request, found in zip(requests, answers, strict=True):
            if found.junk:
                self._tell_junk(request)
        return answers

    def _failed(self, error: Exception, began: int) -> NoReturn:
        """Raises UnreachableError if it is an outage, else the error."""
        if not self._is_outage(error):
            raise error
        self._lost(error, time.monotonic_ns() - began)
        raise UnreachableError(self.outage) from self._cause(error)

    # outages

    def check(self) -> None:
        """Raises UnreachableError during an outage."""
        if self.outage is not None:
            raise UnreachableError(self.outage)

    def _lost(self, error: Exception, took: int) -> None:
        """took: ns until the call failed."""
        with self._lock:
            first = self.outage is None
            self.outage = self._shown_error(error)
            self._answers_since = 0.0
            if first:
                self._since = time.monotonic()
                self._since_ns = self.segment.geometry().time_ns
        note(self.segment)  # each time: a child that was forked meanwhile has noted nothing yet
        if not first:
            return
        self._measured(self.outages, "lost", took)
        self._tell_lost(error)
        self.on_lost()

    def probe(self) -> None:
        """Try the grantor, during an outage. When it answers, report what was admitted meanwhile,
        before anything else is asked."""
        began = time.monotonic_ns()
        try:
            self._try()
            for limiter in list(self.unreported):
                self._report(limiter)
        except UnreachableError:
            return
        except Exception as error:
            self._lost(error, time.monotonic_ns() - began)
            return
        now = time.monotonic()
        self._answers_since = self._answers_since or now
        if now - self._answers_since < PROBATION:
            return
        self.outage = None
        note(self.segment)
        self._measured(self.outages, "away", round((now - self._since) * 1e9))
        self._tell_back(now - self._since)

    def _report(self, limiter: Unreported) -> None:
        requests = limiter.take_unreported()
        while requests:
            try:
                self._call(requests[:_MOST_REPORTED])
            except UnreachableError:
                limiter.put_back(requests)
                raise
            requests = requests[_MOST_REPORTED:]

    @property
    def retry_after_ns(self) -> int:
        """How long the outage will last at least."""
        return round((PROBATION + PROBE) * 1e9)

    # metrics and logs

    def _measured(
        self, component: str, operation: str, ns: int, ok: bool = True, asked: int = 0, got: int = 0
    ) -> None:
        number = self._metric(component, operation)
        lib.fshm_metric_record(self.segment._handle, number, ns, 1, ok, asked, got)

    def _record(self, requests: Sequence[Question], answers: Sequence[Any], began: int) -> None:
        """Measure a round trip: its sizes are tokens asked for or given back, and granted."""
        if len(requests) == 1:
            asked, operation = requests[0].asked, requests[0].operation
        else:
            asked = sum([each.asked for each in requests])
            kinds = {each.operation for each in requests}
            operation = kinds.pop() if len(kinds) == 1 else "many"
        granted = sum(
            [request.granted(found) for request, found in zip(requests, answers, strict=False)]
        )
        took = time.monotonic_ns() - began
        self._measured(self.component, operation, took, bool(answers), asked, granted)


_links: dict[tuple[Any, int], Any] = {}
_links_lock = threading.Lock()
starting = threading.RLock()  # the collector may run in ensure(), and find a call to settle


AnyLink = TypeVar("AnyLink", bound=Link)


def of(terms: Terms, segment: Segment, make: Callable[[], AnyLink]) -> AnyLink:
    """The link of this process to a grantor, for a segment."""
    which = (terms, segment.geometry().instance)
    with _links_lock:
        if which not in _links:
            _links[which] = make()
        found: AnyLink = _links[which]
        return found


def close_all() -> None:
    """Forget all links, and have their threads end. For tests: a process that outlives its servers
    would try them again and again."""
    with _links_lock:
        links = list(_links.values())
        _links.clear()
    for each in links:
        each.closed = True
        each.on_lost()  # wakes its threads


def note(segment: Segment) -> None:
    """Note in the process table, for others to read, whether this process has an outage: since when
    (of several grantors: the first), and its ``on_outage``. And whether it uses a state file."""
    instance = segment.geometry().instance
    with _links_lock:
        links = [each for (_, of), each in _links.items() if of == instance]
        lost = [each for each in links if each.outage is not None]
        note = USES_FILE if any(each.noted_as == FILE and each.in_use for each in links) else 0
        if lost:
            since = min(each._since_ns for each in lost) // 10**9
            note |= min(since, USES_FILE - 1 >> len(OUTAGE)) << len(OUTAGE)
            for each in lost:
                note |= 1 << OUTAGE.index(each.terms.on_outage) | each.noted_as
        lib.fshm_process_note(segment._handle, note)


class Noted(NamedTuple):
    """What a process has noted. since: in seconds of segment time. policies: none: no outage."""

    since: int
    policies: tuple[str, ...]
    server: bool
    file: bool


def noted(note: int) -> Noted:
    policies = tuple(policy for i, policy in enumerate(OUTAGE) if note >> i & 1)
    file = bool(note & FILE)  # earlier releases had servers alone, and noted neither
    since = (note & USES_FILE - 1) >> len(OUTAGE)
    return Noted(since, policies, bool(note & SERVER) or not file, file)


def in_use_elsewhere(segment: Segment) -> bool:
    """Whether another living process uses the state file of this segment."""
    info = ffi.new("fshm_process_info *")
    for index in range(segment.geometry().processes_joined):
        lib.fshm_process_at(segment._handle, index, info)
        if info.alive and info.pid != os.getpid() and info.outage & USES_FILE:
            return True
    return False


def _fork_begins() -> None:
    for each in list(_links.values()):
        each._fork_begins()


def _fork_ended() -> None:
    for each in list(_links.values()):
        each._fork_ended()


def _forked() -> None:
    """Locks that other threads held in the parent would stay locked."""
    global _links_lock, starting
    _links_lock, starting = threading.Lock(), threading.RLock()
    for each in _links.values():
        each._lock = greenlets.Lock()
        each._forked()
        each._threads.clear()
        each.settlements.clear()
        each.in_use = False
        for limiter in each.unreported:
            limiter.forked()


os.register_at_fork(before=_fork_begins, after_in_parent=_fork_ended, after_in_child=_forked)
