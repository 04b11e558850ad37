"""``fast-shm reset``, ``release`` and ``rm``: the verbs that change something."""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import keyed
from fast_litellm_shm._shared.inspection import HELD, Inspection, is_beside, open_for_reading
from fast_litellm_shm._shared.native import ffi, lib, owned, raise_segment_error
from fast_litellm_shm._shared.segment import Segment, path_of
from fast_litellm_shm.cli import inspect, ls, over_hosts, render
from fast_litellm_shm.limiters.concurrency import release_process

_ABANDONED = 60.0  # seconds: a temporary file of that age is nobody's; making a segment takes less


@dataclass(frozen=True)
class _Limiter:
    name: str
    handle: Any
    over_hosts: bool  # a server keeps what was consumed


def _name(info: Any) -> str:
    raw: bytes = ffi.buffer(info.name, info.name_length)[:]
    return raw.decode("utf-8", "replace")


def _open_limiter(segment: Segment, info: Any, over_hosts: bool) -> _Limiter:
    name, out = _name(info), ffi.new("fshm_limiter **")
    status = lib.fshm_limiter_find(segment._handle, info.name, info.name_length, out)
    if status != lib.FSHM_OK:
        raise exceptions.SegmentError(
            f"cannot open limiter {name!r} in segment {segment.name!r} (error {status}): "
            f"{segment.damaged or 'its limits are gone'}"
        )
    return _Limiter(name, owned(out[0], lib.fshm_limiter_close, segment._handle), over_hosts)


def _limiters(segment: Segment, wanted: str | None) -> list[_Limiter]:
    infos = []
    for index in range(segment.geometry().limiters):
        info = ffi.new("fshm_limiter_info *")
        if lib.fshm_limiter_at(segment._handle, index, info) == lib.FSHM_OK and info.name_length:
            infos.append(info)
    # What a server granted is nothing consumed. Forgotten, the server would take the host's next
    # questions for older ones, and the host could take no permit for seconds.
    names = {_name(info) for info in infos}
    wallets = {name + HELD for name in names}
    found = {
        name: info
        for info in infos
        if (name := _name(info)) not in wallets and not is_beside(name, names)
    }
    if wanted is not None and wanted not in found:
        raise ls.no_such_limiter(wanted, segment, list(found))
    opened = [
        _open_limiter(segment, info, name + HELD in names)
        for name, info in found.items()
        if wanted in (None, name)
    ]
    return sorted(opened, key=lambda limiter: limiter.over_hosts)  # which may fail: last


def _open_for_writing(name: str, allow_other_owner: bool) -> Segment:
    """Attach to what is there, whatever the environment asks for."""
    return Segment(
        name, mode=0o600, names="plain", create=False, allow_other_owner=allow_other_owner
    )


def _failed(status: int, limiter: _Limiter) -> exceptions.SegmentError:
    return exceptions.SegmentError(
        f"cannot reset limiter {limiter.name!r} (error {status}): its limits are damaged; stop the "
        "workers and remove the segment with `fast-shm rm`"
    )


def _has_consumed(limiter: _Limiter, key: bytes) -> bool:
    if limiter.name in keyed.NAMES:
        return _has_counted(limiter, key)
    limits, version = ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS), ffi.new("uint64_t *")
    remaining = ffi.new("uint64_t[]", lib.FSHM_MAX_LIMITS)
    lib.fshm_limiter_limits(limiter.handle, limits, version)
    count = lib.fshm_remaining(limiter.handle, key, len(key), 0, remaining)  # without permits
    return any(
        remaining[i] < (limits[i].burst if limits[i].kind == lib.FSHM_BUCKET else limits[i].n)
        for i in range(count)
    )


def _has_counted(limiter: _Limiter, key: bytes) -> bool:
    """Of a limiter whose limits come with the calls."""
    limit = keyed.limit_of(limiter.name, key)
    if limit is None:
        return False
    found, look = ffi.new("fshm_counted *"), lib.fshm_count
    if limiter.name == keyed.MOVING:
        look = lib.fshm_moving
    look(limiter.handle, key, len(key), ffi.new("fshm_limit *", limit._raw()), 0, 0, found)
    return bool(found.count or found.previous)


def _holds_only(limiter: _Limiter) -> bool:
    """Permits and nothing else: there is nothing consumed that could be forgotten."""
    limits, version = ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS), ffi.new("uint64_t *")
    count = lib.fshm_limiter_limits(limiter.handle, limits, version)
    return bool(count == 1 and limits[0].kind == lib.FSHM_PERMITS)


def _reset_key(segment: Segment, limiter: _Limiter, key: bytes) -> bool:
    """Returns whether the key had consumed anything."""
    if limiter.over_hosts:
        return over_hosts.reset(segment, limiter.name, key)
    consumed = _has_consumed(limiter, key)
    forget = lib.fshm_reset_key
    if limiter.name == keyed.MOVING:
        forget = lib.fshm_moving_clear  # its hits have cells of their own
    status = forget(limiter.handle, key, len(key))
    if status != lib.FSHM_OK:
        raise _failed(status, limiter)
    return consumed


def reset_key(name: str, allow_other_owner: bool, limiter: str, key: bytes) -> bool:
    """Forget what a key has consumed in one limiter of segment ``name``; whether it was anything.

    Raises FastShmError."""
    segment = _open_for_writing(name, allow_other_owner)
    return any([_reset_key(segment, found, key) for found in _limiters(segment, limiter)])


