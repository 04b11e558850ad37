"""``fast-shm rm``: delete a segment, and the files that were left over beside it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm._shared.native import ffi, lib, raise_segment_error
from fast_litellm_shm._shared.segment import path_of
from fast_litellm_shm.cli import render, segments

_ABANDONED = 60.0  # seconds: creating a segment takes less, so an older temporary file is left over


def left_over(path: str) -> list[str]:
    """Files beside a segment that only it uses. A new temporary file does not count: a process may
    be creating the segment at this moment."""
    out = []
    for helper in segments.helpers_of(path):
        try:
            age = time.time() - os.lstat(helper).st_mtime
        except FileNotFoundError:
            continue
        if helper.endswith(".lock") or age > _ABANDONED:
            out.append(helper)
    return out


def unlink(paths: list[str]) -> int:
    """Remove files, and say which cannot be removed. Returns how many were."""
    removed = 0
    for path in paths:
        try:
            os.unlink(path)
            removed += 1
        except FileNotFoundError:
            continue  # went with the segment
        except OSError as error:  # a directory, or a file of another user: anyone can put one there
            shown = render.escaped(path)
            print(f"fast-shm: cannot remove {shown}: {error.strerror}", file=sys.stderr)
    return removed


def _users(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str | None]:
    """The processes that use the segment; or why that is not known."""
    try:
        return segments.processes_of(open_for_reading(args.name, True)), None
    except exceptions.SegmentNotFoundError:
        raise
    except exceptions.SegmentError as error:
        return [], str(error)


def _is_confirmed(name: str, users: list[dict[str, Any]], unknown: str | None) -> bool:
    """Whether the person at the terminal agrees, although processes (may) use the segment."""
    if unknown:
        print(f"Cannot tell which processes use it: {unknown}.", file=sys.stderr)
    else:
        print(
            f"segment {name!r} is in use by {render.counted(len(users), 'process')}:",
            file=sys.stderr,
        )
    for process in users:
        print(f"  {process['pid']:>7}  {render.command(process['command'])}", file=sys.stderr)
    print("They would go on counting in it, apart from new processes.", file=sys.stderr)
    return is_agreed()


def is_agreed(
    question: str = "Remove it all the same?", else_do: str = "stop them, or give --yes"
) -> bool:
    """Whether the person at the terminal agrees to a removal. else_do: what to do where there is no
    terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        print(f"fast-shm: nothing removed: {else_do}", file=sys.stderr)
        return False
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() in ("y", "yes"):
        return True
    print("Nothing removed.", file=sys.stderr)
    return False


def run(args: argparse.Namespace) -> int:
    """Delete the segment; with --unused, all that no process uses."""
    if args.unused:
        from fast_litellm_shm.cli import unused

        return unused.run(args)
    path = path_of(args.name)
    # Before the removal: files of a new segment of this name are not touched.
    of_it = left_over(path)
    try:
        users, unknown = _users(args)
    except exceptions.SegmentNotFoundError:
        if not of_it:
            raise
        removed = render.counted(unlink(of_it), "left-over file")
        print(f"There is no segment {path}; removed {removed} of it.")
        return 0
    if (users or unknown) and not args.yes and not _is_confirmed(args.name, users, unknown):
        return 1
    error = ffi.new("fshm_error *")
    if lib.fshm_remove(args.name.encode(), error) != lib.FSHM_OK:
        raise_segment_error(error, "remove")
    unlink(of_it)
    print(f"Removed segment {args.name!r} ({path}).")
    if users:
        pids = ", ".join(str(process["pid"]) for process in users)
        print(f"Restart the processes that still use it: {pids}.")
    return 0
