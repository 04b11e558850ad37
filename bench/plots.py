"""Pictures of results: ours in one colour, peers in greys, references dashed; SVG and PNG."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from bench.result import OURS, REFERENCE, Plot, Result, Row, number

ACCENT, INK, REFERENCE_GREY = "#d1480a", "#222222", "#6b7a8f"
GREYS = ("#4d4d4d", "#8c8c8c", "#6e6e6e", "#a6a6a6", "#5e5e5e", "#999999")
MARKERS = "sD^vPX<>h*"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": INK,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "svg.fonttype": "none",
    "svg.hashsalt": "fast-litellm-shm",  # the same picture is the same file
}


def _colour(who: str, index: int = 0) -> str:
    if who == OURS:
        return ACCENT
    return REFERENCE_GREY if who == REFERENCE else GREYS[index % len(GREYS)]


def _plain(value: float, _: Any = None) -> str:
    """A tick's label: 10 k, 2 M."""
    for unit, name in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _frame(figure: Any, plot: Plot, *, left: float, right: float) -> None:
    """Title above, room for the labels around: in inches, whatever the height."""
    height = figure.get_figheight()
    figure.subplots_adjust(left=left, right=right, top=1 - 0.78 / height, bottom=0.58 / height)
    figure.text(0.02, 1 - 0.22 / height, plot.title, size=13, weight="bold", color=INK, va="top")
    figure.text(0.02, 1 - 0.5 / height, plot.better, size=9.5, color="#777777", va="top")


