"""The numbers in a router's cache, shared by all workers of the host.

LiteLLM's routing strategies keep their numbers in the router's cache, under keys of their own, and
pick by what they read there (``litellm/router_strategy/*.py``). Here are those keys, and what is
read and written in their stead; so each strategy keeps its own rules and its own bookkeeping.

========================  ===================================  ==================================
strategy                  key                                  value
========================  ===================================  ==================================
least-busy                ``{group}_request_count:{id}``       requests in flight
usage-based-routing-v2    ``{id}:{model}:tpm:{HH-MM}``, rpm    a number (the same that LiteLLM's
                                                               ``enforce_model_rate_limits`` uses)
usage-based-routing       ``{group}:tpm:{HH-MM}``, rpm         numbers by id
latency-based-routing     ``{group}_map``                      by id: latencies, usage by minute
========================  ===================================  ==================================

Each class is one key: ``read()`` gives what is to be read in place of the router's own number,
``added(by)`` what it is after it was increased, and ``wrote(value)`` is told what was written. The
router's own cache is written too: it serves where the segment cannot.

LiteLLM's strategies are told of all calls of a process, by whichever of its routers they were
made. So that nothing is counted twice, a router counts its own deployments only; and where two of
a process have the same, the one that was attached last.
"""

from __future__ import annotations

import contextlib
import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any, TypeAlias

from fast_litellm_shm.integrations.litellm.router.deployments import Statistics
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow

_HOUR = 3600.0  # LiteLLM forgets counts of requests in flight, and latencies, after so long
# A minute of a deployment. The end of a window is kept to twice as many ns; and what is given back
# (a request that was refused) arrives whole only where that is less than the time of one.
_MOST = {"tpm": 2**28 - 1, "rpm": 2**17 - 1}
_MOST_KEYS = 4096  # that are remembered for what they are
_IDS_SECONDS = 1.0  # how long the ids of a group are kept

Number: TypeAlias = "InFlight | Usage | UsageOfGroup | LatencyOfGroup"

_LATENCIES, _FIRST_TOKENS = "latency_normalized", "time_to_first_token_seconds"

_order = itertools.count()
_counting: dict[type, list[weakref.ref[Numbers]]] = {}  # by what they have been told to count


