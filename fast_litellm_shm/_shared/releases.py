"""Segments of other releases of the library: of one name, and another layout version.

A release that changes the layout makes segments of its own, and neither reads the other's. While
workers of both run, they count apart. What is known of the other is its file, and whether a process
holds a lock on its lock file.
"""

from __future__ import annotations

import errno
import glob
import os


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


def in_use(segments: list[tuple[int, str]]) -> list[int]:
    """Those layouts whose segments living processes use. segments: layout and path. What cannot be
    asked counts as not in use."""
    found = []
    for layout, path in segments:
        for lock in glob.glob(f"{glob.escape(path)}.*.lock"):
            try:
                held = is_locked(lock)
            except OSError:
                continue
            if held:
                found.append(layout)
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
