"""What litellm encodes, decodes and trims, over the shared tables and by litellm alone: equal."""

from __future__ import annotations

import copy
import json
import os
import pickle
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import pytest
import tiktoken
from drop_in.cases import CHAT
from drop_in.test_equal import outcome
from hypothesis import given
from hypothesis import strategies as st
from support.texts import CORPUS, random_text

from fast_litellm_shm._shared import features
from fast_litellm_shm.fast_litellm import acceleration, encodings
from fast_litellm_shm.fast_litellm.encodings import SharedEncoding
from fast_litellm_shm.tokens import vocabulary

NAMES = ("cl100k_base", "o200k_base", "p50k_base")
SPECIAL = "<|endoftext|>"


@pytest.fixture(name="get_encoding")
def _get_encoding(litellm: Any) -> Callable[[str], Any]:
    """litellm's own function that finds an encoding."""
    found: Callable[[str], Any] = sys.modules["litellm.rust_bridge.tokenizer"].get_encoding
    return found


def both(function: Callable[[], Any]) -> tuple[Any, ...]:
    """What a call gives with litellm alone; the same with ours, or the test fails."""
    acceleration.remove_acceleration()
    plain = outcome(function)
    assert acceleration.apply_acceleration()
    try:
        assert outcome(function) == plain
    finally:
        acceleration.remove_acceleration()
    return plain


def no_own(name: str) -> Any:
    raise AssertionError(f"tiktoken's {name} was asked")


def shared(name: str, own: Callable[[str], Any] = no_own) -> SharedEncoding:
    tables = vocabulary.load(name)
    assert tables is not None
    return SharedEncoding(name, tables, own, lambda: True)


# what litellm offers ------------------------------------------------------------------------------

TEXTS = [*CORPUS.values(), "", random_text(3, 5000)]
WRONG: list[Any] = [None, 7, b"bytes", ["a list"], {"a": 1}]
TOKENS: list[Any] = [
    [],
    (),
    [1, 2, 3],
    (15339, 1917),
    [100257],
    [100276],
    [199999],
    [220, 128, 99],  # not UTF-8
    [True, False],
    range(5),
    # wrong ones
    [-1],
    [2**32],
    [2**70],
    [10**6],
    [1.5],
    ["a"],
    [None],
    [[1]],
    "abc",
    b"abc",
    7,
    None,
]
MODELS = ["", "gpt-4o", "gpt-4", "text-davinci-003", "claude-3-opus-20240229", "no such", None]


@pytest.mark.parametrize("model", MODELS)
def test_encode(litellm: Any, model: Any) -> None:
    for text in [*TEXTS, *WRONG]:
        kind, tokens = both(lambda text=text: litellm.encode(model, text))  # type: ignore[misc]
        if kind is list:
            both(lambda tokens=tokens: litellm.decode(model, tokens))  # type: ignore[misc]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tokens", TOKENS, ids=repr)
def test_decode(litellm: Any, model: Any, tokens: Any) -> None:
    both(lambda: litellm.decode(model, tokens))


def test_a_tokenizer_of_the_caller_stays(litellm: Any) -> None:
    made = litellm.create_tokenizer(litellm.utils.claude_json_str)
    both(lambda: litellm.encode("gpt-4o", CORPUS["english"], made))
    both(lambda: litellm.decode("gpt-4o", litellm.encode(text="a b", custom_tokenizer=made), made))
    acceleration.apply_acceleration()
    again = litellm.create_tokenizer(litellm.utils.claude_json_str)
    assert type(again["tokenizer"]) is type(made["tokenizer"])
    assert litellm.utils.select_tokenizer("gpt-4")["type"] == "openai_tokenizer"


def _long_chat(messages: int, words: int) -> list[dict[str, Any]]:
    said = [{"role": "system", "content": CORPUS["english"]}]
    for i in range(messages):
        role = "assistant" if i % 2 else "user"
        said.append({"role": role, "content": random_text(i, words * 5).replace("\ud800", "")})
    return [*said, *CHAT[2:]]


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-3.5-turbo", "claude-3-opus-20240229", "other"])
@pytest.mark.parametrize("most", [0, 5, 20, 100, 500, 1000, 4000, 10**6, None])
@pytest.mark.parametrize("tokens", [False, True])
def test_trim_messages(litellm: Any, model: str, most: int | None, tokens: bool) -> None:
    chats: list[Any] = [_long_chat(12, 60), CHAT, _long_chat(3, 400), [], [{"role": "user"}], 7]
    for chat in chats:
        both(
            lambda chat=chat: litellm.utils.trim_messages(  # type: ignore[misc]
                copy.deepcopy(chat), model, return_response_tokens=tokens, max_tokens=most
            )
        )


