"""Each endpoint of LiteLLM's real proxy that calls a model: whose requests are limited, and which
tokens the answer reports. The table of docs/litellm.md says the same."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import pytest
from support.names import left_over, remove, unique_name
from support.proxy import Proxy, proxy
from support.upstream import Upstream, serving
from support.waiting import PATIENCE, TooSlow, wait_until

from fast_litellm_shm.metrics.health import memo_state

pytest.importorskip("litellm.proxy.proxy_server", reason="the proxy's packages are not installed")
websockets = pytest.importorskip("websockets", reason="the proxy's packages are not installed")

MODELS = """\
  - model_name: text
    litellm_params: {{model: text-completion-openai/x, api_key: sk-none, api_base: "{0}"}}
  - model_name: embedding
    litellm_params: {{model: openai/text-embedding-3-small, api_key: sk-none, api_base: "{0}"}}
  - model_name: image
    litellm_params: {{model: openai/gpt-image-1, api_key: sk-none, api_base: "{0}"}}
  - model_name: speech
    litellm_params: {{model: openai/tts-1, api_key: sk-none, api_base: "{0}"}}
  - model_name: hears
    litellm_params: {{model: openai/whisper-1, api_key: sk-none, api_base: "{0}"}}
  - model_name: moderates
    litellm_params: {{model: openai/omni-moderation-latest, api_key: sk-none, api_base: "{0}"}}
  - model_name: ranks
    litellm_params: {{model: hosted_vllm/rr, api_key: sk-none, api_base: "{0}"}}
  - model_name: films
    litellm_params: {{model: openai/sora-2, api_key: sk-none, api_base: "{0}"}}
  - model_name: reads
    litellm_params: {{model: mistral/mistral-ocr-latest, api_key: sk-none, api_base: "{0}"}}
  - model_name: gemini
    litellm_params: {{model: gemini/gemini-2.0-flash, api_key: sk-none, api_base: "{0}"}}
  - model_name: secrets
    litellm_params: {{model: openai/gpt-4o-realtime-preview, api_key: sk-none, api_base: "{0}"}}
  - model_name: realtime
    litellm_params: {{model: openai/gpt-4o-realtime-preview, api_key: sk-none, api_base: "{1}"}}
