"""What a limiter over many hosts has from its server."""

from __future__ import annotations

from fast_litellm_shm import ConcurrencyLimiter, Quota, RateLimiter
from fast_litellm_shm.cluster.connection import Connection
from fast_litellm_shm.cluster.grantor import ServerPermits, ServerRates
from fast_litellm_shm.cluster.permit_lease import PermitLeases
from fast_litellm_shm.cluster.quota import ClusterQuota
from fast_litellm_shm.cluster.token_lease import TokenLeases


def tokens_of(limiter: RateLimiter) -> TokenLeases:
    assert isinstance(limiter._grantor, ServerRates)
    return limiter._grantor.leases


def permits_of(limiter: ConcurrencyLimiter) -> PermitLeases:
    assert isinstance(limiter._grantor, ServerPermits)
    return limiter._grantor.leases


def connection_of(limiter: RateLimiter | Quota) -> Connection:
    """By which the server hears of it."""
    if isinstance(limiter, Quota):
        assert isinstance(limiter._grantor, ClusterQuota)
        found = limiter._grantor.connection
    else:
        found = tokens_of(limiter).connection
    assert isinstance(found, Connection)
    return found
