"""SimpleTokenCounter: exactly tiktoken's counts, those of long texts remembered for all workers."""

from __future__ import annotations

import pickle
import sys
import threading
import warnings
from typing import Any, cast

import pytest
from support import texts
from support.children import run, run_one

from fast_litellm_shm import Segment, SegmentSpaceError, SimpleTokenCounter
from fast_litellm_shm._shared import features, performance
from fast_litellm_shm._shared.native import Memo, ffi, lib
from fast_litellm_shm.tokens import encoding, vocabulary

AT_HAND = texts.encodings_at_hand()
needs_encoding = pytest.mark.skipif("cl100k_base" not in AT_HAND, reason=texts.WHY_NOT)
needs_o200k = pytest.mark.skipif("o200k_base" not in AT_HAND, reason=texts.WHY_NOT)


def truth(text: str, name: str = "cl100k_base") -> int:
    return len(encoding.load(name).encode(text, disallowed_special=()))


def sums(segment: Segment) -> tuple[int, int, int]:
    """Texts, hits and misses of the segment's memo."""
    info = ffi.new("fshm_memo_info *")
    lib.fshm_memo_at(segment._handle, info)
    return info.texts, info.hits, info.misses


def long(text: str) -> str:
    """A text that begins so, and is remembered."""
    return f"{text} {'and so on ' * 30}"


# counts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", AT_HAND or [pytest.param("none", marks=needs_encoding)])
@pytest.mark.parametrize("kind", texts.CORPUS)
def test_counts_are_tiktokens(segment: Segment, name: str, kind: str) -> None:
    text, counter = texts.CORPUS[kind], SimpleTokenCounter(segment=segment)
    expected = truth(text, name)
    assert counter.count_tokens(text, name) == expected
    assert counter.count_tokens(text, name) == expected  # remembered
    assert counter.count_tokens_batch([text, text + "x"], name) == [
        expected,
        truth(text + "x", name),
    ]


@pytest.mark.parametrize("name", AT_HAND or [pytest.param("none", marks=needs_encoding)])
def test_random_texts(segment: Segment, name: str) -> None:
    counter = SimpleTokenCounter(segment=segment)
    made = [texts.random_text(seed, 1 + seed * 7 % 400) for seed in range(300)]
    expected = [truth(text, name) for text in made]
    assert [counter.count_tokens(text, name) for text in made] == expected
    assert counter.count_tokens_batch(made, name) == expected
    assert [counter.count_tokens(text, name) for text in made] == expected


@needs_encoding
def test_ten_megabytes(segment: Segment) -> None:
    text = texts.random_text(1, 500_000).encode("utf-8", "replace").decode() * 20
    assert len(text) == 10_000_000
    expected = truth(text)
    for _ in range(2):
        assert SimpleTokenCounter(segment=segment).count_tokens(text) == expected
    assert sums(segment) == (1, 1, 1)


@needs_encoding
@pytest.mark.parametrize("of", ["x", "é"])
def test_other_threads_run_during_a_long_text(segment: Segment, of: str) -> None:
    """Else a gateway's event loop would stand still. Without a switch of the GIL that this thread
    asks for: in the time between two."""
    text = (f"{of}{of} and {of} words. " * 3_200_000)[:50_000_000]
    counter, turns, ended = SimpleTokenCounter(segment=segment), [0], threading.Event()
    counter.count_tokens("ready")
    found: list[int] = []

    def count() -> None:
        found.append(counter.count_tokens(text))
        ended.set()

    thread = threading.Thread(target=count)
    thread.start()
    while not ended.wait(0.001):
        turns[0] += 1
    thread.join()
    assert found == [counter._prepare(None).plain(text)]
    assert turns[0] >= 5


@needs_o200k
def test_encodings_do_not_mix(segment: Segment) -> None:
    counter, text = SimpleTokenCounter(segment=segment), texts.CORPUS["hindi"]
    models = {"gpt-4": "cl100k_base", "gpt-4o": "o200k_base", "no such model": "cl100k_base"}
    for _ in range(2):
        for model, name in models.items():
            assert counter.count_tokens(text, model) == truth(text, name)
    assert truth(text, "cl100k_base") != truth(text, "o200k_base")


@needs_o200k
def test_default_encoding(segment: Segment) -> None:
    text = texts.CORPUS["hindi"]
    counter = SimpleTokenCounter(default_encoding="o200k_base", segment=segment)
    for model in (None, "claude-sonnet-4"):
        assert counter.count_tokens(text, model) == truth(text, "o200k_base")
    assert counter.count_tokens(text, "gpt-4") == truth(text, "cl100k_base")


