"""A storage for PyPI's ``limits``: Flask-Limiter, SlowAPI and whatever else is built on it.

Importing this module registers the schemes ``shm`` and ``async+shm``. Then ``shm://my-app`` is a
storage like ``redis://...``, which all workers of the host share, with no server::

    import fast_litellm_shm.integrations.limits
    limiter = Limiter(get_remote_address, app=app, storage_uri="shm://my-app")

The host part of the URI is the segment's name (1 to 64 of ``A-Z a-z 0-9 . _ -``; none: the default
segment). Options, in the query or as keyword arguments of the storage: ``capacity`` (keys; a moving
window of n takes up to n + 1), ``mode`` (octal: ``0660``), ``names`` (``plain``, ``hashed``,
``off``), ``allow_other_owner`` (``true``, ``false``); see :class:`fast_litellm_shm.Segment`.

It has all three strategies. Each counts apart from the others, as in ``memory://``. The differences
to other storages:

- A hit that is denied consumes nothing, in the fixed window too: where the key names its limit, as
  the keys of ``limits`` do, ``incr`` beyond the limit returns what the count would be, and leaves
  it as it is.
- The sliding window counter and the moving window are exact under any number of workers.
- A cost with a fraction takes the next whole number: 7.5 takes 8.

Ranges: a fixed window counts up to 2,147,483,647; a moving window holds up to 1,048,576 hits and
needs a slot for each; a sliding window counter counts up to 131,071 for a period of a second and
twice as much for each doubling of the period; a period lasts up to 416 days. Beyond that:
ConfigurationError.
"""

from __future__ import annotations

import functools
import math
import time
import urllib.parse
from collections.abc import Callable, Coroutine
from decimal import Decimal
from numbers import Real
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

from limits.aio.storage import MovingWindowSupport as AsyncMovingWindowSupport
from limits.aio.storage import SlidingWindowCounterSupport as AsyncSlidingWindowCounterSupport
from limits.aio.storage import Storage as AsyncStorage
from limits.errors import ConfigurationError
from limits.storage import MovingWindowSupport, SlidingWindowCounterSupport, Storage
from limits.storage.base import TimestampedSlidingWindow

from fast_litellm_shm._shared import key_grammar
from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import Counts, address, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.settings import warn_not_shared
from fast_litellm_shm.exceptions import FastShmError, SegmentError
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow, SlidingWindow

__all__ = ["AsyncShmStorage", "ShmStorage"]

_P = ParamSpec("_P")
_R = TypeVar("_R")
_DAYS = 400 * 86_400  # of the limiters' limits, which are never used: each call brings its own
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _whole(base: int) -> Any:
    return lambda value: int(str(value), base) if isinstance(value, str) else value


def _boolean(value: object) -> bool:
    return value if isinstance(value, bool) else _BOOLEANS[str(value).lower()]


_OPTIONS: dict[str, Any] = {
    "capacity": _whole(10),
    "mode": _whole(8),
    "names": str,
    "allow_other_owner": _boolean,
}


def open_segment(uri: str, options: dict[str, Any]) -> Segment:
    """The segment that a URI names. options: those of the query override them.

    Raises limits' ConfigurationError where the URI cannot be understood, SegmentError where the
    segment cannot be opened.
    """
    parsed = urllib.parse.urlsplit(uri)  # not .hostname, which is lower case
    if parsed.path.strip("/") or parsed.fragment or "@" in parsed.netloc:
        raise ConfigurationError(
            f"{uri!r} has more than a segment's name: write {parsed.scheme}://my-app, and options "
            "as ?capacity=100000"
        )
    found = {**options, **dict(urllib.parse.parse_qsl(parsed.query, keep_blank_values=True))}
    for name, value in found.items():
        if name not in _OPTIONS:
            raise ConfigurationError(
                f"{uri!r}: there is no option {name!r}; there are {', '.join(_OPTIONS)}"
            )
        try:
            found[name] = _OPTIONS[name](value)
        except (ValueError, KeyError):
            raise ConfigurationError(f"{uri!r}: {name} cannot be {value!r}") from None
    try:
        return Segment(parsed.netloc or None, **found)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"{uri!r}: {error}") from None


