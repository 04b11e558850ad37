"""Settlement: the actual minus the estimated usage of a call, known when the call is over. More is
charged at the server, into debt if need be; less is given back there, as long as its window lasts.

A caller that may not wait for the server (an event loop, the garbage collector) leaves it to a
thread: in ``connection.settlements``, a deque, since the collector may run at any line, also at one
that holds a lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fast_litellm_shm.cluster.algorithms import Request
from fast_litellm_shm.cluster.link import Learner, Link

_MOST = 200  # requests in one pipeline
_NOTHING = (0, 0, 0, 0)


class Leases(Learner, Protocol):
    """TokenLeases, as the modules below it use them."""

    single_flight: Any

    def request(
        self, operation: str, raw: bytes, costs: Sequence[int], *, ends: Sequence[int] | None = ...
    ) -> tuple[Request, int]: ...
    def charge_later(self, raw: bytes, costs: Sequence[int]) -> None: ...


class Settlement(NamedTuple):
    """Of one call: tokens by limit; all limits are windows. ``ends``: of the windows that ``less``
    was charged in, segment time, ns."""

    leases: Leases
    raw: bytes
    more: tuple[int, ...]
    less: tuple[int, ...]
    ends: tuple[int, ...]


def _sum(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=False))


def report(connection: Link, settlements: Sequence[Settlement]) -> None:
    """One call of the server for each key and kind, many in a round trip. Raises UnreachableError:
    what could not be charged is charged later, what could not be given back stays used."""
    charges: dict[tuple[Leases, bytes], tuple[int, ...]] = {}
    refunds: dict[tuple[Leases, bytes, tuple[int, ...]], tuple[int, ...]] = {}
    for each in settlements:
        if any(each.more):
            key = each.leases, each.raw
            charges[key] = _sum(charges.get(key, _NOTHING), each.more)
        if any(each.less):
            window = each.leases, each.raw, each.ends
            refunds[window] = _sum(refunds.get(window, _NOTHING), each.less)
    due = list(charges.items())
    try:
        while due:
            part = [(of, *of.request("charge", raw, costs)) for (of, raw), costs in due[:_MOST]]
            connection.call_all(part)
            del due[:_MOST]
    except BaseException:
        for (leases, raw), costs in due:
            leases.charge_later(raw, costs)
        raise
    now = connection.segment.geometry().time_ns
    back = [
        (leases, *leases.request("refund", raw, costs, ends=ends))
        for (leases, raw, ends), costs in refunds.items()
        if any(end > now for end in ends)
    ]
    connection.call_all(back)


def taken(connection: Link) -> list[Settlement]:
    """The next settlements that were left to the thread, at most 200."""
    found: list[Settlement] = []
    while connection.settlements and len(found) < _MOST:
        found.append(connection.settlements.popleft())
    return found


def keep(connection: Link) -> None:
    """During an outage: what is to be charged is charged when the server is back."""
    while settlements := taken(connection):
        for each in settlements:
            if any(each.more):
                each.leases.charge_later(each.raw, each.more)
