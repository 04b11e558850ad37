"""What a host does by itself while the server does not answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fast_litellm_shm._shared.inspection import LOCAL
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.settings import warn_once
from fast_litellm_shm.cluster import background
from fast_litellm_shm.cluster.single_flight import open_limiter
from fast_litellm_shm.cluster.algorithms import Request, Rule
from fast_litellm_shm.limits import LimitSpec, TokenBucket

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.token_lease import Told, TokenLeases

_MOST_OWED = 100_000  # keys


def share(limit: LimitSpec, hosts: int) -> LimitSpec | None:
    """A host's part of a limit; None: less than one token."""
    n = limit.n // hosts
    if n < 1:
        return None
    if isinstance(limit, TokenBucket):
        burst = min(max(limit.burst // hosts, 1), n)
        return TokenBucket(n, limit.per, burst=burst, strict=limit.strict)
    return type(limit)(n, limit.per)


class Debt(NamedTuple):
    """Of a key and one limit: tokens that were admitted here, and are over at ``end`` (segment
    time, ns) or a ``life`` later; ``older`` ones at ``end``.

    A window has no life: what was admitted in it is over with it, exactly. Of the other limits,
    tokens are charged for one life at least, and for less than three: a sliding window's until it
    has slid past them (``per``), a bucket's until it has refilled from empty. So what is charged
    may be over in part, and what is not charged is over.
    """

    end: int
    cost: int
    older: int = 0

    def left(self, life: int, now: int) -> int:
        """Tokens that are not over."""
        if now < self.end:
            return self.cost + self.older
        return self.cost if now < self.end + life else 0

    def joined(self, other: Debt, life: int, now: int) -> Debt:
        """Both of them. Where both go on, they are over with the first to be, and a life later;
        windows with the last."""
        first, last = sorted((self, other))
        if now >= first.end:
            older = first.left(life, now)
            end = min(last.end, first.end + life) if older and not last.older else last.end
            return Debt(end, last.cost, last.older + older)
        end = first.end if life else last.end
        return Debt(end, first.cost + last.cost, first.older + last.older)


_NONE = (Debt(0, 0),) * 4


def _life(rule: Rule) -> int:
    if rule.kind == 0:
        return rule.burst * rule.num // rule.den + 1
    return rule.per_us * 1000 if rule.kind == 2 else 0


class Outage:
    """Of one limiter. What it admits meanwhile is charged at the server when that is back, as far
    as the limit has room then: nothing is admitted a second time."""

    def __init__(self, shared: SharedLimits, wallet: TokenLeases) -> None:
        self._shared, self._wallet = shared, wallet
        self._share: tuple[Any, Any] | None = None  # what it was made for, and the limiter
        self._owed: dict[bytes, tuple[Debt, ...]] = {}
        self._told_now: dict[bytes, tuple[Debt, ...]] = {}  # being told, and not known to be
        self._lock = threading.Lock()
        wallet.link.owing.add(self)

    def decide(self, op: int, raw: bytes, costs: tuple[int, ...]) -> Told:
        """Whoever acquires is counted once, by what is decided: here, or by the limiter's own
        meter, which counts what it denies, and what it admits."""
        policy, link = self._wallet.cluster.on_outage, self._wallet.link
        handle, apply = self._shared._handle, self._wallet._apply
        if op in (lib.FSHM_CHARGE, lib.FSHM_REFUND):
            told = apply(handle, op, raw, costs)
            if op == lib.FSHM_CHARGE:
                self._owe(raw, costs, handle)
            return self._told(told)
        calls = op == lib.FSHM_ACQUIRE
        if policy == "allow":
            if calls:
                self._owe(raw, costs, None)
                self._wallet.count(raw, lib.FSHM_ALLOWED)
            return (1, 0, 0, 0, 0)
        mine = self._limiter() if policy == "local" else None
        if mine is None:
            if calls:
                self._wallet.count(raw, lib.FSHM_DENIED)
            return (0, 0, 0, link.retry_after_ns, 0)
        if not calls:
            return self._told(apply(mine, op, raw, costs))
        # by what was last known of all hosts, and by the share
        known = apply(handle, lib.FSHM_PROBE, raw, costs)
        if known.status != lib.FSHM_ALLOWED:
            return self._told(known)
        told = apply(mine, lib.FSHM_ACQUIRE, raw, costs)
        if told.status != lib.FSHM_ALLOWED:
            self._wallet.count(raw, told.status)
            return self._told(told)
        known = apply(handle, lib.FSHM_ACQUIRE, raw, costs)
        if known.status != lib.FSHM_ALLOWED:  # somebody was faster
            apply(mine, lib.FSHM_REFUND, raw, costs)
            return self._told(known)
        self._owe(raw, costs, mine)
        return self._told(told)

    def _limiter(self) -> Any:
        hosts = host_count(self._shared.segment)
        if not hosts:
            warn_once(
                f"{self._wallet.cluster.shown} has never answered here, so it is not known how "
                "many hosts share the limits: requests are denied until it does"
            )
            return None
        wanted = (hosts, self._shared.limits)
        if self._share is None or self._share[0] != wanted:
            parts = [share(each, hosts) for each in self._shared.limits]
            made = None if None in parts else open_limiter(self._shared, LOCAL, parts)
            self._share = (wanted, made)
        return self._share[1]

    @staticmethod
    def _told(told: Any) -> Told:
        return (
            told.status, told.limit_index, told.remaining, told.retry_after_ns, told.reset_after_ns,
        )  # fmt: skip

    def _owe(self, raw: bytes, costs: tuple[int, ...], meter: Any) -> None:
        """meter: the limiter by which it was admitted, whose windows it is in; None: by none, and
        then windows are this process's own, which begin with what it first owes."""
        rules, now = self._wallet.rules(), self._now()
        left = ffi.new("uint64_t[4]")
        if meter is not None:
            lib.fshm_known(meter, raw, len(raw), 0, ffi.new("uint64_t[4]"), left)
        with self._lock:
            known = self._owed.get(raw)
            if known is None and len(self._owed) >= _MOST_OWED:
                return
            begun = known or self._told_now.get(raw, _NONE)
            debts = list(known or _NONE)
            for i, (rule, cost) in enumerate(zip(rules, costs, strict=False)):
                life = _life(rule)
                if life:
                    end = now + life
                elif meter is not None:
                    end = now + int(left[i])
                else:
                    end = begun[i].end if now < begun[i].end else now + rule.per_us * 1000
                debts[i] = debts[i].joined(Debt(end, cost), life, now)
            self._owed[raw] = tuple(debts)

    def _now(self) -> int:
        return int(lib.fshm_now(self._shared.segment._handle))

    def owed(self) -> list[Request]:
        lives, now = [_life(each) for each in self._wallet.rules()], self._now()
        with self._lock:
            self._told_now, self._owed = self._owed, {}
            told = list(self._told_now.items())
        found = []
        for key, debts in told:
            costs = [each.left(life, now) for each, life in zip(debts, lives, strict=False)]
            if any(costs):
                found.append(self._wallet.request("fill", key, costs)[0])
        return found

    def put_back(self, requests: Sequence[Request]) -> None:
        """As it was: when it is over depends on when it was admitted."""
        lives, now = [_life(each) for each in self._wallet.rules()], self._now()
        lives += [0] * (4 - len(lives))
        with self._lock:
            for each in requests:
                debts = zip(
                    self._told_now[each.key], self._owed.get(each.key, _NONE), lives, strict=True
                )
                self._owed[each.key] = tuple(a.joined(b, life, now) for a, b, life in debts)
            self._told_now = {}

    def forked(self) -> None:
        self._owed, self._told_now, self._lock = {}, {}, threading.Lock()
