"""HierarchyLimiter: all levels or none; the path of keys; processes; waiting; mistakes."""

from __future__ import annotations

import asyncio
import os
import pickle
import random
import re
import signal
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any

import pytest
from support.children import run, run_one
from support.waiting import wait_until
from support.workers import meet

from fast_litellm_shm import (
    FixedWindow,
    HierarchyLimiter,
    RateLimiter,
    Segment,
    SlidingWindow,
    TokenBucket,
    exceptions,
)
from fast_litellm_shm.cli import main

HOUR = 3600
PATH = ("acme", "red", "ann")


def of(segment: Segment, org: Any, team: Any, user: Any, **given: Any) -> HierarchyLimiter:
    levels = {"org": org, "team": team, "user": user}
    return HierarchyLimiter(levels, name="api", segment=segment, **given)


def windows(segment: Segment, *n: int, **given: Any) -> HierarchyLimiter:
    return of(segment, *(FixedWindow(each, HOUR) for each in n), **given)


# all or none --------------------------------------------------------------------------------------


def test_every_level_is_charged_and_the_least_is_told(segment: Segment) -> None:
    limiter = windows(segment, 10, 5, 3)
    decision = limiter.acquire(PATH)
    assert decision and decision.level is None
    assert decision.remaining == 2
    assert decision.limit == FixedWindow(3, HOUR)
    assert limiter.remaining(PATH) == {"org": 9, "team": 4, "user": 2}
    assert limiter.acquire(PATH, 2).remaining == 0
    assert limiter.remaining(PATH) == {"org": 7, "team": 2, "user": 0}


@pytest.mark.parametrize("binds", ["org", "team", "user"])
def test_a_denial_names_the_level_and_consumes_nothing(segment: Segment, binds: str) -> None:
    limits = {level: FixedWindow(2 if level == binds else 9, HOUR) for level in _LEVELS}
    limiter = of(segment, **limits)
    assert limiter.acquire(PATH, 2)
    before = limiter.remaining(PATH)
    for call in (limiter.acquire, limiter.peek):
        decision = call(PATH)
        assert not decision
        assert decision.level == binds
        assert decision.limit == limits[binds]
        assert decision.remaining == 0
        assert decision.retry_after is not None
        assert 3500 < decision.retry_after <= 3600
        assert repr(decision).endswith(f", level={binds!r})")
    assert not limiter.is_allowed(PATH)
    assert limiter.remaining(PATH) == before
    assert limiter.check(PATH) == {
        "allowed": False,
        "reason": f"Rate limit exceeded (requests per hour), of the {binds}",
        "remaining_requests": 0,
        "retry_after_ms": pytest.approx(3_600_000, abs=60_000),
        "level": binds,
    }


_LEVELS = ("org", "team", "user")


def test_of_several_that_deny_the_last_to_have_room_is_named(segment: Segment) -> None:
    limiter = of(segment, FixedWindow(1, HOUR), FixedWindow(1, 2 * HOUR), FixedWindow(1, HOUR))
    assert limiter.acquire(PATH)
    assert limiter.acquire(PATH).level == "team"
    never = limiter.acquire(PATH, {"user": 2})
    assert (never.level, never.retry_after) == ("user", None)


def test_levels_of_several_limits(segment: Segment) -> None:
    """Sixteen limits in one admission."""
    several = (
        TokenBucket(40, HOUR),
        FixedWindow(30, HOUR),
        SlidingWindow(20, HOUR),
        FixedWindow(50, "day"),
    )
    levels = {f"level {i}": several for i in range(4)}
    limiter = HierarchyLimiter(levels, name="deep", segment=segment)
    path = ("a", "b", "c", "d")
    assert sum(limiter.is_allowed(path) for _ in range(30)) == 20
    assert limiter.acquire(path).limit == several[2]
    assert limiter.levels["level 0"].peek("a").remaining == 0


def test_eight_levels(segment: Segment) -> None:
    levels = {str(i): FixedWindow(20 - i, HOUR) for i in range(8)}
    limiter = HierarchyLimiter(levels, name="deep", segment=segment)
    path = tuple("abcdefgh")
    assert sum(limiter.is_allowed(path) for _ in range(20)) == 13
    assert limiter.remaining(path) == {str(i): 7 - i for i in range(8)}


