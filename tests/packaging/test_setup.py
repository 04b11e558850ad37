"""What setup.py refuses."""

from __future__ import annotations

import pathlib
import subprocess
import sys

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
