"""The values in a router's cache that all workers of the host share.

LiteLLM's routing strategies keep their values in the router's cache, and pick a deployment by what
they read there (``litellm/router_strategy/*.py``). Each strategy keeps its own rules; only these
keys are read and written elsewhere, in the segment:

========================  ===================================  ==================================
strategy                  key                                  value
========================  ===================================  ==================================
least-busy                ``{group}_request_count:{id}``       requests in flight
usage-based-routing-v2    ``{id}:{model}:tpm:{HH-MM}``, rpm    a number (also that of LiteLLM's
                                                               ``enforce_model_rate_limits``)
usage-based-routing       ``{group}:tpm:{HH-MM}``, rpm         numbers by id
latency-based-routing     ``{group}_map``                      by id: latencies, usage by minute
========================  ===================================  ==================================

Each class below is one key. ``read()`` returns what the strategy reads in place of the router's own
value. ``increment(by)`` and ``write(value)`` are called after the router's own cache was
incremented or written, which is used while the segment is not available.

LiteLLM's strategies see every call of the process, whichever of its routers made the call. So that
nothing is counted twice, a router counts only its own deployments; of several routers that have the
same deployments, the one that was attached last counts.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from fast_litellm_shm.integrations.litellm.router.deployments import Deployments
from fast_litellm_shm.integrations.litellm.window_counter import WindowCounter

_HOUR = 3600.0  # LiteLLM forgets requests in flight and latencies after so many seconds
# The most that a minute of a deployment counts. The end of its window is kept to 2 * most ns, and a
# decrement is exact only where that is less than 60 s / most. LiteLLM decrements rpm, for a request
# that it refuses.
_MOST = {"tpm": 2**28 - 1, "rpm": 2**17 - 1}
_MOST_KEYS = 4096  # whose meaning is remembered
_IDS_SECONDS = 1.0  # how long the ids of a group are remembered

Value: TypeAlias = "DeploymentInFlight | DeploymentUsage | GroupUsage | GroupLatency"

_LATENCIES, _FIRST_TOKENS = "latency_normalized", "time_to_first_token_seconds"

_order = itertools.count()
_counting: dict[type, list[weakref.ref[SharedValues]]] = {}  # by the class that they count


class SharedValues:
    """The shared values of one router. ids_of: returns the deployment ids of a model group, or of
    all groups (None). Raises SegmentError where there is no segment."""

    def __init__(
        self, deployments: Deployments, ids_of: Callable[[str | None], frozenset[str]]
    ) -> None:
        self.deployments = deployments
        self.usage = {
            kind: WindowCounter(f"litellm deployment {kind}", most, 60)
            for kind, most in _MOST.items()
        }
        self._ids_of = ids_of
        self._ids: dict[str | None, tuple[float, frozenset[str]]] = {}
        self._known: dict[str, Value | None] = {}
        self.in_flight: dict[str, DeploymentInFlight] = {}  # kept: each holds what must be ended
        self._order, self._ref = next(_order), weakref.ref(self)

    def of(self, key: Any) -> Value | None:
        """The value of a key; None where it is not shared."""
        try:
            return self._known[key]
        except KeyError:
            pass
        found, lasts = self._find(key)
        if lasts:
            if len(self._known) >= _MOST_KEYS:
                self._known.clear()
            self._known[key] = found
        return found

    def _find(self, key: Any) -> tuple[Value | None, bool]:
        """The value, and whether it stays so: a group may be added later."""
        if not isinstance(key, str):
            return None, True
        _, counts, deployment_id = key.rpartition("_request_count:")
        if counts:
            if deployment_id not in self.ids(None):
                return None, False
            return self.in_flight.setdefault(key, DeploymentInFlight(self, deployment_id)), True
        if key.endswith("_map"):
            group = key[: -len("_map")]
            known = bool(self.ids(group))
            return (GroupLatency(self, group) if known else None), known
        if key[-10:-5] not in (":tpm:", ":rpm:") or key[-3:-2] != "-":
            return None, True
        head = key[:-10]
        if head.partition(":")[0] in self.ids(None):
            return DeploymentUsage(self, key), True
        return (GroupUsage(self, head, key[-9:]) if self.ids(head) else None), False

    def ids(self, group: str | None) -> frozenset[str]:
        now = time.monotonic()
        known = self._ids.get(group)
        if known is None or now >= known[0]:
            if len(self._ids) >= _MOST_KEYS:
                self._ids.clear()
            known = self._ids[group] = now + _IDS_SECONDS, self._ids_of(group)
        return known[1]

    def all_in_flight(self, keys: Sequence[Any]) -> list[int] | None:
        """The values of keys that all are requests in flight, by one look; else None."""
        found = [self.of(key) for key in keys]
        values = [value for value in found if isinstance(value, DeploymentInFlight)]
        if not values or len(values) < len(found):
            return None
        counts = self.deployments.in_flight([value.deployment_id for value in values])
        return [count + value.uncounted for count, value in zip(counts, values, strict=True)]

    def counts(self, kind: type, group: str | None, deployment_id: str | None = None) -> bool:
        """Whether this router, and no later one of the process, counts the values of a class: of a
        group, or of one deployment (group None)."""
        counting = _counting.setdefault(kind, [])
        if len(counting) == 1 and counting[0]() is self:
            return True
        if self._ref not in counting:
            _counting[kind] = [ref for ref in counting if ref() is not None] + [self._ref]
        for values in [ref() for ref in counting]:
            if values is not None and values._order > self._order:
                ids = values.ids(group)
                if ids if deployment_id is None else deployment_id in ids:
                    return False
        return True

    def retire(self) -> None:
        """Count no longer, so that another router may. Its requests in flight are ended."""
        for kind, counting in list(_counting.items()):
            _counting[kind] = [ref for ref in counting if ref is not self._ref]
        for in_flight in list(self.in_flight.values()):
            in_flight.retire()

    def count_new(self, kind: str, key: str, count: Any, before: int) -> None:
        """Count what a strategy has added since it read. kind: tpm or rpm."""
        new = int(count) - before
        if new:
            self.usage[kind].add(key, new)


class DeploymentInFlight:
    """Requests in flight to a deployment."""

    __slots__ = ("_deployments", "_requests", "_values", "deployment_id", "uncounted")

    def __init__(self, values: SharedValues, deployment_id: str) -> None:
        self._values, self._deployments = values, values.deployments
        self.deployment_id = deployment_id
        self._requests: deque[tuple[float, Any]] = deque()  # that this process began
        # Those of them that only this process sees, since the segment's process table is full.
        self.uncounted = 0

    def read(self) -> int:
        return self._deployments.in_flight((self.deployment_id,))[0] + self.uncounted

    def increment(self, by: Any) -> int:
        """A request has begun (by > 0) or ended (by < 0). One whose end LiteLLM has not reported is
        given up after an hour. Returns the requests of this process."""
        requests, now = self._requests, time.monotonic()
        if by > 0 and self._values.counts(DeploymentInFlight, None, self.deployment_id):
            request = self._deployments.begin(self.deployment_id)
            self.uncounted += request is None
            requests.append((now, request))
        with contextlib.suppress(IndexError):  # empty, or another thread took the last one
            if by < 0:
                self._end(requests.pop()[1])
            while requests[0][0] < now - _HOUR:
                self._end(requests.popleft()[1])
        return len(requests)

    def _end(self, request: Any) -> None:
        if request is None:
            self.uncounted -= 1
        else:
            self._deployments.end(request)

    def write(self, value: Any) -> None:
        """LiteLLM writes 0 where its own count fell below 0: there is nothing to end."""

    def retire(self) -> None:
        while self._requests:
            self._end(self._requests.pop()[1])

    def forget(self) -> None:
        """In a forked child: the requests in flight are its parent's."""
        self._requests.clear()
        self.uncounted = 0


