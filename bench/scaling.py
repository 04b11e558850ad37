"""How far does one hot key scale? Two cores measured, up to 128 simulated.

``python -m bench.scaling build/line`` measures what a cache line costs on this machine
(``bench/line.c``), simulates one key that all cores check, prints the tables and draws
``docs/scaling.svg``. Without the program, what was measured before is used (``MEASURED``).

The simulation is of events: a core works, has the line of the key's cell brought to it, computes
and swaps. One core at a time has the line; it moves in the order of asking, one move after another,
and cores ask in a random order. A swap after the line has gone is lost, and tried again. What a
move costs on machines that are not here is published:
https://github.com/nviennot/core-to-core-latency (AMD EPYC 7R13, groups of 8 cores: 23 ns within a
group, 107 between groups, 197 between sockets).

Two bounds, since processors do not say how long they let a core keep a line that others wait for:
"kept", it goes on with its next check until the line is really gone; "taken", one check a move.
"""

from __future__ import annotations

import argparse
import heapq
import importlib
import itertools
import json
import math
import random
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

# ns, bench/line.c on two cores of a virtual machine: least of 31 rounds
MEASURED = {"check alone": 38.1, "check of two": 67.9, "one way": 45.9}
NEAR, FAR, SOCKET = 23.0, 107.0, 197.0  # ns a move, published; see above
GROUP, ONE_SOCKET = 8, 64  # cores
WINDOW = 1 / 3  # of a check lies between its load of the cell and its swap
CORES = (1, 2, 4, 8, 16, 32, 64, 128)
PARTS = (1, 4, 16)
PLOT = Path(__file__).parents[1] / "docs" / "scaling.svg"


def published(a: int, b: int) -> float:
    """ns for a line from core a to core b."""
    if a // ONE_SOCKET != b // ONE_SOCKET:
        return SOCKET
    return FAR if a // GROUP != b // GROUP else NEAR


def simulate(
    cores: range,
    move: Callable[[int, int], float],
    check: float,
    *,
    kept: bool,
    pause: Callable[[], float] = lambda: 0.0,
    checks: int = 200,
) -> tuple[float, float]:
    """Checks a second of all cores together, and mean ns a check; until the first core has done its
    ``checks``."""
    events: list[tuple[float, int, int, str, int]] = []  # (when, order, core, step, moves so far)
    order = itertools.count()
    begun = dict.fromkeys(cores, 0.0)
    left = dict.fromkeys(cores, checks)
    owner, moves, waiting, free_at, done, spent = cores[0], 0, 0, 0.0, 0, 0.0

    def at(when: float, core: int, step: str, seen: int = 0) -> None:
        heapq.heappush(events, (when, next(order), core, step, seen))

    for core in random.Random(1).sample(cores, len(cores)):  # not neighbour after neighbour
        at(pause() + check * next(order) / len(cores) / 2, core, "begin")
    last = owner  # to whom the line goes with the last move that was asked for
    while True:
        now, _, core, step, seen = heapq.heappop(events)
        if step == "begin":
            begun[core] = now
            at(now + check * (1 - WINDOW), core, "load")
        elif step == "load" and owner == core and (kept or not waiting):
            at(now + check * WINDOW, core, "swap", moves)
        elif step == "load":
            free_at = max(now, free_at) + (move(last, core) if last != core else 0.0)
            last, waiting = core, waiting + 1
            at(free_at, core, "here")
        elif step == "here":
            owner, moves, waiting = core, moves + 1, waiting - 1
            at(now + check * WINDOW, core, "swap", moves)
        elif seen != moves:  # the line went to another, who may have written it: once more
            at(now, core, "load")
        else:
            done, spent = done + 1, spent + now - begun[core]
            left[core] -= 1
            if not left[core]:
                return done / now * 1e9, spent / done
            at(now + pause(), core, "begin")


