"""The shared-memory segment that limiters live in."""

from __future__ import annotations

import errno
import os
import time
import weakref
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import log, moved_clock, settings
from fast_litellm_shm._shared.native import (
    address,
    ffi,
    group_name,
    lib,
    on_look,
    owned,
    raise_segment_error,
    why_no_descriptor,
)

_default: dict[str, Segment] = {}
_MOST_LAYOUTS = 64  # versions of the layout that are looked for
_open: weakref.WeakSet[Segment] = weakref.WeakSet()  # of this process, for health_check()
_logged: set[tuple[int, str]] = set()  # by segment, what is wrong with it: each once in a process
os.register_at_fork(after_in_child=_logged.clear)


def path_of(name: object) -> str:
    """The file of a segment name. Raises TypeError or ValueError for what is no such name."""
    if not isinstance(name, str):
        raise TypeError(f"segment name must be a str, not {name!r}")
    out = ffi.new("char[256]")  # C would read a name up to its first NUL
    if "\0" in name or lib.fshm_path(name.encode("utf-8", "replace"), out, 256) != lib.FSHM_OK:
        raise ValueError(
            f"segment name must be 1 to {lib.FSHM_MAX_NAME} characters of A-Z a-z 0-9 . _ - and "
            f"not begin with a dot, not {name!r}"
        )
    return str(ffi.string(out).decode())


def _of_other_layouts(path: str) -> list[tuple[int, str]]:
    """The segments of other layout versions that have the same name: layout and path."""
    own = lib.FSHM_LAYOUT_VERSION
    before, _, after = path.partition(f".{own}.")
    paths = ((layout, f"{before}.{layout}.{after}") for layout in range(1, _MOST_LAYOUTS))
    return [each for each in paths if each[0] != own and os.path.lexists(each[1])]


def opened(name: str) -> list[Segment]:
    """The segments of that name that this process has open, removed ones included."""
    return [found for found in list(_open) if found.name == name]


def _damage(kind: int, index: int) -> str:
    return {
        lib.FSHM_DAMAGE_SIZE: f"its file has {index} bytes, not the size it was made with",
        lib.FSHM_DAMAGE_HEADER: f"its header was written over, at byte {index}",
        lib.FSHM_DAMAGE_LIMITS: f"the limits of limiter number {index} do not add up",
        lib.FSHM_DAMAGE_NAME: f"the name of limiter number {index} was written over",
        lib.FSHM_DAMAGE_SLOT: f"slot {index} holds a value that the library never writes",
    }[kind]


