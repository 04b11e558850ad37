"""The list below the head: it reads and paints only the rows that are visible."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from fast_litellm_shm.cli.top.columns import FAINT, Cell, Column, Pane

_GAP = 1
_CURSOR = Style.parse("black on cyan")
_HEAD = Style.parse("bold")
_SORTED = Style.parse("bold reverse")


def fitted(cell: Cell, width: int, right: bool) -> list[Segment]:
    """A cell cut (with an ellipsis) or padded to a width."""
    pieces: list[Segment] = []
    left = width
    total = sum(cell_len(text) for text, _ in cell)
    for text, style in cell:
        shown, size = text, cell_len(text)
        if total > width and size >= left:  # this piece is cut, the next ones are left out
            shown, size = set_cell_size(text, max(left - 1, 0)) + "…" * (left > 0), left
        pieces.append(Segment(shown, Style.parse(style) if style else Style.null()))
        left -= size
        if left <= 0:
            break
    filling = Segment(" " * max(left, 0))
    return [filling, *pieces] if right else [*pieces, filling]


def column_widths(columns: Sequence[Column], width: int) -> list[int]:
    """The width of each column: its own, and its share of the room that is left."""
    widths = [column.width for column in columns]
    rest = width - sum(widths) - _GAP * (len(widths) - 1)
    shares = sum(column.flex for column in columns)
    if shares and rest > 0:
        flexible = [at for at, column in enumerate(columns) if column.flex]
        for at in flexible:
            widths[at] += rest * columns[at].flex // shares
        widths[flexible[0]] += width - sum(widths) - _GAP * (len(widths) - 1)
    while rest < 0 and (widest := max(range(len(widths)), key=lambda at: widths[at])) >= 0:
        widths[widest] -= 1  # too narrow: the widest columns shrink
        rest += 1
        if widths[widest] <= 3:
            break
    return widths


class Table(Widget, can_focus=True):
    """Rows by handle, which identifies a row as long as it is shown. The cursor stays on the first
    row until it is moved; then it follows its row."""

    DEFAULT_CSS = "Table { height: 1fr; }"

    @dataclass
    class SortBy(Message):
        """The head of a column was clicked."""

        column: str

    def __init__(self) -> None:
        super().__init__()
        self.pane: Pane | None = None
        self.sort, self.descending = "", True
        self.empty = ""
        self._handles: Sequence[Hashable] = ()
        self._fetch: Callable[[Sequence[Any]], list[Any]] = list
        self._rows: dict[Hashable, list[Segment]] = {}
        self._cursor, self._first, self._held = 0, 0, False

    def show(
        self,
        pane: Pane,
        handles: Sequence[Hashable],
        fetch: Callable[[Sequence[Any]], list[Any]],
        sort: str,
        descending: bool,
    ) -> None:
        """Show these rows. fetch: returns the rows of some handles, in order, None for one that is
        gone."""
        was = self.selected if self._held and pane is self.pane else None
        if pane is not self.pane:
            self._cursor, self._first, self._held = 0, 0, False
        self.pane, self._handles, self._fetch = pane, handles, fetch
        self.sort, self.descending = sort, descending
        if was is not None and was in handles:
            moved = list(handles).index(was) - self._cursor
            self._cursor += moved
            self._first = max(self._first + moved, 0)
        self._settle()

    def _settle(self) -> None:
        room = max(self.size.height - 1, 1)
        self._cursor = max(min(self._cursor, len(self._handles) - 1), 0)
        self._first = min(self._first, self._cursor, max(len(self._handles) - room, 0))
        self._first = max(self._first, self._cursor - room + 1, 0)
        self.refresh()

    @property
    def selected(self) -> Any:
        """The handle under the cursor; None if there are no rows."""
        return self._handles[self._cursor] if self._handles else None

    @property
    def position(self) -> tuple[int, int]:
        """The row of the cursor, from 1, and the number of rows."""
        return (self._cursor + 1 if self._handles else 0), len(self._handles)

    def move(self, by: int) -> None:
        """Move the cursor within the rows."""
        self._held = True
        self._cursor += by
        self._settle()

    def to_the_top(self) -> None:
        """The first row, and stay there."""
        self._cursor, self._first, self._held = 0, 0, False
        self._settle()

    def page(self) -> int:
        """Rows on the screen."""
        return max(self.size.height - 1, 1)

    def _columns(self) -> list[tuple[Column, int]]:
        """Those that are shown, each with its width."""
        if self.pane is None:
            return []
        shown = [c for c in self.pane.columns if self.size.width >= c.from_width]
        return list(zip(shown, column_widths(shown, self.size.width), strict=True))

    def on_resize(self) -> None:
        self._settle()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()
        self.move(3)

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        event.stop()
        self.move(-3)

    def on_click(self, event: events.Click) -> None:
        if event.y > 0:
            self._held = True
            self._cursor = min(self._first + event.y - 1, len(self._handles) - 1)
            self._settle()
            return
        at = 0
        for column, width in self._columns():
            at += width + _GAP
            if event.x < at:
                self.post_message(self.SortBy(column.name))
                return

    def render_lines(self, crop: Any) -> list[Strip]:
        """Fetches all visible rows in one call."""
        self._rows = {}
        shown = self._handles[self._first : self._first + self.page()]
        columns = self._columns()
        for handle, row in zip(shown, self._fetch(shown), strict=True):
            pieces: list[Segment] = []
            for column, width in columns:
                cell = [("", "")] if row is None else column.cell(row, width)
                pieces += [*fitted(cell, width, column.right), Segment(" " * _GAP)]
            self._rows[handle] = pieces[:-1]
        return super().render_lines(crop)

    def _head(self) -> list[Segment]:
        pieces: list[Segment] = []
        for column, width in self._columns():
            chosen = column.name == self.sort
            arrow = ("▼" if self.descending else "▲") if chosen else ""
            cell = [(arrow + column.title if column.right else column.title + arrow, "")]
            style = _SORTED if chosen else _HEAD
            pieces += [Segment(s.text, style) for s in fitted(cell, width, column.right)]
            pieces.append(Segment(" " * _GAP, _HEAD))
        return pieces[:-1]

    def render_line(self, y: int) -> Strip:
        width = self.size.width
        if y == 0:
            pieces = self._head()
        elif not self._handles:
            text = self.empty if y == 2 else ""
            pieces = fitted([("  " + text, FAINT)], width, False)
        elif self._first + y - 1 < len(self._handles):
            at = self._first + y - 1
            pieces = self._rows.get(self._handles[at], [])
            if at == self._cursor and self.has_focus:
                pieces = [Segment(piece.text, _CURSOR) for piece in pieces]
        else:
            pieces = []
        return Strip(pieces).adjust_cell_length(width, Style.null()).crop(0, width)
