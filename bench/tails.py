"""How long do the slowest checks take, with a thread beside that computes without a pause?

Each check is timed by itself, 10,000 keys in turn, for some seconds in slices, one contender after
the other, each in a process of its own. The thread beside wants the interpreter all the time, and
gets it every 5 ms (CPython's switch interval): who gives the interpreter up within a check waits 5
ms to have it back. “A Python function that does nothing” shows what the clock and the interpreter
do by themselves.
"""

from __future__ import annotations

import random
import threading
import time
from array import array
from functools import partial

from bench import peers
from bench.apart import Apart
from bench.result import EMPTY_CALL, REFERENCE, Plot, Result, Row, Settings, Values, asked

KEYS = [f"user-{i}" for i in range(10_000)]
PARTS = (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1.0))


def _nothing(key: str) -> bool:
    return True


def _busy(stop: threading.Event) -> None:
    while not stop.is_set():
        sum(range(1000))


def _slice(call: peers.Call, seconds: float, beside: bool) -> tuple[list[float], int]:
    """The parts, in ns, of the checks of so long; and how many they were."""
    stop = threading.Event()
    thread = threading.Thread(target=_busy, args=(stop,), daemon=True)
    if beside:
        thread.start()
    clock, took, place = time.perf_counter_ns, array("q"), 0
    now = clock()
    end = now + int(seconds * 1e9)
    while now < end:
        key = KEYS[place]
        start = clock()
        call(key)
        now = clock()
        took.append(now - start)
        place = (place + 1) % len(KEYS)
    stop.set()
    if beside:
        thread.join()
    ordered = sorted(took)
    last = len(ordered) - 1
    return [ordered[min(int(part * len(ordered)), last)] for _, part in PARTS], len(ordered)


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    slices, seconds = settings.pick((settings.share(8), 0.3), (2, 0.05))
    with peers.Place() as place:
        openers, result.missing = peers.started(place, peers.contenders(), peers.HUGE, 1)
        openers[EMPTY_CALL] = lambda: _nothing
        children = {name: Apart(open_) for name, open_ in openers.items()}
        rng = random.Random(13)
        try:
            for beside in (False, True):
                group = "with a busy thread beside" if beside else "alone"
                work = partial(_slice, seconds=seconds, beside=beside)
                found: dict[str, list[tuple[list[float], int]]] = {name: [] for name in children}
                for _ in range(slices):
                    for name in rng.sample(list(children), len(children)):
                        found[name].append(children[name].do(work))
                for name, each in found.items():
                    result.rows += _rows(name, group, each)
        finally:
            for child in children.values():
                child.close()
    result.plots = [
        Plot(
            f"tails_{'busy' if 'busy' in group else 'alone'}",
            "parts",
            f"How long the slowest checks take, {group}",
            (group,),
            "microseconds a check",
            "|".join(part for part, _ in PARTS),
        )
        for group in ("alone", "with a busy thread beside")
    ]
    return result


def _rows(name: str, group: str, found: list[tuple[list[float], int]]) -> list[Row]:
    """A row for each part."""
    who = REFERENCE if name == EMPTY_CALL else peers.contender(name).who
    checks, rows = sum(count for _, count in found), []
    for i, (part, _) in enumerate(PARTS):
        values = Values(parts[i] / 1000 for parts, _ in found)
        notes: dict[str, str | float] = {"of the checks": part, "checks a pass": checks}
        notes["greatest slice, µs"] = max(values.values)
        rows.append(Row(name, "µs", values, who, group, i, notes))
    return rows
