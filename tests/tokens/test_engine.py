"""The engine that counts tokens, against tiktoken: code points, corpora, texts at random, and what
else the engine does. TOKENS_THOROUGH=1: every code point, and more of the rest; some minutes."""

from __future__ import annotations

import os
import random
import sys
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import texts
from tokens import engine

THOROUGH = os.environ.get("TOKENS_THOROUGH") == "1"
needs_real = pytest.mark.skipif(not engine.at_hand(), reason=texts.WHY_NOT)
REAL: list[Any] = engine.at_hand() or [pytest.param("none", marks=needs_real)]

# {0}: the code point. Whatever a scanner may do with one: alone, beside each class, doubled, where
# a piece begins, in the middle, where it ends, and beside what needs a second look.
# fmt: off
CONTEXTS = [
    "{0}", "a{0}", "{0}a", "A{0}a", "a{0}A", "A{0}B", " {0}", "{0} ", "1{0}", "{0}1", "12{0}3",
    "!{0}", "{0}!", "\n{0}", "{0}\n", "'{0}", "{0}'s", "a'{0}", "a{0}b", "  {0}", "{0}  a",
    "x \n{0} a", "中{0}A", "A中{0}b", "{0}{0}", "é{0}", "{0}é", "\u0301{0}B", "{0}\u0301B",
    "A{0}\u0301", "'{0}e", "!{0}\n/", " {0}\r\n  x", "\t{0}\t{0}",
]
AT_THE_END = ["{0}", "\n {0}", "a\n{0}", "{0}\n  ", "{0}'", "{0} "]
# fmt: on
_BETWEEN = " ;\n"


def _code_points() -> list[int]:
    """All that this Python knows, and of the others one of 97; or all there are."""
    every = (c for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    if THOROUGH:
        return list(every)
    return [c for c in every if c % 97 == 0 or unicodedata.category(chr(c)) not in ("Cn", "Co")]


def _differing(parts: list[str], pair: engine.Pair) -> list[str]:
    """The texts, of many, for which the two differ."""
    found, compiled = pair
    text = _BETWEEN.join(parts)
    if found.encode_ordinary(text) == compiled.encode(text):
        return []
    if len(parts) == 1:
        return parts
    middle = len(parts) // 2
    return _differing(parts[:middle], pair) + _differing(parts[middle:], pair)


@pytest.mark.parametrize("pattern", engine.PATTERNS, ids=["r50k", "cl100k", "o200k"])
def test_every_code_point(pattern: str) -> None:
    pair = engine.pairs(pattern)
    points, bad = _code_points(), []
    for at in range(0, len(points), 256):
        block = list(map(chr, points[at : at + 256]))
        bad += _differing([context.format(c) for c in block for context in CONTEXTS], pair)
        for c in block if THOROUGH else block[::16]:
            for context in AT_THE_END:
                bad += _differing([context.format(c)], pair)
        assert not bad, ascii(bad[:20])


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("kind", texts.CORPUS)
def test_corpus(name: str, kind: str) -> None:
    text = texts.CORPUS[kind]
    engine.assert_equal(text, *engine.real(name))
    engine.assert_equal(text + text[::-1], *engine.real(name))


@pytest.mark.parametrize("name", REAL)
def test_random_texts(name: str) -> None:
    found, compiled = engine.real(name)
    for seed in range(2000 if THOROUGH else 100):
        engine.assert_equal(texts.random_text(seed, 1000), found, compiled, f"seed {seed}: ")


_ALPHABETS = [
    "ab",
    "aAé中 \u0301",
    "'sStTlLrReEvVdDmM\u017f\u212a ",
    " \n\r\t\u00a0\u2028x",
    "0½٣1 a",
    "/\n !.x",
]


@pytest.mark.parametrize("pattern", engine.PATTERNS, ids=["r50k", "cl100k", "o200k"])
@pytest.mark.parametrize("alphabet", _ALPHABETS, ids=ascii)
def test_few_characters(pattern: str, alphabet: str) -> None:
    """Short texts of few characters: every decision of the scanner, close together."""
    rng, pair = random.Random(7), engine.pairs(pattern)
    for _ in range(20_000 if THOROUGH else 2000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 12)))
        assert not _differing([text], pair), ascii(text)


@pytest.mark.parametrize("name", REAL)
def test_sources(name: str) -> None:
    """What lies on the machine: Python's own library, in parts as long as they come."""
    found, compiled = engine.real(name)
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    for file in files if THOROUGH else files[::10]:
        text = file.read_text(encoding="utf-8", errors="replace")
        engine.assert_equal(text, found, compiled, f"{file}: ")


