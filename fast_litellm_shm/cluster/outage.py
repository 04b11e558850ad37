"""What a host does by itself while the grantor does not answer."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from fast_litellm_shm._shared.named_limiter import SharedLimits, states_of
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.settings import warn_once
from fast_litellm_shm._shared.side_limiters import LOCAL
from fast_litellm_shm._shared.states import States
from fast_litellm_shm.cluster.algorithms import Request, Rule
from fast_litellm_shm.cluster.link import Link
from fast_litellm_shm.cluster.single_flight import beside
from fast_litellm_shm.limits import LimitSpec, TokenBucket

# status, limit_index, remaining, retry_after_ns, reset_after_ns
Decided: TypeAlias = tuple[int, int, int, int, int]

_MOST_KEYS = 100_000  # with unreported usage


def decided(found: Any) -> Decided:
    """Of a ``fshm_decision``."""
    return (
        found.status, found.limit_index, found.remaining, found.retry_after_ns,
        found.reset_after_ns,
    )  # fmt: skip


def known_hosts(connection: Link) -> int:
    """How many hosts share the limits; 0: not known, which is logged."""
    hosts = connection.hosts()
    if not hosts:
        warn_once(
            f"{connection.terms.shown} has never answered here, so it is not known what is left of "
            "the limits: requests are denied until it does"
        )
    return hosts


def share(limit: LimitSpec, hosts: int) -> LimitSpec | None:
    """A host's part of a limit; None: less than one token."""
    n = limit.n // hosts
    if n < 1:
        return None
    if isinstance(limit, TokenBucket):
        burst = min(max(limit.burst // hosts, 1), n)
        return TokenBucket(n, limit.per, burst=burst, strict=limit.strict)
    return dataclasses.replace(limit, n=n)


class Usage(NamedTuple):
    """Unreported usage of a key, of one limit: ``cost`` tokens expire at ``end`` (segment time, ns)
    or one ``memory`` later, ``older`` ones at ``end``.

    A fixed window has no memory: its tokens expire exactly with the window. Of the other limits,
    tokens are reported for one memory at least, and for less than three. A sliding window's memory
    is ``per``; a bucket's is the time in which it refills from empty. So what is reported may have
    expired in part, and what is not reported has expired.
    """

    end: int
    cost: int
    older: int = 0

    def left(self, memory: int, now: int) -> int:
        """Tokens that have not expired."""
        if now < self.end:
            return self.cost + self.older
        return self.cost if now < self.end + memory else 0

    def joined(self, other: Usage, memory: int, now: int) -> Usage:
        """Both of them. Where neither has expired, they expire with the first of them, and one
        memory later; in fixed windows with the last."""
        first, last = sorted((self, other))
        if now >= first.end:
            older = first.left(memory, now)
            end = min(last.end, first.end + memory) if older and not last.older else last.end
            return Usage(end, last.cost, last.older + older)
        end = first.end if memory else last.end
        return Usage(end, first.cost + last.cost, first.older + last.older)


_NONE = (Usage(0, 0),) * 4


def _memory(rule: Rule) -> int:
    if rule.kind == 0:
        return rule.burst * rule.num // rule.den + 1
    return rule.per_us * 1000 if rule.kind == 2 else 0


class Outage:
    """Of one limiter. What it admits meanwhile is charged at the server after the outage, as far as
    the limit has room then: nothing is admitted a second time. rules: of the limits in force.
    request, learn: of
    TokenLeases."""

    def __init__(
        self,
        limiter: SharedLimits,
        connection: Link,
        rules: Callable[[], tuple[Rule, ...]],
        request: Callable[[str, bytes, Sequence[int]], tuple[Request, int]],
        learn: Callable[[Request, Any, int], object],
    ) -> None:
        self._limiter, self._states = limiter, states_of(limiter)
        self._connection, self._rules = connection, rules
        self._request, self._learn = request, learn
        self._share: tuple[Any, States | None] | None = None  # what it was made for, and its states
        self._usage: dict[bytes, tuple[Usage, ...]] = {}
        self._reporting: dict[bytes, tuple[Usage, ...]] = {}  # on its way to the server
        self._lock = threading.Lock()
        connection.unreported.add(self)

    def decide(self, op: int, raw: bytes, costs: tuple[int, ...]) -> Decided:
        """The statistics of the key count an acquire once: here, or in the limiter's own state,
        which counts what it denies, and what it admits."""
        policy, states = self._connection.terms.on_outage, self._states
        if op in (lib.FSHM_CHARGE, lib.FSHM_REFUND):
            found = states.apply(op, raw, costs)
            if op == lib.FSHM_CHARGE:
                self._keep(raw, costs, states)
            return decided(found)
        acquires = op == lib.FSHM_ACQUIRE
        if policy == "allow":
            if acquires:
                self._keep(raw, costs, None)
                states.count(raw, lib.FSHM_ALLOWED)
            return (1, 0, 0, 0, 0)
        mine = self._of_share() if policy == "local" and self._knows(raw) else None
        if mine is None:
            if acquires:
                states.count(raw, lib.FSHM_DENIED)
            return (0, 0, 0, self._connection.retry_after_ns, 0)
        if not acquires:
            return decided(mine.apply(op, raw, costs))
        # by what was last known of all hosts, and by the share
        known = states.apply(lib.FSHM_PROBE, raw, costs)
        if known.status != lib.FSHM_ALLOWED:
            return decided(known)
        found = mine.apply(lib.FSHM_ACQUIRE, raw, costs)
        if found.status != lib.FSHM_ALLOWED:
            states.count(raw, found.status)
            return decided(found)
        known = states.apply(lib.FSHM_ACQUIRE, raw, costs)
        if known.status != lib.FSHM_ALLOWED:  # another call was faster
            mine.apply(lib.FSHM_REFUND, raw, costs)
            return decided(known)
        self._keep(raw, costs, mine)
        return decided(found)

    def _knows(self, raw: bytes) -> bool:
        left = self._states.known(raw)[1]
        return self._connection.knows(raw, left, self._request, self._learn)

    def _of_share(self) -> States | None:
        """This host's share of the limits; None: it has none."""
        hosts = known_hosts(self._connection)
        if not hosts:
            return None
        wanted = (hosts, self._limiter.limits)
        if self._share is None or self._share[0] != wanted:
            parts = [part for each in wanted[1] if (part := share(each, hosts))]
            whole = len(parts) == len(wanted[1])
            self._share = (wanted, beside(self._limiter, LOCAL, parts) if whole else None)
        return self._share[1]

    def _keep(self, raw: bytes, costs: tuple[int, ...], by: States | None) -> None:
        """by: the states that admitted it, in whose windows it is; None: none did, and then windows
        are this process's own, which begin with the first unreported usage."""
        rules, now = self._rules(), self._states.now()
        left = (0, 0, 0, 0) if by is None else by.known(raw)[1]
        with self._lock:
            known = self._usage.get(raw)
            if known is None and len(self._usage) >= _MOST_KEYS:
                return
            begun = known or self._reporting.get(raw, _NONE)
            usage = list(known or _NONE)
            for i, (rule, cost) in enumerate(zip(rules, costs, strict=False)):
                memory = _memory(rule)
                if memory:
                    end = now + memory
                elif by is not None:
                    end = now + left[i]
                else:
                    end = begun[i].end if now < begun[i].end else now + rule.per_us * 1000
                usage[i] = usage[i].joined(Usage(end, cost), memory, now)
            self._usage[raw] = tuple(usage)

    def take_unreported(self) -> list[Request]:
        memories, now = [_memory(each) for each in self._rules()], self._states.now()
        with self._lock:
            self._reporting, self._usage = self._usage, {}
            taken = list(self._reporting.items())
        found = []
        for raw, usage in taken:
            costs = [each.left(memory, now) for each, memory in zip(usage, memories, strict=False)]
            if any(costs):
                found.append(self._request("fill", raw, costs)[0])
        return found

    def put_back(self, requests: Sequence[Request]) -> None:
        """With the ends that it had: those depend on when it was admitted."""
        memories, now = [_memory(each) for each in self._rules()], self._states.now()
        memories += [0] * (4 - len(memories))
        with self._lock:
            for each in requests:
                both = self._reporting[each.key], self._usage.get(each.key, _NONE)
                self._usage[each.key] = tuple(
                    a.joined(b, memory, now) for a, b, memory in zip(*both, memories, strict=True)
                )
            self._reporting = {}

    def forked(self) -> None:
        self._usage, self._reporting, self._lock = {}, {}, threading.Lock()
