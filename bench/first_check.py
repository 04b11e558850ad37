"""What does the first check of a key cost, that nobody has asked for before?

A fresh table in a fresh process for each round, that is filled with 100,000 keys: the mean of
these first checks, so that what growth costs now and then is in it. As many keys as the default
segment has room for in half.
"""

from __future__ import annotations

import random
import time
from functools import partial

from bench import peers
from bench.processes import Answer, in_processes
from bench.result import Plot, Result, Row, Settings, Values, asked, ratio

KEYS = 100_000
FEWER = 1_000  # of those that take tens of microseconds a check


def _fill(call: peers.Call, count: int) -> Answer:
    keys = [f"user-{i}" for i in range(count)]
    denied, start = 0, time.perf_counter_ns()
    for key in keys:
        if not call(key):
            denied += 1
    return count - denied, denied, start, time.perf_counter_ns()


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    listed = peers.contenders(keyed=True)
    took: dict[str, list[float]] = {each.name: [] for each in listed}
    denied = dict.fromkeys(took, 0)
    rng = random.Random(11)
    for _ in range(settings.pick(max(settings.rounds // 5, 2), 1)):
        with peers.Place() as place:
            for each in rng.sample(listed, len(listed)):
                try:
                    opener = each.start(place, 1_000, 3600.0)
                except peers.MissingError as error:
                    result.missing[each.name] = str(error)
                    continue
                count = FEWER if each.slow else settings.pick(KEYS, KEYS // 2)
                (_, refused, begun, ended), *_ = in_processes(
                    1, opener, [partial(_fill, count=count)]
                )
                took[each.name].append((ended - begun) / count)
                denied[each.name] += refused
    for each in listed:
        if took[each.name]:
            notes: dict[str, str | float] = {"denied": denied[each.name]}
            found = Values(took[each.name])
            result.rows.append(Row(each.name, "ns", found, each.who, "new key", notes=notes))
    result.ratios.append(
        ratio(
            result.rows,
            "fast-litellm",
            "ours",
            15.0,
            promise="first check of a new key",
            why="a place is claimed in two swaps, with a look at all candidates before and "
            "between, so that two processes can never count the same key apart",
        )
    )
    result.plots.append(
        Plot("first_check", "bars", "First check of a new key", ("new key",), "nanoseconds a check")
    )
    return result
