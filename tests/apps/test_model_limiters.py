"""The rate limiters for LangChain and LlamaIndex, asked by their models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.language_models import FakeListChatModel
from langchain_core.rate_limiters import BaseRateLimiter as LangChainBase
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import MockLLM
from llama_index.core.rate_limiter import BaseRateLimiter as LlamaIndexBase

from fast_litellm_shm import FixedWindow, RateLimiter, RateLimitExceeded, Segment, TokenBucket
from fast_litellm_shm.integrations import langchain, llama_index

HOUR = FixedWindow(2, per=3600)


def ask_langchain(limiter: Any) -> None:
    FakeListChatModel(responses=["a word"], rate_limiter=limiter).invoke("hello")


def stream_langchain(limiter: Any) -> None:
    list(FakeListChatModel(responses=["a word"], rate_limiter=limiter).stream("hello"))


def ask_langchain_async(limiter: Any) -> None:
    asyncio.run(FakeListChatModel(responses=["a word"], rate_limiter=limiter).ainvoke("hello"))


def ask_llama(limiter: Any) -> None:
    model: Any = MockLLM()
    model.rate_limiter = limiter
    model.complete("hello")


def embedding(limiter: Any) -> Any:
    found: Any = MockEmbedding(embed_dim=1)
    found.rate_limiter = limiter
    return found


def embed_llama(limiter: Any) -> None:
    embedding(limiter).get_text_embedding("hello")


def embed_llama_async(limiter: Any) -> None:
    """(Not MockLLM: of a CustomLLM, LlamaIndex asks twice for an async call.)"""
    asyncio.run(embedding(limiter).aget_text_embedding("hello"))


ASKS: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "langchain": (langchain, ask_langchain),
    "langchain stream": (langchain, stream_langchain),
    "langchain async": (langchain, ask_langchain_async),
    "llama-index": (llama_index, ask_llama),
    "llama-index embedding": (llama_index, embed_llama),
    "llama-index async": (llama_index, embed_llama_async),
}


@pytest.mark.parametrize("which", ASKS)
def test_a_model_asks_before_each_call(which: str, segment: Segment) -> None:
    module, ask = ASKS[which]
    options: dict[str, Any] = {"name": "models", "segment": segment}
    limiter = module.SharedRateLimiter(HOUR, **options, max_wait=5)
    ask(limiter)
    ask(module.SharedRateLimiter(HOUR, **options, max_wait=9))  # another process's, so to say
    with pytest.raises(RateLimitExceeded, match="limiter 'models'.*max_wait is 5 s") as refused:
        ask(limiter)
    assert refused.value.retry_after is not None and refused.value.retry_after > 3500
    assert RateLimiter(HOUR, **options).peek("default").remaining == 0


@pytest.mark.parametrize("which", ASKS)
def test_a_call_waits_for_its_turn(which: str, segment: Segment) -> None:
    module, ask = ASKS[which]
    limiter = module.SharedRateLimiter(
        TokenBucket(50, per=1, burst=1), name="models", segment=segment
    )
    for _ in range(5):
        ask(limiter)


def test_keys_count_apart(segment: Segment) -> None:
    for key in ("ann", "bob"):
        limiter = langchain.SharedRateLimiter("1/hour", name="m", key=key, segment=segment)
        assert [limiter.acquire(blocking=False) for _ in range(2)] == [True, False]
        assert asyncio.run(limiter.aacquire(blocking=False)) is False


def test_they_are_what_the_libraries_take(segment: Segment) -> None:
    options: dict[str, Any] = {"name": "m", "segment": segment}
    assert isinstance(langchain.SharedRateLimiter("1/s", **options), LangChainBase)
    assert isinstance(llama_index.SharedRateLimiter("1/s", **options), LlamaIndexBase)


@pytest.mark.parametrize("module", [langchain, llama_index])
def test_bad_arguments(module: Any, segment: Segment) -> None:
    options: dict[str, Any] = {"name": "m", "segment": segment}
    with pytest.raises(ValueError, match="a limiter takes 1 to 4 limits, not 0"):
        module.SharedRateLimiter(**options)
    with pytest.raises(TypeError, match="key must be a str or bytes, not 5"):
        module.SharedRateLimiter("1/s", key=5, **options)
    with pytest.raises(TypeError, match="timeout must be a number of seconds or None, not '5'"):
        module.SharedRateLimiter("1/s", max_wait="5", **options)