def test_costs(segment: Segment) -> None:
    limiter = of(segment, (FixedWindow(9, HOUR), FixedWindow(900, HOUR)), "9/hour", "9/hour")
    assert limiter.acquire(PATH, cost={"org": (1, 500), "user": 3})
    assert limiter.remaining(PATH) == {"org": 8, "team": 8, "user": 6}
    assert limiter.acquire(PATH, cost={"org": (1, 401)}).level == "org"
    assert limiter.acquire(PATH, cost=0)
    limiter.charge(PATH, 7)  # into debt
    assert limiter.remaining(PATH) == {"org": 1, "team": 1, "user": 0}
    limiter.refund(PATH, {"user": 8, "team": 8, "org": 0})
    assert limiter.remaining(PATH) == {"org": 1, "team": 9, "user": 7}


# the path -----------------------------------------------------------------------------------------


def test_levels_nest(segment: Segment) -> None:
    """The team red of acme is another one than the team red of beta."""
    limiter = windows(segment, 100, 1, 100)
    assert limiter.acquire(PATH)
    assert limiter.acquire(("acme", "red", "bob")).level == "team"
    assert limiter.acquire(("beta", "red", "ann"))
    assert limiter.remaining(("acme", "red")) == {"org": 99, "team": 0}


def test_the_first_levels_alone(segment: Segment) -> None:
    limiter = windows(segment, 9, 9, 9)
    assert limiter.acquire(("acme",))
    assert limiter.acquire(["acme", "red"])
    assert limiter.remaining(PATH) == {"org": 7, "team": 8, "user": 9}


def test_some_levels(segment: Segment) -> None:
    """The user ann of no team is another one than the user ann of the team red."""
    limiter = windows(segment, 9, 9, 2)
    without_team = {"user": "ann", "org": "acme"}
    assert limiter.acquire(without_team, 2)
    assert limiter.acquire(without_team).level == "user"
    assert limiter.acquire(PATH)
    assert limiter.remaining(PATH) == {"org": 6, "team": 8, "user": 1}
    assert limiter.remaining({"team": "red"}) == {"team": 9}


PARTS = ("", "a", "/", "\\", "-", "\\-", "a/b", "b", "ä", "\ud800", "a\\", "\\/")


def test_no_two_paths_are_one_key(segment: Segment) -> None:
    limiter = windows(segment, 1, 1, 1)
    found: dict[bytes, Any] = {}
    for a in PARTS:
        for b in (*PARTS, None):
            for c in PARTS:
                keys = {"org": a, "user": c} | ({} if b is None else {"team": b})
                assert found.setdefault(limiter.key(keys), keys) is keys
    drawn = random.Random(7)
    for _ in range(2000):
        parts = tuple("".join(drawn.choices("ab/\\-", k=drawn.randrange(5))) for _ in range(3))
        keys = dict(zip(_LEVELS, parts, strict=True))
        assert found.setdefault(limiter.key(parts), keys) == keys


def test_keys_are_readable(segment: Segment, capsys: pytest.CaptureFixture[str]) -> None:
    limiter = windows(segment, 9, 9, 9)
    limiter.acquire(("acme", "red", "a/b"))
    assert limiter.key(("acme", "red", "a/b")) == rb"acme/red/a\/b"
    assert limiter.key(("acme",)) == b"acme"
    assert limiter.key({"org": "acme", "user": b"ann"}) == rb"acme/\-/ann"
    assert main(["inspect", "--name", segment.name]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"acme/red +api/team +1 +0 +8 ", shown)
    assert re.search(r"acme +api/org +1 +0 +8 ", shown)
    assert "api/user" in shown
    # and each level is a RateLimiter, for all that those can do
    level = limiter.levels["user"]
    assert level.name == "api/user"
    assert level.peek(limiter.key(("acme", "red", "a/b"))).remaining == 8


