"""Draws the pictures of docs/algorithms.md and of the landing page: docs/pictures/*.svg.

    python scripts/pictures.py [FOLDER]

What a picture shows of a limit is what this package did: each request is made, in a segment whose
clock the script moves. So the same code draws the same files; tests/packaging/test_pictures.py
compares them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

from fast_litellm_shm import (
    Budget,
    ConcurrencyLimiter,
    FixedWindow,
    RateLimiter,
    SlidingWindow,
    TokenBucket,
)
from fast_litellm_shm.testing import Clock, isolated

FOLDER = Path(__file__).parents[1] / "docs" / "pictures"
OURS, INK, GREY, PALE, LINE = "#d1480a", "#222222", "#6b7a8f", "#f3e1d6", "#c9ced6"
FONT = "font-family='system-ui, Helvetica, Arial, sans-serif'"


class Picture:
    """An SVG on a white card, which a dark page can have too."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.size, self.title = (width, height), title
        self.parts: list[str] = []

    def add(self, name: str, text: str = "", **attributes: object) -> None:
        given = " ".join(
            f"{key.rstrip('_').replace('_', '-')}='{value:g}'"
            if isinstance(value, float)
            else f"{key.rstrip('_').replace('_', '-')}='{value}'"
            for key, value in attributes.items()
        )
        self.parts.append(f"<{name} {given}>{text}</{name}>" if text else f"<{name} {given}/>")

    def text(
        self, x: float, y: float, text: str, *, size: int = 13, colour: str = INK,
        anchor: str = "start", weight: str = "normal",
    ) -> None:  # fmt: skip
        self.add(
            "text", text, x=x, y=y, font_size=size, fill=colour, text_anchor=anchor,
            font_weight=weight,
        )  # fmt: skip

    def line(
        self, *points: tuple[float, float], colour: str = GREY, width: float = 1, dash: str = "none"
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.add(
            "polyline", points=path, fill="none", stroke=colour, stroke_width=width,
            stroke_dasharray=dash,
        )  # fmt: skip

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none"
    ) -> None:
        self.add("rect", x=x, y=y, width=width, height=height, rx=4, fill=fill, stroke=stroke)

    def dot(self, x: float, y: float, admitted: bool) -> None:
        fill, stroke = (OURS, OURS) if admitted else ("white", GREY)
        self.add(
            "circle",
            cx=round(x, 1),
            cy=round(y, 1),
            r=4,
            fill=fill,
            stroke=stroke,
            stroke_width=1.5,
        )

    def __str__(self) -> str:
        width, height = self.size
        return (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
            f"width='{width}' height='{height}' role='img' aria-label='{self.title}' {FONT}>\n"
            f"<title>{self.title}</title>\n"
            f"<rect width='{width}' height='{height}' rx='8' fill='white'/>\n"
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


class Axes:
    """Time to the right, a number upwards; below it the requests, each a dot."""

    LEFT, RIGHT, TOP, BOTTOM = 60, 700, 44, 170

    def __init__(self, title: str, seconds: float, most: float, what: str, unit: str = "s") -> None:
        self.picture = Picture(720, 250, title)
        self.seconds, self.most, self.unit = seconds, most, unit
        self.picture.text(self.LEFT, 24, title, size=14, weight="bold")
        self.picture.text(self.LEFT, 39, what, size=11, colour=GREY)
        for number in range(int(most) + 1):
            if most <= 6 or number % 2 == 0:
                self.picture.line(
                    (self.LEFT, self.y(number)), (self.RIGHT, self.y(number)), colour="#eceef1"
                )
                self.picture.text(
                    self.LEFT - 8,
                    self.y(number) + 4,
                    str(number),
                    size=11,
                    colour=GREY,
                    anchor="end",
                )
        for at in range(0, int(seconds) + 1, 5 if unit == "s" else 6):
            self.picture.text(
                self.x(at),
                224,
                f"{at} {unit}" if at else "0",
                size=11,
                colour=GREY,
                anchor="middle",
            )
        self.picture.line((self.LEFT, 208), (self.RIGHT, 208), colour=LINE)
        legend = self.picture
        legend.dot(self.LEFT + 4, 240, True)
        legend.text(self.LEFT + 14, 244, "admitted", size=11)
        legend.dot(self.LEFT + 84, 240, False)
        legend.text(self.LEFT + 94, 244, "denied", size=11)

    def x(self, seconds: float) -> float:
        return self.LEFT + (self.RIGHT - self.LEFT) * seconds / self.seconds

    def y(self, number: float) -> float:
        return self.BOTTOM - (self.BOTTOM - self.TOP - 10) * number / self.most

    def curve(self, points: list[tuple[float, float]]) -> None:
        path = [(self.x(t), self.y(n)) for t, n in points]
        area = " ".join(
            f"{x:.1f},{y:.1f}"
            for x, y in [(path[0][0], self.y(0)), *path, (path[-1][0], self.y(0))]
        )
        self.picture.add("polygon", points=area, fill=PALE)
        self.picture.line(*path, colour=OURS, width=2)

    def edge(self, seconds: float, text: str) -> None:
        self.picture.line((self.x(seconds), 50), (self.x(seconds), 208), colour=GREY, dash="4 3")
        self.picture.text(self.x(seconds) + 4, 60, text, size=11, colour=GREY)

    def requests(self, outcomes: list[tuple[float, bool]]) -> None:
        for at, admitted in outcomes:
            self.picture.dot(self.x(at), 190, admitted)


# Seconds: a burst before an edge of the windows, one after it, and then a steady stream. None is an
# instant at which a token comes back: a nanosecond would decide.
BURSTS = [
    0.0,
    *(7.5 + 0.41 * i for i in range(6)),
    *(10.2 + 0.41 * i for i in range(6)),
    *(15.1 + 0.75 * i for i in range(14)),
]


def play(
    limiter: RateLimiter, clock: Clock, times: list[float], until: float
) -> tuple[list[tuple[float, bool]], list[tuple[float, float]]]:
    """Each request, with whether it was admitted; and what was left all along, tenth by tenth."""
    # Sliding windows begin at multiples of their period since the segment was made: so do these
    # requests, and 1 ms later, however long it took until the clock stood still.
    clock.advance(10 * (clock.seconds // 10 + 1) + 0.001 - clock.seconds)
    begun = clock.seconds
    outcomes: list[tuple[float, bool]] = []
    left: list[tuple[float, float]] = []
    for at in sorted({*times, *(i / 10 + 0.0005 for i in range(round(until * 10)))}):
        clock.advance(max(0.0, at - (clock.seconds - begun)))
        for call in range(1 + (at in times)):
            if call:
                outcomes.append((at, limiter.acquire("user-1").allowed))
            number = float(limiter.peek("user-1").remaining)
            if not left or number != left[-1][1]:
                left += [(at, left[-1][1] if left else number), (at, number)]
    left.append((until, left[-1][1]))
    return outcomes, left


def windows(
    limit: FixedWindow | SlidingWindow | TokenBucket, title: str, what: str, edges: bool
) -> Picture:
    with isolated(frozen=True) as test:
        outcomes, left = play(RateLimiter(limit, name="picture"), test.clock, BURSTS, 25)
    axes = Axes(title, 25, 5, what)
    axes.curve(left)
    if edges:
        axes.edge(10, "next window")
        axes.edge(20, "next window")
    axes.requests(outcomes)
    close = sum(admitted for at, admitted in outcomes if 7.4 <= at <= 12.4)
    axes.picture.text(700, 244, f"{close} admitted in the 5 s around 10 s", size=11, anchor="end")
    return axes.picture


def token_bucket() -> Picture:
    return windows(
        TokenBucket(5, per=10), "TokenBucket(5, per=10)",
        "tokens left: one comes back every 2 s, and each admitted request takes one", False,
    )  # fmt: skip


def fixed_window() -> Picture:
    return windows(
        FixedWindow(5, per=10), "FixedWindow(5, per=10)",
        "requests left in this window: all 5 come back at its end", True,
    )  # fmt: skip


def sliding_window() -> Picture:
    return windows(
        SlidingWindow(5, per=10), "SlidingWindow(5, per=10)",
        "requests left: what the previous window had counts less and less", False,
    )  # fmt: skip


def concurrency() -> Picture:
    limiter_of = "ConcurrencyLimiter(2)"
    calls = [
        (0.0, 6.0),
        (1.5, 4.0),
        (3.0, 3.0),
        (5.5, 8.0),
        (6.5, 2.0),
        (7.5, 3.5),
        (9.5, 4.0),
        (15.0, 3.0),
    ]
    picture = Picture(720, 290, f"{limiter_of}: calls in flight")
    picture.text(60, 24, limiter_of, size=14, weight="bold")
    picture.text(
        60, 39, "a call holds a permit until it ends, however long that takes", size=11, colour=GREY
    )

    def x(seconds: float) -> float:
        return 60 + 640 * seconds / 20

    with isolated(frozen=True):
        limiter = ConcurrencyLimiter(2, name="picture")
        held: list[tuple[float, object]] = []
        for row, (begin, length) in enumerate(calls):
            for end, permit in sorted(held, key=lambda each: each[0]):
                if end <= begin:
                    permit.release()  # type: ignore[attr-defined]
                    held.remove((end, permit))
            permit = limiter.acquire("model")
            y = 54 + 24 * row
            if permit:
                held.append((begin + length, permit))
                picture.box(x(begin), y, x(begin + length) - x(begin), 16, OURS)
                picture.text(
                    x(begin) + 6,
                    y + 12,
                    f"{limiter.in_flight('model')} in flight",
                    size=11,
                    colour="white",
                )
            else:
                picture.box(x(begin), y, 10, 16, "white", GREY)
                picture.text(x(begin) + 16, y + 12, "denied: 2 are in flight", size=11, colour=GREY)
    for at in range(0, 21, 5):
        picture.text(x(at), 268, f"{at} s" if at else "0", size=11, colour=GREY, anchor="middle")
    picture.line((60, 252), (700, 252), colour=LINE)
    return picture


def budget() -> Picture:
    """Two days, a call every two hours: each reserves 1.50 dollars and costs less."""
    axes = Axes(
        'Budget(usd=6, per="day")',
        48,
        6,
        "dollars spent, and what calls that run have reserved (dashed)",
        "h",
    )
    first, spent, reserved, outcomes = datetime(2026, 3, 2), [(0.0, 0.0)], [], []
    with isolated(frozen=True) as test:
        test.clock.move_to(first)
        limiter = Budget(usd=6, per="day", name="picture")
        for hour, cost in zip(range(2, 48, 2), [0.6, 1.1, 0.9, 1.2, 0.8] * 5, strict=False):
            if hour == 24:
                spent += [(24.0, spent[-1][1]), (24.0, 0.0)]
            test.clock.move_to(first + timedelta(hours=hour))
            call = limiter.reserve("team-a", usd=1.5)
            outcomes.append((float(hour), bool(call)))
            before = float(limiter.spent("team-a"))
            spent.append((float(hour), before))
            if call:
                reserved.append((float(hour), before))
                test.clock.move_to(first + timedelta(hours=hour + 1))
                call.settle(cost)
                spent += [(hour + 1.0, before), (hour + 1.0, float(limiter.spent("team-a")))]
    spent.append((48.0, spent[-1][1]))
    axes.curve(spent)
    for hour_of, before in reserved:
        top = axes.y(before + 1.5)
        axes.picture.add(
            "rect", x=round(axes.x(hour_of), 1), y=round(top, 1),
            width=round(axes.x(1) - axes.x(0), 1), height=round(axes.y(before) - top, 1),
            fill="none", stroke=OURS, stroke_dasharray="3 2",
        )  # fmt: skip
    axes.edge(24, "midnight, in the budget's time zone")
    axes.requests(outcomes)
    return axes.picture


def workers() -> Picture:
    """The problem, and what this package does about it."""
    picture = Picture(
        720,
        330,
        "Four workers with a limit of 100 each admit 400; with one shared limit they admit 100",
    )
    for left, title, colour, total, said in (
        (20, "A limit in each worker", GREY, "400 a minute", "four times what you set"),
        (375, "One limit in shared memory", OURS, "100 a minute", "exactly what you set"),
    ):
        shared = colour == OURS
        picture.text(left + 162, 30, title, size=16, weight="bold", anchor="middle")
        for number in range(4):
            x = left + 82 * number
            picture.box(x, 50, 74, 96, "#f6f7f9", LINE)
            picture.text(x + 37, 72, f"worker {number + 1}", size=12, anchor="middle")
            if not shared:
                picture.box(x + 8, 86, 58, 48, "#e4e7ec")
                picture.text(x + 37, 108, "limit", size=11, anchor="middle")
                picture.text(x + 37, 125, "100", size=15, weight="bold", anchor="middle")
                picture.line((x + 37, 146), (x + 37, 236), colour=GREY, width=1.5)
            else:
                picture.line((x + 37, 100), (x + 37, 176), colour=OURS, width=1.5)
        if shared:
            picture.box(left, 176, 320, 48, OURS)
            picture.text(
                left + 162, 197, "limit, in shared memory", size=12, colour="white", anchor="middle"
            )
            picture.text(
                left + 162, 216, "100", size=15, colour="white", weight="bold", anchor="middle"
            )
            picture.line((left + 162, 224), (left + 162, 250), colour=OURS, width=1.5)
        else:
            picture.line((left + 37, 236), (left + 283, 236), colour=GREY, width=1.5)
            picture.line((left + 162, 236), (left + 162, 250), colour=GREY, width=1.5)
        picture.text(left + 162, 278, total, size=24, colour=colour, weight="bold", anchor="middle")
        picture.text(left + 162, 302, said, size=13, colour=INK, anchor="middle")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "workers": workers,
    "token_bucket": token_bucket,
    "fixed_window": fixed_window,
    "sliding_window": sliding_window,
    "concurrency": concurrency,
    "budget": budget,
}


def draw(folder: Path) -> None:
    """Write all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in PICTURES.items():
        (folder / f"{name}.svg").write_text(str(picture()), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    draw(parser.parse_args().folder)
