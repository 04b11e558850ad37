"""The connection pool of the PyPI package fast-litellm, with limits that all workers share."""

from __future__ import annotations

import functools
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AsyncContextDecorator, suppress
from types import TracebackType
from typing import Any
from weakref import WeakValueDictionary

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import log, performance, settings, wait_queue
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm._shared.named_limiter import SharedLimits, states_of
from fast_litellm_shm._shared.native import Connection, PoolCore, Use, address, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters.rate import deadline_ns
from fast_litellm_shm.limiters.waiting import (
    ASYNCIO,
    BLOCKING,
    NEVER,
    Steps,
    Waits,
    in_turn,
    run,
    run_async,
)

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.")
_HELD, _MOVE = "held", "move"  # a Use holds a connection; the caller has to wait in the other queue

_pools: WeakValueDictionary[int, SimpleConnectionPool] = WeakValueDictionary()  # by id


def _living() -> list[SimpleConnectionPool]:
    """While other threads make pools: a loop over a WeakSet would fail."""
    return [pool for each in _pools.valuerefs() if (pool := each()) is not None]


def _after_fork() -> None:
    for pool in _living():
        pool._forget()


os.register_at_fork(after_in_child=_after_fork)


def _check_endpoint(endpoint: object) -> str:
    if not isinstance(endpoint, str):
        raise TypeError(f"endpoint must be a str such as 'https://host', not {endpoint!r}")
    if not _SCHEME.match(endpoint):
        raise ValueError(
            f"endpoint must be a URL with a scheme, like 'https://host', not {endpoint!r}"
        )
    return endpoint


def _check_id(connection_id: object) -> str:
    if not isinstance(connection_id, str):
        raise TypeError(f"connection id must be a str, not {connection_id!r}")
    return connection_id


