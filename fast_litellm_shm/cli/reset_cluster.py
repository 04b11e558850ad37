"""``fast-shm reset`` for limits over many hosts: the server forgets what a key has consumed, too.

The server is the one that the environment names, as for the workers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.segment import Segment

if TYPE_CHECKING:
    from fast_litellm_shm.cluster.token_lease import TokenLeases


def token_leases_of(segment: Segment, limiter: str) -> TokenLeases:
    """What resets keys of a limiter at the server and on this host. Raises FastShmError."""
    from fast_litellm_shm.cluster import settings
    from fast_litellm_shm.cluster.grantor import token_leases

    where = f"limiter {limiter!r} in segment {segment.name!r}"
    try:
        server = settings.found(None)
        if server is not None:
            shared = SharedLimits((), name=limiter, segment=segment, on_full="deny", keep=True)
            return token_leases(shared, server)
    except (ImportError, ValueError) as error:
        raise exceptions.ClusterError(f"{where} was not reset: {error}") from error
    raise exceptions.ClusterError(
        f"{where} was not reset: a server keeps it for many hosts, and would go on denying; set "
        "FAST_LITELLM_SHM_CLUSTER to that server's URL, as it is set for the workers"
    )