def saturated(
    count: int, move: Callable[[int, int], float], check: float, *, kept: bool, parts: int = 1
) -> float:
    """Checks a second where cores do nothing else. parts: of the key, each for a few neighbours."""
    parts = min(parts, count)
    edges = [i * count // parts for i in range(parts + 1)]
    return sum(
        simulate(range(a, b), move, check, kept=kept)[0] for a, b in itertools.pairwise(edges)
    )


def doubled(count: int, move: Callable[[int, int], float], check: float) -> float:
    """Checks a second of each core at which a check takes twice as long as one that only has to
    have the line moved; "taken"."""
    cores, rng = range(count), random.Random(count)
    usual = check + sum(move(0, other) for other in cores[1:]) / (count - 1)
    low, high = 1e3, 1e9 / check
    for _ in range(12):
        rate = math.sqrt(low * high)
        pause = partial(rng.expovariate, rate / 1e9)
        ns = simulate(cores, move, check, kept=False, pause=pause)[1]
        low, high = (low, rate) if ns > 2 * usual else (rate, high)
    return low


def measure(program: str) -> dict[str, float]:
    """The least of the rounds of bench/line.c, in ns."""
    out = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    found: dict[str, list[float]] = json.loads(out)
    for name, (least, median) in found.items():
        print(f"{name:40} {least:8.1f}  (median {median:.1f})")
    return {name: least for name, (least, _) in found.items()}


def draw(rows: dict[str, list[float]]) -> None:
    """Checks a second by cores, a band between the bounds for each number of parts."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(7.5, 4.5))
    for parts, colour in zip(PARTS, ("#c0392b", "#2e86c1", "#1e8449"), strict=True):
        low, high = rows[f"{parts} taken"], rows[f"{parts} kept"]
        label = "one key" if parts == 1 else f"the key in {parts} parts"
        axes.fill_between(CORES, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(CORES, low, color=colour, marker="o", markersize=4, label=label)
    axes.plot(
        CORES, [c * 20e3 for c in CORES], "k--", linewidth=1, label="20,000 requests/s a core"
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(CORES, [str(c) for c in CORES])
    axes.set_xlabel("cores that do nothing but check it (simulated; band: from taken to kept)")
    axes.set_ylabel("admitted checks a second, whole host")
    axes.set_title("One hot key: what all cores together can check")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(PLOT, metadata={"Date": None})
    print(f"drawn: {PLOT}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("program", nargs="?", help="bench/line.c, compiled (make build/line)")
    asked = parser.parse_args()
    costs = measure(asked.program) if asked.program else MEASURED
    check, here = costs["check alone"], costs["one way"]
    print("\ntwo cores, this machine: million checks a second, both together")
    print(f"  measured  {2e3 / costs['check of two']:.1f}   (one alone: {1e3 / check:.1f})")
    for kept in (True, False):
        rate = simulate(range(2), lambda a, b: here, check, kept=kept)[0]
        print(f"  simulated {rate / 1e6:.1f}   ({'kept' if kept else 'taken'})")
    rows = {
        f"{parts} {bound}": [
            saturated(count, published, check, kept=bound == "kept", parts=parts) for count in CORES
        ]
        for parts in PARTS
        for bound in ("taken", "kept")
    }
    print(
        "\npublished moves: million checks a second, taken to kept; and each core's rate at which"
    )
    print("a check takes twice as long (thousand a second)")
    print(
        f"{'cores':>6} "
        + " ".join(f"{f'{parts} part(s)':>16}" for parts in PARTS)
        + "   doubled at"
    )
    for i, count in enumerate(CORES):
        cells = [
            f"{rows[f'{p} taken'][i] / 1e6:6.1f} to {rows[f'{p} kept'][i] / 1e6:6.1f}"
            for p in PARTS
        ]
        least = doubled(count, published, check) if count > 1 else math.inf
        told = "never" if least > 0.9e9 / check else f"{least / 1e3:.0f}"
        print(f"{count:6} " + " ".join(cells) + f" {told:>12}")
    draw(rows)


if __name__ == "__main__":
    main()
