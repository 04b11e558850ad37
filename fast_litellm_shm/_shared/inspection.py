"""Look into a segment from outside: numpy views over the mapping, read only.

Counts and names are those of the key statistics. They are exact while no process is killed. A key's
counts end when another key takes its slot.
"""

from __future__ import annotations

import codecs
import fnmatch
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from fast_litellm_shm import limits
from fast_litellm_shm._shared import key_grammar, side_limiters
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.spending import Spending
from fast_litellm_shm._shared.spending import spending as spending_of

if TYPE_CHECKING:
    from decimal import Decimal

    import numpy
    from numpy.typing import NDArray

SORTS = ("busiest", "admitted", "denied", "key")
_PART = 1 << 16  # slots that are looked at together
# A pool is two limiters, whose names begin so: one of its endpoints, and one of the whole.
POOL, POOL_TOTAL = "pool ", "pool-total "


def open_for_reading(name: str, allow_other_owner: bool = False) -> Segment:
    """Attach without write permission, and without an entry in the process table."""
    return Segment(
        name,
        mode=0o600,  # mode and names are not used when attaching: whatever the environment says
        names="plain",
        create=False,
        allow_other_owner=allow_other_owner or None,
        _read_only=True,
    )


def pools_among(limiters: Iterable[str]) -> set[str]:
    """Those limiters that are the endpoints of a pool."""
    names = set(limiters)
    return {
        name
        for name in names
        if name.startswith(POOL) and POOL_TOTAL + name.removeprefix(POOL) in names
    }


def stored_name(segment: Segment, slot: int) -> tuple[str, bytes] | None:
    """The name of the key in a slot, and its bytes (of a long key, the first 200); None where the
    segment does not keep it, or no longer."""
    out, length = ffi.new("char[256]"), ffi.new("uint64_t *")
    if not lib.fshm_key_name(segment._handle, slot, out, 256, length):
        return None
    stored = min(length[0], 200)
    raw: bytes = ffi.buffer(out, stored)[:]
    if length[0] == stored:
        return raw.decode("utf-8", "replace"), raw
    # it may be cut inside a character: leave that one out, and keep other bad bytes
    text, _ = codecs.utf_8_decode(raw, "replace", False)
    return text + "…", raw


def held_permits(segment: Segment) -> Iterator[tuple[int, Any]]:
    """The slot of each permit that is held, and its ``fshm_permit_info``, valid until the next."""
    from fast_litellm_shm._shared.dependencies import numpy

    info, when = ffi.new("fshm_permit_info *"), _view(segment.geometry(), "slots")["when"]
    for slot in numpy.flatnonzero(when >= numpy.uint64(7 << 61)).tolist():
        if lib.fshm_permit_at(segment._handle, slot, info) == 1:  # not released since
            yield slot, info


def waiting_callers(segment: Segment, names: bool = False) -> Iterator[Any]:
    """The ``fshm_waiter_info`` of each place of callers that wait for a key, valid until the next.
    names: also look for the names of the keys."""
    if not lib.fshm_waiters(segment._handle, ffi.NULL, 0, False):
        return
    infos = ffi.new("fshm_waiter_info[]", _MOST_WAITING)
    count = lib.fshm_waiters(segment._handle, infos, _MOST_WAITING, names)
    yield from (infos[at] for at in range(count))


def limiters_in(segment: Segment) -> Iterator[tuple[int, bytes, Any]]:
    """The index of each limiter, its name, and its ``fshm_limiter_info``, valid until the next."""
    info = ffi.new("fshm_limiter_info *")
    for index in range(segment.geometry().limiters):
        if lib.fshm_limiter_at(segment._handle, index, info) == lib.FSHM_OK:
            yield index, ffi.buffer(info.name, info.name_length)[:], info


_MOST_WAITING = 4096  # places: layout.h
# A moving window of more hits than this is not counted: each hit is one read (30 ns).
_MOST_HITS = 50_000
_TRIES = 4  # reads of counts that processes are moving meanwhile


