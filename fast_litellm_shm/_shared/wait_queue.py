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
import posix  # eventlet patches os.read(), and does not let a hub call that
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import count, islice
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary, ref

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
_COUNTED = 0.1  # seconds: how old a task's position in its line may be

_numbers = count(1)  # of the callers in lines


class Order(NamedTuple):
    """Who a caller is, for the order in which callers are served. tenant: hash of its name, 0: of
    none. weight: in thousandths."""

    tenant: int = 0
    weight: int = 1000
    priority: int = 0


ALIKE = Order()


class Service:
    """What a caller's tenant was served, of a place that may be gone."""

    def __init__(self, native: _Native) -> None:
        self._limiter = native.limiter
        self._place = ffi.new("fshm_place *", native.place[0])

    def correct(self, tokens: int) -> None:
        """So many tokens more, or fewer, were used in the end."""
        lib.fshm_wait_correct(self._limiter, self._place, tokens, 0)


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

    def served(self, cost: int) -> Service:
        lib.fshm_wait_served(self.limiter, self.place, cost, 0)
        return Service(self)

    def leave(self) -> None:
        lib.fshm_wait_leave(self.limiter, self.place)


class Place:
    """Of a thread. since: when the caller came, where it has waited for another key before (of
    :attr:`came`); 0: now."""

    def __init__(self, states: States, raw: bytes, order: Order = ALIKE, since: int = 0) -> None:
        self._given = states, raw, order
        self._native: _Native | None = None
        self.came = since

    def join(self) -> None:
        """Go to the end of the queue."""
        native = self._native = _Native(*self._given, -1)
        if self.came:
            lib.fshm_wait_requeue(native.limiter, native.place, self.came, 1, 0)
        self.came = native.place.since

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

    def ask(self, idle: bool) -> None:
        """Ask the other processes that hold a permit of the key (idle: an idle one) to give one
        back: see :func:`watch`."""
        self._ask(self._native, idle)

    def _ask(self, native: _Native | None, idle: bool) -> None:
        assert native is not None
        raw = self._given[1]
        lib.fshm_wait_ask(native.limiter, raw, len(raw), idle, native.place)

    def took(self) -> None:
        """The caller, that leaves now, has one permit. Was it woken for one, nobody need look for
        more."""
        self._took(self._native)

    def _took(self, native: _Native | None) -> None:
        if native is not None:
            native.place.took = 1

    def served(self, cost: int) -> Service | None:
        """The caller was admitted."""
        return None if self._native is None else self._native.served(cost)

    def leave(self) -> None:
        """Leave the queue. It is the next caller's turn then. Twice is harmless."""
        if self._native is not None:
            self._native.leave()


