"""encode, decode, fits and truncate: as tiktoken would have them, on texts of any kind."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from support import texts

from fast_litellm_shm import SimpleTokenCounter
from fast_litellm_shm.tokens import counter as tokens
from fast_litellm_shm.tokens import encoding

NAMES: list[str] = [
    name
    for name in ("cl100k_base", "o200k_base", "r50k_base", "p50k_base")
    if name in texts.encodings_at_hand()
]
pytestmark = pytest.mark.skipif(not NAMES, reason=texts.WHY_NOT)
NAME = st.sampled_from(NAMES or ["none"])
SPECIAL = ("<|endoftext|>", "<|endofprompt|>", "<|fim_prefix|>", "<|endoftext")
PARTS = st.sampled_from(
    [
        *texts.CORPUS.values(),
        *SPECIAL,
        " ",
        "\n",
        "'s",
        "'LL",
        "123",
        "中",
        "é",
        "é",
        "👍🏽",
        "\ud800",
    ]
)
TEXTS = st.one_of(
    st.text(max_size=60),
    st.lists(st.one_of(PARTS, st.text(max_size=8)), max_size=6).map("".join),
    st.text(alphabet="ab 1'\n", max_size=60),
)


@functools.cache
def counter_of(engine: bool) -> SimpleTokenCounter:
    """By the engine, or by tiktoken in its place. No segment: nothing is remembered."""
    counter = SimpleTokenCounter()
    for name in NAMES:
        counter._by_encoding[name] = found = tokens._Counting(name, None)
        assert found._engine is not None
        if not engine:
            found._engine = None
    return counter


def replaced(text: str) -> str:
    """As tiktoken replaces surrogates."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def cut(found: tiktoken.Encoding, text: str, most: int) -> str:
    """What truncate() promises, tried out one by one."""
    made = found.encode_ordinary(text)
    if len(made) <= most:
        return text
    whole = replaced(text).encode()
    ends = [found.decode_bytes(made[:kept]) for kept in range(most + 1)]
    for end in reversed(ends):
        assert whole.startswith(end)
        try:
            start = end.decode()
        except UnicodeDecodeError:
            continue
        if len(found.encode_ordinary(start)) <= most:
            return start
    raise AssertionError("the empty text fits")


@settings(deadline=None)  # the first example of an encoding maps or loads it
@given(TEXTS, NAME, st.booleans())
def test_encode_and_decode(text: str, name: str, engine: bool) -> None:
    counter, found = counter_of(engine), encoding.load(name)
    made = counter.encode(text, name)
    assert made == found.encode(text, disallowed_special=())
    assert counter.count_tokens(text, name) == len(made)
    assert counter.decode(made, name) == found.decode(made) == replaced(text)


@settings(deadline=None)
@given(TEXTS, NAME, st.sets(st.sampled_from(SPECIAL[:3])) | st.just("all"))
def test_encode_with_special_tokens(text: str, name: str, allowed: Any) -> None:
    found = encoding.load(name)
    if allowed != "all":
        allowed &= found.special_tokens_set
    expected = found.encode(text, allowed_special=allowed, disallowed_special=())
    assert counter_of(True).encode(text, name, allowed_special=allowed) == expected


@settings(deadline=None)
@given(st.data(), NAME, st.booleans())
def test_decode_any_tokens(data: st.DataObject, name: str, engine: bool) -> None:
    """They may be cut inside a character."""
    found = encoding.load(name)
    ranks = st.integers(0, 50_000) | st.sampled_from(sorted(found._special_tokens.values()))
    made = data.draw(st.lists(ranks.filter(lambda rank: rank < 50_000 or rank > 50_280)))
    made = [rank for rank in made if rank < 50_000 or rank in found._special_tokens.values()]
    assert counter_of(engine).decode(made, name) == found.decode(made)


@settings(deadline=None)
@given(TEXTS, NAME, st.integers(0, 40), st.booleans())
def test_fits_and_truncate(text: str, name: str, most: int, engine: bool) -> None:
    counter, found = counter_of(engine), encoding.load(name)
    assert counter.fits(text, most, name) == (len(found.encode_ordinary(text)) <= most)
    start = counter.truncate(text, most, name)
    assert start == cut(found, text, most)
    assert counter.fits(start, most, name)
    assert replaced(text).startswith(replaced(start))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", texts.CORPUS)
def test_truncate_at_every_token(name: str, kind: str) -> None:
    text, found, counter = texts.CORPUS[kind][:300], encoding.load(name), counter_of(True)
    for most in range(len(found.encode_ordinary(text)) + 2):
        assert counter.truncate(text, most, name) == cut(found, text, most)


def test_what_fits_is_the_same_object() -> None:
    text = texts.CORPUS["russian"] + "\ud800"
    assert counter_of(True).truncate(text, 10**6) is text
    assert counter_of(True).truncate(text, 2**70) is text
    assert counter_of(True).fits(text, 2**70)


@pytest.mark.parametrize("bad", [-1, 10**9, 100_256, 2**32, 2**64, -(2**70)])
@pytest.mark.parametrize("engine", [True, False])
def test_no_token(bad: int, engine: bool) -> None:
    """tiktoken's exception, where it has one of Python's own; the message says which number."""
    with pytest.raises(KeyError, match=str(abs(bad)) if engine else "no such token"):
        counter_of(engine).decode([1, bad], "cl100k_base")
    with pytest.raises(KeyError):
        encoding.load("cl100k_base").decode([10**9])


@pytest.mark.parametrize("bad", [["a"], [1.5], [None], 7, None, "text"])
def test_tokens_must_be_ints(bad: Any) -> None:
    with pytest.raises(TypeError):
        counter_of(True).decode(bad)


class _Index:
    def __index__(self) -> int:
        return 1


def test_tokens_may_be_any_ints() -> None:
    """As those of numpy."""
    counter = counter_of(True)
    odd: list[Any] = [_Index(), True]
    assert counter.decode(iter(odd)) == counter.decode((1, 1))
    assert counter.decode([]) == ""


def test_bad_arguments() -> None:
    counter = counter_of(True)
    calls: list[Any] = [counter.encode, lambda text: counter.fits(text, 1)]
    calls.append(lambda text: counter.truncate(text, 1))
    for call in calls:
        for bad in (None, 7, b"bytes"):
            with pytest.raises(TypeError, match=f"text must be a str, not {bad!r}"):
                call(bad)
    wrong: Any
    for wrong in (1.5, "3", None, True):
        for limited in (counter.fits, counter.truncate):
            with pytest.raises(TypeError, match=f"max_tokens must be an int, not {wrong!r}"):
                limited("x", wrong)
            with pytest.raises(ValueError, match="max_tokens must be 0 or more, not -1"):
                limited("x", -1)
    for special in ("none", {"<|x|>"}, ["<|endoftext|>", "a"]):
        with pytest.raises(ValueError, match=r"must be 'all' or some of .*endoftext"):
            counter.encode("x", allowed_special=special)
    with pytest.raises(TypeError, match="model must be a str or None, not 7"):
        counter.encode("x", 7)  # type: ignore[arg-type]


def test_fits_stops_early() -> None:
    """The rest of the text is not looked at: a hundred times as much takes no longer."""
    counter = counter_of(True)
    engine: Any = counter._by_encoding["cl100k_base"]._engine
    text = "word " * 20_000_000
    assert not counter.fits(text, 10)
    # A text of 100 MB takes 200 ms; a thousand calls would take minutes.
    assert not any(engine.fits(text, 10) for _ in range(1000))
