"""litellm.token_counter with the memo and without, in one process: equal in everything."""

from __future__ import annotations

import enum
import sys
import threading
from typing import Any

import pytest
from drop_in.cases import CASES, CHAT, MODELS
from support.texts import CORPUS, random_text

from fast_litellm_shm import Segment
from fast_litellm_shm._shared import features
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.fast_litellm import acceleration


def outcome(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """What a call gives, or what it throws."""
    try:
        found = function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return type(found), found


def compare(litellm: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """One call three times: plain, counted through the memo, remembered by it."""
    acceleration.remove_acceleration()
    plain = outcome(litellm.token_counter, *args, **kwargs)
    assert acceleration.apply_acceleration()
    try:
        assert outcome(litellm.token_counter, *args, **kwargs) == plain
        assert outcome(litellm.token_counter, *args, **kwargs) == plain
    finally:
        acceleration.remove_acceleration()
    assert outcome(litellm.token_counter, *args, **kwargs) == plain
    return plain


@pytest.fixture(autouse=True)
def _no_errors_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(name: str, error: object) -> None:
        raise AssertionError(f"{name}: {error!r}")

    monkeypatch.setattr(features, "record_error", told)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("model", MODELS)
def test_equal(litellm: Any, model: str, name: str) -> None:
    compare(litellm, model=model, **CASES[name])


def test_there_are_enough_cases() -> None:
    assert len(CASES) * len(MODELS) > 300


@pytest.mark.parametrize("model", [None, 7, b"gpt-4", ["gpt-4"]])
def test_wrong_models(litellm: Any, model: Any) -> None:
    compare(litellm, model=model, text="hello there")
    compare(litellm, model=model, messages=CHAT)
    compare(litellm, model, None, "by position")


class _Kind(str, enum.Enum):
    A = "a kind of text"


class _Odd(str):
    def __getitem__(self, key: Any) -> str:
        return "odd"


def test_subclasses_of_str(litellm: Any) -> None:
    for text in (_Kind.A, _Odd("some text")):
        compare(litellm, model="gpt-4o", text=text)
        compare(litellm, model="gpt-4o", messages=[{"role": "user", "content": text}])
    acceleration.apply_acceleration()
    plain = litellm.token_counter("gpt-4o", text="some text")
    assert litellm.token_counter("gpt-4o", text=_Odd("some text")) != plain


def test_custom_tokenizers(litellm: Any) -> None:
    json = litellm.utils.claude_json_str
    for tokenizer in (litellm.create_tokenizer(json), litellm.utils.select_tokenizer("gpt-4")):
        for text in CORPUS.values():
            compare(litellm, model="gpt-4o", custom_tokenizer=tokenizer, text=text)
        compare(litellm, model="deepseek-chat", custom_tokenizer=tokenizer, messages=CHAT)


def test_sampled_texts(litellm: Any) -> None:
    text = random_text(5, 100_000).encode("utf-8", "replace").decode() * 41
    assert len(text) > 4_000_000
    _, count = compare(litellm, model="gpt-4o", text=text)
    assert count > 100_000


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-4", "deepseek-chat"])
def test_random_texts(litellm: Any, model: str) -> None:
    made = [random_text(seed, 1 + seed * 97 % 5000) for seed in range(40)]
    plain = [outcome(litellm.token_counter, model, text=text) for text in made]
    acceleration.apply_acceleration()
    for _ in range(2):
        assert [outcome(litellm.token_counter, model, text=text) for text in made] == plain


def test_other_functions_that_count(litellm: Any) -> None:
    module: Any = sys.modules["litellm.litellm_core_utils.token_counter"]

    def both() -> list[Any]:
        return [
            module.messages_reach_token_count("gpt-4o", CHAT, 50),
            module.messages_reach_token_count("gpt-4o", CHAT, 5000),
            module.get_modified_max_tokens("gpt-4o", "gpt-4o", CHAT, 100, None, None),
            litellm.encode("gpt-4o", "a b"),
        ]

    plain = both()
    acceleration.apply_acceleration()
    assert both() == both() == plain


def test_in_threads(litellm: Any) -> None:
    made = [random_text(seed, 2000) for seed in range(20)]
    plain = [litellm.token_counter("gpt-4", text=text) for text in made]
    acceleration.apply_acceleration()
    wrong: list[int] = []

    def work() -> None:
        for text, count in zip(made, plain, strict=True):
            found = litellm.token_counter("gpt-4", text=text)
            if found != count:
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def _sums() -> tuple[int, int, int]:
    info = ffi.new("fshm_memo_info *")
    lib.fshm_memo_at(Segment.default()._handle, info)
    return info.texts, info.hits, info.misses


def test_it_is_the_memo_that_answers(litellm: Any) -> None:
    acceleration.apply_acceleration()
    messages = [{"role": "user", "content": f"text {i}, " * 40} for i in range(100)]
    for _ in range(3):
        litellm.token_counter("gpt-4o", messages=messages)
    acceleration.remove_acceleration()  # brings the sums
    assert _sums() == (100, 200, 100)  # the roles are too short to be remembered


def test_a_share_of_the_calls_is_drawn_once(litellm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the patch of the counting: that of the encoding, and the memo, do not draw once more."""
    acceleration.apply_acceleration()
    monkeypatch.setenv("FAST_LITELLM_RUST_TOKEN_COUNTING", "rollout:50")
    for _ in range(4000):
        litellm.token_counter("gpt-4o", text="a text " * 40)
    acceleration.remove_acceleration()
    _, hits, misses = _sums()
    assert 1800 < hits + misses < 2200  # 6 standard deviations


def test_a_changed_tokenizer_is_another(litellm: Any) -> None:
    tokenizer = litellm.utils.select_tokenizer("deepseek-chat")["tokenizer"]
    if type(tokenizer).__module__ != "tokenizers":
        pytest.skip("litellm's own Rust tokenizers cannot be changed")
    text = CORPUS["english"]
    acceleration.apply_acceleration()
    before = litellm.token_counter("deepseek-chat", text=text)
    try:
        tokenizer.enable_truncation(5)
        assert compare(litellm, "deepseek-chat", text=text) == (int, 5)
        acceleration.apply_acceleration()
        assert litellm.token_counter("deepseek-chat", text=text) == 5
    finally:
        tokenizer.no_truncation()
    assert litellm.token_counter("deepseek-chat", text=text) == before
