"""The name that fast-litellm has for :mod:`fast_litellm_shm.fast_litellm._rust`."""

import sys

from fast_litellm_shm.fast_litellm import _rust

sys.modules[__name__] = _rust
