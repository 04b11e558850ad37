"""Waiting under gevent and eventlet: a greenlet that waits lets the others of its thread run.

To sleep in the kernel stops the whole thread, and also the greenlet that holds the permit. So where
``time.sleep()`` is patched, a greenlet waits by its hub (wait_queue.py). Each wait checks anew
whether it is patched: gunicorn patches after ``--preload`` has imported this. A thread without a
hub (of gevent's threadpool, of eventlet's tpool) has no greenlets, and sleeps in the kernel.
"""

from __future__ import annotations

import sys
import threading
import time

_PAUSE = 0.008  # seconds between two looks at a lock


def patched_by() -> str | None:
    """Which library has patched the program: "gevent" or "eventlet". Either may be imported, and
    not in use."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("time"):
        return "gevent"
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("time"):
        return "eventlet"
    return None


def must_yield() -> bool:
    """Whether a call that blocks this thread would hold up greenlets of a patched program."""
    library = patched_by()
    if library == "gevent":
        find = getattr(sys.modules.get("gevent._hub_local"), "get_hub_if_exists", None)
        return find is None or find() is not None
    if library == "eventlet":
        local = getattr(sys.modules.get("eventlet.hubs"), "_threadlocal", None)
        return local is None or hasattr(local, "hub")
    return False


class Lock:
    """A lock that may be held during I/O, in which other greenlets run. A ``threading.Lock`` that
    was made before the program was patched could stop the thread for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        while not self._lock.acquire(blocking=not must_yield()):
            time.sleep(_PAUSE)

    def __exit__(self, *_: object) -> None:
        self._lock.release()
