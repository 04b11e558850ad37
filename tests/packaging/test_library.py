"""libfast_shm.so, as `make lib` builds it, shares limits with the package."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from fast_litellm_shm import RateLimiter, Segment, Window
from fast_litellm_shm._shared.native import lib as native

HERE = pathlib.Path(__file__).parent
LIMIT = 20_000


@pytest.fixture
def library(lib_folder: pathlib.Path) -> pathlib.Path:
    return lib_folder / "libfast_shm.so"


def test_ctypes_shares_a_limit(library: pathlib.Path, segment: Segment) -> None:
    """Two languages, one limit: each attempts the whole of it at the same time."""
    limiter = RateLimiter(Window(LIMIT, per=3600), name="both", segment=segment)
    with subprocess.Popen(
        # -I: no PYTHONPATH and no current folder
        [sys.executable, "-I", str(HERE / "share_limit.py"), str(library)]
        + [segment.name, "both", str(LIMIT), str(3600 * 10**9), str(LIMIT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout is not None and other.stdin is not None
        assert other.stdout.readline() == "ready\n"
        other.stdin.write("go\n")
        other.stdin.flush()
        ours = sum(limiter.is_allowed("user-1") for _ in range(LIMIT))
        theirs = int(other.stdout.readline())
        assert other.wait(timeout=60) == 0
    assert ours + theirs == LIMIT
    assert not limiter.is_allowed("user-1")


def test_exports_are_the_header(library: pathlib.Path) -> None:
    """The calls of fast_shm.h, all of them, and nothing besides."""
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True
    ).stdout
    exported = {line.split()[-1] for line in listed.splitlines()}
    declared = {name for name in dir(native) if name.startswith("fshm_")}
    assert exported == declared
