"""The limits that AdaptiveConcurrency has learned, as a table."""

from __future__ import annotations

import fnmatch
from typing import TYPE_CHECKING, Any

from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.cli import render

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_COLUMNS = (
    "key",
    "limiter",
    ">limit",
    "phase",
    ">since",
    ">best",
    ">rounds",
    ">latency",
    ">paused",
)


def rows(inspection: Inspection, limiter: str | None, match: str | None) -> list[dict[str, Any]]:
    """Inspection.learned, of this limiter only, with keys that match."""
    return [
        row
        for row in inspection.learned
        if limiter in (None, row["limiter"])
        and (match is None or fnmatch.fnmatchcase(row["key"], match))
    ]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    since, latency, base = row["since_seconds"], row["latency"], row["base_latency"]
    over = f" (base {render.duration(base)})" if base else ""
    return (
        render.escaped(row["key"]),
        render.escaped(row["limiter"]),
        f"{row['limit']:,}",
        row["phase"],
        "-" if since is None else render.duration(since),
        f"{row['best']:,}",
        str(row["rounds"]),
        "-" if latency is None else render.duration(latency) + over,
        render.duration(row["blocked_seconds"]) if row["blocked_seconds"] else "-",
    )


def table(found: list[dict[str, Any]], out: Console, most: int | None) -> list[RenderableType]:
    """Red: no call of the key may begin now."""
    title = f"Learned limits ({len(found)})"
    return render.section(
        title, _COLUMNS, found, _cells, out, most, lambda row: bool(row["blocked_seconds"])
    )
