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

_USED = {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}
_USED_ANEW = {"input_tokens": 10, "output_tokens": 20, "total_tokens": 30}
_USED_IMAGE = {**_USED_ANEW, "input_tokens_details": {"image_tokens": 0, "text_tokens": 10}}
_TEXT = {"type": "output_text", "text": "hello", "annotations": []}
_FILE = {
    **{"id": "file-1", "object": "file", "bytes": 1, "created_at": 1, "filename": "f.jsonl"},
    **{"purpose": "batch", "status": "processed"},
}
_BATCH = {
    **{"id": "batch_1", "object": "batch", "endpoint": "/v1/chat/completions", "created_at": 1},
    **{"input_file_id": "file-1", "completion_window": "24h", "status": "validating"},
}
# By the end of a path.
ANSWERS: dict[str, dict[str, Any] | bytes] = {
    "/completions": {
        **{"id": "x", "object": "text_completion", "created": 1, "model": "up", "usage": _USED},
        "choices": [{"text": "hello", "index": 0, "finish_reason": "stop", "logprobs": None}],
    },
    "/embeddings": {
        **{"object": "list", "model": "up", "usage": {"prompt_tokens": 30, "total_tokens": 30}},
        "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.5]}],
    },
    "/responses": {
        **{"id": "resp_1", "object": "response", "created_at": 1, "model": "up"},
        **{"status": "completed", "usage": _USED_ANEW, "parallel_tool_calls": True, "tools": []},
        "output": [
            {
                **{"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"},
                "content": [_TEXT],
            }
        ],
    },
    "/images/generations": {"created": 1, "data": [{"b64_json": "aGk="}], "usage": _USED_IMAGE},
    "/images/edits": {"created": 1, "data": [{"b64_json": "aGk="}], "usage": _USED_IMAGE},
    "/audio/speech": b"sound",
    "/audio/transcriptions": {"text": "hello", "usage": {"type": "tokens", **_USED_ANEW}},
    "/moderations": {
        **{"id": "modr-1", "model": "up"},
        "results": [{"flagged": False, "categories": {}, "category_scores": {}}],
    },
    "/rerank": {
        **{"id": "r", "results": [{"index": 0, "relevance_score": 0.5}]},
        "usage": {"total_tokens": 30},
    },
    "/files": _FILE,
    "/content": b"".join(
        b'{"custom_id": "%d", "method": "POST", "url": "/v1/chat/completions", "body": '
        b'{"model": "up", "messages": [{"role": "user", "content": "hi"}]}}\n' % i
        for i in range(2)
    ),
    "/batches": _BATCH,
    "/ocr": {"pages": [{"index": 0, "markdown": "x"}], "model": "m", "object": "ocr"},
    "/vector_stores": {"id": "vs_1", "object": "vector_store", "created_at": 1, "name": "x"},
    "/search": {"object": "vector_store.search_results.page", "search_query": "x", "data": []},
    "/videos": {"id": "video_1", "object": "video", "status": "queued", "model": "sora-2"},
    "/client_secrets": {"value": "ek_1", "expires_at": 1, "session": {"id": "sess_1"}},
    "/jobs": {"id": "ftjob-1", "object": "fine_tuning.job", "status": "queued", "model": "up"},
    "/models": {"object": "list", "data": []},
    ":generateContent": {
        "candidates": [{"content": {"parts": [{"text": "hello"}], "role": "model"}, "index": 0}],
        "usageMetadata": {
            **{"promptTokenCount": 10, "candidatesTokenCount": 20, "totalTokenCount": 30},
        },
    },
    "/v1/messages": {
        **{"id": "msg_1", "type": "message", "role": "assistant", "model": "up"},
        "content": [{"type": "text", "text": "hello"}],
        **{"stop_reason": "end_turn", "usage": {"input_tokens": 10, "output_tokens": 20}},
    },
    "/input_tokens": {"object": "response.input_tokens", "input_tokens": 10},
}


class Upstream(BaseHTTPRequestHandler):
    """Answers as OpenAI does; with 500 where a text says so: once for each text, or always; after
    half a second, counting how many are there at once for each text; or, in the midst of a stream
    too, when its gate is opened. "long" answers have 100,000 tokens."""

    protocol_version = "HTTP/1.1"
    seen: Counter[str] = Counter()
    at_once: Counter[str] = Counter()
    most: Counter[str] = Counter()
    gates: ClassVar[dict[str, threading.Event]] = {}
    failing: ClassVar[set[str]] = set()  # models that answer 500
    lock = threading.Lock()

    def do_GET(self) -> None:
        self._answer_by_path()

    def _answer_by_path(self) -> None:
        """Of other endpoints than chats: what OpenAI, or a reranker, answers there."""
        path = self.path.partition("?")[0].rstrip("/")
        with Upstream.lock:
            Upstream.seen[path] += 1
        found = next((answer for end, answer in ANSWERS.items() if path.endswith(end)), None)
        if isinstance(found, bytes):
            self._answer_raw(200, "audio/mpeg", found)
        else:
            self._answer(200 if found else 404, found or {"error": {"message": f"no {path}"}})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        body = json.loads(raw) if raw[:1] == b"{" else {}
        if not isinstance(body.get("messages"), list):
            self._answer_by_path()
            return
        text = body["messages"][-1]["content"]
        kind = text.partition(":")[0]
        with Upstream.lock:
            Upstream.seen[text] += 1
            Upstream.at_once[text] += 1
            Upstream.most[text] = max(Upstream.most[text], Upstream.at_once[text])
            fails = str(body.get("model")) in Upstream.failing
            fails |= Upstream.seen[text] <= {"fail once": 1, "fail always": 10**6}.get(kind, 0)
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
        used = 100_000 if kind == "long" else 20
        usage = {"prompt_tokens": 10, "completion_tokens": used, "total_tokens": 10 + used}
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
        self._answer_raw(status, "application/json", json.dumps(body).encode())

    def _answer_raw(self, status: int, kind: str, raw: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
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
