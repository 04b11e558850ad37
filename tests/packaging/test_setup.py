"""What setup.py refuses."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[2]
SETUP = """
import runpy, sys
{change}
runpy.run_path("setup.py", run_name="__main__")
"""
WINDOWS = (
    "fast_litellm_shm needs POSIX shared memory and does not run on Windows: use WSL 2 or Linux.\n"
)
PYPY = (
    "fast_litellm_shm needs CPython and does not run on pypy: its types are written against "
    "CPython's own C API. Use CPython 3.10 or later.\n"
)


def _refused(python: str, program: str) -> str:
    done = subprocess.run(
        [python, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    return done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [('sys.platform = "win32"', WINDOWS), ('sys.implementation.name = "pypy"', PYPY)],
)
def test_refused_in_one_sentence(change: str, said: str) -> None:
    """Before setuptools is imported: one sentence, and no traceback before or after it."""
    assert _refused(sys.executable, SETUP.format(change=change)) == said


@pytest.mark.skipif(not shutil.which("pypy3"), reason="needs PyPy: apt-get install pypy3")
def test_pypy_itself_is_refused() -> None:
    assert _refused("pypy3", SETUP.format(change="")) == PYPY


def test_no_malicious_litellm_is_admitted() -> None:
    """PYSEC-2026-2. As installed, so of pyproject.toml as it was then: make installs anew."""
    wanted = [Requirement(text) for text in metadata.requires("fast-litellm-shm") or ()]
    of_litellm = [one for one in wanted if one.name == "litellm"]
    assert len(of_litellm) >= 3  # of several extras
    for one in of_litellm:
        assert not one.specifier.contains("1.82.7"), one
        assert not one.specifier.contains("1.82.8"), one
        assert one.specifier.contains("1.110.2"), one
