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


def reset(segment: Segment, limiter: str, key: bytes) -> bool:
    """Forget what a key has consumed, at the server and on this host. Returns whether it was
    anything. Raises FastShmError."""
    return _token_leases(segment, limiter).reset(key)


def reset_all(segment: Segment, limiter: str) -> int:
    """Do so for each key that the server knows. Returns how many. Raises FastShmError."""
    return _token_leases(segment, limiter).reset_all()


def _token_leases(segment: Segment, limiter: str) -> TokenLeases:
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
