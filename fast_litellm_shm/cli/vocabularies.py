"""The vocabulary files of this host, and the processes that map them."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from fast_litellm_shm import _native
from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.tokens import vocabulary

# As vocabulary.path_of() and fshm_vocabulary_save() name them.
_FILE = re.compile(
    r"(?P<encoding>[A-Za-z0-9_.]+)-(?P<tiktoken>[^-/]+)-[0-9]+\.vocabulary"
    r"(?P<unfinished>\.[0-9a-f]{16}\.tmp)?"
)
_GONE = " (deleted)"  # behind the path, in /proc/PID/maps
_BUILDING = 60.0  # seconds: no builder takes as long, so an older temporary file is left over

WHOLE, OLD, DELETED, WRITING = "", "old", "deleted", "being written"
UNFINISHED = "unfinished"
_REFUSED = {lib.FSHM_E_DAMAGED: "damaged", lib.FSHM_E_LAYOUT: "other layout"}


@dataclass
class Found:
    """A file that is named like a vocabulary. ``state``: "" if it is whole, and what workers with
    the installed tiktoken use. ``age``: seconds. ``pids``: the processes that map it."""

    path: str
    encoding: str
    tiktoken: str
    size: int | None = None
    age: float | None = None
    state: str = WHOLE
    pids: list[int] = field(default_factory=list)

    @property
    def is_left_over(self) -> bool:
        """Whether no worker will use it any more."""
        return self.state not in (WHOLE, WRITING, DELETED)


def users(pids: Iterable[int | str] | None = None) -> dict[str, list[int]]:
    """The vocabulary files that processes map, each with their pids, by path. That of a file that
    was removed or replaced ends in " (deleted)". pids: look at these processes only. The processes
    of other users cannot be seen, if this user is not root."""
    found: dict[str, set[int]] = {}
    if pids is None:
        with contextlib.suppress(OSError):
            pids = [entry for entry in os.listdir("/proc") if entry.isdigit()]
    for pid in pids or ():
        with (
            contextlib.suppress(OSError),  # ended since, or another user's
            open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps,
        ):
            for line in maps:
                path = line[line.find("/") :].rstrip("\n") if ".vocabulary" in line else ""
                if _FILE.fullmatch(os.path.basename(path.removesuffix(_GONE))):
                    found.setdefault(path, set()).add(int(pid))
    return {path: sorted(its) for path, its in sorted(found.items())}


def in_use(pids: Iterable[int]) -> list[dict[str, object]]:
    """What these processes map: encoding, tiktoken (its version), path, pids."""
    return [
        {"encoding": parts["encoding"], "tiktoken": parts["tiktoken"], "path": path, "pids": its}
        for path, its in users(pids).items()
        if (parts := _FILE.fullmatch(os.path.basename(path.removesuffix(_GONE))))
    ]


def refusal(path: str) -> str:
    """Why a process would not use the file; "" if it would."""
    try:
        state = os.lstat(path)
        if not stat.S_ISREG(state.st_mode):
            return "no regular file"
        if state.st_uid not in (os.geteuid(), 0):
            return "other owner"
        if state.st_mode & 0o022:
            return "others may write"
        _native.open_vocabulary(path)
    except ValueError as error:
        return _REFUSED.get(error.args[0], "unreadable")
    except PermissionError:
        return "permission"
    except OSError as error:
        return (error.strerror or "unreadable").lower()
    return ""


def _state(parts: re.Match[str], path: str, age: float) -> str:
    if parts["unfinished"]:
        return UNFINISHED if age > _BUILDING else WRITING
    used = vocabulary.path_of(parts["encoding"])  # None: tiktoken is not installed here
    if used is not None and os.path.basename(used) != os.path.basename(path):
        return OLD
    return refusal(path)


def found(folder: str) -> list[Found]:
    """What there is in the folder, by name, and what was removed from it while processes use it.
    Reads each file whole, for its checksum. Raises OSError."""
    try:
        entries = sorted(os.listdir(folder))
    except FileNotFoundError:
        entries = []
    mapped = users()
    out = []
    for entry in entries:
        parts = _FILE.fullmatch(entry)
        path = os.path.join(folder, entry)
        with contextlib.suppress(FileNotFoundError):  # it was removed since
            if parts:
                state = os.lstat(path)
                age = max(time.time() - state.st_mtime, 0.0)
                each = Found(path, parts["encoding"], parts["tiktoken"], state.st_size, age)
                each.state = _state(parts, path, age)
                each.pids = mapped.get(os.path.realpath(path), [])
                out.append(each)
    for path, pids in mapped.items():
        where, name = os.path.split(path.removesuffix(_GONE))
        parts = _FILE.fullmatch(name)
        if parts and path.endswith(_GONE) and where == os.path.realpath(folder):
            out.append(Found(path, parts["encoding"], parts["tiktoken"], state=DELETED, pids=pids))
    return sorted(out, key=lambda each: (each.encoding, each.path))


def cache_folder() -> str:
    """The folder, as an absolute path."""
    return os.path.abspath(settings.cache_folder())