def test_long_keys(segment: Segment) -> None:
    limiter = windows(segment, 9, 9, 9)
    long = ("/" * 1000, "x" * 100_000, "\\" * 7)
    assert limiter.acquire(long)
    assert limiter.remaining(long) == {"org": 8, "team": 8, "user": 8}
    assert limiter.key(long) == b"\\/" * 1000 + b"/" + b"x" * 100_000 + b"/" + b"\\" * 14


def test_a_limiter_that_is_there_is_a_level(segment: Segment) -> None:
    """Its outermost keys are those that it has anyhow."""
    everybody = RateLimiter("5/hour", name="everybody", segment=segment)
    limiter = HierarchyLimiter({"org": everybody, "user": "9/hour"}, name="api")
    assert limiter.segment is segment
    assert everybody.acquire("acme", 4)
    assert limiter.acquire(("acme", "ann"))
    assert limiter.acquire(("acme", "bob")).level == "org"
    assert limiter.levels["org"] is everybody


def test_reset(segment: Segment) -> None:
    limiter = windows(segment, 9, 9, 9)
    full = {"org": 9, "team": 9, "user": 9}

    def consume() -> None:
        limiter.reset()
        assert limiter.remaining(PATH) == full
        assert limiter.acquire(PATH, 2) and limiter.acquire(("acme", "blue", "bob"))

    consume()
    limiter.reset(("acme", "red"))
    assert limiter.remaining(PATH) == {"org": 6, "team": 9, "user": 7}
    consume()
    limiter.reset(PATH, level="org")
    assert limiter.remaining(PATH) == {"org": 9, "team": 7, "user": 7}
    consume()
    limiter.reset(level="user")
    assert limiter.remaining(PATH) == {"org": 6, "team": 7, "user": 9}
    assert limiter.remaining(("acme", "blue", "bob"))["user"] == 9


def test_pickled_and_printed(segment: Segment) -> None:
    limiter = windows(segment, 9, 9, 9)
    assert limiter.acquire(PATH)
    again = pickle.loads(pickle.dumps(limiter))
    assert again.remaining(PATH) == {"org": 8, "team": 8, "user": 8}
    assert repr(again) == repr(limiter)
    assert repr(limiter).startswith("HierarchyLimiter({'org': (FixedWindow(n=9, per=3600),), ")


def test_limits_that_change(segment: Segment) -> None:
    """In any process, at run time; what was consumed stays consumed."""
    limiter = windows(segment, 9, 9, 9)
    assert limiter.acquire(PATH, 4)
    windows(segment, 9, 5, 9)
    decision = limiter.acquire(PATH, 2)
    assert decision.level == "team"
    assert decision.limit == FixedWindow(5, HOUR)
    assert limiter.limits["team"] == (FixedWindow(5, HOUR),)
    assert limiter.acquire(PATH).remaining == 0


def test_statistics_count_an_admission_in_each_level_and_a_denial_in_one(
    segment: Segment, capsys: pytest.CaptureFixture[str]
) -> None:
    limiter = windows(segment, 9, 2, 9)
    assert sum(limiter.is_allowed(PATH) for _ in range(5)) == 2
    assert main(["inspect", "--name", segment.name]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"acme/red/ann +api/user +2 +0 ", shown)
    assert re.search(r"acme/red +api/team +2 +3 ", shown)
    assert re.search(r"acme +api/org +2 +0 ", shown)


# a full segment -----------------------------------------------------------------------------------


def filled(name: str) -> Segment:
    segment = Segment(name, capacity=1)
    others = RateLimiter(FixedWindow(9, HOUR), name="others", segment=segment, on_full="deny")
    for i in range(200):
        others.acquire(f"key {i}")
    return segment


def test_no_room_for_a_key(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=1)
    there = windows(segment, 9, 9, 9, on_full="deny")
    assert there.acquire(("acme", "red"))
    filled(segment_name)
    decision = there.acquire(PATH)
    assert (decision.allowed, decision.level, decision.retry_after) == (False, "user", 1.0)
    with pytest.raises(exceptions.SegmentFullError, match="'api/user'"):
        windows(segment, 9, 9, 9, on_full="raise").acquire(PATH)
    assert there.remaining(("acme", "red")) == {"org": 8, "team": 8}
    # left out, and no other level: else a flood of keys would pass the organization's limit
    passing = windows(segment, 9, 9, 9, on_full="allow")
    assert sum(passing.is_allowed(PATH) for _ in range(20)) == 8
    assert there.remaining(("acme", "red")) == {"org": 0, "team": 0}


