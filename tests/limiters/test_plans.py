"""Limits by key: plans, whatever names them, and overrides."""

from __future__ import annotations

import asyncio
import multiprocessing
import pickle
import re
from typing import Any

import numpy
import pytest
from support.waiting import wait_until
from support.workers import meet

from fast_litellm_shm import (
    FixedWindow,
    PlanError,
    RateLimiter,
    Segment,
    SegmentError,
    SegmentFullError,
    TokenBucket,
)
from fast_litellm_shm._shared.performance import segment_stats
from fast_litellm_shm.limiters.plans import PlannedRateLimiter

PLANS: dict[str, Any] = {"pro": "100/minute", "team": ("300/minute", "5000 per day")}
WHO = {"ann": "pro", "bob": None, "cat": "team", "dan": "20 per hour window", "eve": "nobody"}


def plan_by_name(key: str) -> str | None:
    return WHO[key]


def make(segment: Segment, **options: Any) -> PlannedRateLimiter:
    given: dict[str, Any] = {"name": "api", "plans": PLANS, "plan_of": plan_by_name, **options}
    limiter = RateLimiter("10/minute", segment=segment, **given)
    assert isinstance(limiter, PlannedRateLimiter)
    return limiter


def test_each_key_has_the_limits_of_its_plan(segment: Segment) -> None:
    limiter = make(segment)
    for key, left in (("ann", 99), ("bob", 9), ("cat", 299), ("dan", 19)):
        assert limiter.acquire(key).remaining == left
        assert limiter.check(key)["remaining_requests"] == left - 1
        assert limiter.is_allowed(key)
        assert limiter.get_remaining(key) == left - 2
        assert limiter.peek(key).remaining == left - 2
        assert limiter.charge(key, 1).remaining == left - 3
        assert limiter.refund(key, 2).remaining == left - 1
        assert limiter.wait(key, timeout=1).remaining == left - 2
        assert limiter.acquire(key=key, cost=2).remaining == left - 4
    assert limiter.plan("cat") == (TokenBucket(300), FixedWindow(5000, per="day"))
    assert limiter.acquire("bob").limit == TokenBucket(10)
    assert limiter.is_allowed("bob") is True
    assert "pro" in repr(limiter)


def test_plan_of_is_asked_once_for_a_key(segment: Segment) -> None:
    asked: list[str] = []

    def plan_of(key: str) -> str:
        asked.append(key)
        return "pro"

    limiter = make(segment, plan_of=plan_of)
    for key in ("a", "b", "a", "b", "a"):
        limiter.acquire(key)
        limiter.check(key)
    limiter.acquire_many(["a", "b", "a"])
    assert asked == ["a", "b"]
    limiter.ask_again()
    limiter.acquire("a")
    limiter.acquire("a")
    assert asked == ["a", "b", "a"]
    ages = make(segment, plan_of=plan_of, plan_age=0.01)
    ages.acquire("old")

    def asked_again() -> bool:
        ages.acquire("old")
        return asked.count("old") > 1

    wait_until("the answer is too old", asked_again)


def test_a_process_remembers_the_plans_of_many_keys(segment: Segment) -> None:
    """A third of its places are taken: almost no key finds both of its lines full."""
    asked: list[str] = []

    def plan_of(key: str) -> str:
        asked.append(key)
        return "pro"

    limiter = make(segment, plan_of=plan_of)
    keys = [str(number) for number in range(80_000)]
    for key in keys * 2:
        limiter.plan(key)
    assert asked[: len(keys)] == keys
    assert len(asked) - len(keys) < len(keys) // 1000  # with one line a key: 1.5 % of them


def test_what_was_consumed_stays_consumed(segment: Segment) -> None:
    plan = {"ann": "small"}
    limiter = make(
        segment,
        plans={"small": "10/minute", "large": "100/minute", "window": "10/minute window"},
        plan_of=plan.__getitem__,
    )
    assert sum(bool(limiter.acquire("ann")) for _ in range(20)) == 10
    for name, left in (("large", 90), ("small", 0), ("large", 90), ("window", 10), ("large", 90)):
        plan["ann"] = name
        limiter.ask_again()
        assert limiter.peek("ann", cost=0).remaining == left, name
    assert sum(bool(limiter.acquire("ann")) for _ in range(200)) == 90


def _worker(name: str, number: int, parties: int, out: Any) -> None:
    """Half of the processes take "shared" for a key of the small plan."""
    segment = Segment(name)
    limiter = make(
        segment,
        plans={"small": "50 per hour", "large": "200 per hour"},
        plan_of=lambda key: ("small", "large")[number % 2] if key == "shared" else key,
    )
    meet(name, parties)
    out.put(
        {
            key: sum(bool(limiter.acquire(key)) for _ in range(150))
            for key in ("shared", "small", "large")
        }
    )


def test_real_processes_admit_exactly_each_plan(segment: Segment) -> None:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=_worker, args=(segment.name, i, 4, out)) for i in range(4)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert sum(each["small"] for each in found) == 50
    assert sum(each["large"] for each in found) == 200
    assert sum(each["shared"] for each in found) == 200  # as the most generous plan has it


