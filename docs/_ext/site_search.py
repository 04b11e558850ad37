"""The search of the site: Pagefind's index, which knows how often a word stands where.

Sphinx's own index leaves out numbers (429), and takes `-9` for "without 9".
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

HEADING = re.compile(r'<section id="([^"]+)">((?:\s*<span id="[^"]*"></span>)*\s*<h[1-6])>')
ENTRY = re.compile(r'<dt class="sig[^"]*" id="([^"]+)">(.*?)</dt>', re.DOTALL)
BODY = re.compile(r'<article role="main"[^>]*>(.*)</article>', re.DOTALL)
TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)


def _entry(found: re.Match[str]) -> str:
    name = found[1].removeprefix("fast_litellm_shm.")
    return f'<h4 id="{found[1]}">{name}</h4><p>{found[2]}</p>'


def _indexed(html: str, words: str, weight: float) -> str:
    """The page as the index reads it: headings have the anchors, and so have entries of the
    reference; `words` are what a reader may type for it."""
    body = BODY.search(html)
    title = TITLE.search(html)
    assert body and title
    text = HEADING.sub(r'<section>\2 id="\1">', body[1])
    text = ENTRY.sub(_entry, text)
    return (
        f'<html lang="en"><head><title>{title[1]}</title></head><body>'
        f'<div data-pagefind-body data-pagefind-weight="{weight}">{text}'
        f'<p data-pagefind-weight="8">{words}</p></div></body></html>'
    )


def _write(app: Sphinx, out: Path) -> None:
    """By Pagefind's program: its Python API may end before all is on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        for name in app.env.found_docs:
            html = (out / f"{name}.html").read_text(encoding="utf-8")
            words = app.config.search_words.get(name, "")
            weight = 0.3 if name in app.config.search_last else 1.0
            page = Path(folder, f"{name}.html")
            page.parent.mkdir(exist_ok=True)
            page.write_text(_indexed(html, words, weight), encoding="utf-8")
        subprocess.run(
            [
                *(sys.executable, "-m", "pagefind", "--site", folder),
                *("--output-path", out / "pagefind", "--exclude-selectors", "a.headerlink"),
                *(
                    "--include-characters",
                    "_",
                    "--force-language",
                    "en",
                    "--keep-index-url",
                    "--quiet",
                ),
            ],
            check=True,
        )


def _build(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        _write(app, Path(app.outdir))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_config_value("search_words", {}, "", [dict])
    app.add_config_value("search_last", set(), "", [set])
    app.connect("build-finished", _build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
