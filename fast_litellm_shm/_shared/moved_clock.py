"""A clock of a segment that tests move (``csrc/core/moved_clock.c``), for
:mod:`fast_litellm_shm.testing`.

A file says what time it is. FAST_LITELLM_SHM_TEST_CLOCK names it, so each process of the test has
the same clock. Without that variable nothing here is used.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.native import ffi, lib

if TYPE_CHECKING:
    from fast_litellm_shm._shared.segment import Segment
    from fast_litellm_shm._shared.wait_queue import Place

SLICE_NS = 10_000_000  # how long a waiting call sleeps before it looks whether the clock was moved

current: MovedClock | None = None  # of this process: waiting calls count their time-outs by it


class MovedClock:
    """Of a segment. handle: of the segment, which it must not outlive."""

    def __init__(self, handle: Any, path: str) -> None:
        self._handle, self._path = handle, path
        self._how = ffi.new("int *")
        self.stood: int | None = None  # time.monotonic_ns() when it was stopped

    def now(self) -> int:
        """Segment time, in ns."""
        return int(lib.fshm_now(self._handle))

    def wall(self) -> int:
        """The time of day that limits of the calendar go by, ns since 1970."""
        return int(lib.fshm_wall(self._handle, 0))

    def moved(self) -> int:
        """By how many ns it was moved, all together."""
        return int(lib.fshm_clock_moved(self._handle, self._how))

    def how(self) -> int:
        """0: it runs. 1: it stands still. 3: and waiting calls do not move it."""
        self.moved()
        return int(self._how[0])

    def change(self, how: int, ns: int = 0) -> bool:
        """fshm_clock_move(). False: the time of a segment ends before."""
        with self._alone():
            return bool(lib.fshm_clock_move(self._handle, how, ns) == lib.FSHM_OK)

    def advance(self, ns: int) -> bool:
        """Move it by so much."""
        with self._alone():
            to = self.now() + ns
            return bool(
                to < 2**63
                and lib.fshm_clock_move(self._handle, lib.FSHM_MOVE_TO, to) == lib.FSHM_OK
            )

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process, and one thread, moves it at a time. The lock ends with the descriptor."""
        file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)


def shared(segment: Segment, path: str) -> MovedClock | None:
    """The clock of the segment, if the file is its own, or is empty: then it becomes its own."""
    global current
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:  # the test has ended
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        make = os.fstat(file).st_size == 0
        status = lib.fshm_clock_share(segment._handle, file, make)
        if status == lib.FSHM_E_SYSTEM:
            raise OSError(ffi.errno, os.strerror(ffi.errno), path)
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # the mapping keeps the description open
        os.close(file)
    if status != lib.FSHM_OK:
        return None  # of another segment
    current = MovedClock(segment._handle, path)
    return current


def forget(clock: MovedClock | None) -> None:
    """The clock is no longer the current one."""
    global current
    if current is clock:
        current = None


def monotonic_ns() -> int:
    """For deadlines of waiting calls: time.monotonic_ns(), and what the clock was moved by. While a
    test has stopped the clock, real time counts only where a call sleeps: so a call that may wait
    for just as long as it has to is admitted."""
    now, clock = time.monotonic_ns(), current
    if clock is None:
        return now
    moved = clock.moved()
    if clock.how() == 0:
        clock.stood = None
        return now + moved
    stood = clock.stood
    if stood is None:
        stood = clock.stood = now
    return stood + moved


def sleeping(place: Place) -> Callable[[int], Generator[Any, Any, None]]:
    """``place.sleep``, for SLICE_NS at most: the clock may be moved. So much of time-outs passes by
    that, although the clock stands still."""

    def sleep(ns: int) -> Generator[Any, Any, None]:
        began = time.monotonic_ns()
        yield from place.sleep(min(ns, SLICE_NS))
        clock = current
        if clock is not None and clock.stood is not None:
            clock.stood += time.monotonic_ns() - began

    return sleep


def jump(segment: Segment, ns: int) -> bool:
    """Called by a call that would wait for so long until its tokens are there. Where a test has
    stopped the clock, it moves it on instead, unless the test wants to do that itself."""
    clock = segment._clock
    if clock is None or clock.how() != 1:
        return False
    return clock.advance(ns)


def at_most(ns: int) -> int:
    """For how long a call that waits may sleep until it looks again."""
    return ns if current is None else min(ns, SLICE_NS)
