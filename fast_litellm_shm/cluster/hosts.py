"""How many hosts share the limits: the leader of a host hears it from the server every 2 s, and keeps
it in the segment, where all processes of the host read it.

The segment has no word for it, so it is the state of one key of a limiter of its own, "(cluster)".
"""

from __future__ import annotations

from typing import Any

from fast_litellm_shm._shared.inspection import NOTE
from fast_litellm_shm._shared.native import ffi, lib, owned
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limits import Granted

_NAME, _KEY = NOTE.encode(), b"hosts"


def _note(segment: Segment) -> Any:
    """A limiter as a place for one number: how many hosts there are."""
    out, limit = ffi.new("fshm_limiter **"), ffi.new("fshm_limit[]", [Granted()._raw()])
    status = lib.fshm_limiter_open_beside(segment._handle, _NAME, len(_NAME), limit, 1, out)
    if status != lib.FSHM_OK:
        return None
    return owned(out[0], lib.fshm_limiter_close, segment._handle)


def host_count(segment: Segment) -> int:
    """How many hosts share the limits, as the leader of this one last heard; 0: never."""
    note = _note(segment)
    left, ns = ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
    if note is not None:
        lib.fshm_wallet_look(note, _KEY, len(_KEY), 0, 0, left, ns)
    return int(left[0])


def keep_host_count(segment: Segment, count: int) -> None:
    note = _note(segment)
    if note is not None:
        number = ffi.new("uint64_t[4]", [count])
        lib.fshm_wallet_refuse(note, _KEY, len(_KEY), number, 30 * 86_400 * 10**9, 0)
