"""The tokens of a chat, by the rules of ``litellm.token_counter(messages=...)``. Works without
litellm.

The rules are those of litellm 1.110.2. A chat has 3 tokens for the reply, 3 for each message, and
those of its texts: of the values of a message, of its content blocks, of the arguments of calls.
Like litellm, a text is counted in parts of 1,024 characters (``TIKTOKEN_ENCODE_CHUNK_SIZE_CHARS``),
each for itself, and one of more than 4 million (``TOKEN_COUNTER_MAX_EXACT_CHARS``) from samples. So
the sum may be a few tokens above the count of the whole text.

It differs from litellm:

- Nothing is ever downloaded. An image of detail ``high`` that is a URL counts as the largest one,
  1,445 tokens; litellm fetches it, to know its size.
- litellm knows some new models from its price map, and counts gpt-oss in cl100k_base. It also
  counts Claude (but for Claude 3) and DeepSeek with tokenizers that its wheel brings. If the
  program has imported litellm, it is asked for the encoding, and such texts go to it. Else, and for
  models whose tokenizer litellm would download (Command R, Llama 2 and 3), texts are counted in the
  encoding that :meth:`~fast_litellm_shm.SimpleTokenCounter.count_tokens` has. (This module does not
  import litellm: that takes seconds, and starts a download of prices.)
- litellm reads the pages of a PDF where pypdf is installed: so a PDF goes to it, too. If the
  program has not imported litellm, a PDF counts as an image of unknown size: 85 tokens.
"""

from __future__ import annotations

import base64
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

Count = Callable[[str], int]

_PER_MESSAGE, _PER_NAME, _REPLY = 3, 1, 3
_SAMPLES = 16  # of a text that is not counted whole
_DEEPEST = 100  # blocks in blocks
_PDF = "data:application/pdf;base64,"

# Models whose texts litellm counts with a tokenizer in its own wheel. One that is here in vain
# costs time only: litellm decides.
_DEEPSEEK = re.compile(
    r"deepseek[-_.](?:chat[-_.])?v[34]|(?:^|/)deepseek-(?:chat|reasoner|flash)(?::free)?$",
    re.IGNORECASE,
)


# texts -------------------------------------------------------------------------------------------


def _setting(name: str, default: int, most: int) -> int:
    """One of litellm's own settings."""
    try:
        value = int(os.environ.get(name, ""))
    except ValueError:
        return default
    return value if 1 <= value <= most else default


def _in_parts(count: Count) -> Count:
    """count() as litellm does it for its tiktoken encodings."""
    size = _setting("TIKTOKEN_ENCODE_CHUNK_SIZE_CHARS", 1024, 4096)

    def count_parts(text: str) -> int:
        if len(text) <= size:
            return count(text) if text else 0
        return sum(count(text[start : start + size]) for start in range(0, len(text), size))

    return count_parts


