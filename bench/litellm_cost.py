"""What does litellm.token_counter cost with the memo under it, and without?

A chat, counted for the second time, as each request of a conversation repeats the earlier ones.
All in one process, interleaved; the counts must be the same.
"""

from __future__ import annotations

import os
import random
import time

from bench import peers
from bench.result import OURS, Plot, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import apply_acceleration, remove_acceleration

MODELS = ("gpt-4o", "gpt-4", "claude-sonnet-4-5", "deepseek-chat")
TARGET = 3.0
_WORDS = "the shared memory of workers counts tokens, limits and 42 prices für alle"


def _chat(messages: int, words: int) -> list[dict[str, str]]:
    rng = random.Random(7)
    vocabulary = _WORDS.split()
    return [
        {"role": "user", "content": " ".join(rng.choices(vocabulary, k=words))}
        for _ in range(messages)
    ]


def run(settings: Settings) -> Result:
    """Measure; nothing where litellm is not installed."""
    result = asked(__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"
    chats = {
        "50 × 400 words": _chat(50, 400),
        "10 × 60 words": _chat(10, 60),
    }
    try:
        litellm = peers.need("litellm")
    except peers.MissingError as error:
        result.missing["litellm"] = str(error)
        return result
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        for name, chat in chats.items():
            for model in settings.pick(MODELS, MODELS[:2]):
                took: dict[str, list[float]] = {"ours": [], "litellm": []}
                for _ in range(max(settings.rounds // 2, 2)):
                    for who, change in (
                        ("ours", apply_acceleration),
                        ("litellm", remove_acceleration),
                    ):
                        change()
                        expected = litellm.token_counter(model=model, messages=chat)
                        start = time.perf_counter_ns()
                        count = litellm.token_counter(model=model, messages=chat)
                        took[who].append((time.perf_counter_ns() - start) / 1e6)
                        assert count == expected, f"{count} tokens with the memo, not {expected}"
                group = f"{name}, {model}"
                rows = [
                    Row(
                        f"{'with' if who == OURS else 'without'} the memo, {model}",
                        "ms",
                        Values(values),
                        who,
                        group,
                    )
                    for who, values in took.items()
                ]
                result.rows += rows
                if name.startswith("50"):
                    result.ratios.append(
                        ratio(
                            rows,
                            rows[1].name,
                            rows[0].name,
                            TARGET,
                            name=f"litellm / ours, {group}",
                        )
                    )
        remove_acceleration()
    result.plots.append(
        Plot(
            "litellm_cost",
            "bars",
            "litellm.token_counter of a chat seen before",
            tuple(dict.fromkeys(row.group for row in result.rows)),
            "milliseconds a chat",
        )
    )
    return result