@pytest.mark.parametrize("name", REAL)
def test_long_pieces(name: str) -> None:
    """One piece of many thousand bytes, which needs memory, and steps back."""
    found, compiled = engine.real(name)
    rng = random.Random(3)
    for text in (
        "a" * 20_001,
        " " * 20_000 + "x",
        "=" * 20_003,
        "\u0301" * 10_000,
        "ab" * 10_000,
        "".join(rng.choices("abcdefgh", k=20_000)),
        "".join(chr(rng.randrange(0x4E00, 0x9FA5)) for _ in range(6_000)),
    ):
        engine.assert_equal(text, found, compiled)


@pytest.mark.parametrize("length", range(70))
def test_every_length(length: int) -> None:
    """The end of a text is copied: texts around that length, of each kind."""
    pair = engine.pairs(engine.PATTERNS[2])
    for text in ("a" * 70, "Ab 12'S " * 9, "é" * 70, " \n" * 35, "0" * 70, "中a" * 35):
        engine.assert_equal(text[:length], *pair)


# lone surrogates, kinds of str --------------------------------------------------------------------


class Text(str):
    def isascii(self) -> bool:
        raise AssertionError("the engine looks into the str itself")


def test_kinds_of_str() -> None:
    found, compiled = engine.pairs(engine.PATTERNS[1])
    for text in (
        "plain",
        "\xe9\xe8",
        "\u4e2d",
        "\U0001f600",
        "\ud800 x \udc00\ud800",
        "\ud83d\ude00",
        "",
    ):
        engine.assert_equal(text, found, compiled)
        engine.assert_equal(Text(text), found, compiled)
    for wrong in (b"bytes", None, 3, ["text"]):
        with pytest.raises(TypeError, match="text must be a str"):
            compiled.count(wrong)  # type: ignore[arg-type]


def test_no_copy_stays() -> None:
    """PyUnicode_AsUTF8AndSize() would keep the UTF-8 in the str."""
    compiled = engine.pairs(engine.PATTERNS[1])[1]
    for text in ("".join(map(chr, range(200, 900))), "a" * 5000):
        before = sys.getsizeof(text)
        compiled.count(text)
        compiled.encode(text)
        compiled.truncate(text, 3)
        assert sys.getsizeof(text) == before


def test_batch() -> None:
    found, compiled = engine.pairs(engine.PATTERNS[0])
    many = list(texts.CORPUS.values())
    assert compiled.count_batch(many) == [len(found.encode_ordinary(text)) for text in many]
    assert compiled.count_batch([]) == []
    with pytest.raises(TypeError, match=r"texts\[1\] must be a str"):
        compiled.count_batch(["a", b"b"])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="texts must be a list"):
        compiled.count_batch("ab")  # type: ignore[arg-type]


# decode, fits, truncate ---------------------------------------------------------------------------


