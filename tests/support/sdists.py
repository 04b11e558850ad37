"""The sources of packages on PyPI, whose wheels leave their tests out."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tarfile

ROOT = pathlib.Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def fetched(
    name: str, version: str, into: str, backend: pathlib.Path | None = None
) -> pathlib.Path:
    """The folder of the sdist's sources, below ``build/INTO``; fetched once. pip asks an sdist for
    its metadata, by what builds it; backend: a folder with another module of that name."""
    folder = ROOT / "build" / into
    stem = f"{name.replace('-', '_')}-{version}"
    found = folder / stem
    if not found.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        options = ["--no-deps", "--no-binary", name, "--dest", str(folder)]
        env = dict(os.environ)
        if backend is not None:
            options.append("--no-build-isolation")
            env["PYTHONPATH"] = str(backend)
        subprocess.run([*PIP, "download", *options, f"{name}=={version}"], env=env, check=True)
        with tarfile.open(folder / f"{stem}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return found


def installed_apart(name: str, version: str, into: str) -> pathlib.Path:
    """A folder for sys.path with the package alone, below ``build/INTO``; installed once."""
    found = ROOT / "build" / into / f"{name}-{version}-installed"
    if not found.is_dir():
        partial = found.with_suffix(".partial")
        options = ["--no-deps", "--only-binary", name, "--upgrade", "--target", str(partial)]
        subprocess.run([*PIP, "install", *options, f"{name}=={version}"], check=True)
        partial.rename(found)
    return found
