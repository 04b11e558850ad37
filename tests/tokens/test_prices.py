"""Prices and limits: from litellm's file or the user's, never invented."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support import texts
from support.locks import is_free_in_a_fork

import fast_litellm_shm as fast_litellm
from fast_litellm_shm import PriceFileError, Segment, SimpleTokenCounter, UnknownModelError
from fast_litellm_shm.tokens import encoding, prices

needs_litellm = pytest.mark.skipif(
    encoding.litellm_folder() is None, reason="litellm is not installed (the extra `litellm`)"
)
MINE = {
    "mine": {
        "input_cost_per_token": 2e-6,
        "output_cost_per_token": 8e-6,
        "max_input_tokens": 10,
        "max_output_tokens": 5,
        "litellm_provider": "me",
    },
    "long": {
        "input_cost_per_token": 1e-6,
        "output_cost_per_token": 2e-6,
        "input_cost_per_token_above_128k_tokens": 3e-6,
        "output_cost_per_token_above_128k_tokens": 4e-6,
        "input_cost_per_token_above_1m_tokens": 9e-6,
        "input_cost_per_token_above_256k_tokens": 5e-6,
        "input_cost_per_token_above_256k_tokens_priority": 99,
        "max_tokens": 7,
    },
    "tiers": {
        "tiered_pricing": [
            {"range": [100, 200], "input_cost_per_token": 2.0, "output_cost_per_token": 20.0},
            {"range": [0, 100], "input_cost_per_token": 1.0, "output_cost_per_token": 10.0},
        ]
    },
    "ft:base": {"input_cost_per_token": 1.0, "output_cost_per_token": 2.0},
    "xai/grok": {
        "input_cost_per_token": 1.0,
        "input_cost_per_token_above_128k_tokens": 2.0,
        "litellm_provider": "xai",
    },
    "embedding": {"input_cost_per_token": 1.0, "max_input_tokens": 8191},
    "picture": {"output_cost_per_image": 0.04, "max_input_tokens": None},
    "text": {"input_cost_per_token": "1e-6", "output_cost_per_token": 0.0},
    "negative": {"input_cost_per_token": -1e-6},
    "nan": {"input_cost_per_token": float("nan")},
    "latest": {"alias_of": "mine"},
    "nowhere": {"alias_of": "lost"},
    "named": {"input_cost_per_token": 3.0, "aliases": ["other name", "mine", 7]},
    "vertex": {"input_cost_per_token": 0, "litellm_provider": "vertex_ai-language-models"},
}


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if litellm were not installed."""
    monkeypatch.setattr(encoding, "litellm_folder", lambda: None)
    monkeypatch.setattr(prices, "_map", None)
    monkeypatch.setattr(prices, "_lookup_failures", 0)


@pytest.fixture
def mine(alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A price file of the user's, and nothing else."""
    path = tmp_path / "prices.json"
    path.write_text(json.dumps(MINE))
    monkeypatch.setenv("FAST_LITELLM_PRICES", str(path))
    return path


@pytest.mark.usefixtures("mine")
def test_costs() -> None:
    cost = SimpleTokenCounter().estimate_cost
    assert cost(1_000_000, 0, "mine") == pytest.approx(2)
    assert cost(0, 1_000_000, "mine") == pytest.approx(8)
    assert cost(1000, 500, "mine") == pytest.approx(0.006)
    assert cost(0, 0, "mine") == 0.0
    assert isinstance(cost(0, 0, "mine"), float)
    assert cost(5, 5, "me/mine") == cost(5, 5, "mine")
    assert cost(input_tokens=2, output_tokens=1, model="ft:base:organization::id") == 4
    assert cost(3, 0, "vertex_ai/vertex") == 0
    assert cost(5, 5, "latest") == cost(5, 5, "mine")
    assert cost(2, 0, "other name") == 6


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("tokens", "price", "output"),
    [(1, 1e-6, 2e-6), (128_000, 1e-6, 2e-6), (128_001, 3e-6, 4e-6), (256_000, 3e-6, 4e-6)]
    + [(256_001, 5e-6, 2e-6), (10**7, 5e-6, 2e-6)],
)
def test_long_input_costs_more(tokens: int, price: float, output: float) -> None:
    assert prices.estimate_cost(tokens, 10, "long") == pytest.approx(tokens * price + 10 * output)


