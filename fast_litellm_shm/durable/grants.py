"""What a state file answers to a request: as algorithms.lua does at a server, for one host.

The arithmetic is the core's (csrc/limits/stored.c). Here is what is around it: which state belongs
to which limit, several limits at once, and how long a lease is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fast_litellm_shm._shared import zones
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.cluster.algorithms import (
    CALENDAR,
    Answer,
    Known,
    Request,
    Rule,
    most_leased,
)
from fast_litellm_shm.durable.store import LimitNumbers, Transaction, packed
from fast_litellm_shm.limits import FixedWindow, LimitSpec

_PACE = 250_000_000  # ns that a batch should last
_FIRST = 4  # tokens of a first batch, at most
_LEAST_BACK_OFF, _MOST_BACK_OFF = 60_000_000, 1_000_000_000  # ns after a refusal
_MOST_LEASED = 2**24 - 2  # TOKEN_LEASE_MOST of algorithms.h
_PLACES = 12  # states of a key, with those of limits that were taken away
_ROUND = 2**36  # ns: so rarely the index of `until` changes

_NO_LIMIT = (0, 0, 0, 0, 0, "")


class Row(NamedTuple):
    """A state as it is kept: turn: of which of the limits that the last call had; -1: of none, it
    was taken away. rule: the id of the limit that it was counted under. end: of its window, or of a
    bucket its arrival time; of the calendar in minutes since 1970. granted: ``end`` after the last
    grant."""

    turn: int
    rule: int
    end: int
    used: int
    previous: int
    granted: int


def rows_of(text: str) -> list[Row]:
    """Of a key. Raises sqlite3.DatabaseError: they are none."""
    try:
        found = [Row(*each) for each in json.loads(text)]
        if all(type(each) is int and -1 <= each < 2**63 for row in found for each in row):
            return found
    except (TypeError, ValueError):
        pass
    raise sqlite3.DatabaseError("database disk image is malformed: states that are none")


@functools.lru_cache(maxsize=256)
def _spans(zone: str) -> tuple[Any, int]:
    known = zones.spans(zone) if zone not in ("", zones.UTC) else ()
    return ffi.new("uint64_t[]", known or (0,)), len(known)


def applied(
    op: int,
    rule: LimitNumbers,
    stored: Any,
    cost: int,
    at: tuple[int, int],
    charged: Any = ffi.NULL,
) -> Any:
    """A ``fshm_stored_answer``. at: the file's time and the time of day. Raises
    sqlite3.DatabaseError: what was kept is no state."""
    out, limit = ffi.new("fshm_stored_answer *"), ffi.new("fshm_limit *", rule[:5])
    spans, count = _spans(rule[5])
    when = ffi.new("fshm_stored_time *", (*at, spans, count))
    status = lib.fshm_stored_apply(op, limit, stored, cost, charged, when, out)
    if status != lib.FSHM_OK:
        raise sqlite3.DatabaseError(f"database disk image is malformed: no state ({status})")
    return out


def over(rule: LimitNumbers, stored: Any, at: tuple[int, int]) -> Any:
    """What there is of a state, under its own limit. It begins no window, so the zone is of no
    account (nor whether this process's tz database knows it)."""
    return applied(lib.FSHM_PEEK, (*rule[:5], ""), stored, 0, at)


class _State:
    """Of one limit, in a request. at: as of applied()."""

    def __init__(self, rule: LimitNumbers, row: Row | None) -> None:
        self.stored = ffi.new("fshm_stored *")
        self.rule, self.granted, self.turn = rule, 0, -1
        if row is not None:
            self.stored[0] = {
                "limit": rule[:5], "end": row.end, "used": row.used, "previous": row.previous,
            }  # fmt: skip
            self.granted, self.turn = row.granted, row.turn

    def apply(
        self, op: int, limit: LimitNumbers, cost: int, at: tuple[int, int], charged: Any = ffi.NULL
    ) -> Any:
        out = applied(op, limit, self.stored, cost, at, charged)
        if op != lib.FSHM_PEEK:
            found = self.stored.limit
            label = (found.n, found.per_ns, found.burst, found.kind, found.strict)
            # Limits of two zones alone differ in none of these: then the state has gone over.
            rule = limit if label == limit[:5] else (*label, self.rule[5])
            if rule != self.rule:  # what was granted before is not given back
                self.rule, self.granted = rule, 0
        return out

    def give_back(self, limit: LimitNumbers, tokens: int, at: tuple[int, int]) -> None:
        """What was granted and is not spent, as far as it has not drained."""
        if tokens and self.granted:
            self.take_back(limit, tokens, at, self.granted)

    def take_back(
        self, limit: LimitNumbers, tokens: int, at: tuple[int, int], charged_end: int
    ) -> None:
        """Of a charge whose state had this ``end``."""
        charged = ffi.new("fshm_stored *")
        charged[0] = {"limit": self.rule[:5], "end": charged_end}
        self.apply(lib.FSHM_REFUND, limit, tokens, at, charged)

    def copy(self) -> tuple[Any, LimitNumbers, int]:
        kept = ffi.new("fshm_stored *", self.stored[0])
        return kept, self.rule, self.granted

    def restore(self, copied: tuple[Any, LimitNumbers, int]) -> None:
        self.stored, self.rule, self.granted = copied


def numbers(rule: Rule) -> LimitNumbers:
    """The limit as the file counts it. A strict bucket refills more slowly by its lease."""
    return raw_numbers(rule.limit, rule.lease_us * 1000)


def raw_numbers(limit: LimitSpec, lease: int = 0) -> LimitNumbers:
    if isinstance(limit, FixedWindow) and limit.timezone is not None:
        return limit.n, limit._per_ns, 0, lib.FSHM_CALENDAR, 0, limit.timezone
    n, per, burst, kind, strict = limit._raw()
    return n, per + lease if strict else per, burst, kind, strict, ""


def hash_of(secret: bytes, limiter: bytes, key: bytes) -> bytes:
    return hashlib.blake2b(
        b"%d:%b:%b" % (len(limiter), limiter, key), digest_size=16, key=secret
    ).digest()


class Grants:
    """Answers requests, in one transaction. seal: how a segment that keeps no names calls a key."""

    def __init__(self, t: Transaction, seal: Callable[[bytes], bytes] | None) -> None:
        self._t, self._seal = t, seal

    def answer(self, request: Request) -> Answer:
        key = _Key(self._t, request)
        found = _OPERATIONS[request.operation](key)
        key.write(self._seal)
        return found._replace(junk=True) if key.junk else found


class _Key:
    """The states of one request's key, and what is done with them."""

    def __init__(self, t: Transaction, request: Request) -> None:
        self.t, self.request = t, request
        ids, db = t.ids, t.db
        self.limiter = ids.limiter(db, request.limiter, make=request.operation != "look")
        self.hash = request.at or hash_of(t.secret, request.limiter, request.key)
        row = db.execute(
            "SELECT at, batch, leased, states, until, minute FROM key "
            "WHERE limiter = ? AND hash = ?",
            (self.limiter, self.hash),
        ).fetchone()
        found: tuple[int, int, int, str, int, int] = row or (0, 0, 0, "[]", 0, 0)
        self.at, self.batch, self.leased, self._text, self._until, self._minute = found
        self._is_new = row is None
        self.now = max(t.now, self.at)  # time never goes back
        self._when = self.now, t.wall
        self.was_leased = self.leased
        self.rules = [numbers(each) for each in request.rules]
        # What the row has is no state: what was used is not known, so all of it counts as used.
        self.junk = False
        states = self._read()
        self.states = [self._one(i, states) for i in range(len(self.rules))]
        self._others = [each for each in states if each is not None]
        self.redated: set[int] = set()
        if self._is_new and not self.junk and t.used_up and self.limiter is not None:
            self._text = self._packed()[0]  # what it counts as, without a row

    # which state belongs to which limit

    def _read(self) -> list[_State | None]:
        try:
            rows = rows_of(self._text)
            found: list[_State | None] = [_State(self._numbers(row.rule), row) for row in rows]
            for state in found:
                assert state is not None
                self._over(state)
        except sqlite3.DatabaseError:
            self.junk = self._is_new = True
            return []
        turns = [row.turn for row in rows if row.turn >= 0]
        as_before = turns == list(range(len(self.rules))) and all(
            self._is_alike(i, each) for i, each in enumerate(found[: len(turns)])
        )
        return found if as_before or not rows else self._matched([each for each in found if each])

    def _numbers(self, rule: int) -> LimitNumbers:
        return self.t.ids.numbers(self.t.db, rule)

    def _is_alike(self, i: int, state: _State | None) -> bool:
        _, per, _, kind, *_ = self.rules[i]
        return state is not None and (state.rule[1], state.rule[3]) == (per, kind)

    def _matched(self, found: list[_State]) -> list[_State | None]:
        """First one for each limit, by its place, then the others. As algorithms.lua: a limit that
        was in force has one that goes on from it, as long as there are enough."""
        before = [each for each in found if each.turn >= 0]
        gone = [each for each in found if each.turn < 0]
        places: list[_State | None] = [None] * len(self.rules)

        def match(among: list[_State], fits: Callable[[int, _State], bool]) -> None:
            for i in range(len(places)):
                if places[i] is None:
                    one = next((each for each in among if fits(i, each)), None)
                    if one is not None:
                        places[i] = one
                        among.remove(one)

        def comes_back(i: int, state: _State) -> bool:
            return places.count(None) > len(before) and self._is_alike(i, state)

        match(before, self._is_alike)
        match(gone, comes_back)
        match(before, lambda *_: True)
        if len(found) >= _PLACES:
            match(gone, lambda *_: True)
        return places + before + gone

    def _one(self, i: int, states: list[_State | None]) -> _State:
        """The state of a limit; taken out of the list."""
        state = states[i] if i < len(states) else None
        if i < len(states):
            states[i] = None
        if state is not None:
            return state
        state = _State(_NO_LIMIT, None)
        since = self.now if self.junk else self.t.used_up
        if since and self._is_new:
            # A file's time is the time of day when it is made.
            wall = self.t.wall if self.junk else since
            state.apply(lib.FSHM_CHARGE, self.rules[i], self._capacity(i), (since, wall))
        return state

    # arithmetic

    def _capacity(self, i: int) -> int:
        n, _, burst, kind, *_ = self.rules[i]
        return burst if kind == lib.FSHM_BUCKET else n

    def apply(self, i: int, op: int, cost: int) -> Any:
        return self.states[i].apply(op, self.rules[i], cost, self._when)

    def look(self, i: int, cost: int = 0) -> Any:
        return self.apply(i, lib.FSHM_PEEK, cost)

    def give_back(self, tokens: Sequence[int]) -> None:
        for i in range(len(self.states)):
            self.return_to(i, tokens[i])

    def return_to(self, i: int, tokens: int) -> None:
        self.states[i].give_back(self.rules[i], tokens, self._when)

    def fits(self, costs: Sequence[int]) -> bool:
        return all(self.look(i, cost).status for i, cost in enumerate(costs))

    def charge(self, costs: Sequence[int]) -> None:
        for i, cost in enumerate(costs):
            if cost:
                self.apply(i, lib.FSHM_ACQUIRE, cost)

    def size(self, kept: Sequence[int]) -> int:
        """The next batch, in times the cost: as many as the host uses in a quarter of a second; at
        most half of what is left, and with what is kept a hundredth of the limit."""
        rules, costs = self.request.rules, self.request.costs
        pace = min([_PACE, *(rule.lease_us * 500 for rule in rules if rule.lease_us)])
        n = _FIRST
        if self.batch:
            n = self.batch * pace // max(self.now - self.at, 1_000_000)
            n = max(_FIRST, self.batch // 4, min(n, self.batch * 8))
        for i, cost in enumerate(costs):
            if cost:
                most = min(most_leased(rules[i].limit), _MOST_LEASED)
                half = self.look(i).remaining // 2
                n = min(n, half // cost, (most - kept[i]) // cost)
        return max(n, 0) if any(costs) else 0

    def denied(self, costs: Sequence[int]) -> tuple[int, int]:
        """For how long, in ns (-1: for ever), and by which limit."""
        wait, refused = 0, 0
        for i, cost in enumerate(costs):
            found = self.look(i, cost)
            if not found.status and wait >= 0 and not 0 <= found.retry_ns <= wait:
                wait, refused = found.retry_ns, i
        return wait, refused

    def known(self) -> tuple[Known, ...]:
        out = []
        for i, rule in enumerate(self.request.rules):
            found, stored = self.look(i), self.states[i].stored
            bucket = rule.kind == 0
            used = self._capacity(i) - found.remaining if bucket else found.used
            lease = rule.lease_us * 1000 if bucket else found.window_ns
            sliding = rule.kind == lib.FSHM_SLIDING
            current, previous = (stored.used, stored.previous) if sliding else (0, 0)
            redated, window = i in self.redated, self.window(i, found.used)
            out.append(Known(used, found.left_ns, lease, redated, current, previous, window))
        return tuple(out)

    def window(self, i: int, used: int) -> int:
        """The name of the present window, as long as it lasts: its end. 0: of a bucket, or nothing
        is used. Of the calendar a window that begins anew after a reset has the same end."""
        stored, limit = self.states[i].stored, self.states[i].stored.limit
        if self.rules[i][3] == lib.FSHM_BUCKET or not used:
            return 0
        # A sliding state may have been written in the window before.
        before = limit.kind == lib.FSHM_SLIDING and stored.end <= self.now
        return int(stored.end + limit.per_ns * before)

    # the row

    def write(self, seal: Callable[[bytes], bytes] | None) -> None:
        if self.limiter is None or self.request.operation == "look":
            return
        text, until, minute = self._packed()
        if text == self._text and self.leased == self.was_leased:
            return
        if self._is_new and not until and not self.leased and not self.t.used_up:
            return  # as one that was never seen
        if self.t.used_up:  # a key without a row counts as used up that long
            longest = max((rule[1] for rule in self.rules), default=0)
            until = max(until, self.t.used_up + 2 * longest)
        if not until <= self._until <= until + 2 * _ROUND:
            self._until = (until // _ROUND + 2) * _ROUND
        name = sealed = None
        if not self.request.at:
            name = self.request.key if seal is None else None
            sealed = None if seal is None else seal(self.request.key)
        self.t.db.execute(
            "INSERT INTO key (limiter, hash, name, sealed, at, batch, leased, until, minute, "
            "states) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (limiter, hash) "
            "DO UPDATE SET name = coalesce(excluded.name, name), "
            "sealed = coalesce(excluded.sealed, sealed), "
            "at = excluded.at, batch = excluded.batch, leased = excluded.leased, "
            "until = excluded.until, minute = excluded.minute, states = excluded.states",
            (
                self.limiter, self.hash, name, sealed, self.now, self.batch, self.leased,
                self._until, minute, text,
            ),
        )  # fmt: skip

    def _packed(self) -> tuple[str, int, int]:
        """The states as they are kept, and until when they count: by the file's time, and by the
        time of day."""
        rows, until, minute = [], 0, 0
        for turn, state in [*enumerate(self.states), *((-1, each) for each in self._others)]:
            over = self._over(state)
            if over or turn >= 0:
                rows.append(self._row(turn, state))
                until = max(until, self.now + over if over else 0)
                if over and state.rule[3] == lib.FSHM_CALENDAR:
                    minute = max(minute, state.stored.end)
        return packed(rows), until, minute

    def _over(self, state: _State) -> int:
        if not state.stored.limit.n:
            return 0
        return int(over(state.rule, state.stored, self._when).over_ns)

    def _row(self, turn: int, state: _State) -> Row:
        stored = state.stored
        rule = state.rule if stored.limit.n else self.rules[turn]
        return Row(
            turn, self.t.ids.rule(self.t.db, rule), stored.end, stored.used, stored.previous,
            state.granted,
        )  # fmt: skip


# operations: as algorithms.lua describes them


def _take(key: _Key) -> Answer:
    request, costs = key.request, key.request.costs
    ahead, whole = request.operation == "ahead", request.operation != "single"
    once = (0,) * len(costs) if ahead else costs
    if request.operation == "take":
        key.give_back(request.given)
    _redate(key, once)
    if not key.fits(once):
        wait, refused = key.denied(once)
        back_off = _MOST_BACK_OFF
        if wait >= 0:
            back_off = min(max(wait, _LEAST_BACK_OFF), _MOST_BACK_OFF)
        return Answer(False, 0, wait, back_off, refused, key.known())
    key.charge(once)
    batch = 0
    if whole:
        batch = key.size(request.kept)
        key.charge([batch * cost for cost in costs])
        for state in key.states:
            state.granted = state.stored.end
        key.leased = int(batch > 0 or any(request.kept))
        key.batch = max(batch, 1)
    back_off = 0
    if not ahead and not batch and not key.fits(costs):
        back_off = _rest(key)
    return Answer(True, batch, 0, back_off, 0, key.known())


def _redate(key: _Key, once: Sequence[int]) -> None:
    """Leased tokens of a bucket are given back and taken again, as of now, so that their lease
    begins anew with the batch's. Where that does not fit, they end as they would have."""
    request = key.request
    if request.operation == "single":
        return
    before = {}
    for i, (rule, kept) in enumerate(zip(request.rules, request.kept, strict=False)):
        if rule.kind == 0 and kept:
            before[i] = key.states[i].copy()
            key.return_to(i, kept)
            if not key.look(i, kept + once[i]).status:
                break
    else:
        for i in before:
            key.apply(i, lib.FSHM_ACQUIRE, request.kept[i])
            key.redated.add(i)
        return
    for i, copied in before.items():
        key.states[i].restore(copied)


def _rest(key: _Key) -> int:
    """ns until the next request is worth it, after the last tokens were granted."""
    out = 0
    for i, rule in enumerate(key.request.rules):
        if rule.kind not in (lib.FSHM_WINDOW, CALENDAR):
            some = rule.burst * rule.num // rule.den // 2 if rule.kind == 0 else rule.per_us * 50
            retry = key.look(i, key.request.costs[i]).retry_ns
            out = max(out, min(_LEAST_BACK_OFF, max(retry, some)))
    return out


def _look(key: _Key) -> Answer:
    wait, refused = key.denied(key.request.costs)
    return Answer(wait == 0, 0, wait, 0, refused, key.known())


def _give(key: _Key) -> Answer:
    key.give_back(key.request.given)
    key.leased = 0
    return _done(key)


def _charge(key: _Key) -> Answer:
    request = key.request
    # ``leased`` stays: a batch may be on its way to the segment, which a clean stop gives back.
    key.give_back(request.given)
    for i, cost in enumerate(request.costs):
        most = key.look(i).remaining if request.operation == "fill" else cost
        if min(cost, most):
            key.apply(i, lib.FSHM_CHARGE, min(cost, most))
    return _done(key)


def _refund(key: _Key) -> Answer:
    """Of the window that the request names, and of no other: so it may be as late as it likes. Of a
    sliding limit that may be the window before the present one, which still counts."""
    request = key.request
    key.give_back(request.given)
    for i, (rule, cost) in enumerate(zip(request.rules, request.costs, strict=False)):
        if not cost:
            continue
        limit, asked = key.states[i].stored.limit, request.left[i]
        present = key.window(i, key.look(i).used)
        is_bucket = rule.kind == 0 or limit.kind == lib.FSHM_BUCKET
        if is_bucket or (asked and asked == present):
            key.apply(i, lib.FSHM_REFUND, cost)
        elif limit.kind == lib.FSHM_SLIDING and asked and asked + limit.per_ns == present:
            key.states[i].take_back(key.rules[i], cost, key._when, asked)
    return _done(key)


def _block(key: _Key) -> Answer:
    key.give_back(key.request.given)
    for i, (rule, ns) in enumerate(zip(key.request.rules, key.request.costs, strict=False)):
        if rule.kind == 0 and ns:
            key.apply(i, lib.FSHM_BLOCK, ns)
    return _done(key)


def _reset(key: _Key) -> Answer:
    key.states = [_State(_NO_LIMIT, None) for _ in key.states]
    key._others, key.leased, key.batch = [], 0, 0
    return _done(key)


def _done(key: _Key) -> Answer:
    return Answer(True, 0, 0, 0, 0, key.known())


_OPERATIONS: dict[str, Callable[[_Key], Answer]] = {
    "take": _take,
    "single": _take,
    "ahead": _take,
    "look": _look,
    "give": _give,
    "charge": _charge,
    "fill": _charge,
    "refund": _refund,
    "block": _block,
    "reset": _reset,
}
