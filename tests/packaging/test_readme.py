"""Every Python block of the README and of docs/ runs, as it stands, in a process of its own."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import sys

import pytest
from _pytest.mark import ParameterSet
from support.children import PATIENCE

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks() -> list[ParameterSet]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[: match.start()].count("\n") + 2
            # The blank lines make the numbers in a traceback those of the page.
            code = "\n" * (line - 1) + match[1]
            found.append(pytest.param(page, code, id=f"{page.name}-{line}"))
    return found


@pytest.mark.parametrize(("page", "code"), blocks())
def test_block_runs(page: pathlib.Path, code: str, segment_name: str) -> None:
    done = subprocess.run(
        # The name that a page gives a segment, for one that is removed at the end.
        [sys.executable, "-W", "error", "-c", code.replace("my-app", segment_name)],
        env={
            **os.environ,
            "FAST_LITELLM_SHM_NAME": segment_name,
            # No block waits for a network.
            **{"FAST_LITELLM_TOKENIZER_DOWNLOAD": "false", "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, f"{page}: {done.stderr}"


def test_each_variable_is_told_of() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    sources = (
        path.read_text(encoding="utf-8") for path in (ROOT / "fast_litellm_shm").rglob("*.py")
    )
    used = {name for source in sources for name in re.findall(r"FAST_LITELLM_[A-Z_]*[A-Z]", source)}
    assert len(used) > 10
    assert sorted(name for name in used if name not in pages) == []


def test_readme_has_blocks() -> None:
    """The pattern above finds what a reader sees."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(BLOCK.findall(readme)) == readme.count("```python") >= 4
