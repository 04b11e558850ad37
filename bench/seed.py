"""fast-litellm's own table of speedups, beside what is measured here: of that package, and of ours.

Its baseline was plain Python (tiktoken for texts), and so it is here. Of memory, it is plain
Python's bytes a key over theirs, and tiktoken's megabytes over theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.result import Result, Row, ratio

SMALL, LARGE = 10, 100_000  # characters
NEW, SEEN = "new text, English, o200k_base", "text seen before, o200k_base"
SECOND = "private memory of the second worker"


@dataclass(frozen=True)
class Claim:
    """A row of that table: where to look for the baseline, for theirs and for ours."""

    scenario: str
    claimed: str
    question: str
    group: str
    baseline: str
    theirs: str
    ours: str
    x: float | None = None


CLAIMS = (
    Claim(
        "connection pooling",
        "3.2 ×",
        "pool_cost",
        "pool",
        "plain Python pool get + return",
        "fast-litellm pool get + return",
        "ours pool get + return",
    ),
    Claim(
        "rate limiting",
        "1.6 ×",
        "check_cost",
        "hot key",
        "plain Python, token bucket",
        "fast-litellm",
        "ours is_allowed",
    ),
    Claim(
        f"large text, {LARGE:,} characters",
        "1.7 ×",
        "tokens_cost",
        NEW,
        "tiktoken",
        "fast-litellm",
        "ours",
        LARGE,
    ),
    Claim(
        f"large text, {LARGE:,} characters, seen before by any worker",
        "–",
        "tokens_cost",
        SEEN,
        "tiktoken",
        "fast-litellm",
        "ours",
        LARGE,
    ),
    Claim(
        "token counting, private memory of a second worker, two encodings",
        "same",
        "tokens_worker",
        SECOND,
        "tiktoken",
        "fast-litellm",
        "ours",
    ),
    Claim(
        "high-cardinality rate limiting, memory",
        "42 ×",
        "bytes_per_key",
        "memory",
        "plain Python, token bucket",
        "fast-litellm",
        "ours",
    ),
    Claim(
        f"small text, {SMALL} characters",
        "~0.5 ×",
        "tokens_cost",
        NEW,
        "tiktoken",
        "fast-litellm",
        "ours",
        SMALL,
    ),
    Claim(
        "simple routing, 20 deployments",
        "~0.4 ×",
        "routing",
        "simple_shuffle",
        "plain Python, simple_shuffle",
        "fast-litellm, simple_shuffle",
        "ours, simple_shuffle",
    ),
)
HEADER = ("against plain Python, tiktoken", "its guide says", "fast-litellm here", "ours here")


def rows(results: dict[str, Result], spell: Callable[[float], str]) -> list[list[str]]:
    """The table. spell: how a number is written."""
    out = []
    for claim in CLAIMS:
        result = results.get(claim.question)
        found: list[Row] = [
            row
            for row in (result.rows if result else [])
            if row.group == claim.group and (claim.x is None or row.x == claim.x)
        ]
        cells = []
        for who in (claim.theirs, claim.ours):
            over = ratio(found, claim.baseline, who, None).found
            cells.append(f"{spell(over.median)} ×" if over else "not measured")
        out.append([claim.scenario, claim.claimed, *cells])
    return out
