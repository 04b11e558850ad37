"""What is wrong with a segment, for people: each a sentence that says what to do."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm._shared import releases
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import render, segments
from fast_litellm_shm.cluster.state import outage_state, problem

_WARN_AT = 0.8  # of capacity


def warnings_of(
    stats: dict[str, Any],
    processes: list[dict[str, Any]],
    limiters: list[dict[str, Any]],
    segment: Segment,
    removed_users: list[int],
) -> list[str]:
    """Damage, removal, a server that is unreachable, a table that is (nearly) full.

    stats: ``segment.stats()``. processes, limiters: those of the segment. removed_users: pids of
    processes that use a removed segment of this name."""
    out = []
    outage = outage_state(segment)
    if outage is not None:
        out.append(problem(outage))
    if stats["damaged"]:
        out.append(f"{stats['damaged']}. What is shown may be wrong")
    if stats["unlinked"]:
        pids = ", ".join(str(process["pid"]) for process in processes) or "none"
        out.append(
            "this segment was removed: new processes will use another one, and count apart. "
            f"Restart the processes that still use this one (pids: {pids})"
        )
    else:
        if removed_users:
            out.append(segments.said_of_removed(removed_users, stats["name"]))
        if layouts := segment.other_layouts:
            out.append(releases.said(stats["name"], layouts, stats["layout_version"]))
        if stats["liveness_unknown"]:
            out.append(f"{stats['liveness_unknown']}. Dead processes are listed as alive here")
    if unseen := _unseen(segment):
        out.append(
            "some processes run in another pid namespace, or /proc cannot be read, so it cannot be "
            "seen here whether they dump core. If one does, what it holds stays held until the "
            f"dump has ended (pids, as they have them: {', '.join(map(str, unseen))})"
        )
    larger = (
        f"stop the workers, `fast-shm rm --name {stats['name']}`, and start them with "
        f"FAST_LITELLM_SHM_CAPACITY={2 * stats['capacity']}; or use shorter periods"
    )
    for name in (limiter["name"] for limiter in limiters if limiter["shared_seconds"]):
        out.append(
            f"limiter {render.escaped(name)}: new keys find no room and share counters, so some "
            "may be denied wrongly. If a client can invent keys, limit by something that it cannot "
            f"choose. If not: {larger}"
        )
    if stats["occupancy"] >= _WARN_AT:
        out.append(
            f"{stats['occupancy']:.0%} of the capacity is used; when the table is full, on_full "
            f"decides about new keys (share, deny, allow or raise). To make room: {larger}"
        )
    refused = sum(process["refused_full"] for process in processes)
    if refused:
        out.append(f"{refused:,} calls met a full table. To make room: {larger}")
    return out


def _unseen(segment: Segment) -> list[int]:
    """The pids of living processes that are known by the lock file alone."""
    info = ffi.new("fshm_process_info *")
    found = []
    for index in range(segment.geometry().processes_joined):
        lib.fshm_process_at(segment._handle, index, info)
        if info.alive == lib.FSHM_ALIVE_BY_LOCK:
            found.append(info.pid)
    return found
