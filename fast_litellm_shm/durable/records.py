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
from fast_litellm_shm.durable.grants import Row, hash_of, over, rows_of
from fast_litellm_shm.durable.store import MINUTE, LimitNumbers, Store

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


class Money(NamedTuple):
    """Of a key of a budget, in the window that ends at this minute since 1970. Nano-dollars;
    granted: what counts as spent after a power cut."""

    budget: bytes
    name: bytes | None
    hash: bytes
    minute: int
    granted: int
    added: int


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
    now, ids = store.clock_of(db).goes_on(), store.Ids()
    for limiter, hashed, name, at, _, leased, _, text in db.execute(_KEYS):
        when = max(now.now, at), now.floor
        states = tuple(_state(row, ids.numbers(db, row.rule), when) for row in rows_of(text))
        yield Key(bytes(limiter), name, bytes(hashed), bool(leased), states)


def money(db: sqlite3.Connection) -> Iterator[Money]:
    """All windows of all budgets. Raises sqlite3.DatabaseError where the file is damaged."""
    for row in db.execute(
        "SELECT limiter.name, money.name, hash, minute, granted, added FROM money "
        "JOIN limiter ON limiter.id = money.limiter ORDER BY limiter.name, minute DESC"
    ):
        found = Money(*row)
        if not all(type(each) is int and 0 <= each < 2**63 for each in found[3:]):
            raise sqlite3.DatabaseError("database disk image is malformed: money that is none")
        yield found


def _state(row: Row, numbers: LimitNumbers, when: tuple[int, int]) -> State:
    kept = ffi.new("fshm_stored *")
    kept[0] = {"limit": numbers[:5], "end": row.end, "used": row.used, "previous": row.previous}
    out = over(numbers, kept, when)
    used = int(out.used) if numbers[3] != lib.FSHM_BUCKET else numbers[2] - out.remaining
    spec = _limit(numbers)
    return State(spec, used, int(out.remaining), int(out.over_ns), row.turn < 0)


def _limit(numbers: LimitNumbers) -> limits.LimitSpec:
    """Raises ValueError: they are no limit's."""
    raw = ffi.new("fshm_limit *", numbers[:5])
    if raw.kind == lib.FSHM_CALENDAR and limits.is_calendar(raw.per_ns):
        return limits.FixedWindow._of(raw.n, raw.per_ns, numbers[5])
    if raw.kind not in (lib.FSHM_BUCKET, lib.FSHM_WINDOW, lib.FSHM_SLIDING):
        raise ValueError(f"no limit of a file: {numbers}")
    return limits.from_raw(raw[0], None)  # type: ignore[return-value]  # by its kind


def problems(path: str) -> list[str]:
    """What is wrong with it; none: it is sound. Reads all of it."""
    with opened(path) as db:
        try:
            found = [str(row[0]) for row in db.execute("PRAGMA integrity_check(20)")]
            found = [] if found == ["ok"] else found
            application = db.execute("PRAGMA application_id").fetchone()[0]
            if application != store.APPLICATION:
                return [*found, "it is not a state file of this library"]
            for found_in in (keys(db), money(db)):
                for _ in found_in:
                    pass
        except sqlite3.DatabaseError as error:
            found.append(str(error))
        return found


def compact(path: str) -> tuple[int, int, int]:
    """Remove what counts no more. Returns how many keys went, and the bytes before and after."""
    with opened(path) as db:
        before = summary(db, path)
        now = store.clock_of(db).goes_on()
        gone = db.execute(
            "DELETE FROM key WHERE until < ? AND minute < ?", (now.now, now.floor // MINUTE)
        ).rowcount
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
                    "limit": (numbers := ids.numbers(db, row.rule)),
                    # of the calendar: ns since 1970
                    "end_ns": _end(row, numbers, now.now),
                    "used": row.used, "previous": row.previous, "taken_away": row.turn < 0,
                }
                for row in rows_of(text)
            ]  # fmt: skip
            called = {"hash": hashed.hex()} if name is None else {"key": _text(name)}
            found.append({"limiter": _text(limiter), **called, "states": states})
        budgets = [
            {
                "budget": _text(each.budget),
                **({"hash": each.hash.hex()} if each.name is None else {"key": _text(each.name)}),
                "minute": each.minute, "granted": each.granted, "added": each.added,
            }
            for each in money(db)
        ]  # fmt: skip
        secret = store.kept(db, "secret").hex()
        return {
            "format": FORMAT, "time": now.wall / 1e9, "secret": secret, "keys": found,
            "budgets": budgets,
        }  # fmt: skip