# the memo ----------------------------------------------------------------------------------------


def _count_here(name: str, made: list[str]) -> list[int]:
    counter = SimpleTokenCounter(segment=Segment(name))
    return [counter.count_tokens(text, "gpt-4") for text in made]


@needs_encoding
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_one_process_counted_another_knows(segment: Segment, method: str) -> None:
    made = ["x", "", texts.CORPUS["emoji"], texts.CORPUS["english"]]
    expected = [truth(text) for text in made]
    assert run_one(_count_here, segment.name, made, method=method) == expected
    assert sums(segment) == (2, 0, 2)  # short ones are not remembered
    assert run(_count_here, [(segment.name, made)] * 2, method) == [expected] * 2
    assert sums(segment) == (2, 4, 2)


@needs_encoding
def test_which_texts_are_remembered(segment: Segment) -> None:
    """Those of 256 bytes of UTF-8 or more, whatever the characters."""
    counter = SimpleTokenCounter(segment=segment)
    for text, known in (("a" * 255, 0), ("é" * 127, 0), ("a" * 256, 1), ("é" * 128, 2)):
        assert counter.count_tokens(text) == counter.count_tokens(text) == truth(text)
        assert sums(segment)[0] == known
    assert counter.count_tokens("\ud800" * 100) == truth("\ud800" * 100)  # as U+FFFD
    assert sums(segment)[0] == 3


@needs_encoding
def test_the_str_does_not_grow(segment: Segment) -> None:
    """Python keeps the UTF-8 of a str that is asked for it, for as long as the str lives."""
    counter, text = SimpleTokenCounter(segment=segment), "é" * 100_000
    before = sys.getsizeof(text)
    counter.count_tokens(text)
    memo = _memo(segment, len)
    assert memo(text) == 100_000
    assert sys.getsizeof(text) == before


@needs_encoding
def test_used_before_and_after_a_fork(segment: Segment) -> None:
    counter = SimpleTokenCounter(segment=segment)
    counter.count_tokens("before")

    def child(text: str) -> int:
        return counter.count_tokens(text)

    assert run_one(child, "in the child", method="fork") == truth("in the child")
    assert run_one(child, "before", method="fork") == truth("before")


@needs_encoding
@pytest.mark.parametrize("tenant", ["b", b"b", "", "a\0", None])
def test_a_tenant_learns_nothing_of_another(segment: Segment, tenant: str | bytes | None) -> None:
    """Not by the time that it takes: what another tenant has counted is counted anew."""
    counter, text = SimpleTokenCounter(segment=segment), long("a text of one tenant")
    for asks, hits in (("a", 0), ("a", 1), (b"a", 2), (tenant, 2), (tenant, 3), ("a", 4)):
        assert counter.count_tokens(text, tenant=asks) == truth(text)
        counter = SimpleTokenCounter(segment=segment)  # brings the sums
        assert sums(segment)[1] == hits
    assert sums(segment)[0] == 2
    assert counter.count_tokens_batch([text, text], tenant="c") == [truth(text)] * 2
    assert counter.validate_input(text, "gpt-4", tenant="c")
    assert sums(segment)[0] == 3


@needs_encoding
def test_a_tenant_must_be_a_name(segment: Segment) -> None:
    counter = SimpleTokenCounter(segment=segment)
    said, wrong = "tenant must be a str, bytes or None, not 7", cast(Any, 7)
    with pytest.raises(TypeError, match=said):
        counter.count_tokens("x", tenant=wrong)
    with pytest.raises(TypeError, match=said):
        counter.count_tokens_batch(["x"], tenant=wrong)
    with pytest.raises(TypeError, match="text must be a str, not 7"):
        counter.count_tokens(7, tenant="a")  # type: ignore[arg-type]


@needs_encoding
def test_sums_of_hits_and_misses(segment: Segment) -> None:
    counter = SimpleTokenCounter(segment=segment)
    for _ in range(3):
        for i in range(50):
            counter.count_tokens(long(f"text {i}"))
    counter.count_tokens_batch([long(f"text {i}") for i in range(60)])
    del counter  # brings what was not reported yet
    assert sums(segment) == (60, 150, 60)


