"""What processes hold: permits of limiters, connections of pools. And who waits for that."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.inspection import POOL, POOL_TOTAL, Inspection, pools_among
from fast_litellm_shm.cli import render

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_PIDS, _WIDE = 2, 80  # pids shown, on a terminal of at least so many columns
_PERMITS = ("limiter", "key", "in_flight", "max_in_flight", "pids", "oldest_seconds", "dead")
_PERMIT_COLUMNS = ("key", "limiter", ">in flight", ">maximum", ">oldest", ">dead", ">pids")
_POOL_COLUMNS = ("pool", "endpoint", ">active", ">idle", ">maximum", ">dead", ">pids")

_WAITING_COLUMNS = (
    *("key", "limiter", "tenant", ">priority", ">callers", ">longest", ">stale", ">pids"),
)

Rows = list[dict[str, Any]]


def held(inspection: Inspection, limiter: str | None, match: str | None) -> tuple[Rows, Rows]:
    """Permits by limiter and key, and connections by pool and endpoint, the most first. limiter:
    only of this one. match: a glob over keys and endpoints."""
    pools = pools_among(each["name"] for each in inspection.limiters())
    permits, connections = [], []
    # Equal numbers are sorted by name: else rows change their order from sample to sample.
    rows = sorted(
        inspection.in_flight(), key=lambda row: (-row["in_flight"], row["limiter"], row["key"])
    )
    for row in rows:
        name = row["limiter"]
        if limiter not in (None, name):
            continue
        if match is not None and not fnmatch.fnmatchcase(row["key"], match):
            continue
        if name in pools:
            connections.append(_connections(row))
        elif not (name.startswith(POOL_TOTAL) and POOL + name.removeprefix(POOL_TOTAL) in pools):
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


def waiting(inspection: Inspection, limiter: str | None, match: str | None) -> Rows:
    """Inspection.waiting(), of this limiter, and of the keys that match the glob."""
    return [
        row
        for row in inspection.waiting()
        if limiter in (None, row["limiter"])
        and (match is None or fnmatch.fnmatchcase(row["key"], match))
    ]


def _lost_and_pids(lost: int, row: dict[str, Any], out: Console) -> tuple[str, str]:
    pids = row["pids"]
    most = len(pids) if not out.is_terminal else _PIDS if out.width >= _WIDE else 0
    more = [f"+{len(pids) - most}"] if len(pids) > most else []
    return (
        f"{lost:,}" if lost else "-",
        " ".join([*map(str, pids[:most]), *more]) or "-",
    )


def _maximum(most: int | None) -> str:
    return "?" if most is None else f"{most:,}"


def tables(
    permits: Rows, pools: Rows, waits: Rows, out: Console, most: int | None
) -> list[RenderableType]:
    """A table of each, if there are any. Red rows are at their maximum; or all of
    their callers are stale. most: rows of a table."""

    def permit_cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            render.escaped(row["key"]) or "''",
            render.escaped(row["limiter"]),
            f"{row['in_flight']:,}",
            _maximum(row["max_in_flight"]),
            render.duration(row["oldest_seconds"]) if row["in_flight"] else "-",
            *_lost_and_pids(row["dead"], row, out),
        )

    def pool_cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            render.escaped(row["pool"]) or "''",
            render.escaped(row["endpoint"]),
            f"{row['active']:,}",
            f"{row['idle']:,}",
            _maximum(row["max_connections"]),
            *_lost_and_pids(row["dead"], row, out),
        )

    def waiting_cells(row: dict[str, Any]) -> tuple[str, ...]:
        return (
            render.escaped(row["key"]) or "''",
            render.escaped(row["limiter"]),
            row["tenant"] or "-",
            str(row["priority"]),
            f"{row['callers']:,}",
            render.duration(row["longest_seconds"]) if row["callers"] else "-",
            *_lost_and_pids(row["stale"], row, out),
        )

    def is_full(used: str, maximum: str) -> Callable[[dict[str, Any]], bool]:
        return lambda row: bool(row[used] >= (row[maximum] or 1))

    title = f"Permits ({sum(row['in_flight'] for row in permits):,} in flight)"
    red = is_full("in_flight", "max_in_flight")
    parts = render.section(title, _PERMIT_COLUMNS, permits, permit_cells, out, most, red)
    title = f"Pools ({sum(row['active'] + row['idle'] for row in pools):,} connections)"
    red = is_full("active", "max_connections")
    parts += render.section(title, _POOL_COLUMNS, pools, pool_cells, out, most, red)
    title = f"Waiting ({render.counted(sum(row['callers'] for row in waits), 'caller')})"

    def stale(row: dict[str, Any]) -> bool:
        return not row["callers"]

    return parts + render.section(title, _WAITING_COLUMNS, waits, waiting_cells, out, most, stale)
