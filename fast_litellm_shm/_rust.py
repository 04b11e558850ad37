"""The name that fast-litellm has for :mod:`fast_litellm_shm.fast_litellm`."""

import sys

from fast_litellm_shm import fast_litellm

sys.modules[__name__] = fast_litellm
