"""What calls have used beside what they were charged, as one learns when they are over. Nobody
waits for the server to hear of it: a thread tells it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from fast_litellm_shm.cluster import link as links
from fast_litellm_shm.cluster.script import Answer

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.wallet import Wallet

_MOST = 200  # keys in one pipeline
_NOTHING = (0, 0, 0, 0)
_Place = tuple["Wallet", bytes]


class Booking:
    """Of one link, in one process. wake: has a thread call tell(), soon."""

    def __init__(self, link: links.Link, wake: Callable[[], object]) -> None:
        self._link, self._wake = link, wake
        self._lock = threading.Lock()
        self._charges: dict[_Place, tuple[int, ...]] = {}
        self._holds: set[_Place] = set()  # the server is to be told that the host holds some

    def book(
        self,
        wallet: Wallet,
        raw: bytes,
        more: Sequence[int],
        less: Sequence[int],
        ends: Sequence[int],
    ) -> None:
        """Charge ``more``, into debt if need be; give ``less`` back. By limit; all are windows.
        ends: of those that ``less`` was charged in, which are not over: segment time, ns.

        What is given back is the host's again at once, until then: it was granted to it, so that
        all hosts together have no more by it. But first it makes up for what the server is yet to
        be told of, or that would be spent twice."""
        place = wallet, raw
        with self._lock:
            before = self._charges.pop(place, (0,) * len(more))
            due = [b + m - s for b, m, s in zip(before, more, less, strict=True)]
            charges = tuple(max(each, 0) for each in due)
            back = tuple(max(-each, 0) for each in due)
            if any(charges) and self._link.away is None:
                self._charges[place] = charges
            if any(back):
                wallet.put_back(raw, back, ends)
                self._holds.add(place)
        if any(charges) and self._link.away is not None:
            wallet.owe(raw, charges)
        self._wake()

    def tell(self) -> None:
        """By a thread. What cannot be told is owed."""
        with self._lock:
            charges, self._charges = self._charges, {}
            holds, self._holds = self._holds, set()
        due = [("charge", place, costs) for place, costs in charges.items()]
        due += [("hold", place, _NOTHING) for place in holds]
        while due:
            part = due[:_MOST]
            asked = [wallet.request(op, raw, costs) for op, (wallet, raw), costs in part]
            try:
                answers: list[Answer] = self._link.call([request for request, _ in asked])
            except links.AwayError:
                self._owe(due)
                raise
            for (_, (wallet, _), _), (request, sent), answer in zip(
                part, asked, answers, strict=True
            ):
                wallet.learn(request, answer, sent)
            due = due[_MOST:]

    def _owe(self, due: Sequence[tuple[str, _Place, tuple[int, ...]]]) -> None:
        for operation, place, costs in due:
            if operation == "charge":
                place[0].owe(place[1], costs)
            else:
                with self._lock:
                    self._holds.add(place)