@dataclass(frozen=True)
class KeyRow:
    """One key of one limiter.

    remaining: how much the tightest of its limits admits now. limit: the most that it admits at
    once (a bucket's burst). Both are None where the limit is not known: it stands at the end of the
    key (integrations.limits), and the segment does not keep the key's name. Of a key of a budget
    they are dollars, and ``usd`` is true. retry_after: seconds until a cost of 1 fits (of a budget:
    until it has anything left); None: never, or not known. reset_after: seconds until nothing is
    consumed; None: never, or not known. raw: the bytes of the key (of a long one, the first 200);
    empty where only its hash is known.
    """

    key: str
    limiter: str
    admitted: int
    denied: int
    remaining: int | Decimal | None
    limit: int | Decimal | None
    retry_after: float | None
    reset_after: float | None
    raw: bytes = b""
    usd: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether the key is longer than raw."""
        return is_cut(self.key, self.raw)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        del found["raw"]
        if found.pop("usd"):
            found |= {"remaining": float(self.remaining or 0), "limit": float(self.limit or 0)}
            found["unit"] = "USD"
        return found


@dataclass(frozen=True)
class Counts:
    """The counts of all slots of the hash table, as of one reading.

    who, meta, admitted, denied: arrays over all slots. A slot's counts belong to one key as long as
    its meta stays the same. slots: the slots that have key statistics, in order; owner: the index
    of the limiter of each of them."""

    slots: NDArray[numpy.int64]
    owner: NDArray[numpy.uint16]
    who: NDArray[numpy.uint64]
    meta: NDArray[numpy.uint32]
    admitted: NDArray[numpy.uint64]
    denied: NDArray[numpy.uint64]

    @classmethod
    def of(cls, slots: int) -> Counts:
        """Room for the counts of so many slots."""
        from fast_litellm_shm._shared.dependencies import numpy

        kinds = ("int64", "uint16", "uint64", "uint32", "uint64", "uint64")
        return cls(*(numpy.empty(slots, each) for each in kinds))


@dataclass(frozen=True)
class PermitRow:
    """One permit that is held. key_hash: the same for all permits of a key. pid: None if its
    process is dead: then the permit does not count, and the next process that needs one takes it.
    idle: a pooled connection that is not in use."""

    limiter: str
    key: str
    key_hash: int
    pid: int | None
    idle: bool
    age_seconds: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Inspection:
    """The contents of a segment. Counts are read by the constructor, rows by the iterators."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._handle = segment._handle
        #: Segment.damaged, after a check of the whole segment.
        self.damaged = segment._check()
        self._geometry = segment.geometry()
        self._limiters = self._read_limiters()
        self._beside = self._read_beside()
        self.counts = self._read_counts()

    @property
    def keys_total(self) -> int:
        """How many keys have statistics."""
        return int(self.counts.slots.size)

    def _heaviest(self, slots: NDArray[numpy.int64], sort: str, most: int) -> NDArray[numpy.int64]:
        """Up to ``most`` of these slots, those with the most calls of a kind first."""
        from fast_litellm_shm._shared.dependencies import numpy

        calls = sum(
            getattr(self.counts, each)[slots].astype(numpy.int64)
            for each in (("admitted", "denied") if sort == "busiest" else (sort,))
        )
        if most < slots.size:
            first = numpy.argpartition(-calls, most)[:most]
            first.sort()
            slots, calls = slots[first], calls[first]
        return slots[numpy.argsort(-calls, kind="stable")]

    @functools.cached_property
    def _keys_of(self) -> NDArray[numpy.int64]:
        """How many keys each limiter has, by its index."""
        from fast_litellm_shm._shared.dependencies import numpy

        return numpy.bincount(self.counts.owner, minlength=self._geometry.limiters)

    def limiter_names(self) -> dict[int, str]:
        """By index, the one in counts.owner."""
        return {index: info["name"] for index, info in self._limiters.items()}

    def limiters(self) -> list[dict[str, Any]]:
        """Each limiter but side limiters: name, limits (text), version, resets, keys,
        shared_seconds (0: each key has a slot; else for how many seconds keys without one may still
        use the shared counters)."""
        keys = self._keys_of
        return [
            {
                "name": info["name"],
                "limits": ["of each key"]
                if info["planned"]
                or info["name"] in key_grammar.NAMES
                or key_grammar.units_of(info["name"])
                else limits.described(info["limits"]),
                "version": info["version"],
                "resets": info["resets"],
                "keys": int(keys[index]),
                "shared_seconds": info["shared_seconds"],
            }
            for index, info in self._limiters.items()
            if index not in self._beside
        ]

    def keys(
        self,
        *,
        sort: str = "busiest",
        top: int | None = None,
        match: str | None = None,
        limiter: str | None = None,
    ) -> Iterator[KeyRow]:
        """Rows in the order of ``sort``, at most ``top`` of them. match: a glob over key names,
        case sensitive. limiter: only the keys of this one."""
        from fast_litellm_shm._shared.dependencies import numpy

        if sort not in SORTS:
            raise ValueError(f"sort must be one of {', '.join(SORTS)}, not {sort!r}")
        counts = self.counts
        chosen = counts.slots
        if limiter is not None:
            wanted = [i for i, info in self._limiters.items() if info["name"] == limiter]
            chosen = chosen[self._is_of(wanted)[counts.owner] == 1]
        elif self._beside:
            chosen = chosen[self._is_of(self._beside)[counts.owner] == 0]
        if sort == "key":
            order = sorted(chosen.tolist(), key=lambda slot: self.name(slot)[0])
        else:
            if top is not None and top <= _PART and match is None:
                # In parts: memory that is touched for the first time costs more than to add up.
                best = chosen[:0]
                for at in range(0, chosen.size, _PART):
                    best = self._heaviest(numpy.append(best, chosen[at : at + _PART]), sort, top)
                chosen = best
            order = self._heaviest(chosen, sort, chosen.size).tolist()
        rows = (self.row(slot, match) for slot in order)
        yield from itertools.islice((row for row in rows if row is not None), top)

    def permits(self, *, limiter: str | None = None) -> Iterator[PermitRow]:
        """All permits that are held, in no order. limiter: only the permits of this one."""
        for slot, info in held_permits(self.segment):
            known = self._limiters.get(info.limiter)
            name = known["name"] if known else "?"
            if limiter is None or name == limiter:
                stored = stored_name(self.segment, slot)
                yield PermitRow(
                    limiter=name,
                    key=f"#{info.key_hash:016x}" if stored is None else stored[0],
                    key_hash=info.key_hash,
                    pid=info.pid if info.alive else None,
                    idle=bool(info.idle),
                    age_seconds=info.age_seconds,
                )

    def in_flight(self) -> list[dict[str, Any]]:
        """Permits by limiter and key: in_flight (of living processes), max_in_flight, idle, dead
        (not yet given back), pids, oldest_seconds."""
        found: dict[tuple[str, int], dict[str, Any]] = {}
        most = {
            info["name"]: limit.n
            for info in self._limiters.values()
            for limit in info["limits"]
            if isinstance(limit, limits.InFlight) and not key_grammar.units_of(info["name"])
        }
        for row in self.permits():
            entry = found.setdefault(
                (row.limiter, row.key_hash),
                {
                    "limiter": row.limiter,
                    "key": row.key,
                    "in_flight": 0,
                    "max_in_flight": most.get(row.limiter),
                    "idle": 0,
                    "dead": 0,
                    "pids": set(),
                    "oldest_seconds": 0,
                },
            )
            if not row.key.startswith("#"):
                entry["key"] = row.key  # other permits of the key may have no name
            numbers = key_grammar.numbers_of(row.limiter, row.key.encode())
            if numbers:
                entry["max_in_flight"] = numbers[-1]
            if row.pid is None:
                entry["dead"] += 1
                continue
            entry["in_flight"] += 1
            entry["idle"] += row.idle
            entry["pids"].add(row.pid)
            entry["oldest_seconds"] = max(entry["oldest_seconds"], row.age_seconds)
        learned = {(row["limiter"], row["key"]): row["limit"] for row in self.learned}
        adaptive = set(self._adaptive.values())
        for entry in found.values():
            entry["pids"] = sorted(entry["pids"])
            own = learned.get((entry["limiter"], entry["key"]))
            if own is not None:
                entry["max_in_flight"] = own
            elif entry["limiter"] in adaptive and entry["key"].startswith("#"):
                entry["max_in_flight"] = None  # the segment keeps no names: not known which it is
        return sorted(found.values(), key=lambda entry: -entry["in_flight"])

    @functools.cached_property
    def _adaptive(self) -> dict[int, str]:
        """The limiters whose limits are learned, by the index of the limiter that has those."""
        return {
            index: info["name"].removesuffix(side_limiters.LEARNED)
            for index, info in self._limiters.items()
            if index in self._beside and info["name"].endswith(side_limiters.LEARNED)
        }

    @functools.cached_property
    def learned(self) -> list[dict[str, Any]]:
        """The limits that AdaptiveConcurrency has learned, the largest first: limiter, key, limit,
        phase, since_seconds, best, rounds, blocked_seconds, base_latency, latency, exact."""
        from fast_litellm_shm.limiters.adaptive import learned_from

        found, out = [], ffi.new("fshm_learned *")
        names = self._adaptive
        if not names:
            return []
        for slot in self.counts.slots.tolist():
            name = names.get(int(self.counts.meta[slot]) >> 20)
            if name is None or lib.fshm_adaptive_at(self._handle, slot, 0, out) != lib.FSHM_OK:
                continue
            learned = learned_from(out, out.limit, lib.FSHM_MAX_ADAPTIVE)
            found.append(
                {
                    "limiter": name,
                    "key": self.name(slot)[0],
                    "limit": learned.limit,
                    "phase": learned.phase,
                    "since_seconds": learned.since,
                    "best": learned.best,
                    "rounds": learned.rounds,
                    "blocked_seconds": learned.blocked,
                    "base_latency": learned.base_latency,
                    "latency": learned.latency,
                    "exact": learned.exact,
                }
            )
        return sorted(found, key=lambda row: (-row["limit"], row["limiter"], row["key"]))

    def waiting(self) -> list[dict[str, Any]]:
        """Callers that wait, by limiter, key, tenant and priority, the longest wait first: callers,
        longest_seconds, pids; stale (callers of stopped or dead processes, which do not count).
        tenant: the hash of its name; None: of none."""
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for info in waiting_callers(self.segment, names=True):
            known, stored = self._limiters.get(info.limiter), None
            if info.table_slot < self._geometry.slots:
                stored = stored_name(self.segment, info.table_slot)
            entry = found.setdefault(
                (info.limiter, info.key_hash, info.tenant, info.priority),
                {
                    "limiter": known["name"] if known else "?",
                    "key": f"#{info.key_hash:016x}" if stored is None else stored[0],
                    "tenant": f"#{info.tenant:016x}" if info.tenant else None,
                    "priority": info.priority,
                    "callers": 0,
                    "longest_seconds": 0.0,
                    "pids": set(),
                    "stale": 0,
                },
            )
            if info.stale:
                entry["stale"] += info.callers
                continue
            entry["callers"] += info.callers
            entry["longest_seconds"] = max(entry["longest_seconds"], info.waited_ns / 1e9)
            if info.pid:
                entry["pids"].add(info.pid)
        for entry in found.values():
            entry["pids"] = sorted(entry["pids"])
        return sorted(
            found.values(),
            key=lambda entry: (-entry["longest_seconds"], entry["limiter"], entry["key"]),
        )

    def row(self, slot: int, match: str | None = None) -> KeyRow | None:
        """The key in one of counts.slots. None: its name does not match, or another key has taken
        the slot since. Counts are those of the last reading; the rest is read now."""
        name, raw = self.name(slot)
        if match is not None and not fnmatch.fnmatchcase(name, match):
            return None
        info = self._limiters[int(self.counts.meta[slot]) >> 20]
        if info["limits"] and isinstance(info["limits"][0], limits.Money):
            return self._budget_row(slot, info, name, raw)
        if info["planned"]:
            return self._planned_row(slot, info, name, raw)
        decision = ffi.new("fshm_decision *")
        known = self._peek(slot, info, name, raw, decision)
        if known is None or self._who_now(slot) != int(self.counts.who[slot]):
            return None  # name and limit may be those of the next key
        retry = decision.retry_after_ns
        never = retry == lib.FSHM_NEVER
        return KeyRow(
            key=name,
            limiter=info["name"],
            admitted=int(self.counts.admitted[slot]),
            denied=int(self.counts.denied[slot]),
            remaining=decision.remaining if known else None,
            limit=_most(known) if known else None,
            retry_after=retry / 1e9 if known and not never else None,
            reset_after=decision.reset_after_ns / 1e9 if known else None,
            raw=raw,
        )

    @functools.cached_property
    def spending(self) -> list[Spending]:
        """The budgets, and what their keys have spent: read when it is first asked for."""
        return spending_of(self.segment)

    @functools.cached_property
    def _spent_at(self) -> dict[int, tuple[Spending, int]]:
        return {
            slot: (budget, at)
            for budget in self.spending
            for at, slot in enumerate(budget.slots.tolist())
        }

    def _budget_row(self, slot: int, info: dict[str, Any], name: str, raw: bytes) -> KeyRow | None:
        budget, at = self._spent_at.get(slot, (None, 0))
        if budget is None or self._who_now(slot) != int(self.counts.who[slot]):
            return None
        found = budget.row(self.segment, at)
        return KeyRow(
            key=name,
            limiter=info["name"],
            admitted=int(self.counts.admitted[slot]),
            denied=int(self.counts.denied[slot]),
            remaining=found.remaining,
            limit=found.limit,
            retry_after=0.0 if found.remaining else found.reset_after,
            reset_after=found.reset_after,
            raw=raw,
            usd=True,
        )

    def _planned_row(self, slot: int, info: dict[str, Any], name: str, raw: bytes) -> KeyRow | None:
        """A limit of a key with a plan. What remains is known of a token bucket: its slot says
        which it is."""
        found = ffi.new("fshm_plan_info *")
        if lib.fshm_plan_at(self._handle, slot, 0, found) != lib.FSHM_OK or found.is_override:
            return None
        if self._who_now(slot) != int(self.counts.who[slot]):
            return None
        limit = limits.from_raw(found.limits[0], self.segment) if found.count else None
        remaining, retry_after = None, None
        if isinstance(limit, limits.TokenBucket):
            remaining = max(limit.burst - found.used, 0)
            retry_after = 0.0 if remaining else _next(limit, found)
        return KeyRow(
            key=name,
            limiter=info["name"],
            admitted=int(self.counts.admitted[slot]),
            denied=int(self.counts.denied[slot]),
            remaining=remaining,
            limit=limit.burst if isinstance(limit, limits.TokenBucket) else None,
            retry_after=retry_after,
            reset_after=found.left_ns / 1e9,
            raw=raw,
        )

    def overrides(self) -> list[dict[str, Any]]:
        """Keys with limits of their own, by limiter and key: limits (a list of text)."""
        from fast_litellm_shm._shared.dependencies import numpy

        planned = [index for index, info in self._limiters.items() if info["planned"]]
        if not planned:
            return []
        # As csrc/limits/plans.c has them: money, at the place that no limit has.
        who, when = self.counts.who, _view(self._geometry, "slots")["when"]
        chosen = (who & numpy.uint64(0x701) == numpy.uint64(0x701)) & (
            when >> numpy.uint64(60) == 1
        )
        chosen &= numpy.isin((who >> numpy.uint64(11)) & numpy.uint64(0x7FF), planned)
        found, out = ffi.new("fshm_plan_info *"), []
        for slot in numpy.flatnonzero(chosen).tolist():
            if lib.fshm_plan_at(self._handle, slot, 0, found) != lib.FSHM_OK:
                continue
            if not found.is_override or found.limiter not in planned:
                continue
            stored = stored_name(self.segment, slot)
            its = [limits.from_raw(found.limits[i], self.segment) for i in range(found.count)]
            out.append(
                {
                    "limiter": self._limiters[found.limiter]["name"],
                    "key": stored[0] if stored else "?",
                    "limits": [limits.describe(each) for each in its],
                }
            )
        return sorted(out, key=lambda each: (each["limiter"], each["key"]))

    def _peek(
        self, slot: int, info: dict[str, Any], name: str, raw: bytes, decision: Any
    ) -> limits.LimitSpec | limits.InFlight | None | Literal[False]:
        """Fill in the decision; returns its limit. False: that is not known. None: another key has
        taken the slot."""
        units = key_grammar.units_of(info["name"])
        if units:
            return self._peek_numbered(slot, info, units, name, raw, decision)
        if info["name"] not in key_grammar.NAMES and info["limits"]:
            if lib.fshm_peek_slot(self._handle, slot, 0, decision) != lib.FSHM_OK:
                return None
            index = min(decision.limit_index, len(info["limits"]) - 1)
            found: limits.LimitSpec | limits.InFlight = info["limits"][index]
            return found
        own = None if is_cut(name, raw) else key_grammar.limit_of(info["name"], raw)
        moving = info["name"] == key_grammar.MOVING
        if own is None or (moving and own.n > _MOST_HITS):
            return False
        limit = ffi.new("fshm_limit *", own._raw())
        status = lib.fshm_peek_counted(self._handle, slot, limit, moving, 0, decision)
        return own if status == lib.FSHM_OK else None

    def _peek_numbered(
        self,
        slot: int,
        info: dict[str, Any],
        units: tuple[str, ...],
        name: str,
        raw: bytes,
        decision: Any,
    ) -> limits.LimitSpec | None | Literal[False]:
        """_peek() of a key that ends in its numbers."""
        numbers = None if is_cut(name, raw) else key_grammar.numbers_of(info["name"], raw)
        if numbers is None or len(info["limits"]) != len(units):
            return False
        four = ffi.new("uint64_t[4]", numbers)
        if lib.fshm_peek_numbered(self._handle, slot, four, 0, decision) != lib.FSHM_OK:
            return None
        return limits.FixedWindow(max(numbers[decision.limit_index], 1), per=60)

    def _who_now(self, slot: int) -> int:
        base = ffi.cast("char *", self._geometry.base) + self._geometry.slots_offset
        return int(ffi.cast("uint64_t *", base)[2 * slot])

    def name(self, slot: int) -> tuple[str, bytes]:
        """The name of the key in a slot, and its bytes; ``#`` and its keyed hash where the segment
        does not keep the name."""
        return stored_name(self.segment, slot) or (f"#{int(self.counts.who[slot]):016x}", b"")

    def _read_limiters(self) -> dict[int, dict[str, Any]]:
        return {
            index: {
                "name": raw.decode("utf-8", "replace"),
                "limits": [
                    limits.from_raw(info.limits[i], self.segment) for i in range(info.limits_count)
                ],
                "planned": bool(info.planned),
                "version": info.version,
                "resets": info.resets,
                "shared_seconds": info.shared_ns / 1e9,
            }
            for index, raw, info in limiters_in(self.segment)
        }

    @property
    def leased(self) -> list[str]:
        """The limiters whose permits a server grants."""
        names = {info["name"] for info in self._limiters.values()}
        return sorted(name for name in names if name + side_limiters.PERMIT_LEASES in names)

    def _read_beside(self) -> set[int]:
        names = {info["name"] for info in self._limiters.values()}
        return {
            index
            for index, info in self._limiters.items()
            if side_limiters.is_side_limiter(info["name"], names)
            and (
                info["name"] != side_limiters.NOTE
                or all(isinstance(each, limits.Granted) for each in info["limits"])
            )
        }

    def _read_counts(self) -> Counts:
        from fast_litellm_shm._shared.dependencies import numpy

        of, counters = self._read_key_stats()
        slot = _slot_of(counters)
        fits = (slot >= 0) & (slot < of.who.size)
        counters, slot = counters[fits], slot[fits]
        same = (counters["key"] & numpy.uint64(0xFFFFFFFF)) == of.meta[slot]
        numpy.add.at(of.admitted, slot[same], counters["admitted"][same])
        numpy.add.at(of.denied, slot[same], counters["denied"][same])
        count = lib.fshm_known_keys(
            _pointer(of.who), _pointer(of.meta), of.who.size,
            _pointer(self._is_of(self._limiters)), _pointer(of.slots), _pointer(of.owner),
        )  # fmt: skip
        return replace(of, slots=of.slots[:count], owner=of.owner[:count])

    def _is_of(self, limiters: Iterable[int]) -> NDArray[numpy.uint8]:
        """By the index of a limiter: 1, it is one of these."""
        from fast_litellm_shm._shared.dependencies import numpy

        found = numpy.zeros(lib.FSHM_KEY_OWNERS, numpy.uint8)
        found[list(limiters)] = 1
        return found

    def _read_key_stats(self) -> tuple[Counts, NDArray[Any]]:
        """The key statistics and the per-process counters, as of one moment. A process may move
        counts from the latter to the former meanwhile, so that neither copy has them: those slots
        are read again, up to _TRIES times."""
        from fast_litellm_shm._shared.dependencies import numpy

        g = self._geometry
        entries = numpy.flatnonzero(_view(g, "processes")["pid"])  # that were ever used
        used = (int(entries[-1]) + 1 if entries.size else 0) * g.process_stats_entries
        counters = _view(g, "process_stats")[:used]
        found = Counts.of(g.slots)
        by_slot = [_pointer(each) for each in (found.who, found.meta, found.admitted, found.denied)]
        before = counters.copy()
        lib.fshm_key_stats(self._handle, 0, g.slots, *by_slot)
        for _ in range(_TRIES):
            after = counters.copy()
            moved = (before["key"] != after["key"]) | (after["admitted"] < before["admitted"])
            moved |= after["denied"] < before["denied"]
            slots = _slot_of(before[moved])
            # Each once. Not numpy.unique(): before Python 3.14, a daemon thread that is in it when
            # the interpreter ends aborts the process.
            slots = numpy.sort(slots[(slots >= 0) & (slots < g.slots)])
            slots = slots[numpy.diff(slots, prepend=-1) != 0]
            if not slots.size:
                break
            before = after
            if slots.size > _PART:
                slots, step = numpy.zeros(1, numpy.int64), g.slots  # all of them, in one call
            else:
                step = 1
            for slot in slots.tolist():
                lib.fshm_key_stats(self._handle, slot, slot + step, *by_slot)
        return found, after


