"""The sdist and each wheel of dist/, installed with what they depend on, keep their limits between
processes on their platform. Run by ``make test-wheels``."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
from _pytest.mark import ParameterSet
from support.children import PATIENCE
from wheels import pythons
from wheels.exact import Installed

from fast_litellm_shm import __version__

DIST = pathlib.Path(__file__).parents[2] / "dist"
WHERE = (
    "import fast_litellm_shm; from fast_litellm_shm import _native; "
    "print(fast_litellm_shm.__version__, _native.__file__)"
)


def _wheel(python: pythons.Python) -> pathlib.Path | None:
    """None: make wheels was told to leave it out."""
    return next(DIST.glob(f"*{python.libc}*_{python.machine}.whl"), None)


def _pairs() -> list[tuple[str, pythons.Python, pathlib.Path]]:
    """With a name for each."""
    found = [(python.name, python, _wheel(python)) for python in pythons.all_of_them()]
    here = pythons.of_this_host()[0]
    sdists = [(f"sdist-{here.name}", here, path) for path in DIST.glob("*.tar.gz")]
    return [(name, python, file) for name, python, file in found + sdists if file]


def _parameters() -> list[ParameterSet]:
    return [pytest.param((python, file), id=name) for name, python, file in _pairs()]


def _install(python: pythons.Python, file: pathlib.Path, folder: pathlib.Path) -> None:
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-config"]
    command += ["--target", str(folder)]
    if file.suffix == ".whl":  # uv refuses one that is not for this platform
        command += ["--only-binary", ":all:"]
    if python.is_here:
        command += ["--python", python.command()[0]]
    else:
        command += ["--python", sys.executable, "--python-platform", python.platform]
        command += ["--python-version", python.version]
    subprocess.run([*command, str(file)], check=True, timeout=10 * PATIENCE)


@pytest.fixture(scope="module", params=_parameters())
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], dict[str, str]]:
    """The command of a Python, and the environment with which it finds what was installed."""
    python, file = request.param
    folder = tmp_path_factory.mktemp("installed")
    _install(python, file, folder)
    # -S: of this Python, nothing but its standard library.
    command = [*python.command(), "-S"]
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [*command, "-c", WHERE], cwd=folder, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [__version__, f"{folder}/fast_litellm_shm/_native.abi3.so"]
    return command, env


@pytest.fixture
def installed(place: tuple[list[str], dict[str, str]], segment_name: str) -> Installed:
    command, env = place
    return Installed(command, {**env, "FAST_LITELLM_SHM_NAME": segment_name})


def test_processes_admit_exactly_the_limit(installed: Installed) -> None:
    installed.admits_exactly_the_limit()


def test_a_release_wakes_another_process(installed: Installed) -> None:
    installed.wakes_who_waits()


def test_a_killed_process_holds_no_permit(installed: Installed) -> None:
    installed.frees_what_a_killed_process_held()


def test_everything_is_tried() -> None:
    tried = {file for _, _, file in _pairs()}
    assert tried == {*DIST.glob("*linux*.whl"), *DIST.glob("*.tar.gz")}
    assert len(tried) >= 2
