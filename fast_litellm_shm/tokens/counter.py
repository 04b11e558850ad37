"""Token counts by tiktoken. A text that any worker has counted is looked up by its hash."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from itertools import chain
from typing import Any

from fast_litellm_shm._shared import features, log, performance
from fast_litellm_shm._shared.native import Memo, address, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import SegmentError
from fast_litellm_shm.tokens import batch as token_batch
from fast_litellm_shm.tokens import encoding, prices
from fast_litellm_shm.tokens.batch import BatchCounter

_FEATURE, _BATCH_FEATURE = "rust_token_counting", "batch_token_counting"
_MOST_MODELS = 1024  # whose encoding is remembered: clients may choose the names

# The tenant whose texts litellm counts in this context (acceleration.py). A program that serves
# several tenants sets it.
tenant_of_context: ContextVar[str | None] = ContextVar("fast_litellm_shm_tenant", default=None)


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
    encode: Callable[[str], list[int]] | None = None,
    enabled: Callable[[], bool] | None = None,
) -> Memo:
    """``compute`` behind the memo of the segment. ``name`` names all that the count depends on.
    ``encode``: a faster function that returns the tokens of a str without lone surrogates.
    ``enabled``: whether to use the memo; called at every 32nd count, since it takes longer than a
    look into the memo. None: the caller has checked."""
    text = name.encode()
    number = lib.fshm_memo_encoding(segment._handle, text, len(text))
    metric, every = performance.measured("token_counting", operation, segment)
    owner = segment, segment._handle
    return Memo(owner, address(segment._handle), number, compute, metric, every, encode, enabled)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_tenant(tenant: object) -> None:
    if not isinstance(tenant, (str, bytes)):
        raise TypeError(f"tenant must be a str, bytes or None, not {_shown(tenant)}")


def _plain(name: str) -> Callable[[Any], int]:
    """A function that counts with tiktoken alone. encode_ordinary() is encode(text,
    disallowed_special=()) without the search for special tokens."""
    encode = encoding.load(name).encode_ordinary

    def count(text: Any) -> int:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {_shown(text)}")
        return len(encode(text))

    return count


class _Counting:
    """One encoding's counting function, plain and with the memo."""

    def __init__(self, name: str, segment: Segment | None) -> None:
        from fast_litellm_shm._shared.dependencies import tiktoken

        self.plain = _plain(name)
        self.batch = BatchCounter(name)
        self.memo: Memo | None = None
        if segment is not None:
            found = encoding.load(name)
            # What encode_ordinary() calls, without its care for surrogates: the memo finds those.
            core = getattr(getattr(found, "_core_bpe", None), "encode_ordinary", None)
            self.memo = make_memo(
                segment,
                f"tiktoken {tiktoken.__version__} {name}",
                self.plain,
                "count",
                core or found.encode_ordinary,
                _enabled,
            )
        self.count: Callable[[Any], int] = self.memo.count if self.memo else self.plain

    def count_of(self, tenant: str | bytes) -> Callable[[Any], int]:
        """count() for this tenant, with what the memo keeps for it."""
        memo = self.memo
        return self.plain if memo is None else lambda text: memo.count_for(text, tenant)


