"""What does it cost that litellm counts, encodes, decodes and trims, accelerated and without?

New texts: none was counted before. A chat seen before: each request of a conversation repeats the
earlier ones. All in one process, interleaved; what is returned must be the same. First use: workers
of their own, one after another, with the vocabulary files there.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from bench import peers
from bench.result import OURS, Plot, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import apply_acceleration, remove_acceleration

MODELS = ("gpt-4o", "gpt-4", "claude-sonnet-4-5", "deepseek-chat")
LITELLM = "litellm"
TARGET = 3.0
_WORDS = (
    "the shared memory of workers counts tokens, limits and 42 prices für alle; whoever asks again "
    "isn't told that it took 1,024 characters to remember what had been forgotten (see page 17)"
)
_FIRST_USE = """
import json, sys, time, warnings
warnings.simplefilter("ignore")
import fast_litellm_shm
def private():
    with open("/proc/self/smaps_rollup") as file:
        lines = [line.split() for line in file]
    return sum(int(line[1]) for line in lines if line[0] == "Private_Dirty:") / 1024
import litellm
before, start = private(), time.perf_counter()
found = [litellm.token_counter(model, text="a text") for model in ("gpt-4", "gpt-4o")]
print(json.dumps([(time.perf_counter() - start) * 1e3, private() - before, found]))
"""


def _text(rng: random.Random, chars: int) -> str:
    words = rng.choices(_WORDS.split(), k=chars // 3)
    return " ".join(words)[:chars]


def _chat(rng: random.Random, messages: int, chars: int) -> list[dict[str, str]]:
    return [
        {"role": "assistant" if i % 2 else "user", "content": _text(rng, chars)}
        for i in range(messages)
    ]


def _works(litellm: Any, model: str) -> Iterator[tuple[str, Callable[[random.Random], Any]]]:
    """What is measured: its name, and a function that makes a call with texts of its own."""

    def count(chars: int) -> Callable[[random.Random], Any]:
        def make(rng: random.Random) -> Any:
            text = _text(rng, chars)
            return lambda: litellm.token_counter(model, text=text)

        return make

    def count_chat(rng: random.Random) -> Any:
        chat = _chat(rng, 50, 2000)
        return lambda: litellm.token_counter(model, messages=chat)

    def encode(chars: int) -> Callable[[random.Random], Any]:
        def make(rng: random.Random) -> Any:
            text = _text(rng, chars)
            return lambda: litellm.encode(model, text)

        return make

    def decode(rng: random.Random) -> Any:
        tokens = [rng.randrange(100_000) for _ in range(2000)]
        return lambda: litellm.decode(model, tokens)

    def trim(rng: random.Random) -> Any:
        chat = _chat(rng, 100, 1000)
        return lambda: litellm.utils.trim_messages(chat, model, max_tokens=10_000)

    yield "token_counter, 10 characters", count(10)
    yield "token_counter, 1,000 characters", count(1000)
    yield "token_counter, 100,000 characters", count(100_000)
    yield "token_counter, 50 messages of 2,000 characters", count_chat
    yield "encode, 1,000 characters", encode(1000)
    yield "encode, 100,000 characters", encode(100_000)
    yield "decode, 2,000 tokens", decode
    yield "trim_messages, 100 messages of 1,000 characters", trim


def _interleaved(rounds: int, make: Callable[[int], Any], warm: int) -> dict[str, list[float]]:
    """Microseconds of a call with ours and without. make: of a number, the call with its texts.
    warm: what to add to the number of a round for the call that is not measured."""
    took: dict[str, list[float]] = {OURS: [], LITELLM: []}
    for number in range(rounds):
        found = []
        for who, change in ((OURS, apply_acceleration), (LITELLM, remove_acceleration)):
            change()
            make(number + warm)()
            call = make(number)
            start = time.perf_counter_ns()
            found.append(call())
            took[who].append((time.perf_counter_ns() - start) / 1e3)
        assert found[0] == found[1], f"ours gives {found[0]!r}, not {found[1]!r}"
    return took


def _add(
    result: Result,
    group: str,
    took: dict[str, list[float]],
    unit: str,
    target: float | None,
    more: str = "",
) -> None:
    rows = [
        Row(
            f"{'accelerated' if who == OURS else 'litellm alone'}{more}",
            unit,
            Values(took[who]),
            who,
            group,
        )
        for who in (OURS, LITELLM)
    ]
    result.rows += rows
    name = f"litellm / ours, {group}{more}"
    result.ratios.append(ratio(rows, rows[1].name, rows[0].name, target, name=name))


def _first_use(settings: Settings, result: Result) -> None:
    milliseconds: dict[str, list[float]] = {OURS: [], LITELLM: []}
    megabytes: dict[str, list[float]] = {OURS: [], LITELLM: []}
    for number in range(settings.pick(4, 3)):
        counts = []
        for who, switch in ((OURS, "true"), (LITELLM, "false")):
            done = subprocess.run(
                [sys.executable, "-c", _FIRST_USE],
                env={**os.environ, "FAST_LITELLM_ENABLED": switch},
                capture_output=True,
                text=True,
                check=True,
            )
            spent, private, found = json.loads(done.stdout)
            counts.append(found)
            if number:  # the first one makes the vocabulary files, and reads litellm from the disk
                milliseconds[who].append(spent)
                megabytes[who].append(private)
        assert counts[0] == counts[1]
    group = "first count of a worker, gpt-4 and gpt-4o"
    _add(result, group, milliseconds, "ms", None)
    _add(result, group, megabytes, "MB", None, ", private memory")


def run(settings: Settings) -> Result:
    """Measure; nothing where litellm is not installed."""
    result = asked(__doc__)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    try:
        litellm = peers.need("litellm")
    except peers.MissingError as error:
        result.missing["litellm"] = str(error)
        return result
    rounds = max(settings.rounds // 2, 2)
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        for model in settings.pick(MODELS[:2], MODELS[:1]):
            for name, make in _works(litellm, model):
                took = _interleaved(rounds, lambda i, make=make: make(random.Random(i)), 10_000)  # type: ignore[misc]
                _add(result, f"{name}, {model}", took, "us", None)
        chat = _chat(random.Random(7), 50, 2400)
        for model in settings.pick(MODELS, MODELS[:2]):

            def count(_: int, model: str = model) -> Any:
                return lambda: litellm.token_counter(model=model, messages=chat)

            took = _interleaved(rounds, count, 0)
            _add(result, f"a chat seen before, {model}", took, "us", TARGET)
        remove_acceleration()
        _first_use(settings, result)
    result.plots.append(
        Plot(
            "litellm_cost",
            "bars",
            "litellm, accelerated and alone",
            tuple(dict.fromkeys(row.group for row in result.rows if row.unit == "us")),
            "microseconds a call",
        )
    )
    return result
