"""The head of ``fast-shm top``: the segment, how full it is, its rates, workers and warnings."""

from __future__ import annotations

import textwrap
import time

from rich.cells import cell_len
from rich.text import Text

from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.sampler import Rate, Snapshot
from fast_litellm_shm.cli.top.columns import BAD, FAINT, GOOD, WARN
from fast_litellm_shm.cli.top.table import fitted

LINES = 6
_FULL, _NEARLY_FULL = 0.95, 0.8
_LEFT, _RIGHT = 47, 33  # columns of the bars, and of the workers beside them
_LABEL = 9


def _padded(text: Text, width: int) -> Text:
    """Cut or padded to a width."""
    text = text.copy()
    text.truncate(width, overflow="ellipsis", pad=True)
    return text


def occupancy_bar(occupancy: float, width: int) -> Text:
    """``[||||      12.2%]``; yellow from 80 %, red from 95 %."""
    share = f"{occupancy:.1%}"
    inner = max(width - 2, len(share))
    filled = min(round(occupancy * inner), inner)
    if occupancy > 0:
        filled = max(filled, 1)
    style = BAD if occupancy >= _FULL else WARN if occupancy >= _NEARLY_FULL else GOOD
    drawn = ("|" * filled).ljust(inner)
    bar = drawn[: inner - len(share)]
    return Text.assemble(("[", "bold"), (bar, style), (share, "bold"), ("]", "bold"))


def _rate_line(label: str, rate: Rate, style: str, width: int) -> Text:
    now = "-" if rate.now is None else render.compact(rate.now)
    bars = max(width - _LABEL - 9 - 1, 0)
    return Text.assemble(
        (f"{label:{_LABEL}}", FAINT),
        (f"{now:>6}", f"bold {style}" if rate.now else FAINT),
        ("/s ", FAINT),
        (render.sparkline(rate.history, bars), style),
    )


def _memo_line(snapshot: Snapshot) -> Text:
    """The token memo: the share of lookups that hit, now or (if none is known) ever."""
    memo = snapshot.memo
    label = (f"{'memo':{_LABEL}}", FAINT)
    if memo is None or memo.hit_rate_ever is None:
        return Text.assemble(label, ("     -", FAINT))
    share, when = memo.hit_rate, f" hit, {render.compact(memo.lookups.now or 0)}/s"
    if share is None:
        share, when = memo.hit_rate_ever, " hit since the start"
    return Text.assemble(label, f"{share:>6.1%}", (when, FAINT))


def _held_line(snapshot: Snapshot) -> Text:
    pooled = sum(row["active"] + row["idle"] for row in snapshot.pools)
    dead = sum(row["dead"] for row in snapshot.permits + snapshot.pools)
    out = Text.assemble(
        (f"{'held':{_LABEL}}", FAINT),
        f"{render.compact(snapshot.in_flight):>6}",
        (f" permit{'s' * (snapshot.in_flight != 1)}, ", FAINT),
        render.compact(pooled),
        (" pooled", FAINT),
    )
    if dead:
        out.append(f", {dead} of dead", style=BAD)
    if snapshot.waiting:
        verb = "waits" if snapshot.waiting == 1 else "wait"
        out.append(f", {render.compact(snapshot.waiting)} {verb}", style=WARN)
    return out


def _workers(snapshot: Snapshot, lines: int) -> list[Text]:
    """A head, and as many workers as fit; the last line says how many more there are."""
    workers = snapshot.workers
    head = Text(f"{'worker':>8} {'calls/s':>8} {'cpu':>5} {'memory':>9}", style="bold")
    room = lines - 1
    shown = workers if len(workers) <= room else workers[: room - 1]
    out = [head]
    for worker in shown:
        calls = "-" if worker.rate is None else render.compact(worker.rate)
        cpu = "-" if worker.cpu_percent is None else f"{worker.cpu_percent:.0f}%"
        memory = "?" if worker.memory_bytes is None else render.size(worker.memory_bytes)
        out.append(Text(f"{worker.pid:>8} {calls:>8} {cpu:>5} {memory:>9}"))
    if len(shown) < len(workers):
        out.append(Text(f"{'':8} and {len(workers) - len(shown)} more: press 2", style=FAINT))
    if not workers:
        out.append(Text("  no process uses it now", style=FAINT))
    return out