class Numbers:
    """Tells what a key stands for. ids_of: the deployment ids of a model group, or of all (None).
    Raises SegmentError where no segment is to be had."""

    def __init__(
        self, statistics: Statistics, ids_of: Callable[[str | None], frozenset[str]]
    ) -> None:
        self.statistics = statistics
        self._usage = {
            kind: RateLimiter(
                FixedWindow(most), name=f"litellm deployment {kind}", on_full="raise", cluster=False
            )
            for kind, most in _MOST.items()
        }
        self._ids_of = ids_of
        self._ids: dict[str | None, tuple[float, frozenset[str]]] = {}
        self._known: dict[str, Number | None] = {}
        self.in_flight: dict[str, InFlight] = {}  # never forgotten: they hold what is to be ended
        self._order, self._ref = next(_order), weakref.ref(self)

    def of(self, key: Any) -> Number | None:
        """None: not one of those that are shared."""
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

    def _find(self, key: Any) -> tuple[Number | None, bool]:
        """And whether it stays so: a group may be added."""
        if not isinstance(key, str):
            return None, True
        _, counts, deployment_id = key.rpartition("_request_count:")
        if counts:
            if deployment_id not in self.ids(None):
                return None, False
            return self.in_flight.setdefault(key, InFlight(self, deployment_id)), True
        if key.endswith("_map"):
            group = key[: -len("_map")]
            known = bool(self.ids(group))
            return (LatencyOfGroup(self, group) if known else None), known
        if key[-10:-5] not in (":tpm:", ":rpm:") or key[-3:-2] != "-":
            return None, True
        head = key[:-10]
        if head.partition(":")[0] in self.ids(None):
            return Usage(self, key), True
        return (UsageOfGroup(self, head, key[-9:]) if self.ids(head) else None), False

    def ids(self, group: str | None) -> frozenset[str]:
        now = time.monotonic()
        known = self._ids.get(group)
        if known is None or now >= known[0]:
            if len(self._ids) >= _MOST_KEYS:
                self._ids.clear()
            known = self._ids[group] = now + _IDS_SECONDS, self._ids_of(group)
        return known[1]

    def all_in_flight(self, keys: Sequence[Any]) -> list[int] | None:
        """Of keys that are all of requests in flight, the numbers, by one look; else None."""
        found = [self.of(key) for key in keys]
        numbers = [number for number in found if isinstance(number, InFlight)]
        if not numbers or len(numbers) < len(found):
            return None
        counts = self.statistics.in_flight([number.deployment_id for number in numbers])
        return [c + number.uncounted for c, number in zip(counts, numbers, strict=True)]

    def counts(self, kind: type, group: str | None, deployment_id: str | None = None) -> bool:
        """Whether this router is the one of its process that counts numbers of a kind: of a group,
        or (None) of a deployment."""
        counting = _counting.setdefault(kind, [])
        if len(counting) == 1 and counting[0]() is self:
            return True
        if self._ref not in counting:
            _counting[kind] = [ref for ref in counting if ref() is not None] + [self._ref]
        for numbers in [ref() for ref in counting]:
            if numbers is not None and numbers._order > self._order:
                ids = numbers.ids(group)
                if ids if deployment_id is None else deployment_id in ids:
                    return False
        return True

    def retire(self) -> None:
        """No longer count; another router may. What is in flight is not shown any more."""
        for kind, counting in list(_counting.items()):
            _counting[kind] = [ref for ref in counting if ref is not self._ref]
        for in_flight in list(self.in_flight.values()):
            in_flight.retire()

    def count(self, kind: str, key: str, by: int) -> int:
        """Add to the counter of a minute, or take from it; returns what it is then. kind: tpm or
        rpm."""
        limiter = self._usage[kind]
        decision = limiter.charge(key, by) if by >= 0 else limiter.refund(key, -by)
        return _MOST[kind] - decision.remaining

    def counted(self, kind: str, key: str) -> int:
        """What the counter is."""
        return _MOST[kind] - self._usage[kind].peek(key, 0).remaining


class InFlight:
    """Requests in flight to a deployment."""

    __slots__ = ("_flights", "_numbers", "_statistics", "deployment_id", "uncounted")

    def __init__(self, numbers: Numbers, deployment_id: str) -> None:
        self._numbers, self._statistics = numbers, numbers.statistics
        self.deployment_id = deployment_id
        self._flights: deque[tuple[float, Any]] = deque()  # those that this process began
        # of them those that nobody else sees: the segment's process table is full
        self.uncounted = 0

    def read(self) -> int:
        return self._statistics.in_flight((self.deployment_id,))[0] + self.uncounted

    def added(self, by: Any) -> int:
        """One has begun, or ended. One whose end nobody told is given up after an hour. Returns
        those of this process."""
        flights, now = self._flights, time.monotonic()
        if by > 0 and self._numbers.counts(InFlight, None, self.deployment_id):
            flight = self._statistics.begin(self.deployment_id)
            self.uncounted += flight is None
            flights.append((now, flight))
        with contextlib.suppress(IndexError):  # none is left; another thread may have been quicker
            if by < 0:
                self._end(flights.pop()[1])
            while flights[0][0] < now - _HOUR:
                self._end(flights.popleft()[1])
        return len(flights)

    def _end(self, flight: Any) -> None:
        if flight is None:
            self.uncounted -= 1
        else:
            self._statistics.end(flight)

    def wrote(self, value: Any) -> None:
        """LiteLLM writes 0 where it has counted below: there is nothing to be ended."""

    def retire(self) -> None:
        while self._flights:
            self._end(self._flights.pop()[1])

    def forget(self) -> None:
        """In a forked child: what is in flight is its parent's."""
        self._flights.clear()
        self.uncounted = 0


class Usage:
    """Tokens or requests of a deployment in a minute of the clock."""

    __slots__ = ("_id", "_key", "_kind", "_numbers")

    def __init__(self, numbers: Numbers, key: str) -> None:
        self._numbers, self._key = numbers, key
        self._id, self._kind = key.partition(":")[0], key[-9:-6]

    def read(self) -> int | None:
        """None: nobody has written it."""
        return self._numbers.counted(self._kind, self._key) or None

    def added(self, by: Any) -> int:
        if not self._numbers.counts(Usage, None, self._id):
            return self._numbers.counted(self._kind, self._key)
        return self._numbers.count(self._kind, self._key, int(by))

    def wrote(self, value: Any) -> None:
        """LiteLLM writes what it has read from Redis: it is not counted again."""


