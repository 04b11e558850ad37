"""Run code in real child processes, and never hang on one."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

# Far above what any child needs on a busy machine; only a hang reaches it.
PATIENCE = 120.0


def _child(connection: Connection, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        result, failed = target(*arguments), None
    except BaseException as error:
        result, failed = None, f"{type(error).__name__}: {error}"
    connection.send((result, failed))


def run(
    target: Callable[..., Any],
    arguments: Sequence[tuple[Any, ...]],
    method: str,
    patience: float = PATIENCE,
) -> list[Any]:
    """``target(*arguments[i])`` in child i, all at once. method: fork or spawn. Returns the
    results; raises where a child raised, died or hung. A spawned child must be able to import the
    target."""
    context = multiprocessing.get_context(method)
    children, ends = [], []
    for given in arguments:
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(theirs, target, given), daemon=True)  # type: ignore[attr-defined]
        child.start()
        theirs.close()  # so that a dead child reads as end of file
        children.append(child)
        ends.append(mine)
    deadline, results = time.monotonic() + patience, []
    try:
        for child, end in zip(children, ends, strict=True):
            if not wait([end], max(deadline - time.monotonic(), 0)):
                raise AssertionError(f"child {child.pid} hung in {target.__name__}")
            try:
                result, failed = end.recv()
            except EOFError:
                child.join()
                raise AssertionError(f"child died in {target.__name__}: {child.exitcode}") from None
            assert failed is None, failed
            results.append(result)
        return results
    finally:
        for child, end in zip(children, ends, strict=True):
            end.close()
            child.join(5)
            if child.is_alive():
                child.kill()
                child.join()


def run_one(
    target: Callable[..., Any], *arguments: Any, method: str = "spawn", patience: float = PATIENCE
) -> Any:
    """``target(*arguments)`` in one child."""
    return run(target, [arguments], method, patience)[0]
