"""Who counts tokens: ours, tiktoken, and the peers, each by the call that costs it least.

A contender counts a list of texts, one call a text. Before it is measured, it counts the same texts
as tiktoken: a peer that counts otherwise, or cannot be had, is named.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from itertools import repeat

from bench import peers
from bench.result import OURS, REFERENCE
from bench.token_texts import KINDS, Texts, fresh
from fast_litellm_shm import SimpleTokenCounter
from fast_litellm_shm.tokens import encoding

MODELS = {"cl100k_base": "gpt-4", "o200k_base": "gpt-4o"}  # the encodings, a model of each
TIKTOKEN, BEST = "tiktoken", ("quicktok-v1", "toktok-rs")
INNER = "toktok-rs, its private count()"
SEED, SEED_KINDS = "fast-litellm", ("English", "Python code")

Counting = Callable[[list[str]], list[int]]


class WrongCountError(Exception):
    """Ours differs from tiktoken."""


def _ours(name: str) -> Counting:
    count, model = SimpleTokenCounter().count_tokens, MODELS[name]
    return lambda texts: list(map(count, texts, repeat(model)))


def _tiktoken(name: str) -> Counting:
    encode = encoding.load(name).encode_ordinary
    return lambda texts: list(map(len, map(encode, texts)))


def _quicktok(name: str) -> Counting:
    count = peers.need("quicktok").get_encoding(name).count
    return lambda texts: list(map(count, texts))


def _toktok(name: str) -> Counting:
    """What its manual offers takes a list, and is given one of one text; one thread, since to start
    others costs it as much again."""
    count = peers.need("toktok").batch_count
    return lambda texts: [count([text], name, 1)[0] for text in texts]


def _toktok_inner(name: str) -> Counting:
    """What that is made of, which its manual does not have."""
    count = peers.need("toktok")._encoding(name).count
    return lambda texts: list(map(count, texts))


def _rs_bpe(name: str) -> Counting:
    count = getattr(peers.need("rs_bpe.bpe").openai, name)().count
    return lambda texts: list(map(count, texts))


def _fast_litellm(name: str) -> Counting:
    count, model = peers.need("fast_litellm").SimpleTokenCounter().count_tokens, MODELS[name]
    return lambda texts: list(map(count, texts, repeat(model)))


_ALL: dict[str, Callable[[str], Counting]] = {
    OURS: _ours,
    TIKTOKEN: _tiktoken,
    BEST[0]: _quicktok,
    BEST[1]: _toktok,
    INNER: _toktok_inner,
    "rs-bpe": _rs_bpe,
    SEED: _fast_litellm,
}


def who(name: str) -> str:
    """Whom a contender's row belongs to."""
    package = name.split(",", maxsplit=1)[0]
    return REFERENCE if package == TIKTOKEN else package


def _differing(count: Counting, texts: Iterable[str], right: list[int]) -> int:
    found = count([fresh(text) for text in texts])
    return sum(a != b for a, b in zip(found, right, strict=True))


def opened(
    name: str, missing: dict[str, str], wanted: Iterable[str] = tuple(_ALL)
) -> dict[str, Counting]:
    """The contenders of an encoding, warm: each has counted texts of all kinds, as tiktoken does.
    missing: takes in why others are not there."""
    texts = [Texts(kind, 0).new(size) for kind in KINDS for size in (1, 10, 100, 1_000, 10_000)]
    right = _tiktoken(name)(texts)
    found: dict[str, Counting] = {}
    for each in wanted:
        try:
            count = _ALL[each](name)
        except peers.MissingError as error:
            missing[each] = str(error)
            continue
        wrong = _differing(count, texts, right)
        if not wrong:
            found[each] = count
        elif each == OURS:
            raise WrongCountError(f"{wrong} of {len(texts)} counts differ from tiktoken's: {name}")
        else:
            missing[each] = f"counts {wrong} of {len(texts)} texts otherwise than tiktoken: {name}"
    return found


def tiktoken_folder() -> dict[str, str]:
    """What a process that uses tiktoken itself needs in its environment to find its files where we
    do: in litellm's wheel."""
    folder = encoding.litellm_folder()
    if not folder or {"TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"} & set(os.environ):
        return {}
    return {"TIKTOKEN_CACHE_DIR": os.path.join(folder, "litellm_core_utils", "tokenizers")}
