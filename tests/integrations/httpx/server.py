"""An upstream: a real server on a port of its own, which the test tells what to answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class UpstreamServer(ThreadingHTTPServer):
    """``/hold`` sends half of its body, and the rest when ``let_go`` is set; any other path answers
    ``answer``: status and headers; ``/first`` does so to the first request, when ``let_go`` is set,
    and says 200 to all others. ``arrivals``: of each request when it came; ``answered``: when the
    first was; ``most``: how many there were at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: tuple[int, dict[str, str]] = (200, {})
        self.let_go = threading.Event()
        self.arrivals: list[float] = []
        self.answered = 0.0
        self.now = self.most = 0
        self.lock = threading.Lock()

    @property
    def asked(self) -> int:
        """How many requests."""
        return len(self.arrivals)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: UpstreamServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.arrivals.append(time.monotonic())
            first = server.asked == 1
            server.now += 1
            server.most = max(server.most, server.now)
        status, headers = server.answer
        if self.path == "/hold" or (self.path == "/first" and not first):
            status, headers = 200, {}
        elif self.path == "/first":
            server.let_go.wait(60)
            server.answered = time.monotonic()
        self.send_response_only(status)  # no Date, unless the test gives one
        for name, value in {"Content-Length": "10", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(b"12345")
        if self.path == "/hold":
            self.wfile.flush()
            server.let_go.wait(60)
        with server.lock:
            server.now -= 1
        try:
            self.wfile.write(b"67890")
        except OSError:  # the client has gone
            self.close_connection = True

    def log_message(self, *_: object) -> None: ...


@contextmanager
def upstream_server() -> Iterator[UpstreamServer]:
    with UpstreamServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.let_go.set()
            server.shutdown()
            thread.join()
