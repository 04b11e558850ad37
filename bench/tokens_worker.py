"""What does a worker cost that counts tokens in two encodings: time until it can, and memory?

Eight processes (three, with the slower peers), that have imported the package and read the texts,
count for the first time, one after the other: a text of 1,000 characters in each of both encodings.
What the first one takes is apart: with ours it finds no file of tables, and makes it for all.
Memory is what is private to a process (Private_Clean + Private_Dirty of smaps_rollup) beyond what
it was before, after it has counted 400,000 characters of all kinds in each encoding. Of the second
worker it is measured while the first one lives, of all together when all have counted.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked
from bench.seed import SECOND
from bench.token_counters import MODELS, TIKTOKEN, tiktoken_folder
from bench.token_texts import KINDS, Texts

WORKERS, FEWER = 8, 3  # of ours and of tiktoken; of the others, which take seconds each
READY_GOAL, MEMORY_GOAL, ALL_GOAL = 20.0, 8.0, 100.0  # ms; MB of the second worker, of all eight
FIRST, MORE = 1_000, 100_000  # characters
READY = "first use"
_ALL = "private memory of {} workers together"


@dataclass(frozen=True)
class Program:
    """What a process imports, and the expression that is a counting function of an encoding."""

    module: str
    imports: str
    counter: str


PROGRAMS = {
    OURS: Program(
        "fast_litellm_shm",
        "from fast_litellm_shm import SimpleTokenCounter",
        "lambda text, count=SimpleTokenCounter().count_tokens, model=MODELS[name]: "
        "count(text, model)",
    ),
    TIKTOKEN: Program(
        "tiktoken",
        "import tiktoken",
        "lambda text, encode=tiktoken.get_encoding(name).encode_ordinary: len(encode(text))",
    ),
    "quicktok-v1": Program("quicktok", "import quicktok", "quicktok.get_encoding(name).count"),
    "fast-litellm": Program(
        "fast_litellm",
        "import logging; logging.disable(); "  # it tells what of litellm it cannot change
        "sys.modules['litellm'] = None; import fast_litellm; del sys.modules['litellm']",
        "lambda text, count=fast_litellm.SimpleTokenCounter().count_tokens, model=MODELS[name]: "
        "count(text, model)",
    ),
    "toktok-rs": Program(
        "toktok", "import toktok", "lambda text, name=name: toktok.batch_count([text], name, 1)[0]"
    ),
}

_FRAME = """
import json, sys, time
{imports}
MODELS = {models!r}
with open(sys.argv[1], encoding="utf-8") as file:
    first, *more = json.load(file)
def turn(found):
    print(json.dumps(found), flush=True)
    sys.stdin.readline()
turn("ready")
begun = time.perf_counter()
counters = []
for name in MODELS:
    counters.append({counter})
