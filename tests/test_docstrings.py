"""The examples in docstrings run, and give what they say."""

from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name", ["_shared.features", "_shared.performance", "metrics.health", "routing.router"]
)
def test_examples(name: str) -> None:
    module = importlib.import_module(f"fast_litellm_shm.{name}")
    failed, attempted = doctest.testmod(module)
    assert attempted > 0
    assert failed == 0
