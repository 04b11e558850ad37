"""Tokens as tiktoken has them, from tables that the whole host shares.

The engine in C counts, encodes, decodes and cuts (:mod:`fast_litellm_shm.tokens.vocabulary`).
tiktoken does so in its place where an encoding has a pattern that the engine does not know, and
where the feature ``rust_token_counting`` is off. A long text that any worker has counted is looked
up by its hash.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from fast_litellm_shm._native import Vocabulary
from fast_litellm_shm._shared import features, log, performance
from fast_litellm_shm._shared.native import Memo, address, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import SegmentError
from fast_litellm_shm.tokens import chat, encoding, prices, vocabulary

_FEATURE = "rust_token_counting"
_MOST_MODELS = 1024  # whose encoding is remembered: clients may choose the names
_AT_ONCE = 64  # texts of a batch; then another thread may run. Texts that take long let others run

# The tenant whose texts litellm counts in this context (acceleration.py). A program that serves
# several tenants sets it.
tenant_of_context: ContextVar[str | bytes | None] = ContextVar(
    "fast_litellm_shm_tenant", default=None
)


def _enabled() -> bool:
    """Never raises, not even a warning that the program turns into an error: litellm may call."""
    try:
        return features.is_enabled(_FEATURE)
    except Exception as error:
        log.warning("%s", error)
        return False


def make_memo(
    segment: Segment,
    name: str,
    compute: Callable[[Any], int],
    operation: str,
    tables: Vocabulary | None = None,
    enabled: Callable[[], bool] | None = None,
) -> Memo:
    """``compute`` behind the memo of the segment. ``name`` names all that the count depends on.
    ``tables``: count with these in place of ``compute``; short texts are not remembered then.
    ``enabled``: whether to use the memo and the tables; called at every 32nd count, since it takes
    longer than a look into the memo. None: the caller has checked."""
    text = name.encode()
    number = lib.fshm_memo_encoding(segment._handle, text, len(text))
    metric, every = performance.measured("token_counting", operation, segment)
    owner = segment, segment._handle
    return Memo(owner, address(segment._handle), number, compute, metric, every, tables, enabled)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_tenant(tenant: object) -> None:
    if not isinstance(tenant, (str, bytes)):
        raise TypeError(f"tenant must be a str, bytes or None, not {_shown(tenant)}")


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, not {_shown(text)}")


def _check_most(max_tokens: object) -> None:
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int):
        raise TypeError(f"max_tokens must be an int, not {max_tokens!r}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens must be 0 or more, not {max_tokens}")


class _Tables(Protocol):
    """What the engine's Vocabulary and tiktoken's encoding both do."""

    def count(self, text: str, /) -> int: ...
    def encode(self, text: str, /) -> list[int]: ...
    def decode(self, tokens: list[int], /) -> bytes: ...
    def fits(self, text: str, max_tokens: int, /) -> bool: ...
    def truncate(self, text: str, max_tokens: int, /) -> str: ...
    def special_tokens(self) -> dict[str, int]: ...


class _Tiktoken:
    """tiktoken's encoding of that name, loaded when it is first asked. encode_ordinary() is
    encode(text, disallowed_special=()) without the search for special tokens."""

    def __init__(self, name: str) -> None:
        self._name = name

    def encode(self, text: str) -> list[int]:
        return encoding.load(self._name).encode_ordinary(text)

    def count(self, text: Any) -> int:
        _check_text(text)  # the memo leaves what is no str to this
        return len(self.encode(text))

    def decode(self, tokens: list[int]) -> bytes:
        try:
            return encoding.load(self._name).decode_bytes(tokens)
        except (KeyError, OverflowError) as error:
            raise ValueError(f"there is no such token: {error}") from None

    def fits(self, text: str, max_tokens: int) -> bool:
        return self.count(text) <= max_tokens

    def truncate(self, text: str, max_tokens: int) -> str:
        tokens = self.encode(text)
        if len(tokens) <= max_tokens:
            return text
        for kept in range(max_tokens, 0, -1):
            try:
                start = self.decode(tokens[:kept]).decode()
            except UnicodeDecodeError:  # ends inside a character
                continue
            if self.fits(start, max_tokens):  # split without what followed it, it may have more
                return start
        return ""

    def special_tokens(self) -> dict[str, int]:
        return dict(encoding.load(self._name)._special_tokens)


class _Counting:
    """How the texts of one encoding are counted: by the engine, else by tiktoken; with the memo."""

    def __init__(self, name: str, segment: Segment | None) -> None:
        self._tiktoken = _Tiktoken(name)
        self._engine = vocabulary.load(name)
        self.memo: Memo | None = None
        if self._engine is None:
            encoding.load(name)  # raises where that cannot be had
        if segment is not None:
            self.memo = make_memo(
                segment,
                f"tiktoken {vocabulary.installed_version()} {name}",
                self._tiktoken.count,
                "count",
                self._engine,
                _enabled,
            )

    def tables(self) -> _Tables:
        """Those to use now."""
        return self._engine if self._engine is not None and _enabled() else self._tiktoken

    def plain(self, text: Any) -> int:
        """Without the memo."""
        _check_text(text)
        return self.tables().count(text)

    def count_of(self, tenant: str | bytes | None) -> Callable[[Any], int]:
        """A function that counts, with what the memo keeps for this tenant."""
        memo = self.memo
        if memo is None:
            return self.plain
        return memo.count if tenant is None else lambda text: memo.count_for(text, tenant)


class SimpleTokenCounter:
    """Counts, encodes, decodes and cuts exactly as tiktoken does, from tables that the whole host
    shares.

    model_max_tokens: 1 or more; the limit of models that the price map does not have. Texts are
    counted in the model's own encoding, by tiktoken's table; provider and region prefixes
    (``azure/eu/gpt-4o``) are ignored. default_encoding: for no model, and for models that the table
    does not have (Claude, Llama, ...): ``cl100k_base``, as in litellm; the count of such a model is
    an estimate. segment: where the memo is, by default :meth:`Segment.default`; if that cannot be
    opened, tokens are counted without a memo, and a warning is logged.

    A count depends on nothing but the text: it is ``len(encoding.encode(text,
    disallowed_special=()))``. Counts of texts of 256 bytes of UTF-8 or more are remembered for all
    workers. The memo keeps keyed hashes, no texts.

    The time of a count tells whether the text was counted before. Where several tenants use one
    segment and must not learn that of each other, give each count a ``tenant``: the memo then keeps
    the text for this tenant alone. Counts without a tenant share what they keep.

    The tables of an encoding are mapped when they are first used, from a file in
    FAST_LITELLM_SHM_CACHE. The first process of a host makes that file from tiktoken's, in 1 to
    3 s. Raises TypeError or ValueError for bad arguments, EncodingUnavailableError where there is
    no such file and tiktoken's cannot be had, and MissingPackageError where tiktoken is not
    installed.
    """

    def __init__(
        self,
        model_max_tokens: int = 4096,
        *,
        default_encoding: str = encoding.DEFAULT,
        segment: Segment | None = None,
    ) -> None:
        if isinstance(model_max_tokens, bool) or not isinstance(model_max_tokens, int):
            raise TypeError(f"model_max_tokens must be an int, not {model_max_tokens!r}")
        if model_max_tokens < 1:
            raise ValueError(f"model_max_tokens must be at least 1, not {model_max_tokens}")
        if segment is not None and not isinstance(segment, Segment):
            raise TypeError(f"segment must be a Segment, not {segment!r}")
        if not isinstance(default_encoding, str):
            raise TypeError(f"default_encoding must be a str, not {default_encoding!r}")
        if default_encoding != encoding.DEFAULT and default_encoding not in encoding.names():
            known = ", ".join(sorted(encoding.names()))
            raise ValueError(f"default_encoding must be one of {known}, not {default_encoding!r}")
        self._model_max_tokens = model_max_tokens
        self._default_encoding = default_encoding
        self._given = segment
        self._segment = segment
        self._by_model: dict[str | None, Callable[[Any], int]] = {}
        self._counting_by_model: dict[str | None, _Counting] = {}
        self._by_encoding: dict[str, _Counting] = {}

    @property
    def model_max_tokens(self) -> int:
        """The limit of models that the price map does not have."""
        return self._model_max_tokens

    def encoding_name(self, model: str | None = None) -> str:
        """The encoding that a model's texts are counted in."""
        return encoding.name_of(model, self._default_encoding)

    def count_tokens(
        self, text: str, model: str | None = None, *, tenant: str | bytes | None = None
    ) -> int:
        """The number of tokens of the text, in the model's encoding.

        A long text that any worker of this host has counted (for this tenant) is looked up by its
        hash. Other threads run during a text of 4 KB or more. Lone surrogates count as tiktoken
        counts them. The text of a special token counts as ordinary text.
        """
        if tenant is not None:
            return self._count_for(text, model, tenant)
        try:
            return self._by_model[model](text)
        except Exception as error:
            failure = error.with_traceback(None)  # else it and this frame would keep each other
        return self._count_again(text, model, failure)

    def _count_for(self, text: str, model: str | None, tenant: str | bytes) -> int:
        counting = self._counting(model)
        _check_tenant(tenant)
        if counting.memo is None:
            return counting.plain(text)
        try:
            return counting.memo.count_for(text, tenant)
        except Exception as error:
            failure = error.with_traceback(None)
        count = counting.plain(text)  # raises what is tiktoken's, or the caller's
        features.record_error(_FEATURE, failure)
        return count

    def _count_again(self, text: str, model: str | None, failure: Exception) -> int:
        """After a count that failed: the model is new here, the text is no str, or it is an
        error."""
        if not isinstance(failure, (KeyError, TypeError)) or self._is_known(model):
            count = self._prepare(model).plain(text)  # raises what is tiktoken's, or the caller's
            features.record_error(_FEATURE, failure)
            return count
        self._prepare(model)
        return self.count_tokens(text, model)

    def _is_known(self, model: object) -> bool:
        return isinstance(model, (str, type(None))) and model in self._by_model

    def count_tokens_batch(
        self,
        texts: Iterable[str],
        model: str | None = None,
        *,
        tenant: str | bytes | None = None,
    ) -> list[int]:
        """The tokens of each text, in order: :meth:`count_tokens` of each, without its cost of a
        call. Other threads run meanwhile. Raises as count_tokens() does."""
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a list of str, not {_shown(texts)}")
        texts = list(texts)
        count = self._count_of(model, tenant)
        counts: list[int] = []
        try:
            for start in range(0, len(texts), _AT_ONCE):
                counts += map(count, texts[start : start + _AT_ONCE])
            return counts
        except Exception as error:
            failure = error
        for i, text in enumerate(texts):  # checked only now: the counts above fail for such a text
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] must be a str, not {_shown(text)}")
        counts = list(map(self._prepare(model).plain, texts))  # raises what is tiktoken's
        features.record_error(_FEATURE, failure)
        return counts

    # tokens --------------------------------------------------------------------------------------

    def encode(
        self,
        text: str,
        model: str | None = None,
        *,
        allowed_special: str | Collection[str] = (),
    ) -> list[int]:
        """The tokens of the text, as numbers, in the model's encoding.

        The text of a special token (``<|endoftext|>``) is ordinary text, as for a count.
        allowed_special: those that are not, or ``"all"``. Lone surrogates are encoded as U+FFFD.
        Raises ValueError for an allowed_special that is no special token of the encoding.
        """
        _check_text(text)
        tables = self._tables(model)
        if not allowed_special:
            return tables.encode(text)
        known = tables.special_tokens()
        chosen = known if allowed_special == "all" else allowed_special
        if isinstance(chosen, str) or not known.keys() >= {*chosen}:
            raise ValueError(
                f"allowed_special must be 'all' or some of {', '.join(sorted(known))}, "
                f"not {allowed_special!r}"
            )
        tokens: list[int] = []
        parts = re.split(f"({'|'.join(map(re.escape, sorted(chosen)))})", text)
        for i, part in enumerate(parts):
            if i % 2:
                tokens.append(known[part])
            else:
                tokens += tables.encode(part)
        return tokens

    def decode(self, tokens: Iterable[int], model: str | None = None) -> str:
        """The text of tokens, special ones too, in the model's encoding. Bytes that are no UTF-8
        (tokens that were cut inside a character) are U+FFFD. Raises KeyError for a number that is
        no token of the encoding, and TypeError for what is no int."""
        tables, given = self._tables(model), [*map(operator.index, tokens)]
        try:
            return tables.decode(given).decode("utf-8", "replace")
        except (KeyError, OverflowError, ValueError) as error:
            raise KeyError(f"{error.args[0]}: {self.encoding_name(model)}") from None

    def fits(self, text: str, max_tokens: int, model: str | None = None) -> bool:
        """Whether the text has at most max_tokens tokens (0 or more) in the model's encoding. Stops
        where there are more: of a long text, only the beginning is counted."""
        _check_text(text)
        _check_most(max_tokens)
        return self._tables(model).fits(text, max_tokens)

    def truncate(self, text: str, max_tokens: int, model: str | None = None) -> str:
        """The longest start of the text that ends where one of its first max_tokens tokens ends (0
        or more), not inside a character, and that itself has at most max_tokens tokens in the
        model's encoding. A text that fits is returned as it is. In one that is cut, lone surrogates
        become U+FFFD."""
        _check_text(text)
        _check_most(max_tokens)
        return self._tables(model).truncate(text, max_tokens)

    def count_chat(
        self,
        messages: Iterable[Mapping[str, Any]],
        model: str,
        tools: Sequence[Any] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        *,
        count_response_tokens: bool = False,
        use_default_image_token_count: bool = False,
        default_token_count: int | None = None,
        tenant: str | bytes | None = None,
    ) -> int:
        """The tokens of a chat: what ``litellm.token_counter(model=model, messages=messages, ...)``
        returns, whose arguments these are. ``docs/tokens.md`` has its rules,
        and where it differs. Raises ValueError for messages that cannot be counted.
        """
        found = chat.encoding_name(model) if self._default_encoding == encoding.DEFAULT else None
        count = self._count_of(found or model, tenant)
        outer = tenant_of_context.get()
        token = tenant_of_context.set(outer if tenant is None else tenant)  # for texts of litellm's
        try:
            return chat.count(
                messages,
                model,
                count,
                tools,
                tool_choice,
                count_response_tokens=count_response_tokens,
                use_default_image_token_count=use_default_image_token_count,
                default_token_count=default_token_count,
            )
        finally:
            tenant_of_context.reset(token)

    def _count_of(self, model: str | None, tenant: str | bytes | None) -> Callable[[Any], int]:
        """A function that counts texts of this model for this tenant."""
        if tenant is not None:
            _check_tenant(tenant)
        return self._counting(model).count_of(tenant)

    def _tables(self, model: str | None) -> _Tables:
        """Of the model's encoding, without the memo."""
        return self._counting(model).tables()

    def _counting(self, model: str | None) -> _Counting:
        try:
            return self._counting_by_model[model]
        except (KeyError, TypeError):
            return self._prepare(model)

    # models --------------------------------------------------------------------------------------

    def estimate_cost(self, input_tokens: int, output_tokens: int, model: str) -> float:
        """The cost in dollars: :func:`fast_litellm_shm.tokens.prices.estimate_cost`. Raises
        UnknownModelError for a model without a known price."""
        return prices.estimate_cost(input_tokens, output_tokens, model)

    def get_model_limits(self, model: str) -> dict[str, int | None]:
        """``context_window``, ``max_input_tokens`` and ``max_output_tokens`` of a model, in tokens,
        from the price map. Each is ``model_max_tokens`` for a model that the map does not have.
        max_output_tokens is None where the map has the model without it (embeddings)."""
        found = prices.limits(model)
        if found is None:
            names = ("context_window", "max_input_tokens", "max_output_tokens")
            return dict.fromkeys(names, self._model_max_tokens)
        for name in ("context_window", "max_input_tokens"):
            if found[name] is None:
                found[name] = self._model_max_tokens
        return found

    def validate_input(self, text: str, model: str, *, tenant: str | bytes | None = None) -> bool:
        """True if the text fits the model's input; else ValueError, with both numbers."""
        most = self.get_model_limits(model)["max_input_tokens"] or 0
        tokens = self.count_tokens(text, model, tenant=tenant)
        if tokens > most:
            raise ValueError(f"the text has {tokens} tokens, but {model} takes at most {most}")
        return True

    def _prepare(self, model: str | None) -> _Counting:
        """The counting function of a model; loads its encoding the first time."""
        name = self.encoding_name(model)
        counting = self._by_encoding.get(name)
        if counting is None:
            counting = self._by_encoding[name] = self._open(name)
        if len(self._by_model) >= _MOST_MODELS:
            self._by_model.clear()
            self._counting_by_model.clear()
        self._by_model[model] = counting.count_of(None)
        self._counting_by_model[model] = counting
        return counting

    def _open(self, name: str) -> _Counting:
        try:
            if self._segment is None:
                self._segment = Segment.default()
            return _Counting(name, self._segment)
        except SegmentError as error:
            features.record_error(_FEATURE, error)
            log.warning("tokens are counted without the shared memo: %s", error)
            return _Counting(name, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (self._model_max_tokens, self._default_encoding, self._given)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self._model_max_tokens}, "
            f"default_encoding={self._default_encoding!r})"
        )


def _remake(most: int, default_encoding: str, segment: Segment | None) -> SimpleTokenCounter:
    return SimpleTokenCounter(most, default_encoding=default_encoding, segment=segment)
