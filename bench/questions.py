"""The questions, in the order of the report, and how one is asked."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import time
from concurrent.futures import Future, ProcessPoolExecutor, wait
from typing import Any

from bench.result import Result, Settings, asked

QUESTIONS = (
    "check_cost",
    "processes",
    "threads",
    "key_count",
    "bytes_per_key",
    "first_check",
    "tails",
    "pool_cost",
    "routing",
    "limits_cost",
    "cluster_cost",
    "record",
    "tokens_cost",
    "litellm_cost",
    "litellm_plugin",
    "end_to_end",
)
PATIENCE = 600  # seconds for one question: only a hang comes near it


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
