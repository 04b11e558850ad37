"""Each contender in a process of its own: the threads of one take no time from another."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from bench.peers import Call, Open
from bench.result import Settings, Values
from bench.timing import QUICK_SLICE_NS, SLICE_NS, calls_in, loop_of

PATIENCE = 30.0  # seconds for one answer: only a hang comes near it

Work = Callable[[Call], Any]


def _child(given: Connection, open_: Open) -> None:
    call = open_()
    while (work := given.recv()) is not None:
        given.send(work(call))


class Apart:
    """A forked process with a contender in it. Works for one question at a time."""

    def __init__(self, open_: Open) -> None:
        context = multiprocessing.get_context("fork")
        self._end, theirs = context.Pipe()
        self._process = context.Process(target=_child, args=(theirs, open_), daemon=True)
        self._process.start()
        theirs.close()

    def do(self, work: Work) -> Any:
        """``work(call)``, in there."""
        self._end.send(work)
        if not self._end.poll(PATIENCE):
            raise TimeoutError(f"did not answer within {PATIENCE:g} s")
        return self._end.recv()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        self._end.close()


def _calibrate(call: Call, keys: Sequence[str], slice_ns: int) -> int:
    return calls_in(loop_of(call, keys), slice_ns)


def _time(call: Call, keys: Sequence[str], calls: int) -> float:
    loop = loop_of(call, keys)
    start = time.perf_counter_ns()
    loop(calls)
    return (time.perf_counter_ns() - start) / calls


def interleaved_apart(
    openers: Mapping[str, Open], keys: Sequence[str], settings: Settings
) -> dict[str, Values]:
    """As timing.interleaved: ns a call, one process after the other in each round."""
    children = {name: Apart(open_) for name, open_ in openers.items()}
    slice_ns = settings.pick(SLICE_NS, QUICK_SLICE_NS)
    try:
        work = partial(_calibrate, keys=keys, slice_ns=slice_ns)
        calls = {name: child.do(work) for name, child in children.items()}
        took: dict[str, list[float]] = {name: [] for name in children}
        rng = random.Random(5)
        for _ in range(settings.rounds):
            for name in rng.sample(list(children), len(children)):
                took[name].append(children[name].do(partial(_time, keys=keys, calls=calls[name])))
    finally:
        for child in children.values():
            child.close()
    return {name: Values(values) for name, values in took.items()}