@needs_encoding
def test_every_count_is_measured(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short texts too, and what is remembered."""
    monkeypatch.setattr(performance, "_sample_every", lambda: 1)
    counter = SimpleTokenCounter(segment=segment)
    for text in ("short", long("a"), long("a")):
        counter.count_tokens(text)
    found = performance.segment_stats(segment)["token_counting"]["operations"]["count"]
    assert (found["total_calls"], found["error_count"]) == (3, 0)
    assert found["total_input_size"] == 5 + 2 * len(long("a"))


@needs_encoding
def test_read_only_segments_are_looked_at(segment: Segment) -> None:
    known, new = long("known"), long("unknown")
    SimpleTokenCounter(segment=segment).count_tokens(known)
    expected = [truth(new), truth(new), truth(known)]

    def look() -> list[int]:
        read_only = Segment(segment.name, create=False, _read_only=True)
        counter = SimpleTokenCounter(segment=read_only)
        return [counter.count_tokens(text) for text in (new, new, known)]

    del segment._handle  # else the child would get this mapping again
    assert run_one(look, method="fork") == expected


@needs_encoding
def test_segment_without_names(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=1000, names="off")
    counter = SimpleTokenCounter(segment=segment)
    text = long("some text")
    assert [counter.count_tokens(text) for _ in range(2)] == [truth(text)] * 2


@needs_encoding
def test_the_memo_outlives_its_counter(segment_name: str) -> None:
    count = (
        SimpleTokenCounter(segment=Segment(segment_name, capacity=100))
        ._prepare(None)
        .count_of(None)
    )
    for i in range(200):
        assert count(long(f"text {i}")) == truth(long(f"text {i}"))


@needs_encoding
def test_threads(segment: Segment) -> None:
    counter = SimpleTokenCounter(segment=segment)
    made = [texts.random_text(seed, 3000) for seed in range(20)]
    expected = [truth(text) for text in made]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(3):
            for text, count in zip(made, expected, strict=True):
                found = counter.count_tokens(text)
                if found != count:
                    wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _memo(segment: Segment, compute: Any) -> Memo:
    return Memo(segment, int(ffi.cast("uintptr_t", segment._handle)), 7, compute)


def test_memo_of_anything(segment: Segment) -> None:
    asked: list[object] = []

    def compute(text: Any) -> int:
        asked.append(text)
        return len(text)

    memo = _memo(segment, compute)
    assert [memo("ab"), memo("ab"), memo.count("ab"), memo(text="ab")] == [2] * 4
    assert asked == ["ab"]
    assert [memo.count_for("ab", None), memo.count_for("ab", "t"), memo.count_for("ab", "t")] == [
        2
    ] * 3
    assert asked == ["ab", "ab"]
    with pytest.raises(TypeError):
        memo("a", "b")  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="made once"):
        memo.__init__(segment, 0, 7, compute)  # type: ignore[misc]


class _Loud(str):
    def __len__(self) -> int:
        return 99


def test_memo_leaves_what_is_no_plain_str(segment: Segment) -> None:
    memo = _memo(segment, len)
    for value in (b"abc", [1, 2], _Loud("ab"), "\ud800"):
        assert memo(value) == memo(value) == len(value)
    assert sums(segment)[0] == 0
    with pytest.raises(TypeError, match=r"has no len\(\)"):
        memo(None)


@pytest.mark.parametrize("odd", [-1, 2**24, 2**64, 1.5, None, "3", True])
def test_memo_remembers_only_counts(segment: Segment, odd: Any) -> None:
    answers = iter([odd, odd])
    memo = _memo(segment, lambda _: next(answers))
    assert memo("x") is odd
    assert memo("x") is odd


def test_memo_asks_now_and_then_whether_it_is_wanted(segment: Segment) -> None:
    answers = iter([True, False, True])
    asked: list[str] = []

    def compute(text: str) -> int:
        asked.append(text)
        return 1

    address = int(ffi.cast("uintptr_t", segment._handle))
    memo = Memo(segment, address, 7, compute, -1, 0, None, lambda: next(answers))
    for _ in range(96):
        memo("x")
    assert len(asked) == 1 + 32  # the first, and all while it was off
    with pytest.raises(StopIteration):
        memo("x")


@needs_encoding
def test_memo_with_tables(segment: Segment) -> None:
    address, asked = int(ffi.cast("uintptr_t", segment._handle)), list[object]()

    def compute(text: object) -> int:
        asked.append(text)
        return 99

    found, wanted = vocabulary.load("cl100k_base"), [True]
    memo = Memo(segment, address, 7, compute, -1, 0, found, lambda: wanted[0])
    for text in ("a b", long("x"), "\ud800", _Loud("a b"), "é" * 500):
        assert memo(text) == memo(text) == truth(text)
    assert asked == []
    assert memo(b"x") == 99  # what is no str
    wanted[0] = False
    assert 99 in [memo("a b") for _ in range(33)]
    with pytest.raises(TypeError, match="vocabulary must be a Vocabulary or None, not 7"):
        Memo(segment, address, 7, compute, -1, 0, 7)  # type: ignore[arg-type]


def test_memo_without_init() -> None:
    memo = Memo.__new__(Memo)
    for call in (memo.count, memo):
        with pytest.raises(RuntimeError, match="__init__ was not called"):
            call("x")


# batches -----------------------------------------------------------------------------------------


@needs_encoding
def test_batches(segment: Segment) -> None:
    counter = SimpleTokenCounter(segment=segment)
    made = [texts.random_text(seed, seed * 911 % 20_000) for seed in range(60)]
    made += made[:10] + ["", "\ud800"]
    expected = [truth(text) for text in made]
    counter.count_tokens(made[3])
    assert counter.count_tokens_batch(made) == expected
    assert counter.count_tokens_batch(made) == expected
    assert counter.count_tokens_batch(iter(made)) == expected
    assert counter.count_tokens_batch(tuple(made[:1])) == expected[:1]
    assert counter.count_tokens_batch([]) == []


@needs_encoding
def test_a_batch_lets_other_threads_run(segment: Segment) -> None:
    """Also where no text is long."""
    counter, ended, turns = SimpleTokenCounter(segment=segment), threading.Event(), 0
    made = [texts.random_text(seed, 2_000) for seed in range(300)] * 300
    counter.count_tokens_batch(made[:300])

    def count() -> None:
        counter.count_tokens_batch(made)
        ended.set()

    thread = threading.Thread(target=count)
    thread.start()
    while not ended.wait(0.001):
        turns += 1
    thread.join()
    assert turns >= 2


def _off(name: str, request_id: str | None = None) -> bool:
    return False


@needs_encoding
def test_without_its_feature_tiktoken_counts(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does whatever else the engine would do."""
    monkeypatch.setattr(features, "is_enabled", _off)
    counter, text, asked = SimpleTokenCounter(segment=segment), long("a b"), list[str]()
    whole = encoding.load("cl100k_base")

    class _Asked:
        decode_bytes = whole.decode_bytes
        _special_tokens = whole._special_tokens

        @staticmethod
        def encode_ordinary(text: str) -> list[int]:
            asked.append(text)
            return whole.encode_ordinary(text)

    monkeypatch.setitem(encoding._loaded, "cl100k_base", cast(Any, _Asked))
    assert counter.count_tokens_batch([text, "c"]) == [truth_of(whole, text), 1]
    assert counter.count_tokens(text) == truth_of(whole, text)
    assert asked == [text, "c", text]
    assert counter.decode(counter.encode(text)) == text
    assert counter.fits("a b", 2) and not counter.fits("a b", 1)
    assert counter.truncate("a b c 中文字 d", 2) == "a b"
    assert counter.encode("<|endoftext|>", allowed_special="all") == [whole.eot_token]
    assert len(asked) > 6
    with pytest.raises(KeyError, match="no such token"):
        counter.decode([10**8])
    del counter
    assert sums(segment) == (0, 0, 0)  # off means off


def truth_of(found: Any, text: str) -> int:
    return len(found.encode(text, disallowed_special=()))


# failures ----------------------------------------------------------------------------------------


class _Broken:
    def __call__(self, *_: object) -> int:
        raise ArithmeticError("scribbled")

    count = __call__


@needs_encoding
def test_a_memo_that_fails_is_told_and_not_felt(
    segment: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str]] = []
    monkeypatch.setattr(
        features, "record_error", lambda name, error: told.append((name, str(error)))
    )
    counter = SimpleTokenCounter(segment=segment)
    counting = counter._prepare(None)
    broken: Any = _Broken()
    counting.memo = counter._by_model[None] = broken
    assert counter.count_tokens("a b") == 2
    assert counter.count_tokens_batch(["a b", "c"]) == [2, 1]
    assert told == [("rust_token_counting", "scribbled")] * 2
    with pytest.raises(TypeError, match="text must be a str, not 7"):
        counter.count_tokens(7)  # type: ignore[arg-type]
    assert len(told) == 2  # the caller's fault is none of the memo's