files_settings: [{{custom_llm_provider: openai, api_key: sk-none, api_base: "{0}"}}]
"""
SAYS = [{"role": "user", "content": "hi"}]
GOOGLES = {"contents": [{"role": "user", "parts": [{"text": "hi"}]}]}
JSONL = b'{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {}}\n'
TOKENS = 30  # of each answer


class Endpoint(NamedTuple):
    """limited: its requests count. tokens: those booked for an answer; None: the 30 it reports."""

    path: str
    body: dict[str, Any] | None  # None: GET
    limited: bool = True
    tokens: int | None = None
    files: dict[str, Any] | None = None


CHAT = {"model": "upstream", "messages": SAYS}
FILES = {"purpose": "batch", "custom_llm_provider": "openai"}
BATCH = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
DOCUMENT = {"type": "document_url", "document_url": "https://x.example/y.pdf"}
ENDPOINTS = {
    "chat": Endpoint("/v1/chat/completions", CHAT),
    "stream": Endpoint("/v1/chat/completions", {**CHAT, "stream": True}),
    "completions": Endpoint("/v1/completions", {"model": "text", "prompt": "hi"}),
    "embeddings": Endpoint("/v1/embeddings", {"model": "embedding", "input": "hi"}),
    "responses": Endpoint("/v1/responses", {"model": "upstream", "input": "hi"}),
    "messages": Endpoint("/v1/messages", {**CHAT, "max_tokens": 10}),
    "google": Endpoint("/v1beta/models/gemini:generateContent", GOOGLES),
    "google-translated": Endpoint("/v1beta/models/upstream:generateContent", GOOGLES),
    "images": Endpoint("/v1/images/generations", {"model": "image", "prompt": "hi"}),
    "image-edits": Endpoint(
        "/v1/images/edits",
        {"model": "image", "prompt": "hi"},
        files={"image": ("a.png", b"\x89PNG", "image/png")},
    ),
    "speech": Endpoint(
        "/v1/audio/speech", {"model": "speech", "input": "hi", "voice": "alloy"}, tokens=0
    ),
    "transcriptions": Endpoint(
        "/v1/audio/transcriptions",
        {"model": "hears"},
        files={"file": ("a.wav", b"RIFF....WAVEfmt ", "audio/wav")},
    ),
    "moderations": Endpoint("/v1/moderations", {"model": "moderates", "input": "hi"}, tokens=0),
    "rerank": Endpoint("/v1/rerank", {"model": "ranks", "query": "q", "documents": ["a"]}),
    "ocr": Endpoint("/v1/ocr", {"model": "reads", "document": DOCUMENT}, tokens=0),
    "videos": Endpoint("/v1/videos", {"model": "films", "prompt": "hi"}, tokens=1),
    "realtime-secret": Endpoint("/v1/realtime/client_secrets", {"model": "secrets"}, tokens=0),
    "pass-through": Endpoint("/through", {"messages": SAYS}),
    "provider": Endpoint("/openai/v1/chat/completions", {"model": "up", "messages": SAYS}),
    "files": Endpoint(
        "/v1/files", FILES, tokens=0, files={"file": ("f.jsonl", JSONL, "application/jsonl")}
    ),
    "list-files": Endpoint("/v1/files", None, tokens=0),
    "vector-stores": Endpoint(
        "/v1/vector_stores", {"name": "x", "custom_llm_provider": "openai"}, tokens=0
    ),
    "vector-search": Endpoint(
        "/v1/vector_stores/vs_1/search", {"query": "x", "custom_llm_provider": "openai"}, tokens=0
    ),
    # LiteLLM calls no hook for these
    "count-tokens": Endpoint("/v1/messages/count_tokens", CHAT, limited=False, tokens=0),
    "token-counter": Endpoint("/utils/token_counter", CHAT, limited=False, tokens=0),
    "models": Endpoint("/v1/models", None, limited=False, tokens=0),
}


@pytest.fixture(scope="module")
def talking() -> Iterator[str]:
    """A server of the realtime API: it opens the session, and waits for the client to leave."""
    from websockets.sync.server import serve

    def talk(socket: Any) -> None:
        Upstream.seen["realtime"] += 1
        socket.send(json.dumps({"type": "session.created", "session": {"id": "s"}}))
        for _ in socket:
            pass

    with serve(talk, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, talking: str) -> Iterator[Proxy]:
    name = unique_name("proxy-endpoints")
    directory = tmp_path_factory.mktemp("endpoints")
    try:
        with (
            serving() as upstream,
            proxy(
                directory,
                name,
                workers=2,
                gunicorn=True,
                upstream=upstream,
                models=MODELS.format(upstream, talking),
                environment={"OPENAI_API_BASE": upstream, "OPENAI_API_KEY": "sk-none"},
            ) as started,
        ):
            yield started
    finally:
        remove(name)
        assert not left_over(name)


def ask(served: Proxy, key: str, endpoint: Endpoint) -> int:
    body: dict[str, Any] = {}
    if endpoint.body is not None:
        body = {"data" if endpoint.files else "json": endpoint.body, "files": endpoint.files}
    return httpx.request(
        "POST" if body else "GET",
        served.url + endpoint.path,
        headers={"Authorization": f"Bearer {key}", "Connection": "close"},
        timeout=PATIENCE,
        trust_env=False,
        verify=False,
        **body,
    ).status_code


@pytest.mark.parametrize("name", ENDPOINTS)
def test_requests(served: Proxy, name: str) -> None:
    endpoint = ENDPOINTS[name]
    found = [ask(served, f"sk-r{name.replace('-', '')}-rpm=2", endpoint) for _ in range(4)]
    assert found == ([200, 200, 429, 429] if endpoint.limited else [200] * 4)


@pytest.mark.parametrize("name", ENDPOINTS)
def test_tokens(served: Proxy, name: str) -> None:
    endpoint, key = ENDPOINTS[name], f"sk-t{name.replace('-', '')}-tpm=100000"
    assert ask(served, key, endpoint) == 200
    wanted = TOKENS if endpoint.tokens is None else endpoint.tokens

    asked = itertools.count(1)

    def booked() -> bool:
        """Before this chat, and those that have asked the same."""
        left = int(served.ask(key).headers["x-ratelimit-api_key-remaining-tokens"])
        return left == 100_000 - wanted - next(asked) * TOKENS

    served.wait(booked, f"{wanted} tokens are booked")


def test_parallel_requests_of_a_pass_through(served: Proxy) -> None:
    """Its slot is given back."""
    for _ in range(4):
        assert ask(served, "sk-p-parallel=1", ENDPOINTS["provider"]) == 200


def test_a_batch_is_limited_by_litellm(served: Proxy) -> None:
    """By the requests in its file, two here, in each worker alone."""
    endpoint = Endpoint("/v1/batches", {"input_file_id": "file-1", **BATCH})
    before = Upstream.seen["/batches"]
    found = [ask(served, "sk-b-rpm=3", endpoint) for _ in range(8)]
    admitted = Upstream.seen["/batches"] - before
    assert found.count(200) == admitted
    assert 1 <= admitted <= 2  # one for each worker


async def _talk(served: Proxy, key: str) -> bool:
    """Whether a session could be opened."""
    from websockets.asyncio.client import connect

    url = f"ws://127.0.0.1:{served.port}/v1/realtime?model=realtime"
    headers = {"Authorization": f"Bearer {key}"}
    try:
        async with connect(url, additional_headers=headers, open_timeout=PATIENCE) as socket:
            first = json.loads(await asyncio.wait_for(socket.recv(), PATIENCE))
            return bool(first["type"] == "session.created")
    except websockets.exceptions.WebSocketException:
        return False


def test_realtime_sessions(served: Proxy) -> None:
    before = Upstream.seen["realtime"]
    found = [asyncio.run(_talk(served, "sk-v-rpm=2")) for _ in range(4)]
    assert found == [True, True, False, False]
    assert Upstream.seen["realtime"] == before + 2


def test_tokens_of_a_realtime_session(served: Proxy) -> None:
    key = "sk-w-tpm=100000"
    assert asyncio.run(_talk(served, key))
    asked = itertools.count(1)

    def booked() -> bool:
        left = int(served.ask(key).headers["x-ratelimit-api_key-remaining-tokens"])
        return left == 100_000 - next(asked) * TOKENS

    served.wait(booked, "none are booked")


def test_what_one_key_has_sent_tells_another_nothing(served: Proxy) -> None:
    """LiteLLM counts the tokens of a stream where the provider reports none. How long that takes
    must not show one client what another has sent: each text is remembered for its key alone."""

    def remembered(key: str) -> int:
        """How many texts are new in the memo."""
        before: int = memo_state(served.opened())["texts"]
        for _ in range(8):  # both workers
            says = [{"role": "user", "content": "a secret of one client " * 20}]  # long: remembered
            assert served.ask(key, stream=True, messages=says).status_code == 200
        with suppress(TooSlow):
            wait_until("", lambda: memo_state(served.opened())["texts"] > before, seconds=5)
        after: int = memo_state(served.opened())["texts"]
        return after - before

    first, second = remembered("sk-m1-rpm=1000"), remembered("sk-m2-rpm=1000")
    assert first == second > 0
    assert remembered("sk-m1-rpm=1000") == 0
