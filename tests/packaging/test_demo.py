"""examples/demo, as `make demo` runs it: a real gunicorn, and nothing left of it."""

from __future__ import annotations

import glob
import pathlib
import signal
import subprocess
import sys

import psutil
import pytest

from fast_litellm_shm._shared.segment import path_of

DEMO = pathlib.Path(__file__).parents[2] / "examples" / "demo"
ONE_TOKEN_SHORT = """
import os, runpy
from fast_litellm_shm import RateLimiter, Segment, Window
segment = Segment(f"demo-{os.getpid()}")
RateLimiter(Window(100, per=3600), name="demo", segment=segment).acquire("user-1")
runpy.run_path("run.py", run_name="__main__")
"""


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=DEMO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_nothing_left(demo: subprocess.Popen[str]) -> None:
    name = f"demo-{demo.pid}"
    assert glob.glob(f"{path_of(name)}*") == []
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("FAST_LITELLM_SHM_NAME") == name:
                left.append(process)
        except psutil.Error:  # it ended meanwhile, or belongs to somebody else
            continue
    assert left == []


def test_it_ends_by_itself_and_admits_exactly_the_limit() -> None:
    with start("run.py") as demo:
        out, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, out
    assert "admitted 100, the limit is 100: exactly the limit" in out
    assert "$ fast-shm inspect --name demo-" in out
    assert_nothing_left(demo)


def test_another_total_than_the_limit_is_a_failure() -> None:
    """Somebody took one token before: the workers admit 99, and the exit status says so."""
    with start("-c", ONE_TOKEN_SHORT) as demo:
        out, _ = demo.communicate(timeout=120)
    assert demo.returncode == 1, out
    assert "admitted 99, the limit is 100: NOT the limit" in out
    assert_nothing_left(demo)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_server_and_removes_the_segment(
    number: signal.Signals, status: int
) -> None:
    with start("run.py") as demo:
        assert demo.stdout is not None
        assert "4 gunicorn workers" in demo.stdout.readline()  # it is about to start the server
        demo.send_signal(number)
        out, _ = demo.communicate(timeout=120)
    assert demo.returncode == status, out
    assert_nothing_left(demo)
