"""How many hosts share the limits. The server tells the leader of a host every 2 s, which keeps the
number in the segment, for all processes of the host.

The segment has no word for it: it is the state of one key of a limiter of its own, "(cluster)".
"""

from __future__ import annotations

import contextlib

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm._shared.side_limiters import NOTE
from fast_litellm_shm._shared.states import open_beside
from fast_litellm_shm.limits import Granted

_KEY = b"hosts"
_KEPT_NS = 30 * 86_400 * 10**9


def host_count(segment: Segment) -> int:
    """By the answer to the last heartbeat of this host's leader; 0: there was none."""
    try:
        return open_beside(segment, NOTE, [Granted()]).leased(_KEY)[0][0]
    except exceptions.FastShmError:  # there is no room for it
        return 0


def keep_host_count(segment: Segment, count: int) -> None:
    with contextlib.suppress(exceptions.FastShmError):  # there is no room for it
        open_beside(segment, NOTE, [Granted()]).refuse(_KEY, (count,), _KEPT_NS)
