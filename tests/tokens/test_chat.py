"""count_chat: the numbers of litellm.token_counter, without litellm."""

from __future__ import annotations

import base64
import json
import os
import struct
import subprocess
import sys
import warnings
from typing import Any

import pytest
from drop_in import conftest
from drop_in.cases import CASES, CHAT, MODELS, PICTURE, WEATHER
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import texts

from fast_litellm_shm import Segment, SimpleTokenCounter
from fast_litellm_shm.tokens import chat, encoding

litellm = conftest.litellm  # a fixture: the real one, offline
pytestmark = pytest.mark.skipif(
    not {"cl100k_base", "o200k_base"} <= {*texts.encodings_at_hand()}, reason=texts.WHY_NOT
)

ARGUMENTS = {
    *("messages", "tools", "tool_choice", "count_response_tokens"),
    *("use_default_image_token_count", "default_token_count"),
}
CHATS = {name: case for name, case in CASES.items() if {"messages"} <= {*case} <= ARGUMENTS}


def _url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _jpeg(wide: int, high: int) -> bytes:
    table = b"\xff\xe0" + struct.pack(">H", 16) + bytes(14)
    frame = b"\xff\xff\xc0" + struct.pack(">HBHH", 11, 8, high, wide) + bytes(4)
    return b"\xff\xd8" + table + frame


def _webp(kind: bytes, wide: int, high: int) -> bytes:
    sizes = {
        b"VP8X": bytes(8) + struct.pack("<I", wide - 1)[:3] + struct.pack("<I", high - 1)[:3],
        b"VP8 ": bytes(10) + struct.pack("<HH", wide, high),
        b"VP8L": bytes(5) + struct.pack("<I", (wide - 1) | (high - 1) << 14),
        b"none": bytes(20),
    }
    return b"RIFF" + bytes(4) + b"WEBP" + kind + sizes[kind]


def _gif(wide: int, high: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", wide, high)


IMAGES = {
    "png": PICTURE,
    "a jpeg": _url(_jpeg(1000, 400)),
    "a large jpeg": _url(_jpeg(4000, 300)),
    "a gif": _url(_gif(3000, 3000)),
    "a webp": _url(_webp(b"VP8X", 900, 2100)),
    "a lossy webp": _url(_webp(b"VP8 ", 513, 80)),
    "a lossless webp": _url(_webp(b"VP8L", 800, 769)),
    "another webp": _url(_webp(b"none", 1, 1)),
    "a heic": _url(b"\0\0\0\0ftypheic" + bytes(30)),
    "no size": _url(_gif(0, 5)),
    "cut off": _url(_jpeg(1000, 400)[:20]),
    "no image": _url(b"hello", "text/plain"),
    "no base64": "data:image/png;base64,!!!!",
    "no comma": "data:image/png;base64",
    "nothing": " x ",
    "a long header": f"data:image/{'p' * 130};base64,AAAA",
}


def _counted(call: Any, *args: Any, **kwargs: Any) -> Any:
    """What it returns, or the kind of its error: litellm's messages are not ours."""
    try:
        return call(*args, **kwargs)
    except TypeError:
        return "TypeError"
    except ValueError:
        return "ValueError"


def _both(litellm: Any, model: str, case: dict[str, Any]) -> tuple[Any, Any]:
    counter = SimpleTokenCounter()
    rest = {name: value for name, value in case.items() if name != "messages"}
    return (
        _counted(counter.count_chat, case["messages"], model, **rest),
        _counted(litellm.token_counter, model, **case),
    )


@pytest.mark.parametrize("model", [*MODELS, "qwen3.5", "grok-4-1", "grok-4.3", "deepseek-v4", "o3"])
@pytest.mark.parametrize("name", CHATS)
def test_as_litellm(litellm: Any, name: str, model: str) -> None:
    ours, theirs = _both(litellm, model, CHATS[name])
    assert ours == theirs


@pytest.mark.parametrize("detail", ["auto", "high", "low"])
@pytest.mark.parametrize("name", IMAGES)
def test_images(litellm: Any, name: str, detail: str) -> None:
    image = {"type": "image_url", "image_url": {"url": IMAGES[name], "detail": detail}}
    other = {"type": "image", "source": {"type": "url", "url": IMAGES[name]}}
    raw = {"type": "image", "source": {"type": "base64", "data": IMAGES[name].split(",")[-1]}}
    for content in ([image], [other, raw], [{"type": "image", "source": {"type": "file"}}]):
        for more in ({}, {"use_default_image_token_count": True}, {"default_token_count": 9}):
            case = {"messages": [{"role": "user", "content": content}], **more}
            ours, theirs = _both(litellm, "gpt-4o", case)
            assert ours == theirs, (content, more)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object) -> None:
        raise AssertionError("a download was started")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    counter = SimpleTokenCounter()

    def count(**image: str) -> int:
        content = [{"type": "image_url", "image_url": {"url": "https://host/x.png", **image}}]
        return counter.count_chat([{"role": "user", "content": content}], "gpt-4o")

    none = counter.count_chat([{"role": "user", "content": []}], "gpt-4o")
    assert [count() - none, count(detail="low") - none, count(detail="high") - none] == [
        85,
        85,
        1445,
    ]


