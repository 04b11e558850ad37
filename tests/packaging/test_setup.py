"""What setup.py refuses."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from importlib import metadata

from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).parents[2]
ON_WINDOWS = """
import runpy, sys
sys.platform = "win32"
runpy.run_path("setup.py", run_name="__main__")
"""


def test_windows_is_refused_in_one_sentence() -> None:
    """Before setuptools is imported: one sentence, and no traceback before or after it."""
    done = subprocess.run(
        [sys.executable, "-c", ON_WINDOWS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "fast_litellm_shm needs POSIX shared memory and does not run on Windows: "
        "use WSL 2 or Linux.\n"
    )


def test_no_malicious_litellm_is_admitted() -> None:
    """PYSEC-2026-2. As installed, so of pyproject.toml as it was then: make installs anew."""
    wanted = [Requirement(text) for text in metadata.requires("fast-litellm-shm") or ()]
    of_litellm = [one for one in wanted if one.name == "litellm"]
    assert len(of_litellm) >= 3  # of several extras
    for one in of_litellm:
        assert not one.specifier.contains("1.82.7"), one
        assert not one.specifier.contains("1.82.8"), one
        assert one.specifier.contains("1.110.2"), one
