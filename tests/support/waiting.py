"""Wait for what others do and tell nobody: processes, threads, servers, the screen of a terminal.

A passed deadline is an error of its own, since on a busy machine it may say nothing of the library:
.ci/run tries a test that ended so once more, and no other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TypeVar

PATIENCE = 60.0  # seconds: far above what anything waited for takes

_T = TypeVar("_T")


class TooSlow(AssertionError):
    """What was waited for did not come to pass in time."""


def wait_until(
    what: str | Callable[[], str],
    condition: Callable[[], _T],
    *,
    seconds: float = PATIENCE,
    every: float = 0.005,
) -> _T:
    """Ask until the answer is true, and return it. what: is to come to pass, for the message.
    every: seconds between two looks. The last look begins after the deadline, so a process that was
    held up itself does not miss what happened meanwhile. Raises TooSlow."""
    for pause in _looks(what, seconds, every):
        if found := condition():
            return found
        time.sleep(pause)
    raise AssertionError("unreachable")


async def wait_until_async(
    what: str | Callable[[], str],
    condition: Callable[[], _T],
    *,
    seconds: float = PATIENCE,
    every: float = 0.01,
) -> _T:
    """The same, while the event loop goes on."""
    for pause in _looks(what, seconds, every):
        if found := condition():
            return found
        await asyncio.sleep(pause)
    raise AssertionError("unreachable")


@asynccontextmanager
async def ticking() -> AsyncIterator[Callable[[], int]]:
    """How often the event loop has come round."""
    count = 0

    async def tick() -> None:
        nonlocal count
        while True:
            await asyncio.sleep(0)
            count += 1

    task = asyncio.create_task(tick())
    try:
        yield lambda: count
    finally:
        task.cancel()


def comes_true(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it is true within so many seconds, where that is what the library promises: false
    only where a look says no that began later than that. (``wait_until`` is for what it does not
    promise.)"""
    try:
        return bool(wait_until("", lambda: bool(condition()), seconds=seconds, every=0.001))
    except TooSlow:
        return False


def _looks(what: str | Callable[[], str], seconds: float, every: float) -> Iterator[float]:
    end, late = time.monotonic() + seconds, False
    while not late:
        late = time.monotonic() > end
        yield every
    said = what if isinstance(what, str) else what()
    raise TooSlow(f"never came to pass within {seconds:g} s: {said}")
