"""``fast-shm release``: give back the permits of a process."""

from __future__ import annotations

import argparse
import sys

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import render, segments
from fast_litellm_shm.limiters.concurrency import release_process


def _release_dead(segment: Segment) -> int:
    unknown = segment.liveness_unknown
    if unknown:
        raise exceptions.SegmentError(
            f"segment {segment.name!r}: nothing was given back: {unknown}"
        )
    freed = release_process(segment, 0)
    if freed:
        print(f"Gave back {render.counted(freed, 'permit')} of dead processes.")
    else:
        print("Nothing to give back: no dead process holds a permit.")
    return 0


def run(args: argparse.Namespace) -> int:
    """Give back permits of one process, or of all dead ones."""
    segment = segments.open_for_writing(args.name, args.allow_other_owner)
    if args.dead:
        return _release_dead(segment)
    pid, where = args.pid, f"segment {segment.name!r}"
    its = [process for process in segments.processes_of(segment) if process["pid"] == pid]
    if not its:
        # A permit does not say the pid of a dead holder: another process may have its pid, or its
        # process index, by now. So the permits of all dead processes are given back.
        print(f"Process {pid} is not attached to {where}: it died, or never used it.")
        return _release_dead(segment)
    shown = render.command(its[-1]["command"])
    if not args.force:
        print(
            f"fast-shm: process {pid} ({shown}) is alive and uses {where}: nothing was given back. "
            "Stop it, and its permits come back without this command. Or give --force: then more "
            "calls may run at the same time than the limits allow",
            file=sys.stderr,
        )
        return 1
    freed = release_process(segment, pid)
    print(
        f"Gave back {render.counted(freed, 'permit')} of process {pid} ({shown}), which is alive."
    )
    return 0
