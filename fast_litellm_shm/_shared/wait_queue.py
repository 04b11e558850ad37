"""A caller's place in the queue of those that wait for a key (``csrc/permits/wait_queue.c``).

The queue is one for all processes of the host. It only says which caller may try. A caller gets a
place, asks whether it is its turn, tries, and sleeps until it is woken::

    place = place_of_thread(states, raw)  # nothing has happened yet
    try:
        place.join()
        while not (place.turn() and tried()):
            yield from place.sleep(ns)
    finally:
        place.leave()

A thread has a place of its own. The tasks of an event loop, or the greenlets of a hub, that wait
for one key share one place, in which they stand in a line: ten thousand of them cost no thread.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from fast_litellm_shm._shared import greenlets
from fast_litellm_shm._shared.native import ffi, lib, owned

if TYPE_CHECKING:
    import asyncio

    from fast_litellm_shm._shared.segment import Segment
    from fast_litellm_shm._shared.states import States

_BEAT_NS: int = lib.FSHM_WAIT_BEAT_NS
_NUMBER = 8  # bytes: what a wake-up writes
_READ = 4096  # bytes: what the smallest pipe holds
_FOREVER = 1e6  # seconds: no timer for longer


class Order(NamedTuple):
    """Who a caller is, for the order in which callers are served. tenant: hash of its name, 0: of
    none. weight: in thousandths."""

    tenant: int = 0
    weight: int = 1000
    priority: int = 0


ALIKE = Order()


class _Native:
    """A place of the segment. fd: of the pipe of an event loop; -1: a thread sleeps."""

    def __init__(self, states: States, raw: bytes, order: Order, fd: int) -> None:
        self.limiter, self.segment = states.handle, states.segment
        self.place = owned(ffi.new("fshm_place *"), partial(lib.fshm_wait_leave, self.limiter))
        self.looked = ffi.new("fshm_turn *")
        waiter = ffi.new("fshm_waiter *", (*order, fd))
        lib.fshm_wait_join(self.limiter, raw, len(raw), waiter, 0, self.place)

    def turn(self) -> bool:
        return bool(lib.fshm_wait_turn(self.limiter, self.place, 0, self.looked))

    def served(self, cost: int) -> None:
        lib.fshm_wait_served(self.limiter, self.place, cost, 0)

    def leave(self) -> None:
        lib.fshm_wait_leave(self.limiter, self.place)


class Place:
    """Of a thread."""

    def __init__(self, states: States, raw: bytes, order: Order = ALIKE) -> None:
        self._given = states, raw, order
        self._native: _Native | None = None

    def join(self) -> None:
        """Go to the end of the queue."""
        self._native = _Native(*self._given, -1)

    def turn(self) -> bool:
        """Whether the caller is next. Called at least every 0.2 s: a caller that does not call it
        is passed over."""
        assert self._native is not None
        return self._native.turn()

    @property
    def ahead(self) -> int:
        """Callers that were before this one at the last turn()."""
        assert self._native is not None
        return int(self._native.looked.ahead)

    def sleep(self, ns: int) -> Generator[Any, Any, None]:
        """Until the caller is woken, or for so long; 0.2 s at most."""
        yield from ()
        native = self._native
        assert native is not None
        lib.fshm_wait_sleep(native.limiter, native.place, native.looked.armed, ns)

    def served(self, cost: int) -> None:
        """The caller was admitted."""
        if self._native is not None:
            self._native.served(cost)

    def leave(self) -> None:
        """Leave the queue. It is the next caller's turn then. Twice is harmless."""
        if self._native is not None:
            self._native.leave()


class _Line:
    """The callers of one event loop or hub that wait for one key, first come, first served."""

    def __init__(self, events: _Events, key: Any, native: _Native) -> None:
        self.events, self.key, self.native = events, key, native
        self.callers: deque[_InLine] = deque()
        self.count = 0  # without those that have left and are not first

    def first(self) -> _InLine | None:
        while self.callers and self.callers[0].line is None:
            self.callers.popleft()
        return self.callers[0] if self.callers else None


