"""How many tokens a request will use, guessed before it, and how many it used, read after it."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

CHARACTERS_PER_TOKEN = 4  # LiteLLM's own estimate, for its own limits
_TOKENS_OF_OTHER_PARTS = 300  # a picture or a sound, roughly
_TOKENS_OF_MESSAGE, _TOKENS_OF_REPLY = 4, 3  # besides their text, in OpenAI's chat format
_MOST_UNKNOWN = 1024
_MOST_BODY = 2**20  # characters of an answer that is read once more
_MOST = 2**62  # what a request counts as that cannot be read: all that its limit has
_OTHER_TEXTS = ("system", "instructions", "query", "documents")  # besides messages, prompt, input
_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_CHOICES = frozenset(("n", "best_of", "prompt"))
_SHARE_OF_NEWEST = 0.2  # in the mean of a model's outputs
_SHARE_OF_LIMIT = 4  # a guessed output is at most a quarter of the limit
_MOST_LEARNERS, _MOST_MODELS = 4096, 16
_LONG = 256  # characters: a longer name is not remembered

# Of each key, by model and kind, what an answer had beyond the guessed input: a decaying mean, in
# this process. What one key's answers are like says nothing of another's. Who learnt least recently
# is forgotten first, and begins anew.
_beyond: OrderedDict[Hashable, dict[tuple[Any, str], float]] = OrderedDict()


class Made(NamedTuple):
    """The calls that a request makes. models: how many to each. calls: how many. rows: of a list of
    conversations, how many. fastest: the first answer of them is the request's, and the others are
    left."""

    models: Mapping[str, int]
    calls: int = 1
    rows: int = 1
    fastest: bool = False


_ONE = Made({})


@functools.lru_cache(maxsize=256)  # each request brings one of a few names
def _one(model: str) -> Made:
    return Made({model: 1})


def made(data: Mapping[str, Any], call_type: str) -> Made:
    """LiteLLM takes a chat's ``"model": "a,b"`` for a list, and makes a call to each; of a list of
    conversations, a call for each of them too."""
    model = data.get("model")
    if not isinstance(model, str) or not model:
        return _ONE
    if "," not in model or call_type != "acompletion" or "api_key" in data or "api_base" in data:
        return _one(model) if len(model) <= _LONG else Made({model: 1})
    models, rows = Counter(each.strip() for each in model.split(",")), data.get("messages")
    if data.get("fastest_response", False):
        return Made(models, models.total(), 1, True)
    if isinstance(rows, list) and len(rows) > 1 and all(isinstance(row, list) for row in rows):
        several = {each: n * len(rows) for each, n in models.items()}
        return Made(several, models.total() * len(rows), len(rows))
    return Made(models, models.total())


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
    found = -1  # as some say "unlimited"
    for name in _CAPS:
        cap = data.get(name)
        if cap is not None and isinstance(cap, int) and cap > found:
            found = cap
    return None if found < 0 else found


def _choices(data: Mapping[str, Any]) -> int:
    """How many outputs one call has: ``n`` (or ``best_of``) for each prompt of a list."""
    if _CHOICES.isdisjoint(data):
        return 1
    wanted = (data.get("n"), data.get("best_of"))
    # no float is more
    found = min(max((n for n in wanted if isinstance(n, int)), default=1), _MOST)
    prompts = data.get("prompt")
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        return max(found, 1) * len(prompts)
    return max(found, 1)


@functools.lru_cache(maxsize=256)
def _without_text(call_type: str) -> bool:
    """Whether its answers are none of text."""
    kinds = ("embedding", "video", "rerank", "moderation", "speech")
    return any(kind in call_type for kind in kinds)


class Guess:
    """Tokens that one call of a request will count with. kind: "total", "input" or "output", as
    LiteLLM's ``token_rate_limit_type``. who: whose answers it learns from. Nothing is counted
    before it is asked.

    Its input is a quarter of its characters. Its output is the most that it asks for; else what
    that model's answers to this key had in the mean beyond the guessed input, and before the first
    of them 1,024, but a quarter of the limit at most: one guess leaves room for other calls."""

    __slots__ = (
        *("_asked", "_choices", "_data", "_input", "_output"),
        *("call_type", "kind", "made", "model", "who"),
    )

    def __init__(
        self,
        data: Mapping[str, Any],
        call_type: str,
        kind: str,
        made: Made = _ONE,
        who: Hashable = None,
    ) -> None:
        self._data, self.call_type, self.kind = data, call_type, kind
        self.made, self.who = made, who
        model = data.get("model")  # of a pass-through, whatever the client sends
        self.model = model if isinstance(model, str) else None
        self._asked = False
        self._input, self._choices = 0, 1
        self._output: int | None = None

    def _ask(self) -> None:
        self._asked = True
        without = self.kind == "input" or _without_text(self.call_type)
        try:
            if self.kind != "output":
                self._input = -(-_input(self._data) // self.made.rows)
            self._choices = _choices(self._data)
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
            known = _beyond.get(self.who, {}).get((self.model, self.kind), _MOST_UNKNOWN)
            output = min(round(known * self._choices), least_limit // _SHARE_OF_LIMIT)
        else:
            output *= self._choices
        return min(max(self._input + output, 1), least_limit)

    def learn(self, used: int) -> None:
        """All its calls used so many."""
        if not self._asked:
            return  # nobody counts this model's
        beyond = max(used / self.made.calls - self._input, 0) / self._choices
        answers, mine = (self.model, self.kind), _beyond.get(self.who)
        if mine is None:
            if len(_beyond) >= _MOST_LEARNERS:
                _beyond.popitem(last=False)
            mine = _beyond[self.who] = {}
        else:
            _beyond.move_to_end(self.who)
        known = mine.pop(answers, beyond)
        if len(mine) >= _MOST_MODELS:
            del mine[next(iter(mine))]
        mine[answers] = known + (beyond - known) * _SHARE_OF_NEWEST


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
        if not self.input and not self.output:  # as Google says it
            self.input = int(field("promptTokenCount") or 0)
            self.input -= min(int(field("cachedContentTokenCount") or 0), self.input)
            self.output = int(field("candidatesTokenCount") or 0)
            self.output += int(field("thoughtsTokenCount") or 0)
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


def _in_body(body: str) -> Used | None:
    """What the answer to a pass-through says, where it is JSON and says it as the others do."""
    if "usage" not in body or len(body) > _MOST_BODY:
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # a stream's events, say
        return None
    return used(found) if isinstance(found, dict) and "response" not in found else None


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
        usage = response.get("usage") or response.get("usageMetadata")
        if usage is None and "total_tokens" in response:
            usage = response
        if usage is None and type(response.get("response")) is str:  # of a pass-through
            return _in_body(response["response"])
    else:
        usage = getattr(response, "usage", None)
    found = None if usage is None else Used(usage)
    return found if found is not None and (found.total or found.input or found.output) else None
