"""Run the tests of ``limits``' own repository that are about storages against ``shm://``.

They are not in its wheel. The sdist of the version that is installed is fetched from PyPI into
``build/limits`` (once), and its tests are run as they are, with ``shm://`` and ``async+shm://`` in
the place of all the storages that they name. Usage: python -m integrations.limits.upstream [pytest
options], with tests/ in PYTHONPATH.
"""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import subprocess
import sys

from support.sdists import ROOT, fetched

HERE = pathlib.Path(__file__).resolve().parent
# Not the rest: it tests how limits are written, and servers.
FILES = (
    "tests/test_storage.py",
    "tests/test_strategy.py",
    "tests/aio/test_storage.py",
    "tests/aio/test_strategy.py",
    "tests/integration/test_concurrency.py",
)


def main() -> int:
    source = fetched("limits", importlib.metadata.version("limits"), "limits")
    options = ["-p", "limits_plugin", "--noconftest", "--import-mode=prepend"]
    options += ["-c", str(HERE / "upstream.ini"), f"--rootdir={source}"]
    # They wait for real windows to pass, and some must be done within one: 2 s for a million hits.
    options += ["-n", "4", "--force-flaky", "--max-runs=5", "--no-flaky-report"]
    paths = [str(ROOT), str(HERE), str(source)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *sys.argv[1:], *FILES],
        cwd=source,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
