"""What keys of budgets have spent and reserved, seen from outside. It reads, and writes nothing."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limits import Money, dollars

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class SpendingRow:
    """A key of a budget, in the present window. limit, spent, reserved: dollars; limit: with what
    was added to it. reset_after: seconds until the window ends; None: never. warned: in this window
    a warning was given (``warn_at``). raw: the bytes of the key, as of KeyRow."""

    budget: str
    key: str
    limit: Decimal
    spent: Decimal
    reserved: Decimal
    reset_after: float | None
    warned: bool
    raw: bytes = b""

    @property
    def remaining(self) -> Decimal:
        """What a call can still reserve."""
        return max(self.limit - self.spent - self.reserved, Decimal(0))

    @property
    def used(self) -> Decimal:
        """What is spent or reserved."""
        return (self.spent + self.reserved).normalize()

    @property
    def share(self) -> float:
        """Of the limit: what is used."""
        return float(self.used / self.limit)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "budget": self.budget,
            "key": self.key,
            "limit": float(self.limit),
            "spent": float(self.spent),
            "reserved": float(self.reserved),
            "remaining": float(self.remaining),
            "reset_after": self.reset_after,
            "warned": self.warned,
        }


class Spending:
    """A budget at one moment. reset_after: seconds until the window ends; None: never. slots: those
    that have the names of its keys; here a key may also have spent nothing in this window."""

    def __init__(
        self, name: str, money: Money, reset_after: float | None, columns: NDArray[Any], slots: Any
    ) -> None:
        """columns: spent, added, mark, granted and reserved of each key, in nano-dollars."""
        self.name, self.money, self.reset_after = name, money, reset_after
        self.slots: NDArray[Any] = slots
        self._spent, self._added, self._mark, _, self._reserved = columns
        self._used = self._spent + self._reserved
        self._most = self._added + _u64(money.n)
        #: The indexes of the keys that have spent, reserved, or been given anything.
        self.active: NDArray[Any] = columns.max(axis=0).nonzero()[0]

    @property
    def keys(self) -> int:
        """How many keys have spent, reserved, or been given anything."""
        return int(self.active.size)

    @property
    def spent(self) -> Decimal:
        """Of all keys, in dollars."""
        return dollars(_sum(self._spent))

    @property
    def reserved(self) -> Decimal:
        """Of all keys, in dollars."""
        return dollars(_sum(self._reserved))

    @property
    def warned(self) -> int:
        """How many keys got a warning in this window."""
        return int((self._mark > 0).sum())

    @property
    def used_up(self) -> int:
        """How many keys have nothing left."""
        return int((self._used >= self._most).sum())

    def shares(self) -> Any:
        """Of each active key: which part of its limit is spent or reserved."""
        return (self._used / self._most)[self.active]

    def row(self, segment: Segment, at: int) -> SpendingRow:
        """One of the keys."""
        from fast_litellm_shm._shared.inspection import stored_name

        slot = int(self.slots[at])
        found = stored_name(segment, slot)
        name, raw = found or (f"#{_who(segment, slot):016x}", b"")
        return SpendingRow(
            budget=self.name,
            key=name,
            limit=dollars(int(self._most[at])),
            spent=dollars(int(self._spent[at])),
            reserved=dollars(int(self._reserved[at])),
            reset_after=self.reset_after,
            warned=bool(self._mark[at]),
            raw=raw,
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "limit": float(dollars(self.money.n)),
            "per": self.money.per,
            "timezone": self.money.timezone,
            "reset_after": self.reset_after,
            "keys": self.keys,
            "spent": float(self.spent),
            "reserved": float(self.reserved),
            "warned": self.warned,
            "used_up": self.used_up,
        }


def _sum(amounts: NDArray[Any]) -> int:
    """A sum that 64 bits may not hold."""
    return (int((amounts >> _u64(32)).sum()) << 32) + int((amounts & _u64(2**32 - 1)).sum())


def _u64(value: int) -> Any:
    import numpy

    return numpy.uint64(value)


def _who(segment: Segment, slot: int) -> int:
    geometry = segment.geometry()
    base = ffi.cast("char *", geometry.base) + geometry.slots_offset
    return int(ffi.cast("uint64_t *", base)[2 * slot])


def _amounts(segment: Segment) -> Any:
    """All amounts, as an array of fshm_budget_info."""
    import numpy

    dtype = numpy.dtype(
        [(name, "=u8") for name in ("slot", "id", "amount", "left_ns")]
        + [(name, "=u4") for name in ("limiter", "which")]
    )
    assert dtype.itemsize == ffi.sizeof("fshm_budget_info")
    room, count = 0, lib.fshm_budgets(segment._handle, 0, ffi.NULL, 0)
    infos = None
    while count > room:
        room = count + count // 4 + 16
        infos = ffi.new("fshm_budget_info[]", room)
        count = lib.fshm_budgets(segment._handle, 0, infos, room)
    if infos is None:
        return numpy.zeros(0, dtype)
    return numpy.frombuffer(ffi.buffer(infos), dtype, count)


def spending(segment: Segment) -> list[Spending]:
    """Each budget of the segment, with its keys, in the order of their names."""
    import numpy

    from fast_litellm_shm._shared.inspection import limiters_in
    from fast_litellm_shm.limits import from_raw

    found = _amounts(segment)
    heads = found[found["which"] == lib.FSHM_BUDGET_LIMIT]
    if not heads.size:
        return []
    names = {
        index: (raw.decode("utf-8", "replace"), from_raw(info.limits[0], segment))
        for index, raw, info in limiters_in(segment)
        if info.limits_count and info.limits[0].kind == lib.FSHM_MONEY  # of a plan: no limits
    }
    reserved = found[found["which"] == lib.FSHM_BUDGET_RESERVED]
    out = []
    for head in heads:
        name, money = names.get(int(head["limiter"]), ("", None))
        if not isinstance(money, Money):
            continue  # it has changed since
        mine = found[found["limiter"] == head["limiter"]]
        mine = mine[mine["which"] < lib.FSHM_BUDGET_RESERVED]
        ids, first = numpy.unique(mine["id"][mine["which"] == 0], return_index=True)
        slots = mine["slot"][mine["which"] == 0][first]
        columns = numpy.zeros((5, ids.size), numpy.uint64)
        for part in (mine, reserved):
            at = numpy.searchsorted(ids, part["id"])
            at[at == ids.size] = 0
            fits = ids[at] == part["id"] if ids.size else numpy.zeros(part.size, bool)
            numpy.add.at(columns, (part["which"][fits], at[fits]), part["amount"][fits])
        left = None if money.per is None else int(head["left_ns"]) / 1e9
        out.append(Spending(name, money, left, columns, slots))
    return sorted(out, key=lambda each: each.name)


def rows(
    segment: Segment,
    budgets: list[Spending],
    top: int | None = None,
    match: str | None = None,
    budget: str | None = None,
) -> Iterator[SpendingRow]:
    """The keys of all budgets, those first that have used the largest part of their limit. match: a
    glob over names. budget: only the keys of this one."""
    import numpy

    of = [each for each in budgets if budget in (None, each.name)]
    if not of:
        return
    shares = numpy.concatenate([each.shares() for each in of])
    owner = numpy.repeat(numpy.arange(len(of)), [each.keys for each in of])
    active = numpy.concatenate([each.active for each in of])
    made = (
        of[owner[at]].row(segment, int(active[at]))
        for at in map(int, numpy.argsort(-shares, kind="stable"))
    )
    fitting = (row for row in made if match is None or fnmatch.fnmatchcase(row.key, match))
    yield from itertools.islice(fitting, top)
