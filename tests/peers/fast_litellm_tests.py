"""pytest plugin: fast-litellm's own tests, with this package by its name."""

from __future__ import annotations

import sys

import fast_litellm_shm

sys.modules["fast_litellm"] = fast_litellm_shm
sys.modules["fast_litellm._rust"] = fast_litellm_shm.fast_litellm