def test_keys_without_room_share_counters(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=1)
    limiter = windows(segment, 20, 20, 4)
    assert limiter.acquire(("acme", "red"))
    filled(segment_name)
    assert [bool(limiter.acquire(PATH)) for _ in range(6)] == [True] * 4 + [False] * 2
    assert limiter.acquire(PATH).shared
    assert limiter.remaining(("acme", "red")) == {"org": 15, "team": 15}


# processes ----------------------------------------------------------------------------------------


def hammer(name: str, n: tuple[int, ...], users: int, attempts: int, parties: int) -> list[int]:
    """By user: how many of so many attempts were admitted."""
    meet(name, parties)
    limiter = windows(Segment(name), *n)
    drawn, found = random.Random(os.getpid()), [0] * users
    for _ in range(attempts):
        user = drawn.randrange(users)
        found[user] += limiter.is_allowed(("acme", f"team {user % 2}", f"user {user}"))
    return found


@pytest.mark.parametrize(
    ("n", "binds"),
    [((700, 10_000, 10_000), 0), ((10_000, 400, 10_000), 1), ((10_000, 10_000, 90), 2)],
    ids=_LEVELS,
)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_admit_exactly_the_limit_of_the_level_that_binds(
    segment: Segment, n: tuple[int, ...], binds: int, method: str
) -> None:
    users, parties = 8, 4
    given = [(segment.name, n, users, 1500, parties)] * parties
    by_user = [sum(found) for found in zip(*run(hammer, given, method), strict=True)]
    total = sum(by_user)
    assert total == (700, 2 * 400, users * 90)[binds]
    limiter = windows(segment, *n)
    for user, admitted in enumerate(by_user):
        team = sum(by_user[user % 2 :: 2])
        path = ("acme", f"team {user % 2}", f"user {user}")
        used = {"org": total, "team": team, "user": admitted}
        assert limiter.remaining(path) == {
            level: n[i] - used[level] for i, level in enumerate(_LEVELS)
        }


def test_never_over_in_any_level_where_all_bind(segment: Segment) -> None:
    n, users, parties = (600, 320, 100), 8, 4
    given = [(segment.name, n, users, 1500, parties)] * parties
    by_user = [sum(found) for found in zip(*run(hammer, given, "fork"), strict=True)]
    teams = [sum(by_user[team::2]) for team in (0, 1)]
    assert max(by_user) <= n[2]
    assert max(teams) <= n[1]
    assert sum(by_user) == n[0]


def in_threads(limiter: HierarchyLimiter, threads: int, calls: int) -> int:
    counts = [0] * threads

    def body(i: int) -> None:
        counts[i] = sum(limiter.is_allowed(PATH) for _ in range(calls))

    running = [threading.Thread(target=body, args=(i,)) for i in range(threads)]
    for each in running:
        each.start()
    for each in running:
        each.join()
    return sum(counts)


def test_threads(segment: Segment) -> None:
    limiter = windows(segment, 500, 900, 900)
    assert in_threads(limiter, 4, 400) == 500
    assert limiter.remaining(PATH) == {"org": 0, "team": 400, "user": 400}


# waiting ------------------------------------------------------------------------------------------


def test_wait_denies_at_once_what_cannot_come_in_time(segment: Segment) -> None:
    limiter = windows(segment, 9, 1, 9)
    assert limiter.wait(PATH, timeout=0)
    for timeout in (0, 0.01, 60):
        decision = limiter.wait(PATH, timeout=timeout)
        assert not decision and decision.level == "team"
    decision = asyncio.run(limiter.wait_async(PATH, timeout=60))
    assert not decision and decision.level == "team"
    assert limiter.wait(PATH, cost={"user": 10}).retry_after is None
    assert limiter.remaining(PATH) == {"org": 8, "team": 0, "user": 8}
    assert limiter.queue_size(("acme", "red")) == 0


