"""Calls of litellm.token_counter, right and wrong ones."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

from support.texts import CORPUS

MODELS = (
    "",
    "gpt-4o",
    "gpt-4",
    "gpt-3.5-turbo-0301",  # other constants for a message and a name
    "azure/gpt-4o-mini",
    "openai/gpt-5",
    "text-davinci-003",  # p50k_base
    "claude-3-opus-20240229",
    "claude-sonnet-4-5",
    "deepseek-chat",  # a Hugging Face tokenizer in litellm's wheel
    "meta-llama/llama-3-8b",  # one that would be downloaded: tiktoken here
    "no such model",
)


def _png(width: int, height: int) -> str:
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + bytes(width) for _ in range(height)))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)
    return f"data:image/png;base64,{base64.b64encode(data + chunk(b'IEND', b'')).decode()}"


def _message(content: Any, role: str = "user", **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


PICTURE = _png(64, 700)
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a place. 天気",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A city, like Köln"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "days": {"type": "array", "items": {"type": "integer"}},
                "deep": {"type": "object", "properties": {"x": {"type": "number"}}},
            },
            "required": ["place"],
        },
    },
}
ANTHROPIC_TOOL = {
    "name": "search",
    "description": "Find things",
    "input_schema": {"type": "object", "properties": {"q": {"type": "string"}}},
}
CHAT = [
    _message("You are a helpful assistant.", "system"),
    _message(CORPUS["english"], name="ada"),
    _message(None, "assistant", tool_calls=[CALL]),
    _message('{"ok": true}', "tool", tool_call_id="c1"),
    _message(CORPUS["emoji"] + CORPUS["japanese"]),
]

# text ------------------------------------------------------------------------------------------
CASES: dict[str, dict[str, Any]] = {f"text: {kind}": {"text": CORPUS[kind]} for kind in CORPUS}
CASES |= {
    "text longer than litellm's pieces": {"text": CORPUS["german"] * 40},
    "list of text": {"text": ["one ", "two ", CORPUS["thai"]]},
    "list of text and others": {"text": ["one ", 7, None, "two"]},
    "empty list of text": {"text": []},
    "text of a stream": {"text": "so far", "count_response_tokens": True},
}
# messages --------------------------------------------------------------------------------------
_LISTS: dict[str, list[Any]] = {
    "one": [_message("hello")],
    "none": [],
    "empty content": [_message("")],
    "no content": [_message(None)],
    "a chat": CHAT,
    "the same twice": CHAT[:2] * 2,
    "names": [_message("x", name=f"user{i}") for i in range(5)],
    "unknown keys": [_message("x", other="y", number=7, nested={"a": 1})],
    "legacy function call": [
        _message(None, "assistant", function_call={"name": "f", "arguments": "{}"})
    ],
    "parts": [_message([{"type": "text", "text": "a b"}, "c d", {"type": "text", "text": None}])],
    "thinking": [_message([{"type": "thinking", "thinking": "hm, well", "signature": "s"}])],
    "tool use and result": [
        _message(
            [
                {"type": "tool_use", "id": "t", "name": "search", "input": {"q": "käse"}},
                {"type": "tool_result", "tool_use_id": "t", "content": "found 3"},
                {
                    "type": "tool_result",
                    "tool_use_id": "t",
                    "content": [{"type": "text", "text": "x"}],
                },
            ]
        )
    ],
    "a picture": [_message([{"type": "image_url", "image_url": {"url": PICTURE}}])],
    "a picture in low detail": [
        _message([{"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}}])
    ],
    "a picture as a string": [_message([{"type": "image_url", "image_url": PICTURE}])],
    "search results": [_message("x", search_results=[{"content": "found"}])],
    "lone surrogates": [_message("\ud800 a \udfff")],
    # wrong ones
    "of an unknown part": [_message([{"type": "nonsense"}])],
    "of a part without a type": [_message([{"text": "x"}])],
    "of a wrong detail": [
        _message([{"type": "image_url", "image_url": {"url": PICTURE, "detail": "huge"}}])
    ],
    "of no url": [_message([{"type": "image_url", "image_url": {}}])],
    "of wrong tool calls": [_message(None, "assistant", tool_calls="f()")],
    "of a tool call without function": [_message(None, "assistant", tool_calls=[{"id": "x"}])],
    "that are no dicts": [7],
    "with a number as content": [_message(7)],
}
CASES |= {f"messages: {name}": {"messages": found} for name, found in _LISTS.items()}
_WRONG_PART = {"messages": _LISTS["of an unknown part"]}
CASES |= {
    "messages of a stream": {"messages": CHAT, "count_response_tokens": True},
    "a default for a wrong part": {**_WRONG_PART, "default_token_count": 17},
    "default images": {"messages": _LISTS["a picture"], "use_default_image_token_count": True},
    "tools": {"messages": CHAT, "tools": [WEATHER]},
    "tools without a system message": {"messages": CHAT[1:], "tools": [WEATHER, WEATHER]},
    "tools of Anthropic": {"messages": CHAT, "tools": [ANTHROPIC_TOOL]},
    "tools without a name": {"messages": CHAT, "tools": [{"type": "function", "function": {}}]},
    "no tools": {"messages": CHAT, "tools": []},
    "tool_choice none": {"messages": CHAT, "tools": [WEATHER], "tool_choice": "none"},
    "tool_choice auto": {"messages": CHAT, "tools": [WEATHER], "tool_choice": "auto"},
    "tool_choice by name": {
        "messages": CHAT,
        "tools": [WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    },
    # wrong arguments
    "neither text nor messages": {},
    "text and messages": {"text": "x", "messages": CHAT},
    "text and tools": {"text": "x", "tools": [WEATHER]},
    "a number as text": {"text": 7},
    "bytes as text": {"text": b"bytes"},
    "a string as messages": {"messages": "hello"},
    "a number as tools": {"messages": CHAT, "tools": 7},
    "an unknown argument": {"text": "x", "colour": "red"},
    "an unsupported tokenizer": {"text": "x", "custom_tokenizer": {"type": "mine"}},
    "a tokenizer without a type": {"text": "x", "custom_tokenizer": {"tokenizer": None}},
    "an empty tokenizer": {"text": "x", "custom_tokenizer": {}},
}
