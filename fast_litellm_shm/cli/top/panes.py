"""The panes of ``fast-shm top``: the columns of each, and how its rows are sorted and filtered."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from rich.cells import cell_len

from fast_litellm_shm._shared import key_grammar
from fast_litellm_shm._shared.inspection import KeyRow
from fast_litellm_shm._shared.spending import SpendingRow
from fast_litellm_shm.cli import render
from fast_litellm_shm.cli.key_table import LiveKey, matcher
from fast_litellm_shm.cli.sampler import DeploymentRow, Snapshot, Worker
from fast_litellm_shm.cli.top.columns import (
    BAD,
    FAINT,
    GOOD,
    NAME,
    NONE,
    UNKNOWN,
    WARN,
    Cell,
    Column,
    Pane,
    count,
    history,
    rates,
    text,
    used_of,
)

_NEARLY = 0.2  # share of a limit that is left, below which it is yellow

# Keys


def _key(key: LiveKey, width: int) -> Cell:
    """If the name does not fit and ends in the key's limit, that end is left out: the column "left"
    shows the limit, too."""
    name = key.name
    own = key.row.limiter in key_grammar.NAMES or key_grammar.units_of(key.row.limiter)
    if own and cell_len(name) > width:
        name = key_grammar.without_limit(name) + "…"
    return [(name, NAME)]


def _left(key: LiveKey, _: int) -> Cell:
    row = key.row
    if row.remaining is None or row.limit is None:
        return UNKNOWN
    few = float(row.remaining) < _NEARLY * float(row.limit)
    style = BAD if not row.remaining else WARN if few else ""
    return [(_short(row.remaining, row), style), ("/" + _short(row.limit, row), FAINT)]


def _short(amount: int | Decimal, row: KeyRow) -> str:
    return render.brief_usd(Decimal(amount)) if row.usd else render.compact(float(amount))


def _reset(key: LiveKey, _: int) -> Cell:
    after = key.row.reset_after
    if after is None and key.row.usd:
        return [(render.brief(None), "")]
    return UNKNOWN if after is None else [(render.brief(after) if after else "-", "")]


def _wait(key: LiveKey, _: int) -> Cell:
    if key.row.remaining is None:
        return UNKNOWN
    return NONE if key.row.retry_after == 0 else [(render.brief(key.row.retry_after), BAD)]


KEYS = Pane(
    title="Keys",
    sort="rate",
    empty="No key has consumed anything yet.",
    rows=None,
    ident=lambda key: key.ident,
    columns=(
        text("key", "key", 14, lambda k: k.name, flex=3, letter="k", cell=_key),
        text("limiter", "limiter", 8, lambda k: render.escaped(k.row.limiter), letter="l"),
        *rates(lambda k: k.rate, lambda k: k.denied_rate),
        count("admitted", 9, lambda k: k.row.admitted, from_width=104),
        count("denied", 8, lambda k: k.row.denied, from_width=104),
        Column("left", "left", 11, _left, descending=False, letter="f"),
        Column("reset", "reset", 6, _reset),
        Column("wait", "wait", 6, _wait, from_width=120),
        history(lambda k: k.admitted_history, lambda k: k.denied_history, 8, flex=1),
    ),
)

# Workers


def _memory(worker: Worker, _: int) -> Cell:
    return UNKNOWN if worker.memory_bytes is None else [(render.size(worker.memory_bytes), "")]


def _cpu(worker: Worker, _: int) -> Cell:
    if worker.cpu_percent is None:
        return NONE
    return [(f"{worker.cpu_percent:.0f}%", "" if worker.cpu_percent >= 1 else FAINT)]


def _attached(worker: Worker, _: int) -> Cell:
    return [(render.brief(worker.attached_seconds), "")]


WORKERS = Pane(
    title="Workers",
    sort="pid",
    empty="No process uses it now.",
    rows=lambda snapshot: snapshot.workers,
    ident=lambda worker: worker.pid,
    matches=lambda worker: f"{worker.pid} {worker.command or ''}",
    columns=(
        Column("pid", "pid", 7, lambda w, _: [(str(w.pid), "")], lambda w: w.pid, descending=False),
        *rates(lambda w: w.rate, lambda w: w.denied.now),
        Column("cpu", "cpu", 5, _cpu, lambda w: w.cpu_percent or 0, letter="u"),
        Column("memory", "memory", 9, _memory, lambda w: w.memory_bytes or 0, letter="m"),
        Column("attached", "attached", 9, _attached, lambda w: w.attached_seconds),
        history(lambda w: w.admitted.history, lambda w: w.denied.history, from_width=100),
        text("command", "command", 10, lambda w: w.command or render.command(None), FAINT),
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
        text("name", "limiter", 12, lambda r: r.name, NAME, letter="l"),
        Column("limits", "limits", 16, lambda r, _: [(r.limits, "")], right=False, flex=2),
        count("keys", 9, lambda r: r.keys, letter="k"),
        *rates(lambda r: r.rate, lambda r: r.denied_rate),
    ),
)

# Permits and pools


def _named(field: str) -> Callable[[Any], str]:
    return lambda row: render.escaped(row[field]) or "''"


def _field(name: str) -> Callable[[Any], Any]:
    return lambda row: row[name]


def _oldest(row: Any, _: int) -> Cell:
    if not row["in_flight"]:
        return NONE
    return [(render.brief(row["oldest_seconds"]) if row["oldest_seconds"] else "<1s", "")]


def _dead(row: Any, _: int) -> Cell:
    return [(str(row["dead"]), BAD)] if row["dead"] else NONE


def _pids(row: Any, _: int) -> Cell:
    return [(" ".join(map(str, row["pids"])) or "-", FAINT)]


_HOLDERS = (
    Column("dead", "dead", 5, _dead, lambda r: r["dead"]),
    Column("pids", "pids", 14, _pids, right=False, flex=1),
)

PERMITS = Pane(
    title="Permits",
    sort="in_flight",
    empty="No permit is held.",
    rows=lambda snapshot: snapshot.permits,
    ident=lambda row: (row["limiter"], row["key"]),
    matches=lambda row: render.escaped(row["key"]) + "\n" + render.escaped(row["limiter"]),
    columns=(
        text("key", "key", 14, _named("key"), NAME, flex=2, letter="k"),
        text("limiter", "limiter", 10, _named("limiter"), letter="l"),
        used_of("in_flight", 11, "max_in_flight"),
        Column("oldest", "oldest", 7, _oldest, lambda r: r["oldest_seconds"]),
        *_HOLDERS,
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
        text("pool", "pool", 10, _named("pool")),
        text("endpoint", "endpoint", 20, _named("endpoint"), NAME, flex=2),
        used_of("active", 9, "max_connections"),
        count("idle", 5, lambda r: r["idle"]),
        *_HOLDERS,
    ),
)

# Waiting


def _longest(row: Any, _: int) -> Cell:
    return [(render.brief(row["longest_seconds"]), "")] if row["callers"] else NONE


def _stale(row: Any, _: int) -> Cell:
    return [(str(row["stale"]), BAD)] if row["stale"] else NONE


WAITING = Pane(
    title="Waiting",
    sort="longest",
    empty="No caller waits.",
    rows=lambda snapshot: snapshot.waits,
    ident=lambda row: (row["limiter"], row["key"], row["tenant"], row["priority"]),
    matches=lambda row: render.escaped(row["key"]) + "\n" + render.escaped(row["limiter"]),
    columns=(
        text("key", "key", 14, _named("key"), NAME, flex=2, letter="k"),
        text("limiter", "limiter", 8, _named("limiter"), letter="l"),
        text("tenant", "tenant", 7, lambda row: row["tenant"] or "-", FAINT),
        Column(
            "priority", "priority", 9, lambda r, _: [(str(r["priority"]), "")], _field("priority")
        ),
        count("callers", 8, _field("callers")),
        Column("longest", "longest", 8, _longest, _field("longest_seconds")),
        Column("stale", "stale", 6, _stale, _field("stale")),
        Column("pids", "pids", 8, _pids, right=False, flex=1),
    ),
)

# Deployments


def _latency(row: DeploymentRow, _: int) -> Cell:
    return NONE if row.latency is None else [(render.brief(row.latency), "")]


def _success(row: DeploymentRow, _: int) -> Cell:
    if not row.records.total:
        return NONE
    style = BAD if row.success_rate < 0.9 else WARN if row.success_rate < 0.99 else ""
    return [(f"{row.success_rate:.1%}", style)]


def _cooldown(row: DeploymentRow, _: int) -> Cell:
    return [(render.brief(row.cooldown), BAD)] if row.cooldown else NONE


DEPLOYMENTS = Pane(
    title="Deployments",
    sort="name",
    empty="No router has used this segment.",
    rows=lambda snapshot: snapshot.deployments,
    ident=lambda row: row.name,
    matches=lambda row: row.name,
    columns=(
        text("name", "deployment", 17, lambda r: r.name, NAME),
        count("in_flight", 10, lambda r: r.in_flight),
        rates(lambda r: r.records.now, lambda r: None)[0],
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
        history(lambda r: r.records.history, lambda r: [0.0] * len(r.records.history)),
    ),
)

# Budgets


def _dollars(of: Callable[[SpendingRow], Decimal]) -> Callable[[Any, int], Cell]:
    return lambda row, _: [(render.usd(of(row)), "")] if of(row) else NONE


def _share(row: SpendingRow, _: int) -> Cell:
    style = BAD if not row.remaining else WARN if row.warned or row.share > 1 - _NEARLY else GOOD
    return [(f"{row.share:.1%}", style)]


def _name_of(row: SpendingRow) -> str:
    return render.shown_name(row.key, row.raw)


BUDGETS = Pane(
    title="Budgets",
    sort="used",
    empty="No key of a budget has spent anything.",
    rows=lambda snapshot: snapshot.spending,
    ident=lambda row: (row.budget, row.key),
    matches=lambda row: _name_of(row) + "\n" + render.escaped(row.budget),
    columns=(
        text("key", "key", 12, _name_of, NAME, flex=2, letter="k"),
        text("budget", "budget", 8, lambda r: render.escaped(r.budget), letter="l"),
        Column("spent", "spent", 12, _dollars(lambda r: r.spent), lambda r: r.spent, flex=1),
        Column("reserved", "reserved", 10, _dollars(lambda r: r.reserved), lambda r: r.reserved),
        Column("limit", "limit", 9, _dollars(lambda r: r.limit), lambda r: r.limit),
        Column("used", "used", 7, _share, lambda r: r.share, letter="u"),
        Column(
            "reset",
            "resets",
            7,
            lambda r, _: [(render.brief(r.reset_after), "")],
            lambda r: r.reset_after,
        ),
    ),
)

PANES = (KEYS, WORKERS, LIMITERS, PERMITS, POOLS, DEPLOYMENTS, WAITING, BUDGETS)


def count_of(pane: Pane, snapshot: Snapshot) -> int:
    """How many rows it has."""
    if pane.rows is None:
        return snapshot.keys.total if snapshot.keys else 0
    return len(pane.rows(snapshot))


def is_shown(pane: Pane, snapshot: Snapshot) -> bool:
    """Whether it has a title above the list. WAITING has one only while callers wait, BUDGETS where
    money is spent."""
    return bool(pane.rows(snapshot)) if pane.rows and pane in (WAITING, BUDGETS) else True


def _sortable(value: Any) -> tuple[bool, Any]:
    return value is not None, 0 if value is None else value


def arranged(pane: Pane, snapshot: Snapshot, sort: str, descending: bool, match: str) -> list[Any]:
    """The rows of a pane (not of KEYS), filtered and sorted."""
    rows = pane.rows(snapshot) if pane.rows else []
    if match:
        fits = matcher(match)
        rows = [row for row in rows if any(fits(part) for part in pane.matches(row).split("\n"))]
    value = pane.column(sort).value
    if value is not None:
        rows = sorted(rows, key=lambda row: _sortable(value(row)), reverse=descending)
    return rows
