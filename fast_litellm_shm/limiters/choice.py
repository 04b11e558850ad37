"""The choice of a grantor, made once for each limiter: the only place that asks "this host, a
server, or a file?"."""

from fast_litellm_shm._shared import settings
from fast_litellm_shm.limiters.grantors import ClusterArgument, DurableArgument, Grantor


def chosen(cluster: ClusterArgument, durable: DurableArgument = None) -> Grantor:
    """The grantor that a limiter's arguments name, or FAST_LITELLM_SHM_CLUSTER. A server is asked
    first: what it keeps outlives a reboot of this host."""
    if durable is not None and not isinstance(durable, bool):
        from fast_litellm_shm.durable.settings import found as checked

        checked(durable)
    if settings.names_server(cluster):
        from fast_litellm_shm.cluster import grantor
        from fast_litellm_shm.cluster.settings import found

        server = found(cluster)
        if server is not None:
            return grantor.Server(server)
    if durable:
        from fast_litellm_shm.durable import grantor as file_grantor
        from fast_litellm_shm.durable.settings import found as state_file

        file = state_file(durable)
        if file is not None:
            return file_grantor.File(file, False if cluster is False else None)
    return Grantor(False if cluster is False else None)
