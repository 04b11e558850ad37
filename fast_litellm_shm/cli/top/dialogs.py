"""Boxes over the list: help, a key in full, warnings, and a question."""

from __future__ import annotations

from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.key_table import LiveKey
from fast_litellm_shm.cli.top.columns import FAINT, bars

HELP = """\
 Tab  1 .. 8   panes                   <  >  ← →  sort by the next column
 ↑ ↓  PgUp ..  move                    i          reverse the order
 Home          back to the top         r d k l f  sort by calls/s, denied/s,
 Enter         a key in full                      key, limiter, share left
 /             filter (Esc: no more)   space      freeze, and resume
 x             reset the key           w          warnings in full
 q  Ctrl-C     quit                    ?          this help

 Rates are means of the last 5 seconds. Bars are the last 60 samples:
 green; yellow if some calls were denied, red if most were.

 A filter is part of a name of a key or limiter, or a glob (user-*). It
 ignores case. A list shows its first 1,000 rows; sorted by what is left,
 it has the 2,000 busiest keys only.

 left: what is admitted now, of the limit.
 reset: until nothing is consumed.
 The cursor stays in the first row until you move it; then it follows
 its row."""


def key_in_full(key: LiveKey) -> Text:
    """Everything about a key. Its name may be longer than the screen is wide."""
    row = key.row
    limit = "not known" if row.limit is None else render.left(row.limit, row.usd)
    left = "not known" if row.remaining is None else render.left(row.remaining, row.usd)
    unknown = "never" if row.usd else "not known"
    wait = "-" if row.retry_after == 0 else render.brief(row.retry_after)
    return Text.assemble(
        (key.name, "bold cyan"),
        ("\nof limiter ", FAINT),
        render.escaped(row.limiter),
        f"\n\nadmitted  {row.admitted:,}\ndenied    {row.denied:,}"
        f"\nleft      {left} of {limit}"
        f"\nwait      {wait if row.remaining is not None else 'not known'}"
        f"\nreset     {unknown if row.reset_after is None else render.brief(row.reset_after)}",
        "\n\n",
        *bars(key.admitted_history, key.denied_history, 60),
        ("\ncalls per second, the last 60 samples", FAINT),
    )


class _Box(ModalScreen[bool]):
    def __init__(self, title: str, text: Text) -> None:
        super().__init__()
        self._title, self._text = title, text


class Notice(_Box):
    """A text, until a key closes it."""

    CSS = """
    Notice { align: center middle; background: transparent; }
    Notice > VerticalScroll {
        width: auto; max-width: 100%; height: auto; max-height: 100%;
        border: round $accent; padding: 0 1; background: $background;
    }
    Notice Static { width: auto; max-width: 84; }
    """
    BINDINGS = [
        Binding("escape,enter,q,question_mark,w", "dismiss", "close", show=False),
        Binding("up,k", "scroll(-1)", show=False),
        Binding("down,j", "scroll(1)", show=False),
    ]

    def compose(self) -> ComposeResult:
        """A box in the middle."""
        with VerticalScroll() as box:
            box.border_title = Text(self._title)
            box.border_subtitle = "Esc closes"
            yield Static(self._text, markup=False)

    def action_scroll(self, by: int) -> None:
        """Scroll a text that is longer than the screen."""
        self.query_one(VerticalScroll).scroll_relative(y=by, animate=False)


class Question(_Box):
    """Yes or no; anything but ``y`` is no."""

    CSS = """
    Question { align: center middle; background: transparent; }
    Question > Static {
        width: auto; max-width: 90%; height: auto;
        border: round $warning; padding: 0 1; background: $background;
    }
    """

    def compose(self) -> ComposeResult:
        """A box in the middle."""
        box = Static(self._text, markup=False)
        box.border_title = Text(self._title)
        box.border_subtitle = "y: yes   any other key: no"
        yield box

    def on_key(self, event: events.Key) -> None:
        """The first key is the answer; keys typed after it are dropped."""
        event.stop()
        if self.is_current:
            self.dismiss(event.key in ("y", "Y"))
