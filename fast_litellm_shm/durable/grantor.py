"""File: the grantor of durable limits (fast_litellm_shm/limiters/grantors.py)."""

from __future__ import annotations

from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm.cluster.grantor import ServerRates
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.durable import link
from fast_litellm_shm.durable.settings import StateFile
from fast_litellm_shm.limiters.grantors import Grantor, Rates, Replayed


def token_leases(limiter: SharedLimits, file: StateFile) -> TokenLeases:
    return TokenLeases(limiter, link.of(file.of(limiter.segment), limiter.segment))


class File(Grantor):
    """Of limiters made with ``durable=``. Permits are of living calls: no file keeps them."""

    def __init__(self, file: StateFile, argument: Replayed = None) -> None:
        super().__init__(argument)
        self.file = file

    def rates(self, limiter: SharedLimits) -> Rates:
        return ServerRates(token_leases(limiter, self.file))
