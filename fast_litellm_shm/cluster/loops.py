"""Calls from an event loop: those that the host can answer are made at once, and those that have
to ask the server in a thread, so that the loop never waits."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

_ASKERS = 64  # threads; calls beyond that queue up
_asking: ThreadPoolExecutor | None = None
_this = threading.local()


class MustAskError(BlockingIOError):  # as such the native part knows it: it is no failure
    """The call has to ask the server, and is one that may not wait here."""


def may_wait() -> None:
    """To be called before the server is asked, or anybody else is waited for. Raises MustAskError
    in a call that is made on an event loop."""
    if getattr(_this, "on_loop", False):
        raise MustAskError


def _executor() -> ThreadPoolExecutor:
    global _asking
    if _asking is None:
        _asking = ThreadPoolExecutor(_ASKERS, "fast-shm-ask")
    return _asking


def _forget_executor() -> None:
    """Its threads stay behind in the parent."""
    global _asking
    _asking = None


os.register_at_fork(after_in_child=_forget_executor)


async def off_loop(call: Callable[[], T], undo: Callable[[T], object]) -> T:
    """What ``call()`` returns. Where it raises MustAskError, it has done nothing yet, and is made
    again in a thread. A thread cannot be cancelled: what it still finds for a caller that was is
    given to ``undo``, once, which must not wait."""
    _this.on_loop = True
    try:
        return call()
    except MustAskError:
        pass
    finally:
        _this.on_loop = False
    asked = _executor().submit(call)
    try:
        return await asyncio.wrap_future(asked)
    except BaseException:
        if not asked.cancel():
            asked.add_done_callback(lambda done: _undo(done, undo))
        raise


def _undo(done: Future[T], undo: Callable[[T], object]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())
