"""What each limit means, in exact numbers, from its definition: logs and fractions, no bit fields.

``may(cost)``: the definition admits it. ``must(cost)``: it does so even where the documented
rounding went against the caller. The limiter's answer has to lie between the two.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

from hypothesis import assume

from algorithms.driver import BUCKET, SLIDING, WINDOW, Rule

EXACT = 255
COARSE = 1 << 20  # ns: from there up the interval of a bucket is whole nanoseconds


@dataclass
class Bucket:
    """Tokens flow back at n/per. A request fits where the charges leave (burst - cost) of flow.
    Rounding: from COARSE up the interval is rounded up to whole nanoseconds; below, each charge is
    rounded up to a nanosecond, and the room for a request down to one."""

    rule: Rule
    debt: Fraction = Fraction(0)  # ns of flow that are gone; the least it can be
    most: Fraction = Fraction(0)  # the most
    at: int = 0

    @property
    def interval(self) -> Fraction:
        return Fraction(self.rule.per, self.rule.n)

    @property
    def slowest(self) -> Fraction:
        coarse = self.rule.per // self.rule.n >= COARSE
        return Fraction(-(-self.rule.per // self.rule.n)) if coarse else self.interval

    @property
    def lost(self) -> int:
        return 0 if self.rule.per // self.rule.n >= COARSE else 1

    def to(self, now: int) -> None:
        gone = now - self.at
        self.debt, self.most = (
            max(self.debt - gone, Fraction(0)),
            max(self.most - gone, Fraction(0)),
        )
        self.at = now

    def may(self, cost: int) -> bool:
        # An instant is a nanosecond long: that much may have flowed back already.
        return self.debt + cost * self.interval < self.rule.burst * self.interval + 1

    def must(self, cost: int) -> bool:
        room = (self.rule.burst - cost) * self.slowest
        return self.fits(cost) and ceil(self.most) <= floor(room)

    def fits(self, cost: int) -> bool:
        return cost <= self.rule.burst

    def charge(self, cost: int) -> None:
        self.debt += cost * self.interval
        self.most += cost * self.slowest + (self.lost if cost else 0)

    def refund(self, cost: int) -> None:
        self.debt = max(self.debt - cost * self.interval - self.lost, Fraction(0))
        self.most = max(self.most - cost * self.interval, Fraction(0))


@dataclass
class Window:
    """n in each window; a window begins at the first hit. Tokens are counted, all of them; what
    exceeds n makes the window last longer, per/n for each. Rounding: an end may be late by up to
    twice the unit that the most tokens need."""

    rule: Rule
    count: int = 0
    begun: int = 0
    most: int = 0
    at: int = 0

    def to(self, now: int) -> None:
        self.at = now
        if now >= self.latest_end:
            self.count = self.most = 0

    @property
    def end(self) -> int:
        """The earliest."""
        over = max(self.count - self.rule.n, 0)
        return self.begun + self.rule.per + -(-over * self.rule.per // self.rule.n)

    @property
    def latest_end(self) -> int:
        return self.end + (4 << max(self.most, self.rule.n).bit_length())

    @property
    def over(self) -> bool:
        return not self.count or self.at >= self.end

    def may(self, cost: int) -> bool:
        return cost <= self.rule.n - (0 if self.over else self.count) or cost == 0

    def must(self, cost: int) -> bool:
        return cost <= self.rule.n - self.count or cost == 0

    def fits(self, cost: int) -> bool:
        return cost <= self.rule.n

    def charge(self, cost: int) -> None:
        if not cost:
            return
        assume(not self.count or not self.over)  # over or not: rounding decides
        if not self.count:
            self.begun, self.most = self.at, 0
        self.count += cost
        self.most = max(self.most, self.count)

    def refund(self, cost: int) -> None:
        self.count = max(self.count - cost, 0)
        assume(not self.count or not self.over)


@dataclass
class Sliding:
    """The window before, weighted by what is left of it, and this one. Rounding: a count above
    EXACT keeps 8 significant bits when it becomes the one before; the tests stay below."""

    rule: Rule
    counts: dict[int, int] = field(default_factory=dict)
    at: int = 0

    def to(self, now: int) -> None:
        self.at = now

    @property
    def used(self) -> Fraction:
        index, into = divmod(self.at, self.rule.per)
        weight = Fraction(self.rule.per - into, self.rule.per)
        return self.counts.get(index, 0) + self.counts.get(index - 1, 0) * weight

    def may(self, cost: int) -> bool:
        return cost == 0 or self.used + cost <= self.rule.n

    must = may

    def fits(self, cost: int) -> bool:
        return cost <= self.rule.n

    @property
    def count(self) -> int:
        return self.counts.get(self.at // self.rule.per, 0)

    def charge(self, cost: int) -> None:
        index = self.at // self.rule.per
        self.counts[index] = self.counts.get(index, 0) + cost

    def refund(self, cost: int) -> None:
        index = self.at // self.rule.per
        for i in (index, index - 1):
            back = min(cost, self.counts.get(i, 0))
            self.counts[i] = self.counts.get(i, 0) - back
            cost -= back


Model = Bucket | Window | Sliding


def model_of(rule: Rule) -> Model:
    kinds: dict[int, type[Bucket] | type[Window] | type[Sliding]]
    kinds = {BUCKET: Bucket, WINDOW: Window, SLIDING: Sliding}
    return kinds[rule.kind](rule)
