"""What do `encode`, `fits` and `truncate` cost, beside what one writes with tiktoken?

New English texts, as for the counts, each in an object of its own for each contender; interleaved.
A limit of 200 tokens. With tiktoken, to fit is to have at most so many tokens, and to truncate is
to decode the first so many; with others, the call that their manual has for it. All must find the
same.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import Any

from bench import peers
from bench.result import OURS, Result, Row, Settings, Values, asked, ratio
from bench.token_counters import MODELS, TIKTOKEN, WrongCountError, who
from bench.token_texts import Texts, fresh
from fast_litellm_shm import EncodingUnavailableError, SimpleTokenCounter
from fast_litellm_shm.tokens import encoding

SIZES = (1_000, 100_000)  # characters
LIMIT = 200  # tokens
_TURN = 20_000  # characters a turn

Call = Callable[[str], Any]


def _calls(name: str) -> dict[str, dict[str, Call]]:
    """By what is asked for, and contender."""
    counter, model = SimpleTokenCounter(), MODELS[name]
    found = encoding.load(name)
    encode, decode = found.encode_ordinary, found.decode
    return {
        "encode": {OURS: lambda text: counter.encode(text, model), TIKTOKEN: encode},
        "fits": {
            OURS: lambda text: counter.fits(text, LIMIT, model),
            TIKTOKEN: lambda text: len(encode(text)) <= LIMIT,
        },
        "truncate": {
            OURS: lambda text: counter.truncate(text, LIMIT, model),
            TIKTOKEN: lambda text: decode(encode(text)[:LIMIT]),
        },
    }


def _add_peers(calls: dict[str, dict[str, Call]], name: str, missing: dict[str, str]) -> None:
    try:
        calls["encode"]["quicktok-v1"] = peers.need("quicktok").get_encoding(name).encode_ordinary
    except peers.MissingError as error:
        missing["quicktok-v1"] = str(error)
    try:
        truncate = peers.need("toktok").truncate
        calls["truncate"]["toktok-rs"] = lambda text: truncate(text, LIMIT, name)[0]
    except peers.MissingError as error:
        missing["toktok-rs"] = str(error)
    try:
        till = getattr(peers.need("rs_bpe.bpe").openai, name)().count_till_limit
        calls["fits"]["rs-bpe"] = lambda text: till(text, LIMIT) is not None
    except peers.MissingError as error:
        missing["rs-bpe"] = str(error)


def _took(
    calls: dict[str, Call], texts: Texts, size: int, rounds: int, missing: dict[str, str], what: str
) -> dict[str, Values]:
    """µs a text."""
    took: dict[str, list[float]] = {each: [] for each in calls}
    rng, many = random.Random(6), max(1, _TURN // size)
    for _ in range(rounds):
        batch = [texts.new(size) for _ in range(many)]
        answers: dict[str, list[Any]] = {}
        for each in rng.sample(list(calls), len(calls)):
            call, copies = calls[each], [fresh(text) for text in batch]
            start = time.perf_counter_ns()
            answers[each] = list(map(call, copies))
            spent = time.perf_counter_ns() - start
            if each in took:
                took[each].append(spent / many / 1000)
        for each in [each for each in answers if answers[each] != answers[TIKTOKEN]]:
            if each == OURS:
                raise WrongCountError(f"{what}: ours and tiktoken differ in one of {batch!r:.1000}")
            missing[f"{each}, {what}"] = f"differs from tiktoken in one of {batch!r:.200}"
            took.pop(each, None)
    return {each: Values(values) for each, values in took.items()}


def run(settings: Settings) -> Result:
    """Measure; nothing where no encoding's file is at hand."""
    result = asked(__doc__)
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        place.segment()
        for name in MODELS:
            try:
                calls = _calls(name)
            except EncodingUnavailableError as error:
                result.missing["tiktoken's files"] = str(error)
                continue
            _add_peers(calls, name, result.missing)
            for what, contenders in calls.items():
                for call in contenders.values():
                    call("what is done once is no part of it")
                for size in SIZES:
                    group = f"{what}, {size:,} characters, {name}"
                    found = _took(
                        contenders,
                        Texts("English", 11),
                        size,
                        settings.rounds,
                        result.missing,
                        what,
                    )
                    rows = [Row(each, "µs", v, who(each), group) for each, v in found.items()]
                    result.rows += rows
                    result.ratios.append(
                        ratio(rows, TIKTOKEN, OURS, None, name=f"tiktoken / ours, {group}")
                    )
    return result
