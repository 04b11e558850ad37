"""Books: what a state file has of the budgets of its segment. csrc/DESIGN.md, "Durable limits".

Of each key and window the file has what was granted in all, which is what counts as spent after a
power cut. The segment that holds the last grants is in the row. Another one (after a reboot) takes
the row over first: what was granted before counts as spent there.
"""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeVar

from fast_litellm_shm import limits
from fast_litellm_shm._shared import zones
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.link import UnreachableError, log
from fast_litellm_shm.durable import link as links
from fast_litellm_shm.durable.grants import hash_of
from fast_litellm_shm.durable.link import FileLink
from fast_litellm_shm.durable.settings import StateFile
from fast_litellm_shm.durable.store import MINUTE, Transaction
from fast_litellm_shm.limiters.waiting import may_wait

_SPENT, _ADDED, _GRANTED = 0, 1, 3  # places of a budget's numbers
_PART = 100  # of a budget: what is kept ahead of a key
_KEPT = 12  # windows of a key
_MOST = 2**62
T = TypeVar("T")


class Account(Protocol):
    """A Budget, as its books see it."""

    _handle: Any
    _limit: limits.Money

    @property
    def name(self) -> str: ...
    @property
    def segment(self) -> Any: ...
    def _failed(self, status: int) -> Any: ...


class Row(NamedTuple):
    """Of a key in a window. instance: of the segment that holds what was granted last."""

    instance: str
    granted: int
    added: int


class _Filled(NamedTuple):
    """more: what was granted in the window. again: whether a call should try again."""

    window: int
    more: int
    again: bool


def _do(budget: Account, raw: bytes, call: Callable[..., int], *given: Any) -> None:
    """A call of the core about a key. One about a window that is over does nothing."""
    status = call(budget._handle, raw, len(raw), *given)
    if status < 0:
        budget._failed(status)


