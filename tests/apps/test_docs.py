"""The blocks of the docs that need an SDK or a framework: `py`, where others say `python`."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from apps.model_server import model_server
from support.waiting import PATIENCE

DOCS = pathlib.Path(__file__).parents[2] / "docs"
BLOCKS = [
    pytest.param(code, id=f"{page}-{number}")
    for page in ("clients.md", "httpx.md")
    for number, code in enumerate(
        re.findall(
            r"^```py\n(.*?)^```$", (DOCS / page).read_text("utf-8"), re.DOTALL | re.MULTILINE
        )
    )
]


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs(code: str, segment_name: str) -> None:
    with model_server() as server:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ
            | {"FAST_LITELLM_SHM_NAME": segment_name, "LANGSMITH_TRACING": "false"}
            | {"OPENAI_BASE_URL": server.origin, "OPENAI_API_KEY": "key"},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "import openai" in code:
        assert server.asked == 1
        assert re.search(r"^hello\nError code: 429 - openai: the rate of .* \d+$", done.stdout)


def test_all_are_here() -> None:
    assert len(BLOCKS) == 3