counts = [count(first) for count in counters]
turn([(time.perf_counter() - begun) * 1000, counts])
turn([count(text) for count in counters for text in more])
"""


class _Worker:
    """A process that waits at each of its turns."""

    def __init__(self, program: Program, texts: str, environment: dict[str, str]) -> None:
        source = _FRAME.format(imports=program.imports, counter=program.counter, models=MODELS)
        self._process = subprocess.Popen(
            [sys.executable, "-c", source, texts],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            text=True,
        )
        self._before = 0.0

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a worker ended, with status {self._process.wait()}")
        return json.loads(line)

    def _go(self) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._hear()

    def begin(self) -> None:
        """Wait until it has imported."""
        self._hear()

    def remember(self) -> None:
        """What it has now is what it had before."""
        self._before = self._private()

    def use(self) -> tuple[float, list[int]]:
        """Its first counts: milliseconds, and the counts."""
        took, counts = self._go()
        return took, counts

    def count(self) -> object:
        """Its further counts."""
        return self._go()

    def _private(self) -> float:
        """MB."""
        told = pathlib.Path(f"/proc/{self._process.pid}/smaps_rollup").read_text("ascii")
        found = re.findall(r"^Private_(?:Clean|Dirty):\s+(\d+) kB", told, re.MULTILINE)
        return sum(map(int, found)) / 1024

    def more(self) -> float:
        """MB beyond what it had."""
        return self._private() - self._before

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.communicate()


@dataclass(frozen=True)
class Found:
    """first: ms of the first worker; ready: of each later one; MB of the second, of all."""

    first: float
    ready: list[float]
    second: float
    together: float
    counts: object


def measure(program: Program, number: int, texts: str, environment: dict[str, str]) -> Found:
    """So many workers of one contender."""
    workers = [_Worker(program, texts, environment) for _ in range(number)]
    try:
        for worker in workers:
            worker.begin()
        for worker in workers:  # what all have imported is shared by now
            worker.remember()
        ready, counts, second = [], [], 0.0
        for i, worker in enumerate(workers):
            took, first = worker.use()
            ready.append(took)
            counts.append((first, worker.count()))
            if i == 1:
                second = worker.more()
        if any(each != counts[0] for each in counts):
            raise RuntimeError(f"workers of one kind count otherwise: {counts}")
        together = sum(worker.more() for worker in workers)
        return Found(ready[0], ready[1:], second, together, counts[0])
    finally:
        for worker in workers:
            worker.end()


def _ratios(found: Found, number: int) -> list[Ratio]:
    promise = "a second worker that counts in two encodings"
    together = f"private memory of {WORKERS} workers that count in two encodings"
    return [
        Ratio("ours, first use", Values(found.ready), READY_GOAL, False, "ms", promise=promise),
        Ratio(f"ours, {SECOND}", Values([found.second]), MEMORY_GOAL, False, "MB", promise=promise),
        Ratio(
            f"ours, {_ALL.format(WORKERS)}",
            Values([found.together]) if number == WORKERS else None,
            ALL_GOAL,
            False,
            "MB",
            promise=together,
            missing=f"only {number} were started",
        ),
    ]


def run(settings: Settings) -> Result:
    """Measure."""
    result, all_of = asked(__doc__), settings.pick((OURS, TIKTOKEN), (OURS,))
    if not os.path.exists("/proc/self/smaps_rollup"):
        result.missing["everything"] = "there is no /proc/self/smaps_rollup here: it needs Linux"
        return result
    right: object = None
    with peers.Place() as place, tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "texts.json")
        texts = [Texts("English", 5).new(FIRST), *(Texts(kind, 5).new(MORE) for kind in KINDS)]
        pathlib.Path(path).write_text(json.dumps(texts), "utf-8")
        place.segment()
        environment = {
            **tiktoken_folder(),
            "FAST_LITELLM_SHM_NAME": place.segment_name,
            "FAST_LITELLM_SHM_CACHE": os.path.join(folder, "cache"),
        }
        for name in sorted(PROGRAMS, key=lambda name: name != TIKTOKEN):  # what it counts is right
            program = PROGRAMS[name]
            try:
                peers.need(program.module)
                number = WORKERS if name in all_of else FEWER
                found = measure(program, number, path, environment)
            except (peers.MissingError, RuntimeError) as error:
                if name == OURS:
                    raise
                result.missing[name] = str(error)
                continue
            right = right or found.counts
            if found.counts != right:
                told = f"counts otherwise than tiktoken: {found.counts}, not {right}"
                if name == OURS:
                    raise RuntimeError(told)
                result.missing[name] = told
                continue
            owner = REFERENCE if name == TIKTOKEN else name
            notes: dict[str, str | float] = {"the first worker": f"{found.first:,.0f} ms"}
            result.rows += [
                Row(name, "ms", Values(found.ready), owner, READY, notes=notes),
                Row(name, "MB", Values([found.second]), owner, SECOND),
                Row(name, "MB", Values([found.together]), owner, _ALL.format(number)),
            ]
            if name == OURS:
                result.ratios += _ratios(found, number)
    result.plots = [
        Plot("tokens_first_use", "bars", "First use of a later worker", (READY,), "milliseconds"),
        Plot("tokens_memory", "bars", "Private memory, two encodings", (SECOND,), "MB"),
    ]
    return result
