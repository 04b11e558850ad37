"""Look into a segment from outside: numpy views over the mapping, read only, disturbing nobody.

Counts and names are the ledger's: exact while nobody is killed, and forgetful by design (a key's
counts go when its cell is given to another key).
"""

from __future__ import annotations

import codecs
import fnmatch
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fast_litellm_shm import limits
from fast_litellm_shm.native import ffi, lib
from fast_litellm_shm.segment import Segment

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

SORTS = ("busiest", "admitted", "denied", "key")


@dataclass(frozen=True)
class KeyRow:
    """One key of one limiter. retry_after: seconds until a cost of 1 fits, None: never. raw: the
    bytes of the key (of a long one, the first 200); empty where only its hash is known."""

    key: str
    limiter: str
    admitted: int
    denied: int
    remaining: int
    retry_after: float | None
    raw: bytes = b""

    def as_dict(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "limiter": self.limiter,
            "admitted": self.admitted,
            "denied": self.denied,
            "remaining": self.remaining,
            "retry_after": self.retry_after,
        }


@dataclass(frozen=True)
class PermitRow:
    """One permit that is held. key_hash: the same for all permits of
    a key. pid: None where its process is dead (it counts no more, and is given
    back when somebody needs it). idle: a pooled connection that nobody uses now."""

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
    """What is in a segment at one moment; rows are read when they are iterated."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._handle = segment._handle
        self._geometry = segment.geometry()
        self._who = self._view("cells")["who"]
        self._limiters = self._read_limiters()
        self._cells, self._admitted, self._denied, self._owner = self._read_counts()

    @property
    def keys_total(self) -> int:
        """How many keys the ledger knows."""
        return int(self._cells.size)

    def limiters(self) -> list[dict[str, Any]]:
        """Each limiter: name, limits (text), version, resets, keys."""
        import numpy

        keys = numpy.bincount(self._owner, minlength=self._geometry.limiters)
        return [
            {
                "name": info["name"],
                "limits": [limits.describe(limit) for limit in info["limits"]],
                "version": info["version"],
                "resets": info["resets"],
                "keys": int(keys[index]),
            }
            for index, info in self._limiters.items()
        ]

    def keys(
        self,
        *,
        sort: str = "busiest",
        top: int | None = None,
        match: str | None = None,
        limiter: str | None = None,
    ) -> Iterator[KeyRow]:
        """Rows in the order asked for, at most ``top`` of them. match: a glob over key names, case
        sensitive. limiter: only this one's."""
        import numpy

        if sort not in SORTS:
            raise ValueError(f"sort must be one of {', '.join(SORTS)}, not {sort!r}")
        chosen = numpy.arange(self._cells.size)
        if limiter is not None:
            wanted = [i for i, info in self._limiters.items() if info["name"] == limiter]
            chosen = chosen[numpy.isin(self._owner, wanted)]
        if sort == "key":
            order = iter(sorted(chosen.tolist(), key=lambda i: self._name(int(self._cells[i]))[0]))
        else:
            weight = {
                "busiest": self._admitted.astype(numpy.uint64) + self._denied,
                "admitted": self._admitted,
                "denied": self._denied,
            }[sort][chosen]
            if top is not None and match is None and top < chosen.size:
                chosen = chosen[numpy.argpartition(-weight.astype(numpy.int64), top)[:top]]
                weight = weight[numpy.argpartition(-weight.astype(numpy.int64), top)[:top]]
            order = iter(chosen[numpy.argsort(-weight.astype(numpy.int64), kind="stable")].tolist())
        shown = 0
        for i in order:
            if top is not None and shown >= top:
                return
            row = self._row(i, match)
            if row is not None:
                shown += 1
                yield row

    def permits(self, *, limiter: str | None = None) -> Iterator[PermitRow]:
        """All permits that are held, in no order. limiter: only this one's."""
        import numpy

        when = self._view("cells")["when"]
        info = ffi.new("fshm_permit_info *")
        for cell in numpy.flatnonzero((when >> numpy.uint64(61)) == 7).tolist():
            if lib.fshm_permit_at(self._handle, cell, info) != 1:
                continue  # released since we looked
            known = self._limiters.get(info.limiter)
            name = known["name"] if known else "?"
            if limiter is None or name == limiter:
                stored = self._stored_name(cell)
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
            if isinstance(limit, limits.InFlight)
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
                entry["key"] = row.key  # others of the key may have lost their name
            if row.pid is None:
                entry["dead"] += 1
                continue
            entry["in_flight"] += 1
            entry["idle"] += row.idle
            entry["pids"].add(row.pid)
            entry["oldest_seconds"] = max(entry["oldest_seconds"], row.age_seconds)
        for entry in found.values():
            entry["pids"] = sorted(entry["pids"])
        return sorted(found.values(), key=lambda entry: -entry["in_flight"])

    def _row(self, i: int, match: str | None) -> KeyRow | None:
        cell = int(self._cells[i])
        name, raw = self._name(cell)
        if match is not None and not fnmatch.fnmatchcase(name, match):
            return None
        decision = ffi.new("fshm_decision *")
        if lib.fshm_peek_cell(self._handle, cell, 0, decision) != lib.FSHM_OK:
            return None  # the cell went to another key since we looked
        retry = decision.retry_after_ns
        return KeyRow(
            key=name,
            limiter=self._limiters[int(self._owner[i])]["name"],
            admitted=int(self._admitted[i]),
            denied=int(self._denied[i]),
            remaining=decision.remaining,
            retry_after=None if retry == lib.FSHM_NEVER else retry / 1e9,
            raw=raw,
        )

    def _name(self, cell: int) -> tuple[str, bytes]:
        """The key's name and its bytes; ``#`` and its keyed hash where the name is not kept, or
        forgotten."""
        return self._stored_name(cell) or (f"#{int(self._who[cell]):016x}", b"")

    def _stored_name(self, cell: int) -> tuple[str, bytes] | None:
        out, length = ffi.new("char[256]"), ffi.new("uint64_t *")
        if lib.fshm_key_name(self._handle, cell, out, 256, length):
            stored = min(length[0], 200)
            raw: bytes = ffi.buffer(out, stored)[:]
            if length[0] == stored:
                return raw.decode("utf-8", "replace"), raw
            # cut between the bytes of one character: leave that one out, and keep other bad bytes
            text, _ = codecs.utf_8_decode(raw, "replace", False)
            return text + "…", raw
        return None

    def _read_limiters(self) -> dict[int, dict[str, Any]]:
        found, info = {}, ffi.new("fshm_limiter_info *")
        for index in range(self._geometry.limiters):
            if lib.fshm_limiter_at(self._handle, index, info) != lib.FSHM_OK:
                continue
            raw: bytes = ffi.buffer(info.name, info.name_length)[:]
            found[index] = {
                "name": raw.decode("utf-8", "replace"),
                "limits": [limits.from_raw(info.limits[i]) for i in range(info.limits_count)],
                "version": info.version,
                "resets": info.resets,
            }
        return found

    def _view(self, what: str) -> NDArray[Any]:
        import numpy

        g = self._geometry
        memory = ffi.buffer(ffi.cast("char *", g.base), g.size)
        dtype: list[tuple[str, str]]
        if what == "cells":
            dtype, offset, count = [("who", "=u8"), ("when", "=u8")], g.cells_offset, g.cells
        elif what == "ledger":
            dtype = [("meta", "=u4"), ("admitted", "=u4"), ("denied", "=u4"), ("name", "=u4")]
            offset, count = g.ledger_offset, g.cells
        else:
            dtype = [("key", "=u8"), ("admitted", "=u4"), ("denied", "=u4")]
            offset, count = g.columns_offset, g.processes * g.column_entries
        return numpy.frombuffer(memory, numpy.dtype(dtype), count, offset)

    def _read_counts(
        self,
    ) -> tuple[
        NDArray[numpy.int64], NDArray[numpy.uint64], NDArray[numpy.uint64], NDArray[numpy.int64]
    ]:
        """Cells that the ledger knows, with their counts and limiters."""
        import numpy

        who, ledger = self._who.copy(), self._view("ledger").copy()
        columns = self._view("columns").copy()
        owner = (ledger["meta"] >> 20).astype(numpy.int64)
        known = (who != 0) & ((ledger["meta"] & 0xFFFFF) == (who & numpy.uint64(0xFFFFF)))
        known &= numpy.isin(owner, list(self._limiters))
        cells = numpy.flatnonzero(known)
        admitted = ledger["admitted"].astype(numpy.uint64)
        denied = ledger["denied"].astype(numpy.uint64)
        cell = (columns["key"] >> numpy.uint64(32)).astype(numpy.int64) - 1
        fits = (cell >= 0) & (cell < who.size)
        columns, cell = columns[fits], cell[fits]
        same = (columns["key"] & numpy.uint64(0xFFFFFFFF)) == ledger["meta"][cell]
        numpy.add.at(admitted, cell[same], columns["admitted"][same])
        numpy.add.at(denied, cell[same], columns["denied"][same])
        return cells, admitted[cells], denied[cells], owner[cells]