# any text -----------------------------------------------------------------------------------------

_PIECES = st.sampled_from([*CORPUS.values(), SPECIAL, "<|endofprompt|>", "\n\n", "'s", "123", " "])
_ANY = st.text(st.characters(exclude_categories=()), max_size=80)
ANY_TEXT = st.lists(st.one_of(_ANY, _PIECES), max_size=6).map("".join)


@given(text=ANY_TEXT, model=st.sampled_from(["gpt-4", "gpt-4o", "text-davinci-003"]))
def test_any_text(litellm: Any, text: str, model: str) -> None:
    kind, tokens = both(lambda: litellm.encode(model, text))
    assert kind is list
    both(lambda: litellm.decode(model, tokens))
    both(lambda: litellm.token_counter(model, text=text))
    both(lambda: litellm.token_counter(model, messages=[{"role": "user", "content": text * 20}]))


@given(tokens=st.lists(st.integers(-2, 210_000), max_size=12), name=st.sampled_from(NAMES))
def test_any_tokens(litellm: Any, tokens: list[int], name: str) -> None:
    own, ours = tiktoken.get_encoding(name), shared(name, tiktoken.get_encoding)
    assert outcome(ours.decode, tokens) == outcome(own.decode, tokens)
    assert outcome(ours.decode_bytes, tuple(tokens)) == outcome(own.decode_bytes, tuple(tokens))


# the encoding -------------------------------------------------------------------------------------

