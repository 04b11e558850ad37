"""Limits that outlive a reboot: a file grants what the processes of this host spend."""

from fast_litellm_shm.durable.settings import StateFile

__all__ = ["StateFile"]