@needs_encoding
def test_without_a_segment_tokens_are_counted_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Segment:
        raise SegmentSpaceError("no space")

    told: list[str] = []
    monkeypatch.setattr(features, "record_error", lambda name, error: told.append(name))
    monkeypatch.setattr(features, "is_enabled", lambda name, request_id=None: True)
    monkeypatch.setattr(Segment, "default", refuse)
    with warnings.catch_warnings():  # features may say that they have none either
        warnings.simplefilter("ignore", RuntimeWarning)
        counter = SimpleTokenCounter()
        assert counter.count_tokens("a b") == 2
        assert counter.count_tokens_batch(["a b"]) == [2]
    assert told == ["rust_token_counting"]
    assert "tokens are counted without the shared memo: no space" in caplog.text


@needs_encoding
def test_the_default_segment_is_used() -> None:
    SimpleTokenCounter().count_tokens(long("hello"))
    assert sums(Segment.default())[0] == 1


# arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, 7, b"bytes", ["list"], 1.5])
@needs_encoding
def test_text_must_be_a_str(segment: Segment, bad: Any) -> None:
    counter = SimpleTokenCounter(segment=segment)
    # Python counts an exception as handled for ever that was raised at the first instruction of a
    # handler (limiters/test_interrupted.py).
    handled = sys.exc_info()[1]
    with pytest.raises(TypeError) as caught:
        counter.count_tokens(bad)
    assert str(caught.value) == f"text must be a str, not {bad!r}"
    assert caught.value.__context__ is handled
    with pytest.raises(TypeError) as caught:
        counter.count_tokens_batch(["good", bad])
    assert str(caught.value) == f"texts[1] must be a str, not {bad!r}"