def _sampled(count: Count) -> Count:
    most = _setting("TOKEN_COUNTER_MAX_EXACT_CHARS", 4_000_000, 1_000_000_000)

    def count_samples(text: str) -> int:
        if len(text) <= most:
            return count(text)
        samples = min(_SAMPLES, most)
        size = most // samples
        last = len(text) - size
        starts = [last * i // max(samples - 1, 1) for i in range(samples)]
        found = sum(count(text[start : start + size]) for start in starts)
        return round(found * len(text) / (size * samples))

    return count_samples


def _litellm() -> Any:
    """litellm, if the program has imported it; else None."""
    found = sys.modules.get("litellm")
    return found if hasattr(found, "token_counter") else None


def encoding_name(model: str) -> str | None:
    """The encoding that litellm has for the model; None where it was not imported."""
    module = sys.modules.get("litellm.litellm_core_utils.token_counter")
    name_of = getattr(module, "openai_tokenizer_encoding_name", None)
    try:
        return str(name_of(model)) if name_of else None
    except Exception:  # a private function of litellm's: it may become another one
        return None


def _by_litellm(model: str) -> Count | None:
    """litellm's count of a text, for a model that may have a tokenizer in its wheel."""
    claude = "claude" in model and "claude-3" not in model
    litellm = _litellm() if claude or _DEEPSEEK.search(model) else None
    return litellm and (lambda text: int(litellm.token_counter(model=model, text=text)))


# images and documents ----------------------------------------------------------------------------

_IMAGE, _TILE_SIDE = 85, 512  # tokens of any image; pixels
_LONG_SIDE, _SHORT_SIDE = 2000, 768  # pixels: larger images are made smaller
_UNKNOWN = 300, 300  # the size of an image of an unknown format
_LARGEST_IMAGE = 50 << 20  # bytes


def _size_of_jpeg(data: bytes) -> tuple[int, int]:
    at, kind, size = 0, 0, 2
    while not 0xC0 <= kind <= 0xCF or kind in (0xC4, 0xC8, 0xCC):
        at += size
        while data[at] == 0xFF:
            at += 1
        kind = data[at]
        (size,) = struct.unpack(">H", data[at + 1 : at + 3])
        at, size = at + 3, size - 2
        if size < 0:  # it would go back, and come here again
            raise ValueError("a segment of a JPEG has no length")
    height, width = struct.unpack(">HH", data[at + 1 : at + 5])
    return width, height


def _size_of_webp(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        wide, high = (struct.unpack("<I", data[at : at + 3] + b"\0")[0] + 1 for at in (24, 27))
        return wide, high
    if kind == b"VP8 ":
        wide, high = struct.unpack("<HH", data[26:30])
        return wide & 0x3FFF, high & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack("<I", data[21:25])
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return _UNKNOWN


def _size_of(data: bytes) -> tuple[int, int] | None:
    """Width and height in pixels; None for an unknown format. Raises ValueError, struct.error or
    IndexError for a file that is damaged."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        wide, high = struct.unpack(">LL", data[16:24])
        return wide, high
    if data.startswith(b"GIF8") and data[5:6] == b"a":
        wide, high = struct.unpack("<HH", data[6:10])
        return wide, high
    if data.startswith(b"\xff\xd8\xff"):
        return _size_of_jpeg(data)
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return _size_of_webp(data)
    return None


def _size_of_inline(data: str) -> tuple[int, int] | None:
    """Of a data URL that litellm reads without being told that the detail is high."""
    header, comma, encoded = data.partition(",")
    longest = 4 * ((_LARGEST_IMAGE + 2) // 3)
    if not header.startswith("data:image/") or not header.endswith(";base64") or len(header) > 128:
        return None
    if not comma or len(encoded) > longest or len(data) > longest + 128:
        return None
    try:
        raw = base64.b64decode(encoded, validate=True)
        size = _size_of(raw) if len(raw) <= _LARGEST_IMAGE else None
    except (ValueError, struct.error, IndexError):
        return None
    return size if size and min(size) > 0 else None


def _tiles(wide: int, high: int) -> int:
    """Squares of 512 pixels, after the image was made smaller."""
    if wide > _SHORT_SIDE or high > _SHORT_SIDE:
        ratio = max(wide, high) / min(wide, high)
        long = int(_SHORT_SIDE * ratio)
        short = _SHORT_SIDE
        if long > _LONG_SIDE:
            long, short = _LONG_SIDE, int(_LONG_SIDE / ratio)
        wide, high = (short, long) if wide <= high else (long, short)
    return -(-wide // _TILE_SIDE) * -(-high // _TILE_SIDE)


def _image(data: str, detail: str) -> int:
    if detail == "low":
        return _IMAGE
    if detail == "auto":
        size = _size_of_inline(data)
        if size is None:
            return _IMAGE
    elif data.startswith(("http://", "https://")):
        size = _LONG_SIDE, _SHORT_SIDE
    else:
        try:
            size = _size_of(base64.b64decode(data.split(",", 1)[1])) or _UNKNOWN
        except (ValueError, struct.error, IndexError) as error:
            raise ValueError(f"an image of detail high is no readable data URL: {error}") from None
    return _IMAGE + 2 * _IMAGE * _tiles(*size)


def _source(source: Mapping[str, Any]) -> str:
    """The URL of an Anthropic block's source; "" where there is none."""
    if source["type"] == "base64" and source.get("data"):
        return f"data:{source.get('media_type') or 'image/png'};base64,{source['data']}"
    return source.get("url") or "" if source["type"] == "url" else ""


# content blocks ----------------------------------------------------------------------------------

_TEXT_OF = {
    "text": "text",
    "thinking": "thinking",
    "redacted_thinking": "thinking",
    "compaction": "content",
}
_TOOL_FIELDS: dict[str, tuple[str, ...]] = {
    "tool_use": ("name", "input", "caller"),
    "tool_result": ("content",),
    "search_result": ("source", "title", "content"),
}
_SERVER_TOOL_FIELDS: dict[str, tuple[str, ...]] = {
    "server_tool_use": ("name", "input"),
    "mcp_tool_use": ("name", "input"),
    "web_search_tool_result": ("content",),
    "web_fetch_tool_result": ("content",),
    "code_execution_tool_result": ("content",),
    "bash_code_execution_tool_result": ("content",),
    "text_editor_code_execution_tool_result": ("content",),
    "mcp_tool_result": ("content",),
    "web_search_result": ("url", "title", "snippet"),
    "web_fetch_result": ("url", "content"),
    "code_execution_result": ("stdout", "stderr", "content"),
    "bash_code_execution_result": ("stdout", "stderr", "content"),
    "text_editor_code_execution_view_result": ("content",),
    "text_editor_code_execution_str_replace_result": ("lines",),
    "text_editor_code_execution_create_result": (),
    "encrypted_code_execution_result": ("stderr", "content"),
    "code_execution_output": (),
    "bash_code_execution_output": (),
    "web_search_tool_result_error": ("error_code",),
    "web_fetch_tool_result_error": ("error_code",),
    "code_execution_tool_result_error": ("error_code",),
    "bash_code_execution_tool_result_error": ("error_code",),
    "text_editor_code_execution_tool_result_error": ("error_code", "error_message"),
}


class _Chat:
    """The counts of one chat."""

    def __init__(
        self, model: str, count: Count, default_image: bool, default_tokens: int | None
    ) -> None:
        self.model, self.text = model, count
        self._default_image, self._default_tokens = default_image, default_tokens

    def message(self, message: Mapping[str, Any]) -> int:
        tokens = _PER_MESSAGE
        for key, value in message.items():
            if value is None:
                continue
            if key in ("tool_calls", "function_call"):
                tokens += sum(map(self.text, _arguments(key, value)))
            elif isinstance(value, str):
                tokens += self.text(value)
                if key == "name":
                    tokens += _PER_NAME
            elif key == "content" and isinstance(value, list):
                tokens += self.blocks(value)
            elif key == "provider_specific_fields":
                tokens += sum(map(self.text, _summaries(value)))
            elif key == "search_results" and isinstance(value, list):
                found = _search_results(value)
                tokens += self.text(found) if found else 0
        return tokens

    def blocks(self, content: Iterable[Any], depth: int = 0) -> int:
        try:
            return sum(self._block(block, depth) for block in content)
        except Exception as error:
            if self._default_tokens is not None:
                return self._default_tokens
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"a content block cannot be counted: {error!r}") from error

    def _block(self, block: Any, depth: int) -> int:
        if isinstance(block, str):
            return self.text(block)
        if depth > _DEEPEST:
            raise ValueError(f"content blocks are nested more than {_DEEPEST} deep")
        if not isinstance(block, Mapping) or "type" not in block:
            raise ValueError(f"a content block must be a str or a dict with a type, not {block!r}")
        kind = block["type"]
        if kind in _TEXT_OF:
            text = str(block.get(_TEXT_OF[kind]) or "")
            return self.text(text) if text else 0
        if kind == "image_url":
            return self._image_url(block.get("image_url"))
        if kind == "image":
            return self._image(_source(block["source"]), "auto")
        if kind == "document":
            return self._document(block, depth)
        if kind == "file":
            return self._file(block.get("file"))
        if kind in _TOOL_FIELDS or kind in _SERVER_TOOL_FIELDS:
            return self._fields(block, depth)
        if kind == "tool_reference":
            name = str(block.get("tool_name") or "")
            return self.text(name) if name else 0
        raise ValueError(f"a content block has the unknown type {kind!r}")

    def _image(self, data: str, detail: str) -> int:
        if self._default_image:
            return _setting("DEFAULT_IMAGE_TOKEN_COUNT", 250, 1 << 31)
        return _image(data, detail)

    def _image_url(self, image: Any) -> int:
        if isinstance(image, dict):
            url, detail = image.get("url"), image.get("detail", "auto")
        else:
            url, detail = image, "auto"
        if detail not in ("low", "high", "auto"):
            raise ValueError(f"the detail of an image must be low, high or auto, not {detail!r}")
        if not isinstance(url, str) or not (url if isinstance(image, dict) else url.strip()):
            raise ValueError(f"image_url must be a URL, or a dict with a url, not {image!r}")
        return self._image(url, detail)

    def _opaque(self, data: str) -> int:
        """A document that is not text."""
        litellm = _litellm() if data.startswith(_PDF) else None
        if litellm:
            found: int = litellm.token_counter(
                model=self.model,
                messages=[{"content": [{"type": "file", "file": {"file_data": data}}]}],
                count_response_tokens=True,  # without the tokens of the reply
                use_default_image_token_count=self._default_image,
            )
            return found - _PER_MESSAGE
        return self._image(data, "auto")

    def _document(self, block: Mapping[str, Any], depth: int) -> int:
        source = block["source"]
        texts = (block.get("title"), block.get("context"))
        tokens = sum(self.text(text) for text in texts if text)
        if source["type"] == "text":
            return tokens + self.text(source["data"])
        if source["type"] == "content":
            content = source["content"]
            if isinstance(content, str):
                return tokens + self.text(content)
            return tokens + self.blocks(content, depth + 1)
        return tokens + self._opaque(_source(source))

    def _file(self, file: Any) -> int:
        if not isinstance(file, Mapping):
            return 0
        name, data = file.get("filename"), file.get("file_data")
        tokens = self.text(name) if isinstance(name, str) and name else 0
        return tokens + (self._opaque(data) if isinstance(data, str) and data else 0)

    def _fields(self, block: Mapping[str, Any], depth: int) -> int:
        kind, tokens = block.get("type"), 0
        if depth >= _DEEPEST:
            raise ValueError(f"content blocks are nested more than {_DEEPEST} deep")
        if kind == "document":
            return self._document(block, depth)
        of_server = kind in _SERVER_TOOL_FIELDS
        fields = _SERVER_TOOL_FIELDS.get(str(kind)) if of_server else _TOOL_FIELDS.get(str(kind))
        if fields is None:
            raise ValueError(f"a content block has the unknown type {kind!r}")
        for field in fields:
            value = block.get(field)
            try:
                if isinstance(value, str):
                    tokens += self.text(value)
                elif isinstance(value, list):
                    tokens += self.blocks(value, depth + 1)
                elif isinstance(value, dict) and of_server and field == "content":
                    tokens += self._fields(value, depth + 1)
                elif isinstance(value, dict):
                    tokens += self.text(str(value))
            except Exception:
                if self._default_tokens is not None:
                    return self._default_tokens
                raise
        return tokens


def _arguments(key: str, value: Any) -> Iterator[str]:
    calls = value
    if key == "function_call":
        if not isinstance(value, Mapping):
            raise ValueError(f"function_call must be a dict, not {value!r}")
        calls = [{"function": value}]
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls must be a list, not {calls!r}")
    for call in calls:
        if "function" not in call:
            raise ValueError(f"a tool call must have a function: {call!r}")
        yield str(call["function"].get("arguments", ""))


def _summaries(fields: Any) -> Iterator[str]:
    blocks = fields.get("compaction_blocks") if isinstance(fields, Mapping) else None
    for block in blocks if isinstance(blocks, list) else ():
        if isinstance(block, Mapping) and block.get("type") == "compaction":
            content = block.get("content")
            if isinstance(content, str) and content:
                yield content


def _search_results(results: list[Any]) -> str:
    texts: list[Any] = []
    for result in results:
        if not isinstance(result, dict):
            continue
        texts += result.get("source"), result.get("title")
        content = result.get("content")
        for block in content if isinstance(content, list) else ():
            texts.append(block.get("text") if isinstance(block, dict) else None)
        if result.get("citations") is not None:
            texts.append(json.dumps(result["citations"], separators=(",", ":")))
    return "".join(text for text in texts if isinstance(text, str))


# tools -------------------------------------------------------------------------------------------

_ANTHROPIC_KEYS = (
    "name",
    "input_schema",
    "description",
    "cache_control",
    "strict",
    "type",
    "eager_input_streaming",
    "custom",
)


class _Template(NamedTuple):
    """A chat template that is known: how it writes tools."""

    models: re.Pattern[str]
    before: int  # tokens of what stands before the tools
    system: int  # of a system message that there is only for the tools
    write: Callable[[list[Mapping[str, Any]]], str]
    grok: bool = False  # tool_choice counts, and strict=False is not written


def _lines(functions: list[Mapping[str, Any]], **options: Any) -> str:
    return "\n".join(json.dumps(function, ensure_ascii=False, **options) for function in functions)


def _compact(functions: list[Mapping[str, Any]]) -> str:
    return _lines(functions, separators=(",", ":"))


def _wrapped(functions: list[Mapping[str, Any]]) -> str:
    return "\n" + _lines([{"type": "function", "function": function} for function in functions])


def _models(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


_TEMPLATES = (
    _Template(_models(r"deepseek-v4(?:[-._]|p)1(?!\d)"), 211, 0, _lines),
    _Template(
        _models(
            r"deepseek-v4(?![.\d]|p\d)"
            r"|^(?:deepseek/)?deepseek-(?:chat|reasoner|flash)(?::free)?$"
        ),
        222,
        0,
        _lines,
    ),
    _Template(_models(r"qwen3[._]?5(?!\d)"), 196, 5, _wrapped),
    _Template(_models(r"grok-4[-.]1(?![.\d])"), 0, 0, _compact, True),
    _Template(_models(r"grok-4[-.]3(?![.\d])"), 0, 0, _lines, True),
)


def _functions(tools: Iterable[Any]) -> Iterator[Mapping[str, Any]]:
    """The functions of tools in OpenAI's, Google's or Anthropic's form."""
    for tool in tools:
        if not isinstance(tool, Mapping):
            continue
        if isinstance(tool.get("function"), Mapping):
            yield tool["function"]
            continue
        declared = tool.get("function_declarations") or tool.get("functionDeclarations")
        if isinstance(declared, list):
            yield from (function for function in declared if isinstance(function, Mapping))
            continue
        schema = tool.get("input_schema")
        parameters = schema or tool.get("parameters") or {}
        written = dict(parameters) if isinstance(parameters, Mapping) else {}
        if schema is not None:
            written |= {key: value for key, value in tool.items() if key not in _ANTHROPIC_KEYS}
        function: dict[str, Any] = {"name": tool.get("name"), "parameters": written}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        if tool.get("strict") is not None:
            function["strict"] = bool(tool["strict"])
        yield function


def _type(found: Any, indent: int) -> str:
    if not isinstance(found, Mapping):
        return "any"
    kind, enum = found.get("type"), found.get("enum")
    if kind == "array":
        return f"{_type(found.get('items'), indent)}[]"
    if kind == "object":
        return f"{{\n{_parameters(found, indent + 2)}\n}}"
    if kind in ("string", "integer", "number"):
        if isinstance(enum, list):
            return " | ".join(f'"{item}"' for item in enum)
        return "string" if kind == "string" else "number"
    return kind if kind in ("boolean", "null") else "any"


def _parameters(found: Mapping[str, Any], indent: int) -> str:
    properties, required = found.get("properties"), found.get("required")
    if not isinstance(properties, Mapping):
        return ""
    lines = []
    for key, value in properties.items():
        description = value.get("description") if isinstance(value, Mapping) else None
        if description:
            lines.append(f"// {description}")
        mark = "" if isinstance(required, list) and key in required else "?"
        lines.append(f"{key}{mark}: {_type(value, indent)},")
    return "\n".join(" " * max(0, indent) + line for line in lines)


def _typescript(tools: Iterable[Any]) -> str:
    """Tools as OpenAI's models seem to get them."""
    lines = ["namespace functions {", ""]
    for function in _functions(tools):
        name, description = function.get("name"), function.get("description")
        if not name:
            continue
        parameters = function.get("parameters")
        if description:
            lines.append(f"// {description}")
        if isinstance(parameters, Mapping) and isinstance(parameters.get("properties"), Mapping):
            written = _parameters(parameters, 0)
        else:
            written = ""
        if written:
            lines += [f"type {name} = (_: {{", written, "}) => any;", ""]
        else:
            lines += [f"type {name} = () => any;", ""]
    return "\n".join([*lines, "} // namespace functions"])


def _is_own_search(tool: Mapping[str, Any]) -> bool:
    """Anthropic's own search of the web, which no template writes."""
    of_anthropic = "input_schema" not in tool and tool.get("type") != "function"
    return of_anthropic and tool.get("name") == "web_search"


def _by_template(template: _Template, tools: Sequence[Any], has_system: bool, count: Count) -> int:
    sent = [tool for tool in tools if isinstance(tool, Mapping) and not _is_own_search(tool)]
    functions = [function for function in _functions(sent) if function.get("name")]
    if template.grok:
        functions = [
            {key: value for key, value in function.items() if key != "strict" or value}
            for function in functions
        ]
    if not functions:
        return 0
    written = count(template.write(functions))
    return template.before + (0 if has_system else template.system) + written


def _chosen(tool_choice: object, count: Count) -> int:
    if tool_choice == "none":
        return 1
    if not isinstance(tool_choice, Mapping):
        return 0
    function = tool_choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if isinstance(name, str):
        return 7 + count(name)
    if tool_choice.get("type") == "none":
        return 1
    name = tool_choice.get("name")
    return 7 + count(name) if isinstance(name, str) else 0


def _extra(
    model: str, tools: Sequence[Any] | None, tool_choice: object, has_system: bool, count: Count
) -> int:
    """What the reply, the tools and the choice of one take."""
    template = next((each for each in _TEMPLATES if each.models.search(model)), None)
    tokens = _REPLY
    if template is None or template.grok:
        tokens += _chosen(tool_choice, count)
    if not tools:
        return tokens
    if template is not None:
        return tokens + _by_template(template, tools, has_system, count)
    return tokens + count(_typescript(tools)) + 9 - (4 if has_system else 0)


# the API -----------------------------------------------------------------------------------------


def _as_dict(message: Any) -> Mapping[str, Any]:
    """A message, which may be a model of pydantic."""
    if isinstance(message, Mapping):
        return message
    dump = getattr(message, "model_dump", None)
    if dump is None:
        raise TypeError(f"a message must be a dict or a pydantic model, not {message!r}")
    found: Mapping[str, Any] = dump(exclude_none=True)
    return found


def count(
    messages: Iterable[Any],
    model: str,
    count_text: Count,
    tools: Sequence[Any] | None = None,
    tool_choice: str | Mapping[str, Any] | None = None,
    *,
    count_response_tokens: bool = False,
    use_default_image_token_count: bool = False,
    default_token_count: int | None = None,
) -> int:
    """:meth:`fast_litellm_shm.SimpleTokenCounter.count_chat`; count_text: counts one text."""
    in_text = _by_litellm(model) or _sampled(_in_parts(count_text))
    chat = _Chat(model, in_text, use_default_image_token_count, default_token_count)
    given = [_as_dict(message) for message in messages]
    tokens = sum(map(chat.message, given))
    if not count_response_tokens:
        has_system = any(message.get("role") == "system" for message in given)
        tokens += _extra(model, tools, tool_choice, has_system, in_text)
    return tokens
