"""For tests of programs that use limits: a segment of its own, and time that the test moves.

With pytest, the fixtures ``shm_segment``, ``shm_clock`` and ``shm_reset`` are there without an
import. Everywhere else: :func:`isolated`, or :class:`IsolatedTests` for unittest. See
``docs/testing.md``.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from typing import Any, TypeAlias

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import moved_clock
from fast_litellm_shm._shared import segment as segments
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment

__all__ = ["Clock", "Isolated", "IsolatedTests", "isolated"]

Seconds: TypeAlias = float | timedelta

_NAME, _CLOCK = "FAST_LITELLM_SHM_NAME", "FAST_LITELLM_SHM_TEST_CLOCK"
_STATE = "FAST_LITELLM_SHM_STATE"
# What would lead out of the test, or make another segment than the test asks for.
_UNSET = (
    "FAST_LITELLM_SHM_CLUSTER", "FAST_LITELLM_SHM_CAPACITY", "FAST_LITELLM_SHM_MODE",
    "FAST_LITELLM_SHM_NAMES", "FAST_LITELLM_SHM_GROUP", "FAST_LITELLM_SHM_ALLOW_OTHER_OWNER",
)  # fmt: skip
_FORWARD = 2 * 86_400 * 10**9  # ns: a time of day that is set back by more goes back at once


class Clock:
    """The time of one segment, for all processes of the test: of token buckets, windows and windows
    of the calendar, budgets, ``retry_after``, and calls that wait.

    A clock never goes back. All together it can be moved by 4.5 years. It moves no other time:
    ``time.time()``, the clock of a Redis server (``cluster=``) and of a state file (``durable=``),
    and how long a connection of a pool is idle, go on as they were.
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment

    def _of(self) -> moved_clock.MovedClock:
        found = self._segment._clock
        if found is None:
            raise RuntimeError(
                f"the clock of segment {self._segment.name!r} cannot be moved: it was opened "
                "before the test began; open it inside isolated(), or set shm_isolated in pytest's "
                "settings"
            )
        return found

    def advance(self, seconds: Seconds) -> None:
        """Move it forward: ``clock.advance(60)``. seconds: 0 or more, or a timedelta."""
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            raise TypeError(f"seconds must be a number or a timedelta, not {seconds!r}")
        if not seconds >= 0:
            raise ValueError(
                f"seconds must be 0 or more, not {seconds!r}: what was counted cannot be undone by "
                "time that goes back; begin a new segment, or call reset()"
            )
        self._advance(self._of(), round(min(seconds, 2**33) * 1e9))

    @staticmethod
    def _advance(clock: moved_clock.MovedClock, ns: int) -> None:
        if not clock.advance(ns):
            raise ValueError(
                f"the clock cannot be moved by {ns / 86_400e9:.0f} days: the time of a segment "
                f"ends after 4.5 years, and this one is {clock.now() / 86_400e9:.0f} days old; use "
                "a new segment"
            )

    def move_to(self, moment: datetime) -> None:
        """Make it this date and time of day, for windows of the calendar: ``FixedWindow(1000,
        per="month")`` and budgets. moment: of a time zone, else UTC.

        A later moment moves the whole clock there, as :meth:`advance`. For an earlier one only the
        date goes back, and windows of the calendar that have begun last until their end: go back
        before the first request, or call reset().
        """
        if not isinstance(moment, datetime):
            raise TypeError(f"moment must be a datetime, not {moment!r}")
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        clock = self._of()
        since = moment - datetime(1970, 1, 1, tzinfo=timezone.utc)
        wanted = (since // timedelta(microseconds=1)) * 1000
        if wanted <= _FORWARD:
            raise ValueError(f"moment must be after 1970-01-03, not {moment.isoformat()}")
        ahead = wanted - clock.wall()
        if ahead < 0:
            clock.change(lib.FSHM_MOVE_DAY, (ahead - _FORWARD) % 2**64)
            clock.change(lib.FSHM_MOVE_DAY, _FORWARD)
            ahead = wanted - clock.wall()
        self._advance(clock, ahead)

    @property
    def now(self) -> datetime:
        """The date and time of day that limits of the calendar go by, in UTC."""
        return datetime(1970, 1, 1, tzinfo=timezone.utc) + timedelta(
            microseconds=self._of().wall() // 1000
        )

    @property
    def seconds(self) -> float:
        """Seconds since the segment was made."""
        return self._of().now() / 1e9

    def freeze(self, *, hold_waits: bool = False) -> None:
        """Stop it. From now on only the test moves it, and calls that wait.

        A call that waits for tokens (``wait``, ``@limited(wait=...)``, the httpx transports) takes
        no real time then: it moves the clock to the moment at which it is admitted. hold_waits:
        True: it leaves the clock alone, and waits until another thread, task or process moves it.
        Such a call is over when its time-out has passed, in real seconds or on this clock. A call
        that waits for a permit waits for whoever holds it: it never moves the clock.
        """
        clock = self._of()
        clock.change(lib.FSHM_MOVE_HOLD, int(bool(hold_waits)))
        clock.change(lib.FSHM_MOVE_STOP)

    def run(self) -> None:
        """Let it go on, at the speed of real time, from where it is."""
        clock = self._of()
        clock.change(lib.FSHM_MOVE_RUN)
        clock.change(lib.FSHM_MOVE_HOLD, 0)

    @property
    def frozen(self) -> bool:
        """Whether it stands still."""
        return self._of().how() != 0

    def __repr__(self) -> str:
        state = "frozen at" if self.frozen else "at"
        return f"<Clock of segment {self._segment.name!r} {state} {self.now.isoformat()}>"


def reset(segment: Segment) -> None:
    """Forget what all keys of all limiters in the segment have consumed, and take back the permits
    that this process holds. Limits, limiters and statistics stay."""
    info, out = ffi.new("fshm_limiter_info *"), ffi.new("fshm_limiter **")
    for index in range(segment.geometry().limiters):
        if lib.fshm_limiter_at(segment._handle, index, info) != lib.FSHM_OK:
            continue
        if lib.fshm_limiter_find(segment._handle, info.name, info.name_length, out) != lib.FSHM_OK:
            continue
        status = lib.fshm_reset_all(out[0])
        lib.fshm_limiter_close(out[0])
        if status not in (lib.FSHM_OK, lib.FSHM_E_ARGUMENT):
            name = bytes(ffi.buffer(info.name, info.name_length)).decode("utf-8", "replace")
            raise exceptions.SegmentError(
                f"cannot reset limiter {name!r} of segment {segment.name!r} (error {status}): its "
                "limits are damaged; use a new segment"
            )
    lib.fshm_reap(segment._handle, os.getpid())


class Isolated:
    """What :func:`isolated` gives: ``segment`` and ``clock``."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.clock = Clock(segment)

    def reset(self) -> None:
        """Forget what all keys of all limiters have consumed, and take back the permits that this
        process holds."""
        reset(self.segment)

    def __repr__(self) -> str:
        return f"Isolated({self.segment!r})"


@contextmanager
def isolated(*, capacity: int = 1000, frozen: bool = False) -> Iterator[Isolated]:
    """A segment of its own, for a test. As long as the block lasts, limiters that are given no
    segment are made in it, in this process and in those that it starts. It is deleted afterwards.

    A limiter that was made before goes on counting where it was made. capacity: keys. frozen: the
    clock stands still from the beginning, as :meth:`Clock.freeze` has it.

    Limits over many hosts (FAST_LITELLM_SHM_CLUSTER) count on this host inside the block, and
    durable limits in a folder that is deleted with it. Also a decorator.
    """
    environment = Environment()
    before = moved_clock.current
    try:
        segment = Segment(environment.name, capacity=capacity, mode=0o600, names="plain")
        found = Isolated(segment)
        if frozen:
            found.clock.freeze()
        _forget_defaults()
        yield found
    finally:
        moved_clock.current = before
        environment.restore()
        _forget_defaults()
        segments._default.pop(environment.name, None)


class Environment:
    """The variables of a segment that belongs to tests. The segment is made by the first process
    that opens it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self.name = f"test-{self._pid}-{time.time_ns():x}"
        self.folder = tempfile.mkdtemp(prefix="fast-shm-test-")
        self.clock = os.path.join(self.folder, "clock")
        with open(self.clock, "xb"):
            pass
        set_to = {_NAME: self.name, _CLOCK: self.clock, _STATE: os.path.join(self.folder, "state")}
        self._before = {variable: os.environ.get(variable) for variable in (*set_to, *_UNSET)}
        for variable in _UNSET:
            os.environ.pop(variable, None)
        os.environ.update(set_to)

    @property
    def used(self) -> bool:
        """Whether a process has opened the segment."""
        return os.path.getsize(self.clock) > 0

    def restore(self) -> None:
        """Set the variables back, and delete the segment. In a forked child: only the former."""
        for variable, value in self._before.items():
            os.environ.pop(variable, None)
            if value is not None:
                os.environ[variable] = value
        if self._pid != os.getpid():
            return
        lib.fshm_remove(self.name.encode(), ffi.new("fshm_error *"))
        for found in segments.opened(self.name):
            found._is_new(found._removed())  # this process knows
        shutil.rmtree(self.folder, ignore_errors=True)


class Session:
    """The segment of a session of pytest, with the setting ``shm_isolated``."""

    def __init__(self) -> None:
        self._environment = Environment()
        self._segment: Segment | None = None

    @property
    def segment(self) -> Segment:
        """The one that code uses which is imported, and tests without ``shm_segment``."""
        if self._segment is None:
            self._segment = Segment(self._environment.name)
        return self._segment

    def begin_test(self) -> None:
        """Where a process has made the segment: nothing is counted, and its clock runs."""
        if self._environment.used:
            Clock(self.segment).run()
            reset(self.segment)

    def end(self) -> None:
        """Delete it."""
        self._environment.restore()
        _forget_defaults()
        moved_clock.current = None


def _forget_defaults() -> None:
    """What the package has made of the default segment, where it was used: the limiter of
    check_rate_limit(), the default pool, the routers."""
    package = "fast_litellm_shm"
    simple: Any = sys.modules.get(f"{package}.fast_litellm.simple")
    pools: Any = sys.modules.get(f"{package}.pools.connection_pool")
    routing: Any = sys.modules.get(f"{package}.routing.router")
    if simple is not None:
        simple._limiter.cache_clear()
    if pools is not None:
        pools._default = None
    if routing is not None:
        routing._routers.clear()


class IsolatedTests:
    """For classes of tests, in front of unittest.TestCase: each test has a segment of its own, and
    ``self.shm.clock`` stands still until the test moves it::

        class Signup(IsolatedTests, unittest.TestCase):
            def test_third_is_refused(self):
                ...
                self.shm.clock.advance(60)
    """

    shm: Isolated

    def setUp(self) -> None:
        """Begin the segment of a test."""
        context = isolated(frozen=True)
        self.shm = context.__enter__()
        self.addCleanup(context.__exit__, None, None, None)  # type: ignore[attr-defined]
        with suppress(AttributeError):
            super().setUp()  # type: ignore[misc]