class SimpleTokenCounter:
    """Counts tokens exactly as tiktoken does. All workers share a memo of what any has counted.

    model_max_tokens: 1 or more; the limit of models that the price map does not have. Texts are
    counted in the model's own encoding, by tiktoken's table; provider and region prefixes
    (``azure/eu/gpt-4o``) are ignored. default_encoding: for no model, and for models that the table
    does not have (Claude, Llama, ...): ``cl100k_base``, as in litellm; the count of such a model is
    an estimate. segment: where the memo is, by default :meth:`Segment.default`; if that cannot be
    opened, tokens are counted without a memo, and a warning is logged.

    A count depends on nothing but the text: it is ``len(encoding.encode(text,
    disallowed_special=()))``. The memo keeps keyed hashes, no texts.

    The time of a count tells whether the text was counted before. Where several tenants use one
    segment and must not learn that of each other, give each count a ``tenant``: the memo then keeps
    the text for this tenant alone. Counts without a tenant share what they keep.

    Encodings and prices are loaded when they are first used. Raises TypeError or ValueError for bad
    arguments, EncodingUnavailableError where the file of an encoding cannot be had, and
    MissingPackageError where tiktoken is not installed.
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

        A text that any worker of this host has counted (for this tenant) is looked up by its hash.
        Lone surrogates count as tiktoken counts them. The text of a special token counts as
        ordinary text.
        """
        if tenant is not None:
            return self._count_for(text, model, tenant)
        try:
            return self._by_model[model](text)
        except Exception as error:
            failure = error.with_traceback(None)  # else it and this frame would keep each other
        return self._count_again(text, model, failure)

    def _count_for(self, text: str, model: str | None, tenant: str | bytes) -> int:
        counting = self._prepare(model)
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
        """The tokens of each text, in order: as fast as a loop, and faster where many texts are new
        and cores are free.

        A large batch has 100,000 characters or more, and 50 or more a text. For each 0.1 s that a
        process has spent in large batches, it gets a helping thread for later ones: at most one for
        each other core, and 7. Each has an encoding of its own (20 to 45 MB). Making one takes 40
        to 80 ms, in which the whole process stands still. Helpers are not used while the other
        cores are busy. ``FAST_LITELLM_BATCH_TOKEN_COUNTING=false``: no such threads. Raises as
        :meth:`count_tokens` does.
        """
        if isinstance(texts, (str, bytes)) or not isinstance(texts, Iterable):
            raise TypeError(f"texts must be a list of str, not {_shown(texts)}")
        texts = list(texts)
        known = self._by_model.get(model) if isinstance(model, (str, type(None))) else None
        count = known or self._prepare(model).count
        if tenant is not None:
            _check_tenant(tenant)
            count = self._prepare(model).count_of(tenant)
        try:
            chars = sum(map(len, texts))
            if token_batch.is_large(len(texts), chars) and features.is_enabled(_BATCH_FEATURE):
                counting = self._prepare(model)
                parts = token_batch.parts(texts, chars)
                found = (self._count_part(counting, *part, count, tenant) for part in parts)
                return list(chain.from_iterable(found))
            return list(map(count, texts))
        except Exception as error:
            failure = error
        for i, text in enumerate(texts):  # checked only now: the counts above fail for such a text
            if not isinstance(text, str):
                raise TypeError(f"texts[{i}] must be a str, not {_shown(text)}")
        counts = list(map(self._prepare(model).plain, texts))  # raises what is tiktoken's
        features.record_error(_FEATURE, failure)
        return counts

    @staticmethod
    def _count_part(
        counting: _Counting,
        texts: list[str],
        chars: int,
        count: Callable[[Any], int],
        tenant: str | bytes | None,
    ) -> list[int]:
        if not counting.batch.may_help(len(texts), chars):
            begun = time.perf_counter()
            counts = list(map(count, texts))
            counting.batch.spend(time.perf_counter() - begun)
            return counts
        memo = counting.memo if features.is_enabled(_FEATURE) else None
        if memo is None:
            known: list[Any] = [None] * len(texts)
        elif tenant is None:
            known = list(map(memo.get, texts))
        else:
            known = [memo.get_for(text, tenant) for text in texts]
        if None not in known:
            return known
        pairs = list(zip(texts, known, strict=True))
        new = dict.fromkeys(text for text, tokens in pairs if tokens is None)
        found = counting.batch.count(list(new))
        if memo is not None:
            for text, tokens in found.items():
                memo.put(text, tokens, tenant)
        return [found[text] if tokens is None else tokens for text, tokens in pairs]

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
        self._by_model[model] = counting.count
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
