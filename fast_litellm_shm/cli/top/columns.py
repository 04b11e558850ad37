"""What a column of ``fast-shm top`` is, and the cells that several panes have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.key_table import SORTS
from fast_litellm_shm.cli.sampler import Snapshot

#: Pieces of text with their styles; what they come to is cut, or filled up, to the column.
Cell: TypeAlias = list[tuple[str, str]]
GOOD, BAD, WARN, FAINT, NAME = "green", "red", "yellow", "bright_black", "cyan"


@dataclass(frozen=True)
class Column:
    """One column. width: in characters; flex: its share of what is left over beyond that.
    from_width: shown where the terminal is so wide. value: what to sort by; keys are sorted by
    KeyTable. letter: the key that sorts by it."""

    name: str
    title: str
    width: int
    cell: Callable[[Any, int], Cell]
    value: Callable[[Any], Any] | None = None
    right: bool = True
    descending: bool = True
    flex: int = 0
    from_width: int = 0
    letter: str = ""


@dataclass(frozen=True)
class Pane:
    """One list. rows: what it shows of a snapshot; None: keys, which KeyTable orders."""

    title: str
    columns: Sequence[Column]
    sort: str
    empty: str
    rows: Callable[[Snapshot], list[Any]] | None
    ident: Callable[[Any], Any]
    matches: Callable[[Any], str] = lambda row: ""

    def column(self, name: str) -> Column:
        """By its name."""
        return next(column for column in self.columns if column.name == name)

    def sortable(self) -> list[Column]:
        """Those that it can be sorted by."""
        return [c for c in self.columns if c.value or (self.rows is None and c.name in SORTS)]


def rate_of(of: Callable[[Any], float | None], style: str = "") -> Callable[[Any, int], Cell]:
    def cell(row: Any, _: int) -> Cell:
        value = of(row)
        if value is None:
            return [("-", FAINT)]
        return [(render.compact(value), style if value else FAINT)]

    return cell


def text_of(of: Callable[[Any], str], style: str = "") -> Callable[[Any, int], Cell]:
    return lambda row, _: [(of(row), style)]


def count_in(of: Callable[[Any], int], style: str = "") -> Callable[[Any, int], Cell]:
    return lambda row, _: [(render.compact(of(row)), style if of(row) else FAINT)]


def bars(admitted: Sequence[float], denied: Sequence[float], width: int) -> Cell:
    """Calls over time: green; yellow where some of them were denied, red where most were."""
    calls = [a + d for a, d in zip(admitted, denied, strict=True)][-width:]
    shown = render.sparkline(calls, width)
    refused = [0.0] * (width - len(calls)) + [float(d) for d in denied][-width:]
    cell: Cell = []
    calls = [0.0] * (width - len(calls)) + calls
    for bar, all_calls, denials in zip(shown, calls, refused, strict=True):
        style = (
            BAD if denials > all_calls / 2 else WARN if denials else GOOD if all_calls else FAINT
        )
        if cell and cell[-1][1] == style:
            cell[-1] = (cell[-1][0] + bar, style)
        else:
            cell.append((bar, style))
    return cell
