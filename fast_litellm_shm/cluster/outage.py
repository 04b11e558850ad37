"""What a host does by itself while the server does not answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fast_litellm_shm.cluster import agent
from fast_litellm_shm.cluster.asking import open_limiter
from fast_litellm_shm.cluster.script import Request
from fast_litellm_shm.handle import SharedLimits
from fast_litellm_shm.inspection import LOCAL
from fast_litellm_shm.limits import AnyLimit, Limit
from fast_litellm_shm.native import lib
from fast_litellm_shm.settings import warn_once

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.wallet import Told, Wallet

_MOST_OWED = 100_000  # keys


def share(limit: AnyLimit, hosts: int) -> AnyLimit | None:
    """A host's part of a limit; None: less than one token."""
    n = limit.n // hosts
    if n < 1:
        return None
    if isinstance(limit, Limit):
        burst = min(max(limit.burst // hosts, 1), n)
        return Limit(n, limit.per, burst=burst, strict=limit.strict)
    return type(limit)(n, limit.per)


class Outage:
    """Of one limiter. What it admits meanwhile is charged at the server when that is back, as far
    as the limit has room then: nothing is admitted a second time."""

    def __init__(self, shared: SharedLimits, wallet: Wallet) -> None:
        self._shared, self._wallet = shared, wallet
        self._share: tuple[Any, Any] | None = None  # what it was made for, and the limiter
        self._owed: dict[bytes, tuple[float, list[int]]] = {}
        self._lock = threading.Lock()
        wallet.link.owing.add(self)

    def decide(self, op: int, raw: bytes, costs: tuple[int, ...]) -> Told:
        policy, link = self._wallet.cluster.on_outage, self._wallet.link
        handle = self._shared._handle
        if op in (lib.FSHM_CHARGE, lib.FSHM_REFUND):
            if op == lib.FSHM_CHARGE:
                self._owe(raw, costs)
            return self._told(self._wallet._apply(handle, op, raw, costs))
        if policy == "allow":
            if op == lib.FSHM_ACQUIRE:
                self._owe(raw, costs)
            return (1, 0, 0, 0, 0)
        if policy == "deny":
            return (0, 0, 0, link.retry_after_ns, 0)
        mine = self._limiter()
        if mine is None:
            return (0, 0, 0, link.retry_after_ns, 0)
        if op == lib.FSHM_PEEK:
            return self._told(self._wallet._apply(mine, op, raw, costs))
        # by what was last known of all hosts, and by the share
        known = self._wallet._apply(handle, lib.FSHM_ACQUIRE, raw, costs)
        if known.status != lib.FSHM_ALLOWED:
            return self._told(known)
        told = self._wallet._apply(mine, lib.FSHM_ACQUIRE, raw, costs)
        if told.status == lib.FSHM_ALLOWED:
            self._owe(raw, costs)
        else:
            self._wallet._apply(handle, lib.FSHM_REFUND, raw, costs)
        return self._told(told)

    def _limiter(self) -> Any:
        hosts = agent.hosts(self._shared.segment)
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

    def _owe(self, raw: bytes, costs: tuple[int, ...]) -> None:
        longest = max(each.per_us for each in self._wallet.rules()) / 1e6
        now = time.monotonic()
        with self._lock:
            began, owed = self._owed.get(raw, (now, [0] * len(costs)))
            if now - began > longest:  # all that is over by now
                began, owed = now, [0] * len(costs)
            if raw in self._owed or len(self._owed) < _MOST_OWED:
                self._owed[raw] = (began, [a + b for a, b in zip(owed, costs, strict=True)])

    def owed(self) -> list[Request]:
        with self._lock:
            owed, self._owed = self._owed, {}
        longest = max(each.per_us for each in self._wallet.rules()) / 1e6
        oldest = time.monotonic() - longest
        return [
            self._wallet.request("fill", key, costs)[0]
            for key, (began, costs) in owed.items()
            if began >= oldest
        ]

    def forked(self) -> None:
        self._owed, self._lock = {}, threading.Lock()

    def put_back(self, requests: Sequence[Request]) -> None:
        for each in requests:
            self._owe(each.key, tuple(each.costs))
