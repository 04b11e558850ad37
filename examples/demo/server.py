"""A real gunicorn for the length of a ``with`` block."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException

HERE = pathlib.Path(__file__).parent
WORKERS = 4
START_SECONDS = 30


class ServerError(Exception):
    """gunicorn did not come up, or an answer went missing."""


def ask(port: int, path: str) -> tuple[int, bool]:
    """One request over a connection of its own: the worker's pid, and whether it was admitted."""
    connection = HTTPConnection("127.0.0.1", port, timeout=START_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        body = answer.read()
    except (OSError, HTTPException) as problem:
        raise ServerError(f"no answer from gunicorn: {problem!r}") from problem
    finally:
        connection.close()
    if answer.status not in (200, 429):
        raise ServerError(f"gunicorn answered {answer.status} {answer.reason}")
    return int(body), answer.status == 200


@contextlib.contextmanager
def gunicorn(application: str, limit: int, segment: str) -> Iterator[int]:
    """Run ``application`` with 4 workers; yields the port when each of them has answered.

    The socket is bound here and handed down, so that no other program can take the port between.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        server = None
        try:
            with _signals_held_back():
                server = subprocess.Popen(
                    [sys.executable, "-m", "gunicorn", "-b", f"fd://{listener.fileno()}"]
                    + [application],
                    cwd=HERE,
                    env={**os.environ, "DEMO_LIMIT": str(limit), "FAST_LITELLM_SHM_NAME": segment},
                    pass_fds=[listener.fileno()],
                    start_new_session=True,  # Ctrl-C reaches us alone, and we stop it
                )
            port = listener.getsockname()[1]
            _wait_until_ready(server, port)
            yield port
        finally:
            if server is not None:
                _stop(server)


@contextlib.contextmanager
def _signals_held_back() -> Iterator[None]:
    """Ctrl-C between the start of the server and the note that it runs would leave it running."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: caught.append(got))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        signal.raise_signal(caught[0])


def _wait_until_ready(server: subprocess.Popen[bytes], port: int) -> None:
    deadline, seen = time.monotonic() + START_SECONDS, set[int]()
    with ThreadPoolExecutor(WORKERS * 2) as pool:
        while len(seen) < WORKERS:
            if server.poll() is not None:
                raise ServerError(f"gunicorn ended with status {server.returncode}; see above")
            if time.monotonic() > deadline:
                raise ServerError(f"{len(seen)} of {WORKERS} workers up after {START_SECONDS} s")
            seen.update(
                pid for pid, _ in pool.map(lambda _: ask(port, "/ready"), range(WORKERS * 2))
            )


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.terminate()
    try:
        server.wait(timeout=10)
    except BaseException:  # also a second Ctrl-C: nothing is left running
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        raise
