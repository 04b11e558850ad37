"""The one place that touches the extension module: loads it, and turns its statuses into
exceptions."""

from __future__ import annotations

import os
from typing import Any, NoReturn

from fast_litellm_shm import _native, exceptions

ffi: Any = _native.ffi
lib: Any = _native.lib

if not hasattr(_native, "Core"):
    lib.fshm_py_install(ffi.cast("void *", id(_native)))

Core = _native.Core
Decision = _native.Decision
Permit = _native.Permit
PoolCore = _native.PoolCore
Connection = _native.Connection

_SHM_FULL = (
    "free some space in {dir}, mount it larger (in a container: --shm-size), or ask for a smaller "
    "capacity (FAST_LITELLM_SHM_CAPACITY)"
)


def raise_segment_error(error: Any, doing: str) -> NoReturn:
    """Raise the exception for a ``fshm_error``. ``doing``: what was tried, for the message."""
    path = ffi.string(error.path).decode("utf-8", "replace")
    directory = ffi.string(lib.fshm_directory()).decode()
    system = f" ({os.strerror(error.sys_errno)})" if error.sys_errno else ""
    found, wanted = error.found, error.wanted
    remove = "remove it with `fast-shm rm` once no worker uses it"
    cases: dict[int, tuple[type[exceptions.SegmentError], str]] = {
        lib.FSHM_E_NOT_FOUND: (
            exceptions.SegmentNotFoundError,
            f"there is no such segment{system}; `fast-shm ls` lists those there are",
        ),
        lib.FSHM_E_SPACE: (
            exceptions.SegmentSpaceError,
            f"no space left for it; {_SHM_FULL.format(dir=directory)}",
        ),
        lib.FSHM_E_PERMISSION: (
            exceptions.SegmentPermissionError,
            f"permission denied{system}; run as the user that made it, or make it with a mode that "
            "admits you (FAST_LITELLM_SHM_MODE=0660)",
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
            "(FAST_LITELLM_SHM_NAME), or allow_other_owner=True if you trust them",
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
            f"it exists with a capacity of {found} keys, but {wanted} was asked for; ask for "
            f"{found}, leave the capacity out, or {remove}",
        ),
        lib.FSHM_E_BOOT: (
            exceptions.SegmentClockError,
            f"it was made before the last boot or in another time namespace, so its times mean "
            f"nothing here; {remove}",
        ),
        lib.FSHM_E_MEMORY: (exceptions.SegmentError, f"out of memory{system}"),
    }
    kind, text = cases.get(
        error.code, (exceptions.SegmentError, f"unexpected error {error.code}{system}")
    )
    raise kind(f"cannot {doing} segment {path}: {text}")
