"""Costs of chat models: what litellm's own calculator says."""

from __future__ import annotations

from typing import Any

import pytest

from fast_litellm_shm.tokens import prices

TOKENS = ((1000, 500), (150_000, 10), (300_000, 10))  # below and above the usual thresholds
OTHERWISE = ("gemini-exp-1206",)  # litellm makes it free by itself, whatever its map says


@pytest.mark.filterwarnings("ignore:.*ReadOnly:UserWarning")  # of litellm's types
def test_costs_are_litellms(litellm: Any) -> None:
    models = [
        model
        for model, entry in litellm.model_cost.items()
        if entry.get("mode") == "chat" and "input_cost_per_token" in entry
        if "off_peak_pricing" not in entry  # ours is the standard price, at all hours
        and model not in OTHERWISE
    ]
    assert len(models) > 1000
    wrong = []
    for model in models[:: len(models) // 400]:
        provider = litellm.model_cost[model]["litellm_provider"]
        for given, made in TOKENS:
            theirs = sum(
                litellm.cost_per_token(
                    model=model,
                    prompt_tokens=given,
                    completion_tokens=made,
                    custom_llm_provider=provider,
                )
            )
            ours = prices.estimate_cost(given, made, model)
            if ours != pytest.approx(theirs, rel=1e-9):
                wrong.append((model, given, made, theirs, ours))
    assert wrong == []
