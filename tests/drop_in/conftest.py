"""litellm, imported once, offline; and acceleration switched off after each test."""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

from fast_litellm_shm.fast_litellm import acceleration

OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def litellm() -> Any:
    """The real litellm."""
    if importlib.util.find_spec("litellm") is None:
        pytest.skip("litellm is not installed: the extra `litellm` brings it")
    os.environ.update(OFFLINE)
    acceleration.remove_acceleration()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        module = importlib.import_module("litellm")
        importlib.import_module("litellm.litellm_core_utils.token_counter")
        module.token_counter("gpt-4o", text="load it")
    return module


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    acceleration.remove_acceleration()
    yield
    acceleration.remove_acceleration()
