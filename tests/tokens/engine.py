"""Vocabularies for the tests of the engine that counts tokens: each with tiktoken's own encoding."""

from __future__ import annotations

import functools
import itertools
import random

import tiktoken
from support import texts

from fast_litellm_shm import _native
from fast_litellm_shm.tokens import encoding, vocabulary

PATTERNS = list(vocabulary.PATTERNS)  # r50k, cl100k, o200k
NAMES = {1: "p50k_base", 2: "cl100k_base", 3: "o200k_base"}


def make(pattern: str, ranks: dict[bytes, int]) -> tuple[tiktoken.Encoding, _native.Vocabulary]:
    """An encoding by tiktoken, and the same for the engine."""
    found = tiktoken.Encoding(
        "test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|end|>": 1_000_000}
    )
    compiled = vocabulary.compile_encoding(found)
    assert compiled is not None
    return found, compiled


@functools.cache
def pairs(pattern: str) -> tuple[tiktoken.Encoding, _native.Vocabulary]:
    """All pairs of bytes are tokens, ranked at random: so nearly every other end of a piece shows in
    its tokens. Needs no file of tiktoken's."""
    both = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    random.Random(1).shuffle(both)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks.update({pair: 256 + i for i, pair in enumerate(both)})
    return make(pattern, ranks)


@functools.cache
def real(name: str) -> tuple[tiktoken.Encoding, _native.Vocabulary]:
    """One of tiktoken's own."""
    found = encoding.load(name)
    compiled = vocabulary.compile_encoding(found)
    assert compiled is not None, f"the engine does not take {name}"
    return found, compiled


def at_hand() -> list[str]:
    """The encodings of tiktoken that can be loaded here."""
    return list(texts.encodings_at_hand())


def assert_equal(
    text: str, encoding_: tiktoken.Encoding, compiled: _native.Vocabulary, what: str = ""
) -> None:
    """Both give the same tokens, and the same count."""
    expected = encoding_.encode_ordinary(text)
    shown = f"{what}{text[:200]!a}"
    assert compiled.encode(text) == expected, shown
    assert compiled.count(text) == len(expected), shown
