"""An example under several workers on a Unix socket, so that no port can be taken by others."""

from __future__ import annotations

import http.client
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

EXAMPLES = pathlib.Path(__file__).parents[2] / "examples"
WORKERS = 4
START = 60.0  # seconds; a machine that needs more is broken


class Connection(http.client.HTTPConnection):
    """To the server behind a socket's path."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=START)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def ask(path: str, what: str, **headers: str) -> tuple[int, str, http.client.HTTPMessage]:
    """Over a connection of its own: status, body, headers."""
    connection = Connection(path)
    try:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("GET", what, headers=named)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(), answer.headers
    finally:
        connection.close()


def gunicorn(app: str, *more: str) -> list[str]:
    workers = ["--workers", str(WORKERS), "--log-level", "error", "--bind", "unix:{}"]
    return ["gunicorn", app, *workers, *more]


def uvicorn(app: str, *more: str) -> list[str]:
    return ["uvicorn", app, "--workers", str(WORKERS), "--log-level", "error", "--uds", "{}", *more]


@contextmanager
def served(
    folder: str, command: Sequence[str], needs: Sequence[str], name: str, env: Mapping[str, str]
) -> Iterator[str]:
    """The example, ready: all its workers have answered ``/ready``. Yields the socket's path, which
    is made of ``name``. needs: modules, without which the test is skipped."""
    missing = [module for module in needs if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    path = f"/tmp/{name}.sock"
    server = subprocess.Popen(
        [sys.executable, "-m", *(each.format(path) for each in command)],
        cwd=EXAMPLES / folder,
        env=os.environ | env,
    )
    try:
        end, seen = time.monotonic() + START, set[str]()
        while len(seen) < WORKERS:
            assert server.poll() is None and time.monotonic() < end, "it did not start"
            try:
                with ThreadPoolExecutor(16) as pool:
                    found = list(pool.map(lambda _: ask(path, "/ready"), range(32)))
            except OSError:
                time.sleep(0.05)  # it does not listen yet: there is no event to wait for
                continue
            seen |= {body for status, body, _ in found if status == 200}
        yield path
    finally:
        server.terminate()
        server.wait(START)
        pathlib.Path(path).unlink(missing_ok=True)