def _replaced(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@pytest.mark.parametrize("name", REAL)
def test_decode(name: str) -> None:
    found, compiled = engine.real(name)
    for text in texts.CORPUS.values():
        assert compiled.decode(compiled.encode(text)) == _replaced(text).encode()
    special = found._special_tokens
    assert compiled.special_tokens() == special
    for token in special.values():  # two of o200k_harmony's are one token
        assert special[compiled.decode([token]).decode()] == token
    tokens = [t for t in range(found.max_token_value + 1) if t % 7 == 0]
    for token in set(tokens).difference(special.values()):
        try:
            expected = found.decode_single_token_bytes(token)
        except KeyError:
            with pytest.raises(KeyError, match=rf"tokens\[0\] is {token}, which is no token"):
                compiled.decode([token])
        else:
            assert compiled.decode([token]) == expected


class Index:
    def __index__(self) -> int:
        return 1


_NO_TOKENS: list[Any] = [2**31, 2**32 - 1, -1, -(2**70), 2**32, 2**64, 2**70, 1.0, "a", b"a", None]


@pytest.mark.parametrize("wrong", _NO_TOKENS, ids=str)
def test_no_tokens(wrong: Any) -> None:
    """Refused as by tiktoken, with the same kind of error."""
    found, compiled = engine.pairs(engine.PATTERNS[1])
    with pytest.raises(Exception) as theirs:  # noqa: PT011 (that of tiktoken is the question)
        found.decode_bytes([1, wrong])
    with pytest.raises(theirs.type) as ours:
        compiled.decode([1, wrong])
    assert type(wrong) is not int or f"tokens[1] is {wrong}" in str(ours.value)
    assert compiled.decode([Index(), True, 1]) == found.decode_bytes([Index(), True, 1])  # type: ignore[list-item]


def test_what_is_no_list() -> None:
    compiled = engine.pairs(engine.PATTERNS[1])[1]
    assert compiled.decode([]) == b"" == compiled.decode(iter(()))
    assert compiled.decode(number for number in (65, 66)) == compiled.decode((65, 66))
    for wrong in (3, None):
        with pytest.raises(TypeError):
            compiled.decode(wrong)  # type: ignore[arg-type]


def _longest_start(text: str, tokens: list[bytes], most: int) -> str:
    """What truncate() yields where a start of the text has as many tokens as in the text."""
    for kept in range(min(most, len(tokens)), -1, -1):
        start = b"".join(tokens[:kept])
        try:
            return start.decode()
        except UnicodeDecodeError:
            continue
    raise AssertionError(text)


@pytest.mark.parametrize("name", REAL)
def test_fits_and_truncate(name: str) -> None:
    found, compiled = engine.real(name)
    shorter = 0
    for text in (_replaced(whole)[:300] for whole in texts.CORPUS.values()):
        tokens = found.decode_tokens_bytes(found.encode_ordinary(text))
        for most in (
            0,
            1,
            2,
            3,
            5,
            len(tokens) // 2,
            len(tokens) - 1,
            len(tokens),
            len(tokens) + 1,
        ):
            if most < 0:
                continue
            assert compiled.fits(text, most) == (len(tokens) <= most)
            start = compiled.truncate(text, most)
            expected = _longest_start(text, tokens, most)
            if len(found.encode_ordinary(expected)) <= most:
                assert start == expected, (ascii(text), most)
            else:
                shorter += 1
                assert expected.startswith(start)
            assert len(found.encode_ordinary(start)) <= most
            assert (start is text) == (len(tokens) <= most)
    assert shorter < 20


@pytest.mark.parametrize(
    "text", ["", "x" * 1000, "\xe9 \u4e2d" * 1000, "\ud800 x" * 9, Text("ab \xe9")]
)
def test_limits_of_max_tokens(text: str) -> None:
    found, compiled = engine.pairs(engine.PATTERNS[1])
    count = len(found.encode_ordinary(text))
    for many in (count, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**80):
        assert compiled.fits(text, many)
        assert compiled.truncate(text, many) is text
    assert compiled.fits(text, 0) == (not text) == compiled.fits(text, False)
    assert compiled.truncate(text, 0) == ""
    for number in (-1, -(2**63), -(2**64), -(2**80)):
        with pytest.raises(ValueError, match=f"max_tokens must be 0 or more, not {number}"):
            compiled.fits(text, number)
        with pytest.raises(ValueError, match=f"max_tokens must be 0 or more, not {number}"):
            compiled.truncate(text, number)
    wrong: Any
    for wrong in ("1", 1.0, None, b"1"):
        with pytest.raises(TypeError):
            compiled.truncate(text, wrong)
        with pytest.raises(TypeError):
            compiled.fits(text, wrong)
    for wrong in (text.encode(errors="replace"), bytearray(b"x"), None):
        for call in (compiled.fits, compiled.truncate):
            with pytest.raises(TypeError, match="text must be a str"):
                call(wrong, 1)


def test_others_run_during_a_long_text() -> None:
    """The GIL is let go: this thread runs while another one counts, though no thread is asked to
    give it up within the switch interval."""
    compiled = engine.pairs(engine.PATTERNS[1])[1]
    text = "How many tokens are these? " * 400_000
    calls: list[Callable[[], object]] = [
        lambda: compiled.count(text),
        lambda: compiled.count_batch([text]),
        lambda: compiled.fits(text, 10**9),
        lambda: compiled.truncate(text, len(text) // 3),
        lambda: compiled.encode(text[:1_000_000]),
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        for call in calls:
            assert any(_runs_beside(call) for _ in range(20))
    finally:
        sys.setswitchinterval(interval)


def _runs_beside(call: Callable[[], object]) -> bool:
    """Whether this thread runs between the beginning and the end of a call of another one."""
    begun, ended = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        call()
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait()
    beside = not ended.is_set()
    thread.join()
    return beside


def test_threads() -> None:
    """Long texts are counted without the GIL, by threads that share the cache."""
    found, compiled = engine.pairs(engine.PATTERNS[2])
    many = [texts.random_text(seed, 6000) for seed in range(8)]
    expected = [len(found.encode_ordinary(text)) for text in many]
    wrong: list[int] = []

    def work() -> None:
        for i, text in enumerate(many * 5):
            if compiled.count(text) != expected[i % 8]:
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
