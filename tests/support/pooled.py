"""A real HTTP server that counts its open connections, and workers that pool theirs to it."""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import httpx

from fast_litellm_shm import Segment, SimpleConnectionPool
from support.workers import meet


class CountingServer:
    """Counts a connection from its accept until its client says goodbye (``/bye``, answered after
    the count went down) or just goes."""

    def __init__(self) -> None:
        self.open = self.most = self.total = 0
        self._lock = threading.Lock()
        counting = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections stay open
            counted = False

            def setup(self) -> None:
                super().setup()
                self.counted = True
                counting._count(1)

            def uncount(self) -> None:
                if self.counted:
                    self.counted = False
                    counting._count(-1)

            def finish(self) -> None:
                self.uncount()
                super().finish()

            def do_GET(self) -> None:
                if self.path == "/bye":
                    self.uncount()
                    self.close_connection = True
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"ok")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def _count(self, change: int) -> None:
        with self._lock:
            self.open += change
            self.total += change > 0
            self.most = max(self.most, self.open)

    def __enter__(self) -> CountingServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def connect(url: str) -> httpx.Client:
    """A client that is connected, by one connection."""
    limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
    client = httpx.Client(base_url=url, limits=limits, timeout=60, trust_env=False)
    client.get("/").raise_for_status()
    return client


def close(client: httpx.Client) -> None:
    """Slowly: a place that were given back before this would let another worker in too early."""
    time.sleep(0.02)
    client.get("/bye").raise_for_status()
    client.close()


def ask(name: str, url: str, most: int, turns: int, parties: int) -> int:
    """Use pooled connections; close one now and then, so that they move between the workers."""
    meet(name, parties)
    pool = SimpleConnectionPool("http", max_per_endpoint=most, segment=Segment(name))
    pool.bind(connect, close, lambda client: not client.is_closed)
    answered, deadline = 0, time.monotonic() + 90
    while answered < turns and time.monotonic() < deadline:
        with pool.connection(url, timeout=60) as client:
            answered += client.get("/").text == "ok"
        if answered % 3 == 0:
            pool.close()
    pool.close()
    return answered
