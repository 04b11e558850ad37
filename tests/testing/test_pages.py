"""docs/testing.md: its files, run by a real pytest, as the page says."""

from __future__ import annotations

import glob
import os
import pathlib
import re
import subprocess
import sys

import pytest
from support.waiting import PATIENCE

from fast_litellm_shm._shared.segment import path_of

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))


def run(
    folder: pathlib.Path, *arguments: str, files: dict[str, str], **environment: str
) -> subprocess.CompletedProcess[str]:
    """pytest, in a folder with these files."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_fast_litellm_shm", "-p", "no:cacheprovider"]
        + list(arguments),
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE,
        check=False,
    )
    return found


def left(temporary: pathlib.Path) -> set[str]:
    """What runs have left that have ended: segments, and in this folder all else. Other tests run
    pytest at the same time, and have theirs."""
    segments = glob.glob(f"{os.path.dirname(path_of('x'))}/*.test-*")
    ended = [
        path for path in segments if not _runs(int(path.rpartition(".test-")[2].split("-")[0]))
    ]
    return {*filter(os.path.exists, ended), *map(str, temporary.glob("fast-shm-test-*"))}


def _runs(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_the_files_are_here() -> None:
    assert set(FILES) == {
        "pyproject.toml", "shop.py", "api.py", "test_signup.py", "test_shop.py", "test_calendar.py",
        "test_waiting.py", "test_api.py", "test_workers.py",
    }  # fmt: skip


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_page_passes(tmp_path: pathlib.Path, workers: str) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    before = left(temporary)
    arguments = ("-q", "-W", "error", "-n", workers)
    found = run(tmp_path, *arguments, files=FILES, TMPDIR=str(temporary))
    assert found.returncode == 0, found.stdout + found.stderr
    assert "9 passed" in found.stdout
    assert left(temporary) <= before


def test_without_the_setting_import_time_limiters_are_not_isolated(tmp_path: pathlib.Path) -> None:
    """So the setting is what makes the page pass."""
    files = {name: FILES[name] for name in ("shop.py", "test_shop.py")}
    files |= {"pytest.ini": "[pytest]\n"}
    found = run(tmp_path, "-q", files=files)
    assert found.returncode == 1, found.stdout + found.stderr
    assert "2 failed" in found.stdout or "1 failed" in found.stdout
