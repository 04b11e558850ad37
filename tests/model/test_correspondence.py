"""The model (claim_steps.pml) quotes the code that its steps stand for: does csrc/ still say so?"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
QUOTE = re.compile(r"\b(\w+\.[ch]) (\w+): ")

# Every statement of these is quoted: a new one must be modelled, or be said not to matter.
COMPLETE = [
    ("hash_table.h", "confirmed_at"),
    ("hash_table.c", "survey"),
    ("hash_table.c", "confirm"),
    ("hash_table.c", "table_claim"),
    ("limiter.c", "fresh_now"),
    ("limiter.c", "first_state"),
    ("limiter.c", "put"),
    ("limiter.c", "put_first"),
    ("limiter.c", "take_one"),
]

# All that anybody does with a slot of the table: loads, and the locked swap. Without a plain store
# the store buffers of the model stay empty.
ACCESSES = re.compile(
    r"(pair_load|pair_peek|load_relaxed|pair_cas|two_whos|__builtin_prefetch)\(\s*&(\w+(->|\.))*slots\[[^;]*?[,)]"
    r"|slot_t \*slot = &s->slots\[table_probe\(s, hash, i\)\];"
    r"|const slot_t \*slot = &s->slots\[line \* SLOTS_PER_LINE\];"
)


def squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def source(name: str) -> str:
    (path,) = CSRC.rglob(name)
    text = path.read_text()
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)


def function_body(file: str, function: str) -> str:
    """What stands between the braces of a function, without comments and white space."""
    found = re.search(rf"^\w[^\n;=]*\b{function}\([^;{{]*\{{(.*?)^\}}", source(file), re.M | re.S)
    assert found, f"{file} has no function {function} any more"
    return squeeze(found[1])


def quotes() -> list[tuple[str, str, str]]:
    """(file, function, statements) in the order of the model."""
    found = []
    for comment in re.findall(r"/\*(.*?)\*/", (HERE / "claim_steps.pml").read_text(), re.DOTALL):
        text = " ".join(re.sub(r"^\s*\* ?", "", line) for line in comment.splitlines())
        heads = list(QUOTE.finditer(text))
        if not heads or heads[0].start() > 1:
            continue
        ends = [head.start() for head in heads[1:]] + [len(text)]
        for head, end in zip(heads, ends, strict=True):
            statements = text[head.end() : end].split(" -- ")[0]
            found.append((head[1], head[2], squeeze(statements)))
    return found


def test_the_model_quotes_the_code() -> None:
    assert len(quotes()) > 40
    strangers = [
        f"{file} {function}: {statements}"
        for file, function, statements in quotes()
        if statements not in function_body(file, function)
    ]
    assert not strangers, "quoted in claim_steps.pml, but not in csrc/:\n" + "\n".join(strangers)


@pytest.mark.parametrize(("file", "function"), COMPLETE)
def test_nothing_is_left_out(file: str, function: str) -> None:
    body = function_body(file, function)
    left = body
    for where, what, statements in sorted(quotes(), key=lambda q: -len(q[2])):
        if (where, what) == (file, function):
            left = left.replace(statements, "\n", 1)
    missing = [part for part in left.split("\n") if part]
    assert not missing, f"{file} {function}: not quoted in claim_steps.pml: {missing}"


def test_a_slot_is_written_by_the_swap_alone() -> None:
    for path in sorted(CSRC.rglob("*.[ch]")):
        left = ACCESSES.sub("", source(path.name))
        assert not re.search(r"\bslots\[", left), f"{path.name}: another access to a slot"
    assert '"lock cmpxchg16b %1"' in source("atomic128.h")


def test_one_who_is_alone_has_budget_enough() -> None:
    """In the model the budget of a look never runs out for one that is alone: a swap for each other
    candidate must be within it."""
    number = {
        name: int(value)
        for name, value in re.findall(
            r"#define (ROUNDS|PROBE_LINES|SLOTS_PER_LINE) (?:UINT64_C\()?(\d+)",
            source("hash_table.c") + source("layout.h"),
        )
    }
    assert 2 * number["PROBE_LINES"] * number["SLOTS_PER_LINE"] - 1 <= number["ROUNDS"]
