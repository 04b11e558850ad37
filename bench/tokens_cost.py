"""What does counting the tokens of a text cost, beside tiktoken and other tokenizers?

All in one process, interleaved. A new text was counted by nobody before, in no part of it word for
word (`bench/token_texts.py`). In each round all contenders count the same texts, each in objects of
its own that were made just before, in an order of the round's own, and must all find the same
counts. A turn begins with texts that are not measured, so that a contender's tables are in the
processor's cache, as they are while one counts many texts. A seen text was counted before. Batch:
new texts, on all cores where the library uses them. toktok-rs takes a list; its private count() is
measured apart, and is not what is compared with.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence

from bench import peers
from bench.result import OURS, Plot, Ratio, Result, Row, Settings, Values, asked, ratio
from bench.token_counters import (
    BEST,
    INNER,
    MODELS,
    SEED,
    SEED_KINDS,
    TIKTOKEN,
    Counting,
    WrongCountError,
    opened,
    who,
)
from bench.token_texts import KINDS, Texts, digest, fresh
from fast_litellm_shm import EncodingUnavailableError, SimpleTokenCounter
from fast_litellm_shm.tokens import encoding

SIZES, LARGEST = (1, 10, 100, 1_000, 10_000, 100_000), 1_000_000  # characters
INNER_SIZES = (1, 10, 100, 1_000)
# Times tiktoken, by encoding and size.
GOALS = {
    "cl100k_base": {10: 3.0, 100: 5.0, 1_000: 8.0, 10_000: 12.0, 100_000: 15.0},
    "o200k_base": {10: 2.0, 100: 4.0, 1_000: 6.0, 10_000: 8.0, 100_000: 10.0},
}
BEST_GOAL, SEEN_GOAL, BATCH_GOAL = 1.0, 50.0, 1.0  # times the best peer; tiktoken; a loop
TOP_KIND = "English"  # whose ratios are in the table of targets; those of all kinds are below it
MEMO_ENCODING = "o200k_base"
SEEN_SIZES = (1_000, 10_000, 100_000)
BATCHES = ((20, 100), (2_000, 200))  # characters, texts
_TURN = 20_000  # characters of each size in a turn, but 200 texts at most
_LOOP, _AT_ONCE = "ours, a loop", "ours, count_tokens_batch"


class _Rounds:
    """What each contender took for the texts of each size, in µs a text."""

    def __init__(self, contenders: Mapping[str, Counting], missing: dict[str, str]) -> None:
        self._contenders, self._missing = contenders, missing
        self._rng = random.Random(3)
        self._took: dict[int, dict[str, list[float]]] = {}

    def add(self, warm: list[str], batches: Mapping[int, list[str]]) -> None:
        """One round: all contenders in turn, in an order of its own, and so the sizes in each turn.
        warm: texts that begin each turn and do not count, since the contender before has filled the
        processor's cache."""
        counts: dict[tuple[int, str], list[int]] = {}
        for name in self._rng.sample(list(self._contenders), len(self._contenders)):
            count = self._contenders[name]
            count([fresh(text) for text in warm])
            for size in self._rng.sample(list(batches), len(batches)):
                copies = [fresh(text) for text in batches[size]]
                start = time.perf_counter_ns()
                counts[size, name] = count(copies)
                took = (time.perf_counter_ns() - start) / len(copies) / 1000
                self._took.setdefault(size, {}).setdefault(name, []).append(took)
        for (size, name), found in counts.items():
            if found != counts[size, TIKTOKEN]:
                self._differs(name, batches[size])

    def _differs(self, name: str, batch: list[str]) -> None:
        if name == OURS:
            raise WrongCountError(f"ours and tiktoken differ in one of {batch!r:.1000}")
        self._missing[name] = f"counts otherwise than tiktoken in one of {batch!r:.200}"

    def found(self, size: int) -> dict[str, Values]:
        """Of those that have always counted as tiktoken does, in the order of the contenders."""
        took = self._took[size]
        return {n: Values(took[n]) for n in self._contenders if n not in self._missing}


def _row(name: str, found: Values, unit: str, group: str, size: int | None = None) -> Row:
    notes: dict[str, str | float] = {} if size is None else {"characters": f"{size:,}"}
    return Row(name, unit, found, who(name), group, size, notes)


