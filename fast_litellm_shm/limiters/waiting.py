"""How a call waits: in its thread (:data:`BLOCKING`), or on an event loop (:data:`ASYNCIO`).

A call that may wait is written once, as a generator of steps over one of the two. :func:`run` and
:func:`run_async` make the call of it::

    def _twice(self, waits: Waits) -> Steps[int]:
        yield from waits.sleep(0.1)
        return (yield from waits.ask(self._ask, undo))
"""

from __future__ import annotations

import os
import threading
import time
import types
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

from fast_litellm_shm._shared import moved_clock, wait_queue
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm._shared.wait_queue import ALIKE, Order, Place

# asyncio and concurrent.futures take 20 ms to import: the functions that use them do.
if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

T = TypeVar("T")
Steps: TypeAlias = Generator[Any, Any, T]

_executors: dict[str, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_executors.clear)  # their threads stay behind in the parent
_this = threading.local()

NEVER = 2**62  # ns
# Threads that connect at once, in a process. A server that does not answer delays no other one.
_CONNECTING = 1024
_ASKING = 64  # threads that ask servers of cluster=
_LOOK = 1_000_000_000  # ns: a caller that tells its place looks as often
_LEAST_WEIGHT, _MOST_WEIGHT, _MOST_PRIORITY, _MOST_WAITING = 0.001, 1000.0, 100, 2**31

OnWait: TypeAlias = Callable[[int, "float | None"], object]


class Wish(NamedTuple):
    """How a caller wants to wait: the arguments of all waiting calls."""

    order: Order = ALIKE
    max_waiting: int | None = None
    on_wait: OnWait | None = None


_PLAIN = Wish()
_DEFAULTS = (None, 1.0, 0, None, None)


def wish(
    tenant: str | None,
    weight: float,
    priority: int,
    max_waiting: int | None,
    on_wait: OnWait | None,
) -> Wish:
    """Check the arguments. Raises TypeError or ValueError, which names the wrong one."""
    if (tenant, weight, priority, max_waiting, on_wait) == _DEFAULTS and weight is not True:
        return _PLAIN
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise TypeError(f"weight must be a number, not {weight!r}")
    if not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
        raise ValueError(f"weight must be 0.001 to 1000, not {weight!r}")
    if type(priority) is not int:
        raise TypeError(f"priority must be an int, not {priority!r}")
    if not -_MOST_PRIORITY <= priority <= _MOST_PRIORITY:
        raise ValueError(f"priority must be -100 to 100, not {priority!r}")
    if max_waiting is not None and type(max_waiting) is not int:
        raise TypeError(f"max_waiting must be an int or None, not {max_waiting!r}")
    if max_waiting is not None and not 0 <= max_waiting < _MOST_WAITING:
        raise ValueError(f"max_waiting must be 0 or more, not {max_waiting!r}")
    if on_wait is not None and not callable(on_wait):
        raise TypeError(f"on_wait must be a function or None, not {on_wait!r}")
    return Wish(Order(tenant_hash(tenant), round(weight * 1000), priority), max_waiting, on_wait)


def tenant_hash(tenant: str | None) -> int:
    """The number that the queue knows a tenant by; 0: none. The same in all processes."""
    if tenant is None:
        return 0
    if not isinstance(tenant, str):
        raise TypeError(f"tenant must be a str or None, not {tenant!r}")
    if not tenant:
        raise ValueError("tenant must not be '': leave it out, or name the tenant")
    return _hash(tenant)


@lru_cache(1024)
def _hash(tenant: str) -> int:
    from hashlib import blake2s

    raw = tenant.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2s(raw, digest_size=7).digest(), "big") + 1


class Shed(Exception):  # noqa: N818 - no error: callers of the package never see it
    """Refused at once: ``ahead`` callers are before this one, and it wants no more."""

    def __init__(self, ahead: int) -> None:
        super().__init__(ahead)
        self.ahead = ahead


