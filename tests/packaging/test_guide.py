"""fast-litellm's performance guide runs on this package, line by line, with one change: the import
that docs/performance.md tells of.

performance_guide.md is that guide as it was handed to us. Names that it leaves to its reader are
given here; nothing else is added, but for the calls of what a block only defines.
"""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest

import fast_litellm_shm
from fast_litellm_shm._shared import features

ROOT = pathlib.Path(__file__).parents[2]
GUIDE = (pathlib.Path(__file__).parent / "performance_guide.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [(language, code) for language, code in BLOCK.findall(GUIDE)]
PYTHON = [code for language, code in BLOCKS if language == "python"]
SHELL = [code for language, code in BLOCKS if language == "bash"]

ELLIPSIS = '"text3", ...]'  # "and so on": an object that is no text
GIVEN = """
import sys
import fast_litellm_shm
sys.modules["fast_litellm"] = fast_litellm_shm  # import fast_litellm_shm as fast_litellm
unique_user_ids = user_ids = [f"user-{i}" for i in range(2000)]
"""
CALLS = "\nif 'main' in globals():\n    asyncio.run(main())\n"


def _run(*command: str, name: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        command,
        env={
            **os.environ,
            "FAST_LITELLM_SHM_NAME": name,
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_all_blocks_are_here() -> None:
    assert (len(PYTHON), len(SHELL)) == (10, 2)
    assert GUIDE.count("```") == 2 * len(BLOCKS) == 24


@pytest.mark.parametrize("number", range(10))
def test_python(number: int, segment_name: str) -> None:
    code = PYTHON[number].replace(ELLIPSIS, '"text3"]')
    done = _run(sys.executable, "-W", "error", "-c", GIVEN + code + CALLS, name=segment_name)
    assert done.returncode == 0, done.stderr


def test_flags_are_those_of_this_package(segment_name: str) -> None:
    (flags,) = (code for code in SHELL if "export" in code)
    names = sorted(re.findall(r"^export FAST_LITELLM_(\w+)=false$", flags, re.MULTILINE))
    assert [name.lower() for name in names] == ["rust_routing", "rust_token_counting"]
    assert {name.lower() for name in names} <= set(features.FEATURES)
    ask = "import fast_litellm_shm as f; print(*filter(f.is_enabled, f.get_feature_status()))"
    done = _run("bash", "-euc", f'{flags}\npython -c "{ask}"', name=segment_name)
    assert done.stdout.split() == [
        "rust_rate_limiting",
        "rust_connection_pool",
        "batch_token_counting",
    ], done.stderr


def test_the_benchmark_script(segment_name: str) -> None:
    """All it does takes minutes: here, the one question that is the shortest."""
    (line,) = (code for code in SHELL if "export" not in code)
    done = _run("bash", "-euc", f"{line.strip()} --quick --only record --json", name=segment_name)
    assert done.returncode == 0, done.stderr
    assert '"failed": null' in done.stdout


def test_names_in_the_prose() -> None:
    called = set(re.findall(r"`(\w+)\(\)`", GUIDE))
    assert len(called) == 4
    assert {name for name in called if not hasattr(fast_litellm_shm, name)} == set()