def _end(row: Row, numbers: LimitNumbers, now: int) -> int | None:
    if not row.end:
        return None
    return row.end * MINUTE if numbers[3] == lib.FSHM_CALENDAR else row.end - now


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
        if len(secret) != len(t.secret):
            raise ValueError(f"its secret must have {len(t.secret)} bytes, not {len(secret)}")
        counts = "SELECT (SELECT count(*) FROM key) + (SELECT count(*) FROM money)"
        if not t.db.execute(counts).fetchone()[0]:
            t.db.execute("UPDATE meta SET value = ? WHERE name = 'secret'", (secret,))
        else:
            secret = t.secret
        same = secret.hex() == exported["secret"]
        for each in exported.get("budgets", ()):
            budget, name, hashed = _called(each, "budget", secret, same)
            numbers = tuple(int(each[which]) for which in ("minute", "granted", "added"))
            if min(numbers) < 0 or max(numbers) >= 2**62:
                raise ValueError(f"money is out of range: {each}")
            t.db.execute(
                "INSERT OR REPLACE INTO money VALUES (?, ?, ?, ?, NULL, '', ?, ?, 0)",
                (t.ids.limiter(t.db, budget), hashed, numbers[0], name, *numbers[1:]),
            )
        for each in exported["keys"]:
            limiter, name, hashed = _called(each, "limiter", secret, same)
            rows = [
                _row(t, turn, state, t.now - passed) for turn, state in enumerate(each["states"])
            ]
            t.db.execute(
                "INSERT OR REPLACE INTO key VALUES (?, ?, ?, NULL, ?, 0, 0, ?, 0, ?)",
                (
                    t.ids.limiter(t.db, limiter), hashed, name, t.now,
                    max((t.now, *(row.end for row in rows))) + 2 * 366 * 86_400 * 10**9,
                    store.packed(rows),
                ),
            )  # fmt: skip
        store.keep(t.db, "used_up", 0)
        store.keep(t.db, "edition", store.kept(t.db, "edition") + 1)
    return len(exported["keys"])


def _called(
    each: dict[str, Any], of: str, secret: bytes, same: bool
) -> tuple[bytes, bytes | None, bytes]:
    """The limiter, the key and its hash. same: the export is of a file with the same secret."""
    limiter, name = _raw(each[of]), _raw(each["key"]) if "key" in each else None
    if name is not None:
        return limiter, name, hash_of(secret, limiter, name)
    if not same:
        raise ValueError(
            "it has keys without names, which another state file alone can tell apart: import it "
            "where there is no state file"
        )
    return limiter, None, bytes.fromhex(each["hash"])


def _row(t: store.Transaction, turn: int, state: dict[str, Any], exported_at: int) -> Row:
    *given, zone = state["limit"]
    n, per, burst, kind, strict = (int(each) for each in given)
    numbers = n, per, burst, kind, strict, str(zone)
    _limit(numbers)  # raises ValueError
    end = 0 if state["end_ns"] is None else int(state["end_ns"])
    if end:
        end = end // MINUTE if kind == lib.FSHM_CALENDAR else exported_at + end
    used, previous = int(state["used"]), int(state["previous"])
    if min(end, used, previous) < 0 or max(end, used, previous) >= 2**62:
        raise ValueError(f"a state is out of range: {state}")
    rule = t.ids.rule(t.db, numbers)
    return Row(-1 if state["taken_away"] else turn, rule, end, used, previous, 0)
