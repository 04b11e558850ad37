"""File: the grantor of durable limits (fast_litellm_shm/limiters/grantors.py)."""

from __future__ import annotations

from typing import Any

from fast_litellm_shm._shared.named_limiter import InnerLimits, SharedLimits
from fast_litellm_shm.cluster.grantor import ServerRates
from fast_litellm_shm.cluster.quota import ClusterQuota, LocalPermits, longest_name, permits_name
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.durable import link
from fast_litellm_shm.durable.settings import StateFile
from fast_litellm_shm.limiters.grantors import Grantor, Limits, Quotas, Rates, Replayed
from fast_litellm_shm.limits import InFlight


def token_leases(limiter: SharedLimits, file: StateFile) -> TokenLeases:
    return TokenLeases(limiter, link.of(file.of(limiter.segment), limiter.segment))


class File(Grantor):
    """Of limiters made with ``durable=``. Permits are of living calls: no file keeps them."""

    def __init__(self, file: StateFile, argument: Replayed = None) -> None:
        super().__init__(argument)
        self.file = file

    def rates(self, limiter: SharedLimits) -> Rates:
        return ServerRates(token_leases(limiter, self.file))

    def quota(self, limits: Limits, *, settles: bool = True, **given: Any) -> Quotas:
        """The file has the rates, the segment the permits."""
        rates = tuple(each for each in limits if not isinstance(each, InFlight))
        if not rates:
            return super().quota(limits, settles=settles, **given)
        last, name, permits = limits[-1], given["name"], None
        own = permits_name(limits, name)
        tokens = token_leases(InnerLimits(rates, **given), self.file)
        if isinstance(last, InFlight):
            given |= {"name": own, "shown": name}
            permits = LocalPermits(InnerLimits((last,), **given), tokens.connection)
        return ClusterQuota(tokens, permits, settles=settles)

    def longest_name(self, limits: Limits) -> int:
        return longest_name(limits)
