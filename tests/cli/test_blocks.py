"""Files in blocks: every place where a text is cut leaves the tokens as they are."""

from __future__ import annotations

import io
import itertools
import random
import re
import sys

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from support import texts
from tokens import engine

from fast_litellm_shm.cli import blocks

CUT = re.compile(blocks.TO_LAST_CUT.pattern.removeprefix("(?s:.*)"))  # each place
# One character of each kind that a pattern tells from others, and what is special in one of them.
KINDS = "aÀ中\u0301s1٣ \t\n\r\u00a0\u0085'/!"


def _cuts(text: str) -> list[int]:
    """All places, those too that another match covers."""
    return [match.end() for i in range(len(text)) if (match := CUT.match(text, i))]


def test_all_short_texts() -> None:
    """In random vocabularies, in which another end of a piece shows."""
    cut = 0
    for pattern in engine.PATTERNS:
        _, compiled = engine.pairs(pattern)
        encoded = {
            text: compiled.encode(text)
            for n in range(1, 5)
            for text in map("".join, itertools.product(KINDS, repeat=n))
        }
        for text, tokens in encoded.items():
            for place in _cuts(text):
                cut += 1
                pieces = encoded[text[:place]] + encoded[text[place:]]
                assert pieces == tokens, (pattern, text, place)
    assert cut > 10_000


@settings(deadline=None)
@given(st.text(st.sampled_from(KINDS + "lrveLRVEſA.{}\u3000\u2028"), max_size=20), st.data())
def test_any_text(text: str, data: st.DataObject) -> None:
    """The same against tiktoken, at several places at once."""
    places = _cuts(text)
    if not places:
        return
    chosen = sorted(data.draw(st.sets(st.sampled_from(places), min_size=1)))
    parts = [text[a:b] for a, b in itertools.pairwise([0, *chosen, len(text)])]
    for pattern in engine.PATTERNS:
        oracle, _ = engine.pairs(pattern)
        found = [token for part in parts for token in oracle.encode_ordinary(part)]
        assert found == oracle.encode_ordinary(text), pattern


def test_spaces() -> None:
    """What is no space to Python is none to the patterns, over every code point."""
    of_bytes = {bytes([byte]): byte for byte in range(256)}
    spaces = tiktoken.Encoding(
        "spaces", pat_str=r"\s", mergeable_ranks=of_bytes, special_tokens={}
    )  # what its pattern does not match is left out
    everything = (chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    others = "".join(c for c in everything if not re.fullmatch(r"\s", c))
    assert len(others) > 1_000_000 and spaces.encode_ordinary(others) == []
    assert spaces.encode_ordinary(" x\n") == [32, 10]


def _random_file(seed: int, bad: bool = False) -> bytes:
    """Of what a block has to deal with: long lines, no spaces, characters of several bytes."""
    rng = random.Random(seed)
    made = []
    for _ in range(40):
        text = texts.random_text(rng.randrange(1000), rng.randrange(1, 300))
        text = text.replace("\ud800", "").encode("utf-8", "replace").decode()
        made.append(rng.choice([text, "x" * rng.randrange(200), "中文" * rng.randrange(90), "\n"]))
    data = "".join(made).encode()
    if bad:
        at = rng.randrange(len(data))
        data = data[:at] + b"\xe4\xbd\xff" + data[at:]
    return data


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("pattern", range(3))
def test_blocks_of_a_file(monkeypatch: pytest.MonkeyPatch, size: int, pattern: int) -> None:
    monkeypatch.setattr(blocks, "SIZE", size)
    oracle, compiled = engine.pairs(engine.PATTERNS[pattern])
    for seed in range(10):
        bad = seed % 2 == 1
        data = _random_file(seed, bad)
        errors = "replace" if bad else "strict"
        found = list(blocks.texts(io.BytesIO(data).read, errors))
        whole = data.decode("utf-8", errors)
        assert "".join(text for text, _ in found) == whole
        assert sum(read for _, read in found) == len(data)
        assert sum(compiled.count(text) for text, _ in found) == len(oracle.encode_ordinary(whole))
        assert len(found) > 5 or size > 64


def test_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no place to cut, and where none may be."""
    monkeypatch.setattr(blocks, "SIZE", 1000)
    for text, cut in (("x" * 10 * blocks.SIZE, True), ("x y " * blocks.SIZE, False)):
        assert list(blocks.texts(io.BytesIO(text.encode()).read, cut=cut)) == [(text, len(text))]
    assert list(blocks.texts(io.BytesIO().read)) == [("", 0)]


@pytest.mark.parametrize("size", [1, 2, 5, 1 << 20])
@pytest.mark.parametrize(
    ("data", "offset"),
    [
        (b"\xff", 0),
        (b"abc \x80 abc", 4),
        ("äöü 中文 ".encode() * 9 + b"\xe4\xb8" + b"x", 126),
        ("中文".encode() + b"\xe4\xb8", 6),  # cut off
        (b"a b " * 30 + b"\xed\xa0\x80", 120),  # a surrogate
    ],
)
def test_what_is_not_utf8(
    monkeypatch: pytest.MonkeyPatch, size: int, data: bytes, offset: int
) -> None:
    monkeypatch.setattr(blocks, "SIZE", size)
    with pytest.raises(blocks.NotUTF8Error) as caught:
        list(blocks.texts(io.BytesIO(data).read))
    assert caught.value.offset == offset
    assert data[offset:].startswith(caught.value.found[:1])
