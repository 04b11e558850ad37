"""The application: what each keyboard key does, and the loop that samples the segment."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.widgets import Input, Static

from fast_litellm_shm import exceptions
from fast_litellm_shm.cli import render, reset
from fast_litellm_shm.cli.key_table import LiveKey
from fast_litellm_shm.cli.sampler import Sampler, Snapshot
from fast_litellm_shm.cli.top import columns, header, panes
from fast_litellm_shm.cli.top.dialogs import HELP, Notice, Question, key_in_full
from fast_litellm_shm.cli.top.table import Table

_SOON = 0.3  # seconds to the second sample, which has the first rates
_TALL = 34  # lines of a terminal with room for a longer head
_MOST_WORKERS = 8  # in a longer head


class Filter(Input):
    """The line for a filter, below the list."""


class Top(App[None]):
    """``fast-shm top``. every: seconds from one sample to the next."""

    ENABLE_COMMAND_PALETTE = False
    CSS = """
    Screen { background: transparent; layers: base; overflow: hidden; }
    Static { height: auto; background: transparent; }
    Table { background: transparent; }
    Filter { height: 1; border: none; padding: 0; background: transparent; display: none; }
    Filter:focus { border: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", priority=False),
        Binding("ctrl+z", "suspend_process"),
        Binding("question_mark,h,f1", "help"),
        # With priority: the next key must reach what these give the focus to.
        Binding("slash,f3,f4", "filter", priority=True),
        Binding("enter", "filter_keep", priority=True),
        Binding("escape", "filter_end", priority=True),
        Binding("escape", "filter_clear"),
        Binding("space", "freeze"),
        Binding("tab", "pane_by(1)", priority=True),
        Binding("shift+tab", "pane_by(-1)", priority=True),
        *(Binding(str(at + 1), f"pane({at})") for at in range(len(panes.PANES))),
        Binding("less_than_sign,left", "sort_by(-1)"),
        Binding("greater_than_sign,right", "sort_by(1)"),
        Binding("i,I", "invert"),
        *(Binding(letter, f"sort_letter('{letter}')") for letter in "rdklfums"),
        Binding("up", "move(-1)"),
        Binding("down,j", "move(1)"),
        Binding("pageup", "page(-1)"),
        Binding("pagedown", "page(1)"),
        Binding("home,g", "home"),
        Binding("end,G", "end"),
        Binding("enter", "details"),
        Binding("x", "reset"),
        Binding("w", "warnings"),
    ]

    def __init__(self, sampler: Sampler, every: float = 1.0) -> None:
        super().__init__(ansi_color=True)
        self._sampler, self._every = sampler, every
        self._snapshot = Snapshot(sampler.name, 0.0)
        self._samples, self._frozen, self._filter = 0, False, ""
        self._pane = 0
        self._sorts = {
            pane.title: (pane.sort, pane.column(pane.sort).descending) for pane in panes.PANES
        }
        self._order: tuple[Sequence[Any], int] = ((), 0)
        self._changed = asyncio.Event()
        self._message = ""  # below the list, until the next key

    # The screen

    def compose(self) -> ComposeResult:
        """Head, warning, panes, list, filter, foot, from top to bottom."""
        yield Static(id="head", markup=False)
        yield Static(id="warning", markup=False)
        yield Static(id="tabs", markup=False)
        yield Table()
        yield Filter(placeholder="part of a name, or a glob such as user-*", id="filter")
        yield Static(id="foot", markup=False)

    async def on_mount(self) -> None:
        self.query_one(Table).focus()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            # A signal must not leave the terminal on its alternate screen.
            code = 0 if number == signal.SIGINT else 128 + number
            try:
                loop.add_signal_handler(number, self.exit, None, code)
            except (ValueError, RuntimeError):
                break  # not in the main thread, as in tests
        self.run_worker(self._sample_on(), exclusive=True)

    async def _sample_on(self) -> None:
        """Sample and sort in a thread, one at a time: keys are answered meanwhile."""
        loop, due = asyncio.get_running_loop(), 0.0
        while True:
            self._changed.clear()
            if not self._frozen and loop.time() >= due:
                self._snapshot = await asyncio.to_thread(self._sampler.sample)
                self._samples += 1
                due = loop.time() + (min(_SOON, self._every) if self._samples == 1 else self._every)
            self._order = await asyncio.to_thread(self._arranged)
            if not self.query(Table):
                return  # the application is closing
            self._paint()
            try:
                wait = None if self._frozen else max(due - loop.time(), 0.01)
                await asyncio.wait_for(self._changed.wait(), wait)
            except asyncio.TimeoutError:
                pass

    def _arranged(self) -> tuple[Sequence[Any], int]:
        """The pane with its rows (of keys: their slots), and how many rows match."""
        pane, snapshot = panes.PANES[self._pane], self._snapshot
        sort, descending = self._sorts[pane.title]
        if pane.rows is not None:
            rows = panes.arranged(pane, snapshot, sort, descending, self._filter)
            return (pane, rows), len(rows)
        if snapshot.keys is None:
            return (pane, []), 0
        reverse = descending != pane.column(sort).descending
        order, total = snapshot.keys.order(sort, reverse=reverse, match=self._filter)
        return (pane, order), total

    def _paint(self) -> None:
        snapshot, size = self._snapshot, self.size
        lines = header.LINES
        if size.height >= _TALL:
            lines = max(lines, min(len(snapshot.workers), _MOST_WORKERS) + 2)
        head = header.lines_of(snapshot, self._frozen, size.width, lines)
        self.query_one("#head", Static).update(Text("\n").join(head))
        warning = header.warning_lines(snapshot, size.width)
        below = self.query_one("#warning", Static)
        below.display = bool(warning)
        below.update(Text("\n").join(warning))
        titles = [
            (at + 1, pane.title, panes.count_of(pane, snapshot))
            for at, pane in enumerate(panes.PANES)
            if at == self._pane or panes.is_shown(pane, snapshot)
        ]
        self.query_one("#tabs", Static).update(header.tabs(titles, self._pane + 1, size.width))
        self._paint_table()
        self.query_one("#foot", Static).update(self._foot(size.width))

    def _paint_table(self) -> None:
        table, snapshot = self.query_one(Table), self._snapshot
        (pane, rows), _ = self._order if self._order[0] else ((panes.PANES[self._pane], []), 0)
        sort, descending = self._sorts[pane.title]
        table.empty = snapshot.problem or (
            f"No match for {self._filter!r}." if self._filter else pane.empty
        )
        if not snapshot.taken:
            table.empty = "Reading ..."
        if pane.rows is not None:
            alike, by_ident = Counter[Any](), {}
            for row in rows:  # long keys that begin alike are shown alike
                ident = pane.ident(row)
                by_ident[ident, alike[ident]] = row
                alike[ident] += 1
            table.show(
                pane, list(by_ident), lambda some: [by_ident[i] for i in some], sort, descending
            )
            return
        keys = snapshot.keys

        def fetch(some: Sequence[Any]) -> list[Any]:
            return keys.rows(list(some)) if keys else []

        table.show(pane, rows, fetch, sort, descending)

    def _foot(self, width: int) -> Text:
        if self._message:
            return Text(self._message, style="bold", no_wrap=True, overflow="ellipsis")
        at, shown = self.query_one(Table).position
        total = self._order[1]
        where = f"{at:,}/{shown:,}" + (f" of {total:,}" if total > shown else "")
        out = Text(no_wrap=True, overflow="ellipsis")
        if self._filter:
            out.append(f" /{render.escaped(self._filter)} ", style="black on yellow")
            out.append(" ")
        for key, what in (
            ("?", "help"),
            ("/", "filter"),
            ("<>", "sort"),
            ("space", "resume" if self._frozen else "freeze"),
            ("x", "reset"),
            ("q", "quit"),
        ):
            out.append(key, style="bold cyan")
            out.append(f" {what}  ", style=columns.FAINT)
        out.truncate(width - len(where), pad=True)
        out.append(where, style=columns.FAINT)
        return out

    def _repaint(self) -> None:
        """Sort and paint again, without waiting for the next sample."""
        self._changed.set()

    def on_resize(self, _: events.Resize) -> None:
        self._repaint()

    async def on_event(self, event: events.Event) -> None:
        """The next key clears the message below the list."""
        if isinstance(event, events.Key) and self._message:
            self._message = ""
            self._repaint()
        await super().on_event(event)

    # Actions

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While a box is open or a filter is typed, keys are not commands."""
        if action in ("quit", "suspend_process"):
            return True
        typing = isinstance(self.focused, Filter)
        if action in ("filter_keep", "filter_end"):
            return typing
        return not typing and len(self.screen_stack) == 1

    def action_help(self) -> None:
        self.push_screen(Notice("fast-shm top", Text(HELP)))

    def action_warnings(self) -> None:
        problem = [self._snapshot.problem] if self._snapshot.problem else []
        said = "\n\n".join([*problem, *self._snapshot.warnings])
        said = said or "There are no warnings."
        self.push_screen(Notice("Warnings", Text(said)))

    def action_freeze(self) -> None:
        self._frozen = not self._frozen
        self._repaint()

    def action_pane(self, which: int) -> None:
        self._pane, self._message = which, ""
        self._repaint()

    def action_pane_by(self, by: int) -> None:
        at = (self._pane + by) % len(panes.PANES)
        while not panes.is_shown(panes.PANES[at], self._snapshot):
            at = (at + by) % len(panes.PANES)
        self.action_pane(at)

    def _sort(self, name: str) -> None:
        pane = panes.PANES[self._pane]
        was, descending = self._sorts[pane.title]
        turned = not descending if name == was else pane.column(name).descending
        self._sorts[pane.title] = (name, turned)
        self._repaint()

    def action_sort_by(self, by: int) -> None:
        pane = panes.PANES[self._pane]
        names = [column.name for column in pane.sortable()]
        self._sort(names[(names.index(self._sorts[pane.title][0]) + by) % len(names)])

    def action_sort_letter(self, letter: str) -> None:
        """Sort by the column of this letter; if it is sorted so already, reverse the order."""
        for column in panes.PANES[self._pane].sortable():
            if column.letter == letter:
                self._sort(column.name)

    def action_invert(self) -> None:
        self._sort(self._sorts[panes.PANES[self._pane].title][0])

    def on_table_sort_by(self, message: Table.SortBy) -> None:
        if message.column in [column.name for column in panes.PANES[self._pane].sortable()]:
            self._sort(message.column)

    def action_move(self, by: int) -> None:
        self.query_one(Table).move(by)
        self._moved()

    def action_page(self, by: int) -> None:
        self.action_move(by * self.query_one(Table).page())

    def action_home(self) -> None:
        """Go to the first row, and stay there."""
        self.query_one(Table).to_the_top()
        self._moved()

    def action_end(self) -> None:
        self.action_move(self.query_one(Table).position[1])

    def _moved(self) -> None:
        self._message = ""
        self.query_one("#foot", Static).update(self._foot(self.size.width))

    # Filter

    def action_filter(self) -> None:
        """Type a filter; the list follows."""
        line = self.query_one(Filter)
        line.display = True
        line.value = self._filter
        self.screen.set_focus(line)  # now: the next letter has arrived already

    def on_input_changed(self, message: Input.Changed) -> None:
        self._filter = message.value
        self._repaint()

    def action_filter_keep(self) -> None:
        self.query_one(Filter).display = False
        self.screen.set_focus(self.query_one(Table))
        self._repaint()

    def action_filter_end(self) -> None:
        """Esc while typing: no filter."""
        self._filter = ""
        self.action_filter_keep()

    def action_filter_clear(self) -> None:
        """Esc: no filter, and back to the top."""
        self._filter = self._message = ""
        self.query_one(Table).to_the_top()
        self._repaint()

    # One key

    def _selected(self) -> LiveKey | None:
        table, keys = self.query_one(Table), self._snapshot.keys
        if panes.PANES[self._pane].rows is not None or keys is None or table.selected is None:
            return None
        return next(iter(keys.rows([table.selected])), None)

    def _show_message(self, text: str) -> None:
        self._message = text
        self._repaint()

    def action_details(self) -> None:
        key = self._selected()
        if key is None:
            self._show_message("Choose a key in pane 1: Enter shows it in full.")
            return
        self.push_screen(Notice("Key", key_in_full(key)))

    def action_reset(self) -> None:
        """Ask, then forget what the selected key has consumed."""
        key = self._selected()
        if key is None:
            self._show_message("Choose a key in pane 1: x resets it.")
            return
        if not key.row.raw and key.row.key or key.row.is_cut:
            self._show_message("Cannot reset this key: its name is not kept in full.")
            return
        text = Text.assemble(
            "Forget what ",
            (key.name, "bold cyan"),
            f" has consumed in limiter {render.escaped(key.row.limiter)!r}?\n",
            ("Its whole limit is available again.", columns.FAINT),
        )

        def answered(yes: bool | None) -> None:
            if yes:
                self._reset(key)

        self.push_screen(Question("Reset", text), answered)

    def _reset(self, key: LiveKey) -> None:
        sampler, row = self._sampler, key.row
        try:
            had = reset.reset_key(sampler.name, sampler.allow_other_owner, row.limiter, row.raw)
        except exceptions.FastShmError as error:
            self._show_message(f"Not reset: {error}")
            return
        self._show_message(f"Reset {key.name}." if had else f"{key.name} had consumed nothing.")
