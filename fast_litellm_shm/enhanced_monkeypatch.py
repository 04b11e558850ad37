"""The name that fast-litellm has for :mod:`fast_litellm_shm.fast_litellm.enhanced_monkeypatch`."""

import sys

from fast_litellm_shm.fast_litellm import enhanced_monkeypatch

sys.modules[__name__] = enhanced_monkeypatch
