"""How much slower than others can a text be, of a million characters?

Texts of one kind from end to end that make some tokenizers slow: one letter, spaces, combining
marks, base64, characters in turn; and the four kinds of other texts. In each round each text is
counted once, a little shorter than before, so that no text comes twice; the ratio is the slowest
over the median of all in that round. What ours counts in the first 100,000 characters is compared
with tiktoken.
"""

from __future__ import annotations

import base64
import os
import random
import string
import time
from collections.abc import Callable

from bench import peers
from bench.result import OURS, Plot, Ratio, Result, Row, Settings, Values, asked
from bench.token_counters import MODELS, WrongCountError
from bench.token_texts import KINDS, Texts, fresh
from fast_litellm_shm import EncodingUnavailableError, SimpleTokenCounter
from fast_litellm_shm.tokens import encoding

SIZE, CHECKED = 1_000_000, 100_000  # characters
GOAL = 5.0  # times the median text


def _drawn(letters: str) -> Callable[[int], str]:
    return lambda size: "".join(random.Random(9).choices(letters, k=size))


def _in_turn(part: str) -> Callable[[int], str]:
    return lambda size: part * (size // len(part) + 1)


def _base64(size: int) -> str:
    return base64.b64encode(random.Random(9).randbytes(size)).decode()


HARD: dict[str, Callable[[int], str]] = {
    "a, and a again": _in_turn("a"),
    "spaces": _in_turn(" "),
    "line ends": _in_turn("\n"),
    "tabs, then line ends": _in_turn("\t" * 500 + "\n" * 500),
    "combining marks": _in_turn("\u0301"),
    "a letter, and combining marks": _in_turn("e\u0301\u0323\u0308"),
    "zero-width joiners": _in_turn("\u200d"),
    "base64": _base64,
    "random letters": _drawn(string.ascii_letters),
    "random digits": _drawn(string.digits),
    "random punctuation": _drawn(string.punctuation),
    "random ideographs": _drawn("".join(map(chr, range(0x4E00, 0x9FA6)))),
    "random emoji": _drawn("".join(map(chr, range(0x1F300, 0x1F650)))),
    "ab in turn": _in_turn("ab"),
    "a space and a letter in turn": _in_turn(" a"),
    "a space and a line end in turn": _in_turn(" \n"),
    "a letter and a digit in turn": _in_turn("a1"),
    "small and capital letters in turn": _in_turn("aA"),
    "apostrophes": _in_turn("'"),
    "contractions": _in_turn("'s'll've"),
    "Latin and Greek letters in turn": _in_turn("aα"),
}


def _texts() -> dict[str, str]:
    out = {kind: Texts(kind, 7).new(SIZE) for kind in KINDS}
    return {**out, **{name: make(SIZE)[:SIZE] for name, make in HARD.items()}}


def _check(texts: dict[str, str], counter: SimpleTokenCounter, name: str, model: str) -> None:
    encode = encoding.load(name).encode_ordinary
    for what, text in texts.items():
        start = text[:CHECKED]
        ours, right = counter.count_tokens(start, model), len(encode(start))
        if ours != right:
            raise WrongCountError(f"{what}, {name}: {ours} tokens, and {right} by tiktoken")


def run(settings: Settings) -> Result:
    """Measure; nothing where no encoding's file is at hand."""
    result, texts = asked(__doc__), _texts()
    rounds = settings.pick(max(settings.rounds // 2, 3), 2)
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        counter = SimpleTokenCounter(segment=place.segment())
        for name, model in MODELS.items():
            try:
                _check(texts, counter, name, model)
            except EncodingUnavailableError as error:
                result.missing["tiktoken's files"] = str(error)
                continue
            took: dict[str, list[float]] = {what: [] for what in texts}
            for i in range(1, rounds + 1):
                for what in random.Random(i).sample(list(texts), len(texts)):
                    text = fresh(texts[what][i:])
                    start = time.perf_counter_ns()
                    counter.count_tokens(text, model)
                    took[what].append((time.perf_counter_ns() - start) / 1e6)
            group = f"a million characters, {name}"
            result.rows += [Row(what, "ms", Values(v), OURS, group) for what, v in took.items()]
            by_round = [sorted(values) for values in zip(*took.values(), strict=True)]
            result.ratios.append(
                Ratio(
                    f"the slowest / the median text, {name}",
                    Values(values[-1] / values[len(values) // 2] for values in by_round),
                    GOAL,
                    False,
                    promise="the slowest text of a million characters",
                )
            )
    result.plots = [
        Plot(
            f"tokens_hard_{name}",
            "bars",
            f"A million characters, {name}",
            (f"a million characters, {name}",),
            "milliseconds",
        )
        for name in MODELS
    ]
    return result
