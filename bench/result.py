"""The one shape of what a question finds: rows, ratios with their targets, and what is missing.

The report, the JSON file and the plots are made from these and from nothing else.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

OURS, REFERENCE = "ours", "reference"  # who a row belongs to; else the name of a peer
#: A row that tells machines apart: ns.
EMPTY_CALL = "a Python function that does nothing"


def number(value: float) -> str:
    """Three digits that mean something, and thousands apart."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}" if abs(value) >= 0.1 else f"{value:.2g}"


@dataclass(frozen=True)
class Settings:
    """How much to measure in one pass. rounds: values behind each median, of this pass. passes: how
    often the question is asked in the run."""

    rounds: int = 41
    quick: bool = False
    passes: int = 1

    def pick(self, full: Any, quick: Any) -> Any:
        """The one that holds now."""
        return quick if self.quick else full

    def share(self, whole: int) -> int:
        """This pass's part of so many: rounded up."""
        return -(-whole // self.passes)


class Values:
    """One value for each round: its median and its spread, the 10th to the 90th percentile."""

    def __init__(self, values: Iterable[float]) -> None:
        self.values = tuple(float(value) for value in values)
        tenths = (
            statistics.quantiles(self.values, n=10, method="inclusive")
            if len(self.values) > 1
            else self.values * 2
        )
        self.median = statistics.median(self.values)
        # quantiles() interpolates, and of equal values may come out beside them by a rounding.
        self.low, self.high = min(tenths[0], self.median), max(tenths[-1], self.median)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)

    def as_json(self) -> dict[str, Any]:
        """What the JSON file keeps of them."""
        return {
            "median": self.median,
            "low": self.low,
            "high": self.high,
            "rounds": len(self.values),
        }


@dataclass(frozen=True)
class Row:
    """One thing measured. group: rows that are read side by side share it. x: where rows of one
    contender make a curve. notes: what else was seen, by name."""

    name: str
    unit: str
    found: Values
    who: str = OURS
    group: str = ""
    x: float | None = None
    notes: dict[str, str | float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "name": self.name,
            "who": self.who,
            "group": self.group,
            "x": self.x,
            "unit": self.unit,
            **self.found.as_json(),
            "notes": self.notes,
        }


@dataclass(frozen=True)
class Ratio:
    """One thing over another; target: None where none was set. promise: the row of the table of
    targets that it belongs to, or None. missing: why there is nothing to compare with; then found
    is None. why: what is known of the reason, where the target is not reached. worst: not the
    median counts, but the worst of all that was found."""

    name: str
    found: Values | None
    target: float | None
    at_least: bool = True
    unit: str = "×"
    promise: str | None = None
    missing: str | None = None
    why: str = ""
    worst: bool = False

    @property
    def reached(self) -> bool | None:
        """None where it was not measured, or has no target."""
        if self.found is None or self.target is None:
            return None
        median = self.found.median
        return median >= self.target if self.at_least else median <= self.target

    @property
    def verdict(self) -> str:
        """In words, and by how much not."""
        if self.found is None:
            return f"not measured: {self.missing}"
        if self.target is None:
            return "no target"
        if self.reached:
            return "reached"
        if self.target == 0:
            return "NOT REACHED"
        off = abs(self.found.median / self.target - 1)
        edge = self.found.high if self.at_least else self.found.low
        touches = edge >= self.target if self.at_least else edge <= self.target
        told = f"NOT REACHED, by {off:.1%}" + (", which is within the spread" if touches else "")
        return told + (f": {self.why}" if self.why else "")

    @property
    def aim(self) -> str:
        """The target, in words."""
        if self.target is None:
            return "–"
        return f"{'≥' if self.at_least else '≤'} {self.target:g} {self.unit}".rstrip()

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "name": self.name,
            "promise": self.promise,
            "target": self.target,
            "at_least": self.at_least,
            "unit": self.unit,
            "found": None if self.found is None else self.found.as_json(),
            "missing": self.missing,
            "reached": self.reached,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Plot:
    """A picture of the rows of one or more groups. kind: ``bars`` (one for each row), ``lines``
    (one for each contender, over x) or ``parts`` (a line for each contender, a mark at each x)."""

    name: str
    kind: str
    title: str
    groups: tuple[str, ...]
    value: str  # label of the axis of values, with its unit
    x: str = ""  # label of the other axis, of lines; the names of the parts, as p50|p99
    log_value: bool = True
    better: str = "less is better"


@dataclass
class Result:
    """What one question found. title: the question. how: how it was asked. missing: peers that
    could not be measured, and why. seconds: how long it took."""

    title: str
    how: str = ""
    rows: list[Row] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    plots: list[Plot] = field(default_factory=list)
    seconds: float = 0.0
    failed: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For the JSON file."""
        return {
            "title": self.title,
            "how": self.how,
            "rows": [row.as_json() for row in self.rows],
            "ratios": [ratio.as_json() for ratio in self.ratios],
            "missing": self.missing,
            "seconds": self.seconds,
            "failed": self.failed,
        }


def asked(doc: str | None) -> Result:
    """An empty result, from the docstring of its module: the question, then how it is asked."""
    title, _, how = (doc or "").strip().partition("\n")
    return Result(title, " ".join(how.split()))


def ratio(
    rows: Sequence[Row],
    above: str,
    below: str,
    target: float | None,
    *,
    at_least: bool = True,
    promise: str | None = None,
    name: str | None = None,
    group: str | None = None,
    why: str = "",
) -> Ratio:
    """Row ``above`` over row ``below``, round by round: what disturbs a round disturbs both."""
    found = {row.name: row.found for row in rows if group is None or row.group == group}
    lacks = [each for each in (above, below) if each not in found]
    return Ratio(
        name or f"{above} / {below}",
        None
        if lacks
        else Values(
            a / b for a, b in zip(found[above].values, found[below].values, strict=True) if b
        ),
        target,
        at_least,
        promise=promise,
        missing=f"there is no row “{lacks[0]}”" if lacks else None,
        why=why,
    )