def _whole_cost(cost: Any) -> Any:
    """``limits`` says that a cost is an int, but ``memory://`` takes fractions. Here they are
    rounded up, so that no more is admitted than the limit. The native part refuses what is no
    number."""
    if hasattr(cost, "__index__") or not isinstance(cost, (Real, Decimal)):
        return cost
    if not math.isfinite(cost) or cost < 0:
        raise ValueError(f"cost must be a finite number of 0 or more, not {cost!r}")
    return math.ceil(cost)


class _Windows(Counts):
    """The counts of a segment, for both storages. The native part has the calls for one key."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        warn_not_shared("the storage shm://", None)
        options: Any = {"segment": segment, "on_full": "raise", "cluster": False}
        most_sliding = 2**29 - 1
        self._names = (
            RateLimiter(FixedWindow(2**31 - 1, _DAYS), name=key_grammar.FIXED, **options),
            RateLimiter(SlidingWindow(most_sliding, _DAYS), name=key_grammar.SLIDING, **options),
            RateLimiter(FixedWindow(2**31 - 1, _DAYS), name=key_grammar.MOVING, **options),
        )
        handles = tuple(each._handle for each in self._names)
        self._bind(handles, *map(address, handles))

    _whole = staticmethod(_whole_cost)  # for the native part

    def _refused(self, which: int, status: int, n: int, per_ns: int) -> NoReturn:
        """Called by the native part when a call ends neither admitted nor denied."""
        if status != lib.FSHM_E_ARGUMENT:
            self._names[which]._failed(status)
        found = self._out_of_range(which, n, per_ns)
        if found is not None:
            kind = ("fixed window", "sliding window counter", "moving window")[which]
            raise ConfigurationError(
                f"a {kind} of {n} in {per_ns / 1e9:g} seconds cannot be kept in shm://: {found}"
            )
        raise SegmentError(
            f"limiter {self._names[which].name!r} in segment {self.segment.name!r} has limits of "
            "another kind than those of shm://, which counts under this name: a program made a "
            "limiter with it; give that limiter another name, then restart this program, which "
            "takes the name back"
        )

    @staticmethod
    def _out_of_range(which: int, n: int, per_ns: int) -> str | None:
        """Which argument is out of its range; None: none is."""
        largest = ffi.new("uint64_t *")
        raw = ffi.new("fshm_limit *", (1, per_ns, 0, lib.FSHM_SLIDING, 0))
        if lib.fshm_limit_check(raw, largest) != lib.FSHM_OK:
            return "the period must be a number of seconds above 0, up to 416 days"
        if which == 1 and not 1 <= n <= largest[0]:
            return f"the limit must be 1 to {largest[0]:,}; a fixed window can count more"
        if which == 2 and not 1 <= n <= lib.FSHM_MAX_MOVING:
            return (
                f"the limit must be 1 to {lib.FSHM_MAX_MOVING:,}; the other strategies count more"
            )
        return None

    def clear(self, key: str) -> None:
        """Forget the key's fixed window and its moving window, as redis:// does."""
        raw = key_bytes(key)
        fixed, _, moving = self._names
        fixed.reset(raw)
        status = lib.fshm_moving_clear(moving._handle, raw, len(raw))
        if status != lib.FSHM_OK:
            self._refused(2, status, 1, 10**9)

    def clear_sliding(self, key: str) -> None:
        self._names[1].reset(key)

    def reset(self) -> int | None:
        """How many keys were forgotten; None where the segment keeps no names."""
        keys = [lib.fshm_live_keys(each._handle, 0) for each in self._names]
        for each in self._names:
            each.reset()
        return None if self.segment.stats()["names"] == "off" else sum(keys)


class _Base:
    """What both storages are."""

    STORAGE_SCHEME: list[str]

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, **options: Any
    ) -> None:
        super().__init__(uri, wrap_exceptions=wrap_exceptions)  # type: ignore[call-arg]
        self._made_by = (uri or f"{self.STORAGE_SCHEME[0]}://", wrap_exceptions, options)
        self._windows = _Windows(open_segment(self._made_by[0], options))

    @property
    def segment(self) -> Segment:
        """The segment that it counts in."""
        return self._windows.segment

    @property
    def storage(self) -> Segment:
        """The same. limits' own storages have the name, and ``flask limiter config`` shows it."""
        return self._windows.segment

    @property
    def base_exceptions(self) -> type[Exception] | tuple[type[Exception], ...]:
        return FastShmError

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), *self._made_by)