class Books:
    """Of one budget, in one process."""

    def __init__(self, budget: Account, file: StateFile) -> None:
        segment = budget.segment
        self.link: FileLink = links.of(file.of(segment), segment)
        self._budget_name = budget.name.encode("utf-8", "surrogatepass")
        self._mine = str(segment.geometry().instance)

    # what a budget calls

    def ask(self, budget: Account, raw: bytes, amount: int) -> bool | float:
        """Have so much granted. Returns whether to try again; a float: not before so many seconds,
        since the file cannot be used."""
        may_wait()
        try:
            return self._fill(budget, raw, amount)
        except UnreachableError:
            return self._ask_nobody(budget, raw, amount)

    def tend(self, budget: Account, raw: bytes) -> None:
        """After a settlement. What was spent beyond a grant is written before this returns; what is
        left of one is taken back by a thread."""
        found = _look(budget, raw)
        if found.spent + found.reserved > found.granted and not self.link.store.is_busy_here:
            with contextlib.suppress(UnreachableError):  # the next call writes it
                self._fill(budget, raw, 0)
        else:
            self.link.ensure(Tending).later(self, budget, raw)

    def give_back(self, budget: Account, raw: bytes) -> None:
        """What is kept ahead beyond a part of the budget."""
        self._fill(budget, raw, 0)

    def changing(self, budget: Account, raw: bytes, change: Callable[[], T]) -> T:
        """A change of what was spent, which is in the file too when this returns. Raises
        StateFileError, and then nothing was changed."""
        with self._needed(budget):
            self._in_file(lambda t: self._taken_over(t, budget, raw))
        done = change()
        with self._needed(budget):
            self._fill(budget, raw, 0)
        return done

    def add(self, budget: Account, raw: bytes, amount: int) -> None:
        """Raise the budget of the key for this window, or take back what was added."""

        def change(t: Transaction) -> bool:
            found, row = self._taken_over(t, budget, raw)
            added = min(max(row.added + amount, 0), _MOST)
            if amount < 0:  # before it is on the disk
                _do(budget, raw, lib.fshm_budget_add, _ADDED, amount, 0)
            self._write(t, raw, found.window, row._replace(added=added))
            return True

        with self._needed(budget):
            self._in_file(change)
        if amount >= 0:
            _do(budget, raw, lib.fshm_budget_add, _ADDED, amount, 0)

    def reset(self, budget: Account, raw: bytes | None, change: Callable[[], object]) -> None:
        def forget(t: Transaction) -> None:
            if raw is not None:
                self._write(t, raw, _look(budget, raw).window, Row(self._mine, 0, 0))
            else:
                t.db.execute(
                    "UPDATE money SET granted = 0, added = 0, instance = ? "
                    "WHERE limiter = ? AND minute > ?",
                    (self._mine, self._id(t), t.wall // MINUTE),
                )
            change()

        with self._needed(budget):
            self._in_file(forget)

    def overlay(self, budget: Account, raw: bytes, found: Any) -> None:
        """What the file has of a key of which this segment has nothing yet."""
        if found.granted:
            return
        with contextlib.suppress(UnreachableError):
            row = self._in_file(lambda t: self._row(t, budget, raw, found), write=False)
            if row is not None and row.instance != self._mine:
                found.spent = max(found.spent, row.granted)
                found.limit += row.added

    def history(self, raw: bytes) -> list[tuple[int, int]]:
        """Windows of a key, the latest first: their end, minutes since 1970, and what was granted.
        Raises StateFileError."""

        def read(t: Transaction) -> list[tuple[int, int]]:
            return t.db.execute(
                "SELECT minute, granted FROM money WHERE limiter = ? AND hash = ? "
                "ORDER BY minute DESC LIMIT ?",
                (self._id(t), self._hash(t, raw), _KEPT),
            ).fetchall()

        try:
            return self._in_file(read, write=False)
        except UnreachableError as error:
            link = self.link
            raise link.error(f"{link.terms.shown} {link.no_answer} ({error})") from error

    # in a transaction

    def _fill(self, budget: Account, raw: bytes, amount: int) -> bool:
        """_filled() in a transaction. What it grants is in the segment when it is on the disk, and
        before another thread of this process begins one."""

        def put(filled: _Filled) -> None:
            if filled.more:
                _do(budget, raw, lib.fshm_budget_grant, filled.more, filled.window, 0)

        return self._in_file(lambda t: self._filled(t, budget, raw, amount), put).again

    def _filled(self, t: Transaction, budget: Account, raw: bytes, amount: int) -> _Filled:
        """Grant, so that ``amount`` more can be reserved; or take back what is kept beyond a
        part."""
        found, row = self._taken_over(t, budget, raw)
        part, used = found.limit // _PART, found.spent + found.reserved
        granted = max(row.granted, found.granted)  # more here: granted during an outage
        beyond, need = max(used - found.granted, 0), used + amount - found.granted
        more = back = 0
        if need > 0:
            more = min(need + part // 2, max(found.limit - granted, 0))
            more = max(beyond, more if more >= need else 0)
        elif not amount and found.granted - used > part:
            out = ffi.new("fshm_budget *")
            _do(budget, raw, lib.fshm_budget_withdraw, found.window, 0, out)
            back = int(out.granted)
            more = min(part // 2, back)
        after = row._replace(granted=min(max(granted + more - back, 0), _MOST))
        if after != row:
            self._write(t, raw, found.window, after)
        # need <= 0: another call has had it granted meanwhile
        return _Filled(found.window, more, more > 0 or need <= 0)

    def _taken_over(self, t: Transaction, budget: Account, raw: bytes) -> tuple[Any, Row]:
        """The key in the segment, and its row in the file, which is this segment's now. What others
        were granted was on the disk before: so it may be put here at once, and is put here before
        any process of this segment sees that the row is taken."""
        found = _look(budget, raw)
        row = self._row(t, budget, raw, found)
        if row is not None and row.instance == self._mine:
            return found, row
        had = row or Row("", 0, 0)
        for which, to in ((_SPENT, had.granted), (_GRANTED, had.granted), (_ADDED, had.added)):
            if to:
                _do(budget, raw, lib.fshm_budget_raise, which, to, found.window, 0)
        mine = had._replace(instance=self._mine)
        self._write(t, raw, found.window, mine)
        return _look(budget, raw), mine

    def _row(self, t: Transaction, budget: Account, raw: bytes, at: Any) -> Row | None:
        """at: the key in the segment, now."""
        found = t.db.execute(
            "SELECT instance, granted, added FROM money "
            "WHERE limiter = ? AND hash = ? AND minute = ?",
            (self._id(t), self._hash(t, raw), at.window),
        ).fetchone()
        if found is None:
            if t.used_up and _end(budget._limit, t.used_up // MINUTE) == at.window:
                return Row("", at.limit, 0)  # nobody knows what was spent
            return None
        row = Row(*found)
        if not (isinstance(row.instance, str) and all(
            type(each) is int and 0 <= each <= _MOST for each in row[1:]
        )):  # fmt: skip
            log.warning(
                "%s: what it has of a key of budget %r is no state: the key counts as used up",
                self.link.terms.shown, self._budget_name.decode("utf-8", "backslashreplace"),
            )  # fmt: skip
            return Row("", at.limit, 0)
        return row

    def _write(self, t: Transaction, raw: bytes, window: int, row: Row) -> None:
        of, hashed, seal = self._id(t, make=True), self._hash(t, raw), self.link.seal
        name, sealed = (raw, None) if seal is None else (None, seal.seal(raw))
        t.db.execute(
            "INSERT INTO money (limiter, hash, minute, name, sealed, instance, granted, added, "
            "leased) VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1) ON CONFLICT (limiter, hash, minute) DO "
            "UPDATE SET name = excluded.name, sealed = excluded.sealed, "
            "instance = excluded.instance, granted = excluded.granted, added = excluded.added, "
            "leased = 1",
            (of, hashed, window, name, sealed, *row),
        )
        t.db.execute(
            "DELETE FROM money WHERE limiter = ? AND hash = ? AND minute <= (SELECT minute FROM "
            "money WHERE limiter = ? AND hash = ? ORDER BY minute DESC LIMIT 1 OFFSET ?)",
            (of, hashed, of, hashed, _KEPT),
        )

    def _id(self, t: Transaction, make: bool = False) -> int | None:
        return t.ids.limiter(t.db, self._budget_name, make)

    def _hash(self, t: Transaction, raw: bytes) -> bytes:
        return hash_of(t.secret, self._budget_name, raw)

    # the file

    def _in_file(
        self,
        call: Callable[[Transaction], T],
        then: Callable[[T], object] | None = None,
        *,
        write: bool = True,
    ) -> T:
        """``call`` in a transaction, and ``then`` with what it returned, when that is on the disk.
        Raises UnreachableError."""
        link, began = self.link, time.monotonic_ns()
        if link.store.is_busy_here:
            raise UnreachableError("called within a transaction")
        link.ensure(Background)
        link.check()

        def run() -> T:
            if not link.store.lock.acquire(timeout=link.terms.timeout):
                raise link.store.locked("a write of this process does not end")
            try:
                with link.store.transaction(write) as t:
                    found = call(t)
                link.has_answered = True
                if then is not None:
                    then(found)
                link._measured(link.component, "money", time.monotonic_ns() - began)
                return found
            finally:
                link.store.lock.release()

        return link._guarded(run)

    @contextlib.contextmanager
    def _needed(self, budget: Account) -> Iterator[None]:
        try:
            yield
        except UnreachableError as error:
            link = self.link
            raise link.error(
                f"budget {budget.name!r}: nothing was changed, since {link.terms.shown} "
                f"{link.no_answer} ({error}): try again later"
            ) from error

    def _ask_nobody(self, budget: Account, raw: bytes, amount: int) -> bool | float:
        """ask() during an outage, by ``on_outage``. What is granted is written by the first call
        that reaches the file."""
        how, found = self.link.terms.on_outage, _look(budget, raw)
        # What is left of a key that cannot be read is not known.
        if how == "deny" or (how == "local" and not found.granted):
            return self.link.retry_after_ns / 1e9
        used = found.spent + found.reserved
        more = max(min(used + amount, found.limit) - found.granted, 0)
        if more:
            _do(budget, raw, lib.fshm_budget_grant, more, found.window, 0)
        return bool(more)


def _look(budget: Account, raw: bytes) -> Any:
    out = ffi.new("fshm_budget *")
    status = lib.fshm_budget_look(budget._handle, raw, len(raw), 0, out)
    if status != lib.FSHM_OK:
        budget._failed(status)
    return out


@functools.lru_cache(maxsize=256)
def _end(limit: limits.Money, minute: int) -> int:
    """Of the window that this minute is in."""
    if limit.per is None:
        return 2**28 - 1
    known = zones.spans(limit.timezone) if limit.timezone != zones.UTC else ()
    words = ffi.new("uint64_t[]", known or (0,))
    return int(lib.fshm_calendar_end(limit._per_ns, words, len(known), minute))


class Tending:
    """The thread of a process that takes back what its settlements have left over."""

    def __init__(self, link: FileLink) -> None:
        self._link = link
        self._due: queue.SimpleQueue[tuple[Books, Account, bytes]] = queue.SimpleQueue()

    def start(self) -> None:
        threading.Thread(target=self._tend, name="fast-shm-durable_money", daemon=True).start()

    def later(self, books: Books, budget: Account, raw: bytes) -> None:
        self._due.put((books, budget, raw))  # from the collector too: it takes no lock

    def _tend(self) -> None:
        while True:
            books, budget, raw = self._due.get()
            try:
                books.give_back(budget, raw)
            except UnreachableError:
                pass  # it stays granted
            except Exception:
                log.exception("taking back what a budget has left over failed")
            del books, budget


def save(link: FileLink) -> tuple[int, int]:
    """Take back all that this segment holds of budgets. Returns how many nano-dollars, of how many
    keys. Raises UnreachableError."""
    mine, total, keys = str(link.segment.geometry().instance), 0, 0

    def run() -> tuple[int, int]:
        nonlocal total, keys
        with link.store.transaction() as t:
            rows = t.db.execute(
                "SELECT limiter.name, limiter, hash, minute, money.name, sealed FROM money "
                "JOIN limiter ON limiter.id = limiter WHERE leased AND instance = ?", (mine,)
            ).fetchall()  # fmt: skip
            for limiter, number, hashed, minute, name, sealed in rows:
                raw = name if sealed is None or link.seal is None else link.seal.unseal(sealed)
                handle = _found(link.segment, limiter)
                out = ffi.new("fshm_budget *")
                if raw is not None and handle is not None:
                    lib.fshm_budget_withdraw(handle, raw, len(raw), minute, 0, out)
                back = int(out.granted)
                t.db.execute(
                    "UPDATE money SET leased = ?, granted = max(granted - ?, 0) "
                    "WHERE limiter = ? AND hash = ? AND minute = ?",
                    # What is settled for less, or refunded, is to be given back later.
                    (int(out.reserved + out.spent > 0), back, number, hashed, minute),
                )
                total, keys = total + back, keys + (back > 0)
        return total, keys

    return link._guarded(run)


def _found(segment: Any, limiter: bytes) -> Any:
    out = ffi.new("fshm_limiter **")
    if lib.fshm_limiter_find(segment._handle, limiter, len(limiter), out) != lib.FSHM_OK:
        return None
    return owned(out[0], lib.fshm_limiter_close, segment._handle)