@pytest.mark.usefixtures("mine")
def test_tiers() -> None:
    cost = prices.estimate_cost
    assert cost(100, 1, "tiers") == 110
    assert cost(101, 1, "tiers") == 222
    assert cost(1000, 1, "tiers") == 2020
    assert cost(128_000, 0, "xai/grok") == 256_000
    assert cost(127_999, 0, "xai/grok") == 127_999


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    "model",
    ["nobody", "nowhere", "", "other/mine", "me/nobody", "min", "ft:", "xft:base:o", "sample_spec"],
)
def test_no_price_is_invented(model: str) -> None:
    with pytest.raises(
        UnknownModelError, match="is not in .*prices.json; name its price"
    ) as caught:
        prices.estimate_cost(1, 1, model)
    assert repr(model) in str(caught.value)
    assert isinstance(caught.value, LookupError)


@pytest.mark.usefixtures("mine")
def test_models_without_a_price_per_token() -> None:
    assert prices.estimate_cost(3, 0, "embedding") == 3
    with pytest.raises(
        UnknownModelError, match="'embedding', but no price per token of its output"
    ):
        prices.estimate_cost(3, 1, "embedding")
    with pytest.raises(UnknownModelError, match="'picture', but no price per token of its input"):
        prices.estimate_cost(1, 0, "picture")


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("model", ["text", "negative", "nan"])
def test_wrong_prices(model: str) -> None:
    with pytest.raises(PriceFileError, match=f"input_cost_per_token of '{model}' must be dollars"):
        prices.estimate_cost(1, 0, model)


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("bad", [1.0, float("nan"), "1", None, True])
def test_tokens_must_be_whole(bad: Any) -> None:
    for arguments, name in (((bad, 1), "input_tokens"), ((1, bad), "output_tokens")):
        with pytest.raises(TypeError) as caught:
            prices.estimate_cost(arguments[0], arguments[1], "mine")
        assert str(caught.value) == f"{name} must be an int, not {bad!r}"


@pytest.mark.usefixtures("mine")
def test_tokens_must_not_be_negative() -> None:
    with pytest.raises(ValueError, match="input_tokens must be 0 or more, not -1"):
        prices.estimate_cost(-1, 0, "mine")
    with pytest.raises(ValueError, match="output_tokens must be 0 or more, not -7"):
        prices.estimate_cost(0, -7, "mine")


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("bad", [None, 7, b"mine", ["mine"]])
def test_model_must_be_a_str(bad: Any) -> None:
    counter = SimpleTokenCounter()
    for call in (lambda: counter.estimate_cost(1, 1, bad), lambda: counter.get_model_limits(bad)):
        with pytest.raises(TypeError) as caught:
            call()
        assert str(caught.value) == f"model must be a str, not {bad!r}"


@pytest.mark.usefixtures("mine")
def test_limits() -> None:
    limits = SimpleTokenCounter(1234).get_model_limits
    assert limits("mine") == limits("me/mine")
    assert limits("mine") == {"context_window": 10, "max_input_tokens": 10, "max_output_tokens": 5}
    assert limits("embedding") == {
        "context_window": 8191,
        "max_input_tokens": 8191,
        "max_output_tokens": None,
    }
    assert limits("long")["context_window"] == 7
    assert limits("picture")["context_window"] == 1234
    assert limits("nobody") == dict.fromkeys(limits("mine"), 1234)


@pytest.mark.usefixtures("mine")
@pytest.mark.skipif("cl100k_base" not in texts.encodings_at_hand(), reason=texts.WHY_NOT)
def test_validate_input(segment: Segment) -> None:
    counter = SimpleTokenCounter(20, segment=segment)
    assert counter.validate_input("a " * 5, "mine") is True
    assert counter.validate_input("a" + " a" * 9, "mine") is True
    with pytest.raises(ValueError, match="the text has 11 tokens, but mine takes at most 10"):
        counter.validate_input("a" + " a" * 10, "mine")
    assert counter.validate_input("a" + " a" * 19, "nobody") is True
    with pytest.raises(ValueError, match="the text has 21 tokens, but nobody takes at most 20"):
        counter.validate_input("a" + " a" * 20, "nobody")