def test_many_keys_each_with_a_plan_of_its_own(segment: Segment) -> None:
    limiter = make(segment, plan_of=lambda key: f"{int(key) % 3000 + 1} per hour window")
    for number in range(0, 4000, 7):
        key, n = str(number), number % 3000 + 1
        assert limiter.acquire(key).remaining == n - 1
        assert bool(limiter.acquire(key, n)) is False
    buckets = make(segment, name="buckets", plan_of=lambda key: f"{int(key) + 1}/minute")
    for number in range(600):  # more than the first 256, whose arrival times have no coarser unit
        assert buckets.acquire(str(number), number + 1).remaining == 0
        assert not buckets.acquire(str(number))


def test_a_coroutine_function_is_awaited_once(segment: Segment) -> None:
    async def body() -> None:
        asked: list[str] = []

        async def plan_of(key: str) -> str:
            asked.append(key)
            await asyncio.sleep(0.01)
            return "pro"

        limiter = make(segment, plan_of=plan_of)
        found = await asyncio.gather(*(limiter.acquire_async("ann") for _ in range(5)))
        assert sorted(each.remaining for each in found) == [95, 96, 97, 98, 99]
        assert asked == ["ann"]
        assert limiter.acquire("ann").remaining == 94  # known by now
        assert (await limiter.wait_async("ann", timeout=1)).remaining == 93
        assert await limiter.plan_async("bob") == (TokenBucket(100),)
        with pytest.raises(
            PlanError, match=r"'api': plan_of is a coroutine function.*acquire_async"
        ):
            limiter.acquire("new")

    asyncio.run(body())


def test_who_waits_for_an_answer_can_be_cancelled(segment: Segment) -> None:
    async def body() -> None:
        asked = 0

        async def plan_of(key: str) -> str:
            nonlocal asked
            asked += 1
            if asked == 1:
                await asyncio.sleep(3600)
            return "pro"

        limiter = make(segment, plan_of=plan_of)
        first = asyncio.create_task(limiter.acquire_async("ann"))
        await asyncio.sleep(0)
        second = asyncio.create_task(limiter.acquire_async("ann"))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        with pytest.raises(asyncio.CancelledError):  # it waited for that answer
            await second
        assert (await limiter.acquire_async("ann")).remaining == 99

    asyncio.run(body())


def test_a_plan_that_cannot_be_found(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment.name)
    away = False

    def plan_of(key: str) -> str | None:
        if away:
            raise OSError("the database is away")
        return WHO.get(key)

    keeping = make(segment, plan_of=plan_of)
    assert keeping.acquire("ann").remaining == 99
    away = True
    keeping.ask_again()
    assert keeping.acquire("ann").remaining == 98  # the plan that it had
    assert keeping.acquire("new").limit == TokenBucket(10)  # it had none
    assert len([each for each in caplog.records if "plan of key 'ann'" in each.message]) == 1
    assert "OSError: the database is away" in caplog.text and "100/60s instead" in caplog.text
    default = make(segment, plan_of=plan_of, on_plan_error="default", name="default")
    assert default.acquire("ann").limit == TokenBucket(10)
    strict = make(segment, plan_of=plan_of, on_plan_error="raise", name="strict")
    with pytest.raises(PlanError, match=r"'strict': the plan of key 'ann' could not.*OSError"):
        strict.acquire("ann")
    none = RateLimiter(name="none", segment=segment, plans=PLANS, plan_of=plan_of)
    with pytest.raises(PlanError, match="database is away"):
        none.acquire("ann")
    away = False
    with pytest.raises(PlanError, match=r"plan_of\('bob'\) is None.*no limits of its own"):
        none.acquire("bob")
    with pytest.raises(PlanError, match=r"'nobody', which is neither a plan \('pro', 'team'\)"):
        strict.acquire("eve")
    odd = make(segment, name="odd", plan_of=lambda key: 5, on_plan_error="raise")
    with pytest.raises(PlanError, match=r"plan_of\('ann'\) is 5"):
        odd.acquire("ann")
    assert segment_stats(segment, "plan_of")["plan_of"]["error_count"] >= 6


def test_an_override_holds_in_every_process_and_stays(segment: Segment) -> None:
    limiter, other = make(segment), make(segment)
    assert limiter.acquire("ann").remaining == 99
    assert other.acquire("ann").remaining == 98
    other.set_override("ann", "5/minute", "7 per day")
    assert limiter.acquire("ann").remaining == 2  # what was consumed stays consumed
    assert limiter.plan("ann") == (TokenBucket(5), FixedWindow(7, per="day"))
    assert make(segment).plan("ann") == limiter.plan("ann")  # a worker that comes anew
    limiter.reset()
    assert limiter.acquire("ann").remaining == 4
    limiter.set_override("ann", FixedWindow(3, per=60))
    assert other.acquire("ann").remaining == 2
    limiter.remove_override("ann")
    limiter.remove_override("ann")
    assert other.plan("ann") == (TokenBucket(100),)
    with pytest.raises(ValueError, match="at most 3 limits, not 4"):
        limiter.set_override("ann", "1/s", "2/m", "3/h", "4/d")
    with pytest.raises(ValueError, match="1 to 4 limits, not 0"):
        limiter.set_override("ann")
    only = RateLimiter("10/minute", name="only", segment=segment, plans={})
    assert isinstance(only, PlannedRateLimiter)
    only.set_override("ann", "50/minute")
    assert only.acquire("ann").remaining == 49 and only.acquire("bob").remaining == 9


