"""What the docs name exists: linked files and headings, paths, tests, make targets, and options of
fast-shm."""

from __future__ import annotations

import functools
import json
import pathlib
import re
import shlex

import pytest

from fast_litellm_shm import cli

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
    ROOT / ".github" / "pull_request_template.md",
    ROOT / "csrc" / "DESIGN.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
FOLDERS = r"(?:tests|csrc|docs|bench|examples|scripts|fast_litellm_shm|\.github|\.ci)"
# Not behind another path or a URL. The name of a test may follow.
PATH = re.compile(rf"(?<![\w./-])({FOLDERS}/[\w./*-]*[\w*/])(?:::(\w+))?")
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`\n]+)`")
MAKE = re.compile(r"\bmake (?:-\S+ )*([a-z][a-z0-9_-]*)")

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES]
)


def _blocks(page: pathlib.Path, *languages: str) -> list[str]:
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [code for language, code in found if language in languages]


@functools.cache
def _anchors(page: pathlib.Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page: pathlib.Path) -> None:
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    wrong = []
    for link in LINK.findall(text):
        if re.match(r"\w+:", link):  # https:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            wrong.append(link)
    assert wrong == []


@each_page
def test_paths_exist(page: pathlib.Path) -> None:
    wrong = []
    for path, test in PATH.findall(page.read_text(encoding="utf-8")):
        found = list(ROOT.glob(path.rstrip("/")))
        if not found or (test and f"def {test}(" not in found[0].read_text(encoding="utf-8")):
            wrong.append(f"{path}::{test}" if test else path)
    assert wrong == []


def _targets() -> tuple[set[str], tuple[str, ...]]:
    """Names, and beginnings of names (`run-c-%`)."""
    files = [ROOT / "Makefile", *(ROOT / "tests").glob("*.mk")]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    names = re.findall(r"^([a-z][a-z0-9_%-]*)(?=[ :])[^=\n]*:(?!=)", text, re.MULTILINE)
    return set(names), tuple(name[:-1] for name in names if name.endswith("%"))


@each_page
def test_make_targets_exist(page: pathlib.Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = [*_blocks(page, "sh", ""), *SPAN.findall(BLOCK.sub("", text))]
    names, beginnings = _targets()
    asked = {name for each in code for name in MAKE.findall(each)}
    assert sorted(n for n in asked if n not in names and not n.startswith(beginnings)) == []


@each_page
def test_fast_shm_understands(page: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is run: one option more is unknown, and nothing else may be."""
    for line in "\n".join(_blocks(page, "sh", "console")).splitlines():
        command = re.match(r"(?:\$ )?fast-shm ([^|>#]*)", line)
        if command:
            verb, *rest = shlex.split(command[1])
            assert cli.main([verb, "--unknown", *rest]) == 2
            assert "unrecognized arguments: --unknown (" in capsys.readouterr().err, line


@each_page
def test_json_can_be_read(page: pathlib.Path) -> None:
    for block in _blocks(page, "json"):
        json.loads(block)


def test_they_are_found() -> None:
    """The patterns above find what a reader sees."""
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert len([1 for _, test in PATH.findall(text) if test]) > 20
    assert len(LINK.findall(text)) > 100
    assert len(MAKE.findall(text)) > 40
    assert {"check", "crash", "tsan", "test-cluster"} <= _targets()[0]
    assert "floods-of-keys" in _anchors(ROOT / "docs" / "limits.md")


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_pre_commit_has_the_versions_of_make_lint() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    lint = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pinned = [re.search(rf'"{name}==([\d.]+)"', lint) for name in ("ruff", "clang-format")]
    assert re.findall(r"rev: v(.*)", hooks) == [match and match[1] for match in pinned]