class _InLine(Place):
    """Of a task or a greenlet."""

    def __init__(self, events: _Events, states: States, raw: bytes, order: Order) -> None:
        super().__init__(states, raw, order)
        self._events, self._woken, self._asleep = events, False, None
        self.line: _Line | None = None
        self._since = 0

    def join(self) -> None:
        states = self._given[0]
        self._since = states.now()
        line = self._events.line(*self._given)
        line.callers.append(self)
        line.count += 1
        line.native.place.callers = line.count
        self.line = line

    def turn(self) -> bool:
        line = self.line
        assert line is not None
        self._woken = False
        if line.first() is not self:
            return False
        found = line.native.turn()
        self._events.listening[line.native.place.entry] = line
        return found

    @property
    def ahead(self) -> int:
        line = self.line
        assert line is not None
        return int(line.native.looked.ahead) + next(
            at for at, each in enumerate(e for e in line.callers if e.line) if each is self
        )

    def sleep(self, ns: int) -> Generator[Any, Any, None]:
        assert self.line is not None
        if self._woken:
            return
        if self.line.first() is self:
            ns = min(ns, _BEAT_NS)
        self._asleep = self._events.event()
        try:
            yield from self._events.wait(self._asleep, ns / 1e9)
        finally:
            self._asleep = None

    def wake(self) -> None:
        self._woken = True
        if self._asleep is not None:
            self._events.set(self._asleep)

    def served(self, cost: int) -> None:
        if self.line is not None:
            self.line.native.served(cost)

    def leave(self) -> None:
        line, self.line = self.line, None
        if line is None:
            return
        line.count -= 1
        line.native.place.callers = line.count
        was_first = line.callers[0] is self
        first = line.first()
        if first is None:
            self._events.end(line)
        elif was_first:
            native = line.native
            lib.fshm_wait_requeue(native.limiter, native.place, first._since, line.count, 0)
            first.wake()


class _Events:
    """What the lines of one event loop or hub have in common: a pipe that wake-ups are written
    to."""

    def __init__(self) -> None:
        self.lines: dict[Any, _Line] = {}
        self.listening: dict[int, _Line] = {}  # by the number of the place
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)
        self.listen(self._read, self._readable)

    def line(self, states: States, raw: bytes, order: Order) -> _Line:
        key = (states, raw, order)
        found = self.lines.get(key)
        if found is None:
            native = _Native(states, raw, order, self._write)
            found = self.lines[key] = _Line(self, key, native)
            self.listening[native.place.entry] = found
            _count_line(states.segment, 1)
        return found

    def end(self, line: _Line) -> None:
        del self.lines[line.key]
        self.listening.pop(line.native.place.entry, None)
        line.native.leave()
        _count_line(line.native.segment, -1)

    def _readable(self, *_: object) -> None:
        try:
            data = os.read(self._read, _READ)
        except BlockingIOError:
            return
        if len(data) == _READ:  # there may have been more
            woken = list(self.lines.values())
        else:
            entries = {data[i : i + _NUMBER] for i in range(0, len(data), _NUMBER)}
            found = (self.listening.get(int.from_bytes(e, sys.byteorder)) for e in entries)
            woken = [line for line in found if line is not None]
        for line in woken:
            first = line.first()
            if first is not None:
                first.wake()

    def __del__(self) -> None:
        for line in self.lines.values():
            line.native.leave()  # from here on nobody writes to the pipe
        os.close(self._read)
        os.close(self._write)

    def listen(self, fd: int, call: Callable[..., None]) -> None:
        raise NotImplementedError

    def event(self) -> Any:
        raise NotImplementedError

    def set(self, event: Any) -> None:
        raise NotImplementedError

    def wait(self, event: Any, seconds: float) -> Generator[Any, Any, None]:
        """Until the event is set, or for so many seconds."""
        raise NotImplementedError


class _OfLoop(_Events):
    """Of an asyncio event loop. It keeps no reference to the loop, whose end is its own."""

    def listen(self, fd: int, call: Callable[..., None]) -> None:
        _running_loop().add_reader(fd, call)

    def event(self) -> asyncio.Future[None]:
        return _running_loop().create_future()

    def set(self, event: asyncio.Future[None]) -> None:
        if not event.done():
            event.set_result(None)

    def wait(self, event: asyncio.Future[None], seconds: float) -> Generator[Any, Any, None]:
        timer = None
        if seconds < _FOREVER:
            timer = event.get_loop().call_later(seconds, self.set, event)
        try:
            yield from event.__await__()
        finally:
            if timer is not None:
                timer.cancel()


