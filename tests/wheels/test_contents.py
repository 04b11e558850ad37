"""What make wheels built: what is in each file of dist/, and what it asks of a platform."""

from __future__ import annotations

import email
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest
from support.elf import RPATH, RUNPATH, Elf

from fast_litellm_shm import __version__

DIST = pathlib.Path(__file__).parents[2] / "dist"
WHEELS = sorted(DIST.glob("*.whl"))
LINUX = [path for path in WHEELS if "linux" in path.name]
INFO = f"fast_litellm_shm-{__version__}.dist-info"
NATIVE = "fast_litellm_shm/_native.abi3.so"

each_wheel = pytest.mark.parametrize("wheel", WHEELS, ids=lambda path: path.name)
each_of_linux = pytest.mark.parametrize("wheel", LINUX, ids=lambda path: path.name)


def _says(*command: str | pathlib.Path) -> str:
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", *command],
        env={**os.environ, "PATH": path, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def _native(wheel: pathlib.Path) -> Elf:
    return Elf(zipfile.ZipFile(wheel).read(NATIVE))


@each_wheel
def test_only_what_runs_is_in_it(wheel: pathlib.Path) -> None:
    """The package, the plugin of pytest, and the licence: no tests, and no sources in C."""
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    tops = {"fast_litellm_shm", "pytest_fast_litellm_shm.py", INFO}
    assert {name.partition("/")[0] for name in names} == tops
    kinds = {pathlib.PurePath(name).suffix for name in names if not name.startswith(INFO)}
    assert kinds == {".py", ".pyi", ".typed", ".so", ".lua", ".html", ".css", ".js", ".svg"}
    assert {NATIVE, "fast_litellm_shm/py.typed", f"{INFO}/licenses/LICENSE"} <= set(names)
    assert [name for name in names if name.endswith(".so")] == [NATIVE]


@each_wheel
def test_it_is_as_in_the_tree(wheel: pathlib.Path) -> None:
    """Each module that the tree has, and no other."""
    root = DIST.parent
    tree = {path.relative_to(root) for path in (root / "fast_litellm_shm").rglob("*.py")}
    archive = zipfile.ZipFile(wheel)
    modules = {pathlib.Path(name) for name in archive.namelist() if name.endswith(".py")}
    assert modules - {pathlib.Path("pytest_fast_litellm_shm.py")} == tree
    for path in modules:
        assert archive.read(path.as_posix()) == (root / path).read_bytes()


@each_wheel
def test_one_for_all_pythons(wheel: pathlib.Path) -> None:
    archive = zipfile.ZipFile(wheel)
    tags = email.message_from_bytes(archive.read(f"{INFO}/WHEEL"))
    platforms = wheel.stem.split("-")[-1].split(".")
    assert set(tags.get_all("Tag", [])) == {f"cp310-abi3-{platform}" for platform in platforms}
    about = email.message_from_bytes(archive.read(f"{INFO}/METADATA"))
    assert (about["Version"], about["Requires-Python"]) == (__version__, ">=3.10")
    found = _says("abi3audit", "--strict", "--verbose", wheel)
    assert "0 ABI version mismatches and 0 ABI violations" in found


@each_of_linux
def test_auditwheel_accepts_it(wheel: pathlib.Path) -> None:
    """It needs nothing but the libc that its tag names, and that one not newer."""
    platform = wheel.stem.split("-")[-1].split(".")[-1]
    said = " ".join(_says("auditwheel", "show", wheel).split())
    assert f'consistent with the following platform tag: "{platform}"' in said


@each_of_linux
def test_it_is_hardened(wheel: pathlib.Path) -> None:
    """As what the C compiler of this host builds: tests/packaging/test_hardened.py. musl has no
    checked calls."""
    native = _native(wheel)
    assert native.machine == (183 if wheel.name.endswith("_aarch64.whl") else 62)
    assert native.is_bound_at_load()
    assert native.stack_holds_no_code()
    assert native.lies_anywhere()
    assert native.checks_stack_frames()
    # Not of zig's runtime library, which has those of memcpy and the like.
    assert ("__readlink_chk" in native.imported()) == ("manylinux" in wheel.name)


@each_of_linux
def test_libc_serves_it(wheel: pathlib.Path) -> None:
    """Not zig's runtime library, which has a memcpy() of its own, and a stack guard that is a
    constant (scripts/wheels.py)."""
    wanted = {"memcpy", "memset", "memcmp", "__stack_chk_fail"}
    if wheel.name.endswith("_aarch64.whl"):
        wanted.add("__stack_chk_guard")
    native = _native(wheel)
    assert wanted <= native.imported()
    assert not {RPATH, RUNPATH} & native.dynamic.keys()  # of the host that built it


def test_the_sdist_holds_what_builds_and_tests_it() -> None:
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/unity.c", "csrc/build.py", "csrc/hardening", "LICENSE", "CHANGELOG.md"} <= names
    assert {"Makefile", "scripts/wheels.py", "tests/wheels/worker.py", "docs/install.md"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", ".o"))]


def test_the_index_can_show_them() -> None:
    assert len(WHEELS) >= 1
    files = [*WHEELS, *DIST.glob("*.tar.gz")]
    assert _says("twine", "check", "--strict", *files).count("PASSED") == len(files)
