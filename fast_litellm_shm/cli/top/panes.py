"""What each pane of ``fast-shm top`` lists: its columns, how they are sorted and what they say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.cells import cell_len

from fast_litellm_shm._shared import keyed
from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.key_table import LiveKey, matcher
from fast_litellm_shm.cli.sampler import DeploymentRow, Snapshot, Worker
from fast_litellm_shm.cli.top.columns import (
    BAD,
    FAINT,
    GOOD,
    NAME,
    WARN,
    Cell,
    Column,
    Pane,
    bars,
    count_in,
    rate_of,
    text_of,
)

_NEARLY = 0.2  # of a limit is left

# Keys


def _name(key: LiveKey, width: int) -> Cell:
    """Of a key that ends in its limit, the limit goes first: the column beside it tells it too."""
    name = key.name
    own = key.row.limiter in keyed.NAMES or keyed.units_of(key.row.limiter)
    if own and cell_len(name) > width:
        name = keyed.without_limit(name) + "…"
    return [(name, NAME)]


def _left(key: LiveKey, _: int) -> Cell:
    row = key.row
    if row.remaining is None or row.limit is None:
        return [("?", FAINT)]
    style = BAD if not row.remaining else WARN if row.remaining < _NEARLY * row.limit else ""
    return [(render.compact(row.remaining), style), ("/" + render.compact(row.limit), FAINT)]


def _reset(key: LiveKey, _: int) -> Cell:
    row = key.row
    if row.reset_after is None:
        return [("?", FAINT)]
    return [(render.brief(row.reset_after) if row.reset_after else "-", "")]


def _wait(key: LiveKey, _: int) -> Cell:
    row = key.row
    if row.remaining is None:
        return [("?", FAINT)]
    if row.retry_after == 0:
        return [("-", FAINT)]
    return [(render.brief(row.retry_after), BAD)]


KEYS = Pane(
    title="Keys",
    sort="rate",
    empty="No key has consumed anything yet.",
    rows=None,
    ident=lambda key: key.ident,
    columns=(
        Column("key", "key", 14, _name, right=False, flex=3, letter="k"),
        Column(
            "limiter",
            "limiter",
            8,
            text_of(lambda k: render.escaped(k.row.limiter)),
            right=False,
            flex=1,
            letter="l",
        ),
        Column("rate", "calls/s", 8, rate_of(lambda k: k.rate), letter="r"),
        Column("denied_rate", "denied/s", 9, rate_of(lambda k: k.denied_rate, BAD), letter="d"),
        Column("admitted", "admitted", 9, count_in(lambda k: k.row.admitted), from_width=104),
        Column("denied", "denied", 8, count_in(lambda k: k.row.denied), from_width=104),
        Column("left", "left", 11, _left, descending=False, letter="f"),
        Column("reset", "reset", 6, _reset),
        Column("wait", "wait", 6, _wait, from_width=120),
        Column(
            "history",
            "history",
            8,
            lambda k, width: bars(k.admitted_history, k.denied_history, width),
            flex=1,
        ),
    ),
)

# Workers


def _memory(worker: Worker, _: int) -> Cell:
    if worker.memory_bytes is None:
        return [("?", FAINT)]
    return [(render.size(worker.memory_bytes), "")]


def _cpu(worker: Worker, _: int) -> Cell:
    if worker.cpu_percent is None:
        return [("-", FAINT)]
    return [(f"{worker.cpu_percent:.0f}%", "" if worker.cpu_percent >= 1 else FAINT)]


def _calls(worker: Worker) -> float | None:
    if worker.admitted.now is None or worker.denied.now is None:
        return None
    return worker.admitted.now + worker.denied.now


WORKERS = Pane(
    title="Workers",
    sort="pid",
    empty="No process is attached.",
    rows=lambda snapshot: snapshot.workers,
    ident=lambda worker: worker.pid,
    matches=lambda worker: f"{worker.pid} {worker.command or ''}",
    columns=(
        Column("pid", "pid", 7, text_of(lambda w: str(w.pid)), lambda w: w.pid, descending=False),
        Column("rate", "calls/s", 8, rate_of(_calls), _calls, letter="r"),
        Column(
            "denied_rate",
            "denied/s",
            9,
            rate_of(lambda w: w.denied.now, BAD),
            lambda w: w.denied.now,
            letter="d",
        ),
        Column("cpu", "cpu", 5, _cpu, lambda w: w.cpu_percent or 0, letter="u"),
        Column("memory", "memory", 9, _memory, lambda w: w.memory_bytes or 0, letter="m"),
        Column(
            "attached",
            "attached",
            9,
            lambda w, _: [(render.brief(w.attached_seconds), "")],
            lambda w: w.attached_seconds,
        ),
        Column(
            "history",
            "history",
            12,
            lambda w, width: bars(w.admitted.history, w.denied.history, width),
            from_width=100,
        ),
        Column(
            "command",
            "command",
            10,
            text_of(lambda w: w.command or "? (not to be seen from here)", FAINT),
            right=False,
            flex=1,
        ),
    ),
)

# Limiters

LIMITERS = Pane(
    title="Limiters",
    sort="name",
    empty="No limiter has been made yet.",
    rows=lambda snapshot: snapshot.limiters,
    ident=lambda row: row.name,
    matches=lambda row: row.name,
    columns=(
        Column(
            "name",
            "limiter",
            12,
            text_of(lambda r: r.name, NAME),
            lambda r: r.name,
            right=False,
            descending=False,
            flex=1,
            letter="l",
        ),
        Column("limits", "limits", 16, text_of(lambda r: r.limits), right=False, flex=2),
        Column("keys", "keys", 9, count_in(lambda r: r.keys), lambda r: r.keys, letter="k"),
        Column("rate", "calls/s", 8, rate_of(lambda r: r.rate), lambda r: r.rate or 0, letter="r"),
        Column(
            "denied_rate",
            "denied/s",
            9,
            rate_of(lambda r: r.denied_rate, BAD),
            lambda r: r.denied_rate or 0,
            letter="d",
        ),
    ),
)

# Permits and pools


def _of_most(used: str, most: str) -> Callable[[Any, int], Cell]:
    def cell(row: Any, _: int) -> Cell:
        limit = row[most]
        full = limit is not None and row[used] >= limit
        shown = "?" if limit is None else render.compact(limit)
        return [(render.compact(row[used]), BAD if full else GOOD), ("/" + shown, FAINT)]

    return cell


def _dead(row: Any, _: int) -> Cell:
    return [(str(row["dead"]), BAD)] if row["dead"] else [("-", FAINT)]


def _pids(row: Any, _: int) -> Cell:
    return [(" ".join(map(str, row["pids"])) or "-", FAINT)]


PERMITS = Pane(
    title="Permits",
    sort="in_flight",
    empty="No permit is held.",
    rows=lambda snapshot: snapshot.permits,
    ident=lambda row: (row["limiter"], row["key"]),
    matches=lambda row: render.escaped(row["key"]) + "\n" + render.escaped(row["limiter"]),
    columns=(
        Column(
            "key",
            "key",
            14,
            text_of(lambda r: render.escaped(r["key"]) or "''", NAME),
            lambda r: r["key"],
            right=False,
            descending=False,
            flex=2,
            letter="k",
        ),
        Column(
            "limiter",
            "limiter",
            10,
            text_of(lambda r: render.escaped(r["limiter"])),
            lambda r: r["limiter"],
            right=False,
            descending=False,
            flex=1,
            letter="l",
        ),
        Column(
            "in_flight",
            "in flight",
            11,
            _of_most("in_flight", "max_in_flight"),
            lambda r: r["in_flight"],
        ),
        Column(
            "oldest",
            "oldest",
            7,
            lambda r, _: [(render.brief(r["oldest_seconds"]) if r["in_flight"] else "-", "")],
            lambda r: r["oldest_seconds"],
        ),
        Column("dead", "dead", 5, _dead, lambda r: r["dead"]),
        Column("pids", "pids", 14, _pids, right=False, flex=1),
    ),
)

POOLS = Pane(
    title="Pools",
    sort="active",
    empty="No pool has a connection.",
    rows=lambda snapshot: snapshot.pools,
    ident=lambda row: (row["pool"], row["endpoint"]),
    matches=lambda row: render.escaped(row["pool"]) + "\n" + render.escaped(row["endpoint"]),
    columns=(
        Column(
            "pool",
            "pool",
            10,
            text_of(lambda r: render.escaped(r["pool"]) or "''"),
            lambda r: r["pool"],
            right=False,
            descending=False,
            flex=1,
        ),
        Column(
            "endpoint",
            "endpoint",
            20,
            text_of(lambda r: render.escaped(r["endpoint"]), NAME),
            lambda r: r["endpoint"],
            right=False,
            descending=False,
            flex=2,
        ),
        Column("active", "active", 9, _of_most("active", "max_connections"), lambda r: r["active"]),
        Column("idle", "idle", 5, count_in(lambda r: r["idle"]), lambda r: r["idle"]),
        Column("dead", "dead", 5, _dead, lambda r: r["dead"]),
        Column("pids", "pids", 14, _pids, right=False, flex=1),
    ),
)

# Deployments


def _latency(row: DeploymentRow, _: int) -> Cell:
    return [("-", FAINT)] if row.latency is None else [(render.brief(row.latency), "")]


def _success(row: DeploymentRow, _: int) -> Cell:
    if not row.records.total:
        return [("-", FAINT)]
    style = BAD if row.success_rate < 0.9 else WARN if row.success_rate < 0.99 else ""
    return [(f"{row.success_rate:.1%}", style)]


def _cooldown(row: DeploymentRow, _: int) -> Cell:
    return [(render.brief(row.cooldown), BAD)] if row.cooldown else [("-", FAINT)]


DEPLOYMENTS = Pane(
    title="Deployments",
    sort="name",
    empty="No router has used this segment.",
    rows=lambda snapshot: snapshot.deployments,
    ident=lambda row: row.name,
    matches=lambda row: row.name,
    columns=(
        Column(
            "name",
            "deployment",
            17,
            text_of(lambda r: r.name, NAME),
            lambda r: r.name,
            right=False,
            descending=False,
            flex=1,
        ),
        Column(
            "in_flight", "in flight", 10, count_in(lambda r: r.in_flight), lambda r: r.in_flight
        ),
        Column(
            "rate",
            "calls/s",
            8,
            rate_of(lambda r: r.records.now),
            lambda r: r.records.now or 0,
            letter="r",
        ),
        Column("latency", "latency", 8, _latency, lambda r: r.latency or 0),
        Column(
            "success",
            "success",
            8,
            _success,
            lambda r: r.success_rate,
            descending=False,
            letter="s",
        ),
        Column("cooldown", "cooldown", 9, _cooldown, lambda r: r.cooldown),
        Column(
            "history",
            "history",
            12,
            lambda r, width: bars(r.records.history, [0.0] * len(r.records.history), width),
        ),
    ),
)

PANES = (KEYS, WORKERS, LIMITERS, PERMITS, POOLS, DEPLOYMENTS)


def count_of(pane: Pane, snapshot: Snapshot) -> int:
    """How many rows it has."""
    if pane.rows is None:
        return snapshot.keys.total if snapshot.keys else 0
    return len(pane.rows(snapshot))


def _sortable(value: Any) -> tuple[bool, Any]:
    return value is not None, 0 if value is None else value


def arranged(pane: Pane, snapshot: Snapshot, sort: str, descending: bool, match: str) -> list[Any]:
    """The rows of a pane that is not of keys, as they are to be shown."""
    rows = pane.rows(snapshot) if pane.rows else []
    if match:
        fits = matcher(match)
        rows = [row for row in rows if any(fits(part) for part in pane.matches(row).split("\n"))]
    value = pane.column(sort).value
    if value is not None:
        rows = sorted(rows, key=lambda row: _sortable(value(row)), reverse=descending)
    return rows
