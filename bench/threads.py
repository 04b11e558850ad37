"""How many checks a second do 1 to 8 threads of one process get together, and is the limit kept?

As for processes, without those that take tens of microseconds a check. Threads share the
interpreter's lock, so nobody can gain from them: what is seen is what is lost.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from bench import peers
from bench.peers import HOT, HUGE, Open
from bench.processes import Answer, Work, exactness, throughput
from bench.result import Plot, Result, Settings, asked

PATIENCE = 60.0


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
