"""Settlement: the actual minus the estimated usage of a call, known when the call is over. More is
charged at the server, into debt if need be; less is given back there, as long as its window lasts.

A caller that may not wait for the server (an event loop, the garbage collector) leaves it to a
thread: in ``connection.settlements``, a deque, since the collector may run at any line, also at one
that holds a lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from fast_litellm_shm.cluster.algorithms import CALENDAR, Answer, Request, Rule
from fast_litellm_shm.cluster.link import Learner, Link
from fast_litellm_shm.cluster.sliding import KIND as SLIDING

_MOST = 200  # requests in one pipeline
_NOTHING = (0, 0, 0, 0)
_MINUTE = 60_000_000_000


class Leases(Learner, Protocol):
    """TokenLeases, as the modules below it use them."""

    single_flight: Any
    connection: Any

    def request(self, operation: str, raw: bytes, costs: Sequence[int]) -> tuple[Request, int]: ...
    def refund_request(
        self, look: Request, found: Answer, costs: tuple[int, ...]
    ) -> tuple[Request, int]: ...
    def unrefuse(self, raw: bytes) -> None: ...
    def charge_later(self, raw: bytes, costs: Sequence[int]) -> None: ...


class Settlement(NamedTuple):
    """Of one call: tokens by limit. ``ends``: of the windows that ``less`` was charged in (segment
    time, ns), or earlier, by as much as the call took that learned it. Of a sliding window: ``per``
    after the call began. 0: nothing is given back."""

    leases: Leases
    raw: bytes
    more: tuple[int, ...]
    less: tuple[int, ...]
    ends: tuple[int, ...]


class Refund(NamedTuple):
    """ends: as of a Settlement. None: of the windows that are there."""

    leases: Leases
    raw: bytes
    costs: tuple[int, ...]
    ends: tuple[int, ...] | None


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
        Refund(leases, raw, costs, ends)
        for (leases, raw, ends), costs in refunds.items()
        if any(end > now for end in ends)
    ]
    give_back(connection, back)


def give_back(connection: Link, refunds: Sequence[Refund]) -> list[Answer]:
    """First a look, whose answer names the window that is present; then the refund, of that window
    alone. So a refund that is late (its grantor was frozen, say) finds its window gone, and not the
    next one. Many in two round trips. Returns what the grantor has last said of each. Raises
    UnreachableError: what was not given back stays used."""
    found: list[Answer] = []
    for at in range(0, len(refunds), _MOST):
        part = refunds[at : at + _MOST]
        looks = [each.leases.request("look", each.raw, _NOTHING) for each in part]
        answers: list[Answer] = connection.call([look for look, _ in looks])
        got = connection.segment.geometry().time_ns
        due: dict[int, tuple[Request, int]] = {}
        for i, (each, (look, sent), answer) in enumerate(zip(part, looks, answers, strict=True)):
            each.leases.learn(look, answer, sent)
            costs = _costs(each, look.rules, answer, sent, got)
            if any(costs):
                due[i] = each.leases.refund_request(look, answer, costs)
            each.leases.unrefuse(each.raw)
        if due:
            said = connection.call([request for request, _ in due.values()])
            for (i, (request, sent)), answer in zip(due.items(), said, strict=True):
                part[i].leases.learn(request, answer, sent)
                part[i].leases.unrefuse(part[i].raw)
                answers[i] = answer
        found += answers
    return found


def _costs(
    of: Refund, rules: Sequence[Rule], answer: Answer, sent: int, got: int
) -> tuple[int, ...]:
    """What is given back of each limit. sent, got: segment times before the look and after it."""
    timeout = round(of.leases.connection.terms.timeout * 1e9)
    costs, ends = (*of.costs, *_NOTHING), of.ends and (*of.ends, *_NOTHING)
    found = []
    for i, (rule, known) in enumerate(zip(rules, answer.limits, strict=True)):
        sure = not ends or _is_charged(rule, ends[i], sent, got, known.lease_ns, timeout)
        used = rule.kind == 0 or known.window
        found.append(costs[i] if used and sure else 0)
    return tuple(found)


def _is_charged(rule: Rule, end: int, sent: int, got: int, left: int, timeout: int) -> bool:
    """Whether the window that the look has found is surely the charged one. It had ``left`` left at
    some instant between ``sent`` and ``got``."""
    if rule.kind == SLIDING:
        return got + left <= end  # it had begun before the charge, also where one was reset since
    # The end may have been rounded up, by less than two ns a token, or by a minute. The next window
    # ends `per` later, or half of it: where a zone moves its clock by half an hour. One that began
    # anew after a reset ends later by as much as it began later.
    rounded = _MINUTE if rule.kind == CALENDAR else 2 * rule.n
    is_next = got + left + rounded - end >= rule.per_us * 500
    return got < end and not is_next and sent + left - end <= timeout


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
