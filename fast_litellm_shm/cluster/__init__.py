"""The same limits over many hosts, kept by a Redis or Valkey, at the speed of shared memory."""

from fast_litellm_shm.cluster.settings import Cluster

__all__ = ["Cluster"]
