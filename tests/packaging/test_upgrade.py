"""An upgrade to a release with another layout of the segment, on one host: two builds of the
extension, and workers of both at the same time. What docs/operations.md says of it."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.built_once import built_once
from support.children import PATIENCE

from fast_litellm_shm._shared.native import lib

ROOT = pathlib.Path(__file__).parents[2]
LAYOUT = lib.FSHM_LAYOUT_VERSION
NEXT = LAYOUT + 1

_WORKER = """
import sys
from fast_litellm_shm import *
from fast_litellm_shm import Budget, ConcurrencyLimiter, RateLimiter, TokenBucket

rates = RateLimiter(FixedWindow(50, per=86400), name="rates")
permits = ConcurrencyLimiter(3, name="permits")
kept = RateLimiter(FixedWindow(50, per=86400), name="kept", durable=True)
budget = Budget(10, per="month", name="budget")
held = []
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "permits":
        held += [p for _ in range(5) if (p := permits.acquire("k"))]
        print(len(held), flush=True)
    elif line.strip() == "spent":
        with budget.reserve("k", 4) as reservation:
            reservation.settle(4)
        print(budget.remaining("k"), flush=True)
    else:
        limiter = {"rates": rates, "kept": kept}[line.strip()]
        print(sum(limiter.is_allowed("k") for _ in range(60)), flush=True)
"""


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with this package, built with the next layout version."""
    return built_once(tmp_path_factory, "newer", _build_newer)


def _build_newer(folder: pathlib.Path) -> None:
    for name in ("csrc", "fast_litellm_shm"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__py*"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    header = folder / "csrc" / "fast_shm.h"
    text, count = re.subn(
        rf"(#define FSHM_LAYOUT_VERSION ){LAYOUT}\b", rf"\g<1>{NEXT}", header.read_text()
    )
    assert count == 1
    header.write_text(text)
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=folder,
        env={**os.environ, "FAST_SHM_CFLAGS": "-O1"},  # nothing here is about speed
        check=False,
        capture_output=True,
        text=True,
        timeout=10 * PATIENCE,
    )
    assert done.returncode == 0, done.stderr


class _Worker:
    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child, self.pid = child, child.pid

    def says(self, word: str) -> str:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(f"{word}\n")
        self._child.stdin.flush()
        return self._child.stdout.readline().strip()

    def ends(self) -> str:
        """Its log."""
        return self._child.communicate(timeout=PATIENCE)[1]


@pytest.fixture
def environment(segment_name: str, tmp_path: pathlib.Path) -> Iterator[dict[str, str]]:
    more = {"FAST_LITELLM_SHM_NAME": segment_name, "FAST_LITELLM_SHM_STATE": str(tmp_path)}
    yield {**os.environ, **more}
    with contextlib.suppress(FileNotFoundError):
        for path in pathlib.Path("/dev/shm").glob(f"fast_litellm_shm.{NEXT}.{segment_name}*"):
            path.unlink()


@contextlib.contextmanager
def _worker(folder: pathlib.Path, environment: dict[str, str]) -> Iterator[_Worker]:
    child = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        env={**environment, "PYTHONPATH": str(folder)},
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n", child.stderr and child.stderr.read()
            yield _Worker(child)
        finally:
            if child.returncode is None:
                child.kill()


def _fast_shm(
    folder: pathlib.Path, environment: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fast_litellm_shm.cli", *arguments],
        env={**environment, "PYTHONPATH": str(folder)},
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_what_counts_apart(
    newer: pathlib.Path, environment: dict[str, str], segment_name: str
) -> None:
    """Rates, permits and budgets in the segment: each release up to the whole limit. Durable
    limits: together."""
    with _worker(ROOT, environment) as old:
        assert [old.says(word) for word in ("rates", "permits", "spent")] == ["50", "3", "6"]
        first = int(old.says("kept"))
        with _worker(newer, environment) as new:
            assert [new.says(word) for word in ("rates", "permits", "spent")] == ["50", "3", "6"]
            assert first + int(new.says("kept")) + int(old.says("kept")) == 50
            assert old.says("rates") == "0"
            log = new.ends()
        assert (
            f"processes of another release of fast_litellm_shm use a segment '{segment_name}' of "
            f"their own (layout {LAYOUT}; here: {NEXT}), so the two count apart" in log
        )
        assert log.count("another release") == 1
        assert old.ends() == ""
    with _worker(newer, environment) as new:
        assert new.says("rates") == "0"  # the second worker of the new release
        assert new.says("kept") == "0"
        assert "another release" not in new.ends()


def test_what_an_operator_sees(
    newer: pathlib.Path, environment: dict[str, str], segment_name: str
) -> None:
    with _worker(ROOT, environment) as old, _worker(newer, environment) as new:
        old.says("rates")
        new.says("rates")
        for folder, own, other in ((ROOT, LAYOUT, NEXT), (newer, NEXT, LAYOUT)):
            shown = _fast_shm(folder, environment, "ls").stdout
            (line,) = (
                one
                for one in shown.splitlines()
                if f"layout-{other}" in one and segment_name in one
            )
            assert line.split()[0] == segment_name
            inspected = " ".join(_fast_shm(folder, environment, "inspect").stdout.split())
            assert f"(layout {other}; here: {own}), so the two count apart" in inspected
        assert f"layout {NEXT}" in _fast_shm(newer, environment, "--version").stdout
    for folder in (ROOT, newer):
        assert "count apart" not in _fast_shm(folder, environment, "inspect").stdout


def test_removing_what_the_old_release_left(
    newer: pathlib.Path, environment: dict[str, str], segment_name: str
) -> None:
    """It is kept while a worker of the old release lives."""
    say = "from fast_litellm_shm.cli import segments, unused; unused._YOUNG = 0.0\n" + (
        f"for each in segments.found():\n"
        f"    if each.name == {segment_name!r}:\n"
        f"        look = unused._look(each, {{}}, False)\n"
        f"        print(each.layout, look.kept)\n"
        f"        if look.kept is None: unused._remove(each)\n"
    )

    def looked() -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", say],
            env={**environment, "PYTHONPATH": str(newer)},
            cwd=newer,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        return sorted(done.stdout.splitlines())

    with _worker(newer, environment) as new:
        new.says("rates")
        with _worker(ROOT, environment) as old:
            old.says("rates")
            kept = f"{LAYOUT} in use: a process holds a lock on its lock file"
            assert looked() == [kept, f"{NEXT} in use by 1 process (pid {new.pid})"]
        assert looked() == [f"{LAYOUT} None", f"{NEXT} in use by 1 process (pid {new.pid})"]
        assert [line[:2] for line in looked()] == [f"{NEXT} "]
        assert new.says("rates") == "0"
