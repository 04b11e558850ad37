"""Which kind of file system a folder lies on."""

from __future__ import annotations

import os
from typing import NamedTuple

# Only one kernel has such a file system mounted at a time.
_LOCAL = frozenset(
    (
        "bcachefs", "btrfs", "erofs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "msdos",
        "ntfs3", "overlay", "ramfs", "reiserfs", "tmpfs", "ubifs", "vfat", "xfs", "zfs",
    )
)  # fmt: skip
_IN_MEMORY = frozenset(("ramfs", "tmpfs"))


class Kind(NamedTuple):
    name: str  # "": not known
    shared: bool  # hosts may share it
    in_memory: bool  # a reboot empties it


def kind_of(folder: str) -> Kind:
    name = _type_of(os.path.realpath(folder))
    return Kind(name, name not in _LOCAL, name in _IN_MEMORY)


def _type_of(path: str) -> str:
    """By the mount that has it; of two at one place, the later one."""
    found, longest = "", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields, _, rest = line.partition(" - ")
        point = fields.split(" ")[4].encode("utf-8", "surrogateescape")
        mount = point.decode("unicode_escape").rstrip("/") + "/"
        if f"{path}/".startswith(mount) and len(mount) >= longest:
            found, longest = rest.split(" ")[0], len(mount)
    return found
