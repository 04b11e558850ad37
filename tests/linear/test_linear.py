"""The checker of histories, by its own unit tests. The histories themselves: ``make linearize``."""

from __future__ import annotations

import pathlib
import subprocess

ROOT = pathlib.Path(__file__).parents[2]


def test_checker(tmp_path: pathlib.Path) -> None:
    """It refuses what is known to be wrong, and agrees with a search of all orders."""
    program = tmp_path / "linear" / "test_checker"
    subprocess.run(
        ["make", "--silent", str(program), f"BUILD={tmp_path}"], cwd=ROOT, check=True, timeout=120
    )
    run = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("passed, 0 failed\n")