@pytest.mark.parametrize("bad", ["a text", b"bytes", 7, None])
def test_texts_must_be_several(segment: Segment, bad: Any) -> None:
    with pytest.raises(TypeError) as caught:
        SimpleTokenCounter(segment=segment).count_tokens_batch(bad)
    assert str(caught.value) == f"texts must be a list of str, not {bad!r}"


@pytest.mark.parametrize("bad", [7, b"gpt-4", ["gpt-4"], 1.5])
def test_model_must_be_a_str(segment: Segment, bad: Any) -> None:
    counter = SimpleTokenCounter(segment=segment)
    for call in (counter.count_tokens, counter.encoding_name):
        with pytest.raises(TypeError) as caught:
            call(*("x", bad) if call == counter.count_tokens else (bad,))
        assert str(caught.value) == f"model must be a str or None, not {bad!r}"


@pytest.mark.parametrize("bad", [0, -1])
def test_too_few(bad: int) -> None:
    with pytest.raises(ValueError, match=f"model_max_tokens must be at least 1, not {bad}"):
        SimpleTokenCounter(bad)


@pytest.mark.parametrize("bad", [1.5, "60", None, True, float("nan")])
def test_not_an_int(bad: Any) -> None:
    with pytest.raises(TypeError) as caught:
        SimpleTokenCounter(bad)
    assert str(caught.value) == f"model_max_tokens must be an int, not {bad!r}"


def test_other_bad_arguments() -> None:
    with pytest.raises(ValueError, match="default_encoding must be one of .*o200k_base.*, not 'x'"):
        SimpleTokenCounter(default_encoding="x")
    with pytest.raises(TypeError, match="default_encoding must be a str, not 7"):
        SimpleTokenCounter(default_encoding=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="segment must be a Segment, not 'x'"):
        SimpleTokenCounter(segment="x")  # type: ignore[arg-type]


@needs_encoding
def test_many_models_are_not_remembered_for_ever(segment: Segment) -> None:
    counter = SimpleTokenCounter(segment=segment)
    for i in range(3000):
        assert counter.count_tokens("a b", f"model-{i}") == 2
    assert len(counter._by_model) <= 1024


@needs_encoding
def test_pickle_and_repr(segment: Segment) -> None:
    counter = SimpleTokenCounter(100, default_encoding="p50k_base", segment=segment)
    again = pickle.loads(pickle.dumps(counter))
    assert repr(again) == repr(counter) == "SimpleTokenCounter(100, default_encoding='p50k_base')"
    assert again.model_max_tokens == 100
    assert again._given.name == segment.name
