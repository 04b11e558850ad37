"""The workflows are what GitHub's schema takes, and nothing in them is known to be unsafe."""

from __future__ import annotations

import pathlib
import subprocess
import sys

WORKFLOWS = sorted((pathlib.Path(__file__).parents[2] / ".github" / "workflows").glob("*.yml"))


def _run(*command: str | pathlib.Path) -> str:
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_github_reads_them() -> None:
    assert len(WORKFLOWS) >= 2
    schema = ["--builtin-schema", "vendor.github-workflows"]
    _run(sys.executable, "-m", "check_jsonschema", *schema, *WORKFLOWS)


def test_no_known_weakness() -> None:
    """Actions are pinned to commits, no expression is pasted into a shell, rights are the least."""
    zizmor = pathlib.Path(sys.executable).with_name("zizmor")
    _run(zizmor, "--offline", "--no-progress", *WORKFLOWS)