def group_of(name: str, kind: str) -> str:
    """The rows of an encoding and a kind of text that is new."""
    return f"new text, {kind}, {name}"


def _best(rows: Sequence[Row]) -> Ratio | None:
    """The quicker peer of each round over ours."""
    found = {row.name: row.found.values for row in rows}
    there = [found[name] for name in BEST if name in found]
    if not there:
        return None
    best = map(min, zip(*there, strict=True))
    over = Values(a / b for a, b in zip(best, found[OURS], strict=True))
    return Ratio("", over, BEST_GOAL)


def ratios(rows: Sequence[Row], name: str, kind: str, size: int) -> list[Ratio]:
    """Ours against tiktoken and the best peer, of one encoding, kind and size."""
    here = [row for row in rows if row.x == size]
    told = f"{kind}, {size:,} characters, {name}"
    goal = GOALS[name].get(size)
    top = kind == TOP_KIND and goal is not None
    out = [
        ratio(
            here,
            TIKTOKEN,
            OURS,
            goal,
            promise=f"counting new text, against tiktoken, {name}" if top else None,
            name=f"tiktoken / ours, {told}",
        )
    ]
    best = _best(here)
    out.append(
        Ratio(
            f"the best of {' and '.join(BEST)} / ours, {told}",
            best.found if best else None,
            BEST_GOAL if goal is not None else None,
            promise=f"counting new text, against the best peer, {name}" if top else None,
            missing=None if best else f"neither {' nor '.join(BEST)} is there",
        )
    )
    return out


