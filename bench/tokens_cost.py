"""What does counting the tokens of a text cost, beside tiktoken and fast-litellm?

All in one process, interleaved. A seen text was counted before; a new one was not, by anybody.
Batch: new texts, in a loop and in one call, in pairs, each first in every other one; when the
process has its helping threads, as far as there are cores.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable

from bench import peers
from bench.result import OURS, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import EncodingUnavailableError, SimpleTokenCounter
from fast_litellm_shm.tokens import encoding

MODEL = "gpt-4o"
SIZES = (1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)  # characters
QUICK_SIZES = SIZES[:-1]
BATCHES = ((20, 100), (2_000, 200))  # characters, texts
SEEN, NEW, PEER = 50.0, 0.95, 1.5  # targets: times tiktoken, times tiktoken, times fast-litellm
BATCH = 1.0  # times a loop
_LOOP, _AT_ONCE = "ours, a loop", "ours, count_tokens_batch"
_WORDS = (
    "the of and a budget requests shared memory segment workers counts, tokens; really 12345 Fälle "
    "über limit's JSON {} return async while (model) temperature=0.7 price München data"
)


def _texts(seed: int, size: int, count: int) -> list[str]:
    """Different texts of words, all of this size."""
    rng, words = random.Random(seed), _WORDS.split()
    out = []
    for i in range(count):
        text = f"{i:x}" if size < 10 else f"{i:x} "
        while len(text) < size:
            text += " ".join(rng.choices(words, k=min(size // 5 + 1, 2000))) + " "
        out.append(chr(0x4E00 + i) if size == 1 else text[:size])
    return out


def _rounds(
    contenders: dict[str, Callable[[str], object]], texts: list[list[str]], new: bool
) -> dict[str, Values]:
    """µs a text: each round, all contenders in turn count the same texts, in an order of its own,
    since who comes second finds them in the cache. new: no text comes in two rounds."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    rng = random.Random(3)
    for batch in texts:
        for name in rng.sample(list(contenders), len(contenders)):
            count = contenders[name]
            if not new:
                count(batch[0])
            start = time.perf_counter_ns()
            for text in batch:
                count(text)
            took[name].append((time.perf_counter_ns() - start) / len(batch) / 1000)
    return {name: Values(values) for name, values in took.items()}


def _have_helpers(counter: SimpleTokenCounter) -> None:
    """Count as much in batches as all helping threads want to see before they are made, and wait
    until they are: that is done once, and is no part of what a batch takes."""
    for core in range(min(os.cpu_count() or 1, 8)):
        spent, i = 0.0, 0
        while spent < 0.15:
            texts = _texts(2 * 10**6 + 1000 * core + i, 10_000, 100)
            start = time.perf_counter()
            counter.count_tokens_batch(texts, MODEL)
            spent, i = spent + time.perf_counter() - start, i + 1
        time.sleep(0.3)


def _batch(counter: SimpleTokenCounter, size: int, count: int, rounds: int) -> dict[str, Values]:
    """ms. Both of a pair count texts of their own."""
    took: dict[str, list[float]] = {_LOOP: [], _AT_ONCE: []}
    for i in range(rounds):
        for seed, name in enumerate(sorted(took, reverse=i % 2 == 0), 2 * i):
            texts = _texts(10**6 + 1000 * size + seed, size, count)
            start = time.perf_counter_ns()
            if name == _LOOP:
                for text in texts:
                    counter.count_tokens(text, MODEL)
            else:
                counter.count_tokens_batch(texts, MODEL)
            took[name].append((time.perf_counter_ns() - start) / 1e6)
    return {name: Values(values) for name, values in took.items()}


def run(settings: Settings) -> Result:
    """Measure; nothing where no encoding's file is at hand."""
    result, rounds = asked(__doc__), settings.rounds
    try:
        found = encoding.load(encoding.name_of(MODEL))
    except EncodingUnavailableError as error:
        result.missing["tiktoken's files"] = str(error)
        return result
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name  # of what else a count asks for
        counter = SimpleTokenCounter(segment=place.segment())
        contenders: dict[str, Callable[[str], object]] = {
            "ours": lambda text: counter.count_tokens(text, MODEL),
            "tiktoken": lambda text: len(found.encode(text, disallowed_special=())),
        }
        try:
            peer = peers.need("fast_litellm").SimpleTokenCounter()
            contenders["fast-litellm"] = lambda text: peer.count_tokens(text, MODEL)
        except peers.MissingError as error:
            result.missing["fast-litellm"] = str(error)
        for count in contenders.values():
            count("what is done once is no part of it")
        for size in settings.pick(SIZES, QUICK_SIZES):
            each = max(1, min(200, 100_000 // size))
            many = rounds if size < 1_000_000 else max(rounds // 4, 2)
            texts = _texts(size, size, each * many)
            batches = [texts[i * each : (i + 1) * each] for i in range(many)]
            repeated = batches[-1][:1] * min(each, 50)
            for group, values in (
                ("new", _rounds(contenders, batches, True)),
                ("seen", _rounds(contenders, [repeated] * (many // 2 + 1), False)),
            ):
                result.rows += [
                    Row(name, "µs", value, name, group, size, {"characters": f"{size:,}"})
                    for name, value in values.items()
                ]
                result.ratios += _ratios(result.rows, group, size)
        _have_helpers(counter)
        for size, many in BATCHES:
            group = f"a batch of {many} texts of {size:,} characters"
            result.rows += [
                Row(name, "ms", found_ms, OURS, group)
                for name, found_ms in _batch(counter, size, many, rounds).items()
            ]
            title = f"loop / batch, {many} × {size:,} characters"
            result.ratios.append(
                ratio(result.rows, _LOOP, _AT_ONCE, BATCH, name=title, group=group)
            )
    result.plots = [
        Plot(
            f"tokens_{group}",
            "lines",
            f"Tokens of a text counted, {what}",
            (group,),
            "microseconds a text",
            "characters",
        )
        for group, what in (("new", "new to everybody"), ("seen", "seen before"))
    ]
    return result


def _ratios(rows: list[Row], group: str, size: int) -> list[Ratio]:
    """Those that have a target at this size."""
    here = [row for row in rows if row.group == group and row.x == size]
    aims = [("tiktoken", NEW, "token count, new text")] if group == "new" else []
    if size >= 1000:
        aims += (
            [("fast-litellm", PEER, "token count, new text")]
            if group == "new"
            else [("tiktoken", SEEN, "token count, text seen before, 1,000+ characters")]
        )
    return [
        ratio(here, who, "ours", target, promise=promise, name=f"{who} / ours, {size:,} characters")
        for who, target, promise in aims
    ]