@pytest.mark.usefixtures("alone")
def test_without_any_map() -> None:
    assert fast_litellm.get_pricing_status() == {
        "json_loaded": False,
        "models_loaded": 0,
        "lookup_failures": 0,
        "source": None,
        "error": None,
    }
    with pytest.raises(UnknownModelError, match="'gpt-4o' has no known price: install litellm"):
        prices.estimate_cost(1, 1, "gpt-4o")
    assert SimpleTokenCounter().get_model_limits("gpt-4o")["context_window"] == 4096
    assert fast_litellm.get_pricing_status()["lookup_failures"] == 2


def test_status(mine: Path) -> None:
    assert fast_litellm.get_pricing_status() == {
        "json_loaded": True,
        "models_loaded": len(MINE),  # one is an alias of nothing, one has another name
        "lookup_failures": 0,
        "source": str(mine),
        "error": None,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "as JSON"),
        ("[" * 100_000, "as JSON"),
        ("[]", "must hold a JSON object"),
        ('{"m": 7}', "'m' must be a JSON object, not 7"),
        (None, "No such file"),
    ],
)
def test_a_broken_file_is_an_error(mine: Path, text: str | None, message: str) -> None:
    if text is None:
        mine.unlink()
    else:
        mine.write_text(text)
    for call in (lambda: prices.estimate_cost(1, 1, "mine"), lambda: prices.limits("mine")):
        with pytest.raises(PriceFileError, match=message) as caught:
            call()
        assert "FAST_LITELLM_PRICES" in str(caught.value)
        assert str(mine) in str(caught.value)
        assert isinstance(caught.value, ValueError)
    status = fast_litellm.get_pricing_status()
    assert not status["json_loaded"]
    assert message in status["error"]


def test_the_file_can_be_changed_for_another(
    mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prices.estimate_cost(1, 0, "mine") == 2e-6
    other = tmp_path / "other.json"
    other.write_text('{"mine": {"input_cost_per_token": 5.0}}')
    monkeypatch.setenv("FAST_LITELLM_PRICES", str(other))
    assert prices.estimate_cost(1, 0, "mine") == 5.0


@needs_litellm
def test_litellms_map_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = "litellm" in sys.modules
    assert prices.estimate_cost(1000, 1000, "gpt-4o") == pytest.approx(0.0125)
    assert prices.estimate_cost(1000, 1000, "openai/gpt-4o") == pytest.approx(0.0125)
    assert prices.limits("gpt-4o") == {
        "context_window": 128_000,
        "max_input_tokens": 128_000,
        "max_output_tokens": 16_384,
    }
    with pytest.raises(UnknownModelError):
        prices.estimate_cost(1, 1, "sample_spec")
    with pytest.raises(UnknownModelError):  # Azure's price is Azure's
        prices.estimate_cost(1, 1, "azure/whisper-99")
    status = fast_litellm.get_pricing_status()
    assert status["json_loaded"]
    assert status["models_loaded"] > 1000
    path = tmp_path / "prices.json"
    path.write_text('{"gpt-4o": {"input_cost_per_token": 5.0}, "new": {}}')
    monkeypatch.setenv("FAST_LITELLM_PRICES", str(path))
    assert prices.estimate_cost(1, 0, "gpt-4o") == 5.0  # the user's wins
    assert prices.estimate_cost(1, 0, "gpt-4") > 0  # and litellm's others stay
    assert fast_litellm.get_pricing_status()["models_loaded"] == status["models_loaded"] + 1
    assert ("litellm" in sys.modules) == before


def test_fork_while_another_thread_reads_the_map() -> None:
    assert is_free_in_a_fork(prices, "_lock")


@pytest.mark.parametrize(
    "tier",
    [5, "range", None, {"range": [5]}, {"range": 5}, {"range": ["0", 5]}, {"range": [True, 5]}],
)
def test_tiers_of_another_form_are_named(
    alone: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tier: object
) -> None:
    (tmp_path / "p.json").write_text(json.dumps({"bad": {"tiered_pricing": [tier]}}))
    monkeypatch.setenv("FAST_LITELLM_PRICES", str(tmp_path / "p.json"))
    with pytest.raises(PriceFileError, match="tiered_pricing of 'bad' must be a list") as caught:
        prices.estimate_cost(1, 1, "bad")
    assert repr(tier) in str(caught.value)


@pytest.mark.usefixtures("mine")
def test_more_tokens_than_there_are() -> None:
    with pytest.raises(ValueError, match="output_tokens must be below"):
        prices.estimate_cost(1, 10**400, "mine")
