"""Callers that wait for a key: threads of this process, or a process of their own."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fast_litellm_shm import ConcurrencyLimiter, RateLimiter
from fast_litellm_shm._shared.wait_queue import ALIKE, Order, Place, place_of_thread
from fast_litellm_shm.limiters.waiting import run
from support.children import PATIENCE

Waited = ConcurrencyLimiter | RateLimiter


def _beat(place: Place) -> bool:
    place.turn()
    run(place.sleep(10**8))
    return True


@contextmanager
def waiters(limiter: Waited, key: str, *orders: Order) -> Iterator[None]:
    """A thread for each order, each of which waits for the key during the block."""
    stop = threading.Event()
    joined = threading.Barrier(len(orders) + 1)

    def wait(order: Order) -> None:
        place = place_of_thread(limiter._states, key.encode(), order)
        try:
            place.join()
            joined.wait(PATIENCE)
            while not stop.is_set():
                _beat(place)
        finally:
            place.leave()

    threads = [threading.Thread(target=wait, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    try:
        joined.wait(PATIENCE)
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def killed_waiter(limiter: Waited, key: str) -> int:
    """The pid of a process that waited for the key, and was killed."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        place = place_of_thread(limiter._states, key.encode(), ALIKE)
        place.join()
        os.write(told, b".")
        while _beat(place):
            pass
    assert os.read(ready, 1)
    os.close(ready)
    os.close(told)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return child
