"""litellm, imported once, offline; and acceleration switched off after each test."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fast_litellm_shm.fast_litellm import acceleration
from fast_litellm_shm.tokens import vocabulary

OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def litellm() -> Any:
    """The real litellm, and the tables that it is accelerated with."""
    if importlib.util.find_spec("litellm") is None:
        pytest.skip("litellm is not installed: the extra `litellm` brings it")
    os.environ.update(OFFLINE, FAST_LITELLM_SHM_CACHE=os.environ["FAST_LITELLM_TESTS_CACHE"])
    acceleration.remove_acceleration()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its dependencies
        module = importlib.import_module("litellm")
        importlib.import_module("litellm.litellm_core_utils.token_counter")
        module.token_counter("gpt-4o", text="load it")
    for name in ("cl100k_base", "o200k_base", "p50k_base"):
        assert vocabulary.load(name) is not None
    return module


@pytest.fixture(autouse=True)
def _off_again() -> Iterator[None]:
    acceleration.remove_acceleration()
    yield
    acceleration.remove_acceleration()


@pytest.fixture(name="python")
def _python(litellm: Any) -> Callable[..., str]:
    """Runs code in a fresh interpreter; its standard output."""

    def run(code: str, **env: str) -> str:
        here = {**os.environ, **OFFLINE, **env}
        here["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=False,
            env=here,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