class _Line:
    """The callers of one event loop or hub that wait for one key, first come, first served.

    An exception of a signal handler may strike anywhere in here, also in leave(). So the line
    refers to its callers weakly, and a caller that is deleted leaves once more. Each step of that
    may be done twice."""

    def __init__(self, events: _Events, key: tuple[States, bytes, Order]) -> None:
        self.events, self.key = events, key
        self.callers: OrderedDict[int, ref[_InLine]] = OrderedDict()  # by their numbers
        self.head: int | None = None  # the number of the caller that was last told that it is first
        self.native: _Native | None = None
        self.entry: int | None = None  # in events.listening
        self.watch: _Watch | None = None
        self._counted = 0.0

    def open(self) -> _Native:
        """Its place in the queue."""
        native, events = self.native, self.events
        before: _Native | None = None
        if events.fd < 0:
            events.open()
        if native is not None and native.place.fd != events.fd:
            native, before = None, native
        if native is None:
            native = self.native = _Native(*self.key, events.fd)
            self.head = next(iter(self.callers), None)
            self.listen()
        if before is not None:
            since, callers = before.place.since, len(self.callers)
            lib.fshm_wait_requeue(native.limiter, native.place, since, callers, 0)
            before.leave()
        if self.watch is None:
            _watch(native.segment, self)
        return native

    def listen(self) -> None:
        """Be told of the wake-ups of its place, which may be another one by now."""
        assert self.native is not None
        place, listening = self.native.place, self.events.listening
        entry = int(place.entry) if place.owner else None
        if entry is not None:
            listening[entry] = self
        if self.entry not in (None, entry) and listening.get(self.entry) is self:
            del listening[self.entry]
        self.entry = entry

    def first(self) -> _InLine | None:
        while self.callers:
            number, caller = next(iter(self.callers.items()))
            found = caller()
            if found is not None:
                return found
            self.callers.pop(number, None)
        return None

    def wake(self, callers: int) -> None:
        """Tell so many callers: each is first when the one before it has been served. If the first
        told the second, and so on, the loop would come round once for each."""
        self.first()
        for caller in list(islice(self.callers.values(), callers)):
            found = caller()
            if found is not None:
                found.wake()

    def sort(self) -> None:
        """By the time when they came: one has waited elsewhere before."""
        found = [(number, caller()) for number, caller in self.callers.items()]
        living = [(number, each) for number, each in found if each is not None]
        living.sort(key=lambda one: one[1].came)
        self.callers = OrderedDict((number, ref(each)) for number, each in living)

    def position(self, caller: _InLine) -> int:
        """How many are before the caller, _COUNTED ago at most. All are counted at once: if each
        task of ten thousand counted for itself, they would do nothing else."""
        now = time.monotonic()
        if now - self._counted > _COUNTED:
            for at, each in enumerate(list(self.callers.values())):
                found = each()
                if found is not None:
                    found.at = at
            self._counted = now
        return caller.at

    def move_up(self) -> None:
        """A caller has left. If it was the first, tell the one that is first now."""
        first = self.first()
        if first is None:
            self.end()
            return
        native, waiting = self.native, len(self.callers)
        if first.number == self.head:
            self.count()
            return
        if native is not None:
            lib.fshm_wait_requeue(native.limiter, native.place, first.came, waiting, 0)
        first.wake()
        self.head = first.number

    def count(self) -> None:
        if self.native is not None:
            lib.fshm_wait_count(self.native.limiter, self.native.place, len(self.callers))

    def end(self) -> None:
        events, native = self.events, self.native
        if events.lines.get(self.key) is self:
            del events.lines[self.key]
        if self.entry is not None and events.listening.get(self.entry) is self:
            del events.listening[self.entry]
        if native is not None:
            native.leave()
        if self.watch is not None:
            self.watch.lines.discard(self)
        self.watch = None  # last: what an exception cuts short is done again


class _InLine(Place):
    """Of a task or a greenlet."""

    line: _Line | None = None

    def __init__(self, events: _Events, *given: Any) -> None:
        super().__init__(*given)
        self._events, self._woken = events, False
        self._asleep: Any = None  # an event
        self.number, self.at = next(_numbers), 0

    def join(self) -> None:
        again, self.came = self.came, self.came or self._given[0].now()
        line = self.line = self._events.line(self._given)
        line.callers[self.number] = ref(self)
        if again:
            line.sort()
        self.at = len(line.callers) - 1
        line.open()
        line.count()
        if again and line.first() is self:
            line.move_up()

    def turn(self) -> bool:
        line = self.line
        assert line is not None
        self._woken = False
        if line.first() is not self:
            return False
        found = line.open().turn()
        line.listen()
        return found

    @property
    def ahead(self) -> int:
        line = self.line
        assert line is not None
        native = line.open()
        others = lib.fshm_wait_ahead(native.limiter, native.place, self.came, 0)
        return int(others) + line.position(self)

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

    def ask(self, idle: bool) -> None:
        if self.line is not None:
            self._ask(self.line.open(), idle)

    def took(self) -> None:
        self._took(None if self.line is None else self.line.native)

    def wake(self) -> None:
        self._woken = True
        if self._asleep is not None:
            self._events.set(self._asleep)

    def served(self, cost: int) -> Service | None:
        return None if self.line is None else self.line.open().served(cost)

    def leave(self) -> None:
        line = self.line
        if line is not None:
            line.callers.pop(self.number, None)
            line.move_up()
            self.line = None  # last: what an exception cuts short is done again

    def __del__(self) -> None:
        self.leave()


