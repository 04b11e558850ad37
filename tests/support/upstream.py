"""What LiteLLM's proxies pass requests on to: a server that answers as OpenAI does."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

from support.waiting import PATIENCE


class Upstream(BaseHTTPRequestHandler):
    """Answers as OpenAI does; with 500 where a text says so: once for each text, or always; after
    half a second, counting how many are there at once for each text; or, in the midst of a stream
    too, when its gate is opened."""

    protocol_version = "HTTP/1.1"
    seen: Counter[str] = Counter()
    at_once: Counter[str] = Counter()
    most: Counter[str] = Counter()
    gates: ClassVar[dict[str, threading.Event]] = {}
    lock = threading.Lock()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = body["messages"][-1]["content"]
        kind = text.partition(":")[0]
        with Upstream.lock:
            Upstream.seen[text] += 1
            Upstream.at_once[text] += 1
            Upstream.most[text] = max(Upstream.most[text], Upstream.at_once[text])
            fails = Upstream.seen[text] <= {"fail once": 1, "fail always": 10**6}.get(kind, 0)
        gate = Upstream.gates.get(text)
        if kind == "slow":
            time.sleep(0.5)
        if gate is not None and not body.get("stream"):
            gate.wait(PATIENCE)
        with Upstream.lock:  # before the answer: who reads it may ask again at once
            Upstream.at_once[text] -= 1
        if fails:
            self._answer(500, {"error": {"message": "not now", "type": "server_error"}})
            return
        if body.get("stream"):
            self._stream(cut=kind == "cut", gate=gate)
            return
        usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
        message = {"role": "assistant", "content": "hello"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        rest = {"id": "x", "object": "chat.completion", "created": 1, "model": "up"}
        self._answer(200, {**rest, "choices": [choice], "usage": usage})

    def _stream(self, cut: bool, gate: threading.Event | None) -> None:
        """Three chunks with a pause between them, the usage and the end; or two, and the connection
        is closed."""
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "up"}
        for index in range(3):
            if cut and index == 2:
                # without an end of its own, the answer is complete only for those who trust it
                self.wfile.write(b'data: {"id": "x", "obj')
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            choice = {"index": 0, "delta": {"content": "hello "}, "finish_reason": None}
            self._send({**chunk, "choices": [choice]})
            if gate is None:
                time.sleep(0.3)
            else:
                gate.wait(PATIENCE)
        self._send({**chunk, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
        self._send({**chunk, "choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, part: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(part).encode() + b"\n\n")
        self.wfile.flush()

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        raw = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[str]:
    """Its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
