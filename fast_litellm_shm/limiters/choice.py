"""The choice of a grantor, made once for each limiter: the only place that asks "this host, or a
server?"."""

from fast_litellm_shm._shared import settings
from fast_litellm_shm.limiters.grantors import ClusterArgument, Grantor


def chosen(cluster: ClusterArgument) -> Grantor:
    """The grantor that a limiter's argument names, or FAST_LITELLM_SHM_CLUSTER."""
    if settings.names_server(cluster):
        from fast_litellm_shm.cluster import grantor
        from fast_litellm_shm.cluster.settings import found

        server = found(cluster)
        if server is not None:
            return grantor.Server(server)
    return Grantor(False if cluster is False else None)