def _pointer(array: NDArray[Any]) -> Any:
    """To its first element, for a call of C. The array must live until that ends."""
    kind = {"u": "uint", "i": "int"}[array.dtype.kind]
    return ffi.from_buffer(f"{kind}{8 * array.dtype.itemsize}_t[]", array, require_writable=True)


# The arrays of a segment: their fields, as csrc/core/layout.h has them.
_ARRAYS = {
    "slots": [("who", "=u8"), ("when", "=u8")],
    "processes": [("pid", "=u4"), ("", "V60")],
    "process_stats": [("key", "=u8"), ("admitted", "=u4"), ("denied", "=u4")],
}


def _view(g: Any, what: str) -> NDArray[Any]:
    """One of the arrays, in place. g: Segment.geometry()."""
    from fast_litellm_shm._shared.dependencies import numpy

    memory = ffi.buffer(ffi.cast("char *", g.base), g.size)
    joined = g.processes_joined
    count = {"processes": joined, "process_stats": joined * g.process_stats_entries}
    dtype, offset = numpy.dtype(_ARRAYS[what]), getattr(g, f"{what}_offset")
    return numpy.frombuffer(memory, dtype, count.get(what, g.slots), offset)


def _slot_of(counters: NDArray[Any]) -> NDArray[Any]:
    """The slot that each entry counts for; -1: it is not used."""
    from fast_litellm_shm._shared.dependencies import numpy

    slots: NDArray[Any] = (counters["key"] >> numpy.uint64(32)).astype(numpy.int64) - 1
    return slots


def _next(limit: limits.TokenBucket, found: Any) -> float:
    """Seconds until a bucket of which all is used admits the next token."""
    left: float = found.left_ns / 1e9 - limit.per / limit.n * (limit.burst - 1)
    return max(left, 0.0)


def _most(limit: limits.LimitSpec | limits.InFlight) -> int:
    """How much the limit admits at once to a key that has consumed nothing."""
    return limit.burst if isinstance(limit, limits.TokenBucket) else limit.n


def is_cut(name: str, raw: bytes) -> bool:
    """Whether a name that Inspection.name() returned is only the beginning of a key."""
    return name.endswith("…") and not raw.endswith("…".encode())
