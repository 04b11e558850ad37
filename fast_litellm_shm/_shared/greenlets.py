"""Waiting under gevent and eventlet: a greenlet that waits lets the others of its thread run.

A futex stops the whole thread, and also the greenlet that holds the permit. So where
``time.sleep()`` is patched, a greenlet calls it for some ms at a time, and looks for a release.
Each wait checks anew whether it is patched: gunicorn patches after ``--preload`` has imported this.
A thread without a hub (of gevent's threadpool, of eventlet's tpool) has no greenlets, and sleeps in
the kernel.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from fast_litellm_shm._shared.native import lib

# Seconds between two looks, on average: from _FIRST doubled up to _LONGEST, and _EACH more for each
# greenlet that waits. So there are at most 20,000 looks a second in all.
_FIRST, _LONGEST, _EACH = 0.001, 0.008, 50e-6

_waiting: set[object] = set()
os.register_at_fork(after_in_child=_waiting.clear)


def must_yield() -> bool:
    """Whether a call that blocks this thread would hold up greenlets of a patched program."""
    monkey = sys.modules.get("gevent.monkey")
    if monkey is not None and monkey.is_module_patched("time"):
        find = getattr(sys.modules.get("gevent._hub_local"), "get_hub_if_exists", None)
        return find is None or find() is not None
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and patcher.is_monkey_patched("time"):
        local = getattr(sys.modules.get("eventlet.hubs"), "_threadlocal", None)
        return local is None or hasattr(local, "hub")
    return False


def wakeup_wait(limiter: Any, raw: bytes, armed: int, ns: int) -> int:
    """``fshm_wakeup_wait()``: returns 1 if a permit of the key may have been released since
    ``fshm_wakeup_arm()`` returned ``armed``; 0 after ``ns``. A greenlet that is killed meanwhile
    loses no wake-up: all greenlets that wait see a release, unlike sleepers in the kernel."""
    if not must_yield():
        return int(lib.fshm_wakeup_wait(limiter, raw, len(raw), armed, ns))
    end, pause, me = time.monotonic_ns() + ns, _FIRST, object()
    _waiting.add(me)
    try:
        while (left := end - time.monotonic_ns()) > 0:
            # random, so that those that began to wait together do not look together
            chosen = (pause + _EACH * len(_waiting)) * (0.5 + os.urandom(1)[0] / 256)
            time.sleep(min(chosen, left / 1e9))
            if lib.fshm_wakeup_arm(limiter, raw, len(raw)) != armed:
                return 1
            pause = min(2 * pause, _LONGEST)
        return int(lib.fshm_wakeup_wait(limiter, raw, len(raw), armed, 0))  # forgets its last look
    finally:
        _waiting.discard(me)


class Lock:
    """A lock that may be held during I/O, in which other greenlets run. A ``threading.Lock`` that
    was made before the program was patched could stop the thread for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        while not self._lock.acquire(blocking=not must_yield()):
            time.sleep(_LONGEST)

    def __exit__(self, *_: object) -> None:
        self._lock.release()
