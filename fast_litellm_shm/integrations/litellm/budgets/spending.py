"""What requests have reserved and spent of budgets, in the segment.

Each budget of LiteLLM is a key of one of a few :class:`Limited` budgets, one for each period. Its
limit is a number of that key: so any number of limits takes no more room in the segment, and a
limit that an operator changes holds at the next request, with what was spent."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import NamedTuple

import litellm

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.integrations.litellm.budgets.windows import CALENDAR, FOREVER, Window
from fast_litellm_shm.limiters.budget import Budget, Reservation
from fast_litellm_shm.limits import NANO, dollars

_SPENT, _ADDED = 0, 1  # places of a budget's numbers
_LEAST = 1  # nano-dollars: of a budget that knows no limit of its key yet; of any reservation
_MOST = 10**18
_SET = " set by LiteLLM"  # beside a key: when what was spent of it was set; not dollars, seconds
_MOST_KNOWN = 10_000
_STALE = 120  # seconds that a worker may go on with what LiteLLM's database said before
_KEPT = 3600.0  # seconds that a window is kept after it: LiteLLM may be late to end it


class Allowance(NamedTuple):
    """A budget that a request counts for. entity, id: LiteLLM's names of its kind and of itself.
    key: in the segment. usd: its limit. spent: at least so much was spent in this window, by
    LiteLLM's database. soft: where it is used up, the request passes, and is counted. what: how
    LiteLLM's message begins; None: as of its budgets of keys, users and so on."""

    entity: str
    id: str
    key: str
    usd: float
    spent: float
    window: Window
    soft: bool = False
    what: str | None = None


class Refusal(NamedTuple):
    """Which budget had no room. spent: dollars, with what calls in flight have reserved."""

    allowance: Allowance
    spent: float


def _nanos(usd: float) -> int:
    return round(min(max(usd * NANO, 0), _MOST - 1))


class Limited(Budget):
    """A budget whose keys have limits of their own, which requests bring with them."""

    def __init__(self, window: Window) -> None:
        zone = "" if window.timezone == "UTC" else f", {window.timezone}"
        name = f"litellm budgets{f' by {window.per}' if window.per else ''}{zone}"
        # cluster=False: a server would not know the limit, which is the key's
        super().__init__(
            dollars(_LEAST), window.per, name=name, timezone=window.timezone, cluster=False
        )

    def tell(self, key: str, limit: int, spent: int) -> bool:
        """Have the key's limit be this, and no less be spent. Whether that changed anything."""
        raw = key.encode("utf-8", "surrogatepass")
        found = self._look(raw)
        more = found.spent < spent and not self._set_lately(key)
        changed: bool = found.limit != limit or more
        if more:
            self._raise(raw, _SPENT, spent, found.window)
        if found.limit < limit:  # raised, not added: several workers may do so at the same time
            self._raise(raw, _ADDED, limit - _LEAST, found.window)
        elif found.limit > limit:  # two that lower it at once may lower it twice: a request that
            # is denied tells it again
            self._add(raw, _ADDED, limit - found.limit)
        return changed

    def set_spent(self, key: str, usd: Decimal) -> None:
        """An operator has set what was spent of the key, in LiteLLM. For a while some workers know
        the number before that: they must not bring it back."""
        so_far = self.spent(key)
        if so_far > usd:  # more than was spent, its requests bring
            self.reset(key + _SET)
            self.charge(key + _SET, dollars(int(time.time())))
            self.refund(key, so_far - usd)

    def _set_lately(self, key: str) -> bool:
        at: int = self._look((key + _SET).encode("utf-8", "surrogatepass")).spent
        return bool(at) and time.time() - at < _STALE

    def _raise(self, raw: bytes, which: int, to: int, window: int) -> None:
        status = lib.fshm_budget_raise(self._handle, raw, len(raw), which, to, window, 0)
        if status < 0:
            self._failed(status)


_budgets: dict[tuple[str | None, str], Limited] = {}
# What this process has told the segment of a key: its limit, what was spent by then, and until when
# that holds.
_known: dict[tuple[str | None, str], tuple[int, int, float]] = {}
# Keys of windows that are none of the calendar's: the segment does not know that they end.
_marked: dict[str, float] = {}


def budget_of(window: Window) -> Limited:
    found = _budgets.get(window[:2])
    if found is None:
        found = _budgets[window[:2]] = Limited(window)
    return found


def _tell(budget: Limited, allowance: Allowance, limit: int, spent: int) -> bool:
    changed = budget.tell(allowance.key, limit, spent)
    if allowance.window.mark:
        _forget_past(budget)
        _marked[allowance.key] = allowance.window.ends
    if len(_known) >= _MOST_KNOWN:
        _known.clear()
    _known[allowance.window.per, allowance.key] = limit, spent, allowance.window.until
    return changed


