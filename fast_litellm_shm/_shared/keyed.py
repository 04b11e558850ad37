"""The former name of :mod:`fast_litellm_shm._shared.key_grammar`."""

from fast_litellm_shm._shared.key_grammar import *  # noqa: F403
