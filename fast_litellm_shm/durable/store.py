"""Store: the file of durable limits. SQLite in WAL mode with synchronous=FULL: what a transaction
has written is on the disk when it returns. One row for each key, of a few integers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import log
from fast_litellm_shm.durable import clock
from fast_litellm_shm.durable.clock import Clock
from fast_litellm_shm.durable.filesystem import kind_of

APPLICATION, VERSION = 0x46534C44, 1  # "FSLD"; of the schema
_SCHEMA = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID",
    "CREATE TABLE limiter (id INTEGER PRIMARY KEY, name BLOB UNIQUE NOT NULL)",
    # A limit that states were counted under. zone: of the calendar; else "".
    "CREATE TABLE rule (id INTEGER PRIMARY KEY, kind INTEGER NOT NULL, n INTEGER NOT NULL, "
    "per INTEGER NOT NULL, burst INTEGER NOT NULL, strict INTEGER NOT NULL, zone TEXT NOT NULL, "
    "UNIQUE (kind, n, per, burst, strict, zone))",
    # hash: of limiter and key. name: the key, if the segment keeps names. sealed: the key, readable
    # for the segment that wrote it. at: when it was last written. batch: tokens granted then.
    # leased: 1: the segment may hold some. until: when nothing counts any more, or later. minute:
    # the same by the time of day, for windows of the calendar. states: one for each limit, see
    # grants.py.
    "CREATE TABLE key (limiter INTEGER NOT NULL, hash BLOB NOT NULL, name BLOB, sealed BLOB, "
    "at INTEGER NOT NULL, batch INTEGER NOT NULL, leased INTEGER NOT NULL, until INTEGER NOT NULL, "
    "minute INTEGER NOT NULL, states TEXT NOT NULL, PRIMARY KEY (limiter, hash)) WITHOUT ROWID",
    # Of a budget, a key and the window that ends at this minute (books.py). Amounts: nano-dollars.
    "CREATE TABLE money (limiter INTEGER NOT NULL, hash BLOB NOT NULL, minute INTEGER NOT NULL, "
    "name BLOB, sealed BLOB, instance TEXT NOT NULL, granted INTEGER NOT NULL, "
    "added INTEGER NOT NULL, leased INTEGER NOT NULL, PRIMARY KEY (limiter, hash, minute)) "
    "WITHOUT ROWID",
    "CREATE INDEX money_minute ON money (minute)",
    "CREATE INDEX money_leased ON money (limiter) WHERE leased",
    "CREATE INDEX key_until ON key (until)",
    "CREATE INDEX key_leased ON key (limiter) WHERE leased",
)
_EVERY = 1_000_000_000  # ns between two notes of the time, and two clearings of old rows
_CLEARED = 20  # rows at once
_MONEY_KEPT = 400 * 1440  # minutes after its window, at most
_PAUSE = 0.0005  # seconds between two tries to begin a transaction: half, to one and a half of it
_CACHE_KIB = 2048
MINUTE = 60 * 10**9  # ns

# n, per_ns, burst, kind, strict, zone. A zone's index would not outlive the segment.
LimitNumbers: TypeAlias = tuple[int, int, int, int, int, str]


class Ids:
    """Of the limiters and limits in a file. They never change, so this process remembers them; what
    a transaction has made, when it is committed."""

    def __init__(self) -> None:
        self._limiters: dict[bytes, int] = {}
        self._rules: dict[LimitNumbers, int] = {}
        self._numbers: dict[int, LimitNumbers] = {}
        self._made: list[tuple[dict[Any, Any], Any, Any]] = []

    def limiter(self, db: sqlite3.Connection, name: bytes, make: bool = True) -> int | None:
        """None: the file does not have it."""
        found = self._limiters.get(name)
        if found is None:
            row = db.execute("SELECT id FROM limiter WHERE name = ?", (name,)).fetchone()
            if row is None and make:
                row = (db.execute("INSERT INTO limiter (name) VALUES (?)", (name,)).lastrowid,)
            if row is None:
                return None
            found = int(row[0])
            self._made.append((self._limiters, name, found))
        return found

    def rule(self, db: sqlite3.Connection, rule: LimitNumbers) -> int:
        found = self._rules.get(rule)
        if found is None:
            row = db.execute(
                "SELECT id FROM rule WHERE n = ? AND per = ? AND burst = ? AND kind = ? "
                "AND strict = ? AND zone = ?",
                rule,
            ).fetchone()
            if row is None:
                into = "INSERT INTO rule (n, per, burst, kind, strict, zone) "
                row = (db.execute(into + "VALUES (?, ?, ?, ?, ?, ?)", rule).lastrowid,)
            found = int(row[0])
            self._made.append((self._rules, rule, found))
        return found

    def numbers(self, db: sqlite3.Connection, rule: int) -> LimitNumbers:
        found = self._numbers.get(rule)
        if found is None:
            found = db.execute(
                "SELECT n, per, burst, kind, strict, zone FROM rule WHERE id = ?", (rule,)
            ).fetchone()
            if found is None:
                raise sqlite3.DatabaseError(f"database disk image is malformed: no rule {rule}")
            self._made.append((self._numbers, rule, found))
        return found

    def ended(self, committed: bool) -> None:
        made, self._made = self._made, []
        for known, name, value in made:
            if committed:
                known[name] = value


class Owner(NamedTuple):
    """The host that uses the file, and whether it has ended cleanly since."""

    host: str
    released: bool


class Open(NamedTuple):
    """An open file. used_up: at this instant of its clock, all keys without a row count as used up:
    an earlier file was damaged."""

    db: sqlite3.Connection
    which: tuple[int, int]  # device and inode
    clock: Clock
    secret: bytes
    used_up: int
    shared: bool  # other hosts may be able to write it
    ids: Ids
    edition: int  # another one: an import has changed what is above


class Transaction(NamedTuple):
    """now: by the file's clock. wall: the time of day."""

    db: sqlite3.Connection
    now: int
    wall: int
    secret: bytes
    used_up: int
    ids: Ids