class _OfGevent(_Events):
    """Of a gevent hub."""

    def listen(self, fd: int, call: Callable[..., None]) -> None:
        self._io = sys.modules["gevent"].get_hub().loop.io(fd, 1)
        self._io.start(call)

    def event(self) -> Any:
        from gevent.event import Event

        return Event()

    def set(self, event: Any) -> None:
        event.set()

    def wait(self, event: Any, seconds: float) -> Generator[Any, Any, None]:
        yield from ()
        event.wait(min(seconds, _FOREVER))


class _OfEventlet(_Events):
    """Of an eventlet hub."""

    def listen(self, fd: int, call: Callable[..., None]) -> None:
        hub = sys.modules["eventlet.hubs"].get_hub()
        hub.add("read", fd, call, call, call)

    def event(self) -> Any:
        from eventlet.event import Event

        return Event()

    def set(self, event: Any) -> None:
        if not event.ready():
            event.send(None)

    def wait(self, event: Any, seconds: float) -> Generator[Any, Any, None]:
        from eventlet.timeout import Timeout

        yield from ()
        with Timeout(min(seconds, _FOREVER), False):
            event.wait()


# Of event loops and hubs. Each belongs to one thread, which alone uses it.
_events: WeakKeyDictionary[Any, _Events] = WeakKeyDictionary()


def _running_loop() -> asyncio.AbstractEventLoop:
    from asyncio import get_running_loop

    return get_running_loop()


def _events_of(owner: Any, kind: type[_Events]) -> _Events:
    found = _events.get(owner)
    if found is None:
        found = _events[owner] = kind()
    return found


def place_of_task(states: States, raw: bytes, order: Order = ALIKE) -> Place:
    """For a task of the running asyncio event loop."""
    return _InLine(_events_of(_running_loop(), _OfLoop), states, raw, order)


def place_of_thread(states: States, raw: bytes, order: Order = ALIKE) -> Place:
    """For a thread; or for a greenlet, where the program is patched."""
    if greenlets.must_yield():
        if "gevent.monkey" in sys.modules:
            hub, kind = sys.modules["gevent"].get_hub(), _OfGevent
        else:
            hub, kind = sys.modules["eventlet.hubs"].get_hub(), _OfEventlet
        return _InLine(_events_of(hub, kind), states, raw, order)
    return Place(states, raw, order)


class _Watch:
    """The thread that passes on the wake-ups of other processes, of one segment."""

    def __init__(self) -> None:
        self.lines, self.until = 0, 0.0  # until: of time.monotonic()


_watches: dict[Segment, _Watch] = {}
_lock = threading.Lock()
_KEEP = 5.0  # seconds without a line, after which a thread ends


def _count_line(segment: Segment, more: int) -> None:
    """A line has begun, or ended: a thread watches as long as there are any."""
    with _lock:
        watch = _watches.get(segment)
        begun = watch is not None
        if watch is None:
            if more < 0:
                return  # it was of before a fork
            watch = _watches[segment] = _Watch()
        watch.lines += more
        watch.until = time.monotonic() + _KEEP
    if not begun:
        _start_thread(_watching, (segment, watch))


def _watching(segment: Segment, watch: _Watch) -> None:
    while True:
        lib.fshm_wait_watch(segment._handle, 1_000_000_000)
        with _lock:
            if watch.lines <= 0 and time.monotonic() > watch.until:
                if _watches.get(segment) is watch:
                    del _watches[segment]
                return


def _start_thread(call: Callable[..., None], args: tuple[Any, ...]) -> None:
    """A thread of the system, also where threads are patched to be greenlets."""
    get_original = getattr(sys.modules.get("gevent.monkey"), "get_original", None)
    if get_original is not None:
        get_original("_thread", "start_new_thread")(call, args)
        return
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and greenlets.must_yield():
        patcher.original("_thread").start_new_thread(call, args)
        return
    threading.Thread(target=call, args=args, name="fast-shm-wait", daemon=True).start()


def _after_fork() -> None:
    """The parent's threads, loops and hubs do not run in the child."""
    global _lock
    _lock = threading.Lock()
    _watches.clear()
    for events in list(_events.values()):
        events.lines.clear()
        events.listening.clear()
    _events.clear()


os.register_at_fork(after_in_child=_after_fork)
