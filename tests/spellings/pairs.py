"""Servers that run the applications of apps.py, and what a client says to them, byte for byte."""

from __future__ import annotations

import collections
import itertools
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import ConnectionTerminated, ResponseReceived, StreamEnded, StreamReset
from h2.exceptions import ProtocolError
from support.names import remove
from support.servers import free_port
from support.waiting import PATIENCE, wait_until

HERE = pathlib.Path(__file__).parent
PLAIN = {"login": "/login", "users": "/users/7", "files": "/files/a/b"}

_UVICORN = "uvicorn apps:app --log-level critical --no-access-log --port {} --http "
_HYPERCORN = "hypercorn --log-level CRITICAL --bind 127.0.0.1:{} "
_GUNICORN = "gunicorn --log-level critical --bind 127.0.0.1:{} "
# Else it leaves X-Forwarded-For and Forwarded out.
_WAITRESS = "waitress --no-clear-untrusted-proxy-headers --listen 127.0.0.1:{} "
_GRANIAN = "granian --log-level critical --port {} --interface "
#: command, kind, and what the server is told that stands before each path.
SERVERS = {
    "gunicorn": (_GUNICORN + "apps:app", "wsgi", ""),
    "waitress": (_WAITRESS + "apps:app", "wsgi", ""),
    "granian-wsgi": (_GRANIAN + "wsgi apps:app", "wsgi", ""),
    "hypercorn-wsgi": (_HYPERCORN + "wsgi:apps:app", "wsgi", ""),
    "uvicorn-h11": (_UVICORN + "h11", "asgi", ""),
    "uvicorn-httptools": (_UVICORN + "httptools", "asgi", ""),
    "uvicorn-root": (_UVICORN + "h11 --root-path /api", "asgi", ""),  # it writes /api itself
    "hypercorn": (_HYPERCORN + "asgi:apps:app", "asgi", ""),
    "hypercorn-root": (_HYPERCORN + "--root-path /api asgi:apps:app", "asgi", "/api"),
    "granian": (_GRANIAN + "asgi apps:app", "asgi", ""),
    "hypercorn-http2": (_HYPERCORN + "asgi:apps:app", "asgi", ""),
    "granian-http2": (_GRANIAN + "asgi --http 2 apps:app", "asgi", ""),
    "gunicorn-asgi": (_GUNICORN + "-k asgi apps:app", "asgi", ""),
}
#: The applications of apps.py, and what stands before each path of theirs.
APPS = {
    "wsgi": dict.fromkeys(
        ("flask", "flask-lenient", "django", "bottle", "falcon", "falcon-lenient"), ""
    ),
    "asgi": {
        **dict.fromkeys(("quart", "django", "starlette", "fastapi", "fastapi-root"), ""),
        **dict.fromkeys(("litestar", "falcon", "falcon-lenient", "fastapi-within"), ""),
        "fastapi-dependency": "/t/a",
        "starlette-mounted": "/t/a",
    },
}


class Server:
    """One that answers."""

    def __init__(self, port: int, served: pathlib.Path, http2: bool = False) -> None:
        self._port, self._served, self._http2 = port, served, http2
        self._keys = itertools.count()

    def key(self) -> str:
        """That nobody has asked with."""
        return f"k{next(self._keys)}"

    def _say2(self, app: str, key: str, target: str, *headers: str, method: str = "GET") -> int:
        """The same over HTTP/2, with prior knowledge."""
        fields = [(":method", method), (":scheme", "http"), (":authority", "x"), (":path", target)]
        fields += [("x-app", app), ("x-key", key)]
        for name, _, value in (each.partition(": ") for each in headers):
            fields.append((name.lower(), value))
        talk = H2Connection(
            H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        )
        talk.initiate_connection()
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
        talk.send_headers(1, encoded, end_stream=True)
        status = 0
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as connection:
            connection.sendall(talk.data_to_send())
            try:
                while part := connection.recv(65_536):
                    for event in talk.receive_data(part):
                        if isinstance(event, ResponseReceived):
                            status = int(dict(event.headers)[b":status"])
                        if isinstance(event, (StreamEnded, StreamReset, ConnectionTerminated)):
                            return status
                    connection.sendall(talk.data_to_send())
            except (ConnectionError, ProtocolError):
                pass
        return status

    def say(self, app: str, key: str, target: str, *headers: str, method: str = "GET") -> int:
        """One request on a connection of its own; the status, 0: it closed without any."""
        if self._http2:
            return self._say2(app, key, target, *headers, method=method)
        lines = [f"{method} {target} HTTP/1.1", "Host: x", f"X-App: {app}", f"X-Key: {key}"]
        said = "\r\n".join([*lines, "Connection: close", *headers, "", ""]).encode("latin-1")
        with socket.create_connection(("127.0.0.1", self._port), PATIENCE) as connection:
            connection.sendall(said)
            answer = b""
            try:
                while part := connection.recv(65_536):
                    answer += part
            except ConnectionError:
                pass
        return int(answer.split(None, 2)[1]) if answer.startswith(b"HTTP/") else 0

    def served(self) -> Mapping[str, collections.Counter[str]]:
        """For each key, how often each handler has run."""
        found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for line in self._served.read_text().splitlines():
            handler, key = line.split(" ")
            found[key][handler] += 1
        return found


@contextmanager
def running(name: str, folder: pathlib.Path, segment: str) -> Iterator[Server]:
    command, kind, _ = SERVERS[name]
    port, served = free_port(), folder / f"{name}.served"
    served.touch()
    server = Server(port, served, http2=name.endswith("http2"))
    env = os.environ | {
        "KIND": kind,
        "SERVED": str(served),
        "FAST_LITELLM_SHM_NAME": segment,
        "FAST_LITELLM_SHM_CAPACITY": "100000",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", *command.format(port).split()],
        cwd=HERE,
        env=env,
        start_new_session=True,
    )

    def answers() -> bool:
        assert process.poll() is None, f"{name} ended: {process.poll()}"
        app = "falcon"
        try:
            return server.say(app, "start", "/ready") in (200, 404)
        except OSError:
            return False

    try:
        wait_until(f"{name} answers", answers, every=0.05)
        yield server
    finally:
        process.terminate()
        process.wait(PATIENCE)
        remove(segment)