def _forget_past(budget: Limited) -> None:
    past = time.time() - _KEPT
    while _marked:
        key, ends = next(iter(_marked.items()))
        if ends > past and len(_marked) < _MOST_KNOWN:
            break
        del _marked[key]
        if ends <= past:
            budget.reset(key)


def _reserve(allowance: Allowance, usd: Decimal, strict: bool) -> Reservation | None:
    budget, key = budget_of(allowance.window), allowance.key
    limit, spent = max(_nanos(allowance.usd), _LEAST), _nanos(allowance.spent)
    known = _known.get((allowance.window.per, key))
    if known is None or known[0] != limit or known[1] < spent or known[2] <= time.time():
        _tell(budget, allowance, limit, spent)
    found = budget.reserve(key, usd)
    if not found and _tell(budget, allowance, limit, spent):
        found = budget.reserve(key, usd)  # a window has begun; or a worker knew another limit
    if not found and not strict:
        # As LiteLLM: what is left may be less than the estimate. But for one call at a time.
        usage = budget.usage(key)
        if usage.remaining and not usage.reserved:
            found = budget.reserve(key, usage.remaining)
    return found if found else None


class Spending:
    """What one request has reserved of its budgets. Dropped, it has spent nothing."""

    __slots__ = ("_open", "allowances")

    def __init__(
        self, allowances: Sequence[Allowance], reserved: Sequence[Reservation | None]
    ) -> None:
        self.allowances = allowances
        self._open: Sequence[Reservation | None] | None = reserved

    def spent(self, usd: float) -> None:
        """A call of the request is over, and cost this much. Of several calls each is reported:
        the first one settles what was reserved, the others are charged."""
        cost = dollars(_nanos(usd))
        reserved, self._open = self._open, None
        failed: Exception | None = None
        for at, allowance in enumerate(self.allowances):
            try:
                reservation = None if reserved is None else reserved[at]
                if reservation is not None:
                    reservation.settle(cost)
                elif cost:
                    budget_of(allowance.window).charge(allowance.key, cost)
            except exceptions.FastShmError as error:
                failed = error  # the other budgets must know too
        if failed is not None:
            raise failed

    def add(self, other: Spending) -> None:
        """Have what another one has reserved be settled with this one. Neither is settled yet."""
        self.allowances = [*self.allowances, *other.allowances]
        self._open, other._open = [*(self._open or ()), *(other._open or ())], None

    def release(self) -> None:
        """The request cost nothing more."""
        reserved, self._open = self._open, None
        for reservation in reserved or ():
            if reservation is not None:
                reservation.release()


def reserve(
    allowances: Sequence[Allowance], usd: float, strict: bool = False
) -> Spending | Refusal:
    """Reserve what a request may cost in all of its budgets, or in none. strict: what is left of a
    budget must be enough for the estimate, in any case."""
    amount = dollars(max(_nanos(usd), _LEAST))
    reserved: list[Reservation | None] = []
    done = False
    try:
        for allowance in allowances:
            found = _reserve(allowance, amount, strict) if allowance.usd > 0 else None
            if found is None and not allowance.soft:
                return Refusal(allowance, used(allowance))
            reserved.append(found)
        done = True
        return Spending(allowances, reserved)
    finally:
        if not done:
            _release(reserved)


def _release(reserved: Iterable[Reservation | None]) -> None:
    for reservation in reserved:
        if reservation is not None:
            reservation.release()


def used(allowance: Allowance) -> float:
    """Dollars that are spent or reserved."""
    usage = budget_of(allowance.window).usage(allowance.key)
    return float(usage.spent + usage.reserved)


def set_spent(name: str, usd: float) -> None:
    """What was spent of a budget, in whichever windows it is: an operator has set it."""
    amount = dollars(_nanos(usd))
    zone = getattr(litellm, "timezone", None) or "UTC"
    for per in (None, *CALENDAR):
        budget_of(Window(per, "UTC" if per is None else zone)).set_spent(name, amount)
    marked = [key for key in _marked if key.startswith(f"{name} until ")]
    for key in marked:
        budget_of(FOREVER).set_spent(key, amount)


def charge(window: Window, key: str, usd: float) -> None:
    """Spend without a reservation."""
    budget_of(window).charge(key, dollars(_nanos(usd)))


def spent_of(window: Window, key: str) -> float:
    return float(budget_of(window).spent(key))


def forget() -> None:
    """For tests: of another segment."""
    _budgets.clear()
    _known.clear()
    _marked.clear()