def test_wait_until_there_is_room(segment: Segment) -> None:
    bucket = TokenBucket(20, per=1, burst=1)
    limiter = of(segment, bucket, "900/hour", "900/hour")
    assert all(limiter.wait(PATH, timeout=60) for _ in range(4))

    async def all_at_once() -> list[bool]:
        calls = [limiter.wait_async(("acme", "red", f"user {i}"), timeout=60) for i in range(8)]
        return [bool(each) for each in await asyncio.gather(*calls)]

    assert asyncio.run(all_at_once()) == [True] * 8
    assert limiter.levels["team"].peek(b"acme/red").remaining == 900 - 12


def test_a_refund_wakes_a_caller_of_another_process(segment: Segment) -> None:
    limiter = of(segment, "9/hour", FixedWindow(1, 90), "9/hour")
    assert limiter.acquire(PATH)
    found: list[Any] = []
    waiting = threading.Thread(
        target=lambda: found.append(run_one(wait_for_the_team, segment.name))
    )
    waiting.start()
    wait_until("it waits", lambda: limiter.queue_size(("acme", "red")) == 1)
    limiter.refund(PATH, 1)
    waiting.join()
    assert found == [True]
    assert limiter.remaining(PATH) == {"org": 8, "team": 0, "user": 8}


def wait_for_the_team(name: str) -> bool:
    limiter = of(Segment(name), "9/hour", FixedWindow(1, 90), "9/hour")
    return bool(limiter.wait(PATH, timeout=None))


async def admitted_in_order(
    limiter: HierarchyLimiter, callers: Sequence[tuple[str, ...]]
) -> list[int]:
    """They come one after the other. The order in which they were served."""
    served: list[int] = []

    async def call(i: int) -> None:
        if await limiter.wait_async(callers[i], timeout=60):
            served.append(i)

    tasks = []
    for i, _ in enumerate(callers):
        tasks.append(asyncio.create_task(call(i)))
        for _ in range(5):
            await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    return served


def test_callers_of_one_team_are_served_in_order(segment: Segment) -> None:
    limiter = of(segment, "900/hour", TokenBucket(20, per=1, burst=1), "900/hour")
    limiter.acquire(PATH)
    callers = [("acme", "red", f"user {i}") for i in range(10)]
    assert asyncio.run(admitted_in_order(limiter, callers)) == list(range(10))


def test_a_caller_that_its_own_level_denies_does_not_hold_up_the_team(segment: Segment) -> None:
    limiter = of(segment, "900/hour", TokenBucket(20, per=1, burst=1), FixedWindow(1, 40))
    assert limiter.acquire(PATH)  # so ann has nothing left for 40 s

    async def ann_and_others() -> list[bool]:
        ann = asyncio.create_task(limiter.wait_async(PATH, timeout=60))
        for _ in range(5):
            await asyncio.sleep(0)
        others = [limiter.wait_async(("acme", "red", f"user {i}"), timeout=60) for i in range(5)]
        found = [bool(each) for each in await asyncio.gather(*others)]
        found.append(ann.done())
        ann.cancel()
        await asyncio.gather(ann, return_exceptions=True)
        return found

    assert asyncio.run(ann_and_others()) == [True] * 5 + [False]
    assert limiter.queue_size(PATH) == 0


def test_callers_beyond_max_waiting_are_turned_away(segment: Segment) -> None:
    limiter = of(segment, "9/hour", FixedWindow(1, 30), "9/hour")
    assert limiter.acquire(PATH)

    async def three() -> list[str | None]:
        first = asyncio.create_task(limiter.wait_async(PATH, timeout=60))
        for _ in range(5):
            await asyncio.sleep(0)
        second = await limiter.wait_async(PATH, timeout=60, max_waiting=1)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        return [second.level, str(second.allowed)]

    assert asyncio.run(three()) == ["team", "False"]
    assert limiter.queue_size(("acme", "red")) == 0


