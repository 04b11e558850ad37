"""Budget: money that all workers of the host spend together, in windows of the calendar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from decimal import ROUND_HALF_EVEN, Context, Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, TypeAlias

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import log
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import (
    BudgetCore,
    BudgetReservation,
    address,
    ffi,
    lib,
    owned,
)
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm._shared.states import failure
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument, DurableArgument
from fast_litellm_shm.limiters.waiting import off_loop
from fast_litellm_shm.limits import NANO, Money, dollars

if TYPE_CHECKING:
    from fast_litellm_shm.durable.books import Books

Reservation = BudgetReservation  # its public name
Key: TypeAlias = str | bytes
USD: TypeAlias = int | float | str | Decimal

_MOST = 10**18
_EXACT = Context(prec=100, traps=[InvalidOperation])  # whatever the thread's own is
_SPENT, _ADDED, _GRANTED = 0, 1, 3  # places of a budget's numbers
_UTC = timezone.utc  # `timezone` is an argument below
_NEVER = 2**28 - 1  # the end of a window that never ends
_ON_DEATH = {"release": 0, "charge": lib.FSHM_BUDGET_CHARGE}


def nanos(value: object, where: str = "usd") -> int:
    """Dollars as nano-dollars: exact for an int, and for a str or a Decimal of at most nine decimal
    places; a finer amount is rounded once, half to even, and so is a float. Raises TypeError or
    ValueError."""
    found: int
    if type(value) is int:
        found = value * NANO
    elif type(value) is float:
        try:
            above, below = value.as_integer_ratio()
        except (ValueError, OverflowError):
            raise ValueError(f"{where} must be a finite number, not {value!r}") from None
        found, rest = divmod(above * NANO, below)
        found += 2 * rest > below or (2 * rest == below and found & 1)
    elif isinstance(value, (Decimal, str)):
        try:
            exact = value if isinstance(value, Decimal) else _EXACT.create_decimal(value)
            if not exact.is_finite() or exact.adjusted() > 20:
                raise ValueError(f"{where} must be a finite amount, not {value!r}")
            nano = exact.scaleb(9, _EXACT)
            found = int(nano.to_integral_value(ROUND_HALF_EVEN, _EXACT))
        except InvalidOperation:
            raise ValueError(f"{where} must be an amount, not {value!r}") from None
    else:
        raise TypeError(f"{where} must be an int, float, str or Decimal of dollars, not {value!r}")
    return found


def _amount(value: object, where: str, least: int = 0) -> int:
    found = nanos(value, where)
    if not least <= found <= _MOST:
        low = "more than 0" if least else "0 or more"
        raise ValueError(f"{where} must be {low}, at most 10**9 dollars, not {value!r}")
    return found


def exact(usd: USD, where: str) -> Decimal:
    """An amount of 0 or more in dollars, as it is counted. Raises TypeError or ValueError."""
    return dollars(_amount(usd, where))


class Usage(NamedTuple):
    """Of a key in the present window, in dollars. limit: with what was added to it. reserved: by
    calls that are not settled. reset_after: seconds until the window ends; None: never."""

    limit: Decimal
    spent: Decimal
    reserved: Decimal
    reset_after: float | None

    @property
    def remaining(self) -> Decimal:
        """What a call can still reserve."""
        return max(self.limit - self.spent - self.reserved, Decimal(0))


class Spend(NamedTuple):
    """What a key has spent in a window, in dollars. ends: None: the window never ends."""

    ends: datetime | None
    usd: Decimal


OnWarn: TypeAlias = Callable[[str, Usage], object]


class Reservations:
    """What ``Budget.reserve(also=)`` answers: a Reservation in several budgets."""

    __slots__ = ("_parts", "denied_by", "reason", "retry_after")

    def __init__(self, parts: list[Reservation]) -> None:
        """parts: all are reserved; or the last was denied, and then nothing is."""
        self._parts, last = parts, parts[-1]
        self.denied_by: Budget | None = last.denied_by
        self.reason, self.retry_after = last.reason, last.retry_after
        if not last:
            self.release()

    @property
    def allowed(self) -> bool:
        """True: the amount was reserved in all of them."""
        return self.denied_by is None

    def settle(self, usd: USD) -> None:
        """As of a Reservation, in all budgets."""
        self._end(dollars(_amount(usd, "settle: usd")))

    def release(self) -> None:
        """As of a Reservation, in all budgets."""
        self._end(Decimal(0))

    def _end(self, usd: Decimal) -> None:
        failed: BaseException | None = None
        for each in self._parts:
            try:
                each.settle(usd)
            except BaseException as error:
                failed = failed or error  # the others must know too
        if failed is not None:
            raise failed

    def __bool__(self) -> bool:
        return self.denied_by is None

    def __enter__(self) -> Reservations:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        return f"Reservations({self._parts!r})"


class Ledger(Protocol):
    """Keeps what was granted of budgets where a reboot does not reach it. Amounts: nano-dollars."""

    def grant(
        self, name: str, key: bytes, window: int, instance: int, least: int, most: int
    ) -> tuple[int, int]:
        """Grant in all at least ``least`` (of which some was granted before), at most ``most``; it
        is on the disk when this returns. window: its end, minutes since 1970. instance: of the
        segment. Returns what segments before this one were granted, which counts as spent; and
        what is granted in all: less than ``least``, if not even that is left."""


class Budget(BudgetCore, InSegment):
    """At most ``usd`` dollars for each key, in each window of the calendar, over all workers.

    usd: an int, str or Decimal (exact to 10**-9 dollars, at most 10**9), or a float, rounded once.
    per: ``"hour"``, ``"day"``, ``"week"``, ``"month"`` or ``"year"`` in ``timezone``, as of
    FixedWindow; None: for ever. name: processes that use the same name share; the process that sets
    the limit last sets it for all.

    A call reserves what it may cost, and settles what it did cost::

        with budget.reserve("team-a", usd=0.02) as reservation:
            if not reservation:
                return too_expensive(reservation.reason)
            answer = call()
            reservation.settle(usd=cost_of(answer))

    Reservations never pass the budget, however many come at the same time. Spent is what was
    settled: that can pass it, where calls cost more than they had reserved. What is settled counts
    in the window in which it is settled.

    on_death: what becomes of the reservation of a process that dies: ``"release"``: it is given
    back within a second. Its call may have been answered and billed, or not: who pays must choose.
    ``"charge"``: it stays spent.

    warn_at, on_warn: ``on_warn(key, usage)`` is called by one process, once in a window of a key,
    when that share of the budget is used or reserved. Default: a warning in the log.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    budget holds over all hosts that name it. False: this host alone. Default: what
    FAST_LITELLM_SHM_CLUSTER says. See ``docs/cluster.md``.

    durable: True, or a :class:`~fast_litellm_shm.durable.StateFile`: what was spent outlives a
    reboot of this host. A file grants the budget in parts of a hundredth; after a power cut, what
    was granted counts as spent. See ``docs/durable.md``. Over hosts, the server keeps it instead.
    """

    def __init__(
        self,
        usd: USD,
        per: str | None = "month",
        *,
        name: str,
        timezone: str = "UTC",
        warn_at: float | None = None,
        on_warn: OnWarn | None = None,
        on_death: str = "release",
        segment: Segment | None = None,
        cluster: ClusterArgument = None,
        durable: DurableArgument = None,
        _ledger: Ledger | None = None,
    ) -> None:
        if on_death not in _ON_DEATH:
            raise ValueError(f"Budget: on_death must be 'release' or 'charge', not {on_death!r}")
        if warn_at is not None and type(warn_at) not in (int, float):
            raise TypeError(
                f"Budget: warn_at must be a number such as 0.8 or None, not {warn_at!r}"
            )
        if on_warn is not None and not callable(on_warn):
            raise TypeError(f"Budget: on_warn must be a function or None, not {on_warn!r}")
        if warn_at is not None and not 0 < warn_at <= 1:
            raise ValueError(f"Budget: warn_at must be above 0, at most 1, not {warn_at!r}")
        if not isinstance(name, str):
            raise TypeError(f"Budget: name must be a str, not {name!r}")
        raw = name.encode("utf-8", "surrogatepass")
        if not 1 <= len(raw) <= lib.FSHM_MAX_LIMITER_NAME:
            raise ValueError(
                f"Budget: name must be 1 to {lib.FSHM_MAX_LIMITER_NAME} bytes, not "
                f"{len(raw)}: {name[:32]!r}"
            )
        if segment is not None and not isinstance(segment, Segment):
            raise TypeError(f"segment must be a Segment or None, not {segment!r}")
        limit = Money(_amount(usd, "Budget: usd", 1), per, timezone)
        beside = Money(_MOST, per, timezone)
        self._name, self._limit = name, limit
        self._segment = Segment.default() if segment is None else segment
        self._options: dict[str, Any] = {
            "name": name, "timezone": timezone, "warn_at": warn_at, "on_warn": on_warn,
            "on_death": on_death, "durable": durable,
        }  # fmt: skip
        self._flags, self._warn_at, self._on_warn = _ON_DEATH[on_death], warn_at, on_warn
        self._ledger = _ledger
        self._books: Books | None = None
        grantor = chosen(False if _ledger is not None else cluster)
        self._cluster = grantor.argument
        if durable is not None and _ledger is None and not grantor.has_budgets:
            self._books = self._durable(durable)
        if _ledger is not None or self._books is not None:
            self._flags |= lib.FSHM_BUDGET_GRANTED
        out = ffi.new("fshm_limiter **")
        four = ffi.new(
            "fshm_limit[4]", [each._raw(self._segment) for each in (limit, beside, beside, beside)]
        )
        status = lib.fshm_limiter_open(self._segment._handle, raw, len(raw), four, 4, out)
        if status != lib.FSHM_OK:
            self._failed(status)
        self._handle: Any = owned(out[0], lib.fshm_limiter_close, self._segment._handle)
        self._leases = grantor.budget(self._handle, name, self._segment)
        if self._leases is not None:
            self._flags |= lib.FSHM_BUDGET_SHARED
        watched = warn_at if self._leases is None else 0  # else the server knows when it is time
        self._bind(self._handle, address(self._handle), self._flags, float(watched or 0))

    async def reserve_async(
        self, key: Key, usd: USD, *, also: Iterable[tuple[Budget, Key]] = ()
    ) -> Reservation | Reservations:
        """reserve() for asyncio: where a file or a server has to grant more, a thread has it do so.
        Cancelled meanwhile, it has reserved nothing."""
        given = {"also": tuple(also)} if also else {}

        def call() -> Reservation | Reservations:
            return self.reserve(key, usd, **given)

        return await off_loop(call, lambda late: late.release())

    def _durable(self, durable: DurableArgument) -> Books | None:
        from fast_litellm_shm.durable.books import Books
        from fast_litellm_shm.durable.settings import found

        file = found(durable)
        return None if file is None else Books(self, file)

    def _reserve_all(
        self, key: Key, usd: USD, also: Iterable[tuple[Budget, Key]]
    ) -> Reservation | Reservations:
        """Called by the native part: reserve() in several budgets."""
        amount, parts = dollars(_amount(usd, "reserve: usd")), []
        try:
            others = list(also)
            for each in others:
                if not (isinstance(each, tuple) and len(each) == 2 and isinstance(each[0], Budget)):
                    raise TypeError(f"pairs such as (team_budget, 'team-a'), not {each!r}")
        except TypeError as error:
            raise TypeError(f"reserve: also must be pairs of a Budget and a key: {error}") from None
        try:
            for budget, its in ((self, key), *others):
                parts.append(budget.reserve(its, amount))
                if not parts[-1]:
                    break
            return Reservations(parts)
        except BaseException:  # else it is kept as long as the exception is
            for part in parts:
                part.release()
            raise

    def usage(self, key: Key) -> Usage:
        """What the key has spent and reserved in the present window."""
        raw = key_bytes(key)
        if self._leases is None:
            return self._usage(self._look(raw))
        found, rest = self._leases.usage(raw)
        own, leased = self._usage(found), max(rest.others - rest.spent, 0)
        return Usage(
            own.limit + dollars(rest.added), own.spent + dollars(rest.spent),
            own.reserved + dollars(leased), own.reset_after,
        )  # fmt: skip

    def spent(self, key: Key) -> Decimal:
        """Dollars that were settled in the present window."""
        if self._leases is not None:
            return self.usage(key).spent
        return dollars(self._look(key_bytes(key)).spent)

    def remaining(self, key: Key) -> Decimal:
        """Dollars that a call can still reserve."""
        return self.usage(key).remaining

    def charge(self, key: Key, usd: USD) -> None:
        """Spend without a reservation, room or not. Of a durable budget: raises StateFileError
        where the file cannot be used; nothing was changed then. So do refund(), add(), reset()."""
        raw, amount = key_bytes(key), _amount(usd, "charge: usd")
        self._spend(raw, amount)
        if self._leases is None:
            self._watch(key)
        elif self._leases.charged(raw, self._warn_at):
            self._warn(raw, self.usage(key))

    def refund(self, key: Key, usd: USD) -> None:
        """Take back what was spent in the present window, at most all of it."""
        self._spend(key_bytes(key), -_amount(usd, "refund: usd"))

    def add(self, key: Key, usd: USD) -> None:
        """Raise the budget of a key for the present window; a negative amount takes back what was
        added, at most all of it. Raises ClusterError over hosts: the server does not answer, or
        nobody knows whether it has heard of it."""
        amount = nanos(usd, "add: usd")
        if abs(amount) > _MOST:
            raise ValueError(f"add: usd must be at most 10**9 dollars, not {usd!r}")
        if self._leases is not None:
            self._leases.add(key_bytes(key), amount)
        elif self._books is not None:
            self._books.add(self, key_bytes(key), amount)
        else:
            self._add(key_bytes(key), _ADDED, amount)

    def reset(self, key: Key | None = None) -> None:
        """Forget what a key has spent and been given: what calls have reserved stays reserved until
        they settle. None: of all keys, and also what they have reserved."""
        raw = None if key is None else key_bytes(key)
        if self._leases is not None:
            self._leases.reset(raw)
        elif self._books is not None:
            self._books.reset(self, raw, lambda: self._forget(raw))
        else:
            self._forget(raw)

    def _forget(self, raw: bytes | None) -> None:
        if raw is None:
            status = lib.fshm_reset_all(self._handle)
        else:
            status = lib.fshm_reset_key(self._handle, raw, len(raw))
        if status != lib.FSHM_OK:
            self._failed(status)

    @property
    def usd(self) -> Decimal:
        """The limit in force: another process may have set another one."""
        four, version = ffi.new("fshm_limit[4]"), ffi.new("uint64_t *")
        if lib.fshm_limiter_limits(self._handle, four, version) < 1:
            self._failed(lib.FSHM_E_DAMAGED)
        return dollars(four[0].n)

    def _look(self, raw: bytes) -> Any:
        out = ffi.new("fshm_budget *")
        status = lib.fshm_budget_look(self._handle, raw, len(raw), 0, out)
        if status != lib.FSHM_OK:
            self._failed(status)
        if self._books is not None:
            self._books.overlay(self, raw, out)
        return out

    def _usage(self, found: Any) -> Usage:
        left = None if self._limit.per is None else found.left_ns / 1e9
        return Usage(dollars(found.limit), dollars(found.spent), dollars(found.reserved), left)

    def _spend(self, raw: bytes, amount: int) -> None:
        if self._books is not None:
            self._books.changing(self, raw, lambda: self._add(raw, _SPENT, amount))
        else:
            self._add(raw, _SPENT, amount)

    def _add(self, raw: bytes, which: int, amount: int) -> None:
        status = lib.fshm_budget_add(self._handle, raw, len(raw), which, amount, 0)
        if status != lib.FSHM_OK:
            self._failed(status)

    def _ask(self, key: Key, amount: int) -> bool | float:
        """Called by the native part where what was granted has no room for this amount: have more
        granted, and say whether there is. A float: who grants can be asked in so many seconds."""
        raw = key_bytes(key)
        if self._leases is not None:
            more, warns = self._leases.ask(raw, amount, self._warn_at)
            if warns:
                self._warn(raw, self.usage(key))
            return more
        if self._books is not None:
            return self._books.ask(self, raw, amount)
        assert self._ledger is not None
        found = self._look(raw)
        least, instance = found.spent + found.reserved + amount, self._segment.geometry().instance
        before, granted = self._ledger.grant(
            self._name, raw, found.window, instance, least, found.limit
        )
        # Spent first: from when it is granted, what was granted before is not to be spent again.
        for which, to in ((_SPENT, before), (_GRANTED, granted)):
            status = lib.fshm_budget_raise(self._handle, raw, len(raw), which, to, found.window, 0)
            if status < 0:
                self._failed(status)
        return bool(granted > found.granted or granted >= least)

    def _tend(self, key: Key) -> None:
        """Called by the native part after a settlement: more was spent than was granted, or more
        of it is left than has to be kept."""
        if self._books is not None:
            self._books.tend(self, key_bytes(key))

    def history(self, key: Key) -> list[Spend]:
        """What the key has spent in the present window, and with ``durable`` in those before it
        that the file keeps (12 windows in all), the latest first. Of a window that is over it may
        have a hundredth of the budget more: what was granted ahead and not used."""
        raw = key_bytes(key)
        found, before = self._look(raw), []
        if self._books is not None:
            before = [each for each in self._books.history(raw) if each[0] < found.window]
        present = Spend(_end_of(found.window), self.spent(key))
        return [present, *(Spend(_end_of(minute), dollars(amount)) for minute, amount in before)]

    def _nanos(self, usd: object, where: str) -> int:
        """Called by the native part, for what it does not read itself."""
        return _amount(usd, where)

    def _watch(self, key: Key) -> None:
        """Warn, if it is time. Called by the native part too."""
        if self._warn_at is None:
            return
        raw = key_bytes(key)
        found = self._look(raw)
        if found.spent + found.reserved < self._warn_at * found.limit:
            return
        if lib.fshm_budget_once(self._handle, raw, len(raw), 0) != lib.FSHM_OK:
            return
        self._warn(raw, self._usage(found))

    def _warn(self, raw: bytes, usage: Usage) -> None:
        shown = raw.decode("utf-8", "replace")
        if self._on_warn is None:
            log.warning(
                "budget %r: %r has used or reserved %s of %s dollars",
                self._name, shown, f"{usage.spent + usage.reserved:f}", f"{usage.limit:f}",
            )  # fmt: skip
            return
        try:
            self._on_warn(shown, usage)
        except Exception:
            log.exception("budget %r: on_warn failed", self._name)

    def _failed(self, status: int) -> NoReturn:
        if status == lib.FSHM_E_ARGUMENT:
            raise exceptions.SegmentError(
                f"budget {self._name!r} in segment {self._segment.name!r}: this name is that of a "
                "limiter which counts no money; give the budget another name"
            )
        raise failure(status, self._name, self._segment)

    def __reduce__(self) -> tuple[Any, ...]:
        given = (self.usd, self._limit.per)
        options = {**self._options, "segment": self._segment, "cluster": self._cluster}
        return (_rebuild, (type(self), given, options))

    def __repr__(self) -> str:
        return f"Budget({limits.describe(self._limit)}, name={self._name!r})"


def _end_of(minute: int) -> datetime | None:
    return datetime.fromtimestamp(minute * 60, _UTC) if minute < _NEVER else None


def _rebuild(cls: type[Budget], given: Sequence[Any], options: dict[str, Any]) -> Budget:
    return cls(*given, **options)