class _Events:
    """What the lines of one event loop or hub have in common: a pipe that wake-ups are written
    to."""

    _read = fd = -1

    def __init__(self) -> None:
        self.lines: dict[Any, _Line] = {}
        self.listening: dict[int, _Line] = {}  # by the number of the place
        self._calls: deque[Callable[[], object]] = deque()
        self._pid = os.getpid()
        self.open()

    def open(self) -> None:
        """Where the process has no descriptor left, lines look by themselves, every 0.2 s, and try
        again."""
        try:
            self._read, self.fd = os.pipe()
            os.set_blocking(self._read, False)
            os.set_blocking(self.fd, False)
            self.listen(self._read, self._readable)
        except OSError:
            self.close_pipe()

    def line(self, key: tuple[States, bytes, Order]) -> _Line:
        found = self.lines.get(key)
        if found is None:
            found = self.lines[key] = _Line(self, key)
        return found

    def _readable(self, *_: object) -> None:
        if self._pid != os.getpid():  # the child of a fork goes on with its parent's hub
            self.deaf()
            return
        try:
            data = posix.read(self._read, _READ)
        except BlockingIOError:
            data = b""
        while self._calls:
            self.spawn(self._calls.popleft())
        for entry, times in Counter(memoryview(data).cast("Q") if data else ()).items():
            line = self.listening.get(entry)
            if line is not None:
                line.wake(times)
        if len(data) == _READ:  # there may have been more
            for line in list(self.lines.values()):
                line.wake(1)

    def call_soon(self, call: Callable[[], object]) -> None:
        """Have the hub call it, in a greenlet of its own. Called by any thread."""
        self._calls.append(call)
        with suppress(OSError):  # there is something to read already
            posix.write(self.fd, b"\xff" * _NUMBER)

    def close(self) -> None:
        """Before the pipe is closed: the core writes to it for the places of these lines."""
        for line in list(getattr(self, "lines", {}).values()):  # __init__ may have raised
            line.end()
        self.close_pipe()

    def close_pipe(self) -> None:
        fds, self._read, self.fd = (self._read, self.fd), -1, -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def __del__(self) -> None:
        self.close()

    def listen(self, fd: int, call: Callable[..., None]) -> None:
        raise NotImplementedError

    def deaf(self) -> None:
        """Listen no longer."""

    def spawn(self, call: Callable[[], object]) -> None:
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
        if not event.done() and not event.get_loop().is_closed():
            event.set_result(None)

    def wait(self, event: asyncio.Future[None], seconds: float) -> Generator[Any, Any, None]:
        # No generator for all those that are not first.
        return self._timed(event, seconds) if seconds < _FOREVER else event.__await__()

    def _timed(self, event: asyncio.Future[None], seconds: float) -> Generator[Any, Any, None]:
        timer = event.get_loop().call_later(seconds, self.set, event)
        try:
            yield from event.__await__()
        finally:
            timer.cancel()


class _OfGevent(_Events):
    """Of a gevent hub."""

    def listen(self, fd: int, call: Callable[..., None]) -> None:
        # ref: the program may end, or wait for all of its greenlets, while nobody waits here.
        self._io = sys.modules["gevent"].get_hub().loop.io(fd, 1, ref=False)
        self._io.start(call)

    def deaf(self) -> None:
        self._io.stop()

    def spawn(self, call: Callable[[], object]) -> None:
        sys.modules["gevent"].spawn(call)

    def event(self) -> Any:
        return import_module("gevent.event").Event()

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

    def spawn(self, call: Callable[[], object]) -> None:
        sys.modules["eventlet"].spawn_n(call)

    def event(self) -> Any:
        return import_module("eventlet.event").Event()

    def set(self, event: Any) -> None:
        if not event.ready():
            event.send(None)

    def wait(self, event: Any, seconds: float) -> Generator[Any, Any, None]:
        yield from ()
        with import_module("eventlet.timeout").Timeout(min(seconds, _FOREVER), False):
            event.wait()


# Of event loops and hubs. Each belongs to one thread, which alone uses it.
_events: WeakKeyDictionary[Any, _Events] = WeakKeyDictionary()


def _running_loop() -> asyncio.AbstractEventLoop:
    found: Any = sys.modules.get("asyncio") or import_module("asyncio")
    return found.get_running_loop()  # type: ignore[no-any-return]


def _events_of(owner: Any, kind: type[_Events]) -> _Events:
    found = _events.get(owner)
    if found is None:
        if kind is _OfLoop:  # a loop that is closed may live on, in a cycle
            for each in _events.keyrefs():  # list(_events) fails where another thread adds one
                loop = each()
                if loop not in (None, owner) and getattr(loop, "is_closed", bool)():
                    closed = _events.pop(loop, None)
                    if closed is not None:
                        closed.close()
        found = _events[owner] = kind()
    return found


def _events_of_hub() -> _Events | None:
    """Where the program is patched."""
    if not greenlets.must_yield():
        return None
    if greenlets.patched_by() == "gevent":
        return _events_of(sys.modules["gevent"].get_hub(), _OfGevent)
    return _events_of(sys.modules["eventlet.hubs"].get_hub(), _OfEventlet)


def place_of_task(states: States, raw: bytes, order: Order = ALIKE, since: int = 0) -> Place:
    """For a task of the running asyncio event loop."""
    return _InLine(_events_of(_running_loop(), _OfLoop), states, raw, order, since)


