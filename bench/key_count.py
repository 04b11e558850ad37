"""What does a check cost when the table holds a thousand keys, and when it holds ten million?

All keys are live, and the table has a capacity of just so many (one key in 100,000 may find no
room). The keys that are asked for are drawn at random from them, and are as many string objects at
each size, each a copy of its own, so that only the table's part of the cost changes. One child
process for each contender and size, so that none has another's heap; peers go as far as their
memory allows, and where they deny, which costs them less, they are left out. Beside it, what Python
takes to read one byte at random of memory of that size: what a cache or TLB that misses costs.
"""

from __future__ import annotations

import mmap
import multiprocessing
import random
import time
from multiprocessing.connection import Connection

from bench import peers
from bench.peers import Contender
from bench.result import REFERENCE, Plot, Result, Row, Settings, Values, asked, ratio
from fast_litellm_shm import Limit, RateLimiter

SIZES, QUICK_SIZES = (1_000, 10_000, 100_000, 1_000_000, 10_000_000), (1_000, 100_000, 1_000_000)
MOST = {"ours": 10**7, "fast-litellm": 10**5}  # fast-litellm: 2.8 kB a key, 28 GB at ten million
MOST_OF_OTHERS = 10**6
NAMES = (
    "ours",
    "plain Python, token bucket",
    "fast-litellm",
    "rust-py-rate-limit",
    "token_bucket",
)
# A key that was charged 2,000 of 200,000 a day is live for 864 s, and has room for what is asked.
N, PER, FILL = 200_000, 86_400.0, 2_000
PATIENCE = 400.0
BYTES = 66  # of the segment, a key
READ = "Python reads one byte at random, of as much memory"


def _fill(place: peers.Place, each: Contender, size: int) -> tuple[peers.Call, int]:
    """The limiter with all keys in it, and how many it had no room for."""
    if each.name != "ours":
        call = each.start(place, N, PER)()
        for i in range(size):
            call(f"user-{i}")
        return call, 0
    limiter = RateLimiter(Limit(N, per=PER), name="bench", segment=place.segment())
    refused = 0
    for begin in range(0, size, 10_000):
        keys = [f"user-{i}" for i in range(begin, min(begin + 10_000, size))]
        refused += len(keys) - int(limiter.acquire_many(keys, FILL).allowed.sum())
    return limiter.is_allowed, refused


def _child(out: Connection, name: str, size: int, rounds: int, asks: int) -> None:
    """Sends ns a check of each round, and the share that was denied; or why it is missing."""
    try:
        with peers.Place(capacity=size) as place:
            call, refused = _fill(place, peers.contender(name), size)
            rng, found, denied = random.Random(size), [], 0
            keys = [f"user-{rng.randrange(size)}" for _ in range(asks)]
            for _ in range(rounds + 1):
                start = time.perf_counter_ns()
                for key in keys:
                    if not call(key):
                        denied += 1
                found.append((time.perf_counter_ns() - start) / asks)
            out.send((found[1:], denied / (asks * (rounds + 1)), refused))
    except Exception as error:  # whatever it is, it is told
        told = isinstance(error, peers.MissingError)
        out.send(str(error) if told else f"{type(error).__name__}: {error}")


def in_child(name: str, size: int, rounds: int, asks: int) -> tuple[list[float], float, int] | str:
    """What _child() sends."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, name, size, rounds, asks), daemon=True)
    child.start()
    theirs.close()
    try:
        if not mine.poll(PATIENCE):
            return f"did not end within {PATIENCE:g} s"
        answer: tuple[list[float], float, int] | str = mine.recv()
        return answer
    except EOFError:
        return "its process died (out of memory?)"
    finally:
        child.join(10)
        if child.is_alive():
            child.kill()


def _reads(keys: int, rounds: int, asks: int) -> Values:
    """ns that Python takes to read one byte at random, of as much memory as so many keys take."""
    size, rng = max(keys * BYTES, mmap.PAGESIZE), random.Random(keys)
    with mmap.mmap(-1, size) as memory:
        for at in range(0, size, mmap.PAGESIZE):
            memory[at] = 1
        places, found = [rng.randrange(size) for _ in range(asks)], []
        for _ in range(rounds):
            start = time.perf_counter_ns()
            for at in places:
                memory[at]
            found.append((time.perf_counter_ns() - start) / asks)
    return Values(found)


def _why(result: Result, few: int, many: int) -> str:
    """What a check waits for where there are many keys."""
    took = {(row.name, row.x): row.found.median for row in result.rows}
    more = took["ours", many] - took["ours", few]
    read = took[READ, many] - took[READ, few]
    return (
        f"a check takes {more:,.0f} ns more than among {few:,} keys. A read of one byte at random, "
        f"of as much memory, takes {read:,.0f} ns more, because it is in no cache: a check waits "
        f"for {more / max(read, 1):.1f} such reads (the key's slot, and its statistics)"
    )


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    rounds, asks = settings.pick(settings.share(7), 3), settings.pick(500_000, 50_000)
    sizes = settings.pick(SIZES, QUICK_SIZES)
    for size in sizes:
        for name in NAMES:
            most = MOST.get(name, settings.pick(MOST_OF_OTHERS, 10**5))
            if size > most or name in result.missing:
                continue
            found = in_child(name, size, rounds, asks)
            if isinstance(found, str):
                result.missing[name] = found
                continue
            values, denied, refused = found
            if denied > 0.01:  # fast-litellm honours its rate for one key only
                result.missing[f"{name} at {size:,} keys"] = f"denied {denied:.0%} of the checks"
                continue
            notes: dict[str, str | float] = {"keys": f"{size:,}", "keys without room": refused}
            who = peers.contender(name).who
            result.rows.append(Row(name, "ns", Values(values), who, "one check", size, notes))
    for size in (sizes[0], sizes[-1]):
        read = _reads(size, rounds, asks)
        result.rows.append(Row(READ, "ns", read, REFERENCE, "one read", size))
    ours = {int(row.x or 0): row for row in result.rows if row.who == "ours"}
    named = [Row(f"{size:,} keys", "ns", row.found) for size, row in ours.items()]
    result.ratios.append(
        ratio(
            named,
            f"{sizes[-1]:,} keys",
            "1,000 keys",
            3.0,
            at_least=False,
            promise="check at 10 million keys against 1,000",
            why=_why(result, sizes[0], sizes[-1]),
        )
    )
    result.plots.append(
        Plot(
            "key_count",
            "lines",
            "One check, by number of live keys",
            ("one check",),
            "nanoseconds a check",
            "live keys",
        )
    )
    return result
