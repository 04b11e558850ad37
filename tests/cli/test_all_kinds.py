"""Every reader of a segment, on one that has a limiter of each kind: no reader may take one kind
for another, or for damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fast_litellm_shm import (
    AdaptiveConcurrency,
    Budget,
    ConcurrencyLimiter,
    FixedWindow,
    HierarchyLimiter,
    Quota,
    RateLimiter,
    SlidingWindow,
    TokenBucket,
    get_recommendations,
    health_check,
)
from fast_litellm_shm.testing import isolated

from .conftest import Command


def _override() -> Any:
    limiter = RateLimiter("9/minute", name="own", plans={})
    limiter.set_override("k", "99/minute", "999/day")
    return limiter.acquire("k")


KINDS: dict[str, Callable[[], Any]] = {
    "bucket": lambda: RateLimiter(TokenBucket(9, 60), name="bucket").acquire("k"),
    "window": lambda: RateLimiter(FixedWindow(9, 60), name="window").acquire("k"),
    "sliding": lambda: RateLimiter(SlidingWindow(9, 60), name="sliding").acquire("k"),
    "calendar": lambda: RateLimiter(FixedWindow(9, "day"), name="calendar").acquire("k"),
    "several": lambda: RateLimiter("9/minute; 90/hour", name="two").acquire("k"),
    "plans": lambda: RateLimiter(
        "9/minute", name="plans", plans={"pro": "90/minute"}, plan_of={"k": "pro"}.get
    ).acquire("k"),
    "plans alone": lambda: RateLimiter(name="asked", plan_of=lambda _: "9/minute").acquire("k"),
    "override": _override,
    "levels": lambda: HierarchyLimiter(
        {"org": "90/minute", "user": "9/minute"}, name="levels"
    ).acquire(("o", "u")),
    "quota": lambda: Quota(9, 900, 3, name="quota").admit("k", 5),
    "permits": lambda: ConcurrencyLimiter(3, name="permits").acquire("k"),
    "learned": lambda: AdaptiveConcurrency(name="learned").acquire("k"),
    "budget": lambda: Budget(5, "day", name="budget").charge("k", 1),
    "budget for ever": lambda: Budget(5, None, name="ever").reserve("k", 1),
}


def _end(held: Any) -> None:
    """Give back what a call holds, so that no destructor has to say so."""
    if hasattr(held, "release"):
        held.release()


READERS = (
    *("inspect", "inspect --json", "inspect --limiter asked", "ls", "ls --json"),
    *("export", "export --format json --keys 100", "export --format csv --keys 100"),
)


def _all_are_well(fast_shm: Command) -> dict[str, str]:
    """What each reader prints."""
    found = {}
    for each in READERS:
        done = fast_shm(*each.split())
        assert (done.returncode, done.stderr) == (0, ""), each
        found[each] = done.stdout
    health = health_check()
    assert health["status"] == "ok" and health["segment"] is not None
    assert not [one for one in get_recommendations() if one["priority"] == "HIGH"]
    return found


def test_all_in_one_segment(fast_shm: Command) -> None:
    held = [make() for make in KINDS.values()]
    found = _all_are_well(fast_shm)
    shown = json.loads(found["inspect --json"])
    names = {one["name"] for one in shown["limiters"]}
    assert {"bucket", "asked", "own", "budget", "ever", "learned"} <= names
    assert {one["budget"] for one in shown["spending"]} == {"budget", "ever"}
    for each in held:
        _end(each)


@pytest.mark.parametrize("kind", [each for each in KINDS if each != "budget"])
def test_beside_a_budget(fast_shm: Command, kind: str) -> None:
    """A limiter without limits of its own, of which keys have plans, was read as a damaged one."""
    held = KINDS["budget"](), KINDS[kind]()
    done = fast_shm("inspect", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert health_check()["status"] == "ok"
    for each in held:
        _end(each)


def test_a_key_that_a_long_limit_denies_is_shown(fast_shm: Command) -> None:
    """Its statistics lie with the first limit, which has forgotten the key long before."""
    with isolated(frozen=True) as shm:
        plans = {"pro": ("600/minute", "1 per day")}
        limiter = RateLimiter(name="asked", plans=plans, plan_of=lambda _: "pro")
        assert limiter.acquire("ann") and not limiter.acquire("ann")
        shm.clock.advance(60)
        rows = json.loads(fast_shm("inspect", "--json").stdout)["keys"]
        (row,) = [each for each in rows if each["limiter"] == "asked"]
        assert (row["key"], row["denied"]) == ("ann", 1)


@pytest.mark.parametrize("names", ["plain", "hashed", "off"])
@pytest.mark.parametrize("key", ["ann", "x" * 300])
def test_a_key_with_a_plan_is_reset(
    fast_shm: Command, monkeypatch: pytest.MonkeyPatch, names: str, key: str
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAMES", names)
    limiter = RateLimiter(name="asked", plan_of=lambda _: "5 per hour window")
    assert limiter.acquire(key)
    done = fast_shm("reset", "--limiter", "asked", key)
    assert done.stdout.startswith("Reset key")
    assert limiter.peek(key).remaining == 5


def test_a_name_that_ends_as_that_of_leases_does(fast_shm: Command) -> None:
    """A limiter of a user's that is called so has none."""
    limiter = RateLimiter("3/minute", name="other")
    RateLimiter("3/minute", name="other (wallet)")
    assert limiter.acquire("a")
    done = fast_shm("reset", "a")
    assert (done.returncode, done.stderr) == (0, "")
    assert limiter.peek("a").remaining == 3


def test_limits_of_one_key_of_a_budget(fast_shm: Command) -> None:
    KINDS["budget"]()
    done = fast_shm("set", "budget", "k", "5/minute")
    assert done.returncode == 1 and "add(key, usd)" in done.stderr


def test_no_maximum_is_shown_where_it_is_not_known(
    fast_shm: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit that is learned is found by the key's name."""
    monkeypatch.setenv("FAST_LITELLM_SHM_NAMES", "hashed")
    with AdaptiveConcurrency(name="learned", initial=2, max=8).slot("up"):
        (row,) = json.loads(fast_shm("inspect", "--json").stdout)["permits"]
    assert (row["in_flight"], row["max_in_flight"]) == (1, None)
