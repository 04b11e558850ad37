"""Budget leases: the money that a server has leased to this host, for each key and window. Nearly
all reservations are answered from it by csrc/limits/money.c. This module does the rest."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import greenlets
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.states import failure
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.budgets import UNIT, Answer, Request
from fast_litellm_shm.cluster.link import Link, UnreachableError
from fast_litellm_shm.cluster.outage import known_hosts
from fast_litellm_shm.limiters.waiting import may_wait

_GRANTED = 3  # place of a budget's numbers
_MOST_KEYS = 100_000  # that a process remembers
_MOST = 200  # keys in one pipeline
_NOTHING = Answer(False, 0, 0, 0, 0, 0, False, False)


class _Known:
    """Of a key, by the last answer, in one window. Until when it is refused (ns of the monotonic
    clock), and which amount. owed: leased by this process itself during an outage."""

    __slots__ = ("answer", "owed", "refused", "until", "window")

    def __init__(self, window: int) -> None:
        self.window, self.answer, self.owed = window, _NOTHING, 0
        self.refused = self.until = 0


class BudgetLeases:
    """Of one budget. handle: of its limiter."""

    def __init__(self, handle: Any, name: str, segment: Segment, connection: Link) -> None:
        self._handle, self._shown, self._segment = handle, name, segment
        self.name = name.encode("utf-8", "surrogatepass")
        self.connection = connection
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._lock = greenlets.Lock()
        connection.unreported.add(self)

    # what this host has

    def look(self, raw: bytes) -> Any:
        """A ``fshm_budget``."""
        out = ffi.new("fshm_budget *")
        self._check(lib.fshm_budget_look(self._handle, raw, len(raw), 0, out))
        return out

    def _check(self, status: int) -> None:
        if status < 0:
            raise failure(status, self._shown, self._segment)

    def _of(self, raw: bytes, window: int) -> _Known:
        """The lock is held."""
        found = self._known.get(raw)
        if found is None or found.window != window:
            found = self._known[raw] = _Known(window)
        self._known.move_to_end(raw)
        while len(self._known) > _MOST_KEYS:
            self._known.popitem(last=False)
        return found

    # calls

    def ask(self, raw: bytes, amount: int, warn_at: float | None) -> tuple[bool | float, bool]:
        """What is leased has no room for this amount: lease more. Returns whether to try again (a
        float: not before so many seconds, since the server does not answer), and whether it is time
        to warn."""
        found = self.look(raw)
        used = found.spent + found.reserved
        lacks = max(used + amount - found.granted, 0)
        if not lacks:
            return True, False
        with self._lock:
            known = self._of(raw, found.window)
            if time.monotonic_ns() < known.until and lacks >= known.refused:
                return False, False
        self.connection.ensure(Background)
        try:
            self.connection.check()
            may_wait()
            answer = self._call(self._asking(raw, found, lacks, warn_at))
        except UnreachableError:
            if self._decide(raw, found, amount):
                return True, False
            return self.connection.retry_after_ns / 1e9, False
        return answer.admitted, answer.warns

    def _asking(self, raw: bytes, found: Any, lacks: int, warn_at: float | None) -> Request:
        over = max(found.spent - found.granted, 0)
        warn = None if warn_at is None else round(warn_at * found.limit)
        return self._request("ask", raw, found, amount=lacks, over=over, warn=warn)

    def _request(self, operation: str, raw: bytes, found: Any, **more: Any) -> Request:
        with self._lock:
            known = self._of(raw, found.window).answer
        return Request(
            operation, self.name, raw, found.window, found.limit, spent=found.spent,
            have=found.granted, others=known.others, added=known.added, **more,
        )  # fmt: skip

    def _call(self, request: Request) -> Answer:
        (found,) = self.connection.call([request])
        answer: Answer = found
        self.learn(request, answer, None)
        return answer

    def learn(self, request: Request, found: Answer, noted: None) -> None:
        """Put what was leased into the segment."""
        raw, window = request.key, request.window
        if found.forgets:
            self._check(lib.fshm_reset_key(self._handle, raw, len(raw)))
        if request.operation == "ask" and found.leased:
            # Killed before it is put: it stays leased, and nobody spends it.
            self._check(lib.fshm_budget_grant(self._handle, raw, len(raw), found.leased, window, 0))
        with self._lock:
            known = self._of(raw, window)
            known.answer = found
            known.until = 0
            if request.operation == "ask" and found.back_off_ns:
                known.refused = request.amount
                known.until = time.monotonic_ns() + found.back_off_ns

    def charged(self, raw: bytes, warn_at: float | None) -> bool:
        """Something was spent without a reservation: tell the server, where it is more than was
        leased. Returns whether it is time to warn."""
        found = self.look(raw)
        lacks = found.spent + found.reserved - found.granted
        if lacks <= 0:
            return False
        self.connection.ensure(Background)
        try:
            return self._call(self._asking(raw, found, lacks, warn_at)).warns
        except UnreachableError:
            self._owe(raw, found, found.spent + found.reserved)
            return False

    def usage(self, raw: bytes) -> tuple[Any, Answer]:
        """What this host has, and what is known of the others: by the server, or during an outage
        by its last answer to this process."""
        found = self.look(raw)
        self.connection.ensure(Background)
        try:
            return found, self._call(self._request("look", raw, found))
        except UnreachableError:
            with self._lock:
                return found, self._of(raw, found.window).answer

    def add(self, raw: bytes, amount: int) -> None:
        with self._needed("added"):
            # towards zero: no more is added than was said, and no more taken back
            whole = abs(amount) // UNIT * UNIT * (1 if amount > 0 else -1)
            self._call(self._request("add", raw, self.look(raw), amount=whole))

    def reset(self, raw: bytes | None) -> None:
        """For all hosts; None: all keys. What other hosts have leased before, they may spend, until
        they are told."""
        with self._needed("reset"):
            if raw is None:
                self._reset_all()
                return
            found = self.look(raw)
            self._check(lib.fshm_reset_key(self._handle, raw, len(raw)))
            self._call(Request("reset", self.name, raw, found.window))

    def _reset_all(self) -> None:
        found = self.connection.budget_keys(self.name)
        self._check(lib.fshm_reset_all(self._handle))
        with self._lock:
            self._known.clear()
        for at in range(0, len(found), _MOST):
            part = [(int(name.rpartition(b":")[2]), name) for name in found[at : at + _MOST]]
            self.connection.call(
                [Request("reset", self.name, b"", window, at=name) for window, name in part]
            )

    @contextlib.contextmanager
    def _needed(self, what: str) -> Iterator[None]:
        try:
            self.connection.check()  # before anything is done here
            yield
        except UnreachableError as error:
            self.connection.ensure(Background)  # whose thread tries the server again
            raise exceptions.ClusterError(
                f"budget {self._shown!r}: nothing was {what}, since "
                f"{self.connection.terms.shown} does not answer ({error}): try again later"
            ) from error

    # giving back

    def withdrawn(self, raw: bytes, window: int, ends: bool = False) -> Request | None:
        """Take what this host does not need out of the segment; the request that gives it back.
        ends: also where there is nothing, to tell what was spent."""
        out = ffi.new("fshm_budget *")
        status = lib.fshm_budget_withdraw(self._handle, raw, len(raw), window, 0, out)
        if status != lib.FSHM_OK:
            return None
        whole = out.granted // UNIT * UNIT
        if whole < out.granted:  # the rest stays: the server counts in units
            rest = out.granted - whole
            lib.fshm_budget_grant(self._handle, raw, len(raw), rest, window, 0)
        found = self.look(raw)
        if found.window != window or not (whole or ends):
            return None
        return self._request("give", raw, found, amount=whole)

    def tell(self, raw: bytes) -> None:
        """Tell the server what this host has spent, and learn whether the key was reset. Raises
        UnreachableError."""
        self._call(self._request("look", raw, self.look(raw)))

    def ending(self) -> list[Request]:
        """What gives back all that this process knows of."""
        with self._lock:
            known = [(raw, each.window) for raw, each in self._known.items()]
        return [found for each in known if (found := self.withdrawn(*each, ends=True)) is not None]

    # outages

    def _decide(self, raw: bytes, found: Any, amount: int) -> bool:
        """Whether this host leases the amount to itself, by ``on_outage``."""
        policy, used = self.connection.terms.on_outage, found.spent + found.reserved + amount
        if policy == "deny":
            return False
        if policy == "local":
            hosts = known_hosts(self.connection)
            with self._lock:
                known = self._of(raw, found.window).answer
            limit = found.limit + known.added
            if not hosts or used > limit // hosts or used + known.others > limit:
                return False
        self._owe(raw, found, used, policy == "allow")
        return True

    def _owe(self, raw: bytes, found: Any, to: int, add: bool = False) -> None:
        """Lease up to this much in all, and report that later. add: and as much again, if another
        call has done the same meanwhile."""
        handle, lacks, window = self._handle, max(to - found.granted, 0), found.window
        if add:
            self._check(lib.fshm_budget_grant(handle, raw, len(raw), lacks, window, 0))
        else:
            self._check(lib.fshm_budget_raise(handle, raw, len(raw), _GRANTED, to, window, 0))
        with self._lock:
            self._of(raw, window).owed += lacks

    def take_unreported(self) -> list[Request]:
        """And what this host has, of all keys: the server may have lost its state."""
        with self._lock:
            taken = [(raw, each, each.owed) for raw, each in self._known.items()]
            for _, each, _ in taken:
                each.owed = 0
        found = [(self.look(raw), raw, each.window, owed) for raw, each, owed in taken]
        return [
            self._request("owe", raw, now, amount=owed)
            for now, raw, window, owed in found
            if now.window == window and now.granted  # else it is over
        ]

    def put_back(self, requests: Sequence[Request]) -> None:
        with self._lock:
            for each in requests:
                known = self._known.get(each.key)
                if known is None or known.window == each.window:  # else that window is over
                    self._of(each.key, each.window).owed += each.amount

    def forked(self) -> None:
        self._lock = greenlets.Lock()
        self._known.clear()