class _ByDeployment(dict[str, Any]):
    """What was read, by deployment id. A strategy adds to it and writes it back: what it has more
    than before is new, whatever others have written in between."""

    before: dict[str, Any]


class UsageOfGroup:
    """Tokens or requests in a minute of the clock, of each deployment of a group."""

    __slots__ = ("_group", "_minute", "_numbers")

    def __init__(self, numbers: Numbers, group: str, minute: str) -> None:
        self._numbers, self._group, self._minute = numbers, group, minute

    def read(self) -> Any:
        found = _ByDeployment()
        for deployment_id in self._numbers.ids(self._group):
            count = self._numbers.counted(self._minute[:3], f"{deployment_id}:{self._minute}")
            if count:
                found[deployment_id] = count
        found.before = dict(found)
        return found or None

    def wrote(self, value: Any) -> None:
        if not self._numbers.counts(UsageOfGroup, self._group):
            return
        before = getattr(value, "before", {})
        for deployment_id, count in value.items():
            new = int(count) - before.get(deployment_id, 0)
            if new:
                key = f"{deployment_id}:{self._minute}"
                self._numbers.count(self._minute[:3], key, new)

    def added(self, by: Any) -> Any:
        raise TypeError("a dict of numbers by deployment cannot be increased")


class _Mean(list[float]):
    """In place of the last latencies, their mean: what a strategy puts behind it is new."""


class LatencyOfGroup:
    """Of each deployment of a group: seconds for a token, and to the first token of a stream; and
    usage in this minute of the clock. In place of the last latencies stands their decaying mean."""

    __slots__ = ("_group", "_numbers")

    def __init__(self, numbers: Numbers, group: str) -> None:
        self._numbers, self._group = numbers, group

    def read(self) -> Any:
        found = _ByDeployment()
        found.before = {}
        minute = datetime.now().strftime("%Y-%m-%d-%H-%M")
        ids = tuple(self._numbers.ids(self._group))
        known = self._numbers.statistics.latencies(ids)
        for deployment_id, (latency, first) in zip(ids, known, strict=True):
            entry: dict[str, Any] = {}
            if latency is not None:
                entry[_LATENCIES] = _Mean((latency,))
            if first is not None:
                entry[_FIRST_TOKENS] = _Mean((first,))
            usage = {
                kind: self._numbers.counted(kind, _usage(deployment_id, minute))
                for kind in ("tpm", "rpm")
            }
            if any(usage.values()):
                entry[minute], found.before[deployment_id] = usage, {minute: dict(usage)}
            if entry:
                found[deployment_id] = entry
        return found or None

    def wrote(self, value: Any) -> None:
        if not self._numbers.counts(LatencyOfGroup, self._group):
            return
        before = getattr(value, "before", {})
        for deployment_id, entry in value.items():
            latency, first = _new(entry.get(_LATENCIES)), _new(entry.get(_FIRST_TOKENS))
            if latency is not None or first is not None:
                self._numbers.statistics.record(deployment_id, latency, first)
            for minute, usage in entry.items():
                if isinstance(usage, dict):
                    old = before.get(deployment_id, {}).get(minute, {})
                    for kind, count in usage.items():
                        new = int(count) - old.get(kind, 0)
                        if new:
                            self._numbers.count(kind, _usage(deployment_id, minute), new)

    def added(self, by: Any) -> Any:
        raise TypeError("a dict of numbers by deployment cannot be increased")


def _new(latencies: Any) -> float | None:
    """What a strategy has appended. Where it keeps as many as it wants already, it makes a new list
    without the first."""
    known = len(latencies) == 1 if isinstance(latencies, _Mean) else not latencies
    return None if known else latencies[-1]


def _usage(deployment_id: str, minute: str) -> str:
    return f"{deployment_id}:latency:{minute[-5:]}"