def _measure(
    contenders: Mapping[str, Counting],
    texts: Texts,
    sizes: Sequence[int],
    rounds: int,
    result: Result,
) -> _Rounds:
    found = _Rounds(contenders, result.missing)
    for _ in range(rounds):
        warm = [texts.new(_TURN // 20) for _ in range(20)]
        batches = {
            size: [texts.new(size) for _ in range(max(1, min(200, _TURN // size)))]
            for size in sizes
        }
        found.add(warm, batches)
    return found


def _new(name: str, contenders: dict[str, Counting], settings: Settings, result: Result) -> None:
    kinds = settings.pick(tuple(KINDS), (TOP_KIND, "many scripts"))
    for kind in kinds:
        group, texts = group_of(name, kind), Texts(kind, settings.rounds)
        here = dict(contenders)
        inner = here.pop(INNER, None)  # shares its tables, and what it remembers, with toktok-rs
        if kind not in SEED_KINDS:
            here.pop(SEED, None)  # is tiktoken's own code, at a third of its speed
        found = _measure(here, texts, SIZES, settings.rounds, result)
        for size in SIZES:
            rows = [_row(each, v, "µs", group, size) for each, v in found.found(size).items()]
            result.rows += rows
            result.ratios += ratios(rows, name, kind, size)
        if not settings.quick:  # 0.1 to 0.3 s a text for tiktoken
            here.pop(SEED, None)
            found = _measure(here, texts, (LARGEST,), max(settings.rounds // 9, 1), result)
            rows = [_row(each, v, "µs", group, LARGEST) for each, v in found.found(LARGEST).items()]
            result.rows += rows
            result.ratios += ratios(rows, name, kind, LARGEST)
        if inner and kind == TOP_KIND:
            three = {OURS: contenders[OURS], TIKTOKEN: contenders[TIKTOKEN], INNER: inner}
            found = _measure(three, texts, INNER_SIZES, settings.rounds, result)
            for size in INNER_SIZES:
                rows = [
                    _row(each, v, "µs", f"{group}, beside toktok-rs's private count()", size)
                    for each, v in found.found(size).items()
                ]
                result.rows += rows
                told = f"toktok-rs's private count() / ours, {size:,} characters, {name}"
                result.ratios.append(ratio(rows, INNER, OURS, None, name=told))


def _seen(name: str, contenders: dict[str, Counting], settings: Settings, result: Result) -> None:
    """The memo's part: the same text again and again, in an object of its own each time."""
    both = {each: contenders[each] for each in (OURS, TIKTOKEN, SEED) if each in contenders}
    texts, group = Texts(TOP_KIND, settings.rounds + 1), f"text seen before, {name}"
    seen = {size: [texts.new(size)] for size in SEEN_SIZES}
    found = _Rounds(both, result.missing)
    for i in range(settings.rounds):
        batches = {size: seen[size] * max(1, _TURN // size) for size in SEEN_SIZES}
        if i == 0:
            for count in both.values():
                count([text for batch in batches.values() for text in batch[:1]])
        found.add(seen[SEEN_SIZES[0]], batches)
    for size in SEEN_SIZES:
        rows = [_row(each, v, "µs", group, size) for each, v in found.found(size).items()]
        result.rows += rows
        result.ratios.append(
            ratio(
                rows,
                TIKTOKEN,
                OURS,
                SEEN_GOAL,
                promise="token count, text seen before, 1,000+ characters",
                name=f"tiktoken / ours, seen before, {size:,} characters, {name}",
            )
        )


def _batchers(name: str, missing: dict[str, str]) -> dict[str, Callable[[list[str]], list[int]]]:
    counter, model = SimpleTokenCounter(), MODELS[name]
    found = encoding.load(name)
    out: dict[str, Callable[[list[str]], list[int]]] = {
        _LOOP: lambda texts: [counter.count_tokens(text, model) for text in texts],
        _AT_ONCE: lambda texts: counter.count_tokens_batch(texts, model),
        "tiktoken, encode_ordinary_batch": lambda texts: list(
            map(len, found.encode_ordinary_batch(texts, num_threads=os.cpu_count() or 1))
        ),
    }
    try:
        quick = peers.need("quicktok")
        encoder = quick.get_encoding(name)
        out["quicktok-v1, count_batch"] = lambda texts: quick.count_batch(encoder, texts).tolist()
    except peers.MissingError as error:
        missing["quicktok-v1"] = str(error)
    try:
        batch_count = peers.need("toktok").batch_count
        out["toktok-rs, batch_count"] = lambda texts: batch_count(texts, name)
    except peers.MissingError as error:
        missing["toktok-rs"] = str(error)
    return out


def _batch(name: str, settings: Settings, result: Result) -> None:
    batchers = _batchers(name, result.missing)
    rng, texts = random.Random(4), Texts(TOP_KIND, settings.rounds + 2)
    for size, many in BATCHES:
        group = f"a batch of {many} texts of {size:,} characters, {name}"
        took: dict[str, list[float]] = {each: [] for each in batchers}
        for _ in range(settings.rounds):
            for each in rng.sample(list(batchers), len(batchers)):
                batch = [texts.new(size) for _ in range(many)]  # of its own: the memo is one
                start = time.perf_counter_ns()
                counts = batchers[each](batch)
                took[each].append((time.perf_counter_ns() - start) / 1e6)
                if len(counts) != many:
                    raise WrongCountError(f"{each}: {len(counts)} counts of {many} texts")
        result.rows += [_row(each, Values(v), "ms", group) for each, v in took.items()]
        title = f"loop / batch, {many} × {size:,} characters, {name}"
        result.ratios.append(
            ratio(result.rows, _LOOP, _AT_ONCE, BATCH_GOAL, name=title, group=group)
        )


def run(settings: Settings) -> Result:
    """Measure; nothing where no encoding's file is at hand."""
    result = asked(__doc__)
    result.how += f" The texts: {digest()}."
    with peers.Place() as place:
        os.environ["FAST_LITELLM_SHM_NAME"] = place.segment_name
        place.segment()
        for name in MODELS:
            try:
                contenders = opened(name, result.missing)
            except EncodingUnavailableError as error:
                result.missing["tiktoken's files"] = str(error)
                continue
            _new(name, contenders, settings, result)
            if name == MEMO_ENCODING:
                _seen(name, contenders, settings, result)
                _batch(name, settings, result)
    result.plots = [
        Plot(
            f"tokens_{kind.replace(' ', '_')}_{name}".lower(),
            "lines",
            f"Tokens of a new text counted: {kind}, {name}",
            (group_of(name, kind),),
            "microseconds a text",
            "characters",
        )
        for kind in (TOP_KIND, "many scripts")
        for name in MODELS
    ]
    return result