class Pace:
    """How fast a limiter's queue moves: seconds for each caller, of those that were measured."""

    seconds: float | None = None

    def passed(self, ns: int, ahead: int) -> None:
        one, known = ns / 1e9 / (ahead + 1), self.seconds
        self.seconds = one if known is None else 0.8 * known + 0.2 * one

    def expected(self, ahead: int) -> float | None:
        """Seconds until a caller with so many before it is served; None: not known yet."""
        known = self.seconds
        return None if known is None else known * (ahead + 1)


class Waits:
    """How a call waits in its own thread."""

    def ask(self, call: Callable[[], T], undo: Callable[[T], object]) -> Steps[T]:
        """Return ``call()``, which may wait for a server. undo: takes the result back if the caller
        was cancelled meanwhile."""
        yield from ()
        return call()

    def sleep(self, seconds: float) -> Steps[None]:
        yield from ()
        time.sleep(seconds)

    def connect(
        self, call: Callable[[], T], late: Callable[[T], object], never: Callable[[], object]
    ) -> Steps[T]:
        """Return ``call()``, which blocks. If the caller was cancelled meanwhile, ``late`` gets the
        result, or ``never`` is called where ``call`` has not begun."""
        yield from ()
        return call()

    place = staticmethod(wait_queue.place_of_thread)


class _Asyncio(Waits):
    def ask(self, call: Callable[[], T], undo: Callable[[T], object]) -> Steps[T]:
        return (yield from off_loop(call, undo).__await__())

    def sleep(self, seconds: float) -> Steps[None]:
        import asyncio

        yield from asyncio.sleep(seconds).__await__()

    def connect(
        self, call: Callable[[], T], late: Callable[[T], object], never: Callable[[], object]
    ) -> Steps[T]:
        return (
            yield from _in_thread("fast-shm-connect", _CONNECTING, call, late, never).__await__()
        )

    place = staticmethod(wait_queue.place_of_task)


BLOCKING, ASYNCIO = Waits(), _Asyncio()


def _drop(_: object) -> None: ...


def in_turn(
    waits: Waits,
    place: Place,
    attempt: Callable[[], Steps[tuple[T, int | None]]],
    refused: Callable[[], T],
    deadline: int,
    wish: Wish = _PLAIN,
    pace: Pace | None = None,
    passing: Callable[[], T | None] | None = None,
) -> Steps[T]:
    """Wait in the place until it is the caller's turn, and attempt then, until an attempt says that
    its result is final. attempt: the steps of one; returns its result, and for how many ns at most
    to wait for the next one (None: the result is final). refused: the result of a caller whose turn
    has not come by the deadline (of monotonic_ns()). Raises Shed. pace: is measured, and
    told to on_wait, by callers that look at their place. passing: the result of a caller that was
    woken before its turn; None: there is none."""
    try:
        return (yield from _in_turn(waits, place, attempt, refused, deadline, wish, pace, passing))
    finally:
        place.leave()  # again: an exception of a signal handler may have cut the first one short


def _in_turn(
    waits: Waits,
    place: Place,
    attempt: Callable[[], Steps[tuple[T, int | None]]],
    refused: Callable[[], T],
    deadline: int,
    wish: Wish,
    pace: Pace | None,
    passing: Callable[[], T | None] | None,
) -> Steps[T]:
    most, on_wait = wish.max_waiting, wish.on_wait
    looks, came, first, told = most is not None or on_wait is not None, 0, None, -1
    joined = False
    try:
        if looks:
            came = monotonic_ns()
        place.join()
        while True:
            result, pause = None, NEVER
            if place.turn():
                result, again = yield from attempt()
                if again is None:
                    if first is not None and pace is not None:
                        pace.passed(monotonic_ns() - came, first)
                    return result
                pause = again
            elif passing is not None and joined and (early := passing()) is not None:
                return early
            joined = True
            left = deadline - monotonic_ns()
            if left <= 0:
                return (yield from waits.ask(refused, _drop)) if result is None else result
            if looks:
                ahead, pause = place.ahead, min(pause, _LOOK)
                if first is None:
                    first = ahead
                    if most is not None and ahead >= most:
                        raise Shed(ahead)
                if on_wait is not None and ahead != told:
                    told = ahead
                    on_wait(ahead + 1, None if pace is None else pace.expected(ahead))
            asleep = place.sleep if moved_clock.current is None else moved_clock.sleeping(place)
            yield from asleep(min(left, pause))
    finally:
        place.leave()


