"""An example under several workers on a Unix socket, so that no port can be taken by others."""

from __future__ import annotations

import http.client
import importlib.util
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import pytest

from support.waiting import wait_until

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


class Stream:
    """The ``/stream`` of an example, being read; ``pid``: of the worker that sends it."""

    def __init__(self, path: str) -> None:
        self._connection = Connection(path)
        self._connection.request("GET", "/stream")
        self._answer: http.client.HTTPResponse = self._connection.getresponse()
        self.status = self._answer.status
        self.pid = int(self._answer.readline()) if self.status == 200 else 0

    def close(self) -> None:
        """Go away, in mid-body."""
        self._answer.close()
        self._connection.close()


def opened(path: str) -> Stream:
    """A stream, as soon as there is room for one: when a permit has come back."""

    def tried() -> Stream | None:
        stream = Stream(path)
        if stream.status == 200:
            return stream
        stream.close()
        return None

    found = wait_until("a permit comes back", tried, every=0.01)
    assert found is not None
    return found


def ask_of_several(
    path: str, what: str, count: int, first: int, **headers: str
) -> list[tuple[int, str, http.client.HTTPMessage]]:
    """So many requests, 16 at once, of which at least two workers take some. Each answers with its
    pid. Where one takes all of the ``first`` ones, as one may, it is stopped during the others."""
    with ThreadPoolExecutor(16) as pool:

        def send(number: int) -> list[tuple[int, str, http.client.HTTPMessage]]:
            return list(pool.map(lambda _: ask(path, what, **headers), range(number)))

        answers = send(first)
        pids = {int(body) for _, body, _ in answers}
        alone = pids if len(pids) == 1 else set()
        for pid in alone:
            os.kill(pid, signal.SIGSTOP)
        try:
            answers += send(count - first)
        finally:
            for pid in alone:
                with suppress(ProcessLookupError):  # uvicorn replaces who is silent for 5 s
                    os.kill(pid, signal.SIGCONT)
    return answers


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
        seen = set[str]()

        def all_have_answered() -> bool:
            assert server.poll() is None, f"{command[0]} ended: {server.poll()}"
            with suppress(OSError), ThreadPoolExecutor(16) as pool:  # it may not listen yet
                found = list(pool.map(lambda _: ask(path, "/ready"), range(32)))
                seen.update(body for status, body, _ in found if status == 200)
            return len(seen) == WORKERS

        wait_until(lambda: f"all {WORKERS} workers answer; {seen} do", all_have_answered)
        yield path
    finally:
        server.terminate()
        server.wait(START)
        pathlib.Path(path).unlink(missing_ok=True)
