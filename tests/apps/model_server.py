"""A server that answers as the APIs of OpenAI and Anthropic do, on a port of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWERS: dict[str, dict[str, Any]] = {
    "/responses": {
        **{"id": "resp_1", "object": "response", "created_at": 1, "model": "gpt-5"},
        **{"status": "completed", "parallel_tool_calls": True, "tools": [], "tool_choice": "auto"},
        "output": [
            {
                **{"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"},
                "content": [{"type": "output_text", "text": "hello", "annotations": []}],
            }
        ],
    },
    "/messages": {
        **{"id": "msg_1", "type": "message", "role": "assistant", "model": "claude"},
        **{"stop_reason": "end_turn", "stop_sequence": None},
        "content": [{"type": "text", "text": "hello"}],
        "usage": {"input_tokens": 1, "output_tokens": 1},
    },
}


class ModelServer(ThreadingHTTPServer):
    """asked: how many requests. most: how many at once. refusal: the headers of a 429, which all
    requests then get."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.asked = self.now = self.most = 0
        self.refusal: dict[str, str] | None = None

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: ModelServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        with server.lock:
            server.asked += 1
            server.now += 1
            server.most = max(server.most, server.now)
        self.rfile.read(int(self.headers["Content-Length"]))
        found: dict[str, Any] = next(
            each for path, each in ANSWERS.items() if self.path.endswith(path)
        )
        status, headers = 200, dict[str, str]()
        if server.refusal is not None:
            status, headers = 429, server.refusal
            found = {"error": {"message": "slow down", "type": "rate_limit_error"}}
        body = json.dumps(found).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        with server.lock:
            server.now -= 1
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@contextmanager
def model_server() -> Iterator[ModelServer]:
    with ModelServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