def _title(snapshot: Snapshot, frozen: bool, width: int) -> Text:
    clock = time.strftime("%H:%M:%S", time.localtime(snapshot.taken))
    state = Text.assemble(("● ", GOOD), "live")
    if snapshot.problem:
        state = Text.assemble(("○ ", WARN), ("waiting", WARN))
    if snapshot.stats and snapshot.stats["unlinked"]:
        state = Text.assemble(("● ", BAD), ("removed", BAD))
    if snapshot.stats and snapshot.stats["damaged"]:
        state = Text.assemble(("● ", BAD), ("damaged", BAD))
    if frozen:
        state = Text(" FROZEN ", style="black on yellow")
    left = Text.assemble((snapshot.name, "bold"), "  ", state)
    if snapshot.stats:
        age = render.brief(snapshot.stats["age_seconds"])
        count = len(snapshot.workers)
        left.append(f"  {count} worker{'s' * (count != 1)}  made {age} ago", style=FAINT)
    return Text.assemble(_padded(left, max(width - len(clock), 0)), (clock, FAINT))


def lines_of(snapshot: Snapshot, frozen: bool, width: int, lines: int = LINES) -> list[Text]:
    """The head in a number of lines and columns. On a narrow terminal it has no workers."""
    out = [_title(snapshot, frozen, width)]
    if snapshot.stats is None:
        return out
    beside = width >= _LEFT + _RIGHT
    left = max(width - _RIGHT - 2, _LEFT - 2) if beside else width
    stats = snapshot.stats
    used = Text(f" {render.compact(stats['used'])} of {render.compact(stats['capacity'])}")
    bar = occupancy_bar(stats["occupancy"], left - _LABEL - cell_len(used.plain))
    left_side = [
        Text.assemble((f"{'used':{_LABEL}}", FAINT), bar, (used.plain, FAINT)),
        _rate_line("admitted", snapshot.admitted, GOOD, left),
        _rate_line("denied", snapshot.denied, BAD, left),
        _memo_line(snapshot),
        _held_line(snapshot),
    ]
    left_side += [Text()] * (lines - 1 - len(left_side))
    if not beside:
        return out + left_side[: lines - 1]
    workers = _workers(snapshot, lines - 1)
    workers += [Text()] * (lines - 1 - len(workers))
    return out + [
        Text.assemble(_padded(line, left), "  ", worker)
        for line, worker in zip(left_side, workers, strict=False)
    ]


def tabs(titles: list[tuple[int, str, int]], chosen: int, width: int) -> Text:
    """The numbers and titles of the panes, with the numbers of their rows if those fit."""
    for counted in (True, False):
        out = Text()
        for number, title, count in titles:
            label = f" {title} {render.compact(count)} " if counted else f" {title} "
            out.append(f" {number}", style=FAINT)
            out.append(label, style="bold reverse" if number == chosen else "")
        if cell_len(out.plain) <= width:
            break
    return _padded(out, width)


def warning_lines(snapshot: Snapshot, width: int, most: int = 2) -> list[Text]:
    """The notice or the first warning, in at most ``most`` lines."""
    said = [(text, f"bold {WARN}") for text in snapshot.warnings]
    if snapshot.notice:
        said.insert(0, (snapshot.notice, f"bold {GOOD}"))
    if not said:
        return []
    text, style = said[0]
    more = f"  (+{len(said) - 1}: w)" if len(said) > 1 else ""
    rows = textwrap.wrap("! " + text + more, max(width, 1), break_on_hyphens=False)
    if len(rows) > most:
        rows = rows[:most]
        rows[-1] = rows[-1][: width - 8] + "...  (w)"
    return [
        Text("".join(s.text for s in fitted([(row, "")], width, False)), style=style)
        for row in rows
    ]