class SimpleConnectionPool(PoolCore):
    """Limits the connections to each endpoint, and of the pool in all, over all workers together.

    pool_name: pools of one name share their limits in all processes, also of unrelated programs of
    the same user. max_per_endpoint, max_total: 1 .. 100,000; idle connections count. idle_timeout:
    seconds after which an idle connection is closed and not used again. Defaults: 10, 100 and
    300 s; or FAST_LITELLM_POOL_MAX_PER_ENDPOINT, FAST_LITELLM_POOL_MAX_TOTAL,
    FAST_LITELLM_POOL_IDLE_TIMEOUT; or ``max_connections_per_endpoint``, ``max_total_connections``
    and ``idle_timeout_seconds`` in the file that FAST_LITELLM_FEATURE_CONFIG names.

    A connection belongs to the process that opened it; no other process uses it. Connections of a
    dead process do not count. A forked child begins without connections. Ids are never used again.

    :meth:`bind` gives each id a real connection object.
    """

    def __init__(
        self,
        pool_name: str = "default",
        *,
        max_per_endpoint: int | None = None,
        max_total: int | None = None,
        idle_timeout: float | None = None,
        segment: Segment | None = None,
    ) -> None:
        if not isinstance(pool_name, str):
            raise TypeError(f"pool_name must be a str, not {pool_name!r}")
        defaults = settings.pool_defaults()
        self._per_endpoint = limits.in_flight(
            "SimpleConnectionPool",
            "max_per_endpoint",
            defaults.max_per_endpoint if max_per_endpoint is None else max_per_endpoint,
        )
        self._total = limits.in_flight(
            "SimpleConnectionPool",
            "max_total",
            defaults.max_total if max_total is None else max_total,
        )
        idle = defaults.idle_timeout if idle_timeout is None else idle_timeout
        if isinstance(idle, bool) or not isinstance(idle, (int, float)):
            raise TypeError(f"idle_timeout must be a number of seconds, not {idle!r}")
        if not 0 < idle < 10**9:
            raise ValueError(f"idle_timeout must be more than 0 and less than 1e9 s, not {idle!r}")
        self._name, self._idle = pool_name, float(idle)
        self._slots = SharedLimits(
            (self._per_endpoint,), name=f"pool {pool_name}", segment=segment, on_full="deny"
        )
        self._segment = self._slots.segment
        self._totals = SharedLimits(
            (self._total,), name=f"pool-total {pool_name}", segment=self._segment, on_full="deny"
        )
        # Of those that wait, by their queue: tasks that wait for the same stand in one line.
        self._states = states_of(self._slots), states_of(self._totals)
        self._prefix = f"{self._segment.geometry().instance:016x}"
        self._connect: Callable[[str], Any] | None = None
        self._close: Callable[[Any], object] | None = None
        self._is_healthy: Callable[[Any], bool] | None = None
        self._forget()
        _pools[id(self)] = self

    @property
    def name(self) -> str:
        """The name that processes share by."""
        return self._name

    def bind(
        self,
        connect: Callable[[str], Any],
        close: Callable[[Any], object] | None = None,
        is_healthy: Callable[[Any], bool] | None = None,
    ) -> None:
        """Give each id a real connection: ``connect(endpoint)`` opens it, ``close(object)`` closes
        it, ``is_healthy(object)`` says whether it can be used again. They are called in this
        process only; ``close`` by any thread (for an idle connection that another process
        needs)."""
        for name, value in (("connect", connect), ("close", close), ("is_healthy", is_healthy)):
            if not callable(value) and not (value is None and name != "connect"):
                raise TypeError(f"bind: {name} must be callable, not {value!r}")
        self._connect, self._close, self._is_healthy = connect, close, is_healthy

    def object_of(self, connection_id: str) -> Any:
        """The object that connect() returned for this id; None without bind(). Raises KeyError for
        an unknown id."""
        found = self._lookup(connection_id)
        if found is None:
            raise KeyError(connection_id)
        return found.object

    def health_check(self, connection_id: str) -> bool:
        """Whether the connection can be used: this process has it, no operator has released its
        permit, it is not idle for too long, and the bound is_healthy() says so. (is_healthy() is
        called here and by cleanup(), not by get_connection().)"""
        found = self._lookup(_check_id(connection_id))
        if found is None or not found.held or found.idle_seconds > self._idle:
            return False
        return self._is_healthy is None or bool(self._is_healthy(found.object))

    def remove_connection(self, connection_id: str) -> None:
        """Close it and release its permit. An unknown id, or a second call, is harmless."""
        self._shut(self._drop(_check_id(connection_id)))

    def cleanup(self) -> int:
        """Close this process's connections that are idle for too long or not healthy, and release
        the permits of dead processes. Returns how many were closed."""
        closed = self._close_stale(None)
        lib.fshm_reap(self._segment._handle, 0)
        return closed

    def close(self) -> None:
        """Close all connections of this process. If closing one raises, the others are closed too;
        then the first exception is raised."""
        self._shut_all([self._drop(connection_id) for connection_id in self._connections()])

    def get_stats(self) -> dict[str, Any]:
        """Sums over all processes: active_connections, idle_connections, total_connections,
        max_total_connections, and endpoints: {endpoint: available_connections, max_connections}."""
        names: dict[int, str] = {}
        total, idle = 0, Counter[int]()
        for row in Inspection(self._segment).permits(limiter=self._slots.name):
            if row.pid is not None:
                total += 1
                idle[row.key_hash] += row.idle
                if names.get(row.key_hash, "#").startswith("#"):
                    names[row.key_hash] = row.key
        return {
            "active_connections": total - idle.total(),
            "idle_connections": idle.total(),
            "total_connections": total,
            "max_total_connections": self._totals.limits[0].n,
            "endpoints": {
                name: {
                    "available_connections": idle[key_hash],
                    "max_connections": self._slots.limits[0].n,
                }
                for key_hash, name in sorted(names.items(), key=lambda item: item[1])
            },
        }

    def connection(self, endpoint: str, timeout: float | None = 0) -> Use:
        """``with pool.connection(endpoint) as conn:`` the bound object (without bind(), the id).
        Waits up to ``timeout`` seconds for a connection (None: for ever), then raises
        PermitTimeoutError. Callers are served in the order in which they came, over all processes,
        but for 20 ms: a connection stays in its process for a caller that came up to 20 ms after
        the first of all. For a caller that waits, another process closes an idle connection. A
        connection whose block raised is closed, since its state is unknown.
        As a decorator, it holds a connection during each call of the function.

        An exception from a signal handler never leaks a connection here, wherever it is raised.
        With get_connection() it can: if it is raised before the caller has the id."""
        return self._use(endpoint, timeout)

    def connection_async(self, endpoint: str, timeout: float | None = 0) -> _AsyncUse:
        """connection() for asyncio. To wait needs no thread. connect() is called in a thread of its
        own, close() and is_healthy() on the event loop or in any thread."""
        return _AsyncUse(self, endpoint, timeout)

    def _around(self, endpoint: str, timeout: float | None, function: Any) -> Any:
        """Called by a Use that decorates a function."""

        @functools.wraps(function)
        def inner(*args: Any, **kwargs: Any) -> Any:
            with self._use(endpoint, timeout):
                return function(*args, **kwargs)

        return inner

    _deadline = staticmethod(deadline_ns)

    def _wait(self, use: Use, endpoint: str, deadline: int, timeout: float | None) -> None:
        """Called by a Use, which holds a connection afterwards."""
        run(self._steps(BLOCKING, use, endpoint, deadline, timeout))

    def _steps(
        self, waits: Waits, use: Use, endpoint: str, deadline: int, timeout: float | None
    ) -> Steps[None]:
        """Wait in the queue of the endpoint, or of the whole pool where the endpoint has room and
        the pool has none. In neither, the caller holds a permit."""
        raw = _check_endpoint(endpoint).encode("utf-8", "surrogatepass")
        queues = (self._states[0], raw), (self._states[1], b"")
        opening: list[Connection] = []
        at, came = 0, 0

        def attempt() -> Steps[tuple[str | None, int | None]]:
            yield from ()
            got = tried()
            if got == _HELD:
                place.took()
            if got in (_HELD, _MOVE):
                return got, None
            if deadline > monotonic_ns():
                place.ask(idle=not at)
            return None, NEVER

        def passing() -> str | None:
            """What is idle in this process may be used, although another's caller is first."""
            if at or not use._idle():
                return None
            place.took()
            return _HELD

        def tried() -> str:
            got = self._attempt(use, endpoint, at)
            if not isinstance(got, Connection):
                return got
            opening.append(got)
            return _HELD

        try:
            found: str | None = None
            if waits is ASYNCIO and not any(of.waited_for(key) for of, key in queues):
                found = tried()
            while found != _HELD:
                place = waits.place(*queues[at], since=came)
                found = yield from in_turn(
                    waits, place, attempt, lambda: None, deadline, passing=passing
                )
                if found != _HELD and deadline <= monotonic_ns():
                    raise exceptions.PermitTimeoutError(
                        f"pool {self._name!r}: no connection to {endpoint} within {timeout} s: "
                        f"{self._slots.limits[0].n} to an endpoint, {self._totals.limits[0].n} in "
                        "all; wait longer, or raise the limits"
                    )
                at, came = 1 - at, place.came
            if opening:
                yield from self._opened(waits, use, opening)
        except BaseException:
            for each in opening:
                self._release(each)  # the traceback may keep it
            raise

    def _attempt(self, use: Use, endpoint: str, at: int) -> Connection | str:
        """Hold an idle connection (_HELD), or get the permits for a new one; _MOVE: to the other
        queue; else the limit that was reached. at: 0: in the endpoint's queue, 1: in the pool's."""
        while True:
            if use._idle():
                return _HELD
            # Who is in the endpoint's queue goes behind those that wait for room in the pool.
            got = self._permits(endpoint, behind=not at)
            if isinstance(got, Connection):
                return got
            if got == ("endpoint", "pool")[1 - at]:
                return _MOVE
            if not any(
                pool._give_up(None if at else endpoint)
                for pool in _living()
                if pool is not self and pool._name == self._name and pool._segment is self._segment
            ):
                return got

    def _opened(self, waits: Waits, use: Use, opening: list[Connection]) -> Steps[None]:
        """Connect, and let the Use hold the connection. A thread that connects for a caller that is
        gone keeps the permits: the connection is idle then."""
        found = opening.pop()
        if self._connect is None:
            self._connected(found)
        else:
            yield from waits.connect(
                lambda: self._connected(found), use._hold, lambda: self._release(found)
            )
        use._hold(found)

    def _asked(self) -> None:
        """Close an idle connection for each caller of another process that has asked for it."""
        handle = self._slots._handle
        for endpoint in {found.endpoint for found in self._connections().values() if found.idle}:
            raw = endpoint.encode("utf-8", "surrogatepass")
            while lib.fshm_wait_asked(handle, raw, len(raw)) and self._give_up(endpoint):
                pass
        handle = self._totals._handle
        while any(found.idle for found in self._connections().values()):
            if not (lib.fshm_wait_asked(handle, b"", 0) and self._give_up(None)):
                return

    def _give_up(self, endpoint: str | None) -> bool:
        """Close the connection (to the endpoint; None: to any) that is idle for the longest time.
        False: none is idle."""
        for found in self._longest_idle():
            if endpoint in (None, found.endpoint):
                dropped = self._drop_idle(found.id)
                if dropped is not None:
                    try:
                        self._shut(dropped)
                    except Exception:
                        log.exception(
                            "pool %r: an idle connection to %s, which another caller needs, could "
                            "not be closed; its permit is released",
                            self._name,
                            found.endpoint,
                        )
                    return True
        return False

    def _longest_idle(self) -> list[Connection]:
        return sorted(
            (found for found in self._connections().values() if found.idle),
            key=lambda found: -found.idle_seconds,
        )

    def _forget(self) -> None:
        """Begin without connections: those of before a fork belong to the parent."""
        self._watched = False
        slots, totals = self._slots._handle, self._totals._handle
        idle_ns = int(self._idle * 1e9)
        self._bind_core((slots, totals), address(slots), address(totals), idle_ns)
        self._measure(*performance.measured_by("connection_pool", "get_connection", self._segment))

    def _open(self, endpoint: object) -> Connection | None:
        """Called by the native part when there is no idle connection to use: a new one, which is
        not in the pool yet; None at the limits."""
        found = self._permits(_check_endpoint(endpoint))
        return self._connected(found) if isinstance(found, Connection) else None

    def _permits(self, endpoint: str, behind: bool = False) -> Connection | str:
        """A connection that is not opened yet; or the limit that was reached: "endpoint" or "pool",
        or "full", if the segment is. behind: "pool" also where callers wait for room in it."""
        connection_id = f"conn-{self._prefix}-{lib.fshm_unique(self._segment._handle)}"
        found = self._add(connection_id, endpoint, behind)
        if found == "pool" and not behind:
            # Close this process's idle connections until there is room for this one.
            for each in self._longest_idle():
                self._shut(self._drop_idle(each.id))
                if (found := self._add(connection_id, endpoint)) != "pool":
                    break
        if found == "damaged":
            self._slots._failed(lib.FSHM_E_DAMAGED)
        return found

    def _connected(self, found: Connection) -> Connection:
        """Open it, with the bound connect()."""
        made = None
        try:
            if self._connect is not None:
                made = self._connect(found.endpoint)
                self._set_object(found, made)
            if not self._watched:
                wait_queue.watch(self._segment, self)  # by now there is a hub, if it needs one
                self._watched = True
        except BaseException:
            self._shut(found, made)
            raise
        return found

    def _close_stale(self, endpoint: str | None) -> int:
        """Close idle connections (to the endpoint; None: all) that may not be used again. Returns
        how many. A connection that another thread takes meanwhile stays open."""
        stale = [
            self._drop_idle(found.id)
            for found in self._connections().values()
            if endpoint in (None, found.endpoint) and found.idle and not self.health_check(found.id)
        ]
        return self._shut_all(stale)

    def _odd(self, connection_id: object) -> None:
        """Called by return_connection() for an id that is not in use here: unknown, of another
        process, or returned already. The counts do not change. A connection whose permit an
        operator has released is closed."""
        found = self._lookup(_check_id(connection_id))
        if found is not None and not found.idle and not found.held:
            self.remove_connection(found.id)

    def _shut(self, found: Connection | None, made: object = None) -> None:
        """Close the object of a connection that has left the pool, then release its permits. In
        this order, or the endpoint would have more connections than the limit."""
        if found is None:
            return
        inner = found.object if found.object is not None else made
        try:
            if inner is not None and self._close is not None:
                self._close(inner)
        finally:
            self._release(found)

    def _shut_all(self, found: Iterable[Connection | None]) -> int:
        count, first = 0, None
        for each in found:
            try:
                self._shut(each)
            except Exception as error:
                first = first or error
            count += each is not None
        if first is not None:
            raise first
        return count

    def __del__(self) -> None:
        """Close the connections of a pool that is garbage."""
        if hasattr(self, "_prefix"):
            with suppress(Exception):
                self.close()

    def __repr__(self) -> str:
        return f"SimpleConnectionPool({self._name!r})"