def test_a_jpeg_without_an_end() -> None:
    """A segment that says that it has no length leads back to itself."""
    data = b"\xff\xd8\xff\xc4\x00\x00" + bytes(20)
    content = [{"type": "image_url", "image_url": _url(data)}]
    message = {"role": "user", "content": content}
    assert SimpleTokenCounter().count_chat([message], "gpt-4o") == 85 + 7


BLOCKS: dict[str, Any] = {
    "document of text": {
        "type": "document",
        "source": {"type": "text", "data": "in a document"},
        "title": "A title",
        "context": "what it is",
    },
    "document of content": {"type": "document", "source": {"type": "content", "content": "x y"}},
    "document of blocks": {
        "type": "document",
        "source": {"type": "content", "content": [{"type": "text", "text": "a b c"}]},
    },
    "document at a URL": {"type": "document", "source": {"type": "url", "url": "https://h/x.pdf"}},
    "document that is no PDF": {
        "type": "document",
        "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"},
    },
    "file": {"type": "file", "file": {"filename": "a file.txt", "file_data": "data:x"}},
    "file of nothing": {"type": "file", "file": None},
    "search result": {
        "type": "search_result",
        "source": "https://host",
        "title": "Found",
        "content": [{"type": "text", "text": "it is here"}],
    },
    "tool reference": {"type": "tool_reference", "tool_name": "get_weather"},
    "compaction": {"type": "compaction", "content": "what was said"},
    "redacted": {"type": "redacted_thinking", "data": "xyz"},
    "use by the server": {"type": "server_tool_use", "name": "web", "input": {"q": [1, "ü"]}},
    "result of the server": {
        "type": "web_fetch_tool_result",
        "content": {
            "type": "web_fetch_result",
            "url": "https://host/page",
            "content": {
                "type": "document",
                "source": {"type": "text", "data": "a page", "media_type": "text/plain"},
            },
        },
    },
    "results of the server": {
        "type": "web_search_tool_result",
        "content": [{"type": "web_search_result", "url": "u", "title": "t", "snippet": "s s"}],
    },
    "result of an unknown type": {"type": "mcp_tool_result", "content": {"type": "x"}},
    "use with a caller": {"type": "tool_use", "name": "f", "input": {}, "caller": {"type": "d"}},
    "result in a result": {
        "type": "tool_result",
        "content": [{"type": "tool_result", "content": [{"type": "text", "text": "deep"}]}],
    },
    "result with an unknown part": {"type": "tool_result", "content": [{"type": "x"}]},
    "no dict": 7,
    "a list": ["text"],
    "no type": {"text": "x"},
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(litellm: Any, name: str) -> None:
    for model in ("gpt-4o", "gpt-4"):
        for more in ({}, {"default_token_count": 9}):
            messages = [{"role": "user", "content": ["before", BLOCKS[name]]}]
            ours, theirs = _both(litellm, model, {"messages": messages, **more})
            assert ours == theirs


MESSAGES: dict[str, Any] = {
    "compactions": {
        "role": "assistant",
        "content": "x",
        "provider_specific_fields": {
            "compaction_blocks": [{"type": "compaction", "content": "a b"}, 7, {"type": "x"}]
        },
    },
    "search results": {
        "role": "tool",
        "content": "x",
        "search_results": [
            {
                "source": "https://host",
                "title": "A page",
                "content": [{"text": "it says"}, 7],
                "citations": {"enabled": True},
            },
            7,
        ],
    },
    "longer than a part": {"role": "user", "content": texts.CORPUS["hindi"] * 9 + "x" * 3000},
}