class DeploymentUsage:
    """Tokens or requests of a deployment in a minute of the clock."""

    __slots__ = ("_counter", "_id", "_key", "_values")

    def __init__(self, values: SharedValues, key: str) -> None:
        self._values, self._key = values, key
        self._id, self._counter = key.partition(":")[0], values.usage[key[-9:-6]]

    def read(self) -> int | None:
        """None: nothing was counted."""
        return self._counter.count(self._key) or None

    def increment(self, by: Any) -> int:
        if not self._values.counts(DeploymentUsage, None, self._id):
            return self._counter.count(self._key)
        return self._counter.add(self._key, int(by))

    def write(self, value: Any) -> None:
        """LiteLLM writes what it has read from Redis: that is counted already."""


class _ByDeployment(dict[str, Any]):
    """What a strategy has read, by deployment id. It adds to the dict and writes it back: the
    difference from ``before`` is new, whatever other workers have counted in between."""

    before: dict[str, Any]


class _OfGroup:
    """A value of a group, which the strategy reads and writes as a dict by deployment."""

    __slots__ = ("_group", "_values")

    def __init__(self, values: SharedValues, group: str) -> None:
        self._values, self._group = values, group

    def increment(self, by: Any) -> Any:
        raise TypeError("a dict of numbers by deployment cannot be incremented")

    def write(self, value: Mapping[str, Any]) -> None:
        if self._values.counts(type(self), self._group):
            before = getattr(value, "before", {})
            for deployment_id, entry in value.items():
                self._write(deployment_id, entry, before.get(deployment_id))

    def _write(self, deployment_id: str, entry: Any, before: Any) -> None:
        raise NotImplementedError


