"""``fast-shm reset``: forget what keys have consumed."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import key_grammar
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.side_limiters import TOKEN_LEASES, are_leases, is_side_limiter
from fast_litellm_shm.cli import render, segments
from fast_litellm_shm.limits import Money, dollars, from_raw

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.token_lease import TokenLeases
    from fast_litellm_shm.limiters.budget import Budget


@dataclass(frozen=True)
class _Limiter:
    name: str
    handle: Any
    over_hosts: bool  # a server counts what was consumed
    planned: bool  # its keys have plans
    segment: Segment


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
    handle = owned(out[0], lib.fshm_limiter_close, segment._handle)
    return _Limiter(name, handle, over_hosts, bool(info.planned), segment)


def _limiters(segment: Segment, wanted: str | None) -> list[_Limiter]:
    infos = []
    for index in range(segment.geometry().limiters):
        info = ffi.new("fshm_limiter_info *")
        if lib.fshm_limiter_at(segment._handle, index, info) == lib.FSHM_OK and info.name_length:
            infos.append(info)
    # Token leases (NAME + TOKEN_LEASES) and the state beside them stay. Without that the server
    # would take the next requests of this host for old ones, and would grant it no permit for
    # seconds.
    names = {_name(info) for info in infos}
    leased = {_name(info) for info in infos if are_leases(info)}
    leases = {name + TOKEN_LEASES for name in names} & leased
    found = {
        name: info
        for info in infos
        if (name := _name(info)) not in leases and not is_side_limiter(name, names)
    }
    if wanted is not None and wanted not in found:
        raise segments.no_such_limiter(wanted, segment, list(found))
    opened = [
        _open_limiter(segment, info, name + TOKEN_LEASES in leased)
        for name, info in found.items()
        if wanted in (None, name)
    ]
    return sorted(opened, key=lambda limiter: limiter.over_hosts)  # last: these may fail


def _failed(status: int, limiter: _Limiter) -> exceptions.SegmentError:
    return exceptions.SegmentError(
        f"cannot reset limiter {limiter.name!r} (error {status}): its limits are damaged; stop the "
        f"workers and remove the segment with `fast-shm rm --name {limiter.segment.name}`"
    )


def _has_consumed(limiter: _Limiter, key: bytes) -> bool:
    if limiter.name in key_grammar.NAMES:
        return _has_counted(limiter, key)
    if limiter.planned:  # which limits it had, only its programs know
        return True
    limits, version = ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS), ffi.new("uint64_t *")
    remaining = ffi.new("uint64_t[]", lib.FSHM_MAX_LIMITS)
    lib.fshm_limiter_limits(limiter.handle, limits, version)
    if limits[0].kind == lib.FSHM_MONEY:
        return _has_spent(limiter, key)
    count = lib.fshm_remaining(limiter.handle, key, len(key), 0, remaining)  # without permits
    return any(
        remaining[i] < (limits[i].burst if limits[i].kind == lib.FSHM_BUCKET else limits[i].n)
        for i in range(count)
    )


def _has_spent(limiter: _Limiter, key: bytes) -> bool:
    """The same for a budget: also where something was reserved of it, or added to it."""
    found, limits = ffi.new("fshm_budget *"), ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS)
    lib.fshm_limiter_limits(limiter.handle, limits, ffi.new("uint64_t *"))
    if lib.fshm_budget_look(limiter.handle, key, len(key), 0, found) != lib.FSHM_OK:
        return False
    return bool(found.spent or found.reserved or found.granted or found.limit > limits[0].n)


def _has_counted(limiter: _Limiter, key: bytes) -> bool:
    """The same for a limiter whose limits are given with each call."""
    limit = key_grammar.limit_of(limiter.name, key)
    if limit is None:
        return False
    found = ffi.new("fshm_counted *")
    look = lib.fshm_moving if limiter.name == key_grammar.MOVING else lib.fshm_count
    look(limiter.handle, key, len(key), ffi.new("fshm_limit *", limit._raw()), 0, 0, found)
    return bool(found.count or found.previous)


def _holds_only(limiter: _Limiter) -> bool:
    """Whether its limit is on permits alone, so that nothing is consumed."""
    limits, version = ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS), ffi.new("uint64_t *")
    count = lib.fshm_limiter_limits(limiter.handle, limits, version)
    return bool(count == 1 and limits[0].kind == lib.FSHM_PERMITS)


def _token_leases(segment: Segment, of: _Limiter) -> TokenLeases:
    """What resets keys of a limiter over many hosts, on this host and at the server that the
    environment names, as for the workers; or of a durable one, here and in the state file. Raises
    FastShmError."""
    from fast_litellm_shm.cluster import settings
    from fast_litellm_shm.cluster.grantor import token_leases
    from fast_litellm_shm.durable import grantor, records
    from fast_litellm_shm.durable.settings import default

    limiter = of.name
    where = f"limiter {limiter!r} in segment {segment.name!r}"
    if of.planned:
        raise exceptions.SegmentError(
            f"{where} was not reset: its keys have plans, which its programs alone know, and a "
            "state file or a server keeps what they have consumed; call reset() of the limiter in "
            "one of those programs"
        )
    try:
        server, file = settings.found(None), default()
        if server is not None or records.has(file.of(segment).path, limiter):
            shared = SharedLimits((), name=limiter, segment=segment, on_full="deny", keep=True)
            if server is None:
                return grantor.token_leases(shared, file)
            return token_leases(shared, server)
    except (ImportError, ValueError) as error:
        raise exceptions.ClusterError(f"{where} was not reset: {error}") from error
    raise exceptions.ClusterError(
        f"{where} was not reset: a server keeps it for many hosts, or a state file, and would go "
        "on denying; set FAST_LITELLM_SHM_CLUSTER to that server's URL, or FAST_LITELLM_SHM_STATE "
        "to that file's folder, as it is set for the workers"
    )


def _budget(segment: Segment, limiter: _Limiter) -> Budget | None:
    """The limiter, if it is a budget; with the file or the server that keeps it too."""
    from fast_litellm_shm.durable import records
    from fast_litellm_shm.durable.settings import default
    from fast_litellm_shm.limiters.budget import Budget

    found, version = ffi.new("fshm_limit[]", lib.FSHM_MAX_LIMITS), ffi.new("uint64_t *")
    lib.fshm_limiter_limits(limiter.handle, found, version)
    if found[0].kind != lib.FSHM_MONEY:
        return None
    money = from_raw(found[0], segment)
    assert isinstance(money, Money)
    try:
        durable = records.has(default().of(segment).path, limiter.name) or None
        return Budget(
            dollars(money.n), money.per, timezone=money.timezone, name=limiter.name,
            segment=segment, durable=durable,
        )  # fmt: skip
    except (ImportError, ValueError) as error:
        raise exceptions.ClusterError(
            f"budget {limiter.name!r} in segment {segment.name!r} was not reset: {error}"
        ) from error


def _reset_key(segment: Segment, limiter: _Limiter, key: bytes) -> bool:
    """Returns whether the key had consumed anything."""
    if limiter.over_hosts:
        return _token_leases(segment, limiter).reset(key)
    consumed = _has_consumed(limiter, key)
    budget = _budget(segment, limiter)
    if budget is not None:
        budget.reset(key)
        return consumed
    moving = limiter.name == key_grammar.MOVING  # its hits are in slots of their own
    forget = lib.fshm_moving_clear if moving else lib.fshm_reset_key
    status = forget(limiter.handle, key, len(key))
    if status != lib.FSHM_OK:
        raise _failed(status, limiter)
    return consumed


def reset_key(name: str, allow_other_owner: bool, limiter: str, key: bytes) -> bool:
    """Forget what a key has consumed in one limiter of segment ``name``. Returns whether it was
    anything. Raises FastShmError."""
    segment = segments.open_for_writing(name, allow_other_owner)
    return any([_reset_key(segment, found, key) for found in _limiters(segment, limiter)])


def _reset_all(segment: Segment, limiter: _Limiter, known: int) -> None:
    name = render.escaped(limiter.name)
    if _holds_only(limiter):
        print(f"Left limiter '{name}' alone: it counts permits (see fast-shm release).")
        return
    budget = _budget(segment, limiter)
    if limiter.over_hosts:
        known = _token_leases(segment, limiter).reset_all()
    elif budget is not None:
        budget.reset()
    else:
        status = lib.fshm_reset_all(limiter.handle)
        if status != lib.FSHM_OK:
            raise _failed(status, limiter)
    print(f"Reset limiter '{name}': all keys ({known:,} known).")


def run(args: argparse.Namespace) -> int:
    """Forget what was consumed, and print what was forgotten. A limiter that cannot be reset keeps
    no other one from it."""
    segment = segments.open_for_writing(args.name, args.allow_other_owner)
    limiters = _limiters(segment, args.limiter)
    if not limiters:
        print(f"Nothing to reset: segment {segment.name!r} has no limiter.")
    key = None if args.key is None else os.fsencode(args.key)
    keys = {}
    if key is None:
        keys = {limiter["name"]: limiter["keys"] for limiter in Inspection(segment).limiters()}
    was_reset = failed = False
    for limiter in limiters:
        try:
            if key is None:
                _reset_all(segment, limiter, keys.get(limiter.name, 0))
            elif _reset_key(segment, limiter, key):
                was_reset = True
                shown = render.escaped(limiter.name)
                print(f"Reset key '{render.escaped(key)}' of limiter '{shown}'.", flush=True)
        except exceptions.FastShmError as error:
            failed = True
            print(f"fast-shm: {error}", file=sys.stderr)
    if key is not None and limiters and not was_reset and not failed:
        where = f"limiter '{render.escaped(args.limiter)}'" if args.limiter else "any limiter"
        print(f"Nothing to reset: key '{render.escaped(key)}' has consumed nothing in {where}.")
    return 1 if failed else 0