ALLOWED: list[Any] = [set(), frozenset({SPECIAL}), "all", {"other"}, [SPECIAL], None, ()]
DISALLOWED: list[Any] = ["all", (), [], {SPECIAL}, ("other", "fox"), {""}, None, 7, [1]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("allowed", ALLOWED, ids=repr)
@pytest.mark.parametrize("disallowed", DISALLOWED, ids=repr)
def test_special_tokens(litellm: Any, name: str, allowed: Any, disallowed: Any) -> None:
    own, ours = tiktoken.get_encoding(name), shared(name, tiktoken.get_encoding)
    chosen = {"allowed_special": allowed, "disallowed_special": disallowed}
    for text in ("the fox", f"a {SPECIAL} b", CORPUS["special tokens"], "", "\ud800", b"x", None):
        assert outcome(ours.encode, text, **chosen) == outcome(own.encode, text, **chosen)


def test_it_has_all_that_tiktokens_has(litellm: Any) -> None:
    for name in NAMES:
        own, ours = tiktoken.get_encoding(name), shared(name, tiktoken.get_encoding)
        assert isinstance(ours, tiktoken.Encoding)
        assert repr(ours) == repr(own)
        for attribute in [*vars(own), *dir(own)]:
            if not attribute.startswith("__"):
                assert hasattr(ours, attribute), attribute
        for attribute in ("name", "n_vocab", "eot_token", "special_tokens_set", "max_token_value"):
            assert getattr(ours, attribute) == getattr(own, attribute)
        texts = ["a fox", "käse \ud800"]
        assert ours.encode_batch(texts) == own.encode_batch(texts)
        assert ours.encode_ordinary_batch(texts) == own.encode_ordinary_batch(texts)
        assert ours.decode_batch([[1, 2], [3]]) == own.decode_batch([[1, 2], [3]])
        assert ours.encode_to_numpy("a fox").tolist() == own.encode("a fox")
        assert ours.decode_with_offsets([1, 2]) == own.decode_with_offsets([1, 2])
        assert ours.encode_single_token("a") == own.encode_single_token("a")
        assert ours.decode_tokens_bytes([64, 65]) == own.decode_tokens_bytes([64, 65])
        assert ours.is_special_token(own.eot_token)
        assert copy.deepcopy(ours) is copy.copy(ours) is ours
        assert pickle.loads(pickle.dumps(ours)).encode("a fox") == own.encode("a fox")
        with pytest.raises(AttributeError):
            ours.nonsense  # noqa: B018


def test_tiktokens_own_is_not_asked(litellm: Any) -> None:
    for name in NAMES:
        ours = shared(name)
        for text in TEXTS:
            if not any(token in text for token in ours.special_tokens_set):
                assert ours.decode(ours.encode(text)) == ours.decode(ours.encode_ordinary(text))
            ours.encode(text, disallowed_special=())
        assert ours.eot_token in ours._special_tokens.values()


# switching it off, and faults ---------------------------------------------------------------------


def test_an_encoding_that_litellm_keeps(
    litellm: Any, get_encoding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """litellm.encoding stays what it was made; switched off, it asks tiktoken's."""
    acceleration.apply_acceleration()
    kept = get_encoding("cl100k_base")
    assert type(kept) is SharedEncoding
    asked: list[str] = []

    def own(name: str) -> Any:
        asked.append(name)
        return tiktoken.get_encoding(name)

    monkeypatch.setattr(kept, "_own", own)
    expected = kept.encode("a fox")
    assert asked == []
    monkeypatch.setenv("FAST_LITELLM_RUST_TOKEN_COUNTING", "false")
    assert type(get_encoding("cl100k_base")) is tiktoken.Encoding
    assert (kept.encode("a fox"), kept.decode(expected)) == (expected, "a fox")
    assert len(asked) == 2
    monkeypatch.delenv("FAST_LITELLM_RUST_TOKEN_COUNTING")
    acceleration.remove_acceleration()
    assert (kept.encode("a fox"), kept.decode(expected)) == (expected, "a fox")
    assert len(asked) == 4
    acceleration.apply_acceleration()
    assert get_encoding("cl100k_base") is kept
    assert (kept.encode("a fox"), len(asked)) == (expected, 4)


class _Broken:
    def __getattr__(self, name: str) -> Any:
        def fail(*_: object) -> Any:
            raise ArithmeticError(f"{name} is broken")

        return fail


def test_broken_tables_are_told_and_not_felt(
    litellm: Any, get_encoding: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(features, "record_error", lambda name, e: told.append(f"{name} {e}"))
    text = CORPUS["english"] * 4
    calls: list[Callable[[], Any]] = [
        lambda: litellm.token_counter("gpt-4", text="a fox"),
        lambda: litellm.token_counter("gpt-4", text=text),
        lambda: litellm.encode("gpt-4", text),
        lambda: litellm.decode("gpt-4", [1, 2, 3]),
    ]
    plain = [call() for call in calls]
    acceleration.apply_acceleration()
    assert [call() for call in calls] == plain
    for counter in acceleration._counters.values():
        monkeypatch.setattr(counter.plain, "_tables", _Broken())
        monkeypatch.setattr(counter, "_memo", None)
        monkeypatch.setattr(counter, "remember", lambda: None)
    monkeypatch.setattr(get_encoding("cl100k_base"), "tables", _Broken())
    for call, expected in zip(calls, plain, strict=True):
        told.clear()
        assert call() == expected
        assert told
        assert {each.partition(" ")[0] for each in told} == {"rust_token_counting"}
        assert "is broken" in told[0]


def test_tables_that_count_otherwise_are_refused(
    litellm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another litellm may make another function of the same shape."""
    module: Any = sys.modules["litellm.litellm_core_utils.token_counter"]
    original = module._get_tiktoken_count_function

    def counts_one_more(encode_length: Callable[[str], int], chunk_size: int = 1024) -> Any:
        def count_tokens(text: str) -> int:
            parts = range(0, len(text), chunk_size)
            return 1 + sum(encode_length(text[at : at + chunk_size]) for at in parts)

        count_tokens.__module__ = module.__name__
        return count_tokens

    plain = litellm.token_counter("gpt-4", text="a fox")
    acceleration.apply_acceleration()
    monkeypatch.setattr(module, "_get_tiktoken_count_function", counts_one_more)
    assert litellm.token_counter("gpt-4", text="a fox") == plain + 1
    (refused,) = acceleration._counters.values()
    assert refused.plain._refused
    monkeypatch.setattr(module, "_get_tiktoken_count_function", original)
    assert litellm.token_counter("gpt-4", text="a fox") == plain


def _count_in_a_child(queue: Any, litellm: Any) -> None:
    queue.put(
        [
            litellm.token_counter("gpt-4o", messages=CHAT),
            litellm.encode("gpt-4", "a fox"),
            type(sys.modules["litellm.rust_bridge.tokenizer"].get_encoding("p50k_base")).__name__,
        ]
    )


def test_a_forked_worker(litellm: Any) -> None:
    expected = [litellm.token_counter("gpt-4o", messages=CHAT), litellm.encode("gpt-4", "a fox")]
    acceleration.apply_acceleration()
    assert litellm.token_counter("gpt-4o", messages=CHAT) == expected[0]
    context = get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_count_in_a_child, args=(queue, litellm))
    child.start()
    assert queue.get(timeout=120) == [*expected, "SharedEncoding"]
    child.join()
    assert child.exitcode == 0


# in processes of their own ------------------------------------------------------------------------

_START = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import fast_litellm_shm as ours
import litellm
"""

_EVERY_MODEL = (
    _START
    + """
text = "Der Käse costs 12,345.67 €; isn't it?  <|endoftext|> 天気\\n\\n" * 40
chat = [{"role": "user", "name": "ada", "content": text}, {"role": "system", "content": "be kind"}]
tools = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {
    "type": "object", "properties": {"x": {"type": "string"}}}}}]
found = {}
for model in [*litellm.model_cost, "no such model", ""]:
    tokens = litellm.encode(model, text)
    found[model] = [
        litellm.token_counter(model, text=text),
        litellm.token_counter(model, messages=chat, tools=tools, tool_choice="none"),
        hash(tuple(tokens)),
        litellm.decode(model, tokens),
    ]
found["TIKTOKEN_CACHE_DIR"] = os.environ["TIKTOKEN_CACHE_DIR"]
found["own"] = "litellm.litellm_core_utils.default_encoding" in sys.modules
print(json.dumps(found))
"""
)


def test_every_model_of_the_price_map(litellm: Any, python: Callable[..., str]) -> None:
    ours, plain = (
        json.loads(python(_EVERY_MODEL, FAST_LITELLM_ENABLED=switch, PYTHONHASHSEED="0"))
        for switch in ("true", "false")
    )
    assert len(plain) > 2000
    assert (ours.pop("own"), plain.pop("own")) == (False, True)
    assert ours == plain


_FIRST_ON_A_HOST = (
    _START
    + """
from fast_litellm_shm.fast_litellm import acceleration
import threading
def call():
    return [litellm.token_counter("gpt-4", text="a fox " * 999), litellm.encode("gpt-4", "a fox")]
first = call()
for thread in threading.enumerate():
    if thread.name.startswith("compile "):
        thread.join()
kind = type(litellm.rust_bridge.tokenizer.get_encoding("cl100k_base")).__name__
assert call() == first
*_, last = acceleration._counters.values()
print(json.dumps([kind, last.plain._tables is not None]))
"""
)


def test_the_first_worker_of_a_host_does_not_wait(
    litellm: Any, python: Callable[..., str], tmp_path: Any
) -> None:
    """It counts with litellm's own, until the file is made."""
    found = json.loads(python(_FIRST_ON_A_HOST, FAST_LITELLM_SHM_CACHE=str(tmp_path / "c")))
    assert found == ["SharedEncoding", True]
    assert [name.split("-")[0] for name in os.listdir(tmp_path / "c")] == ["cl100k_base"]


def test_a_program_that_ends_first_leaves_the_file(
    litellm: Any, python: Callable[..., str], tmp_path: Any
) -> None:
    python(
        _START + "litellm.token_counter('gpt-4', text='x')", FAST_LITELLM_SHM_CACHE=str(tmp_path)
    )
    assert [name.split("-")[0] for name in os.listdir(tmp_path)] == ["cl100k_base"]


def test_without_a_file_of_tiktokens(
    litellm: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> Any:
        raise OSError("no such file")

    monkeypatch.setattr(vocabulary, "load", fail)
    monkeypatch.setattr(encodings, "_tables", {})
    encodings._compile("r50k_base")
    assert encodings.tables_of("r50k_base") is None
    assert "litellm counts r50k_base without the shared tables: no such file" in caplog.text
