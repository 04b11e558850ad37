"""``fast-shm rm --unused``: delete the segments that no living process uses.

A process that uses a segment holds locks on its lock file, whatever its user, its container or its
release of the library; or it has mapped the segment and made no call yet, which ``/proc`` tells of
this user's processes. Neither: unused.
"""

from __future__ import annotations

import argparse
import os
import stat
import sys
import time
from dataclasses import dataclass

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import open_for_reading
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.releases import is_locked
from fast_litellm_shm.cli import render, rm, segments

_YOUNG = 60.0  # seconds: a process may have opened it, and made no call yet
_PIDS = 10  # named at most


@dataclass(frozen=True)
class _Look:
    """What is known of a segment. kept: why it must stay; None: no process uses it."""

    found: segments.Found
    kept: str | None
    told: str  # size, contents, age


def _users(pids: set[int]) -> str:
    shown = ", ".join(map(str, sorted(pids)[:_PIDS]))
    more = f" and {len(pids) - _PIDS} more" if len(pids) > _PIDS else ""
    return (
        f"in use by {render.counted(len(pids), 'process')} (pid{'s'[: len(pids) != 1]} "
        f"{shown}{more})"
    )


def _by_lock_files(found: segments.Found) -> str | None:
    """Why a segment must stay, as its lock files say; None: no reason. Of every release."""
    for path in segments.helpers_of(found.path):
        try:
            if path.endswith(".lock") and is_locked(path):
                return "in use: a process holds a lock on its lock file"
        except FileNotFoundError:
            continue
        except OSError as error:
            return f"who uses it is unknown: {render.escaped(path)}: {error.strerror}"
    return None


def _whose(found: segments.Found, file: os.stat_result, allow_other_owner: bool) -> str | None:
    """Why a file must stay, whatever is in it; None: no reason."""
    if not stat.S_ISREG(file.st_mode):
        return "no regular file: find out who made it"
    if file.st_uid != os.geteuid() and not allow_other_owner:
        return f"it belongs to uid {file.st_uid}: run as that user, or give --allow-other-owner"
    return None


def _contents(found: segments.Found, allow_other_owner: bool) -> tuple[str | None, str, float]:
    """Why a segment of this release must stay; what it holds; when it was made (Unix time, 0: not
    known)."""
    try:
        segment = open_for_reading(found.name, allow_other_owner)
        stats = segment.stats()
    except exceptions.SegmentClockError:
        return None, "outdated", 0.0  # of another boot: nothing in it counts
    except exceptions.SegmentDamagedError:
        return None, "damaged", 0.0
    except (exceptions.SegmentError, ValueError) as error:
        return f"it cannot be read: {error}", "", 0.0
    why = None
    if pids := {process["pid"] for process in segment.processes()}:
        why = _users(pids)
    elif stats["liveness_unknown"]:
        why = f"who uses it is unknown: {stats['liveness_unknown']}"
    used = stats["used"]
    told = f"{render.counted(used, 'slot')} in use" if used else "nothing in it counts"
    return why, told, time.time() - stats["age_seconds"]


def _look(found: segments.Found, mapped: dict[str, set[int]], allow_other_owner: bool) -> _Look:
    try:
        file = os.lstat(found.path)
    except FileNotFoundError:
        return _Look(found, "it is gone", "")
    why = _whose(found, file, allow_other_owner)
    if why is None and (pids := mapped.get(found.path)):
        why = _users(pids)
    made, told = 0.0, f"layout {found.layout}, of another release"
    if why is None and found.layout == lib.FSHM_LAYOUT_VERSION:
        why, told, made = _contents(found, allow_other_owner)
    why = why or _by_lock_files(found)
    age = max(time.time() - (made or file.st_ctime), 0.0)
    since = f"made {render.duration(age)} ago"
    if why is None and age < _YOUNG:
        why = f"{since}: a process may be about to use it"
    return _Look(found, why, f"{render.size(file.st_blocks * 512)}, {told}, {since}")


def _remove(found: segments.Found) -> bool:
    """Whether it was removed."""
    helpers = rm.left_over(found.path)
    if found.layout == lib.FSHM_LAYOUT_VERSION:
        error = ffi.new("fshm_error *")
        status = lib.fshm_remove(found.name.encode(), error)
        if status != lib.FSHM_OK:
            print(
                f"fast-shm: cannot remove {render.escaped(found.path)}: "
                f"{os.strerror(error.sys_errno)}",
                file=sys.stderr,
            )
            return False
    elif not rm.unlink([found.path]):
        return False
    rm.unlink(helpers)
    return True


def _name(found: segments.Found) -> str:
    return render.escaped(found.name)


def run(args: argparse.Namespace) -> int:
    """List what is kept and why, and what is unused; and delete the latter."""
    mapped = segments.mapped_by()
    looks = [_look(each, mapped, args.allow_other_owner) for each in segments.found()]
    kept = [look for look in looks if look.kept is not None]
    free = [look for look in looks if look.kept is None]
    width = max((len(_name(look.found)) for look in looks), default=0)
    for title, of in (("Kept:", kept), ("Unused:", free)):
        if of:
            print(title)
        for look in of:
            print(f"  {_name(look.found):{width}}  {look.kept or look.told}")
    if not free:
        print(f"No segment in {segments.directory()} is unused.")
        return 0
    sys.stdout.flush()
    count = render.counted(len(free), "segment")
    if not args.yes and not rm.is_agreed(f"Remove {count}?", "give --yes to remove them"):
        return 1
    # Looked at once more: while a person read the list, a process may have come.
    mapped, removed = segments.mapped_by(), 0
    for look in free:
        again = _look(look.found, mapped, args.allow_other_owner)
        if again.kept is not None:
            print(f"Kept after all: {_name(look.found)}: {again.kept}")
        else:
            removed += _remove(look.found)
    print(f"Removed {render.counted(removed, 'segment')}.")
    return 0 if removed else 1
