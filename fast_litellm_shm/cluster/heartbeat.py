"""The heartbeat of permits: whatever process holds some tells the server, and gives back what is
unused. A host that is not heard any more loses what it was granted, so its leader tells of those
whose own processes do not: they are stopped, say."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fast_litellm_shm._shared import greenlets
from fast_litellm_shm._shared.inspection import LEASED, held_permits, is_cut, stored_name
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.cluster import connection as links

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.permit_lease import PermitLeases

_BEAT = 1.0  # seconds
_MOST = 200  # keys in one pipeline


class Heartbeat:
    """Of one link, in one process."""

    def __init__(self, link: links.Connection) -> None:
        self._link = link
        self._leases: weakref.WeakSet[PermitLeases] = weakref.WeakSet()
        threading.Thread(target=self._run, name="fast-shm-cluster-beat", daemon=True).start()

    def add(self, leases: PermitLeases) -> None:
        self._leases.add(leases)

    def _run(self) -> None:
        while True:
            time.sleep(_BEAT)
            try:
                if self._link.away is None:
                    self._say()
            except links.UnreachableError:
                pass  # what is held is told before anything is asked again
            except Exception:
                links._log.exception("telling the server what is held failed")

    def _say(self) -> None:
        for leases in list(self._leases):
            keys = list(leases.keys)
            for start in range(0, len(keys), _MOST):
                found = [leases.due(key) for key in keys[start : start + _MOST]]
                due = [each for each in found if each is not None]
                if due:
                    answers = self._link.call([request for request, _ in due])
                    for (request, lease), answer in zip(due, answers, strict=True):
                        leases.put(request, lease, answer)


def renew(link: links.Connection, leases_of: Callable[[bytes], PermitLeases | None]) -> None:
    """By the leader of a host: tell of what is held here and was not told for long. What the host
    may hold is looked at as always; where a name is not kept, or is wrong, nothing is found."""
    late = []
    for limiter, raw in _in_flight(link.segment):
        leases = leases_of(limiter)
        found = leases.overdue(raw) if leases is not None else None
        if leases is not None and found is not None:
            late.append((leases, *found))
    for start in range(0, len(late), _MOST):
        part = late[start : start + _MOST]
        answers = link.call([request for _, request, _ in part])
        for (leases, request, lease), answer in zip(part, answers, strict=True):
            leases.put(request, lease, answer)


def _in_flight(segment: Segment) -> Iterator[tuple[bytes, bytes]]:
    """Limiters of permits that the server grants, and their keys with some in flight."""
    names, info = {}, ffi.new("fshm_limiter_info *")
    for index in range(segment.geometry().limiters):
        if lib.fshm_limiter_at(segment._handle, index, info) == lib.FSHM_OK:
            names[index] = ffi.buffer(info.name, info.name_length)[:]
    leased = {
        index: name for index, name in names.items() if name + LEASED.encode() in names.values()
    }
    if not leased:
        return
    seen = set()
    for cell, permit in held_permits(segment):
        place = permit.limiter, permit.key_hash
        if permit.limiter not in leased or not permit.alive or place in seen:
            continue
        name = stored_name(segment, cell)
        if name is not None and not is_cut(*name):
            seen.add(place)
            yield leased[permit.limiter], name[1]


_beats: dict[int, Heartbeat] = {}
_lock = greenlets.Lock()  # to start a thread lets other greenlets run


def ensure(link: links.Connection) -> Heartbeat:
    """The heartbeat of a link in this process."""
    known = _beats.get(id(link))
    if known is None:
        with _lock:
            known = _beats.get(id(link))
            if known is None:
                known = _beats[id(link)] = Heartbeat(link)
    return known


def _forked() -> None:
    """A child holds nothing yet: what its parent holds is its parent's."""
    global _lock
    _lock = greenlets.Lock()
    for each in _beats.values():
        for leases in list(each._leases):
            leases.keys.clear()
    _beats.clear()


os.register_at_fork(after_in_child=_forked)
