"""Pages of the site whose text lies outside of docs/, and links that leave docs/.

docs/NAME.md says only where the text is, so that links to it work on a git host too.
"""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

DOCS = Path(__file__).parents[1]
ROOT = DOCS.parent
ELSEWHERE = {
    "changelog": ROOT / "CHANGELOG.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "design": ROOT / "csrc" / "DESIGN.md",
    "examples": ROOT / "examples" / "README.md",
    "security": ROOT / "SECURITY.md",
}
PAGES = {path: name for name, path in ELSEWHERE.items()} | {ROOT / "README.md": "index"}
LINK = re.compile(r"(?<=\]\()([^)\s:#]+)(?=[)#])")  # no scheme: a path
FENCED = re.compile(r"^(```.*?^```$)", re.DOTALL | re.MULTILINE)


def _read(app: Sphinx, name: str, source: list[str]) -> None:
    file = ELSEWHERE.get(name, DOCS / f"{name}.md")
    if not file.exists():  # .rst
        return
    app.env.note_dependency(file)

    def moved(link: re.Match[str]) -> str:
        target = (file.parent / link[1]).resolve()
        if target in PAGES:
            return f"/{PAGES[target]}.md"
        if target.is_relative_to(DOCS):
            return f"/{target.relative_to(DOCS)}"
        if not target.exists():
            return link[1]  # Sphinx says so
        if target.is_dir():
            return (
                "/examples.md" if target.is_relative_to(ROOT / "examples") else "/contributing.md"
            )
        return f"path:/../{target.relative_to(ROOT)}"  # a download

    parts = FENCED.split(file.read_text(encoding="utf-8"))
    parts[::2] = [LINK.sub(moved, part) for part in parts[::2]]
    source[0] = "".join(parts)


def setup(app: Sphinx) -> ExtensionMetadata:
    app.connect("source-read", _read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
