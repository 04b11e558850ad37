"""The connection of one process to a server: calls, time-outs, and what counts as an outage."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster import algorithms, link, names
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
_PROBED = 1000  # keys that are tried, to find one of each node
# What servers say; the second: those before 7, about a call in a script.
_REFUSED = ("no permissions", "the user executing the script can't")


class Connection(Link):
    """Of all limiters of a process that share a server and a segment. lead: what the thread that
    may lead this host runs (leader.py)."""

    component, outages = COMPONENT, OUTAGES

    def __init__(
        self, cluster: Cluster, segment: Segment, lead: Callable[[Connection], None]
    ) -> None:
        super().__init__(cluster, segment)
        self.cluster, self.lead = cluster, lead
        self.host = b"%016x" % segment.geometry().instance
        self.channel = f"{cluster.prefix}:recall"
        self.seal = names.Seal(segment) if segment.geometry().names else None
        self._junk: set[str] = set()  # limiters whose junk was logged
        self._client: Any = None
        self._script: Any = None  # of a source
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
            return self._client

    def _send(self, requests: Sequence[Question]) -> list[Any]:
        raw = self._raw(requests)
        return [request.answer(each) for each, request in zip(raw, requests, strict=True)]

    def _raw(self, requests: Sequence[Question]) -> list[Any]:
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
        self._client = None  # the redis library makes new sockets in a child

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


def of(cluster: Cluster, segment: Segment, lead: Callable[[Connection], None]) -> Connection:
    """The connection of this process to a server, for a segment."""
    return link.of(cluster, segment, lambda: Connection(cluster, segment, lead))
