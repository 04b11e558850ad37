"""The tokens of a request: estimated before its calls, and read from its answers."""

from __future__ import annotations

import functools
import json
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

from fast_litellm_shm.integrations.litellm.subjects import Subjects

CHARACTERS_PER_TOKEN = 4  # LiteLLM's own estimate, for its own limits
_TOKENS_OF_OTHER_PARTS = 300  # a picture or a sound, roughly
_TOKENS_OF_MESSAGE, _TOKENS_OF_REPLY = 4, 3  # besides their text, in OpenAI's chat format
_UNKNOWN_OUTPUT = 1024
_MOST_BODY = 2**20  # characters of an answer that is parsed once more
_MOST = 2**62  # of a request that cannot be read: the whole limit
# besides messages, prompt, input
_OTHER_TEXTS = frozenset(("system", "instructions", "query", "documents"))
_CAPS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
_WEIGHT_OF_NEWEST = 0.2  # in the mean of a model's outputs
_PART_OF_LIMIT = 4  # an estimated output is at most a quarter of the limit
_ABOUT_CHOICES = frozenset(("n", "best_of", "prompt"))
_MOST_LEARNERS, _MOST_MODELS = 4096, 16
_LONG = 256  # characters of a model's name: a longer one is not remembered

# For each key, by model and kind: the mean output of its answers, decaying, in this process. (The
# output is what an answer used beyond the estimated input.) The answers of one key say nothing of
# another's. The key that learned least recently is forgotten first.
_mean_outputs: OrderedDict[Hashable, dict[tuple[Any, str], float]] = OrderedDict()


class ModelCalls(NamedTuple):
    """The calls that a request makes. models: how many to each. total: of all. rows: the number of
    conversations, of a list of them. fastest: the first answer is the request's, the other calls
    are dropped."""

    models: Mapping[str, int]
    total: int = 1
    rows: int = 1
    fastest: bool = False


_ONE = ModelCalls({})


@functools.lru_cache(maxsize=256)  # requests name few models
def _one_call(model: str) -> ModelCalls:
    return ModelCalls({model: 1})


def calls_of(data: Mapping[str, Any], call_type: str) -> ModelCalls:
    """LiteLLM takes ``"model": "a,b"`` of a chat for a list, and makes a call to each; of a list of
    conversations, a call for each of them too."""
    model = data.get("model")
    if not isinstance(model, str) or not model:
        return _ONE
    if "," not in model or call_type != "acompletion" or "api_key" in data or "api_base" in data:
        return _one_call(model) if len(model) <= _LONG else ModelCalls({model: 1})
    models, rows = Counter(each.strip() for each in model.split(",")), data.get("messages")
    if data.get("fastest_response", False):
        return ModelCalls(models, models.total(), 1, True)
    if isinstance(rows, list) and len(rows) > 1 and all(isinstance(row, list) for row in rows):
        several = {each: n * len(rows) for each, n in models.items()}
        return ModelCalls(several, models.total() * len(rows), len(rows))
    return ModelCalls(models, models.total())


def _characters(value: Any) -> tuple[int, int]:
    """Of a prompt, messages or input: characters of text, and the number of parts without text."""
    if isinstance(value, str):
        return len(value), 0
    if isinstance(value, int):  # a token of a prompt that is a list of tokens
        return CHARACTERS_PER_TOKEN, 0
    if isinstance(value, Mapping):
        found = value.get("content", value.get("text"))
        return (0, 1) if found is None and "type" in value else _characters(found)
    text = others = 0
    if isinstance(value, (list, tuple)):
        for part in value:
            more_text, more_others = _characters(part)
            text, others = text + more_text, others + more_others
    return text, others


