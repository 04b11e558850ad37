"""The state of limits over many hosts on this host, for the command line and health checks."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm._shared import performance
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.side_limiters import NOTE, PERMIT_LEASES, TOKEN_LEASES
from fast_litellm_shm.cluster.connection import COMPONENT, OUTAGES
from fast_litellm_shm.cluster.link import Noted, noted


def cluster_state(segment: Segment, inspection: Inspection | None = None) -> dict[str, Any] | None:
    """None: no limiter here is kept for many hosts. Else a dict. hosts: how many there are, by the
    last heartbeat; None: there was none. leader: pid of the process that leads this host, or None.
    round_trips, failed: since the segment was made. granted, given_back: tokens. admitted: calls
    that were answered from token leases. calls_saved: round trips that one for each call would have
    taken, less those that were made. permits: keys with a permit lease, how many permits these
    allow, and round trips about them. lag_p50_ms, lag_p99_ms: of a round trip. away: None, or how
    many processes have an outage, of how many, for how many seconds, and their on_outage, a list.
    lost: how often a process has lost the server."""
    stats = performance.segment_stats(segment, COMPONENT).get(COMPONENT)
    if stats is None:
        return None
    inspection = inspection or Inspection(segment)
    hosts = [row.remaining for row in inspection.keys(limiter=NOTE)]
    names = {limiter["name"] for limiter in inspection.limiters()}
    limits = {name for name in names if name + TOKEN_LEASES in names}
    leasing = {name + TOKEN_LEASES for name in limits}
    admitted = denied = 0
    for row in inspection.keys():  # noqa: SIM118 - no dict
        admitted += row.admitted if row.limiter in leasing else 0
        denied += row.denied if row.limiter in limits else 0
    operations = stats["operations"]
    outages = performance.segment_stats(segment, OUTAGES).get(OUTAGES, {}).get("operations", {})
    leases = operations.get("permits", {})
    calls, granted = leases.get("total_calls", 0), leases.get("total_output_size", 0)
    allowed = [  # as csrc/leasing/permit_lease.h writes it, in the form of a token lease
        (row.remaining + 1) // 2 - 1
        for name in inspection.leased
        for row in inspection.keys(limiter=name + PERMIT_LEASES)
        if row.remaining
    ]
    return {
        "hosts": hosts[0] if hosts else None,
        "leader": lib.fshm_leader(segment._handle) or None,
        "round_trips": stats["total_calls"],
        "failed": stats["error_count"],
        "granted": stats["total_output_size"] - granted,
        "given_back": operations.get("give", {}).get("total_input_size", 0),
        "admitted": admitted,
        "calls_saved": max(admitted + denied - (stats["total_calls"] - calls), 0),
        "permits": {"keys": len(allowed), "allowed": sum(allowed), "round_trips": calls},
        "lag_p50_ms": stats["p50_duration_ms"],
        "lag_p99_ms": stats["p99_duration_ms"],
        "away": outage_state(segment),
        "lost": outages.get("lost", {}).get("total_calls", 0),
    }


def outage_state(segment: Segment) -> dict[str, Any] | None:
    """By what each living process has noted: one may have an outage while others have none. server,
    file: whether a server, or the state file, is what some of them have lost."""
    info, geometry = ffi.new("fshm_process_info *"), segment.geometry()
    living, found = 0, list[Noted]()
    for slot in range(geometry.processes_joined):
        lib.fshm_process_at(segment._handle, slot, info)
        living += bool(info.alive)
        if info.alive and (its := noted(info.outage)).policies:
            found.append(its)
    if not found:
        return None
    return {
        "processes": len(found),
        "of": living,
        "seconds": max(geometry.time_ns // 10**9 - min(each.since for each in found), 0),
        "on_outage": sorted({policy for each in found for policy in each.policies}),
        "server": any(each.server for each in found),
        "file": any(each.file for each in found),
    }


def problem(outage: dict[str, Any]) -> str:
    """outage_state() as a sentence."""
    policies = " or ".join(f"on_outage={each!r}" for each in outage["on_outage"])
    who = f"{outage['processes']} of {outage['of']} processes"
    lost, cure = "the server of the limits over many hosts", "it runs and can be reached"
    if outage["file"]:
        lost, cure = (
            "the state file of the durable limits",
            "its disk is not full and can be written",
        )
        if outage["server"]:
            lost, cure = f"the server of limits over many hosts, or {lost},", f"both work: {cure}"
    return (
        f"{lost} has not answered {who} for {outage['seconds']} s: they go by {policies}; see that "
        f"{cure}, the log says what is wrong"
    )