def run(steps: Steps[T]) -> T:
    """Run the steps of a call to their end, over BLOCKING, and return its result."""
    # Into a list. A StopIteration that is caught by name is in a cycle with this frame, where an
    # exception of a signal handler strikes: what was granted would be held until the next
    # collection.
    out: list[T] = []
    for _ in _into(out, steps):
        raise RuntimeError("a step that blocks has yielded")
    return out.pop()


def _into(out: list[T], steps: Steps[T]) -> Steps[None]:
    out.append((yield from steps))


@types.coroutine
def run_async(steps: Steps[T]) -> Steps[T]:
    """Run the steps of a call to their end, over ASYNCIO, and return its result."""
    try:
        return (yield from steps)
    finally:
        # An exception may strike here while they sleep. Its traceback keeps them: they would not
        # end, and hold up those that wait behind them.
        steps.close()


class MustAskError(BlockingIOError):  # the native part knows this base class: no failure
    """The call has to ask a server, and is one that may not wait here."""


def may_wait() -> None:
    """To be called before a server is asked, or another caller is waited for. Raises MustAskError
    in a call that is made on an event loop."""
    if getattr(_this, "on_loop", False):
        raise MustAskError


def _executor(name: str, threads: int) -> ThreadPoolExecutor:
    """An executor of so many threads at most; calls beyond that wait in a queue."""
    found = _executors.get(name)
    if found is None:
        from concurrent.futures import ThreadPoolExecutor

        found = _executors[name] = ThreadPoolExecutor(threads, name)
    return found


async def off_loop(call: Callable[[], T], undo: Callable[[T], object] = lambda _: None) -> T:
    """Return ``call()``. It is first called on the event loop: if this host alone decides, that is
    all. If it raises MustAskError, it has done nothing yet, and a thread calls it again. A thread
    cannot be cancelled: if the caller was cancelled meanwhile, ``undo`` gets the thread's result,
    once. ``undo`` must not wait."""
    _this.on_loop = True
    try:
        return call()
    except MustAskError:
        pass
    finally:
        _this.on_loop = False
    return await _in_thread("fast-shm-ask", _ASKING, call, undo, lambda: None)


async def _in_thread(
    name: str,
    threads: int,
    call: Callable[[], T],
    late: Callable[[T], object],
    never: Callable[[], object],
) -> T:
    """What a thread returns. If the caller gets an exception meanwhile, ``late`` gets it, or
    ``never`` is called where the thread has not begun."""
    import asyncio
    from concurrent.futures import Future

    # Of our own: an executor that can start no thread raises, and keeps the call for a later one.
    found: Future[T] = Future()
    try:
        _executor(name, threads).submit(_work, found, call)
        return await asyncio.wrap_future(found)
    except BaseException:
        if found.cancelled() or found.cancel():
            never()
        else:
            found.add_done_callback(lambda done: _undo(done, late))
        raise


def _work(found: Future[T], call: Callable[[], T]) -> None:
    """In a thread."""
    if not found.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        found.set_exception(error)
        del found  # the exception keeps this frame
    else:
        found.set_result(result)


def _undo(done: Future[T], undo: Callable[[T], object]) -> None:
    if not done.cancelled() and done.exception() is None:
        undo(done.result())
