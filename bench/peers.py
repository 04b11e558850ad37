"""The limiters to measure beside: how each is started, opened in a process, and asked.

A contender is made in two steps, since most of the questions fork: ``start(place, n, per)`` once,
then ``open()`` in each process, which returns ``call(key) -> admitted``. Each is set up as its
manual says, with the algorithm that is cheapest among those that suit.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import logging
import os
import shutil
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.result import OURS, REFERENCE
from fast_litellm_shm import Limit, RateLimiter, Segment
from fast_litellm_shm.exceptions import SegmentNotFoundError

Call = Callable[[str], Any]
Open = Callable[[], Call]

HUGE = 10**9  # a limit that nobody meets
HOT = "default"  # the only key whose rate fast-litellm honours, so the hot key is that one for all


def _free_port() -> int:
    with socketserver.TCPServer(("127.0.0.1", 0), socketserver.BaseRequestHandler) as found:
        return int(found.server_address[1])


class MissingError(Exception):
    """Why a contender cannot be measured here."""


class Place:
    """Where the contenders keep what they share: a folder, a segment and a Redis server of their
    own. Everything is gone when it closes."""

    def __init__(self, capacity: int | None = None) -> None:
        shm = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.folder = tempfile.mkdtemp(prefix="fast-shm-bench-", dir=shm)
        self.segment_name = f"bench-{os.getpid()}"
        self._capacity = capacity
        self._redis: dict[str, subprocess.Popen[bytes]] = {}
        self._port = 0
        self._disk: str | None = None
        self._closers: list[Callable[[], Any]] = []
        self._made = 0

    def path(self) -> str:
        """A path that nobody has yet."""
        self._made += 1
        return os.path.join(self.folder, str(self._made))

    def unique(self) -> str:
        """A name that nobody has yet."""
        self._made += 1
        return f"bench-{self._made}"

    def segment(self) -> Segment:
        """The segment; made where there is none."""
        return Segment(self.segment_name, capacity=self._capacity)

    def disk(self) -> str:
        """A folder that is not in memory, where the system has such a one for temporary files."""
        if self._disk is None:
            self._disk = tempfile.mkdtemp(prefix="fast-shm-bench-")
        return self._disk

    def redis(self, appendfsync: str = "") -> str:
        """The socket of a Redis server; started when first asked for. It keeps nothing on disk; or,
        of another one, an append-only file, synced as this says."""
        socket = os.path.join(self.folder, f"redis{appendfsync}.sock")
        if appendfsync not in self._redis:
            binary = shutil.which("redis-server")
            if binary is None:
                raise MissingError("there is no redis-server here: apt-get install redis-server")
            arguments = {"port": "0", "unixsocket": socket, "save": "", "appendonly": "no"}
            if not appendfsync:
                self._port = _free_port()
                arguments |= {"port": str(self._port), "bind": "127.0.0.1"}
            folder = self.folder
            if appendfsync:
                folder = os.path.join(self.disk(), f"redis-{appendfsync}")
                os.mkdir(folder)
                arguments |= {"appendonly": "yes", "appendfsync": appendfsync}
            started = self._redis[appendfsync] = subprocess.Popen(
                [binary, *(part for k, v in arguments.items() for part in (f"--{k}", v))],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            deadline = time.monotonic() + 20
            while not os.path.exists(socket):
                if started.poll() is not None or time.monotonic() > deadline:
                    raise MissingError("redis-server did not start")
                time.sleep(0.01)
        return socket

    def redis_port(self) -> int:
        """The same server over TCP, as from another host."""
        self.redis()
        return self._port

    def at_close(self, closer: Callable[[], Any]) -> None:
        """Call it when the place closes."""
        self._closers.append(closer)

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        for closer in reversed(self._closers):
            closer()
        for started in self._redis.values():
            started.terminate()
        for started in self._redis.values():
            started.wait(20)
        for folder in (self.folder, self._disk):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(SegmentNotFoundError):
            Segment(self.segment_name, create=False).remove()


@dataclass(frozen=True)
class Contender:
    """shared: it claims to hold over processes. keyed: it has keys, not one counter. slow: tens of
    microseconds a call, and more."""

    name: str
    who: str
    start: Callable[[Place, int, float], Open]
    shared: bool = False
    keyed: bool = True
    slow: bool = False


_all: dict[str, Contender] = {}


def _contender(
    name: str, who: str, *, shared: bool = False, keyed: bool = True, slow: bool = False
) -> Callable[[Callable[[Place, int, float], Open]], Callable[[Place, int, float], Open]]:
    def add(start: Callable[[Place, int, float], Open]) -> Callable[[Place, int, float], Open]:
        _all[name] = Contender(name, who, start, shared, keyed, slow)
        return start

    return add


def need(module: str) -> Any:
    """The module; MissingError where it is not installed."""
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        if module == "fast_litellm" and "litellm" not in sys.modules:
            return _fast_litellm_alone()
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"not installed ({error})") from None


def _fast_litellm_alone() -> Any:
    """Without litellm, which it would import for 3 seconds, and change."""
    logging.getLogger("fast_litellm").setLevel(logging.CRITICAL)
    sys.modules["litellm"] = None  # type: ignore[assignment] # importing it is an ImportError
    try:
        return importlib.import_module("fast_litellm")
    finally:
        del sys.modules["litellm"]


def started(
    place: Place, wanted: Iterable[Contender], n: int, per: float
) -> tuple[dict[str, Open], dict[str, str]]:
    """Openers by name, and why the others are missing."""
    found: dict[str, Open] = {}
    missing: dict[str, str] = {}
    for each in wanted:
        try:
            found[each.name] = each.start(place, n, per)
        except MissingError as error:
            missing[each.name] = str(error)
    return found, missing


def contenders(
    *, shared: bool | None = None, keyed: bool | None = None, slow: bool | None = None
) -> list[Contender]:
    """Those that are as asked; None: either way."""
    wanted = {"shared": shared, "keyed": keyed, "slow": slow}
    return [
        each
        for each in _all.values()
        if all(v is None or getattr(each, k) == v for k, v in wanted.items())
    ]


def contender(name: str) -> Contender:
    """By its name."""
    return _all[name]


@_contender("ours", OURS, shared=True)
def _ours(place: Place, n: int, per: float) -> Open:
    name = place.unique()
    return lambda: RateLimiter(Limit(n, per=per), name=name, segment=place.segment()).is_allowed


@_contender("plain Python, token bucket", REFERENCE)
def _plain(place: Place, n: int, per: float) -> Open:
    """What one writes without a library: a dict of buckets under a lock."""

    def open_() -> Call:
        buckets: dict[str, tuple[float, float]] = {}
        lock, rate = threading.Lock(), n / per

        def is_allowed(key: str) -> bool:
            with lock:
                now = time.monotonic()
                tokens, since = buckets.get(key, (float(n), now))
                tokens = min(float(n), tokens + (now - since) * rate)
                if tokens < 1:
                    buckets[key] = (tokens, now)
                    return False
                buckets[key] = (tokens - 1, now)
                return True

        return is_allowed

    return open_


@_contender("fast-litellm", "fast-litellm")
def _fast_litellm(place: Place, n: int, per: float) -> Open:
    """Its unit is the minute, and it lets a tenth of its rate through at once; so it is given ten
    times the limit, and admits the limit at once as the others do."""
    module = need("fast_litellm")
    return lambda: module.SimpleRateLimiter(n * 10).is_allowed


@_contender("rust-py-rate-limit", "rust-py-rate-limit")
def _rust(place: Place, n: int, per: float) -> Open:
    module = need("rust_py_rate_limit")
    return lambda: module.RateLimiter(limit=n, window_seconds=int(per)).allow


@_contender("token_bucket", "token_bucket")
def _token_bucket(place: Place, n: int, per: float) -> Open:
    module = need("token_bucket")
    return lambda: module.Limiter(n / per, n, module.MemoryStorage()).consume


def _limits(open_storage: Callable[[], Any], strategy: str, n: int, per: float) -> Open:
    limits, strategies = need("limits"), need("limits.strategies")
    item = limits.RateLimitItemPerSecond(n, int(per))

    def open_() -> Call:
        hit = getattr(strategies, strategy)(open_storage()).hit
        return lambda key: hit(item, key)

    return open_


@_contender("limits, memory, fixed window", "limits")
def _limits_fixed(place: Place, n: int, per: float) -> Open:
    storage = need("limits.storage").MemoryStorage
    return _limits(storage, "FixedWindowRateLimiter", n, per)


@_contender("limits, memory, sliding window", "limits")
def _limits_sliding(place: Place, n: int, per: float) -> Open:
    storage = need("limits.storage").MemoryStorage
    return _limits(storage, "SlidingWindowCounterRateLimiter", n, per)


@_contender("limits, Redis, fixed window", "limits", shared=True, slow=True)
def _limits_redis(place: Place, n: int, per: float) -> Open:
    storage, prefix = need("limits.storage").RedisStorage, place.unique()
    need("redis")
    uri = f"redis+unix://{place.redis()}"
    return _limits(lambda: storage(uri, key_prefix=prefix), "FixedWindowRateLimiter", n, per)


def _throttled(place: Place, open_store: Callable[[Any], Any], n: int, per: float) -> Open:
    module, prefix = need("throttled"), place.unique()
    quota = module.rate_limiter.per_duration(datetime.timedelta(seconds=per), n, burst=n)

    def open_() -> Call:
        limit = module.Throttled(
            using=module.RateLimiterType.GCRA.value,
            quota=quota,
            store=open_store(module),
            key_prefix=prefix,
        ).limit
        return lambda key: not limit(key).limited

    return open_


@_contender("throttled-py, memory, GCRA", "throttled-py")
def _throttled_memory(place: Place, n: int, per: float) -> Open:
    """Room for all keys: by default it forgets live ones past 1,024."""
    return _throttled(place, lambda m: m.MemoryStore(options={"MAX_SIZE": 10**7}), n, per)


@_contender("throttled-py, Redis, GCRA", "throttled-py", shared=True, slow=True)
def _throttled_redis(place: Place, n: int, per: float) -> Open:
    need("throttled")
    need("redis")
    server = f"unix://{place.redis()}"
    return _throttled(place, lambda m: m.RedisStore(server=server), n, per)


def _rate(module: Any, n: int, per: float) -> list[Any]:
    return [module.Rate(n, int(per * 1000))]


@_contender("pyrate-limiter, memory, token bucket", "pyrate-limiter")
def _pyrate_memory(place: Place, n: int, per: float) -> Open:
    """A bucket for each key, as its manual has it: a factory that keeps them in a dict."""
    module = need("pyrate_limiter")
    rates = _rate(module, n, per)

    class ByName(module.BucketFactory):  # type: ignore[misc, name-defined]
        """Buckets by the name of what is limited."""

        def __init__(self) -> None:
            self.clock, self.buckets = module.MonotonicClock(), {}  # type: Any, dict[str, Any]

        def wrap_item(self, name: str, weight: int = 1) -> Any:
            return module.RateItem(name, self.clock.now(), weight=weight)

        def get(self, item: Any) -> Any:
            bucket = self.buckets.get(item.name)
            if bucket is None:
                bucket = module.StateBucket(rates, algorithm=module.TokenBucket())
                self.buckets[item.name] = bucket
            return bucket

    def open_() -> Call:
        acquire = module.Limiter(ByName()).try_acquire
        return lambda key: acquire(key, blocking=False)

    return open_


def _settled(limiter: Any, options: dict[str, Any]) -> Call:
    """After a pause: its cleaning thread begins by holding the lock, and the denials of that come
    once in the life of a process."""
    acquire = limiter.try_acquire
    time.sleep(0.3)
    return lambda key: acquire(key, **options)


def _pyrate_sqlite(place: Place, n: int, per: float, options: dict[str, Any]) -> Open:
    module, path = need("pyrate_limiter"), place.path()
    need("filelock")

    def open_() -> Call:
        bucket = module.SQLiteBucket.init_from_file(
            _rate(module, n, per), db_path=path, use_file_lock=True
        )
        return _settled(module.Limiter(bucket), options)

    return open_


@_contender("pyrate-limiter, SQLite", "pyrate-limiter", shared=True, keyed=False, slow=True)
def _pyrate_sqlite_now(place: Place, n: int, per: float) -> Open:
    return _pyrate_sqlite(place, n, per, {"blocking": False})


@_contender(
    "pyrate-limiter, SQLite, waiting", "pyrate-limiter", shared=True, keyed=False, slow=True
)
def _pyrate_sqlite_waiting(place: Place, n: int, per: float) -> Open:
    """Waits for its lock for up to 50 ms, so that a busy lock is less often a denial."""
    return _pyrate_sqlite(place, n, per, {"timeout": 0.05})


@_contender(
    "pyrate-limiter, multiprocessing", "pyrate-limiter", shared=True, keyed=False, slow=True
)
def _pyrate_processes(place: Place, n: int, per: float) -> Open:
    module = need("pyrate_limiter")
    bucket = module.MultiprocessBucket.init(_rate(module, n, per))
    place.at_close(bucket.items._manager.shutdown)

    return lambda: _settled(module.Limiter(bucket), {"blocking": False})


@_contender("multiprocessing.Value, one window", "multiprocessing.Value", shared=True, keyed=False)
def _value(place: Place, n: int, per: float) -> Open:
    """A counter and its window's end under the lock that comes with it."""
    multiprocessing = importlib.import_module("multiprocessing")
    count, until = multiprocessing.Value("q", 0), multiprocessing.Value("d", 0.0, lock=False)

    def open_() -> Call:
        lock, ends = count.get_lock(), until

        def is_allowed(key: str) -> bool:
            with lock:
                now = time.monotonic()
                if now >= ends.value:
                    ends.value, count.value = now + per, 0
                if count.value >= n:
                    return False
                count.value += 1
                return True

        return is_allowed

    return open_


@_contender("LMDB, read-modify-write", "LMDB", shared=True)
def _lmdb(place: Place, n: int, per: float) -> Open:
    """GCRA in a write transaction, in shared memory, with no sync: what one would build on it."""
    module, path = need("lmdb"), place.path()

    def open_() -> Call:
        environment = module.open(
            path, map_size=2**32, subdir=False, sync=False, metasync=False, writemap=True
        )
        begin, interval, burst = environment.begin, per / n, per
        pack, unpack = struct.Struct("d").pack, struct.Struct("d").unpack

        def is_allowed(key: str) -> bool:
            name = key.encode()
            with begin(write=True) as transaction:
                now, found = time.monotonic(), transaction.get(name)
                arrival = max(unpack(found)[0], now) if found else now
                if arrival + interval - now > burst * (1 + 1e-9):
                    return False
                transaction.put(name, pack(arrival + interval))
                return True

        return is_allowed

    return open_
