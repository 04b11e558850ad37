"""Requests about money and their answers: the arguments of budgets.lua."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fast_litellm_shm import exceptions
from fast_litellm_shm.cluster import names

SOURCE = names.source("budgets.lua")
UNIT = 1000  # nano-dollars: a double counts 10**9 dollars in these
_NANO = 10**9


class Answer(NamedTuple):
    """``admitted``: the amount was leased; ``leased``: how much was, which may be more, or a part
    of what is spent already. ``others``, ``spent``: what other hosts have leased, and have settled,
    as far as they have said. ``added``: to the limit. ``warns``: it is time to warn. ``forgets``:
    another host has reset the key. ``junk``: the value at the server was not ours, so the budget
    counts as used up. In nano-dollars.
    """

    admitted: bool
    leased: int
    others: int
    spent: int
    added: int
    back_off_ns: int
    warns: bool
    forgets: bool
    junk: bool = False


class Request(NamedTuple):
    """One call of the script. window: its end, minutes since 1970. amount, over, spent, limit: in
    nano-dollars; the amount is rounded up, the limit down, to a millionth of a dollar. warn: at how
    much; None: never."""

    operation: str
    limiter: bytes
    key: bytes
    window: int
    limit: int = 0
    amount: int = 0
    over: int = 0
    spent: int = 0
    warn: int | None = None
    have: int = 0  # of the lease
    others: int = 0  # as of the last answer
    added: int = 0
    at: bytes | None = None  # the server's key, where `key` is not known

    @property
    def source(self) -> str:
        return SOURCE

    def again(self) -> Request:
        """As of rates: nothing is given back twice. Raises ClusterError: nor is a limit raised."""
        if self.operation == "add":
            budget, key = (each.decode("utf-8", "replace") for each in (self.limiter, self.key))
            raise exceptions.ClusterError(
                f"budget {budget!r}: the connection ended before the server answered, so it is not "
                f"known whether the limit of {key!r} was changed by ${self.amount / _NANO:g}: see "
                "usage(), and change it again if it was not"
            )
        return self._replace(operation="look", amount=0) if self.operation == "give" else self

    @property
    def asked(self) -> int:
        return 0  # the metrics sum up tokens

    def granted(self, found: Answer) -> int:
        return 0

    def arguments(self) -> list[str | int]:
        """After those of values.lua."""
        warn = -1 if self.warn is None else -(-self.warn // UNIT)
        amounts = (self.limit // UNIT, -(-self.amount // UNIT), -(-self.over // UNIT), warn)
        known = (-(-self.have // UNIT), self.others // UNIT, self.added // UNIT)
        return [self.operation, self.window, *amounts, *divmod(self.spent, _NANO), *known]

    def state_key(self, prefix: str) -> bytes:
        if self.at is not None:
            return self.at
        name = names.state_key(prefix, names.BUDGETS, self.limiter, self.key)
        return b"%b:%d" % (name, self.window)

    def answer(self, raw: Sequence[int]) -> Answer:
        admitted, leased, others, dollars, nanos, added, back_off, warns, forgets, junk = (
            int(each) for each in raw
        )
        return Answer(
            bool(admitted), leased * UNIT, others * UNIT, dollars * _NANO + nanos, added * UNIT,
            back_off * 1000, bool(warns), bool(forgets), bool(junk),
        )  # fmt: skip
