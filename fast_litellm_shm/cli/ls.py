"""``fast-shm ls``: list the segments of this host."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cli import segments

_ERRORS: dict[type[exceptions.SegmentError], str] = {
    exceptions.SegmentClockError: "outdated",
    exceptions.SegmentDamagedError: "damaged",
    exceptions.SegmentLayoutError: "layout",
    exceptions.SegmentLinkError: "link",
    exceptions.SegmentNotFoundError: "gone",
    exceptions.SegmentOwnerError: "other-owner",
    exceptions.SegmentPermissionError: "permission",
}


def _row(segment: segments.Found, allow_other_owner: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": segment.name, "path": segment.path, "layout": segment.layout}
    if segment.pids:
        return row | {"error": "removed", "pids": segment.pids}
    if segment.layout != lib.FSHM_LAYOUT_VERSION:
        return row | {"error": f"layout-{segment.layout}"}
    try:
        stats = open_for_reading(segment.name, allow_other_owner).stats()
    except exceptions.SegmentError as error:
        return row | {"error": _ERRORS.get(type(error), "unreadable"), "detail": str(error)}
    except ValueError:
        return row | {"error": "name"}  # not a segment's: another program chose this name
    wanted = ("size_bytes", "used", "capacity", "limiters", "processes", "age_seconds")
    row |= {name: stats[name] for name in wanted}
    if stats["damaged"]:
        return row | {"error": "damaged", "detail": stats["damaged"]}
    return row | {"error": None}


def _print(rows: list[dict[str, Any]]) -> None:
    from fast_litellm_shm.cli import render

    def cells(row: dict[str, Any]) -> tuple[str, ...]:
        name = render.escaped(row["name"])
        if "capacity" not in row:
            processes = str(len(row["pids"])) if "pids" in row else ""
            return (name, "", "", "", processes, "", row["error"])
        return (
            name,
            render.size(row["size_bytes"]),
            f"{row['used']:,}",
            f"{row['capacity']:,}",
            str(row["processes"]),
            render.duration(row["age_seconds"]),
            row["error"] or "",
        )

    out = render.console()
    columns = ("name", ">size", ">used", ">capacity", ">processes", ">age", "error")
    out.print(render.table("", columns, [cells(row) for row in rows], out))
    notes = []
    if any(row["error"] == f"layout-{row['layout']}" for row in rows):
        notes.append(
            "layout-N: another release of this library made it, and only that release can read it; "
            f"this one reads layout {lib.FSHM_LAYOUT_VERSION}."
        )
    gone = sorted({pid for row in rows for pid in row.get("pids", ())})
    if gone:
        notes.append(
            "removed: the file was deleted, but processes still use it, and count apart from new "
            f"ones. Restart them (pids: {', '.join(map(str, gone))})."
        )
    for note in notes:
        out.print(note, style="yellow", soft_wrap=True)


def run(args: argparse.Namespace) -> int:
    """List the segments."""
    rows = [_row(each, args.allow_other_owner) for each in segments.found()]
    rows = [row for row in rows if row["error"] != "gone"]
    rows += [_row(each, args.allow_other_owner) for each in segments.removed()]
    rows.sort(key=lambda row: (row["name"], row["layout"]))
    folder = segments.directory()
    if args.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        _print(rows)
    elif os.path.isdir(folder):
        print(f"No segment in {folder}: the first worker that uses a limiter makes one.")
    else:
        raise exceptions.SegmentError(
            f"there is no directory {folder}, where segments live; mount a tmpfs there"
        )
    return 0
