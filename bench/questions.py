"""The questions, in the order of the report, and how one is asked."""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from bench.passes import merged
from bench.result import Result, Settings, asked

QUESTIONS = (
    "check_cost",
    "processes",
    "threads",
    "key_count",
    "plans_cost",
    "bytes_per_key",
    "first_check",
    "import_cost",
    "inspect_cost",
    "tails",
    "pool_cost",
    "pool_waiting",
    "waiting",
    "adaptive",
    "routing",
    "limits_cost",
    "web_cost",
    "cluster_cost",
    "budget_cost",
    "record",
    "tokens_cost",
    "tokens_ids",
    "tokens_hard",
    "tokens_worker",
    "litellm_cost",
    "litellm_plugin",
    "end_to_end",
)
# Asked only by name: it takes minutes, and the whole proxy.
APART = ("proxy_cost",)
PATIENCE = 600  # seconds for one question: only a hang comes near it
# Of those not asked in each pass: each value of theirs is from a process of its own anyway; or, of
# those that count tokens, the peers take seconds to load their tables.
MOST_PASSES = {
    "bytes_per_key": 1,
    "inspect_cost": 1,
    "key_count": 3,
    "waiting": 2,
    "adaptive": 1,
    "tokens_cost": 3,
    "tokens_ids": 2,
    "tokens_hard": 2,
    "tokens_worker": 1,
}


def _ask(name: str, settings: Settings) -> Result:
    return importlib.import_module(f"bench.{name}").run(settings)  # type: ignore[no-any-return]


def _stop(answer: Future[Result], workers: list[Any]) -> None:
    """Interrupt it, so that it stops the servers that it started; then kill."""
    for process in workers:
        os.kill(process.pid, signal.SIGINT)
    wait([answer], 20)
    for process in workers:
        process.kill()


def ask(name: str, settings: Settings) -> Result:
    """The question's result, from a process of its own: fast-litellm changes litellm where it is
    imported, and what one question leaves in memory is not another's. What fails is told."""
    start = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        answer = pool.submit(_ask, name, settings)
        workers = list(pool._processes.values())
        try:
            result = answer.result(PATIENCE)
        except Exception as error:
            result = asked(importlib.import_module(f"bench.{name}").__doc__)
            result.failed = f"{type(error).__name__}: {error}"
            if not answer.done():
                result.failed = f"it did not end within {PATIENCE} s"
                _stop(answer, workers)
    result.seconds = time.monotonic() - start
    return result


def _among(passes: int, most: int) -> set[int]:
    """Which passes a question is asked in: from the first to the last, far apart."""
    count = min(passes, most)
    return {round(i * (passes - 1) / max(count - 1, 1)) for i in range(count)}


def ask_all(
    names: Sequence[str], settings: Settings, tell: Callable[[str], object]
) -> dict[str, Result]:
    """Each question's result: all of them in turn, as often as there are passes."""
    found: dict[str, list[Result]] = {name: [] for name in names}
    asked_in = {n: _among(settings.passes, MOST_PASSES.get(n, settings.passes)) for n in names}
    for number in range(settings.passes):
        for name in (each for each in names if number in asked_in[each]):
            result = ask(name, dataclasses.replace(settings, passes=len(asked_in[name])))
            found[name].append(result)
            tell(
                f"pass {number + 1} of {settings.passes}, {name}: "
                f"{result.failed or f'{result.seconds:.0f} s'}"
            )
    return {name: merged(results) for name, results in found.items()}