class GroupUsage(_OfGroup):
    """Tokens or requests in a minute of the clock, of each deployment of a group."""

    __slots__ = ("_kind", "_minute")

    def __init__(self, values: SharedValues, group: str, minute: str) -> None:
        super().__init__(values, group)
        self._kind, self._minute = minute[:3], minute

    def read(self) -> _ByDeployment | None:
        found, counter = _ByDeployment(), self._values.usage[self._kind]
        for deployment_id in self._values.ids(self._group):
            count = counter.count(f"{deployment_id}:{self._minute}")
            if count:
                found[deployment_id] = count
        found.before = dict(found)
        return found or None

    def _write(self, deployment_id: str, entry: Any, before: int | None) -> None:
        key = f"{deployment_id}:{self._minute}"
        self._values.count_new(self._kind, key, entry, before or 0)


class _Mean(list[float]):
    """The mean, in place of the list of last latencies: what a strategy appends to it is new."""


class GroupLatency(_OfGroup):
    """For each deployment of a group: seconds for a token, seconds to the first token of a stream,
    and usage in this minute of the clock. Their decaying mean stands in place of the last
    latencies."""

    __slots__ = ()

    def read(self) -> _ByDeployment | None:
        found = _ByDeployment()
        found.before = {}
        minute = datetime.now().strftime("%Y-%m-%d-%H-%M")
        ids = tuple(self._values.ids(self._group))
        known = self._values.deployments.latencies(ids)
        for deployment_id, (latency, first_token) in zip(ids, known, strict=True):
            entry: dict[str, Any] = {}
            if latency is not None:
                entry[_LATENCIES] = _Mean((latency,))
            if first_token is not None:
                entry[_FIRST_TOKENS] = _Mean((first_token,))
            key = _minute_key(deployment_id, minute)
            usage = {kind: counter.count(key) for kind, counter in self._values.usage.items()}
            if any(usage.values()):
                entry[minute], found.before[deployment_id] = usage, {minute: dict(usage)}
            if entry:
                found[deployment_id] = entry
        return found or None

    def _write(self, deployment_id: str, entry: Any, before: Mapping[str, Any] | None) -> None:
        latency, first_token = _appended(entry.get(_LATENCIES)), _appended(entry.get(_FIRST_TOKENS))
        if latency is not None or first_token is not None:
            self._values.deployments.record(deployment_id, latency, first_token)
        for minute, usage in entry.items():
            if isinstance(usage, dict):
                old, key = (before or {}).get(minute, {}), _minute_key(deployment_id, minute)
                for kind, count in usage.items():
                    self._values.count_new(kind, key, count, old.get(kind, 0))


def _appended(latencies: Any) -> float | None:
    """What a strategy has appended. When its list is full, it makes a new one without the first."""
    known = len(latencies) == 1 if isinstance(latencies, _Mean) else not latencies
    return None if known else latencies[-1]


def _minute_key(deployment_id: str, minute: str) -> str:
    return f"{deployment_id}:latency:{minute[-5:]}"
