"""One version: `__version__` of fast_litellm_shm/__init__.py. All else reads it."""

from __future__ import annotations

import pathlib
import re
from importlib import metadata

import pytest

from fast_litellm_shm import __version__, cli, fast_litellm

ROOT = pathlib.Path(__file__).parents[2]


def test_what_is_installed() -> None:
    """As pip knows it, so as pyproject.toml makes it: make installs anew when that changes."""
    assert metadata.version("fast-litellm-shm") == __version__
    assert fast_litellm.__version__ == __version__


def test_it_stands_in_one_place() -> None:
    about = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in about
    assert not re.search(r'^version = "', about, re.MULTILINE)


def test_the_command_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"fast-shm {__version__} (segment layout ")


def test_the_changelog_does_not_stay_behind() -> None:
    """Its newest release is this version, or this version is still to be released."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *releases = re.findall(r"^## \[([^\]]+)\]", text, re.MULTILINE)
    assert first in ("Unreleased", __version__)
    numbered = [name for name in (first, *releases) if name != "Unreleased"]
    assert numbered[:1] in ([], [__version__])
