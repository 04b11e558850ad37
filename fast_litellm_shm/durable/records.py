"""A state file as a whole: what is in it, whether it is sound, and copies of it. For the command
line; calls go through store.py."""

from __future__ import annotations

import base64
import contextlib
import os
import sqlite3
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import quote

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.durable import clock, store
from fast_litellm_shm.durable.grants import Row, hash_of, rows_of
from fast_litellm_shm.durable.store import LimitNumbers, Store

FORMAT = 1  # of an export
_COLUMNS = "limiter.name, key.hash, key.name, at, batch, leased, until, states"
_KEYS = f"SELECT {_COLUMNS} FROM key JOIN limiter ON limiter.id = key.limiter"


class State(NamedTuple):
    """Of one limit of a key, now. left_ns: until all of it is back. taken_away: the limiter has
    this limit no more."""

    limit: limits.LimitSpec
    used: int
    remaining: int
    left_ns: int
    taken_away: bool


class Key(NamedTuple):
    """name: None: the segment keeps no names."""

    limiter: bytes
    name: bytes | None
    hash: bytes
    leased: bool
    states: tuple[State, ...]


class Summary(NamedTuple):
    path: str
    bytes: int
    keys: int
    host: str
    boot: str
    last_used: float  # time of day, s
    used_up_since: float | None  # time of day, s: an earlier file was damaged


@contextlib.contextmanager
def opened(path: str) -> Iterator[sqlite3.Connection]:
    """As it is: it is not made, taken over or put aside. Raises StateFileError."""
    if not os.path.exists(path):
        raise exceptions.StateFileError(
            f"there is no state file {path!r}: no limiter of that segment is durable, or "
            "FAST_LITELLM_SHM_STATE is another one for the workers"
        )
    with Store(path, 5.0).explained():
        db = sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, isolation_level=None)
        try:
            yield db
        finally:
            db.close()


def has(path: str, limiter: str) -> bool:
    """Whether there is such a file, and it knows a limiter of that name."""
    if not os.path.exists(path):
        return False
    name = limiter.encode("utf-8", "surrogatepass")
    with opened(path) as db:
        found = db.execute("SELECT 1 FROM limiter WHERE name = ?", (name,)).fetchone()
    return found is not None


def summary(db: sqlite3.Connection, path: str) -> Summary:
    tails = [path + tail for tail in ("", "-wal") if os.path.exists(path + tail)]
    last, owner, used_up = store.clock_of(db), store.owner_of(db), store.kept(db, "used_up")
    since = (last.wall - (last.now - used_up)) / 1e9 if used_up else None
    return Summary(
        path, sum(map(os.path.getsize, tails)),
        db.execute("SELECT count(*) FROM key").fetchone()[0], owner.host, last.boot,
        last.wall / 1e9, since,
    )  # fmt: skip


def keys(db: sqlite3.Connection) -> Iterator[Key]:
    """All of them. Raises sqlite3.DatabaseError where the file is damaged."""
    now, ids = store.clock_of(db).goes_on().now, store.Ids()
    for limiter, hashed, name, at, _, leased, _, text in db.execute(_KEYS):
        states = tuple(
            _state(row, ids.numbers(db, row.rule), max(now, at)) for row in rows_of(text)
        )
        yield Key(bytes(limiter), name, bytes(hashed), bool(leased), states)


def _state(row: Row, numbers: LimitNumbers, now: int) -> State:
    kept, limit = ffi.new("fshm_stored *"), ffi.new("fshm_limit *", numbers)
    kept[0] = {"limit": numbers, "end": row.end, "used": row.used, "previous": row.previous}
    out = ffi.new("fshm_stored_answer *")
    if lib.fshm_stored_apply(lib.FSHM_PEEK, limit, kept, 0, ffi.NULL, now, out) != lib.FSHM_OK:
        raise sqlite3.DatabaseError("database disk image is malformed: a state that is none")
    used = int(out.used) if numbers[3] != lib.FSHM_BUCKET else numbers[2] - out.remaining
    spec = limits.from_raw(limit[0])
    assert not isinstance(spec, (limits.InFlight, limits.Granted))  # by the core's check
    return State(spec, used, int(out.remaining), int(out.over_ns), row.turn < 0)


def problems(path: str) -> list[str]:
    """What is wrong with it; none: it is sound. Reads all of it."""
    with opened(path) as db:
        try:
            found = [str(row[0]) for row in db.execute("PRAGMA integrity_check(20)")]
            found = [] if found == ["ok"] else found
            application = db.execute("PRAGMA application_id").fetchone()[0]
            if application != store.APPLICATION:
                return [*found, "it is not a state file of this library"]
            for _ in keys(db):
                pass
        except sqlite3.DatabaseError as error:
            found.append(str(error))
        return found


