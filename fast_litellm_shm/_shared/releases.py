"""Segments of other releases of the library: of one name, and another layout version.

A release that changes the layout makes segments of its own, and neither reads the other's. While
workers of both run, they count apart. What is known of the other is its file, and whether a process
holds a lock on its lock file.
"""

from __future__ import annotations

import errno
import glob
import os

_MOST_LAYOUTS = 64  # versions of the layout that are looked for


def is_locked(path: str) -> bool:
    """Whether a process holds a lock on any byte of a lock file. Raises OSError."""
    import fcntl
    import struct

    shape = "@hhqqi4x"  # struct flock: type, whence, start, length, pid
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        asked = struct.pack(shape, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(fd, getattr(fcntl, "F_OFD_GETLK", 36), asked)
        return bool(struct.unpack(shape, answer)[0] != fcntl.F_UNLCK)
    except OSError as error:
        if error.errno == errno.EINVAL:  # a system without such locks
            return False
        raise
    finally:
        os.close(fd)


def paths_of(path: str, layout: int) -> list[tuple[int, str]]:
    """The segments of other layouts that have the same name: layout and path. path: of the segment
    of this layout."""
    before, _, after = path.partition(f".{layout}.")
    found = []
    for other in range(1, _MOST_LAYOUTS):
        there = f"{before}.{other}.{after}"
        if other != layout and os.path.lexists(there):
            found.append((other, there))
    return found


def in_use(path: str, layout: int) -> list[int]:
    """The layouts of :func:`paths_of` whose segments living processes use. What cannot be asked
    counts as not in use."""
    found = []
    for other, there in paths_of(path, layout):
        for lock in glob.glob(f"{glob.escape(there)}.*.lock"):
            try:
                held = is_locked(lock)
            except OSError:
                continue
            if held:
                found.append(other)
                break
    return found


def said(name: str, layouts: list[int], layout: int) -> str:
    """What :func:`in_use` means and what to do, in a sentence."""
    theirs = " and ".join(map(str, layouts))
    return (
        f"processes of another release of fast_litellm_shm use a segment {name!r} of their own "
        f"(layout {theirs}; here: {layout}), so the two count apart, each up to the whole limit. "
        "Restart the processes of the older release (docs/operations.md, Upgrades)"
    )