@pytest.mark.parametrize("name", MESSAGES)
def test_messages(litellm: Any, name: str) -> None:
    ours, theirs = _both(litellm, "gpt-4", {"messages": [MESSAGES[name]]})
    assert ours == theirs


def test_pydantic_messages(litellm: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about litellm's types
        message = litellm.Message(content="hello", role="assistant", tool_calls=None)
    ours, theirs = _both(litellm, "gpt-4o", {"messages": [message]})
    assert ours == theirs > 7


def test_longer_than_litellm_counts(litellm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 16 samples; and litellm's own settings are followed."""
    text = "".join(texts.random_text(seed, 10_000) for seed in range(500))
    ours, theirs = _both(litellm, "gpt-4", {"messages": [{"role": "user", "content": text}]})
    assert ours == theirs
    counter, message = SimpleTokenCounter(), {"role": "user", "content": "ab cd" * 100}
    plain = counter.count_chat([message], "gpt-4")
    monkeypatch.setenv("TIKTOKEN_ENCODE_CHUNK_SIZE_CHARS", "1")
    assert counter.count_chat([message], "gpt-4") == 500 + len("user") + 6
    for wrong in ("0", "many", "5000"):
        monkeypatch.setenv("TIKTOKEN_ENCODE_CHUNK_SIZE_CHARS", wrong)
        assert counter.count_chat([message], "gpt-4") == plain


PDF = b"%PDF-1.4 not really"


def test_pdf(litellm: Any) -> None:
    data = _url(PDF, "application/pdf")
    for block in (
        {"type": "file", "file": {"filename": "a.pdf", "file_data": data}},
        {
            "type": "document",
            "source": {
                "type": "base64",
                "media_type": "application/pdf",
                "data": data.split(",")[1],
            },
        },
    ):
        for model in ("gpt-4o", "claude-sonnet-4-5"):
            ours, theirs = _both(
                litellm, model, {"messages": [{"role": "user", "content": [block]}]}
            )
            assert ours == theirs


SCHEMA: st.SearchStrategy[Any] = st.deferred(
    lambda: st.one_of(
        st.fixed_dictionaries(
            {
                "type": st.sampled_from(
                    ["string", "integer", "number", "boolean", "null", "x", ["a"]]
                )
            },
            optional={
                "enum": st.lists(st.integers() | st.text(max_size=4), max_size=3),
                "description": st.text(max_size=9),
            },
        ),
        st.fixed_dictionaries({"type": st.just("array")}, optional={"items": SCHEMA}),
        OBJECT,
        st.just("no schema"),
    )
)
OBJECT: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"type": st.just("object")},
    optional={
        "properties": st.dictionaries(st.sampled_from("abc"), SCHEMA, max_size=3),
        "required": st.lists(st.sampled_from("abcd")) | st.just("a"),
        "description": st.text(max_size=9),
    },
)
FUNCTION = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "get weather", "", None])},
    optional={
        "description": st.text(max_size=9),
        "parameters": OBJECT | st.none(),
        "strict": st.booleans(),
    },
)
TOOL = st.one_of(
    st.fixed_dictionaries({"type": st.just("function"), "function": FUNCTION}),
    FUNCTION,
    st.fixed_dictionaries({"functionDeclarations": st.lists(FUNCTION, max_size=2)}),
    st.fixed_dictionaries(
        {"name": st.sampled_from(["g", "web_search"]), "input_schema": OBJECT},
        optional={"defer": st.booleans(), "type": st.just("custom"), "strict": st.booleans()},
    ),
    st.just({"type": "web_search_20250305", "name": "web_search"}),
    st.just("no tool"),
)
CHOICE = st.sampled_from(
    [None, "none", "auto", "required", {"type": "none"}, {"name": "f"}, {"type": "any"}]
    + [{"type": "function", "function": {"name": "get weather"}}, {"function": {}}]
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None
)
@given(
    st.lists(TOOL, max_size=3),
    CHOICE,
    st.booleans(),
    st.sampled_from(["gpt-4o", "gpt-4", "qwen3.5-max", "xai/grok-4-1-fast", "grok-4.3", "x"]),
)
def test_tools(litellm: Any, tools: Any, choice: Any, system: bool, model: str) -> None:
    case = {
        "messages": [{"role": "system" if system else "user", "content": "x"}],
        "tools": tools,
        "tool_choice": choice,
    }
    ours, theirs = _both(litellm, model, case)
    assert ours == theirs