def test_many_keys_at_once(segment: Segment) -> None:
    limiter = make(segment)
    found = limiter.acquire_many(["ann", "ann", "bob", "ann"], [1, 2, 3, 4])
    assert found.allowed.tolist() == [True] * 4
    assert found.remaining.tolist() == [99, 97, 7, 93]
    assert numpy.all(found.retry_after == 0)
    assert limiter.acquire_many([]).allowed.size == 0
    with pytest.raises(ValueError, match="cost has 1 values for 2 keys"):
        limiter.acquire_many(["ann", "bob"], [1])


def test_blocks_resets_and_queues(segment: Segment) -> None:
    limiter = make(segment)
    limiter.acquire("ann", 50)
    limiter.block("ann", 30)
    denied = limiter.acquire("ann")
    assert not denied and 29 < (denied.retry_after or 0) <= 30
    limiter.reset("ann")
    assert limiter.acquire("ann").remaining == 99
    limiter.acquire("bob", 5)
    limiter.reset()
    assert limiter.acquire("bob").remaining == 9
    assert limiter.queue_size("bob") == 0
    with pytest.raises(ValueError, match="cannot block a key"):
        limiter.block("dan", 3)


def test_it_can_be_pickled(segment: Segment) -> None:
    limiter = make(segment)
    limiter.acquire("ann", 10)
    copy = pickle.loads(pickle.dumps(limiter))
    assert copy.acquire("ann").remaining == 89
    with pytest.raises(TypeError, match="pickle the limiter"):
        pickle.dumps(limiter._answering("ann"))


@pytest.mark.parametrize(
    ("given", "options", "kind", "said"),
    [
        ((), {"plans": {"x": "10/minit"}}, ValueError, "plan 'x': .*'10/minit': do you mean min?"),
        ((), {"plans": {"x": ()}}, ValueError, "plan 'x': a limiter takes 1 to 4 limits, not 0"),
        ((), {"plans": {3: "1/s"}}, TypeError, "name of a plan must be a str, not 3"),
        ((), {"plans": ["1/s"]}, TypeError, "plans must be a mapping"),
        ((), {"plans": {"x": "1/s"}}, ValueError, "no limits of its own and no plan_of"),
        ((), {"plan_of": "pro"}, TypeError, "plan_of must be a function of the key, not 'pro'"),
        (("1/s",), {"plans": {}, "plan_age": 0}, ValueError, "plan_age must be more than 0"),
        (("1/s",), {"plans": {}, "plan_age": "1"}, TypeError, "plan_age must be a number"),
        (("1/s",), {"plans": {}, "on_plan_error": "x"}, ValueError, "'keep', 'default' or 'raise'"),
        ((), {"plan_of": len, "on_plan_error": "default"}, ValueError, "give some"),
        (("1/s",), {"plans": {}, "name": None}, TypeError, "needs a name"),
    ],
)
def test_bad_arguments(
    segment: Segment, given: Any, options: Any, kind: type[Exception], said: str
) -> None:
    with pytest.raises(kind, match=said):
        RateLimiter(*given, **{"name": "bad", "segment": segment, **options})


def test_a_name_has_plans_or_limits(segment: Segment) -> None:
    make(segment)
    with pytest.raises(SegmentError, match="limiter 'api' .* plans of keys"):
        RateLimiter("5/s", name="api", segment=segment)
    RateLimiter("5/s", name="plain", segment=segment)
    with pytest.raises(SegmentError, match="limiter 'plain'"):
        make(segment, name="plain")

    with pytest.raises(TypeError, match="'plain': all its keys have the same limits.*plans="):
        RateLimiter("5/s", name="plain", segment=segment).set_override("ann", "1/s")

    class Own(RateLimiter):
        pass

    with pytest.raises(TypeError, match="Own cannot take plans"):
        Own("5/s", name="own", segment=segment, plans={})


def test_too_many_different_buckets(segment: Segment) -> None:
    """The default is 131,071; a small segment has room for 1,024."""
    limiter = make(segment, plan_of=lambda key: f"{key}/minute", on_plan_error="raise")
    room = 1024
    with pytest.raises((SegmentFullError, PlanError), match=re.escape("too many different")):
        for n in range(2, room + 100):
            limiter.acquire(str(n))
    assert limiter.acquire("7").remaining == 5  # those that are known go on
