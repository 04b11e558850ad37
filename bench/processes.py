"""How many checks a second do 1 to 8 processes get together, and is the limit kept?

Hot key: all ask for one key. Many keys: each walks over 10,000. Throughput is measured where the
limit is never met, so every denial is a false one. Then exactness: a limit of 1,000 in a day, and
the processes ask 1,000 times each, 2,000 if there is but one; exactly 1,000 must be admitted.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from bench import peers
from bench.peers import HOT, HUGE, Call, Open
from bench.result import Plot, Ratio, Result, Row, Settings, Values, asked, ratio

COUNTS, QUICK_COUNTS = (1, 2, 4, 8), (1, 2, 8)
MANY = [f"user-{i}" for i in range(10_000)]
LIMIT, DAY = 1_000, 86_400.0
PATIENCE = 20.0  # seconds: only a hang comes near it
WAITS = "pyrate-limiter, SQLite, waiting"  # each denial takes it 50 ms: not asked for exactness
Answer = tuple[int, int, int, int]  # admitted, denied, begun and ended (ns of the system's clock)
Work = Callable[[Call], Answer]


def for_a_time(call: Call, keys: Sequence[str], seconds: float) -> Answer:
    """Ask for so long. The clock is read once for each 20 keys."""
    admitted = asked_for = place = 0
    begun = now = time.perf_counter_ns()
    end = begun + int(seconds * 1e9)
    while now < end:
        part = keys[place : place + 20]
        for key in part:
            if call(key):
                admitted += 1
        asked_for += len(part)
        place = (place + len(part)) % len(keys)
        now = time.perf_counter_ns()
    return admitted, asked_for - admitted, begun, now


def so_often(call: Call, key: str, times: int) -> Answer:
    """Ask so many times."""
    admitted = sum(1 for _ in range(times) if call(key))
    return admitted, times - admitted, 0, 0


def _child(out: Connection, barrier: Any, open_: Open, work: Work) -> None:
    call = open_()
    first = bool(call(HOT))  # connects, and imports what is imported late
    barrier.wait(PATIENCE)
    admitted, denied, begun, ended = work(call)
    out.send((admitted + first, denied + (not first), begun, ended))


def in_processes(count: int, open_: Open, work: Sequence[Work]) -> list[Answer]:
    """``work[i]`` in process i, forked, all at once from a barrier on; each asked once before."""
    context = multiprocessing.get_context("fork")
    barrier, children = context.Barrier(count), []
    for i in range(count):
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, barrier, open_, work[i]), daemon=True)
        child.start()
        theirs.close()
        children.append((child, mine))
    try:
        for _, mine in children:
            if not mine.poll(PATIENCE):
                raise TimeoutError(f"{count} at once did not answer within {PATIENCE:g} s")
        return [mine.recv() for _, mine in children]
    finally:
        for child, mine in children:
            child.join(1)
            if child.is_alive():
                child.kill()
                child.join()
            mine.close()


Run = Callable[[int, Open, Sequence[Work]], list[Answer]]


def throughput(
    settings: Settings,
    run_in: Run,
    openers: dict[str, Open],
    keyed: set[str],
    missing: dict[str, str],
    what: str,
) -> list[Row]:
    """Rows of checks a second, all contenders in turn in each round."""
    seconds, rounds = settings.pick(0.2, 0.05), settings.pick(max(1, settings.rounds // 12), 1)
    rng, rows = random.Random(9), []
    for pattern in ("hot key", "many keys"):
        taking_part = [name for name in openers if pattern == "hot key" or name in keyed]
        cells = [
            (name, count) for name in taking_part for count in settings.pick(COUNTS, QUICK_COUNTS)
        ]
        rates: dict[tuple[str, int], list[float]] = {cell: [] for cell in cells}
        denied = dict.fromkeys(cells, 0)
        calls = dict.fromkeys(cells, 0)
        for _ in range(rounds):
            for cell in rng.sample(cells, len(cells)):
                name, count = cell
                if name in missing:
                    continue
                begin = [len(MANY) * i // count for i in range(count)]
                keys = [[HOT] * 20] * count
                if pattern == "many keys":
                    keys = [MANY[at:] + MANY[:at] for at in begin]
                work = [partial(for_a_time, keys=own, seconds=seconds) for own in keys]
                try:
                    answers = run_in(count, openers[name], work)
                except (TimeoutError, EOFError) as error:
                    missing[name] = str(error) or "a process of it died"
                    continue
                admitted, refused, begun, ended = zip(*answers, strict=True)
                rates[cell].append(sum(admitted) * 1e9 / (max(ended) - min(begun)))
                denied[cell] += sum(refused)
                calls[cell] += sum(admitted) + sum(refused)
        for cell, values in rates.items():
            name, count = cell
            if not values:
                continue
            rows.append(
                Row(
                    name,
                    "admitted/s",
                    Values(values),
                    peers.contender(name).who,
                    pattern,
                    x=count,
                    notes={
                        what: count,
                        "false denials, %": 100 * denied[cell] / max(calls[cell], 1),
                    },
                )
            )
    return rows


def exactness(
    settings: Settings,
    place: peers.Place,
    run_in: Run,
    names: Sequence[str],
    missing: dict[str, str],
    what: str,
) -> list[Row]:
    """Rows of admitted calls where 1,000 are allowed. Each try is a new limiter."""
    rows = []
    for name in names:
        for count in settings.pick(COUNTS, QUICK_COUNTS):
            found = []
            for _ in range(0 if name in missing else settings.share(3)):
                opener = peers.contender(name).start(place, LIMIT, DAY)
                share = max(2 * LIMIT // count, LIMIT)
                work = [partial(so_often, key=HOT, times=share)] * count
                try:
                    found.append(sum(a for a, *_ in run_in(count, opener, work)))
                except (TimeoutError, EOFError) as error:
                    missing[name] = str(error) or "a process of it died"
                    break
            if not found:
                continue
            rows.append(
                Row(
                    name,
                    "admitted of 1,000 allowed",
                    Values(found),
                    peers.contender(name).who,
                    "exactness",
                    x=count,
                    notes={
                        what: count,
                        "exactly the limit": "yes" if set(found) == {LIMIT} else "NO",
                    },
                )
            )
    return rows


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    listed = [*peers.contenders(shared=True), peers.contender("fast-litellm")]
    with peers.Place() as place:
        shared, result.missing = peers.started(place, listed, HUGE, 1)
        exact = [name for name in shared if name != WAITS]
        shared.pop("fast-litellm", None)  # shares nothing: it is here for what that admits
        keyed = {name for name in shared if peers.contender(name).keyed}
        result.rows = throughput(settings, in_processes, shared, keyed, result.missing, "processes")
        result.rows += exactness(settings, place, in_processes, exact, result.missing, "processes")
    promise = "two processes, one hot key, admitted/s"
    two = [row for row in result.rows if row.group == "hot key" and row.x == 2]
    result.ratios = [
        ratio(two, "ours", peer, target, promise=promise, name=f"ours / {peer}")
        for peer, target in (
            ("LMDB, read-modify-write", 10.0),
            ("limits, Redis, fixed window", 200.0),
        )
    ]
    ours = [row for row in result.rows if row.who == "ours"]
    denials = [float(r.notes["false denials, %"]) for r in ours if r.group != "exactness"]
    off = [abs(v - LIMIT) for r in ours if r.group == "exactness" for v in r.found.values]
    result.ratios += [
        Ratio(name, Values([max(found)]), 0, False, unit, promise, worst=True)
        for name, found, unit in (
            ("false denials of ours, at any number", denials, "% of calls"),
            ("admitted beside the limit of 1,000, ours", off, "calls"),
        )
    ]
    result.plots = [
        Plot(
            f"processes_{group.replace(' ', '_')}",
            "lines",
            f"Checks a second of all processes together, {group}",
            (group,),
            "admitted a second",
            "processes",
            better="more is better",
        )
        for group in ("hot key", "many keys")
    ]
    result.plots.append(
        Plot(
            "processes_exactness",
            "lines",
            "Admitted of 1,000 allowed, by number of processes",
            ("exactness",),
            "admitted",
            "processes",
            better="1,000 is right",
        )
    )
    return result