def test_every_model_of_litellm(litellm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has litellm's encoding. Without litellm, 19 in 20 have: the rest are models that only its
    price map knows, and gpt-oss."""
    from litellm.litellm_core_utils import token_counter
    from litellm.utils import huggingface_tokenizer_kind

    models = [model for model in litellm.model_cost if huggingface_tokenizer_kind(model) is None]
    theirs = {model: token_counter.openai_tokenizer_encoding_name(model) for model in models}
    assert {model: chat.encoding_name(model) for model in models} == theirs
    wrong = [model for model in models if encoding.name_of(model) != theirs[model]]
    assert len(wrong) < len(models) / 20

    def fail(model: str) -> str:
        raise AttributeError("not as expected")

    for other in (fail, None):
        monkeypatch.setattr(token_counter, "openai_tokenizer_encoding_name", other)
        assert chat.encoding_name("gpt-4o") is None


def test_without_litellm() -> None:
    """The same numbers, and it is not imported; Claude is counted as count_tokens() does."""
    code = f"""
import json, sys
from fast_litellm_shm import SimpleTokenCounter
counter, chat, tools = SimpleTokenCounter(), {CHAT!r}, {[WEATHER]!r}
file = {{"type": "file", "file": {{"file_data": {_url(PDF, "application/pdf")!r}}}}}
pdf = [{{"role": "user", "content": [file]}}]
counts = [
    counter.count_chat(chat, "gpt-4o", tools, "none"),
    counter.count_chat([chat[0]], "claude-sonnet-4-5"),
    counter.count_chat(pdf, "gpt-4o"),
]
print(json.dumps([counts, "litellm" in sys.modules]))
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    counter = SimpleTokenCounter()
    plain = counter.count_tokens(CHAT[0]["content"]) + counter.count_tokens("system") + 6
    expected = [counter.count_chat(CHAT, "gpt-4o", [WEATHER], "none"), plain, 85 + 7]
    assert json.loads(done.stdout) == [expected, False]


def test_tenants(segment: Segment) -> None:
    """The texts of a chat are remembered for the tenant."""
    from fast_litellm_shm._shared.native import ffi, lib

    info, counter = ffi.new("fshm_memo_info *"), SimpleTokenCounter(segment=segment)
    message = {"role": "user", "content": "a message of one tenant " * 20}
    first = counter.count_chat([message], "gpt-4o", tenant="a")
    assert counter.count_chat([message], "gpt-4o", tenant="a") == first
    assert counter.count_chat([message], "gpt-4o", tenant="b") == first
    del counter
    lib.fshm_memo_at(segment._handle, info)
    assert (info.texts, info.hits, info.misses) == (2, 1, 2)
    with pytest.raises(TypeError, match="tenant must be"):
        SimpleTokenCounter().count_chat([message], "gpt-4", tenant=7)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [[7], ["text"], [None]])
def test_messages_must_be_dicts(bad: Any) -> None:
    with pytest.raises(TypeError, match="a message must be a dict or a pydantic model, not"):
        SimpleTokenCounter().count_chat(bad, "gpt-4o")


def test_what_cannot_be_counted_is_said() -> None:
    counter = SimpleTokenCounter()

    def count(content: Any = None, **more: Any) -> None:
        counter.count_chat([{"role": "user", "content": content, **more}], "gpt-4o")

    deep: list[Any] = []
    for _ in range(chat._DEEPEST + 2):
        deep = [{"type": "tool_result", "content": deep}]
    for said, content in (
        ("a str or a dict with a type, not 7", [7]),
        ("the unknown type 'x'", [{"type": "x"}]),
        ("low, high or auto, not 'huge'", [{"type": "image_url", "image_url": {"detail": "huge"}}]),
        ("image_url must be a URL", [{"type": "image_url"}]),
        ("nested more than 100 deep", deep),
        ("cannot be counted: KeyError", [{"type": "document"}]),
    ):
        with pytest.raises(ValueError, match=said):
            count(content)
    with pytest.raises(ValueError, match="tool_calls must be a list, not 'f'"):
        count(tool_calls="f")
    with pytest.raises(ValueError, match="function_call must be a dict, not 'f'"):
        count(function_call="f")
    with pytest.raises(ValueError, match="a tool call must have a function"):
        count(tool_calls=[{}])
