"""What processes hold, for ``fast-shm inspect``: permits, and the connections of pools."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.inspection import POOL, POOL_TOTAL, Inspection, pools_among
from fast_litellm_shm.cli import render

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

_PIDS, _WIDE = 2, 80  # pids shown on a terminal, if it has so many columns
_PERMITS = ("limiter", "key", "in_flight", "max_in_flight", "pids", "oldest_seconds", "dead")
_PERMIT_COLUMNS = ("key", "limiter", ">in flight", ">maximum", ">oldest", ">dead", ">pids")
_POOL_COLUMNS = ("pool", "endpoint", ">active", ">idle", ">maximum", ">dead", ">pids")

Rows = list[dict[str, Any]]


def held(inspection: Inspection, limiter: str | None, match: str | None) -> tuple[Rows, Rows]:
    """Permits by limiter and key, and connections by pool and endpoint. limiter: only of this one.
    match: a glob over keys and endpoints."""
    pools = pools_among(each["name"] for each in inspection.limiters())
    permits, connections = [], []
    # by name where equal, so that rows keep their places from one look to the next
    rows = inspection.in_flight()
    rows.sort(key=lambda row: (-row["in_flight"], row["limiter"], row["key"]))
    for row in rows:
        name = row["limiter"]
        if limiter not in (None, name):
            continue
        if match is not None and not fnmatch.fnmatchcase(row["key"], match):
            continue
        if name in pools:
            connections.append(_connections(row))
        elif name.replace(POOL_TOTAL, POOL, 1) not in pools or not name.startswith(
            POOL_TOTAL
        ):  # the total is the sum of what is shown
            permits.append({field: row[field] for field in _PERMITS})
    return permits, connections


def _connections(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "pool": row["limiter"].removeprefix(POOL),
        "endpoint": row["key"],
        "active": row["in_flight"] - row["idle"],
        "idle": row["idle"],
        "max_connections": row["max_in_flight"],
        "pids": row["pids"],
        "dead": row["dead"],
    }


def _pids(pids: list[int], out: Console) -> str:
    most = len(pids) if not out.is_terminal else _PIDS if out.width >= _WIDE else 0
    more = [f"+{len(pids) - most}"] if len(pids) > most else []
    return " ".join([*map(str, pids[:most]), *more]) or "-"


def _permit_cells(row: dict[str, Any], out: Console) -> tuple[str, ...]:
    most = row["max_in_flight"]
    return (
        render.escaped(row["key"]) or "''",
        render.escaped(row["limiter"]),
        f"{row['in_flight']:,}",
        "?" if most is None else f"{most:,}",
        render.duration(row["oldest_seconds"]) if row["in_flight"] else "-",
        f"{row['dead']:,}" if row["dead"] else "-",
        _pids(row["pids"], out),
    )


def _pool_cells(row: dict[str, Any], out: Console) -> tuple[str, ...]:
    return (
        render.escaped(row["pool"]) or "''",
        render.escaped(row["endpoint"]),
        f"{row['active']:,}",
        f"{row['idle']:,}",
        "?" if row["max_connections"] is None else f"{row['max_connections']:,}",
        f"{row['dead']:,}" if row["dead"] else "-",
        _pids(row["pids"], out),
    )


def _coloured(table: Table, full: list[bool]) -> Table:
    for row, is_full in zip(table.rows, full, strict=True):
        row.style = "red" if is_full else ""
    return table


def tables(permits: Rows, pools: Rows, out: Console, most: int | None) -> list[RenderableType]:
    """For people; nothing where nothing is held. Red: no more fit."""
    from rich.text import Text

    parts: list[RenderableType] = []
    if permits:
        rows, more = render.limited(permits, most)
        cells = [_permit_cells(row, out) for row in rows]
        total = sum(row["in_flight"] for row in permits)
        made = render.table(f"Permits ({total:,} in flight)", _PERMIT_COLUMNS, cells, out)
        full = [row["in_flight"] >= (row["max_in_flight"] or 1) for row in rows]
        parts += [_coloured(made, full), *more, Text()]
    if pools:
        rows, more = render.limited(pools, most)
        cells = [_pool_cells(row, out) for row in rows]
        total = sum(row["active"] + row["idle"] for row in pools)
        made = render.table(f"Pools ({total:,} connections)", _POOL_COLUMNS, cells, out)
        full = [row["active"] >= (row["max_connections"] or 1) for row in rows]
        parts += [_coloured(made, full), *more, Text()]
    return parts
