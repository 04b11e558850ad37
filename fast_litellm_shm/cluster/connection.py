"""The connection of one process to a server: calls, time-outs, and what counts as an outage."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn, cast

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster import algorithms, link, names, wire
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.cluster.link import MOST, Link, Question, log
from fast_litellm_shm.cluster.settings import Cluster, library
from fast_litellm_shm.limits import LimitSpec

# Components of the metrics: round trips, outages, and values and messages that are not ours.
COMPONENT, OUTAGES, VALUES = "cluster", "cluster_outage", "cluster_values"

# A server that is full, or read-only, or refuses the channel, answers a PING: so the probe does
# what calls need. (Leaders ignore the empty message.)
_PROBE = """
redis.call('SET', KEYS[1], '', 'PX', 1000)
redis.call('PUBLISH', ARGV[1], '')
return redis.call('GET', KEYS[1])
"""
# Keys in one call of a script, for which all other clients of the server wait: some hundred us.
MOST_KEYS = 50
_PROBED = 1000  # keys that are tried, to find one of each node
# What servers say; the second: those before 7, about a call in a script.
_REFUSED = ("no permissions", "the user executing the script can't")


class Connection(Link):
    """Of all limiters of a process that share a server and a segment. lead: what the thread that
    may lead this host runs (leader.py). questions: what asks in the short way (questions.py)."""

    component, outages = COMPONENT, OUTAGES

    def __init__(
        self,
        cluster: Cluster,
        segment: Segment,
        lead: Callable[[Connection], None],
        questions: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(cluster, segment)
        self.questions = None if cluster.of_nodes else questions
        self.cluster, self.lead = cluster, lead
        self.host = b"%016x" % segment.geometry().instance
        self.channel = f"{cluster.prefix}:recall"
        self._channel = self.channel.encode()
        self.seal = names.Seal(segment) if segment.geometry().names else None
        self._junk: set[str] = set()  # limiters whose junk was logged
        self._client: Any = None
        self._script: Any = None  # of a source
        self._wire: wire.Wire | None = None  # None: to a Redis Cluster
        # errors by which another node has the key
        self._elsewhere: tuple[type[Exception], ...] = ()

    def rule(self, limit: LimitSpec) -> algorithms.Rule:
        return algorithms.rule(limit)

    def hosts(self) -> int:
        """By the last heartbeat."""
        return host_count(self.segment)

    def client(self) -> Any:
        """Of the redis library. Made at the first use: in a worker, not in the process that forks
        it."""
        with self._lock:
            if self._client is None:
                errors = library("redis").exceptions
                self._elsewhere = (errors.AskError, errors.ConnectionError)
                self._client = self.cluster.client()
                self._script = functools.cache(self._client.register_script)
                if not self.cluster.of_nodes:
                    self._wire = wire.Wire(self._client, self.cluster.keeps_connections)
            return self._client

    def _send(self, requests: Sequence[Question]) -> list[Any]:
        if self.cluster.of_nodes:
            client = self.client()
            return [self._run_on_node(client, each) for each in requests]
        parts = self._parts(requests)
        replies = self._wire_now().run(self._call_of(part) for part in parts)
        found: list[Any] = []
        for part, reply in zip(parts, replies, strict=True):
            found += _answers(part, reply)
        return found

    def _wire_now(self) -> wire.Wire:
        found = self._wire
        while found is None:  # a fork of another thread's may come in between
            self.client()
            found = self._wire
        return found

    # for the short way (questions.py); what succeeds, the caller measures

    def run(self, operation: str, calls: Iterable[wire.Call], began: int, size: int) -> bytes:
        """The replies, in one round trip. size: bytes that they must have. Raises
        UnreachableError."""
        try:
            return self._of_size(b"".join(self._wire_now().run(calls)), size)
        except Exception as error:
            self._refused(operation, error, began)

    def run_one(self, operation: str, call: wire.Call, began: int, size: int) -> bytes:
        try:
            found: bytes = (self._wire or self._wire_now()).one(call)
            return found if len(found) == size else self._of_size(found, size)
        except Exception as error:
            self._refused(operation, error, began)

    def _refused(self, operation: str, error: Exception, began: int) -> NoReturn:
        self.measured(operation, began, 0, 0, ok=False)
        self._failed(error, began)

    def _of_size(self, found: bytes, size: int) -> bytes:
        """Numbers are read from it where they must be."""
        if len(found) != size:
            raise exceptions.ClusterError(
                f"{self.cluster.shown} answered {len(found)} bytes, not {size}: see that it is a "
                "Redis or Valkey server, and no program between changes what it says"
            )
        return found

    def metric(self, operation: str) -> int:
        return int(self._metric(self.component, operation))

    def measured(
        self, operation: str, began: int, asked: int, granted: int, ok: bool = True
    ) -> None:
        took = time.monotonic_ns() - began
        self._measured(self.component, operation, took, ok, asked, granted)

    def _parts(self, requests: Sequence[Question]) -> list[list[Question]]:
        """Requests that one call of a script can answer, in their order."""
        parts: list[list[Question]] = []
        for each in requests:
            if not parts or len(parts[-1]) >= MOST_KEYS or not _alike(parts[-1][0], each):
                parts.append([])
            parts[-1].append(each)
        return parts

    def _call_of(self, part: Sequence[Question]) -> wire.Call:
        call = wire.call(part[0].source, *self._arguments(part))
        return call._replace(again=functools.partial(self._again, part))

    def _again(self, part: Sequence[Question]) -> wire.Call:
        return self._call_of([each.again() for each in part])

    def _arguments(self, part: Sequence[Question]) -> tuple[list[bytes], list[bytes]]:
        """Of one call for all of these: keys, and the rest."""
        first = part[0]
        seal, prefix = self.seal, self.cluster.prefix
        head = (self.host, self._channel, first.limiter, b"0" if seal is None else b"1")
        names = [each.key if seal is None else seal.seal(each.key) for each in part]
        keys = [each.state_key(prefix) for each in part]
        if isinstance(first, algorithms.Request):
            rates = cast("Sequence[algorithms.Request]", part)  # _alike()
            questions = [each.question(name) for each, name in zip(rates, names, strict=True)]
            return keys, [*head, first.limits(), b"".join(questions)]
        return keys, [*head, *names, *(str(each).encode() for each in first.arguments())]

    def _run_on_node(self, client: Any, each: Question) -> Any:
        """Asks the node itself. Where that does not answer, the library would look for the key's
        new node among all nodes, and wait for each that does not answer. That is for probe(),
        unless the node says at once that the key is another's, or is gone."""
        node = client.get_node_from_key(each.state_key(self.cluster.prefix))
        try:
            return self._run(client.get_redis_connection(node), each)
        except self._elsewhere as error:
            unheard = isinstance(error, self._elsewhere[0])
            return self._run(client, each if unheard else each.again())

    def _run(self, client: Any, each: Question) -> Any:
        keys, arguments = self._arguments([each])
        reply = self._script(each.source)(keys, arguments, client=client)
        return _answers([each], reply)[0]

    def _tell_junk(self, request: Question) -> None:
        self.tell_junk(request.limiter, request.state_key(self.cluster.prefix))

    def tell_junk(self, limiter_name: bytes, key: bytes) -> None:
        """Once for each limiter: a host that writes junk can do it all the time."""
        self._measured(VALUES, "junk", 0, ok=False)
        limiter = limiter_name.decode("utf-8", "backslashreplace")
        if limiter in self._junk:
            return
        self._junk.add(limiter)
        log.warning(
            "%s: not a value of ours stood at %r, a key of limiter %r: it counts as used up until "
            "its limits have passed, or are reset. Another program or a broken host writes there; "
            "give each program a user of its own. More of this limiter are only counted, in the "
            "metrics",
            self.cluster.shown,
            key.decode("utf-8", "backslashreplace"),
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

    def keys(self, limiter: bytes) -> list[bytes]:
        return self._keys(names.RATES, limiter)

    def budget_keys(self, budget: bytes) -> list[bytes]:
        return self._keys(names.BUDGETS, budget)

    def ending(self) -> None:
        """What budgets have leased goes back. Where that fails, it stays leased; nobody is told, as
        no call goes by a policy for it."""
        if self.outage is not None:
            return
        given = [each for budget in list(self.budgets.values()) for each in budget.ending()]
        with contextlib.suppress(Exception):
            for at in range(0, len(given), MOST):
                self._send(given[at : at + MOST])

    def _keys(self, kind: bytes, limiter: bytes) -> list[bytes]:
        self.check()
        start = names.start(self.cluster.prefix, kind, limiter)
        began = time.monotonic_ns()
        pattern = b"".join(b"\\" + bytes([c]) if c in b"*?[]^\\" else bytes([c]) for c in start)
        try:
            found = self.client().scan_iter(match=pattern + b"*", count=1000)
            return list({bytes(name) for name in found})  # SCAN may return one twice
        except Exception as error:
            self._failed(error, began)

    # outages

    def _is_outage(self, error: Exception) -> bool:
        return is_outage(error)

    def _shown_error(self, error: Exception) -> str:
        return self.cluster.scrubbed(super()._shown_error(error))

    def _cause(self, error: Exception) -> BaseException | None:
        return self.cluster.scrubbed_cause(error)

    def _forked(self) -> None:
        self._client = self._wire = None  # the redis library makes new sockets in a child

    def _tell_lost(self, error: Exception) -> None:
        if is_refusal(error):
            self.tell_refusal(error)
        else:
            log.warning(
                "%s does not answer (%s); limits over many hosts go by on_outage=%r until it does",
                self.cluster.shown, self.outage, self.cluster.on_outage,
            )  # fmt: skip

    def _tell_back(self, seconds: float) -> None:
        log.warning("%s answers again, after %.1f s", self.cluster.shown, seconds)

    def tell_refusal(self, error: Exception) -> None:
        """Log which rights are missing, and how to grant them."""
        log.warning(
            "%s refuses what limits over many hosts need (%s); they go by on_outage=%r until its "
            "user is granted it: ACL SETUSER %s %s",
            self.cluster.shown, self.cluster.scrubbed(str(error)), self.cluster.on_outage,
            self.cluster.user,
            self.cluster.rights,
        )  # fmt: skip

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


def _alike(one: Question, other: Question) -> bool:
    """Whether one call of the script answers both."""
    return (
        isinstance(one, algorithms.Request)
        and isinstance(other, algorithms.Request)
        and one.limiter == other.limiter
        and (one.rules is other.rules or one.rules == other.rules)
    )


def _answers(part: Sequence[Question], reply: Any) -> list[Any]:
    first = part[0]
    if not isinstance(first, algorithms.Request):
        return [first.answer(reply)]
    rates, size = cast("Sequence[algorithms.Request]", part), first.answer_size  # _alike()
    return [each.answer(reply, i * size) for i, each in enumerate(rates)]


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


def of(
    cluster: Cluster,
    segment: Segment,
    lead: Callable[[Connection], None],
    questions: Callable[..., Any],
) -> Connection:
    """The connection of this process to a server, for a segment."""
    return link.of(cluster, segment, lambda: Connection(cluster, segment, lead, questions))
