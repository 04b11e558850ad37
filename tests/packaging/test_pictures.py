"""docs/pictures/ has what scripts/pictures.py draws, to the byte."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from xml.etree import ElementTree

ROOT = pathlib.Path(__file__).parents[2]
KEPT = ROOT / "docs" / "pictures"


def test_they_are_what_the_script_draws(tmp_path: pathlib.Path) -> None:
    script = ROOT / "scripts" / "pictures.py"
    subprocess.run(
        [sys.executable, script, tmp_path], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text("utf-8") for path in KEPT.iterdir()}
    assert drawn.keys() == kept.keys() and len(kept) == 6
    changed = [name for name in drawn if drawn[name] != kept[name]]
    assert changed == [], "draw them anew: python scripts/pictures.py"


def test_they_are_whole() -> None:
    for path in KEPT.iterdir():
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
