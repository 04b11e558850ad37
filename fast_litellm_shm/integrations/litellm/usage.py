"""How many tokens a request will use, guessed before it, and how many it used, read after it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

CHARACTERS_PER_TOKEN = 4  # LiteLLM's own estimate, for its own limits
_TOKENS_OF_OTHER_PARTS = 300  # a picture or a sound, roughly
_TOKENS_OF_MESSAGE, _TOKENS_OF_REPLY = 4, 3  # besides their text, in OpenAI's chat format
_MOST_UNKNOWN = 1024
_MOST = 2**62  # what a request counts as that cannot be read: all that its limit has
_OTHER_TEXTS = ("system", "instructions", "query", "documents")  # besides messages, prompt, input
_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_SHARE_OF_NEWEST = 0.2  # in the mean of a model's outputs
_MOST_MODELS = 1024

# By model and kind, what answers had beyond the guessed input: a decaying mean, in this process.
_beyond: dict[tuple[Any, str], float] = {}


def _characters(value: Any) -> tuple[int, int]:
    """Of a prompt, messages or input: characters of text, and parts that are none."""
    if isinstance(value, str):
        return len(value), 0
    if isinstance(value, int):  # of a prompt that is tokens already
        return CHARACTERS_PER_TOKEN, 0
    text = others = 0
    if isinstance(value, Mapping):
        found = value.get("content", value.get("text"))
        if found is None and "type" in value:
            return 0, 1
        return _characters(found)
    if isinstance(value, (list, tuple)):
        for part in value:
            more_text, more_others = _characters(part)
            text, others = text + more_text, others + more_others
    return text, others


def _input(data: Mapping[str, Any]) -> int:
    text = others = 0
    for name in _OTHER_TEXTS:
        if name in data:
            more_text, more_others = _characters(data[name])
            text, others = text + more_text, others + more_others
    tools = data.get("tools") or data.get("functions")
    if tools:
        text += len(str(tools))
    messages = data.get("messages")
    if not isinstance(messages, list) or not messages:
        more_text, more_others = _characters(data.get("prompt") or data.get("input"))
        text, others = text + more_text, others + more_others
        return -(-text // CHARACTERS_PER_TOKEN) + others * _TOKENS_OF_OTHER_PARTS
    for message in messages:
        content = message.get("content") if type(message) is dict else message
        if type(content) is str:  # nearly all of them, and chats are long
            text += len(content)
        else:
            more_text, more_others = _characters(content)
            text, others = text + more_text, others + more_others
    tokens = -(-text // CHARACTERS_PER_TOKEN) + others * _TOKENS_OF_OTHER_PARTS
    return tokens + len(messages) * _TOKENS_OF_MESSAGE + _TOKENS_OF_REPLY


def _output(data: Mapping[str, Any]) -> int | None:
    """The most that it asks for: of several caps the largest, for which one holds is not known."""
    caps = [data[name] for name in _CAPS if isinstance(data.get(name), int)]
    found = max(caps, default=-1)
    if found < 0:  # none, or -1, as some take for "unlimited"
        return None
    choices = data.get("n")
    if isinstance(choices, int) and choices > 1:
        found *= choices
    return found


class Guess:
    """Tokens that a request will count with. kind: "total", "input" or "output", as LiteLLM's
    ``token_rate_limit_type``. Nothing is counted before it is asked.

    Its input is a quarter of its characters. Its output is the most that it asks for; else what
    that model's answers had in the mean beyond the guessed input, and before the first of them a
    quarter of the limit, at most 1,024."""

    __slots__ = ("_asked", "_data", "_input", "_output", "call_type", "kind", "model")

    def __init__(self, data: Mapping[str, Any], call_type: str, kind: str) -> None:
        self._data, self.call_type, self.kind = data, call_type, kind
        model = data.get("model")  # of a pass-through, whatever the client sends
        self.model = model if isinstance(model, str) else None
        self._asked = False
        self._input = 0
        self._output: int | None = None

    def _ask(self) -> None:
        self._asked = True
        without = self.kind == "input" or "embedding" in self.call_type
        try:
            self._input = 0 if self.kind == "output" else _input(self._data)
            self._output = 0 if without else _output(self._data)
        except Exception:  # RecursionError, say: the client's own doing must not let it pass
            self._input = _MOST
        self._data = {}  # which may be large: it is guessed once

    def within(self, least_limit: int) -> int:
        """least_limit: the smallest limit of tokens that it is subject to. A request that is larger
        passes where nothing else was used yet, or it never could."""
        if not self._asked:
            self._ask()
        output = self._output
        if output is None:
            known = _beyond.get((self.model, self.kind))
            output = min(_MOST_UNKNOWN, least_limit // 4) if known is None else round(known)
        return min(max(self._input + output, 1), least_limit)

    def learn(self, used: int) -> None:
        """It used so many."""
        if not self._asked:
            return  # nobody counts this model's
        answers, beyond = (self.model, self.kind), max(used - self._input, 0)
        known = _beyond.get(answers)
        if known is None and len(_beyond) >= _MOST_MODELS:
            _beyond.clear()
        _beyond[answers] = beyond if known is None else known + (beyond - known) * _SHARE_OF_NEWEST


def kind() -> str:
    """Which tokens count: the proxy's ``general_settings.token_rate_limit_type``."""
    proxy = sys.modules.get("litellm.proxy.proxy_server")
    found = (getattr(proxy, "general_settings", None) or {}).get("token_rate_limit_type", "total")
    return found if found in ("input", "output") else "total"