def test_a_caller_that_is_killed_leaves_the_queue(segment: Segment) -> None:
    limiter = of(segment, "9/hour", FixedWindow(1, 30), "9/hour")
    assert limiter.acquire(PATH)
    pid = os.fork()
    if not pid:
        limiter.wait(PATH, timeout=100)
        os._exit(0)
    wait_until("it waits", lambda: limiter.queue_size(("acme", "red")) == 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    limiter.refund(PATH, 1)
    assert limiter.wait(PATH, timeout=25)
    assert limiter.remaining(PATH) == {"org": 8, "team": 0, "user": 8}


# mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("levels", "kind", "said"),
    [
        ({}, ValueError, "HierarchyLimiter takes 1 to 8 levels, not 0"),
        ({str(i): "1/s" for i in range(9)}, ValueError, "takes 1 to 8 levels, not 9"),
        ({"a/b": "1/s"}, ValueError, "the name of a level must have a character, and no '/'"),
        ({"": "1/s"}, ValueError, "not ''"),
        ({3: "1/s"}, TypeError, "the name of a level must be a str, not 3"),
        ([("org", "1/s"), ("org", "2/s")], ValueError, "two levels have the name 'org'"),
        ("org", TypeError, "levels must be a mapping from the name of a level to its limits"),
        (None, TypeError, "outermost first, not None"),
        ({"org": "1/s", "team": "oops"}, ValueError, "level 'team': a limit must be written as"),
        ({"org": []}, ValueError, "level 'org': a limiter takes 1 to 4 limits, not 0"),
        ({"org": "1/s", "user": 5}, TypeError, "level 'user': limits must be TokenBucket"),
        ({"x" * 96: "1/s"}, ValueError, "name must be 1 to 96 bytes of UTF-8, not 'api/xxx"),
    ],
)
def test_bad_levels(segment: Segment, levels: Any, kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        HierarchyLimiter(levels, name="api", segment=segment)
    assert said in str(caught.value)


def test_no_level_is_made_before_all_are_checked(segment: Segment) -> None:
    """Else a mistake in one level would change the limits of the others."""
    limiter = windows(segment, 9, 9, 9)
    with pytest.raises(ValueError, match="level 'user'"):
        of(segment, "1/hour", "1/hour", "oops")
    assert limiter.limits["org"] == (FixedWindow(9, HOUR),)


def test_one_limiter_is_not_two_levels(segment: Segment) -> None:
    one, two = (RateLimiter("1/s", name="one", segment=segment) for _ in range(2))
    with pytest.raises(ValueError, match="'org' and 'team' are the same limiter 'one'"):
        HierarchyLimiter({"org": one, "team": two}, name="api")
    with pytest.raises(TypeError, match="name must be a str, not None"):
        HierarchyLimiter({"org": "1/s"}, name=None)  # type: ignore[arg-type]


def test_a_limiter_with_plans_is_no_level(segment: Segment) -> None:
    """Not silently by the limits that it has for keys without a plan."""
    planned = RateLimiter("5/hour", name="planned", segment=segment, plans={"pro": "50/hour"})
    with pytest.raises(ValueError, match="level 'org': the limiter 'planned' has plans"):
        HierarchyLimiter({"org": planned}, name="api")


def test_one_segment(segment: Segment) -> None:
    elsewhere = RateLimiter("1/s", name="one")
    with pytest.raises(ValueError, match="level 'org' is in segment .*: give all levels the same"):
        HierarchyLimiter({"user": "1/s", "org": elsewhere}, name="api", segment=segment)


@pytest.mark.parametrize(
    ("keys", "kind", "said"),
    [
        (("a", "b", "c", "d"), ValueError, "has more keys than levels; these are org, team, user"),
        ((), ValueError, "limiter 'api': () names no level; its levels are org, team, user"),
        ([], ValueError, "names no level"),
        ({}, ValueError, "names no level"),
        ({"group": "x"}, ValueError, "limiter 'api' has no level 'group'; its levels are org,"),
        ("acme", TypeError, "keys must be a tuple with a key for each level, outermost first"),
        (b"acme", TypeError, "or a mapping from level to key, not b'acme'"),
        (None, TypeError, "not None"),
        (("acme", None), TypeError, "the key of level 'team' must be a str or bytes, not None"),
        ({"user": 7}, TypeError, "the key of level 'user' must be a str or bytes, not 7"),
    ],
)
def test_bad_keys(segment: Segment, keys: Any, kind: type[Exception], said: str) -> None:
    limiter = windows(segment, 9, 9, 9)
    calls = (
        limiter.acquire, limiter.peek, limiter.is_allowed, limiter.check, limiter.remaining,
        limiter.wait, limiter.key, lambda keys: limiter.charge(keys, 1),
        lambda keys: limiter.refund(keys, 1), lambda keys: asyncio.run(limiter.acquire_async(keys)),
        lambda keys: asyncio.run(limiter.wait_async(keys)), limiter.queue_size,
    )  # fmt: skip
    for call in calls:
        with pytest.raises(kind) as caught:
            call(keys)
        assert said in str(caught.value)
    assert limiter.remaining(("acme",)) == {"org": 9}


@pytest.mark.parametrize(
    ("cost", "kind", "said"),
    [
        ("1", TypeError, "cost must be an int, or one int for each limit, not '1'"),
        (
            (1, 1, 1),
            TypeError,
            "cost must be an int, or a mapping from level to cost, not (1, 1, 1)",
        ),
        (-1, ValueError, "cost must be 0 or more, not -1"),
        ({"group": 1}, ValueError, "limiter 'api' has no level 'group'; its levels are org, team"),
        ({"user": (1, 2)}, ValueError, "cost has 2 values, but the limiter has 1 limits"),
        ({"user": -2}, ValueError, "cost must be 0 or more, not -2"),
    ],
)
def test_bad_costs(segment: Segment, cost: Any, kind: type[Exception], said: str) -> None:
    limiter = windows(segment, 9, 9, 9)
    for call in (limiter.acquire, limiter.peek, limiter.charge, limiter.refund, limiter.wait):
        with pytest.raises(kind) as caught:
            call(PATH, cost)
        assert said in str(caught.value)
    assert limiter.remaining(PATH) == {"org": 9, "team": 9, "user": 9}


def test_bad_resets(segment: Segment) -> None:
    limiter = windows(segment, 9, 9, 9)
    with pytest.raises(ValueError, match="has no level 'group'; its levels are org, team, user"):
        limiter.reset(level="group")
    with pytest.raises(ValueError, match=r"\('acme',\) has no key of level 'user'"):
        limiter.reset(("acme",), level="user")


def test_arguments_by_name(segment: Segment) -> None:
    limiter = windows(segment, 9, 9, 9)
    assert limiter.acquire(keys=PATH, cost=2)  # type: ignore[call-arg, misc, unused-ignore]
    with pytest.raises(TypeError, match="unexpected or repeated argument 'key'"):
        limiter.acquire(key=PATH)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="missing the argument 'cost'"):
        limiter.charge(PATH)  # type: ignore[call-arg]
    with pytest.raises(RuntimeError, match="__init__ was not called"):
        HierarchyLimiter.__new__(HierarchyLimiter).acquire(PATH)