class _AsyncUse(AsyncContextDecorator):
    """Use for asyncio. If it is cancelled while a thread connects, the connection becomes idle."""

    def __init__(self, pool: SimpleConnectionPool, endpoint: str, timeout: float | None) -> None:
        self._pool, self._endpoint, self._timeout = pool, endpoint, timeout
        self._use: Use | None = None

    def _recreate_cm(self) -> _AsyncUse:
        """Called by AsyncContextDecorator: each call of a decorated function is a block."""
        return _AsyncUse(self._pool, self._endpoint, self._timeout)

    async def __aenter__(self) -> Any:
        pool, endpoint = self._pool, _check_endpoint(self._endpoint)
        deadline = deadline_ns(self._timeout)
        if self._use is not None:
            raise RuntimeError("call connection_async() for each block")
        use = self._use = pool._use(endpoint, self._timeout)
        try:
            await run_async(pool._steps(ASYNCIO, use, endpoint, deadline, self._timeout))
            return use._begin()
        except BaseException:
            use._over()
            raise

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._use is not None
        self._use.__exit__(kind, error, trace)


_default: SimpleConnectionPool | None = None
_making = threading.Lock()


def _renew_lock() -> None:
    global _making
    _making = threading.Lock()  # the thread that held it does not live in the child


os.register_at_fork(after_in_child=_renew_lock)


def _pool() -> SimpleConnectionPool:
    global _default
    with _making:
        if _default is None:
            _default = SimpleConnectionPool()
    return _default


def get_connection(endpoint: str) -> str | None:
    """The id of a connection to the endpoint from the pool "default"; None at its limits."""
    return _pool().get_connection(endpoint)


def return_connection(connection_id: str) -> None:
    """Give a connection of the pool "default" back, for reuse."""
    _pool().return_connection(connection_id)


def remove_connection(connection_id: str) -> None:
    """Close a connection of the pool "default"."""
    _pool().remove_connection(connection_id)


def health_check_connection(connection_id: str) -> bool:
    """Whether a connection of the pool "default" can be used."""
    return _pool().health_check(connection_id)


def cleanup_expired_connections() -> int:
    """Close idle connections of the pool "default" that are too old. Returns how many."""
    return _pool().cleanup()


def get_connection_pool_stats() -> dict[str, Any]:
    """Statistics of the pool "default", summed over all processes."""
    return _pool().get_stats()