def place_of_thread(states: States, raw: bytes, order: Order = ALIKE, since: int = 0) -> Place:
    """For a thread; or for a greenlet, where the program is patched."""
    events = _events_of_hub()
    if events is not None:
        return _InLine(events, states, raw, order, since)
    return Place(states, raw, order, since)


class Keeper(Protocol):
    """What keeps permits that it does not use."""

    def _asked(self) -> None:
        """A caller of another process may have asked for one: :meth:`Place.ask`."""


class _Watch:
    """The thread that passes on the wake-ups of other processes, of one segment.

    Without locks: the garbage collector may end a line in the middle of any of this, in the same
    thread."""

    def __init__(self) -> None:
        self.lines: set[_Line] = set()
        # By id, with the hub whose greenlets use it.
        self.keepers: dict[int, tuple[ref[Keeper], _Events | None]] = {}
        self.until = 0.0  # of time.monotonic()
        self.begun = self.over = False
        self.threads = [
            1
        ]  # that may watch: an exception that strikes as one starts may start another

    def keep(self, keeper: Keeper, events: _Events | None) -> None:
        number = id(keeper)
        gone = self.keepers
        self.keepers[number] = ref(keeper, lambda _: gone.pop(number, None)), events

    def asked(self) -> None:
        for found, events in list(self.keepers.values()):
            keeper = found()
            if keeper is not None and events is None:
                keeper._asked()
            elif keeper is not None and events is not None:
                events.call_soon(keeper._asked)


_watches: dict[Segment, _Watch] = {}
_KEEP = 5.0  # seconds without a line, after which a thread ends


def _watch(segment: Segment, line: _Line) -> None:
    """A thread watches as long as there are lines."""
    while True:
        found = line.watch = _watches.setdefault(segment, _Watch())
        found.lines.add(line)
        if line.watch is not found:  # it has ended meanwhile
            found.lines.discard(line)
        if not found.over:  # after the line is in it: pairs with _watching()
            break
        _drop_watch(segment, found)
    _begin(segment, found)


def watch(segment: Segment, keeper: Keeper) -> None:
    """Call the keeper's ``_asked()``, in a thread or greenlet of its own, as long as the keeper
    lives."""
    events = _events_of_hub()
    while True:
        found = _watches.setdefault(segment, _Watch())
        found.keep(keeper, events)
        if not found.over:
            break
        _drop_watch(segment, found)
    _begin(segment, found)


def _begin(segment: Segment, found: _Watch) -> None:
    found.until = time.monotonic() + _KEEP
    if found.begun:
        return
    found.begun = True
    try:
        _start_thread(_watching, (segment, found))
    except BaseException as error:
        found.begun = False  # the next line tries again
        if not isinstance(error, RuntimeError):
            raise
        # No more threads: lines look by themselves, every 0.2 s.


def _watching(segment: Segment, found: _Watch) -> None:
    try:
        found.threads.pop()
    except IndexError:
        return
    while not found.over:
        if lib.fshm_wait_watch(segment._handle, 1_000_000_000):
            found.asked()
        if found.lines or found.keepers or time.monotonic() < found.until:
            continue
        found.over = True
        _drop_watch(segment, found)
        for line in list(found.lines):  # that came meanwhile
            if line.watch is found:
                _watch(segment, line)
        for each, _ in list(found.keepers.values()):
            keeper = each()
            if keeper is not None:
                watch(segment, keeper)


def _drop_watch(segment: Segment, found: _Watch) -> None:
    if _watches.get(segment) is found:
        _watches.pop(segment, None)


def _start_thread(call: Callable[..., None], args: tuple[Any, ...]) -> None:
    """A thread of the system, also where threads are patched to be greenlets."""
    library = greenlets.patched_by()
    if library == "gevent":
        monkey = sys.modules["gevent.monkey"]
        monkey.get_original("_thread", "start_new_thread")(call, args)
    elif library == "eventlet":
        patcher = sys.modules["eventlet.patcher"]
        patcher.original("_thread").start_new_thread(call, args)
    else:
        threading.Thread(target=call, args=args, name="fast-shm-wait", daemon=True).start()


def _after_fork() -> None:
    """The parent's threads, loops and hubs do not run in the child."""
    _watches.clear()
    for events in list(_events.values()):
        for line in list(events.lines.values()):
            line.watch = None  # its place is the parent's: the core knows
        events.lines.clear()
        events.listening.clear()
    _events.clear()


os.register_at_fork(after_in_child=_after_fork)
