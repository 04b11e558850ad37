"""Inspection: what people see of a segment, without disturbing it."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.children import run
from support.workers import attempt

from fast_litellm_shm import Limit, RateLimiter, Segment, SegmentNotFoundError, Window
from fast_litellm_shm._shared.inspection import Inspection


@pytest.fixture
def filled(segment: Segment) -> Segment:
    """chat: a 1 of 3, b 3 and two denied, c 2; other: b 1."""
    chat = RateLimiter(Window(3, 3600), Limit(100, 3600), name="chat", segment=segment)
    for key, times in (("a", 1), ("b", 5), ("c", 2)):
        for _ in range(times):
            chat.acquire(key)
    RateLimiter(Limit(9, 3600), name="other", segment=segment).acquire("b")
    return segment


def _known(left: object) -> int:
    assert isinstance(left, int)
    return left


def rows(segment: Segment, **how: Any) -> list[tuple[str, str, int, int, int]]:
    return [
        (row.key, row.limiter, row.admitted, row.denied, _known(row.remaining))
        for row in Inspection(segment).keys(**how)
    ]


def test_keys(filled: Segment) -> None:
    assert sorted(rows(filled)) == [
        ("a", "chat", 1, 0, 2),
        ("b", "chat", 3, 2, 0),
        ("b", "other", 1, 0, 8),
        ("c", "chat", 2, 0, 1),
    ]
    by_key = {row.key: row for row in Inspection(filled).keys(limiter="chat")}
    assert by_key["a"].retry_after == 0.0
    assert [by_key[key].limit for key in "abc"] == [3, 3, 3]
    assert all(0 < (row.reset_after or 0) <= 3601 for row in by_key.values())
    retry = by_key["b"].retry_after
    assert retry is not None
    assert 0 < retry <= 3601
    assert set(by_key["a"].as_dict()) == {
        "key",
        "limiter",
        "admitted",
        "denied",
        "remaining",
        "limit",
        "retry_after",
        "reset_after",
    }


def test_sort(filled: Segment) -> None:
    assert [r[0] for r in rows(filled, sort="busiest", limiter="chat")] == ["b", "c", "a"]
    assert [r[0] for r in rows(filled, sort="admitted", limiter="chat")] == ["b", "c", "a"]
    assert rows(filled, sort="denied")[0][:2] == ("b", "chat")
    assert [r[0] for r in rows(filled, sort="key")] == ["a", "b", "b", "c"]
    with pytest.raises(
        ValueError, match="sort must be one of busiest, admitted, denied, key, not 'x'"
    ):
        rows(filled, sort="x")


@pytest.mark.parametrize("sort", ["busiest", "admitted", "denied"])
def test_top_is_the_beginning_of_the_whole(segment: Segment, sort: str) -> None:
    limiter = RateLimiter(Window(20, 3600), name="t", segment=segment)
    for i in range(40):
        limiter.acquire_many([f"k{i}"] * (i + 1))
    whole = rows(segment, sort=sort)
    column = {"admitted": 2, "denied": 3}
    weights = [r[column[sort]] if sort in column else r[2] + r[3] for r in whole]
    assert weights == sorted(weights, reverse=True)
    for top in (0, 1, 3, 10, 39, 40, 100):
        part = rows(segment, sort=sort, top=top)
        assert len(part) == min(top, 40)
        shown = [r[column[sort]] if sort in column else r[2] + r[3] for r in part]
        assert shown == weights[:top]


def test_match(filled: Segment) -> None:
    assert [r[0] for r in rows(filled, match="[ab]", limiter="chat")] == ["b", "a"]
    assert rows(filled, match="A") == []
    assert len(rows(filled, match="*", top=1)) == 1


def test_limiters(filled: Segment) -> None:
    assert Inspection(filled).limiters() == [
        {
            "name": "chat",
            "limits": ["3/3600s window", "100/3600s"],
            "version": 1,
            "resets": 0,
            "keys": 3,
            "shared_seconds": 0.0,
        },
        {
            "name": "other",
            "limits": ["9/3600s"],
            "version": 1,
            "resets": 0,
            "keys": 1,
            "shared_seconds": 0.0,
        },
    ]
    assert Inspection(filled).keys_total == 4


def test_after_a_change_and_a_reset(filled: Segment) -> None:
    chat = RateLimiter(Window(30, 3600), name="chat", segment=filled)
    assert Inspection(filled).limiters()[0]["version"] == 2
    assert [r for r in rows(filled, limiter="chat") if r[0] == "b"][0][4] == 27
    chat.reset()
    assert Inspection(filled).limiters()[0]["resets"] == 1
    chat.acquire("a")
    assert [r for r in rows(filled, limiter="chat", match="a") if r[4] == 29] != []


@pytest.mark.parametrize("key", ["é🙂", "", "\0", "a\nb", "x" * 200])
def test_names_of_keys(segment: Segment, key: str) -> None:
    RateLimiter(Window(3, 3600), name="t", segment=segment).acquire(key)
    assert [r[0] for r in rows(segment)] == [key]


def test_a_long_name_is_cut(segment: Segment) -> None:
    RateLimiter(Window(3, 3600), name="t", segment=segment).acquire("x" * 5000)
    assert [r[0] for r in rows(segment)] == ["x" * 200 + "…"]


def test_bytes_that_are_no_text(segment: Segment) -> None:
    RateLimiter(Window(3, 3600), name="t", segment=segment).acquire(b"\xff!")
    assert [r[0] for r in rows(segment)] == ["\ufffd!"]


def test_hashed_names(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100, names="hashed")
    limiter = RateLimiter(Window(3, 3600), name="t", segment=segment)
    for key in ("secret", "secret", "other"):
        limiter.acquire(key)
    found = rows(segment)
    assert [r[2] for r in found] == [2, 1]
    assert all(r[0].startswith("#") and len(r[0]) == 17 for r in found)
    with open(segment.path, "rb") as file:
        assert b"secret" not in file.read()


def test_no_names(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100, names="off")
    assert RateLimiter(Window(3, 3600), name="t", segment=segment).acquire("secret")
    assert rows(segment) == []
    assert segment.stats()["admitted"] == 1


def test_counts_of_all_processes(segment: Segment) -> None:
    given = [(segment.name, (Window(100, 3600),), "hot", 60, 4)] * 4
    run(attempt, given, "fork")
    (hot,) = [r for r in rows(segment) if r[0] == "hot"]
    assert hot == ("hot", "exact", 100, 140, 0)


def test_looking_disturbs_nothing(filled: Segment) -> None:
    with open(filled.path, "rb") as file:
        before = file.read()
    reader = Segment(filled.name, _read_only=True)
    assert len(rows(reader)) == 4
    assert reader.stats()["admitted"] == 7
    assert len(Inspection(reader).limiters()) == 2
    with open(filled.path, "rb") as file:
        assert file.read() == before
    assert [p["pid"] for p in filled.processes()] == [os.getpid()]


def test_looking_makes_nothing(segment_name: str) -> None:
    with pytest.raises(SegmentNotFoundError):
        Segment(segment_name, _read_only=True)
