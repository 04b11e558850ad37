"""The shared-memory segment that limiters live in."""

from __future__ import annotations

import time
from typing import Any

from fast_litellm_shm import settings
from fast_litellm_shm.native import ffi, lib, raise_segment_error

_default: dict[str, Segment] = {}


def _check_name(name: object) -> str:
    if not isinstance(name, str):
        raise TypeError(f"segment name must be a str, not {name!r}")
    out = ffi.new("char[256]")  # C would read a name to its first NUL only
    if "\0" in name or lib.fshm_path(name.encode("utf-8", "replace"), out, 256) != lib.FSHM_OK:
        raise ValueError(
            f"segment name must be 1 to {lib.FSHM_MAX_NAME} characters of A-Z a-z 0-9 . _ - and "
            f"not begin with a dot, not {name!r}"
        )
    return name


def path_of(name: str) -> str:
    """The file that a segment name stands for."""
    out = ffi.new("char[256]")
    lib.fshm_path(_check_name(name).encode(), out, 256)
    return str(ffi.string(out).decode())


class Segment:
    """One shared-memory segment: made where there is none, else attached to.

    name: 1 to 64 characters of ``A-Z a-z 0-9 . _ -``; default: FAST_LITELLM_SHM_NAME, else a name
    for each user id. capacity: how many keys it must hold, 1 .. 2**31 (a key takes one place for
    each limit of its limiter); default: FAST_LITELLM_SHM_CAPACITY, else 200,000 (12 MB) where it is
    made, and whatever it has where it exists. mode: permission bits; default FAST_LITELLM_SHM_MODE,
    else 0o600. names: ``"plain"`` keeps key names for ``fast-shm inspect``, ``"hashed"`` shows
    keyed hashes, ``"off"`` keeps nothing of single keys; decided by whoever makes the segment.
    create=False attaches only, to any capacity.

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
        allow_other_owner: bool = False,
        _read_only: bool = False,
    ) -> None:
        self._name = _check_name(settings.segment_name() if name is None else name)
        if capacity is None and create and not _read_only:
            capacity = settings.segment_capacity()
        if capacity is not None and (
            isinstance(capacity, bool)
            or not isinstance(capacity, int)
            or not 1 <= capacity <= 2**31
        ):
            raise ValueError(f"capacity must be an int between 1 and 2**31 keys, not {capacity!r}")
        mode = settings.segment_mode() if mode is None else mode
        if not isinstance(mode, int) or not 0 <= mode <= 0o777 or mode & 0o600 != 0o600:
            raise ValueError(f"mode must be permission bits such as 0o600 or 0o660, not {mode!r}")
        flags = settings.names_flag(settings.segment_names() if names is None else names)
        flags |= lib.FSHM_OPEN_CREATE if create and not _read_only else 0
        flags |= lib.FSHM_OPEN_OTHER_OWNER if allow_other_owner else 0
        flags |= lib.FSHM_OPEN_READ_ONLY if _read_only else 0
        out, error = ffi.new("fshm_segment **"), ffi.new("fshm_error *")
        if (
            lib.fshm_open(self._name.encode(), capacity or 0, mode, flags, out, error)
            != lib.FSHM_OK
        ):
            raise_segment_error(error, "open")
        self._handle: Any = ffi.gc(out[0], lib.fshm_close)
        self._arguments = {"capacity": capacity, "allow_other_owner": allow_other_owner}

    @classmethod
    def default(cls) -> Segment:
        """The segment that limiters use when they are given none; opened once for each process.

        Where it was removed since (``fast-shm rm``), a new one is made.
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
    def unlinked(self) -> bool:
        """True where the name was removed or belongs to another segment by now: new processes will
        not meet this one, and count apart. Restart the processes that are attached."""
        return bool(lib.fshm_unlinked(self._handle))

    def geometry(self) -> Any:
        """The ``fshm_geometry`` of the mapping; see ``csrc/fast_shm.h``."""
        out = ffi.new("fshm_geometry *")
        lib.fshm_describe(self._handle, out)
        return out

    def processes(self) -> list[dict[str, int]]:
        """The living processes attached to it: pid, attached_seconds, admitted, denied."""
        geometry, found = self.geometry(), []
        out = ffi.new("fshm_process_info *")
        for slot in range(geometry.processes):
            if lib.fshm_process_at(self._handle, slot, out) == lib.FSHM_OK and out.alive:
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
        names, unlinked."""
        geometry = self.geometry()
        used = lib.fshm_live_cells(self._handle, ffi.NULL, 0)
        admitted, denied = geometry.retired_admitted, geometry.retired_denied
        info, limiters = ffi.new("fshm_process_info *"), 0
        for slot in range(geometry.processes):
            lib.fshm_process_at(self._handle, slot, info)
            admitted, denied = admitted + info.admitted, denied + info.denied
        limiter = ffi.new("fshm_limiter_info *")
        for index in range(geometry.limiters):
            limiters += lib.fshm_limiter_at(self._handle, index, limiter) == lib.FSHM_OK
        names = {0: "plain", lib.FSHM_NAMES_HASHED: "hashed"}.get(geometry.names, "off")
        return {
            "name": self._name,
            "path": self.path,
            "size_bytes": geometry.size,
            "capacity": geometry.capacity,
            "used": used,
            "occupancy": used / geometry.capacity,
            "limiters": limiters,
            "processes": len(self.processes()),
            "admitted": admitted,
            "denied": denied,
            "age_seconds": max(time.time() - geometry.created_realtime_ns / 1e9, 0.0),
            "layout_version": geometry.layout_version,
            "names": names,
            "unlinked": self.unlinked,
        }

    def remove(self) -> None:
        """Delete the segment. Processes that are attached keep counting in what they have, apart
        from new ones, until they are restarted. Removing it twice is harmless."""
        if self.unlinked:
            return
        error = ffi.new("fshm_error *")
        if lib.fshm_remove(self._name.encode(), error) not in (lib.FSHM_OK, lib.FSHM_E_NOT_FOUND):
            raise_segment_error(error, "remove")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._name, self._arguments))

    def __repr__(self) -> str:
        return f"Segment({self._name!r}, capacity={self.geometry().capacity})"


def _reopen(name: str, arguments: dict[str, Any]) -> Segment:
    return Segment(name, **arguments)
