"""The search of the site: Pagefind's index, which knows how often a word stands where.

Sphinx's own index leaves out numbers (429), and takes `-9` for "without 9".
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from pagefind.index import IndexConfig, PagefindIndex
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

HEADING = re.compile(r'<section id="([^"]+)">((?:\s*<span id="[^"]*"></span>)*\s*<h[1-6])>')
ENTRY = re.compile(r'<dt class="sig[^"]*" id="([^"]+)">(.*?)</dt>', re.DOTALL)
BODY = re.compile(r'<article role="main"[^>]*>(.*)</article>', re.DOTALL)
TITLE = re.compile(r"<title>(.*?)</title>", re.DOTALL)


def _indexed(html: str, words: str, weight: float) -> str:
    """The page as the index reads it: headings have the anchors, and so have entries of the
    reference; `words` are what a reader may type for it."""
    body = BODY.search(html)
    title = TITLE.search(html)
    assert body and title
    text = HEADING.sub(r'<section>\2 id="\1">', body[1])
    text = ENTRY.sub(r'<h4 id="\1">\2</h4>', text)
    return (
        f'<html lang="en"><head><title>{title[1]}</title></head><body>'
        f'<div data-pagefind-body data-pagefind-weight="{weight}">{text}'
        f'<p data-pagefind-weight="8">{words}</p></div></body></html>'
    )


async def _write(app: Sphinx, out: Path) -> None:
    settings = IndexConfig(
        exclude_selectors=["a.headerlink", "div.toctree-wrapper"],
        output_path=str(out / "pagefind"),
        include_characters="_",
        force_language="en",
    )
    async with PagefindIndex(config=settings) as index:
        for name in sorted(app.env.found_docs):
            html = (out / f"{name}.html").read_text(encoding="utf-8")
            words = app.config.search_words.get(name, "")
            weight = 0.3 if name in app.config.search_last else 1.0
            await index.add_html_file(content=_indexed(html, words, weight), url=f"{name}.html")


def _build(app: Sphinx, error: Exception | None) -> None:
    if error is None and app.builder.name == "html":
        asyncio.run(_write(app, Path(app.outdir)))


def setup(app: Sphinx) -> ExtensionMetadata:
    app.add_config_value("search_words", {}, "", [dict])
    app.add_config_value("search_last", set(), "", [set])
    app.connect("build-finished", _build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