def _bars(plot: Plot, rows: list[Row]) -> Any:
    """One bar for each row, the best first in each group, its value at its end."""
    lines: list[Row | str] = []
    for group in plot.groups:
        in_group = sorted((r for r in rows if r.group == group), key=lambda r: r.found.median)
        if plot.better.startswith("more"):
            in_group.reverse()
        if in_group:
            lines += [group, *in_group] if len(plot.groups) > 1 else in_group
    figure, axes = plt.subplots(figsize=(9, 1.35 + 0.29 * len(lines)))
    values = [row.found for row in rows]
    low = min(value.low for value in values)
    floor = 10 ** math.floor(math.log10(low) - 0.15) if plot.log_value and low > 0 else 0.0
    top = max(value.high for value in values)
    for place, line in enumerate(lines):
        if isinstance(line, str):
            axes.text(
                0, place, line, transform=axes.get_yaxis_transform(), weight="bold", size=9.5,
                color="#444444", va="center", ha="left",
            )  # fmt: skip
            continue
        found, colour = line.found, _colour(line.who)
        width = found.median - floor
        alpha = 0.55 if line.who == REFERENCE else 1.0
        if line.who not in (OURS, REFERENCE):
            colour = "#b0b0b0"
        axes.barh(place, width, left=floor, height=0.68, color=colour, alpha=alpha)
        axes.plot([found.low, found.high], [place, place], color=INK, lw=1.1, solid_capstyle="butt")
        axes.annotate(
            number(found.median),
            (max(found.high, found.median), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            size=9,
            color=INK,
            weight="bold" if line.who == OURS else "normal",
        )
    axes.set_yticks([i for i, line in enumerate(lines) if not isinstance(line, str)])
    axes.set_yticklabels([line.name for line in lines if not isinstance(line, str)])
    for label, line in zip(
        axes.get_yticklabels(), (ln for ln in lines if not isinstance(ln, str)), strict=True
    ):
        if line.who == OURS:
            label.set_color(ACCENT)
            label.set_fontweight("bold")
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if plot.log_value:
        axes.set_xscale("log")
        axes.set_xlim(floor, top * (top / floor) ** 0.12)
        axes.xaxis.set_major_locator(LogLocator(numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, top * 1.13)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(plot.value + (", logarithmic" if plot.log_value else ""))
    _frame(figure, plot, left=0.36, right=0.96)
    return figure


def _spaced(wanted: list[float], least: float) -> list[float]:
    """The places nearest to the wanted ones, in their order, that are so far apart."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [wanted[i] for i in order]
    for _ in range(200):
        moved = False
        for i in range(len(placed) - 1):
            short = least - (placed[i + 1] - placed[i])
            if short > 1e-6:
                placed[i], placed[i + 1] = placed[i] - short / 2, placed[i + 1] + short / 2
                moved = True
        if not moved:
            break
    out = [0.0] * len(wanted)
    for i, place in zip(order, placed, strict=True):
        out[i] = place
    return out


def _lines(plot: Plot, rows: list[Row]) -> Any:
    """One line for each contender, named at its end; its spread as a band."""
    names = list(dict.fromkeys(row.name for row in rows))
    names.sort(key=lambda name: name == OURS)  # ours last: on top
    figure, axes = plt.subplots(figsize=(9, max(4.6, 1.6 + 0.3 * len(names))))
    ends, peer = [], 0
    for name in names:
        own = sorted((r for r in rows if r.name == name), key=lambda r: r.x or 0.0)
        who = own[0].who
        colour = _colour(who, peer)
        marker = "o" if who == OURS else "." if who == REFERENCE else MARKERS[peer % len(MARKERS)]
        peer += who not in (OURS, REFERENCE)
        x, y = [row.x or 0.0 for row in own], [row.found.median for row in own]
        axes.fill_between(
            x,
            [row.found.low for row in own],
            [row.found.high for row in own],
            color=colour,
            alpha=0.13,
            lw=0,
        )
        axes.plot(
            x,
            y,
            color=colour,
            marker=marker,
            ms=6 if who == OURS else 5,
            lw=2.6 if who == OURS else 1.3,
            ls="--" if who == REFERENCE else "-",
            zorder=5 if who == OURS else 3,
        )
        ends.append((name, who, colour, x[-1], y[-1]))
    if plot.log_value:
        if min(row.found.low for row in rows) > 0:
            axes.set_yscale("log")
        else:  # somebody admitted nobody: the axis begins at 0, and is logarithmic from 1 on
            axes.set_yscale("symlog", linthresh=1, linscale=0.4)
            axes.set_ylim(bottom=0)
        low, high = axes.get_ylim()
        if axes.get_yscale() == "symlog":
            axes.yaxis.set_major_locator(FixedLocator([0, *(10.0**i for i in range(9))]))
        else:
            subs = (1, 2, 5) if high / low < 200 else (1,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    ticks = sorted({row.x or 0.0 for row in rows})
    axes.set_xscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [_plain(tick) for tick in ticks])
    axes.set_xlabel(plot.x + ", logarithmic")
    axes.set_ylabel(plot.value + (", logarithmic" if plot.log_value else ""))
    axes.grid(axis="y", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    _frame(figure, plot, left=0.1, right=0.7)
    _name_ends(axes, ends)
    return figure


def _name_ends(axes: Any, ends: list[tuple[str, str, str, float, float]]) -> None:
    """Names at the right, where lines end, moved apart where they would overlap."""
    figure = axes.figure
    figure.canvas.draw()
    to_axes = axes.transAxes.inverted()
    heights = [to_axes.transform(axes.transData.transform((x, y)))[1] for *_, x, y in ends]
    inches = axes.get_position().height * figure.get_figheight()
    for (name, who, colour, x, y), place in zip(
        ends, _spaced(heights, 0.175 / inches), strict=True
    ):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.035, place),
            textcoords="axes fraction",
            va="center",
            size=9,
            color=colour,
            weight="bold" if who == OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.7}
            | {"shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)},
            annotation_clip=False,
        )


def _parts(plot: Plot, rows: list[Row]) -> Any:
    """A line for each contender from its first part to its last, a mark at each: p50 to max."""
    parts = plot.x.split("|")
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row.name, []).append(row)
    # By the last part but one: the greatest of all is mostly the machine's.
    names = sorted(by_name, key=lambda name: by_name[name][-2].found.median)
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.3 * len(names)))
    for place, name in enumerate(names):
        own = by_name[name]
        colour = _colour(own[0].who, 1)
        values = [row.found.median for row in own]
        axes.plot(values, [place] * len(values), color=colour, lw=1.6, alpha=0.6, zorder=2)
        for value, marker in zip(values, "o|sD", strict=True):
            axes.plot(
                value,
                place,
                marker=marker,
                color=colour,
                ms=10 if marker == "|" else 6,
                mew=2,
                mfc="white" if marker == "D" else colour,
                zorder=3,
            )
    for part, marker in zip(parts, "o|sD", strict=True):
        axes.plot(
            [],
            [],
            ls="",
            marker=marker,
            color="#777777",
            ms=10 if marker == "|" else 6,
            mew=2,
            mfc="white" if marker == "D" else "#777777",
            label=part,
        )
    axes.set_yticks(range(len(names)), names)
    for label, name in zip(axes.get_yticklabels(), names, strict=True):
        if by_name[name][0].who == OURS:
            label.set_color(ACCENT)
            label.set_fontweight("bold")
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="x", color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(plot.value + ", logarithmic")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1.0),
        ncols=len(parts),
        frameon=False,
        fontsize=9,
        handletextpad=0.2,
        borderpad=0,
    )
    _frame(figure, plot, left=0.36, right=0.96)
    return figure


_DRAWN = {"bars": _bars, "lines": _lines, "parts": _parts}


def draw(results: dict[str, Result], folder: pathlib.Path) -> dict[str, list[str]]:
    """Draws what has rows; returns the names of the pictures, by question."""
    drawn: dict[str, list[str]] = {}
    with plt.rc_context(STYLE):
        for name, result in results.items():
            for plot in result.plots:
                rows = [row for row in result.rows if row.group in plot.groups]
                if not rows:
                    continue
                folder.mkdir(parents=True, exist_ok=True)
                figure = _DRAWN[plot.kind](plot, rows)
                for kind in ("svg", "png"):
                    metadata = {"Date": None} if kind == "svg" else None
                    figure.savefig(folder / f"{plot.name}.{kind}", dpi=130, metadata=metadata)
                plt.close(figure)
                drawn.setdefault(name, []).append(plot.name)
    return drawn