def test_no_reference_is_lost(segment: Segment) -> None:
    """Each kind of call, many times: what it refers to has as many references as before."""
    limiter, cost = windows(segment, 10**6, 10**6, 10**6), {"user": 3}
    path, mapping, denied = ("acme", "red", "a/nn"), {"org": "acme", "user": "ann"}, (b"a", b"b")
    many = 10**7
    things = (limiter, path, mapping, cost, *limiter.levels.values(), "org", *path)

    def calls() -> None:
        several: tuple[Any, ...] = (path, mapping, denied, types.MappingProxyType(mapping))
        for keys in several:
            limiter.acquire(keys)
            limiter.acquire(keys, cost)
            assert not limiter.acquire(keys, many)
            limiter.peek(keys), limiter.is_allowed(keys), limiter.remaining(keys)
            limiter.key(keys), limiter.charge(keys, 0), limiter.refund(keys, 0)
        for bad in ((), ("a",) * 4, {"x": "y"}, 3, ("a", None)):
            with pytest.raises((TypeError, ValueError)):
                limiter.acquire(bad)  # type: ignore[arg-type]

    calls()
    before = [sys.getrefcount(each) for each in things]
    for _ in range(200):
        calls()
    after = [sys.getrefcount(each) for each in things]
    assert all(abs(b - a) < 50 for a, b in zip(before, after, strict=True))
