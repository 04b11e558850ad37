"""How many checks a second do 1 to 8 threads of one process get together, and is the limit kept?

As for processes, without those that take tens of microseconds a check. Threads share the
interpreter's lock, so nobody can gain from them: what is seen is what is lost. Then ours on a
Python without that lock, which `make test-free-threaded` installs: one limiter, and a bound method
for each thread.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import threading
from collections.abc import Sequence

from bench import peers
from bench.peers import HOT, HUGE, Open
from bench.processes import Answer, Work, exactness, throughput
from bench.result import Plot, Ratio, Result, Row, Settings, Values, asked

PATIENCE = 60.0
ROOT = pathlib.Path(__file__).resolve().parents[1]
FREE_THREADED = ROOT / ".venv-free-threaded/bin/python"
WITHOUT, OWN, AIM = "without the GIL: ", "is_allowed, own keys", 1.7


def in_threads(count: int, open_: Open, work: Sequence[Work]) -> list[Answer]:
    """``work[i]`` in thread i, all at once from a barrier on, on one limiter."""
    call, barrier = open_(), threading.Barrier(count)
    first = bool(call(HOT))
    answers: list[Answer] = []

    def body(own: Work) -> None:
        barrier.wait(PATIENCE)
        answers.append(own(call))

    threads = [threading.Thread(target=body, args=(own,), daemon=True) for own in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    if len(answers) != count:
        raise TimeoutError(f"a thread did not answer within {PATIENCE:g} s")
    admitted, denied, begun, ended = answers[0]
    return [(admitted + first, denied + (not first), begun, ended), *answers[1:]]


def without_gil(settings: Settings, result: Result) -> None:
    """Add the rows of ours on a free-threaded Python."""
    name = "two threads without the GIL / one, own keys"
    if not FREE_THREADED.exists():
        why = "there is no free-threaded Python here: make test-free-threaded installs it"
        result.missing["ours, without the GIL"] = why
        result.ratios.append(Ratio(name, None, AIM, promise=name, missing=why))
        return
    program = [str(FREE_THREADED), "-m", "bench.no_gil"]
    sizes = [str(settings.pick(0.1, 0.03)), str(settings.pick(settings.rounds, 5))]
    done = subprocess.run(
        [*program, *sizes],
        cwd=ROOT,
        env={**os.environ, "PYTHON_GIL": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    rates = json.loads(done.stdout)["rates"]
    result.rows += [
        Row(
            "ours",
            "admitted/s",
            Values(values),
            group=WITHOUT + pattern,
            x=int(count),
            notes={"threads": int(count)},
        )
        for pattern, by_count in rates.items()
        for count, values in by_count.items()
    ]
    one, two = rates[OWN]["1"], rates[OWN]["2"]
    gained = Values(b / a for a, b in zip(one, two, strict=True))
    result.ratios.append(Ratio(name, gained, AIM, promise=name))


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    with peers.Place() as place:
        openers, result.missing = peers.started(place, peers.contenders(slow=False), HUGE, 1)
        # fast-litellm keeps its rate for one key only, and denies others.
        keyed = {n for n in openers if peers.contender(n).keyed and n != "fast-litellm"}
        result.rows = throughput(settings, in_threads, openers, keyed, result.missing, "threads")
        result.rows += exactness(
            settings, place, in_threads, list(openers), result.missing, "threads"
        )
    without_gil(settings, result)
    result.plots = [
        Plot(
            f"threads_{group.replace(' ', '_')}",
            "lines",
            f"Checks a second of all threads of one process, {group}",
            (group,),
            "admitted a second",
            "threads",
            better="more is better",
        )
        for group in ("hot key", "many keys")
    ]
    return result