def compact(path: str) -> tuple[int, int, int]:
    """Remove what counts no more. Returns how many keys went, and the bytes before and after."""
    with opened(path) as db:
        before = summary(db, path)
        now = store.clock_of(db).goes_on().now
        gone = db.execute("DELETE FROM key WHERE until < ?", (now,)).rowcount
        db.execute("VACUUM")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return gone, before.bytes, summary(db, path).bytes


def claim(path: str) -> str:
    """Let this host use a file that another one has used. Returns the other one's name."""
    with opened(path) as db:
        other = store.owner_of(db).host
        store.keep(db, "owner", [other, True])
        return other


# copies


def export(path: str) -> dict[str, Any]:
    """All of it, as JSON can hold it. Instants are ns from the instant of the export on."""
    with opened(path) as db:
        db.execute("BEGIN")
        now, ids = store.clock_of(db).goes_on(), store.Ids()
        found: list[dict[str, Any]] = []
        for limiter, hashed, name, _, _, _, _, text in db.execute(_KEYS):
            states = [
                {
                    "limit": list(ids.numbers(db, row.rule)),
                    "end_ns": row.end - now.now if row.end else None,
                    "used": row.used, "previous": row.previous, "taken_away": row.turn < 0,
                }
                for row in rows_of(text)
            ]  # fmt: skip
            called = {"hash": hashed.hex()} if name is None else {"key": _text(name)}
            found.append({"limiter": _text(limiter), **called, "states": states})
        secret = store.kept(db, "secret").hex()
        return {"format": FORMAT, "time": now.wall / 1e9, "secret": secret, "keys": found}


def _text(raw: bytes) -> str:
    """As text where it is some; else marked, and in base64."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = "base64:"
    return f"base64:{base64.b64encode(raw).decode()}" if text.startswith("base64:") else text


def _raw(text: str) -> bytes:
    head, mark, rest = text.partition("base64:")
    return base64.b64decode(rest, validate=True) if mark and not head else text.encode("utf-8")


def restore(path: str, exported: dict[str, Any], timeout: float) -> int:
    """Put the keys of an export into a state file, in place of what it has of them; its other keys
    count as not used, where it had taken them for used up. Returns how many. Raises ValueError:
    that is no export; StateFileError."""
    if not isinstance(exported, dict) or exported.get("format") != FORMAT:
        raise ValueError(f"it is no export of a state file of format {FORMAT}")
    into = Store(path, timeout)
    try:
        return _restored(into, exported)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"it is no export of a state file: {error!r}") from error
    finally:
        into.close()


def _restored(into: Store, exported: dict[str, Any]) -> int:
    with into.transaction() as t:
        passed = max(clock.time_of_day() - round(exported["time"] * 1e9), 0)
        secret = bytes.fromhex(exported["secret"])
        if not t.db.execute("SELECT count(*) FROM key").fetchone()[0]:
            t.db.execute("UPDATE meta SET value = ? WHERE name = 'secret'", (secret,))
        else:
            secret = t.secret
        for each in exported["keys"]:
            limiter = _raw(each["limiter"])
            name = _raw(each["key"]) if "key" in each else None
            if name is None and secret.hex() != exported["secret"]:
                raise ValueError(
                    "it has keys without names, which another state file alone can tell apart: "
                    "import it where there is no state file"
                )
            hashed = bytes.fromhex(each["hash"]) if name is None else hash_of(secret, limiter, name)
            rows = [
                _row(t, turn, state, t.now - passed) for turn, state in enumerate(each["states"])
            ]
            t.db.execute(
                "INSERT OR REPLACE INTO key VALUES (?, ?, ?, NULL, ?, 0, 0, ?, ?)",
                (
                    t.ids.limiter(t.db, limiter), hashed, name, t.now,
                    max((row.end for row in rows), default=0) + 2 * 366 * 86_400 * 10**9,
                    store.packed(rows),
                ),
            )  # fmt: skip
        store.keep(t.db, "used_up", 0)
        store.keep(t.db, "edition", store.kept(t.db, "edition") + 1)
    return len(exported["keys"])


def _row(t: store.Transaction, turn: int, state: dict[str, Any], exported_at: int) -> Row:
    n, per, burst, kind, strict = (int(each) for each in state["limit"])
    raw = ffi.new("fshm_limit *", (n, per, burst, kind, strict))
    limits.from_raw(raw[0])  # raises ValueError
    end = 0 if state["end_ns"] is None else exported_at + int(state["end_ns"])
    used, previous = int(state["used"]), int(state["previous"])
    if min(end, used, previous) < 0 or max(end, used, previous) >= 2**62:
        raise ValueError(f"a state is out of range: {state}")
    rule = t.ids.rule(t.db, (n, per, burst, kind, strict))
    return Row(-1 if state["taken_away"] else turn, rule, end, used, previous, 0)
