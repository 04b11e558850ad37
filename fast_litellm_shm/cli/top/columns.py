"""What a column and a pane of ``fast-shm top`` are, and the columns that several panes have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.key_table import SORTS
from fast_litellm_shm.cli.sampler import Snapshot

#: Pieces of text, each with its style. They are cut or padded to the width of the column.
Cell: TypeAlias = list[tuple[str, str]]
GOOD, BAD, WARN, FAINT, NAME = "green", "red", "yellow", "bright_black", "cyan"
NONE: Cell = [("-", FAINT)]
UNKNOWN: Cell = [("?", FAINT)]


@dataclass(frozen=True)
class Column:
    """One column. width: in characters. flex: its share of the room that is left. from_width: the
    width of the terminal from which it is shown. value: what to sort by (KeyTable sorts keys).
    right: aligned right. letter: the keyboard key that sorts by it."""

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
    """One list. rows: the rows of a snapshot; None: its keys, which KeyTable sorts. empty: what to
    say if there are none. matches: what a filter matches, in lines."""

    title: str
    columns: Sequence[Column]
    sort: str
    empty: str
    rows: Callable[[Snapshot], list[Any]] | None
    ident: Callable[[Any], Any]
    matches: Callable[[Any], str] = lambda row: ""

    def column(self, name: str) -> Column:
        """The column of this name."""
        return next(column for column in self.columns if column.name == name)

    def sortable(self) -> list[Column]:
        """The columns that the rows can be sorted by."""
        return [c for c in self.columns if c.value or (self.rows is None and c.name in SORTS)]


def text(
    name: str,
    title: str,
    width: int,
    of: Callable[[Any], str],
    style: str = "",
    *,
    flex: int = 1,
    letter: str = "",
    cell: Callable[[Any, int], Cell] | None = None,
) -> Column:
    """A column of text. cell: if it shows more than ``of``, which sorts it."""
    shown = cell or (lambda row, _: [(of(row), style)])
    return Column(
        name, title, width, shown, of, right=False, descending=False, flex=flex, letter=letter
    )


def count(
    name: str, width: int, of: Callable[[Any], int], *, from_width: int = 0, letter: str = ""
) -> Column:
    """A column of numbers, titled by its name."""

    def cell(row: Any, _: int) -> Cell:
        return [(render.compact(of(row)), "" if of(row) else FAINT)]

    title = name.replace("_", " ")
    return Column(name, title, width, cell, of, from_width=from_width, letter=letter)


def rates(
    calls: Callable[[Any], float | None], denied: Callable[[Any], float | None]
) -> tuple[Column, Column]:
    """The columns calls/s and denied/s."""

    def cells(of: Callable[[Any], float | None], style: str) -> Callable[[Any, int], Cell]:
        def cell(row: Any, _: int) -> Cell:
            value = of(row)
            return NONE if value is None else [(render.compact(value), style if value else FAINT)]

        return cell

    return (
        Column("rate", "calls/s", 8, cells(calls, ""), calls, letter="r"),
        Column("denied_rate", "denied/s", 9, cells(denied, BAD), denied, letter="d"),
    )


def used_of(name: str, width: int, most: str) -> Column:
    """A number of a row that is a dict, and its maximum: ``2/3``; red at the maximum."""

    def cell(row: Any, _: int) -> Cell:
        limit = row[most]
        full = limit is not None and row[name] >= limit
        shown = "?" if limit is None else render.compact(limit)
        return [(render.compact(row[name]), BAD if full else GOOD), ("/" + shown, FAINT)]

    return Column(name, name.replace("_", " "), width, cell, lambda row: row[name])


def history(
    admitted: Callable[[Any], Sequence[float]],
    denied: Callable[[Any], Sequence[float]],
    width: int = 12,
    *,
    flex: int = 0,
    from_width: int = 0,
) -> Column:
    """The bars of past samples."""

    def cell(row: Any, width: int) -> Cell:
        return bars(admitted(row), denied(row), width)

    return Column("history", "history", width, cell, flex=flex, from_width=from_width)


def bars(admitted: Sequence[float], denied: Sequence[float], width: int) -> Cell:
    """Calls over time: green; yellow if some were denied, red if most were."""
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