class Store:
    """Of one process. One thread uses it at a time (``lock``). forgives: a new file after a damaged
    one begins from nothing."""

    def __init__(self, path: str, timeout: float, forgives: bool = False) -> None:
        self.path, self._timeout, self._forgives = path, timeout, forgives
        self.lock = threading.RLock()
        self._open: Open | None = None
        self._noted = self._cleared = self._floor = 0
        self._suspect = False  # damage was met
        self._inside = 0  # the thread that is in a transaction
        self._forks = False  # a fork holds the lock

    def fork_begins(self) -> None:
        """Close the connection, between two transactions. What SQLite's library knows of the locks
        that this process holds would go along to the child, which holds none: the child would write
        without them, to a log that is deleted when the parent ends."""
        self._forks = not self.is_busy_here and self.lock.acquire(timeout=self._timeout)
        if self._forks and self._open is not None:
            opened, self._open = self._open, None
            opened.db.close()

    def fork_ended(self) -> None:
        """In the parent. The next transaction connects anew."""
        if self._forks:
            self._forks = False
            self.lock.release()

    def forked(self) -> None:
        """In a child. SQLite forbids to use the parent's connection there, and to close it: so it
        is never freed, if a thread was stuck in it."""
        if self._open is not None:
            import ctypes

            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._open.db))
        self._open, self.lock, self._forks = None, threading.RLock(), False

    def close(self) -> None:
        """Unless a thread is stuck in it."""
        if self.lock.acquire(timeout=self._timeout):
            try:
                opened, self._open = self._open, None
                if opened is not None:
                    opened.db.close()
            finally:
                self.lock.release()

    @contextlib.contextmanager
    def transaction(self, write: bool = True) -> Iterator[Transaction]:
        """All of it is on the disk afterwards, or nothing. Raises StateFileError."""
        with self.lock, self._marked(), self.explained():
            opened = self._opened()
            self._begin(opened.db, write)
            try:
                opened = self._current(opened)
                if write:
                    self._tend(opened)
                now, self._floor = opened.clock.time(), clock.not_before(self._floor)
                yield Transaction(
                    opened.db, now, self._floor, opened.secret, opened.used_up, opened.ids
                )
                opened.db.execute("COMMIT")
                opened.ids.ended(committed=True)
            finally:
                opened.ids.ended(committed=False)
                if opened.db.in_transaction:
                    opened.db.execute("ROLLBACK")
                if self._open is None:  # it is another host's by now
                    opened.db.close()

    @property
    def is_busy_here(self) -> bool:
        """Whether this thread is in a transaction: the garbage collector may come at any line, and
        find calls to end."""
        return self._inside == threading.get_ident()

    @contextlib.contextmanager
    def _marked(self) -> Iterator[None]:
        self._inside = threading.get_ident()
        try:
            yield
        finally:
            self._inside = 0

    def _current(self, opened: Open) -> Open:
        edition = kept(opened.db, "edition")
        if edition != opened.edition:
            opened = self._open = opened._replace(
                secret=kept(opened.db, "secret"), used_up=kept(opened.db, "used_up"), ids=Ids(),
                edition=edition,
            )  # fmt: skip
        return opened

    def _begin(self, db: sqlite3.Connection, write: bool) -> None:
        """Not by SQLite's own waiting, which sleeps up to a tenth of a second."""
        if db.in_transaction:  # an exception has struck in a ROLLBACK
            db.execute("ROLLBACK")
        if not write:
            db.execute("BEGIN")
            return
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                db.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_locked(error) or time.monotonic() >= deadline:
                    raise
            time.sleep(_PAUSE * random.uniform(0.5, 1.5))

    def _tend(self, opened: Open) -> None:
        """See that the file is still this boot's, note the time, and clear old rows."""
        now = opened.clock.time()
        due = now - self._noted >= _EVERY
        if due or opened.shared:
            found = clock_of(opened.db)
            if found.boot != opened.clock.boot:
                self._open = None
                raise exceptions.StateFileHostError(
                    _two_hosts(self.path, owner_of(opened.db), found)
                )
        if due:
            self._noted, self._floor = now, max(self._floor, clock_of(opened.db).floor)
            keep(opened.db, "clock", list(opened.clock._replace(floor=self._floor).goes_on()))
            if opened.shared:
                keep(opened.db, "owner", [clock.host(), False])
        if now - self._cleared >= _EVERY:
            self._cleared = now
            opened.db.execute(
                "DELETE FROM key WHERE (limiter, hash) IN (SELECT limiter, hash FROM key "
                "WHERE until < ? AND minute < ? LIMIT ?)",
                (now, clock.not_before(self._floor) // MINUTE, _CLEARED),
            )
            opened.db.execute(
                "DELETE FROM money WHERE (limiter, hash, minute) IN (SELECT limiter, hash, minute "
                "FROM money WHERE minute < ? LIMIT ?)",
                (clock.not_before(self._floor) // MINUTE - _MONEY_KEPT, _CLEARED),
            )

    def release(self) -> None:
        """This host has ended its use cleanly: another one may use the file."""
        with self.transaction() as t:
            if self._open is not None and self._open.shared:
                keep(t.db, "owner", [clock.host(), True])

    # opening

    def _opened(self) -> Open:
        if self._open is not None:
            with contextlib.suppress(FileNotFoundError):
                found = os.stat(self.path)
                if (found.st_dev, found.st_ino) == self._open.which:
                    return self._open
            log.warning("state file %r was removed or replaced: it is opened anew", self.path)
            self._open.db.close()
            self._open = None
        _make_folder(os.path.dirname(self.path))
        with _flocked(f"{self.path}.lock", self._timeout):
            self._open = self._opened_alone()
        self._floor = max(self._floor, self._open.clock.floor)
        return self._open

    def _opened_alone(self) -> Open:
        """While no other process opens it."""
        try:
            return self._connect(used_up=0)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            why = str(error)
        aside = f"{self.path}.damaged-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
        for tail in ("-wal", "-shm", ""):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + tail, aside + tail)
        _sync_folder(os.path.dirname(self.path))
        log.warning(
            "state file %r is damaged (%s): it was renamed to %r, and a new one was made; %s",
            self.path, why, aside,
            "it begins from nothing (on_outage='allow')" if self._forgives else
            "as nobody knows what was spent, each limit counts as used up until its period has "
            "passed. `fast-shm state import` brings an earlier export back",
        )  # fmt: skip
        return self._connect(used_up=0 if self._forgives else 1)

    def _connect(self, used_up: int) -> Open:
        kind = kind_of(os.path.dirname(self.path))
        if kind.in_memory:
            log.warning(
                "state file %r lies in memory (%s): a reboot empties it; set "
                "FAST_LITELLM_SHM_STATE to a folder on a disk", self.path, kind.name,
            )  # fmt: skip
        # For this user alone. (To open and close one that is there would release SQLite's locks.)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            _sync_folder(os.path.dirname(self.path))
        db = sqlite3.connect(
            self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
        )
        try:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA fullfsync=ON")
            db.execute("PRAGMA checkpoint_fullfsync=ON")
            db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
            db.execute("BEGIN IMMEDIATE")
            self._prepare(db, used_up, kind.shared)
            db.execute("COMMIT")
            found = os.stat(self.path)
            return Open(
                db, (found.st_dev, found.st_ino), clock_of(db), bytes(kept(db, "secret")),
                int(kept(db, "used_up")), kind.shared, Ids(), kept(db, "edition"),
            )  # fmt: skip
        except BaseException:
            db.close()
            raise

    def _prepare(self, db: sqlite3.Connection, used_up: int, shared: bool) -> None:
        application = db.execute("PRAGMA application_id").fetchone()[0]
        version = db.execute("PRAGMA user_version").fetchone()[0]
        empty = not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if empty and (application, version) == (0, 0):
            for statement in _SCHEMA:
                db.execute(statement)
            db.execute(f"PRAGMA application_id={APPLICATION}")
            db.execute(f"PRAGMA user_version={VERSION}")
            begun = Clock.begun()
            keep(db, "clock", list(begun))
            keep(db, "owner", [clock.host(), False])
            keep(db, "used_up", begun.now if used_up else 0)
            keep(db, "edition", 1)
            db.execute("INSERT INTO meta VALUES ('secret', ?)", (secrets.token_bytes(32),))
            return
        if application != APPLICATION:
            raise sqlite3.DatabaseError("file is not a database of this library")
        if version != VERSION:
            raise exceptions.StateFileError(
                f"state file {self.path!r} has version {version}, this release knows version "
                f"{VERSION}: use one release for all workers, or another FAST_LITELLM_SHM_STATE"
            )
        found, owner, mine = clock_of(db), owner_of(db), clock.boot()
        if mine and found.boot == mine and not self._suspect:
            return
        if shared and found.boot != mine and owner.host != clock.host() and not owner.released:
            raise exceptions.StateFileHostError(_two_hosts(self.path, owner, found))
        said = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if said != "ok":
            raise sqlite3.DatabaseError(f"database disk image is malformed: {said}")
        self._suspect = False
        keep(db, "clock", list(found.goes_on()))
        keep(db, "owner", [clock.host(), False])

    # errors

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Raises StateFileError for what SQLite and the system raise."""
        try:
            yield
        except sqlite3.Error as error:
            if _is_damage(error):
                self._damaged()
            raise self._explanation(error) from error
        except OSError as error:
            raise self._explanation(error) from error

    def _damaged(self) -> None:
        """The next transaction opens it anew: then it is looked at as a whole."""
        opened, self._open = self._open, None
        self._suspect = True
        if opened is not None:
            opened.db.close()

    def _explanation(self, error: sqlite3.Error | OSError) -> exceptions.StateFileError:
        where, text = f"state file {self.path!r}", str(error)
        code = getattr(error, "sqlite_errorname", "")
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or "FULL" in code or "is full" in text:
            return exceptions.StateFileFullError(f"{where}: the disk is full: free some space")
        if isinstance(error, _FlockError) or (
            isinstance(error, sqlite3.OperationalError) and _is_locked(error)
        ):
            return self.locked(text)
        read_only = number in (errno.EROFS, errno.EACCES, errno.EPERM)
        known = "readonly" in text or "unable to open" in text
        if read_only or known or "READONLY" in code or "CANTOPEN" in code:
            return exceptions.StateFileReadOnlyError(
                f"{where} cannot be written ({text}): give this user the right to write the file "
                "and its folder, or set FAST_LITELLM_SHM_STATE to another folder"
            )
        if isinstance(error, sqlite3.Error) and _is_damage(error):
            return exceptions.StateFileDamagedError(f"{where} is damaged: {text}")
        return exceptions.StateFileError(f"{where} cannot be used: {type(error).__name__}: {text}")

    def locked(self, text: str) -> exceptions.StateFileLockedError:
        return exceptions.StateFileLockedError(
            f"state file {self.path!r}: another process has kept it locked for {self._timeout:g} "
            "s: see that none is stopped in the middle of a write, and that the disk is not too "
            f"slow ({text})"
        )


class _FlockError(OSError):
    pass


@contextlib.contextmanager
def _flocked(path: str, timeout: float) -> Iterator[None]:
    """Alone among the processes that do this with the same path."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise _FlockError(errno.EAGAIN, "another process opens it") from None
            time.sleep(_PAUSE)
        yield
    finally:
        os.close(fd)


def _sync_folder(path: str) -> None:
    """So that a name in it is on the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_folder(path: str) -> None:
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_folder(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
        _sync_folder(parent)


def _is_locked(error: sqlite3.Error) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _is_damage(error: sqlite3.Error) -> bool:
    code = getattr(error, "sqlite_errorname", "")  # from Python 3.11 on
    text = str(error)
    known = "malformed" in text or "not a database" in text
    return known or code.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB"))


def _two_hosts(path: str, owner: Owner, found: Clock) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.wall / 1e9))
    return (
        f"state file {path!r} belongs to host {owner.host!r} (boot {found.boot or 'unknown'!r}, "
        f"last use {when}), and hosts cannot share one: set FAST_LITELLM_SHM_STATE to a folder on "
        "a disk of this host, or FAST_LITELLM_SHM_CLUSTER for limits over many hosts. If that host "
        "uses it no more: `fast-shm state claim`"
    )


def kept(db: sqlite3.Connection, name: str) -> Any:
    found = db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    if found is None:
        raise sqlite3.DatabaseError(f"database disk image is malformed: no {name}")
    value = found[0]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise sqlite3.DatabaseError(f"database disk image is malformed: {name}") from None


def keep(db: sqlite3.Connection, name: str, value: Any) -> None:
    db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))


def clock_of(db: sqlite3.Connection) -> Clock:
    try:
        return Clock(*kept(db, "clock"))
    except TypeError:
        raise sqlite3.DatabaseError("database disk image is malformed: clock") from None


def owner_of(db: sqlite3.Connection) -> Owner:
    return Owner(*kept(db, "owner"))


def packed(states: Iterable[tuple[int, ...]]) -> str:
    """Of a key, as its row has them."""
    return json.dumps(list(states), separators=(",", ":"))
