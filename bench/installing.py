"""``python -m bench.installing``: installs the package, editable, and the peers that its extra
``bench`` pins.

The peers all at once where that goes; else one after the other, so that one that does not install
holds up none of the others. It is named here, and again as missing in the report. The package is
built meanwhile. Nothing is compiled to bytecode in advance: most of it is never imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def requirements() -> list[str]:
    """What the extra asks for, without its marker."""
    listed = importlib.metadata.requires("fast-litellm-shm") or []
    return [each.split(";")[0].strip() for each in listed if re.search(r"extra == .bench.", each)]


def names() -> list[str]:
    """The names of those packages."""
    return [re.split(r"[\[=<>~! ]", each)[0] for each in requirements()]


def _project() -> Any:
    """What pyproject.toml says of it, which is not installed yet."""
    try:
        toml = importlib.import_module("tomllib")
    except ImportError:  # Python 3.10, where pip has one of its own
        toml = importlib.import_module("pip._vendor.tomli")
    return toml.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def _pip(*wanted: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # as a variable it also holds for the environment that pip builds the package in
    return subprocess.Popen([*command, *wanted], env={**os.environ, "PIP_COMPILE": "0"})


def _installed(*wanted: str) -> bool:
    return _pip(*wanted).wait() == 0


def main() -> int:
    """Install; a peer that cannot be had is no failure."""
    project = _project()
    needed, peers = project["dependencies"], project["optional-dependencies"]["bench"]
    ours = _pip("--no-deps", "--editable", str(ROOT))  # shares no file with the others
    if not _installed(*needed, *peers):
        print("they do not install all at once: one after the other", flush=True)
        if not _installed(*needed):
            return ours.wait() or 1
        for each in peers:
            if not _installed(each):
                print(f"MISSING: {each} does not install; the others are measured without it")
    return ours.wait()


if __name__ == "__main__":
    sys.exit(main())