class _Calls(_Base):
    """What both storages do."""

    def incr(self, key: str, expiry: int, amount: int = 1) -> int:
        """The count with ``amount``. More than the limit that the key names: nothing is counted."""
        return self._windows.incr(key, expiry, amount)

    def get(self, key: str) -> int:
        return self._windows.get(key)

    def get_expiry(self, key: str) -> float:
        return time.time() + self._windows.left(key)

    def check(self) -> bool:
        """False where the segment was removed under this process, or is damaged."""
        segment = self._windows.segment
        return not segment.unlinked and segment.damaged is None

    def reset(self) -> int | None:
        """Forgets all keys; returns how many there were (None with ``names=off``)."""
        return self._windows.reset()

    def clear(self, key: str) -> None:
        self._windows.clear(key)

    def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        return self._windows.acquire_entry(key, limit, expiry, amount)

    def get_moving_window(self, key: str, limit: int, expiry: int) -> tuple[float, int]:
        count, left = self._windows.moving(key, limit, expiry)
        now = time.time()
        return (now + left - expiry if count else now), count

    def acquire_sliding_window_entry(
        self, key: str, limit: int, expiry: int, amount: int = 1
    ) -> bool:
        return self._windows.acquire_sliding_window_entry(key, limit, expiry, amount)

    def get_sliding_window(self, key: str, expiry: int) -> tuple[int, float, int, float]:
        previous, current, left = self._windows.sliding(key, expiry)
        return previous, left if previous else 0.0, current, left + expiry

    def clear_sliding_window(self, key: str, expiry: int) -> None:
        self._windows.clear_sliding(key)


class ShmStorage(
    _Calls, Storage, MovingWindowSupport, SlidingWindowCounterSupport, TimestampedSlidingWindow
):
    """``shm://name``. Safe from any thread, and before and after a fork.

    wrap_exceptions: raise limits' StorageError in place of the errors of
    :mod:`fast_litellm_shm.exceptions`, SegmentFullError for instance.
    """

    STORAGE_SCHEME = ["shm"]

    def __init__(
        self, uri: str | None = None, wrap_exceptions: bool = False, **options: Any
    ) -> None:
        super().__init__(uri, wrap_exceptions, **options)
        # limits puts a wrapper around each method of a storage, for wrap_exceptions. A hit through
        # that takes three times as long, so without it hits go to the native methods.
        for name in () if wrap_exceptions else _HITS:
            ours = getattr(type(self), name) is getattr(ShmStorage, name)
            if ours:  # no derived class has its own
                setattr(self, name, getattr(self._windows, name))


_HITS = ("incr", "acquire_entry", "acquire_sliding_window_entry")


def _coroutine(
    call: Callable[Concatenate[Any, _P], _R],
) -> Callable[Concatenate[Any, _P], Coroutine[Any, Any, _R]]:
    @functools.wraps(call)
    async def method(self: Any, /, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        return call(self, *args, **kwargs)

    return method


class AsyncShmStorage(
    _Base,
    AsyncStorage,
    AsyncMovingWindowSupport,
    AsyncSlidingWindowCounterSupport,
    TimestampedSlidingWindow,
):
    """``async+shm://name``: the same counts as ``shm://name``. No call ever waits."""

    STORAGE_SCHEME = ["async+shm"]

    incr = _coroutine(_Calls.incr)
    get = _coroutine(_Calls.get)
    get_expiry = _coroutine(_Calls.get_expiry)
    check = _coroutine(_Calls.check)
    reset = _coroutine(_Calls.reset)
    clear = _coroutine(_Calls.clear)
    acquire_entry = _coroutine(_Calls.acquire_entry)
    get_moving_window = _coroutine(_Calls.get_moving_window)
    acquire_sliding_window_entry = _coroutine(_Calls.acquire_sliding_window_entry)
    get_sliding_window = _coroutine(_Calls.get_sliding_window)
    clear_sliding_window = _coroutine(_Calls.clear_sliding_window)


def _rebuild(cls: type[_Base], uri: str, wrap: bool, options: dict[str, Any]) -> _Base:
    return cls(uri, wrap, **options)
