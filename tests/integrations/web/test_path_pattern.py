"""PathPattern: it matches as a regular expression does, in a time that the path's length bounds."""

from __future__ import annotations

import re
import sys
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fast_litellm_shm.integrations.web import path_pattern
from fast_litellm_shm.integrations.web.path_pattern import PathPattern

PARTS = st.sampled_from(
    ["/", "a", "b", "-", "{x}", "{y}", "{}", "*", "**", ".", "ab", "\n", "é", "\udc80"]
)
CHARACTERS = st.text(alphabet="/ab-.\né\u20ac\U0001f600\udc80", max_size=12)


def expression(pattern: str, name: str) -> re.Pattern[str]:
    """The same by backtracking, which may take a time that grows exponentially."""
    parts = re.split(r"(\{\w*\}|\*)", pattern)
    wildcards = {"*": ".*"} | {part: name for part in parts if part.startswith("{")}
    return re.compile("".join(wildcards.get(p, re.escape(p)) for p in parts), re.DOTALL)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from("/*"), st.lists(PARTS, max_size=8).map("".join), CHARACTERS)
@example("*", "{a}-{b}*", "/x/a-/-b")
@example("/", "{a}e*x", "/-e-e-x")
@example("/", "*a{x}b*c", "/-aab-b-c")
def test_it_matches_as_an_expression_does(first: str, rest: str, path: str) -> None:
    pattern = PathPattern(first + rest)
    for text in (path, "/" + path, first + rest):
        strict, loose = (expression(first + rest, name) for name in ("[^/]+", "[^/]*"))
        assert pattern.matches(text) is (strict.fullmatch(text) is not None)
        assert pattern.matches(text, empty_names=True) is (loose.fullmatch(text) is not None)


def steps(pattern: PathPattern, path: str) -> int:
    """How many lines of path_pattern.py a match runs. Each line takes a time that is linear in the
    length of the path: its operations are on bytes and integers."""
    ran = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal ran
        ran += event == "line"
        return trace if frame.f_code.co_filename == path_pattern.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        pattern.matches(path)
        pattern.matches(path, empty_names=True)
    finally:
        sys.settrace(before)
    return ran


@pytest.mark.parametrize("text", ["a", "-", "/", "/a", "-/", "a-b", "/files/x"])
@pytest.mark.parametrize(
    "pattern",
    [
        "*{a}-{b}*",
        "/{a}-*-{b}x",
        "*a{x}a{y}a*b",
        "/*/files/*/x/*/y",
        "/{a}{b}{c}/x",
        "*{a}*{b}*{c}",
    ],
)
def test_a_long_path_takes_few_steps(pattern: str, text: str) -> None:
    """A client chooses the path. A regular expression took 12 s for the first of them."""
    found = PathPattern(pattern)
    for length in (10, 60_000):
        assert steps(found, "/" + (text * length)[:length] + "/") <= 20 * len(pattern)
