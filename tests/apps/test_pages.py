"""The blocks of docs/celery.md and docs/coming-from.md that need Celery or RQ run, as they stand.
(Those that need no framework, or Django alone: tests/packaging/test_readme.py.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```py\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = [
    block
    for page in ("celery.md", "coming-from.md")
    for block in BLOCK.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
]


@pytest.mark.parametrize("number", range(3))
def test_block_runs(number: int, segment_name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[number]],
        env={
            **os.environ,
            "FAST_LITELLM_SHM_NAME": segment_name,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_all_blocks_are_here() -> None:
    assert len(BLOCKS) == 3
