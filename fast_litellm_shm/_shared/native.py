"""Loads the extension module, and turns its statuses into exceptions. No other module does."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import resource
import sysconfig
from collections.abc import Callable
from typing import Any, NoReturn

from fast_litellm_shm import _native, exceptions

ffi: Any = _native.ffi
lib: Any = _native.lib

BudgetCore = _native.BudgetCore
BudgetReservation = _native.BudgetReservation
Core = _native.Core
Decision = _native.Decision
Fields = _native.Fields
HierarchyCore = _native.HierarchyCore
Permit = _native.Permit
PoolCore = _native.PoolCore
Connection = _native.Connection
Memo = _native.Memo
Recorder = _native.Recorder
RouterCore = _native.RouterCore
Counts = _native.Counts
Reservation = _native.Reservation
Slot = _native.Slot
Use = _native.Use
on_look = _native._on_look  # a hook that calls run every few seconds: csrc/python/py_watch.h


def _lay_out() -> None:
    """Have cffi make all functions, and lay out all structs, which it does at their first use.

    Without the GIL two threads may meet there, and the process dies (seen with cffi 2.1.1): its
    critical section ends early where it waits for another lock, such as that of interned names.
    Only one thread imports a module."""
    for name in ffi.list_types()[0]:
        with contextlib.suppress(ffi.error):  # of one that only C code looks into
            ffi.sizeof(name)
    for name in dir(lib):
        getattr(lib, name)


if sysconfig.get_config_var("Py_GIL_DISABLED"):
    _lay_out()


def owned(pointer: Any, close: Callable[[Any], object], *needs: object) -> Any:
    """A pointer that is closed with its last reference. needs: objects that live until then.

    ``ffi.gc`` alone closes a pointer when the garbage collector *finds* a cycle that refers to it.
    The ``__del__`` methods of that cycle run later, and may use the pointer. So the collector does
    not track it. That is safe: the pointer refers to nothing that could refer back to it.

    close: a C function. A signal handler can raise in the first instruction of a Python function,
    which then would not close."""
    closing = functools.partial(close)
    closing.needs = needs  # type: ignore[attr-defined]
    found = ffi.gc(pointer, closing)
    _native._untrack(found)
    return found


def address(handle: Any) -> int:
    """The address of a handle, for the native types; they keep the handle itself too."""
    return int(ffi.cast("uintptr_t", handle))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _why_no_space(error: Any, directory: str) -> str:
    needs, smaller = _mib(error.wanted), "ask for a smaller capacity (FAST_LITELLM_SHM_CAPACITY)"
    if error.sys_errno == errno.EFBIG:
        return (
            f"it needs {needs}, and this process may make files of at most {error.found:,} bytes "
            f"(RLIMIT_FSIZE); raise that (ulimit -f), or {smaller}"
        )
    if error.sys_errno == errno.EDQUOT:
        return (
            f"it needs {needs}, and the quota of uid {os.geteuid()} in {directory} is used up; "
            f"free some of it, have it raised, or {smaller}"
        )
    if error.found > error.wanted:
        return (
            f"no space left for it: {directory} has room ({_mib(error.found)}), but no inode for "
            "another file; remove files there, or mount it with a larger nr_inodes"
        )
    return (
        f"no space left for it: it needs {needs}, and {directory} has {_mib(error.found)} free; "
        f"free some there, mount it larger (in a container: --shm-size), or {smaller}"
    )


def group_name(gid: int) -> str:
    """``gid 1000 (shop)``; without the name, where this host does not know it."""
    try:
        import grp

        return f"gid {gid} ({grp.getgrgid(gid).gr_name})"
    except (ImportError, KeyError):
        return f"gid {gid}"


def _rm(path: str) -> str:
    """The command that removes this segment, and not the one that a terminal uses by default."""
    name = os.path.basename(path).split(".", 2)[2:]
    return f"`fast-shm rm --name {name[0]}`" if name else "`fast-shm rm`"


def _why_not_permitted(
    error: Any, path: str, directory: str, system: str, group: int | None
) -> str:
    if error.sys_errno == errno.EROFS:
        return (
            f"{directory} is mounted read-only; mount it read-write (mount -o remount,rw). "
            "`fast-shm inspect` can look into what is there"
        )
    uid = os.geteuid()
    try:
        found = os.lstat(path)
    except OSError:
        return (
            f"permission denied{system}: uid {uid} may not make files in {directory}; it should "
            "have mode 1777"
        )
    return (
        f"permission denied{system}: it belongs to uid {found.st_uid}, gid {found.st_gid}, with "
        f"mode {found.st_mode & 0o7777:04o}, and you are uid {uid}; "
        + _how_to_share(found, group, _rm(path))
    )


def _how_to_share(found: os.stat_result, group: int | None, rm: str) -> str:
    if group is None:
        return (
            "run as the user that made it; or put both users into a group, stop all workers, "
            f"{rm} as the user that made it, and start them with "
            "FAST_LITELLM_SHM_GROUP=<that group>"
        )
    if found.st_gid != group or found.st_mode & 0o060 != 0o060:
        return (
            f"it was made without FAST_LITELLM_SHM_GROUP ({group_name(group)}): stop its workers, "
            f"{rm} as uid {found.st_uid}, and start all with that variable"
        )
    return (
        f"this process is no member of {group_name(group)}: add its user to the group (usermod "
        "-aG), and start it anew, since a process keeps the groups that it started with"
    )


_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def _why_another_clock(error: Any, remove: str) -> str:
    if error.wanted and not os.access(_BOOT_ID, os.R_OK):
        return (
            f"this process cannot read {_BOOT_ID}, so it cannot tell whether the segment is of "
            "this boot; make it readable (systemd: no ProcSubset=pid; containers: mount /proc)"
        )
    return f"{_of_another_clock(error)}, so its times are of another clock; {remove}"


def _of_another_clock(error: Any) -> str:
    said = "it was made before the last boot or in another time namespace"
    if not error.wanted:
        return f"{said}: this process cannot tell which, since it cannot read /proc; mount it"
    if not error.found:
        return f"{said}: its maker could not read /proc, so which one is unknown; mount it there"
    if error.found != error.wanted:
        return f"{said} (time:[{error.found}], and this process is in time:[{error.wanted}])"
    return said


def why_no_descriptor(number: int) -> str | None:
    """What to do where no file can be opened; None for another error number."""
    if number == errno.EMFILE:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return (
            f"this process has no file descriptor left (RLIMIT_NOFILE {limit}); raise that "
            "(ulimit -n), or close files"
        )
    if number == errno.ENFILE:
        return "the host has no file descriptor left; raise the sysctl fs.file-max, or close files"
    return None


def _why_no_memory(error: Any, system: str) -> str:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    some = limit != resource.RLIM_INFINITY
    return (
        f"out of memory{system}: it needs {_mib(error.wanted)} of address space; "
        + (f"RLIMIT_AS is {_mib(limit)}: raise that (ulimit -v), or " if some else "")
        + "make it with a smaller capacity (FAST_LITELLM_SHM_CAPACITY)"
    )


def raise_segment_error(error: Any, doing: str, group: int | None = None) -> NoReturn:
    """Raise the exception for a ``fshm_error``. ``doing``: what was tried, for the message. group:
    whose users are to share the segment."""
    path = ffi.string(error.path).decode("utf-8", "replace")
    directory = ffi.string(lib.fshm_directory()).decode()
    system = f" ({os.strerror(error.sys_errno)})" if error.sys_errno else ""
    found, wanted = error.found, error.wanted
    whose = group_name(wanted) if error.code == lib.FSHM_E_GROUP else ""
    remove = f"remove it with {_rm(path)} once no worker uses it"
    cases: dict[int, tuple[type[exceptions.SegmentError], str]] = {
        lib.FSHM_E_NOT_FOUND: (
            exceptions.SegmentNotFoundError,
            f"there is no such segment{system}; `fast-shm ls` lists those there are"
            if os.path.isdir(directory)
            else f"there is no directory {directory}; mount a tmpfs there (mount -t tmpfs -o "
            f"mode=1777 none {directory}; in a container: not --ipc=none)",
        ),
        lib.FSHM_E_SPACE: (
            exceptions.SegmentSpaceError,
            _why_no_space(error, directory),
        ),
        lib.FSHM_E_PERMISSION: (
            exceptions.SegmentPermissionError,
            _why_not_permitted(error, path, directory, system, group),
        ),
        lib.FSHM_E_LINK: (
            exceptions.SegmentLinkError,
            "it is a symbolic link, which is never followed; find out who made it, and remove it",
        ),
        lib.FSHM_E_KIND: (
            exceptions.SegmentLinkError,
            "it is not a regular file; find out who made it, and remove it",
        ),
        lib.FSHM_E_OWNER: (
            exceptions.SegmentOwnerError,
            f"it belongs to uid {found}, and you are uid {wanted}; use another name "
            "(FAST_LITELLM_SHM_NAME), or if you trust that user, allow_other_owner=True "
            "(FAST_LITELLM_SHM_ALLOW_OTHER_OWNER=true)"
            + (f"; it is not of {group_name(group)}" if group is not None else ""),
        ),
        lib.FSHM_E_GROUP: (
            exceptions.SegmentPermissionError,
            f"uid {os.geteuid()} cannot give it to {whose}{system}: add the user to "
            "the group (usermod -aG), and start the process anew, since a process keeps the "
            "groups that it started with; or set FAST_LITELLM_SHM_GROUP to a group of the user",
        ),
        lib.FSHM_E_DAMAGED: (
            exceptions.SegmentDamagedError,
            f"it is not a segment of this library, or is damaged (size {found}, expected "
            f"{wanted}); {remove}",
        ),
        lib.FSHM_E_LAYOUT: (
            exceptions.SegmentLayoutError,
            f"it has layout version {found} or another byte order, this library reads {wanted}; "
            f"use another name, or {remove}",
        ),
        lib.FSHM_E_CAPACITY: (
            exceptions.SegmentCapacityError,
            f"it exists with a capacity of {found} keys, and {wanted} was wanted; set {found}, "
            f"leave the capacity out, or {remove}",
        ),
        lib.FSHM_E_BOOT: (
            exceptions.SegmentClockError,
            _why_another_clock(error, remove),
        ),
        lib.FSHM_E_MEMORY: (exceptions.SegmentError, _why_no_memory(error, system)),
    }
    other = why_no_descriptor(error.sys_errno) or f"unexpected error {error.code}{system}"
    if error.sys_errno == errno.EAGAIN:
        other = (
            "another process has a lease on it (F_SETLEASE), which the kernel ends within "
            "/proc/sys/fs/lease-break-time seconds; `lslocks` tells whose it is; try again"
        )
    kind, text = cases.get(error.code, (exceptions.SegmentError, other))
    raise kind(f"cannot {doing} segment {path}: {text}")