class Segment:
    """One shared-memory segment. The constructor makes it, or attaches to it where it exists.

    name: 1 to 64 characters of ``A-Z a-z 0-9 . _ -``; default: FAST_LITELLM_SHM_NAME, else a name
    for each user id. All programs of a user share that one: two unrelated programs with a limiter
    of the same name count together, so give each program a FAST_LITELLM_SHM_NAME of its own.
    capacity: how many keys it must hold, 1 .. 2**31 (a key takes one slot for each limit of its
    limiter); default: FAST_LITELLM_SHM_CAPACITY, else 200,000 (13 MB) for a new segment, and the
    capacity it has for an existing one. mode: permission bits of a new segment; default
    FAST_LITELLM_SHM_MODE, else 0o600. names: ``"plain"`` keeps key names for ``fast-shm inspect``,
    ``"hashed"`` shows keyed hashes, ``"off"`` keeps nothing of single keys; the process that makes
    the segment decides. create=False: attach only, to any capacity. allow_other_owner: use a
    segment that another user made; default: FAST_LITELLM_SHM_ALLOW_OTHER_OWNER, else False. group:
    the name or number of a group whose users share the segment: a new one is made for it, with mode
    0o660 by default, and one that another user made for it is used; default:
    FAST_LITELLM_SHM_GROUP, else none.

    It outlives its processes, so limits survive a restart; :meth:`remove` deletes it. A forked
    child may go on using it.

    Raises a SegmentError (see :mod:`fast_litellm_shm.exceptions`) or ValueError.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        capacity: int | None = None,
        mode: int | None = None,
        names: str | None = None,
        create: bool = True,
        allow_other_owner: bool | None = None,
        group: str | int | None = None,
        _read_only: bool = False,
    ) -> None:
        self._name = settings.segment_name() if name is None else name
        path_of(self._name)  # raises for a bad name
        if capacity is None and create and not _read_only:
            capacity = settings.segment_capacity()
        if capacity is not None and (
            isinstance(capacity, bool)
            or not isinstance(capacity, int)
            or not 1 <= capacity <= 2**31
        ):
            raise ValueError(f"capacity must be an int between 1 and 2**31 keys, not {capacity!r}")
        if group is None:
            shared_by = settings.segment_group()
        else:
            shared_by = settings.check_group("group", group)
        if mode is None:
            mode = settings.segment_mode(shared_by)
        else:
            settings.check_mode("mode", mode, oct(mode) if isinstance(mode, int) else repr(mode))
        if create and not _read_only and shared_by is not None and mode & 0o060 != 0o060:
            raise ValueError(
                f"with a group (FAST_LITELLM_SHM_GROUP) the mode must let it read and write, as "
                f"0660 does, not 0{mode:o}: leave FAST_LITELLM_SHM_MODE out"
            )
        allowed = settings.allow_other_owner() if allow_other_owner is None else allow_other_owner
        flags = settings.names_flag(settings.segment_names() if names is None else names)
        flags |= lib.FSHM_OPEN_CREATE if create and not _read_only else 0
        flags |= lib.FSHM_OPEN_OTHER_OWNER if allowed else 0
        flags |= lib.FSHM_OPEN_READ_ONLY if _read_only else 0
        out, error = ffi.new("fshm_segment **"), ffi.new("fshm_error *")
        of = lib.FSHM_NO_GROUP if shared_by is None else shared_by
        if (
            lib.fshm_open_group(self._name.encode(), capacity or 0, mode, flags, of, out, error)
            != lib.FSHM_OK
        ):
            raise_segment_error(error, "open", shared_by)
        self._handle: Any = owned(out[0], lib.fshm_close)
        self._read_only = _read_only
        self._arguments = {
            "capacity": capacity,
            "allow_other_owner": allowed or allow_other_owner,  # where a copy has another setting
            "group": shared_by,
        }
        _open.add(self)
        if shared_by is not None:
            self._check_group(shared_by)
        if create and (layouts := self.other_layouts):
            from fast_litellm_shm._shared import releases

            self._log_once(releases.said(self._name, layouts, lib.FSHM_LAYOUT_VERSION))
        clock = settings.test_clock()
        self._clock = None if clock is None or _read_only else moved_clock.shared(self, clock)

    def _check_group(self, group: int) -> None:
        """Warn of a segment that was made without the group: its users cannot open it."""
        try:
            found = os.stat(self.path)
        except OSError:
            return  # removed meanwhile
        if found.st_gid != group or found.st_mode & 0o060 != 0o060:
            self._log_once(
                f"it belongs to {group_name(found.st_gid)}, with mode {found.st_mode & 0o777:04o}, "
                f"and it should be shared by {group_name(group)} (FAST_LITELLM_SHM_GROUP), whose "
                "users cannot open it: stop the workers, "
                f"`fast-shm rm --name {self._name}`, and start them"
            )

    @classmethod
    def default(cls) -> Segment:
        """The segment that limiters use when they are given none; opened once in a process.

        If it was removed since (``fast-shm rm``), a new one is made, and a warning is logged.
        """
        name = settings.segment_name()
        known = _default.get(name)
        if known is None or known.unlinked:
            known = _default[name] = cls(name)
        return known

    @property
    def name(self) -> str:
        """The name it was opened by."""
        return self._name

    @property
    def path(self) -> str:
        """The file behind it."""
        return path_of(self._name)

    @property
    def other_layouts(self) -> list[int]:
        """The layout versions of segments of the same name that processes of other releases of the
        library use at this moment: they and this segment's processes count apart."""
        others = _of_other_layouts(self.path)
        if not others:
            return []
        from fast_litellm_shm._shared import releases

        return releases.in_use(others)

    @property
    def unlinked(self) -> bool:
        """True if its file was removed, or its name belongs to another segment by now: new
        processes do not find this one, and count apart. Restart the processes that are attached.
        The first time that a process finds this out, it logs a warning."""
        found = bool(lib.fshm_unlinked(self._handle))
        if found:
            self._log_once(self._removed())
        return found

    def _removed(self) -> str:
        return (
            f"segment {self.path} was removed; restart the processes that are attached to it: they "
            "count apart from new ones"
        )

    def _log_once(self, what: str, text: str = "segment %r: %s") -> None:
        if not self._read_only and self._is_new(what):
            log.warning(text, self._name, what)

    def _is_new(self, what: str) -> bool:
        told = int(self.geometry().instance), what
        found = told not in _logged
        _logged.add(told)
        return found

    @property
    def liveness_unknown(self) -> str | None:
        """None where all is well; else why the library cannot tell which processes are alive (for
        example: the lock file was deleted), and what to do. Until then it takes nothing from any
        process, new processes get no permits, and rates go on being limited."""
        found = self._liveness()
        if found is None:
            return None
        self._log_once(found[1])
        return found[1]

    def _liveness(self) -> tuple[type[exceptions.SegmentError], str] | None:
        error = ffi.new("fshm_error *")
        if lib.fshm_liveness(self._handle, error) == lib.FSHM_OK:
            return None
        path = ffi.string(error.path).decode("utf-8", "replace")
        if error.code == lib.FSHM_E_NOT_FOUND:
            return exceptions.SegmentNotFoundError, self._removed()
        renew = (
            f"stop the workers, `fast-shm rm --name {self._name}`, and start them; rates go on "
            "being limited until then, permits of dead processes do not come back"
        )
        system = os.strerror(error.sys_errno)
        cases: dict[int, tuple[type[exceptions.SegmentError], str]] = {
            errno.ENOENT: (
                exceptions.SegmentDamagedError,
                f"its lock file {path} was deleted, so it cannot tell who is alive; {renew}",
            ),
            errno.ESTALE: (
                exceptions.SegmentDamagedError,
                f"its lock file {path} is not the one that its processes hold (inode "
                f"{error.found}, not {error.wanted}), so it cannot tell who is alive; {renew}",
            ),
            errno.EBADF: (
                exceptions.SegmentError,
                f"this process (pid {os.getpid()}) has lost its lock on {path} "
                "(something closed a descriptor of that file), and others may have taken what it "
                "held; restart it, and open the segment after the code that closes descriptors",
            ),
            errno.EINVAL: (
                exceptions.SegmentError,
                f"its lock file {path} cannot be locked: this system has no locks of open file "
                "descriptions (Linux 3.15 and later have them)",
            ),
            errno.ELOOP: (
                exceptions.SegmentLinkError,
                f"its lock file {path} is a symbolic link, which is never followed; find out who "
                f"made it; {renew}",
            ),
            errno.EPERM: (
                exceptions.SegmentOwnerError,
                f"its lock file {path} was made by a user who may not write the segment, so it "
                "cannot tell who is alive; find out who made it, and remove it",
            ),
            errno.EACCES: (
                exceptions.SegmentPermissionError,
                f"its lock file {path} cannot be opened by uid {os.geteuid()} ({system}); give it "
                "the owner and the group of the segment",
            ),
        }
        other = why_no_descriptor(error.sys_errno) or system
        return cases.get(
            error.sys_errno,
            (exceptions.SegmentError, f"its lock file {path} cannot be opened: {other}"),
        )

    @property
    def damaged(self) -> str | None:
        """What is damaged and what to do, in a sentence; None where no damage is known.

        A program wrote over the segment, and a process noticed it. It stays so until the segment is
        removed. None is no proof that all is well; :meth:`stats` checks the whole segment.
        """
        return self._damaged(lib.fshm_damage)

    def _look(self) -> None:
        """Log what is wrong with it, if this process has not done so."""
        if self.unlinked:
            return
        if (said := self.damaged) is not None:
            self._log_once(said, "%.0s%s")  # which names the segment
        _ = self.liveness_unknown

    def _damaged(self, look: Any) -> str | None:
        index = ffi.new("uint64_t *")
        kind = look(self._handle, index)
        if kind == lib.FSHM_DAMAGE_NONE:
            return None
        return (
            f"segment {self._name!r} was damaged: {_damage(kind, index[0])}; stop the workers, "
            f"remove it with `fast-shm rm --name {self._name}`, and start them again"
        )

    def _check(self) -> str | None:
        """``damaged``, after a check of the whole segment. Raises SegmentDamagedError where the
        file has lost bytes, so that reading it would end the process."""
        said = self._damaged(lib.fshm_check)
        if said is not None and lib.fshm_damage(self._handle, ffi.new("uint64_t *")) == (
            lib.FSHM_DAMAGE_SIZE
        ):
            raise exceptions.SegmentDamagedError(said)
        return said

    def geometry(self) -> Any:
        """The ``fshm_geometry`` of the mapping; see ``csrc/fast_shm.h``."""
        out = ffi.new("fshm_geometry *")
        lib.fshm_describe(self._handle, out)
        return out

    def processes(self) -> list[dict[str, int]]:
        """The living processes attached to it: pid, attached_seconds, admitted, denied."""
        geometry, found = self.geometry(), []
        out = ffi.new("fshm_process_info *")
        for index in range(geometry.processes_joined):
            if lib.fshm_process_at(self._handle, index, out) == lib.FSHM_OK and out.alive:
                found.append(
                    {
                        "pid": out.pid,
                        "attached_seconds": max(geometry.time_ns - out.attached_ns, 0) // 10**9,
                        "admitted": out.admitted,
                        "denied": out.denied,
                        "refused_full": out.refused_full,
                    }
                )
        return found

    def stats(self) -> dict[str, Any]:
        """Size and occupancy: name, path, size_bytes, capacity, used, occupancy (0..1, of
        capacity), limiters, processes, admitted, denied (calls), age_seconds, layout_version,
        names, unlinked, liveness_unknown, damaged (each a sentence, or None)."""
        return self._stats(self._check())

    def _stats(self, damaged: str | None) -> dict[str, Any]:
        """stats(), where _check() has been called."""
        geometry = self.geometry()
        used = lib.fshm_live_slots(self._handle, ffi.NULL, 0)
        counters = ffi.new("fshm_counters[]", lib.FSHM_COUNTERS)
        lib.fshm_counters_all(self._handle, counters)
        limiter, limiters = ffi.new("fshm_limiter_info *"), 0
        for index in range(geometry.limiters):
            limiters += lib.fshm_limiter_at(self._handle, index, limiter) == lib.FSHM_OK
        names = {0: "plain", lib.FSHM_NAMES_HASHED: "hashed"}.get(geometry.names, "off")
        return {
            "name": self._name,
            "path": self.path,
            "size_bytes": geometry.memory,
            "capacity": geometry.capacity,
            "used": used,
            "occupancy": used / geometry.capacity,
            "limiters": limiters,
            "processes": len(self.processes()),
            "admitted": sum(each.admitted for each in counters),
            "denied": sum(each.denied for each in counters),
            "age_seconds": max(time.time() - geometry.created_realtime_ns / 1e9, 0.0),
            "layout_version": geometry.layout_version,
            "names": names,
            "unlinked": self.unlinked,
            "liveness_unknown": self.liveness_unknown,
            "damaged": damaged,
        }

    def remove(self) -> None:
        """Delete the segment. Attached processes keep counting in it, apart from new ones, until
        they are restarted. Removing it twice is harmless."""
        self._is_new(self._removed())  # this process knows
        if self.unlinked:
            return
        error = ffi.new("fshm_error *")
        if lib.fshm_remove(self._name.encode(), error) not in (lib.FSHM_OK, lib.FSHM_E_NOT_FOUND):
            raise_segment_error(error, "remove")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._name, self._arguments))

    def __repr__(self) -> str:
        return f"Segment({self._name!r}, capacity={self.geometry().capacity})"


class InSegment:
    """A part of the package that processes share by a name, in a segment."""

    _name: str
    _segment: Segment

    @property
    def name(self) -> str:
        """The name that processes share by."""
        return self._name

    @property
    def segment(self) -> Segment:
        """The segment it lives in."""
        return self._segment


def _look(at: int) -> None:
    """Called by the native part while this process makes calls, every few seconds. at: the address
    of the segment they use."""
    for found in list(_open):
        if address(found._handle) == at:
            found._look()
            return


on_look(_look)


def _reopen(name: str, arguments: dict[str, Any]) -> Segment:
    return Segment(name, **arguments)
