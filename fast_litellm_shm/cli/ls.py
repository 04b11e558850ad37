"""``fast-shm ls``: the segments of this host."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import render

# A lock file or a segment that was being made, not a segment (its name may well end in ".lock").
_HELPER = re.compile(r"\.[0-9a-f]{16}\.(lock|tmp)$")
_SEGMENT = re.compile(r"fast_litellm_shm\.([0-9]{1,6})\.(.+)", re.DOTALL)
_WORDS: dict[type[exceptions.SegmentError], str] = {
    exceptions.SegmentClockError: "outdated",
    exceptions.SegmentDamagedError: "damaged",
    exceptions.SegmentLayoutError: "layout",
    exceptions.SegmentLinkError: "link",
    exceptions.SegmentNotFoundError: "gone",
    exceptions.SegmentOwnerError: "other-owner",
    exceptions.SegmentPermissionError: "permission",
}


@dataclass(frozen=True)
class Found:
    """A file that is named like a segment."""

    name: str
    path: str
    layout: int


def directory() -> str:
    """Where segments live."""
    text: bytes = ffi.string(lib.fshm_directory())
    return os.fsdecode(text)


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def found() -> list[Found]:
    """Every segment, of every layout version, by name."""
    out = []
    for entry in _entries(directory()):
        parts = _SEGMENT.fullmatch(entry)
        if parts and not _HELPER.search(entry):
            out.append(Found(parts[2], os.path.join(directory(), entry), int(parts[1])))
    return sorted(out, key=lambda segment: (segment.name, segment.layout))


def helpers_of(path: str) -> list[str]:
    """The lock files, and the temporary files, that belong to the segment at a path."""
    folder, name = os.path.split(path)
    return [
        os.path.join(folder, entry)
        for entry in _entries(folder)
        if entry.startswith(name) and _HELPER.fullmatch(entry[len(name) :])
    ]


def names_there_are() -> str:
    """A sentence for somebody who named a segment that is not there."""
    names = [segment.name for segment in found() if segment.layout == lib.FSHM_LAYOUT_VERSION]
    if not os.path.isdir(directory()):
        return "No segment can be made before there is."
    if not names:
        return "There is none at all: the first worker that uses a limiter makes one."
    shown = ", ".join(render.escaped(name) for name in names[:10])
    return f"There are: {shown}" + (f" and {len(names) - 10} more." if len(names) > 10 else ".")


def no_such_limiter(name: str, segment: Segment, names: list[str]) -> exceptions.FastShmError:
    """The error for a limiter that is not in the segment; says which are."""
    there = ", ".join(repr(each) for each in sorted(names)[:20]) or "none"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return exceptions.FastShmError(
        f"no limiter {name!r} in segment {segment.name!r}; there are: {there}{more}"
    )


def _row(segment: Found, allow_other_owner: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"name": segment.name, "path": segment.path, "layout": segment.layout}
    if segment.layout != lib.FSHM_LAYOUT_VERSION:
        return row | {"error": f"layout-{segment.layout}"}
    try:
        stats = open_for_reading(segment.name, allow_other_owner).stats()
    except exceptions.SegmentError as error:
        return row | {"error": _WORDS.get(type(error), "unreadable"), "detail": str(error)}
    except ValueError:
        return row | {"error": "name"}  # a file that somebody else named like this
    wanted = ("size_bytes", "used", "capacity", "limiters", "processes", "age_seconds")
    row |= {name: stats[name] for name in wanted}
    if stats["damaged"]:
        return row | {"error": "damaged", "detail": stats["damaged"]}
    return row | {"error": None}


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    name = render.escaped(row["name"])
    if "capacity" not in row:
        return (name, "", "", "", "", "", row["error"])
    return (
        name,
        render.size(row["size_bytes"]),
        f"{row['used']:,}",
        f"{row['capacity']:,}",
        str(row["processes"]),
        render.duration(row["age_seconds"]),
        row["error"] or "",
    )


def run(args: argparse.Namespace) -> int:
    """List them."""
    rows = [_row(segment, args.allow_other_owner) for segment in found()]
    rows = [row for row in rows if row["error"] != "gone"]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    out = render.console()
    if not rows and not os.path.isdir(directory()):
        raise exceptions.SegmentError(
            f"there is no directory {directory()}, where segments live; mount a tmpfs there"
        )
    if not rows:
        out.print(
            f"No segment in {directory()}: the first worker that uses a limiter makes one.",
            soft_wrap=True,
        )
        return 0
    columns = ("name", ">size", ">used", ">capacity", ">processes", ">age", "error")
    out.print(render.table("", columns, [_cells(row) for row in rows], out))
    if any(row["layout"] != lib.FSHM_LAYOUT_VERSION for row in rows):
        out.print(
            f"layout-N: made by another release of this library, which alone can read it; this one "
            f"reads layout {lib.FSHM_LAYOUT_VERSION}.",
            style="yellow",
            soft_wrap=True,
        )
    return 0
