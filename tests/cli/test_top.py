"""fast-shm top, driven as by a keyboard, on a real segment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from support.waiters import waiters  # noqa: E402
from support.waiting import wait_until_async  # noqa: E402

pytest.importorskip("textual", reason="not installed: textual")

from textual import events  # noqa: E402
from textual.pilot import Pilot  # noqa: E402
from textual.widgets import Static  # noqa: E402

from fast_litellm_shm import ConcurrencyLimiter, Limit, RateLimiter, Segment, Window  # noqa: E402
from fast_litellm_shm._shared.wait_queue import ALIKE, Order  # noqa: E402
from fast_litellm_shm.cli.sampler import Sampler  # noqa: E402
from fast_litellm_shm.cli.top.app import Top  # noqa: E402
from fast_litellm_shm.cli.top.panes import PANES  # noqa: E402
from fast_litellm_shm.cli.top.table import Table  # noqa: E402

Body = Callable[[Pilot[None], Top], Coroutine[Any, Any, None]]


def driven(name: str, body: Body, size: tuple[int, int] = (80, 24), every: float = 0.05) -> Top:
    """Run it without a terminal, and let ``body`` press keys."""
    app = Top(Sampler(name), every)

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await until(lambda: any(lines(app)))
            await body(pilot, app)

    asyncio.run(run())
    return app


async def until(true: Callable[[], bool], what: str = "it did not come about") -> None:
    """It is painted some time after a key."""
    await wait_until_async(what, true)


def lines(app: Top) -> list[str]:
    """What is on the screen."""
    return [
        "".join(segment.text for segment in strip).rstrip()
        for strip in app.screen._compositor.render_strips()
    ]


async def sees(app: Top, text: str) -> None:
    await until(lambda: any(text in line for line in lines(app)), f"{text!r} not in {lines(app)}")


def listed(app: Top) -> list[str]:
    """The first word of each row of the list."""
    at = app.query_one(Table).region.y
    rows = lines(app)[at + 1 : at + app.query_one(Table).size.height]
    return [row.split()[0] for row in rows if row]


async def lists(app: Top, names: list[str]) -> None:
    await until(lambda: listed(app) == names, f"{listed(app)} is not {names}")


@pytest.fixture
def filled(segment: Segment) -> Segment:
    """chat: busy is at its limit and was denied; wide: a, b, c with 5, 3 and 1 calls."""
    chat = RateLimiter(Window(10, 3600), name="chat", segment=segment)
    wide = RateLimiter(Limit(1000, 360_000), name="wide", segment=segment)
    for _ in range(12):
        chat.acquire("busy")
    for key, calls in (("a", 5), ("b", 3), ("c", 1)):
        for _ in range(calls):
            wide.acquire(key)
    return segment


def test_what_is_shown(filled: Segment) -> None:
    permit = ConcurrencyLimiter(3, name="gpu", segment=filled).acquire("model")

    async def body(pilot: Pilot[None], app: Top) -> None:
        await sees(app, "5 of 1,000")
        await lists(app, ["busy", "a", "b", "c"])
        shown = lines(app)
        assert len(shown) == 24 and all(len(line) <= 80 for line in shown)
        assert shown[0].startswith(filled.name) and "live" in shown[0]
        assert "5 of 1,000" in shown[1] and shown[2].startswith("admitted")
        busy = next(line for line in shown if line.startswith("busy"))
        assert busy.split()[1] == "chat" and "0/10" in busy
        a = next(line for line in shown if line.startswith("a "))
        assert "995/1,000" in a
        await pilot.press("4")
        await lists(app, ["model"])
        await sees(app, "1/3")
        await pilot.press("3")
        await lists(app, ["chat", "gpu", "wide"])
        for pane, empty in (("5", "No pool has"), ("6", "No router has")):
            await pilot.press(pane)
            await sees(app, empty)
        await pilot.press("tab")
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("shift+tab", "shift+tab")
        await sees(app, "No pool has")

    driven(filled.name, body)
    assert permit.release()


def test_callers_that_wait(segment: Segment) -> None:
    """A pane of them is there while there are any; without, the screen is as it was."""
    gpu = ConcurrencyLimiter(1, name="gpu", segment=segment)
    permit = gpu.acquire("model")

    async def body(pilot: Pilot[None], app: Top) -> None:
        await sees(app, "1 permit, 0 pooled")
        assert "Waiting" not in "".join(lines(app)) and " wait" not in "".join(lines(app))
        await pilot.press("shift+tab")
        await sees(app, "No router has")
        with waiters(gpu, "model", ALIKE, ALIKE, Order(0, 1000, 5)):
            await sees(app, "0 pooled, 3 wait")
            await sees(app, "7 Waiting")
            await pilot.press("tab")
            await lists(app, ["model", "model"])
            assert all(len(line) <= 80 for line in lines(app))
            await pilot.press("/", "z", "z")
            await sees(app, "No match")
            await pilot.press("escape")
            await lists(app, ["model", "model"])
        await sees(app, "No caller waits.")
        await pilot.press("tab", "shift+tab")  # not to the pane that is gone
        await sees(app, "No router has")

    driven(segment.name, body)
    assert permit.release()


def test_heads_fit_their_columns() -> None:
    """With the arrow that says how it is sorted, wherever they are shown."""
    for pane in PANES:
        for column in pane.sortable():
            assert len(column.title) + 1 <= column.width, (pane.title, column.title)
        for column in pane.columns:
            assert len(column.title) <= column.width, (pane.title, column.title)


def test_sorting(filled: Segment) -> None:
    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("k")
        await lists(app, ["a", "b", "busy", "c"])
        await pilot.press("i")
        await lists(app, ["c", "busy", "b", "a"])
        await pilot.press("f")  # the share that is left
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("f")
        await lists(app, ["c", "b", "a", "busy"])
        await pilot.press("<", "<", "<")
        await sees(app, "▼denied/s")
        await pilot.press("right")
        await until(lambda: app.query_one(Table).sort == "admitted")
        await pilot.click(Table, offset=(1, 0))  # the head of the first column
        await lists(app, ["a", "b", "busy", "c"])

    driven(filled.name, body, size=(110, 24))


def test_filter(filled: Segment) -> None:
    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("/", *"BUS")
        await lists(app, ["busy"])
        await pilot.press("q")  # a letter of it, and no command
        await sees(app, "No match for 'BUSq'")
        await pilot.press("backspace", "enter")
        await sees(app, "/BUS")
        await pilot.press("escape")
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("/", *"[ab]", "enter")
        await lists(app, ["a", "b"])
        await pilot.press("/", "escape")
        await lists(app, ["busy", "a", "b", "c"])

    driven(filled.name, body)


def test_freeze(filled: Segment) -> None:
    limiter = RateLimiter(Limit(1000, 3600), name="wide", segment=filled)

    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("space")
        await sees(app, "FROZEN")
        limiter.acquire("new")
        await pilot.press("k")  # sorted anew, and of the same moment
        await lists(app, ["a", "b", "busy", "c"])
        await pilot.press("space")
        await lists(app, ["a", "b", "busy", "c", "new"])
        assert not any("FROZEN" in line for line in lines(app))

    driven(filled.name, body)


def test_reset_asks_first(filled: Segment) -> None:
    limiter = RateLimiter(Window(10, 3600), name="chat", segment=filled)

    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("x")
        await sees(app, "Forget what busy has consumed in limiter 'chat'?")
        await pilot.press("n")
        await until(lambda: len(app.screen_stack) == 1)
        assert not limiter.peek("busy")
        await pilot.press("x", "y")
        await sees(app, "Reset busy.")
        assert limiter.peek("busy").remaining == 10

    driven(filled.name, body)


def test_a_question_is_answered_once(filled: Segment) -> None:
    limiter = RateLimiter(Window(10, 3600), name="chat", segment=filled)

    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("x")
        await sees(app, "Forget what busy has consumed in limiter 'chat'?")
        for key in "nyq":  # typed faster than the box is closed
            app.post_message(events.Key(key, key))
        await until(lambda: len(app.screen_stack) == 1)
        assert not limiter.peek("busy")

    app = driven(filled.name, body)
    assert not app.return_code


def test_keys_that_look_alike_have_a_row_each(segment: Segment) -> None:
    limiter = ConcurrencyLimiter(2, name="gpu", segment=segment)
    held = [limiter.acquire("k" * 300 + last) for last in "abc"]

    async def body(pilot: Pilot[None], app: Top) -> None:
        await pilot.press("4")
        await until(lambda: len(listed(app)) == len(held) and listed(app)[0].startswith("kkk"))

    driven(segment.name, body)
    for permit in held:
        permit.release()


def test_why_there_is_nothing_is_told_in_full(segment_name: str) -> None:
    async def body(pilot: Pilot[None], app: Top) -> None:
        await sees(app, "there is no segment")
        await pilot.press("w")
        await until(lambda: len(app.screen_stack) == 2)
        box = app.screen.query_one(Static)
        assert "Waiting for one" in str(box.render())

    driven(segment_name, body)


def test_what_is_said_goes_with_the_next_key(filled: Segment) -> None:
    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        await pilot.press("x", "y")
        await sees(app, "Reset busy.")
        await pilot.press("space")
        await sees(app, "resume")

    driven(filled.name, body)


def test_reset_of_what_has_no_name(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100, names="hashed")
    RateLimiter(Window(5, 3600), name="t", segment=segment).acquire("secret")

    async def body(pilot: Pilot[None], app: Top) -> None:
        await until(lambda: len(listed(app)) == 1 and listed(app)[0].startswith("#"))
        await pilot.press("x")
        await sees(app, "its name is not kept")

    driven(segment_name, body)


def test_the_cursor_follows_its_key(filled: Segment) -> None:
    limiter = RateLimiter(Limit(1000, 3600), name="wide", segment=filled)

    async def body(pilot: Pilot[None], app: Top) -> None:
        await lists(app, ["busy", "a", "b", "c"])
        table = app.query_one(Table)
        await pilot.press("down", "down")
        assert table.position == (3, 4)
        for _ in range(50):
            limiter.acquire("b")
        await until(lambda: listed(app)[0] == "b")
        assert table.position == (1, 4)
        await pilot.press("end")
        assert table.position == (4, 4)
        await pilot.press("enter")
        await sees(app, "of limiter")
        await pilot.press("escape", "home")
        assert table.position == (1, 4)

    driven(filled.name, body)


NASTY = [
    "[bold]x[/bold]",
    "\x1b[2Jclear",
    "two\nlines",
    "\u202eevil",
    ":smile:",
    "日本語" * 20,
    "é\0",
]


@pytest.mark.parametrize("width", [80, 120])
def test_nasty_names(segment: Segment, width: int) -> None:
    limiter = RateLimiter(Limit(5, 3600), name="[red]\x1b[31m", segment=segment)
    for key in NASTY:
        limiter.acquire(key)

    async def body(pilot: Pilot[None], app: Top) -> None:
        await until(lambda: len(listed(app)) == len(NASTY))
        await pilot.press("k")
        for text in ("[bold]x[/bold]", "\\x1b[2Jclear", "two\\nlines", "\\u202eevil", ":smile:"):
            await sees(app, text)
        strips = app.screen._compositor.render_strips()
        assert {strip.cell_length for strip in strips} == {width}
        assert all(c.isprintable() for line in lines(app) for c in line)
        for _ in NASTY[: 2 if width == 80 else 0]:
            await pilot.press("x")
            await sees(app, "Forget what")
            await pilot.press("n", "enter")
            await sees(app, "of limiter")
            await pilot.press("escape", "down")

    driven(segment.name, body, size=(width, 24))


def test_sizes(filled: Segment) -> None:
    """None is too small to run in, and it follows a change."""

    async def body(pilot: Pilot[None], app: Top) -> None:
        for width, height in ((80, 24), (200, 60), (40, 12), (20, 5), (5, 2), (80, 24)):
            await pilot.resize_terminal(width, height)
            named = filled.name[: min(5, width)]

            def fits(named: str = named, width: int = width, height: int = height) -> bool:
                shown = app.screen._compositor.render_strips()
                return (
                    len(shown) == height
                    and lines(app)[0].startswith(named)
                    and all(strip.cell_length <= width for strip in shown)
                )

            await until(fits)
        await lists(app, ["busy", "a", "b", "c"])

    driven(filled.name, body)


def test_a_segment_that_comes_and_goes(segment_name: str) -> None:
    async def body(pilot: Pilot[None], app: Top) -> None:
        await sees(app, "waiting")
        await sees(app, "there is no segment")
        segment = Segment(segment_name, capacity=100)
        RateLimiter(Limit(5, 3600), name="t", segment=segment).acquire("first")
        await lists(app, ["first"])
        segment.remove()
        await sees(app, "! this segment was removed")
        await pilot.press("w")
        await sees(app, "Warnings")
        await pilot.press("escape")
        again = Segment(segment_name, capacity=200)
        RateLimiter(Limit(5, 3600), name="t", segment=again).acquire("second")
        await lists(app, ["second"])
        await sees(app, "new segment of that name")

    driven(segment_name, body)


def test_help_and_quit(filled: Segment) -> None:
    async def body(pilot: Pilot[None], app: Top) -> None:
        await pilot.press("?")
        await sees(app, "panes")
        await pilot.press("escape")
        await until(lambda: len(app.screen_stack) == 1)
        await pilot.press("q")

    assert driven(filled.name, body).return_code == 0