def _input(data: Mapping[str, Any]) -> int:
    text = others = 0
    if not _OTHER_TEXTS.isdisjoint(data):
        text, others = _characters([data.get(name) for name in _OTHER_TEXTS])
    tools = data.get("tools") or data.get("functions")
    if tools:
        text += len(str(tools))
    messages, overhead = data.get("messages"), 0
    if not isinstance(messages, list) or not messages:
        messages = [data.get("prompt") or data.get("input")]
    else:
        overhead = len(messages) * _TOKENS_OF_MESSAGE + _TOKENS_OF_REPLY
    for message in messages:
        content = message.get("content") if overhead and type(message) is dict else message
        if type(content) is str:  # nearly all of them, and chats are long
            text += len(content)
        else:
            more_text, more_others = _characters(content)
            text, others = text + more_text, others + more_others
    return -(-text // CHARACTERS_PER_TOKEN) + others * _TOKENS_OF_OTHER_PARTS + overhead


def _output(data: Mapping[str, Any]) -> int | None:
    """The most that it asks for. Of several caps the largest: which of them the model obeys is not
    known. None: no cap, or -1, which some clients send for "unlimited"."""
    found = -1
    for name in _CAPS:
        cap = data.get(name)
        if isinstance(cap, int) and cap > found:
            found = cap
    return None if found < 0 else found


def _choices(data: Mapping[str, Any]) -> int:
    """The outputs of one call: ``n`` (or ``best_of``) for each prompt of a list."""
    if _ABOUT_CHOICES.isdisjoint(data):
        return 1
    wanted = (n for n in (data.get("n"), data.get("best_of")) if isinstance(n, int))
    found = max(min(max(wanted, default=1), _MOST), 1)  # no larger than a float can be
    prompts = data.get("prompt")
    if isinstance(prompts, list) and prompts and not isinstance(prompts[0], int):
        return found * len(prompts)
    return found


@functools.lru_cache(maxsize=256)
def _has_no_text(call_type: str) -> bool:
    """Whether the output of such a call is no text."""
    kinds = ("embedding", "video", "rerank", "moderation", "speech")
    return any(kind in call_type for kind in kinds)


class Estimate:
    """The tokens that one call of a request is charged with before it is made. kind: "total",
    "input" or "output", as LiteLLM's ``token_rate_limit_type``. key: whose answers it learns from.
    Nothing is counted before the estimate is asked for.

    Input: a quarter of the characters. Output: the most that the request asks for; else the mean
    output of that model's answers to this key, and 1,024 before the first of them, but at most a
    quarter of the limit, so that one estimate leaves room for other calls."""

    __slots__ = (
        *("_choices", "_data", "_estimated", "_input", "_output"),
        *("call_type", "calls", "key", "kind", "model"),
    )

    def __init__(
        self,
        data: Mapping[str, Any],
        call_type: str,
        kind: str,
        calls: ModelCalls = _ONE,
        key: Hashable = None,
    ) -> None:
        self._data, self.call_type, self.kind = data, call_type, kind
        self.calls, self.key = calls, key
        model = data.get("model")  # of a pass-through, whatever the client sends
        self.model = model if isinstance(model, str) else None
        self._estimated = False
        self._input, self._choices = 0, 1
        self._output: int | None = None

    def _estimate(self) -> None:
        self._estimated = True
        without = self.kind == "input" or _has_no_text(self.call_type)
        try:
            if self.kind != "output":
                self._input = -(-_input(self._data) // self.calls.rows)
            self._choices = _choices(self._data)
            self._output = 0 if without else _output(self._data)
        except Exception:  # for example RecursionError: no client gets past a limit by its body
            self._input = _MOST
        self._data = {}  # it may be large, and is not needed again

    def for_subjects(self, subjects: Subjects) -> int:
        """For the smallest limit of tokens among the subjects'; 0 where they have none."""
        least = subjects.least_tokens
        return self.within(least) if least else 0

    def within(self, limit: int) -> int:
        """limit: tokens a minute. A request that is larger than the limit is charged the whole
        limit: so it is admitted where nothing else was used yet."""
        if not self._estimated:
            self._estimate()
        output = self._output
        if output is None:
            known = _mean_outputs.get(self.key, {}).get((self.model, self.kind), _UNKNOWN_OUTPUT)
            output = min(round(known * self._choices), limit // _PART_OF_LIMIT)
        else:
            output *= self._choices
        return min(max(self._input + output, 1), limit)

    def learn(self, used: int) -> None:
        """All calls of the request together used so many tokens."""
        if not self._estimated:
            return  # no subject limits the tokens of this model
        output = max(used / self.calls.total - self._input, 0) / self._choices
        mine = _mean_outputs.get(self.key)
        if mine is not None:
            _mean_outputs.move_to_end(self.key)
        else:
            if len(_mean_outputs) >= _MOST_LEARNERS:
                _mean_outputs.popitem(last=False)
            mine = _mean_outputs[self.key] = {}
        answers = self.model, self.kind
        mean = mine.pop(answers, output)
        if len(mine) >= _MOST_MODELS:
            del mine[next(iter(mine))]
        mine[answers] = mean + (output - mean) * _WEIGHT_OF_NEWEST


def kind() -> str:
    """Which tokens count: the proxy's ``general_settings.token_rate_limit_type``."""
    proxy = sys.modules.get("litellm.proxy.proxy_server")
    found = (getattr(proxy, "general_settings", None) or {}).get("token_rate_limit_type", "total")
    return found if found in ("input", "output") else "total"


def _reader(of: Any) -> Callable[[str], Any]:
    """Returns a field by its name, None where it is missing. of: a mapping or an object."""
    if type(of) is dict or isinstance(of, Mapping):  # the first test takes a tenth of the time
        return of.get
    return lambda name: getattr(of, name, None)


_TOTALS = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})


class Usage:
    """Input, output and total tokens of one answer. Tokens that the provider read from its cache
    count in none of them, as in LiteLLM's own limits; tokens that it wrote to its cache do."""

    __slots__ = ("input", "output", "total")

    def __init__(self, usage: Any) -> None:
        if type(usage) is dict and _TOTALS.issuperset(usage):  # the usual answer of a provider
            given, made = usage.get("prompt_tokens"), usage.get("completion_tokens")
            total = usage.get("total_tokens")
            if given and type(given) is type(made) is type(total) is int:
                self.input, self.output, self.total = given, made, total or given + made
                return
        field = _reader(usage)
        self.input = int(field("prompt_tokens") or 0)
        self.output = int(field("completion_tokens") or field("output_tokens") or 0)
        if not self.input and not self.output:  # Google's names
            self.input = int(field("promptTokenCount") or 0)
            self.input -= min(int(field("cachedContentTokenCount") or 0), self.input)
            self.output = int(field("candidatesTokenCount") or 0)
            self.output += int(field("thoughtsTokenCount") or 0)
        if not self.input:  # of the Responses API, or Anthropic's, whose input is without its cache
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

    def add(self, other: Usage) -> None:
        """Of another answer to the same request."""
        self.input += other.input
        self.output += other.output
        self.total += other.total

    def of_kind(self, kind: str) -> int:
        """The tokens that count for limits of the kind; the total, where only that is known."""
        if not self.input and not self.output:
            return self.total
        if kind == "total":
            return self.total
        return self.input if kind == "input" else self.output


def _in_body(body: str) -> Usage | None:
    """Of the answer to a pass-through, where it is JSON with a field ``usage``."""
    if "usage" not in body or len(body) > _MOST_BODY:
        return None
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):  # for example the events of a stream
        return None
    return usage_of(found) if isinstance(found, dict) and "response" not in found else None


def usage_of(response: Any) -> Usage | None:
    """Of LiteLLM's answer, of several (it answers a list of models with a list), or of a
    standard_logging_object. None where it says nothing of tokens."""
    if isinstance(response, list):
        known = [found for found in map(usage_of, response) if found is not None]
        for other in known[1:]:
            known[0].add(other)
        return known[0] if known else None
    if type(response) is dict or isinstance(response, Mapping):
        usage = response.get("usage") or response.get("usageMetadata")
        if usage is None and "total_tokens" in response:
            usage = response
        if usage is None and type(response.get("response")) is str:  # of a pass-through
            return _in_body(response["response"])
    else:
        usage = getattr(response, "usage", None)
    found = None if usage is None else Usage(usage)
    return found if found is not None and (found.total or found.input or found.output) else None
