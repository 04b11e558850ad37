"""Limits by key over many hosts, and in a file: a change of plan keeps what was consumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import servers
from support.waiting import wait_until

from fast_litellm_shm import RateLimiter, Segment
from fast_litellm_shm.durable import StateFile


def taken(limiters: tuple[RateLimiter, ...], key: str, tries: int) -> int:
    return sum(bool(each.acquire(key)) for _ in range(tries) for each in limiters)


def all_of(limiters: tuple[RateLimiter, ...], key: str, expected: int) -> int:
    """What is taken until no more is there. (A refusal is remembered for a moment.)"""
    found = 0

    def enough() -> bool:
        nonlocal found
        found += taken(limiters, key, 20)
        return found >= expected

    wait_until("the rest of the larger plan is there", enough)
    return found + taken(limiters, key, 20)


@pytest.mark.parametrize("kind", ["", " window", " sliding"])
def test_over_hosts(server: servers.Server, segment: Segment, other: Segment, kind: str) -> None:
    plan = {"ann": "small", "bob": "large"}
    hosts = tuple(
        RateLimiter(
            name="api",
            segment=each,
            cluster=server.url,
            plans={"small": f"10 per 3600 s{kind}", "large": f"100 per 3600 s{kind}"},
            plan_of=plan.__getitem__,
        )
        for each in (segment, other)
    )
    assert taken(hosts, "ann", 20) == 10
    plan["ann"] = "large"
    for each in hosts:
        each.ask_again()
    assert all_of(hosts, "ann", 90) == 90
    assert taken(hosts, "bob", 60) == 100


def test_in_a_file(segment: Segment, tmp_path: Path) -> None:
    plan = {"ann": "small"}

    def make(where: Segment) -> Any:
        return RateLimiter(
            name="api",
            segment=where,
            durable=StateFile(str(tmp_path)),
            plans={"small": "10 per 3600 s", "large": "100 per 3600 s"},
            plan_of=plan.__getitem__,
        )

    limiter = make(segment)
    assert taken((limiter,), "ann", 20) == 10
    plan["ann"] = "large"
    limiter.ask_again()
    assert all_of((limiter,), "ann", 90) == 90
    segment.remove()
    assert taken((make(Segment(segment.name)),), "ann", 120) == 0


def test_plans_of_other_kinds_are_refused(server: servers.Server, segment: Segment) -> None:
    with pytest.raises(ValueError, match="the same kinds of limits and the same periods.*'team'"):
        RateLimiter(
            name="api",
            segment=segment,
            cluster=server.url,
            plans={"pro": "100/minute", "team": ("300/minute", "5000 per day")},
            plan_of=str,
        )
