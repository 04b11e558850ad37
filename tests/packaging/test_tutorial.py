"""docs/tutorial.md, step by step, as a reader does it: its files, its commands, a real gunicorn."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
from support.waiting import PATIENCE, wait_until

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(r"^```py(?:thon)?\n# (\S+\.py)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
)
OUTPUTS = dict(
    re.findall(r"^```console\n\$ python (\S+)\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
)


class Reader:
    """In a folder with the files of the page."""

    def __init__(self, folder: pathlib.Path, segment: str) -> None:
        self.folder = folder
        for name, text in FILES.items():
            (folder / name).write_text(text, encoding="utf-8")
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        programs = [str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]
        self.environment = os.environ | {
            "FAST_LITELLM_SHM_NAME": segment,
            "PYTHONPATH": os.pathsep.join(paths),
            "PATH": os.pathsep.join(programs),
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, *command: str) -> str:
        with self.start(*command) as started:
            printed, errors = started.communicate(timeout=PATIENCE)
        assert started.returncode == 0, errors
        return printed


@pytest.fixture
def reader(tmp_path: pathlib.Path, segment_name: str) -> Reader:
    return Reader(tmp_path, segment_name)


def test_the_files_are_here() -> None:
    assert set(FILES) == {"first.py", "four.py", "app.py", "ask.py"}
    assert set(OUTPUTS) == {"first.py", "ask.py"}
    assert PAGE.count("```py") == len(FILES)


def test_a_first_limiter(reader: Reader) -> None:
    assert reader.run("python", "first.py") == OUTPUTS["first.py"]
    again = reader.run("python", "first.py").splitlines()
    assert len(again) == 5 and all("denied" in line for line in again)


def test_several_processes(reader: Reader) -> None:
    assert re.fullmatch(r"\[(\d+, ){3}\d+\] together: 100\n", reader.run("python", "four.py"))


@pytest.fixture
def gunicorn(reader: Reader) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """By the page's own line, but for the port; and the address that it serves."""
    (line,) = re.findall(r"^gunicorn .*$", PAGE, re.MULTILINE)
    with reader.start(
        "python", "-m", *line.replace("127.0.0.1:8000", "127.0.0.1:0").split()
    ) as one:
        assert one.stderr is not None
        seen = ""
        while "Listening at" not in seen:
            assert (seen := one.stderr.readline()), "gunicorn has ended"
        found = re.search(r"http://\S+", seen)
        assert found
        wait_until("four workers", lambda: len(psutil.Process(one.pid).children()) == 4)
        yield one, f"{found[0]}/"
        one.send_signal(signal.SIGTERM)
        one.communicate(timeout=PATIENCE)


def test_four_workers(reader: Reader, gunicorn: tuple[subprocess.Popen[str], str]) -> None:
    master, address = gunicorn
    assert reader.run("python", "ask.py", address) == OUTPUTS["ask.py"]
    psutil.Process(master.pid).children()[0].kill()
    assert reader.run("python", "ask.py", address) == "{429: 400}\n"

    shown = reader.run("python", "-m", "fast_litellm_shm.cli", "inspect")
    assert "tutorial-app" in shown and "127.0.0.1" in shown
    (reset,) = re.findall(r"^\$ fast-shm (reset .*)$", PAGE, re.MULTILINE)
    reader.run("python", "-m", "fast_litellm_shm.cli", *reset.split())
    assert reader.run("python", "ask.py", address) == OUTPUTS["ask.py"]
