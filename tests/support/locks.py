"""Locks over a fork."""

from __future__ import annotations

import threading
from types import ModuleType
from typing import Any

from support.children import run_one


def is_free_in_a_fork(module: ModuleType, name: str) -> bool:
    """Whether a child can take the lock of that name while a thread of its parent holds it."""
    locked, end = threading.Event(), threading.Event()

    def hold() -> None:
        with getattr(module, name):
            locked.set()
            end.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert locked.wait(60)
        return bool(run_one(_take, module, name, method="fork"))
    finally:
        end.set()
        thread.join()


def _take(module: ModuleType, name: str) -> bool:
    lock: Any = getattr(module, name)
    return bool(lock.acquire(timeout=5))