def _reader(of: Any) -> Callable[[str], Any]:
    """What gives its fields by name, None where it has none of that name."""
    if type(of) is dict or isinstance(of, Mapping):  # the first is told in a tenth of the time
        return of.get
    return lambda name: getattr(of, name, None)


class Used:
    """input, output and total tokens of one answer. What the provider had cached counts in none of
    them, as in LiteLLM's own limits; what it has put into its cache does."""

    __slots__ = ("input", "output", "total")

    def __init__(self, usage: Any) -> None:
        field = _reader(usage)
        self.input = int(field("prompt_tokens") or 0)
        self.output = int(field("completion_tokens") or field("output_tokens") or 0)
        if not self.input:  # as the Responses API says it, or Anthropic, whose input has no cached
            self.input = int(field("input_tokens") or 0)
            self.input += int(field("cache_creation_input_tokens") or 0)
        self.total = int(field("total_tokens") or 0) or self.input + self.output
        for name in ("prompt_tokens_details", "input_tokens_details"):
            details = field(name)
            cached = 0 if details is None else int(_reader(details)("cached_tokens") or 0)
            if cached:
                self.input = max(self.input - cached, 0)
                self.total = max(self.total - cached, 0)
                break

    def add(self, other: Used) -> None:
        """Of another answer to the same request."""
        self.input += other.input
        self.output += other.output
        self.total += other.total

    def of_kind(self, kind: str) -> int:
        """Tokens that count for limits of the kind. Where only a total is known, it is that."""
        if not self.input and not self.output:
            return self.total
        return {"input": self.input, "output": self.output}.get(kind, self.total)


def used(response: Any) -> Used | None:
    """Of an answer of LiteLLM's, or of several (it answers a list of models with a list), or a
    standard_logging_object; None where none is told."""
    if isinstance(response, list):
        total: Used | None = None
        for one in response:
            found = used(one)
            if total is None:
                total = found
            elif found is not None:
                total.add(found)
        return total
    if type(response) is dict or isinstance(response, Mapping):
        usage = response.get("usage")
        if usage is None and "total_tokens" in response:
            usage = response
    else:
        usage = getattr(response, "usage", None)
    found = None if usage is None else Used(usage)
    return found if found is not None and (found.total or found.input or found.output) else None
