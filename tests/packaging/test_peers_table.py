"""The table of make test-peers: what is not as it says fails the run."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
TESTS = """
import pytest

def test_fails(): raise ValueError

def test_passes(): pass

@pytest.mark.parametrize("uri", ["shm://", "memcached://"])
def test_uri(uri): assert uri == "shm://"

tries = []

def test_at_a_moment():
    tries.append(1)
    assert len(tries) > 1
"""
FAILS, PASSES = "tests/test_theirs.py::test_fails", "tests/test_theirs.py::test_passes"
GONE, AT_A_MOMENT = "tests/test_theirs.py::test_gone", "tests/test_theirs.py::test_at_a_moment"


@pytest.mark.parametrize(
    ("fails", "left_out", "status", "said"),
    [
        ([FAILS], ["memcached://"], 0, "3 passed, 1 deselected, 1 xfailed, 1 rerun"),
        ([], ["memcached://"], 1, f"FAILED {FAILS}"),
        ([FAILS, PASSES], ["memcached://"], 1, f"FAILED {PASSES} - [XPASS(strict)] because"),
        ([FAILS, GONE], ["memcached://"], 4, f"does not test: ['{GONE}']"),
        ([FAILS], ["memcached://", "mongodb://"], 4, "does not test: ['mongodb://']"),
        ([FAILS], [], 1, "FAILED tests/test_theirs.py::test_uri[memcached://]"),
    ],
)
def test_what_is_not_as_the_table_says_fails(
    tmp_path: pathlib.Path, fails: list[str], left_out: list[str], status: int, said: str
) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_theirs.py").write_text(TESTS)
    (tmp_path / "conftest.py").write_text(
        "from peers import by_design\n"
        f"by_design.FAILS['x'] = dict.fromkeys({fails!r}, 'because')\n"
        f"by_design.LEFT_OUT['x'] = dict.fromkeys({left_out!r}, 'because')\n"
        f"by_design.AT_A_MOMENT['x'] = {{{AT_A_MOMENT!r}: 'because'}}\n"
    )
    ini = ["-c", str(ROOT / "tests/peers/peers.ini"), f"--rootdir={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *ini, f"--confcutdir={tmp_path}", "-p", "peers.table"],
        cwd=tmp_path,
        env={**os.environ, "PEER": "x", "PYTHONPATH": str(ROOT / "tests"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == status, done.stdout
    assert said in done.stdout + done.stderr
