"""The segments of this host, and the processes that use them."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cli import render

# A lock file, or a segment that a process is creating. (A segment's name may end in ".lock", too.)
_HELPER = re.compile(r"\.[0-9a-f]{16}\.(lock|tmp)$")
_SEGMENT = re.compile(r"fast_litellm_shm\.([0-9]{1,6})\.(.+)", re.DOTALL)
# A line of /proc/PID/maps: a writable mapping of a file, which may have no name any more. A view
# such as `fast-shm top` maps for reading alone.
_MAPPED = re.compile(r"\S+ .w\S+ \S+ (\S+ [0-9]+) +(/.*?)( \(deleted\))?\n?")
_MOST_NAMED = 10  # of segments in a message


@dataclass(frozen=True)
class Found:
    """A file that is named like a segment. pids: empty; of a removed segment, the processes that
    still use it."""

    name: str
    path: str
    layout: int
    pids: tuple[int, ...] = ()


def directory() -> str:
    """The directory of the segments."""
    text: bytes = ffi.string(lib.fshm_directory())
    return os.fsdecode(text)


def _entries(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _parsed(path: str, pids: tuple[int, ...] = ()) -> Found | None:
    folder, entry = os.path.split(path)
    parts = _SEGMENT.fullmatch(entry)
    if folder != directory() or parts is None or _HELPER.search(entry):
        return None
    return Found(parts[2], path, int(parts[1]), pids)


def found() -> list[Found]:
    """Every segment, of every layout version, by name."""
    all_of_them = (_parsed(os.path.join(directory(), entry)) for entry in _entries(directory()))
    return sorted(filter(None, all_of_them), key=lambda each: (each.name, each.layout))


def removed() -> list[Found]:
    """The segments that were removed while processes use them, by name; if two had the same name,
    both. Knows only processes whose ``/proc/PID/maps`` this user may read: the user's own."""
    all_of_them = (
        _parsed(path, tuple(sorted(pids)))
        for (path, _), pids in sorted(_mapped_by(deleted=True).items())
    )
    return [each for each in all_of_them if each is not None]


def mapped_by() -> dict[str, set[int]]:
    """By path, the pids of the processes that have mapped a segment for writing. Knows the same
    processes as :func:`removed`."""
    found: dict[str, set[int]] = {}
    for (path, _), pids in _mapped_by(deleted=False).items():
        found.setdefault(path, set()).update(pids)
    return found


def _mapped_by(deleted: bool) -> dict[tuple[str, str], set[int]]:
    """By path, and device and inode."""
    pids: dict[tuple[str, str], set[int]] = {}
    if not os.path.isdir(directory()):
        return pids
    device = os.stat(directory()).st_dev  # a container has a directory of its own
    here = f"{os.major(device):02x}:{os.minor(device):02x} "
    for pid in filter(str.isdigit, _entries("/proc")):
        with (
            contextlib.suppress(OSError),  # ended since, or another user's
            open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps,
        ):
            for line in maps:
                parts = _MAPPED.fullmatch(line) if "fast_litellm_shm" in line else None
                if parts and bool(parts[3]) is deleted and parts[1].startswith(here):
                    pids.setdefault((parts[2], parts[1]), set()).add(int(pid))
    return pids


def removed_users(name: str) -> list[int]:
    """The pids of this user's processes that still use a removed segment of this name."""
    return sorted({pid for each in removed() if each.name == name for pid in each.pids})


def said_of_removed(pids: list[int], name: str) -> str:
    """What to do about :func:`removed_users`, in a sentence."""
    listed = ", ".join(map(str, pids))
    return (
        f"a removed segment {name!r} is still in use by {render.counted(len(pids), 'process')} "
        f"(pids: {listed}), apart from new processes: each side has limits of its own. Restart "
        f"{'it' if len(pids) == 1 else 'them'}"
    )


def helpers_of(path: str) -> list[str]:
    """The lock files, and the temporary files, that belong to the segment at a path."""
    folder, name = os.path.split(path)
    return [
        os.path.join(folder, entry)
        for entry in _entries(folder)
        if entry.startswith(name) and _HELPER.fullmatch(entry[len(name) :])
    ]


def hint(name: str) -> str:
    """What to do if no segment has this name: a sentence or two. Does not raise."""
    try:
        names = [each.name for each in found() if each.layout == lib.FSHM_LAYOUT_VERSION]
        pids = removed_users(name)
    except OSError:
        return f"{directory()} cannot be listed."
    if not os.path.isdir(directory()):
        return "Until then no worker can make a segment."
    sentences = []
    if pids:
        said = said_of_removed(pids, name)
        sentences.append(f"{said[0].upper()}{said[1:]}.")
    shown = ", ".join(render.escaped(each) for each in names[:_MOST_NAMED])
    more = len(names) - _MOST_NAMED
    if names:
        sentences.append(f"There are: {shown}" + (f" and {more} more." if more > 0 else "."))
    elif not pids:
        sentences.append("There is none at all: the first worker that uses a limiter makes one.")
    return " ".join(sentences)


def no_such_limiter(name: str, segment: Segment, names: list[str]) -> exceptions.FastShmError:
    """The error for a limiter that is not in the segment; says which are."""
    there = ", ".join(repr(each) for each in sorted(names)[:20]) or "none"
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return exceptions.FastShmError(
        f"no limiter {name!r} in segment {segment.name!r}; there are: {there}{more}"
    )


def open_for_writing(name: str, allow_other_owner: bool) -> Segment:
    """Attach to a segment that exists; settings in the environment do not matter."""
    return Segment(
        name, mode=0o600, names="plain", create=False, allow_other_owner=allow_other_owner
    )


def processes_of(segment: Segment) -> list[dict[str, Any]]:
    """The living processes, each with its command and memory; both are None if the system does not
    tell (the process is in another pid namespace, or another user's)."""
    from fast_litellm_shm._shared.dependencies import psutil

    out: list[dict[str, Any]] = []
    for process in segment.processes():
        command, memory = None, None
        with contextlib.suppress(psutil.Error):  # also: the process has ended since
            system = psutil.Process(process["pid"])
            command = " ".join(system.cmdline()) or system.name()
            memory = system.memory_info().rss
        out.append({**process, "command": command, "memory_bytes": memory})
    return out
