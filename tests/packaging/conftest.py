"""What several of these tests build."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from support.built_once import built_once

ROOT = Path(__file__).parents[2]


def _make_lib(folder: Path) -> None:
    done = subprocess.run(
        ["make", "--silent", "lib", f"BUILD={folder}"],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    (folder / "said").write_text(done.stdout)


@pytest.fixture(scope="session")
def lib_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """libfast_shm.so, as `make lib` builds it. `said`: what was printed meanwhile."""
    return built_once(tmp_path_factory, "lib", _make_lib)
