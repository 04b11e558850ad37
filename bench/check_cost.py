"""What does one admitted check of a hot key cost, beside every peer and beside the floor in C?

Each in a process of its own, one after the other in each round. Only the contenders marked
“shared” hold over processes; the state of the others is private to the process. The floor is a C
program: the system's clock and one compare-and-swap, beside the same check without Python.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess

from bench import peers
from bench.apart import interleaved_apart
from bench.result import (
    EMPTY_CALL,
    OURS,
    REFERENCE,
    Plot,
    Result,
    Row,
    Settings,
    Values,
    asked,
    ratio,
)
from bench.timing import interleaved, loop_of
from fast_litellm_shm import HierarchyLimiter, Limit, RateLimiter

ROOT = pathlib.Path(__file__).resolve().parents[1]
GROUP, C_GROUP = "hot key", "hot key, in C"
LEVELS, ONE_LEVEL, THREE_LEVELS = "levels", "acquire, one limiter", "acquire, three levels"


def in_c(settings: Settings, folder: str) -> list[Row]:
    """The rows of floor.c. MissingError where it cannot be compiled."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise peers.MissingError("there is no C compiler here")
    program = os.path.join(folder, "floor")
    flags = (ROOT / "csrc" / "cflags").read_text(encoding="utf-8").split()
    source = ["-I", str(ROOT / "csrc"), str(ROOT / "bench" / "floor.c"), "-o", program, "-pthread"]
    made = subprocess.run([compiler, *flags, *source], capture_output=True, text=True, check=False)
    if made.returncode:
        raise peers.MissingError(f"floor.c does not compile: {made.stderr.strip()[:200]}")
    arguments = [str(settings.rounds), str(settings.pick(100_000, 20_000))]
    out = subprocess.run(
        [program, *arguments, f"bench-floor-{os.getpid()}"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = (
        ("C: the clock alone", REFERENCE),
        ("C: clock + one swap", REFERENCE),
        ("C: fshm_is_allowed", OURS),
    )
    columns = zip(*(map(float, line.split()) for line in out.splitlines()), strict=True)
    return [
        Row(name, "ns", Values(values), who, C_GROUP)
        for (name, who), values in zip(names, columns, strict=True)
    ]


def _ours(place: peers.Place) -> RateLimiter:
    return RateLimiter(Limit(peers.HUGE, per=1), name="bench", segment=place.segment())


def _levels(place: peers.Place, settings: Settings) -> list[Row]:
    """One admission by three levels of one limit, beside one acquire()."""
    limit, segment = Limit(peers.HUGE, per=1), place.segment()
    one = RateLimiter(limit, name="one level", segment=segment)
    levels = dict.fromkeys(("org", "team", "user"), limit)
    three = HierarchyLimiter(levels, name="levels", segment=segment)
    loops = {
        ONE_LEVEL: loop_of(one.acquire, [peers.HOT] * 100),
        THREE_LEVELS: loop_of(three.acquire, [("acme", "red", peers.HOT)] * 100),
    }
    found = interleaved(loops, settings)
    return [Row(name, "ns", values, OURS, LEVELS) for name, values in found.items()]


def _nothing(key: str) -> bool:
    return True


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    with peers.Place() as place:
        openers, result.missing = peers.started(place, peers.contenders(), peers.HUGE, 1)
        del openers["ours"]
        named: dict[str, peers.Open] = {
            "ours is_allowed": lambda: _ours(place).is_allowed,
            "ours check": lambda: _ours(place).check,
            "ours acquire": lambda: _ours(place).acquire,
            EMPTY_CALL: lambda: _nothing,
        }
        if "fast-litellm" in openers:
            fast = peers.need("fast_litellm")
            named["fast-litellm check"] = lambda: fast.SimpleRateLimiter(peers.HUGE).check
        who = {name: peers.contender(name).who for name in openers}
        for name, found in interleaved_apart(named | openers, [peers.HOT] * 100, settings).items():
            owner = who.get(name) or (
                OURS
                if name.startswith("ours")
                else "fast-litellm"
                if name.startswith("fast-litellm")
                else REFERENCE
            )
            shared = owner == OURS or (name in who and peers.contender(name).shared)
            notes: dict[str, str | float] = {"over processes": "shared" if shared else "private"}
            result.rows.append(Row(name, "ns", found, owner, GROUP, notes=notes))
        result.rows += _levels(place, settings)
        try:
            result.rows += in_c(settings, place.folder)
        except peers.MissingError as error:
            result.missing["the floor in C"] = str(error)
    for below, above, target, promise in (
        ("ours is_allowed", "fast-litellm", 8.0, "`is_allowed(key)`, admitted"),
        ("ours is_allowed", "rust-py-rate-limit", 2.0, "`is_allowed(key)`, admitted"),
        ("ours check", "fast-litellm check", 5.0, "`check(key)` with its dict, admitted"),
    ):
        result.ratios.append(ratio(result.rows, above, below, target, promise=promise))
    result.ratios.append(
        ratio(
            result.rows,
            "C: fshm_is_allowed",
            "C: clock + one swap",
            1.4,
            at_least=False,
            promise="the C call against bare clock + one swap",
            why="besides them it hashes the key, reads its limits, finds its slot, does the "
            "arithmetic, and counts the call for the statistics",
        )
    )
    result.ratios.append(
        ratio(
            result.rows,
            THREE_LEVELS,
            ONE_LEVEL,
            3.2,
            at_least=False,
            promise="three levels in one admission against one acquire",
        )
    )
    result.plots.append(
        Plot(
            "check_cost",
            "bars",
            "One admitted check of a hot key",
            (GROUP, C_GROUP),
            "nanoseconds a check",
        )
    )
    return result
