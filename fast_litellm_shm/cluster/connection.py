"""The connection of one process to the server: calls, time-outs, and whether there is an outage."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, Protocol, TypeAlias, TypeVar

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import greenlets, performance
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster import algorithms, names, permits
from fast_litellm_shm.cluster.settings import OUTAGE, Cluster, library

Question: TypeAlias = algorithms.Request | permits.Request  # one call of a script
log = logging.getLogger("fast_litellm_shm")

PROBE = 0.2  # seconds between two tries during an outage
# Seconds that the server must have answered before an outage is over: by then all processes of all
# hosts have noticed, and have reported what they admitted meanwhile.
PROBATION = 1.0
_MOST, _MOST_REPORTED = 200, 500  # requests in one pipeline; at the end of an outage
# Components of the metrics: round trips, outages, and values and messages that are not ours.
COMPONENT, OUTAGES, VALUES = "cluster", "cluster_outage", "cluster_values"

# A server that is full, or read-only, or refuses the channel, answers a PING: so the probe does
# what calls need. (Leaders ignore the empty message.)
_PROBE = """
redis.call('SET', KEYS[1], '', 'PX', 1000)
redis.call('PUBLISH', ARGV[1], '')
return redis.call('GET', KEYS[1])
"""
_PROBED = 1000  # keys that are tried, to find one of each node
# What servers say; the second: those before 7, about a call in a script.
_REFUSED = ("no permissions", "the user executing the script can't")


class UnreachableError(exceptions.ClusterError):
    """The server does not answer, or not as it should."""


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


class Connection:
    """Of all limiters of a process that share a server and a segment. lead: what the thread that
    may lead this host runs (leader.py)."""

    def __init__(
        self, cluster: Cluster, segment: Segment, lead: Callable[[Connection], None]
    ) -> None:
        self.cluster, self.segment, self.lead = cluster, segment, lead
        self.host = b"%016x" % segment.geometry().instance
        self.channel = f"{cluster.prefix}:recall"
        self.seal = names.Seal(segment) if segment.geometry().names else None
        self._junk: set[str] = set()  # limiters whose junk was logged
        self._client: Any = None
        self._script: Any = None  # of a source
        # errors by which another node has the key
        self._elsewhere: tuple[type[Exception], ...] = ()
        self._lock = greenlets.Lock()
        self._since = self._answers_since = 0.0
        self._since_ns = 0  # segment time
        self.outage: str | None = None  # the error, during an outage
        self.on_lost: Callable[[], None] = lambda: None
        self.unreported: weakref.WeakSet[Unreported] = weakref.WeakSet()
        self.settlements = deque[Any]()  # settlement.Settlement, left to a thread
        self._metric = functools.cache(functools.partial(performance.metric, segment))
        self._threads: dict[Any, Any] = {}

    def ensure(self, kind: Callable[[Connection], AnyThreads]) -> AnyThreads:
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
                        known.start()
                    except BaseException:
                        del self._threads[kind]
                        raise
        return known

    def client(self) -> Any:
        """Of the redis library. Made at the first use: in a worker, not in the process that forks
        it."""
        with self._lock:
            if self._client is None:
                errors = library("redis").exceptions
                self._elsewhere = (errors.AskError, errors.ConnectionError)
                self._client = self.cluster.client()
                self._script = functools.cache(self._client.register_script)
            return self._client

    def call(self, requests: Sequence[Question]) -> list[Any]:
        """One round trip for all of them. Raises UnreachableError, at once during an outage."""
        self.check()
        return self._call(requests)

    def call_all(self, asked: Iterable[tuple[Learner, Question, Any]]) -> None:
        """Call for each request, many in one round trip: its leases learn from the answer, with
        what they noted. Raises UnreachableError."""
        asked = iter(asked)
        while part := list(itertools.islice(asked, _MOST)):
            answers = self.call([request for _, request, _ in part])
            for (leases, request, noted), answer in zip(part, answers, strict=True):
                leases.learn(request, answer, noted)

    def _call(self, requests: Sequence[Question]) -> list[Any]:
        began = time.monotonic_ns()
        try:
            raw = self._send(requests)
            answers = [request.answer(each) for each, request in zip(raw, requests, strict=True)]
        except Exception as error:
            self._record(requests, [], began)
            self._failed(error, began)
        self._record(requests, answers, began)
        for request, found in zip(requests, answers, strict=True):
            if found.junk:
                self._tell_junk(request)
        return answers

    def _send(self, requests: Sequence[Question]) -> list[Any]:
        client = self.client()
        if self.cluster.of_nodes:
            return [self._run_on_node(client, each) for each in requests]
        if len(requests) == 1:
            return [self._run(client, requests[0])]
        pipeline = client.pipeline(transaction=False)
        for each in requests:
            self._run(pipeline, each)
        found: list[Any] = pipeline.execute()
        return found

    def _run_on_node(self, client: Any, each: Question) -> Any:
        """Asks the node itself. Where that does not answer, the library would look for the key's
        new node among all nodes, and wait for each that does not answer. That is for probe(),
        unless the node says at once that the key is another's, or is gone."""
        node = client.get_node_from_key(each.state_key(self.cluster.prefix))
        try:
            return self._run(client.get_redis_connection(node), each)
        except self._elsewhere:
            return self._run(client, each)

    def _run(self, client: Any, each: Question) -> Any:
        keys = [each.state_key(self.cluster.prefix)]
        name = each.key if self.seal is None else self.seal.seal(each.key)
        head = (self.host, self.channel, each.limiter, name, int(self.seal is not None))
        return self._script(each.source)(keys, [*head, *each.arguments()], client=client)

    def _tell_junk(self, request: Question) -> None:
        """Once for each limiter: a host that writes junk can do it all the time."""
        self._measured(VALUES, "junk", 0, ok=False)
        limiter = request.limiter.decode("utf-8", "backslashreplace")
        if limiter in self._junk:
            return
        self._junk.add(limiter)
        log.warning(
            "%s: not a value of ours stood at %r, a key of limiter %r: it counts as used up until "
            "its limits have passed, or are reset. Another program or a broken host writes there; "
            "give each program a user of its own. More of this limiter are only counted, in the "
            "metrics",
            self.cluster.shown,
            request.state_key(self.cluster.prefix).decode("utf-8", "backslashreplace"),
            limiter,
        )

    def note_junk_message(self) -> None:
        """A message that no host of ours sends was ignored."""
        self._measured(VALUES, "message", 0, ok=False)
        if "" not in self._junk:
            self._junk.add("")
            log.warning(
                "%s: not a message of ours came over the channel %r, and is ignored; more of them "
                "are only counted, in the metrics", self.cluster.shown, self.channel,
            )  # fmt: skip

    def names(self, start: bytes) -> list[bytes]:
        """The server's keys that begin with ``start``. Raises UnreachableError."""
        self.check()
        began = time.monotonic_ns()
        pattern = b"".join(b"\\" + bytes([c]) if c in b"*?[]^\\" else bytes([c]) for c in start)
        try:
            found = self.client().scan_iter(match=pattern + b"*", count=1000)
            return list({bytes(name) for name in found})  # SCAN may return one twice
        except Exception as error:
            self._failed(error, began)

    def _failed(self, error: Exception, began: int) -> NoReturn:
        """Raises UnreachableError if it is an outage, else the error."""
        if not is_outage(error):
            raise error
        self._lost(error, time.monotonic_ns() - began)
        raise UnreachableError(self.outage) from self.cluster.scrubbed_cause(error)

    # outages

    def check(self) -> None:
        """Raises UnreachableError during an outage."""
        if self.outage is not None:
            raise UnreachableError(self.outage)

    def _lost(self, error: Exception, took: int) -> None:
        """took: ns until the call failed."""
        with self._lock:
            first = self.outage is None
            self.outage = self.cluster.scrubbed(f"{type(error).__name__}: {error}")
            self._answers_since = 0.0
            if first:
                self._since = time.monotonic()
                self._since_ns = self.segment.geometry().time_ns
        _note(self.segment)  # each time: a child that was forked meanwhile has noted nothing yet
        if not first:
            return
        self._measured(OUTAGES, "lost", took)
        if is_refusal(error):
            self.tell_refusal(error)
        else:
            log.warning(
                "%s does not answer (%s); limits over many hosts go by on_outage=%r until it does",
                self.cluster.shown, self.outage, self.cluster.on_outage,
            )  # fmt: skip
        self.on_lost()

    def tell_refusal(self, error: Exception) -> None:
        """Log which rights are missing, and how to grant them."""
        log.warning(
            "%s refuses what limits over many hosts need (%s); they go by on_outage=%r until its "
            "user is granted it: ACL SETUSER %s %s",
            self.cluster.shown, self.cluster.scrubbed(str(error)), self.cluster.on_outage,
            self.cluster.user,
            self.cluster.rights,
        )  # fmt: skip

    def probe(self) -> None:
        """Try the server, during an outage. When it answers, report what was admitted meanwhile,
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
        _note(self.segment)
        self._measured(OUTAGES, "away", round((now - self._since) * 1e9))
        log.warning("%s answers again, after %.1f s", self.cluster.shown, now - self._since)

    def _try(self) -> None:
        """Of a Redis Cluster each node, through the library, which then finds the replica that has
        replaced a node."""
        client = self.client()
        for key in self._probe_keys(client):
            self._script(_PROBE)([key], [self.channel], client=client)

    def _probe_keys(self, client: Any) -> list[str]:
        """One key of each node, but of a node that has so few slots that none is found."""
        start = f"{self.cluster.prefix}:probe"
        if not self.cluster.of_nodes:
            return [start]
        found: dict[str, str] = {}
        nodes = len(client.get_primaries())
        for number in range(_PROBED):
            key = f"{start}:{number}"
            found.setdefault(client.get_node_from_key(key).name, key)
            if len(found) == nodes:
                break
        return list(found.values())

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
        asked = sum(each.asked for each in requests)
        granted = sum(
            request.granted(found) for request, found in zip(requests, answers, strict=False)
        )
        kinds = {each.operation for each in requests}
        operation = kinds.pop() if len(kinds) == 1 else "many"
        took = time.monotonic_ns() - began
        self._measured(COMPONENT, operation, took, bool(answers), asked, granted)


def is_outage(error: Exception) -> bool:
    """Whether limits go by ``on_outage`` for it."""
    # Not imported here: that could raise where a thread handles an error. An error of the library
    # means that it is imported.
    redis = sys.modules.get("redis")
    if redis is None:
        return isinstance(error, OSError)
    return isinstance(error, (redis.RedisError, redis.exceptions.RedisClusterException, OSError))


def is_refusal(error: Exception) -> bool:
    """The server answers, but does not let its user do something."""
    return any(each in str(error).lower() for each in _REFUSED)


_connections: dict[tuple[Cluster, int], Connection] = {}
_connections_lock = threading.Lock()
starting = threading.RLock()  # the collector may run in ensure(), and find a call to settle


def of(cluster: Cluster, segment: Segment, lead: Callable[[Connection], None]) -> Connection:
    """The connection of this process to a server, for a segment."""
    which = (cluster, segment.geometry().instance)
    with _connections_lock:
        if which not in _connections:
            _connections[which] = Connection(cluster, segment, lead)
        return _connections[which]


def _note(segment: Segment) -> None:
    """Note in the process table, for others to read, whether this process has an outage: since when
    (of several servers: the first), and its ``on_outage``."""
    instance = segment.geometry().instance
    with _connections_lock:
        lost = [
            each
            for (_, of), each in _connections.items()
            if of == instance and each.outage is not None
        ]
        note = 0
        if lost:
            note = min(each._since_ns for each in lost) // 10**9 << len(OUTAGE)
            for each in lost:
                note |= 1 << OUTAGE.index(each.cluster.on_outage)
        lib.fshm_process_note(segment._handle, note)


def noted(note: int) -> tuple[int, tuple[str, ...]]:
    """What a process has noted: since when, in seconds of segment time, and its policies; none: it
    has no outage."""
    return note >> len(OUTAGE), tuple(policy for i, policy in enumerate(OUTAGE) if note >> i & 1)


def _forked() -> None:
    """Locks that other threads held in the parent would stay locked. The redis library makes new
    sockets in a child."""
    global _connections_lock, starting
    _connections_lock, starting = threading.Lock(), threading.RLock()
    for each in _connections.values():
        each._lock = greenlets.Lock()
        each._client = None
        each._threads.clear()
        each.settlements.clear()
        for limiter in each.unreported:
            limiter.forked()


os.register_at_fork(after_in_child=_forked)
