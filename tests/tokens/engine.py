"""Vocabularies for the tests of the engine that counts tokens, each beside tiktoken's encoding."""

from __future__ import annotations

import functools
import itertools
import random

import tiktoken
from support import texts

from fast_litellm_shm import _native
from fast_litellm_shm.tokens import encoding, vocabulary

Pair = tuple[tiktoken.Encoding, _native.Vocabulary]
PATTERNS = list(vocabulary.PATTERNS)  # r50k, cl100k, o200k


def make(pattern: str, ranks: dict[bytes, int]) -> Pair:
    """An encoding by tiktoken, and the same for the engine."""
    found = tiktoken.Encoding(
        "test", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|end|>": 1_000_000}
    )
    compiled = vocabulary.compile_encoding(found)
    assert compiled is not None
    return found, compiled


@functools.cache
def pairs(pattern: str) -> Pair:
    """All pairs of bytes are tokens, ranked at random, so that another end of a piece shows in its
    tokens. Needs no file of tiktoken's."""
    both = [bytes(pair) for pair in itertools.product(range(256), repeat=2)]
    random.Random(1).shuffle(both)
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks.update({pair: 256 + i for i, pair in enumerate(both)})
    return make(pattern, ranks)


@functools.cache
def real(name: str) -> Pair:
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
