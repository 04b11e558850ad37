"""What calls have used beside what they were charged, as one learns when they are over: more is
charged at the server, into debt if need be; less is given back there, as long as its window lasts.

Whoever may not wait for the server (an event loop, the garbage collector) leaves it to a thread:
``link.booked`` is a deque, since the collector may come upon a call at any line, also at one that
holds a lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from fast_litellm_shm._shared.native import lib

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.connection import Connection
    from fast_litellm_shm.cluster.algorithms import Request
    from fast_litellm_shm.cluster.token_lease import TokenLeases

_MOST = 200  # in one pipeline
_NOTHING = (0, 0, 0, 0)


class Settlement(NamedTuple):
    """Of one call, by limit; all are windows. ``ends``: of the windows that ``less`` was charged
    in, segment time, ns."""

    wallet: TokenLeases
    raw: bytes
    more: tuple[int, ...]
    less: tuple[int, ...]
    ends: tuple[int, ...]


def _sum(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a + b for a, b in zip(one, other, strict=False))


def tell(link: Connection, booked: Sequence[Settlement]) -> None:
    """One call of the server for each key and kind, many in a round trip. Raises UnreachableError; what
    could not be charged then is owed, and what could not be given back stays used."""
    charges: dict[tuple[TokenLeases, bytes], tuple[int, ...]] = {}
    refunds: dict[tuple[TokenLeases, bytes, tuple[int, ...]], tuple[int, ...]] = {}
    for each in booked:
        if any(each.more):
            place = each.wallet, each.raw
            charges[place] = _sum(charges.get(place, _NOTHING), each.more)
        if any(each.less):
            window = each.wallet, each.raw, each.ends
            refunds[window] = _sum(refunds.get(window, _NOTHING), each.less)
    due = list(charges.items())
    try:
        while due:
            _call(
                link,
                [(place[0], *place[0].request("charge", place[1], c)) for place, c in due[:_MOST]],
            )
            del due[:_MOST]
    except BaseException:
        for (wallet, raw), costs in due:
            wallet.owe(raw, costs)
        raise
    back = [
        (wallet, *wallet.request("refund", raw, costs, ends=ends))
        for (wallet, raw, ends), costs in refunds.items()
        if any(end > lib.fshm_now(link.segment._handle) for end in ends)
    ]
    for start in range(0, len(back), _MOST):
        _call(link, back[start : start + _MOST])


def _call(link: Connection, asked: Sequence[tuple[TokenLeases, Request, int]]) -> None:
    answers = link.call([request for _, request, _ in asked])
    for (wallet, request, sent), answer in zip(asked, answers, strict=True):
        wallet.learn(request, answer, sent)
        if request.operation == "refund":
            wallet.unrefuse(request.key)


def taken(link: Connection) -> list[Settlement]:
    """What was left to a thread since this was last asked."""
    found: list[Settlement] = []
    while link.booked and len(found) < _MOST:
        found.append(link.booked.popleft())
    return found


def owe(link: Connection) -> None:
    """While the server is away: what is to be charged is owed."""
    while booked := taken(link):
        for each in booked:
            if any(each.more):
                each.wallet.owe(each.raw, each.more)
