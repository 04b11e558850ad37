"""The name that fast-litellm has for :mod:`fast_litellm_shm.fast_litellm.feature_flags`."""

import sys

from fast_litellm_shm.fast_litellm import feature_flags

sys.modules[__name__] = feature_flags