def reset(args: argparse.Namespace) -> int:
    """Forget what was consumed; say of what."""
    segment = _open_for_writing(args.name, args.allow_other_owner)
    limiters = _limiters(segment, args.limiter)
    if not limiters:
        print(f"Nothing to reset: segment {segment.name!r} has no limiter.")
    if args.key is None:
        keys = {limiter["name"]: limiter["keys"] for limiter in Inspection(segment).limiters()}
        for limiter in limiters:
            if _holds_only(limiter):
                name = render.escaped(limiter.name)
                print(f"Left limiter '{name}' alone: it counts what is held (fast-shm release).")
                continue
            if limiter.over_hosts:
                count = over_hosts.reset_all(segment, limiter.name)
            else:
                status = lib.fshm_reset_all(limiter.handle)
                if status != lib.FSHM_OK:
                    raise _failed(status, limiter)
                count = keys.get(limiter.name, 0)
            print(f"Reset limiter '{render.escaped(limiter.name)}': all keys ({count:,} known).")
        return 0
    key = os.fsencode(args.key)
    was_reset = False
    for limiter in limiters:
        if _reset_key(segment, limiter, key):
            was_reset = True
            shown = render.escaped(limiter.name)
            print(f"Reset key '{render.escaped(key)}' of limiter '{shown}'.", flush=True)
    if limiters and not was_reset:
        where = f"limiter '{render.escaped(args.limiter)}'" if args.limiter else "any limiter"
        print(f"Nothing to reset: key '{render.escaped(key)}' has consumed nothing in {where}.")
    return 0


def _release_dead(segment: Segment) -> int:
    unknown = segment.liveness_unknown
    if unknown:
        raise exceptions.SegmentError(
            f"segment {segment.name!r}: nothing was given back: {unknown}"
        )
    freed = release_process(segment, 0)
    if freed:
        print(f"Gave back {freed:,} permit(s) of dead processes.")
    else:
        print("Nothing to give back: no dead process holds a permit.")
    return 0


def release(args: argparse.Namespace) -> int:
    """Give permits back for a process that cannot, or should not, keep them."""
    segment = _open_for_writing(args.name, args.allow_other_owner)
    where = f"segment {segment.name!r}"
    if args.dead:
        return _release_dead(segment)
    pid, found = args.pid, None
    for process in inspect.processes_of(segment):
        if process["pid"] == pid:
            found = process
    if found is None:
        # Whatever it held is a dead process's. Whose exactly is not known: the number may be in use
        # again, and its place in the process table too.
        print(f"Process {pid} is not attached to {where}: it died, or never used it.")
        return _release_dead(segment)
    command = found["command"]
    shown = "command unknown" if command is None else render.escaped(command)
    if not args.force:
        print(
            f"fast-shm: process {pid} ({shown}) is alive and uses {where}: nothing was given back. "
            "Stop it, and its permits come back by themselves; or give --force, and more may run "
            "at once than the limits say",
            file=sys.stderr,
        )
        return 1
    freed = release_process(segment, pid)
    print(f"Gave back {freed:,} permit(s) of process {pid} ({shown}), which is alive.")
    return 0


def _left_over(path: str) -> list[str]:
    """Files beside a segment that are its alone. A fresh temporary one is left: it may be that of
    somebody who is making the segment this moment."""
    out = []
    for helper in ls.helpers_of(path):
        try:
            age = time.time() - os.lstat(helper).st_mtime
        except FileNotFoundError:
            continue
        if helper.endswith(".lock") or age > _ABANDONED:
            out.append(helper)
    return out


def _unlink(paths: list[str]) -> int:
    removed = 0
    for path in paths:
        try:
            os.unlink(path)
            removed += 1
        except FileNotFoundError:
            continue  # went with the segment
        except OSError as error:  # a folder, or another user's: anybody can make files there
            shown = render.escaped(path)
            print(f"fast-shm: cannot remove {shown}: {error.strerror}", file=sys.stderr)
    return removed


def _users(args: argparse.Namespace) -> tuple[list[dict[str, Any]], str | None]:
    """Who is attached; and why that cannot be told, where it cannot."""
    try:
        return inspect.processes_of(open_for_reading(args.name, True)), None
    except exceptions.SegmentNotFoundError:
        raise
    except exceptions.SegmentError as error:
        return [], str(error)


def _ask() -> bool:
    print("Remove it all the same? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def remove(args: argparse.Namespace) -> int:
    """Delete a segment, and what was left over beside it."""
    path = path_of(args.name)
    # Looked for before the removal: what a new segment of this name brings along is not touched.
    left_over = _left_over(path)
    try:
        processes, unknown = _users(args)
    except exceptions.SegmentNotFoundError:
        if not left_over:
            raise
        print(f"There is no segment {path}; removed {_unlink(left_over)} left-over file(s) of it.")
        return 0
    if (processes or unknown) and not args.yes:
        if unknown:
            print(f"Cannot tell which processes use it: {unknown}.", file=sys.stderr)
        else:
            print(f"{len(processes)} process(es) use segment {args.name!r}:", file=sys.stderr)
        for process in processes:
            command = process["command"]
            shown = "?" if command is None else render.escaped(command)
            print(f"  {process['pid']:>7}  {shown}", file=sys.stderr)
        print("They would go on counting in it, apart from new processes.", file=sys.stderr)
        if not sys.stdin.isatty():
            print("fast-shm: nothing removed: stop them, or give --yes", file=sys.stderr)
            return 1
        if not _ask():
            print("Nothing removed.", file=sys.stderr)
            return 1
    error = ffi.new("fshm_error *")
    if lib.fshm_remove(args.name.encode(), error) != lib.FSHM_OK:
        raise_segment_error(error, "remove")
    _unlink(left_over)
    print(f"Removed segment {args.name!r} ({path}).")
    if processes:
        pids = ", ".join(str(process["pid"]) for process in processes)
        print(f"Restart the processes that still use it: {pids}.")
    return 0
