"""fast_litellm_shm.testing without pytest's fixtures: isolated(), its clock, reset, unittest."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pathlib
import subprocess
import sys
import threading
import unittest
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from support.names import left_over
from support.waiting import PATIENCE, wait_until

from fast_litellm_shm import (
    Budget,
    ConcurrencyLimiter,
    FixedWindow,
    Quota,
    RateLimiter,
    Segment,
    SlidingWindow,
    TokenBucket,
    check_rate_limit,
    limited,
)
from fast_litellm_shm._shared import moved_clock
from fast_litellm_shm.testing import Clock, Isolated, IsolatedTests, isolated


@pytest.fixture(name="shm")
def _shm() -> Iterator[Isolated]:
    with isolated(frozen=True) as found:
        yield found


def _admitted(limiter: RateLimiter, times: int = 20) -> int:
    return sum(bool(limiter.acquire("k")) for _ in range(times))


def test_a_segment_of_its_own_which_leaves_nothing() -> None:
    outer, name = Segment.default().name, os.environ["FAST_LITELLM_SHM_NAME"]
    os.environ["FAST_LITELLM_SHM_CLUSTER"] = "redis://nobody.invalid"
    before = RateLimiter("1 per hour", name="x", cluster=False)
    assert before.acquire("k")
    with isolated() as shm:
        inner, folder = shm.segment.name, os.environ["FAST_LITELLM_SHM_TEST_CLOCK"]
        assert Segment.default().name == inner != outer
        assert "FAST_LITELLM_SHM_CLUSTER" not in os.environ
        assert RateLimiter("1 per hour", name="x").acquire("k")
        assert not before.acquire("k")
    assert os.environ.pop("FAST_LITELLM_SHM_CLUSTER") == "redis://nobody.invalid"
    assert os.environ["FAST_LITELLM_SHM_NAME"] == name
    assert "FAST_LITELLM_SHM_TEST_CLOCK" not in os.environ
    assert Segment.default().name == outer
    assert left_over(inner) == []
    assert not os.path.exists(folder) and not os.path.exists(os.path.dirname(folder))
    assert moved_clock.current is None


def test_workers_that_are_set_up_for_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """A segment of a test is its user's alone: with the group it could not be made."""
    monkeypatch.setenv("FAST_LITELLM_SHM_GROUP", str(os.getgid()))
    with isolated():
        assert RateLimiter("1 per hour", name="x").acquire("k")
    assert os.environ["FAST_LITELLM_SHM_GROUP"] == str(os.getgid())


def test_one_in_another() -> None:
    with isolated(frozen=True) as outer:
        first = RateLimiter("1 per hour", name="x")
        assert first.acquire("k")
        with isolated(frozen=True) as inner:
            assert RateLimiter("1 per hour", name="x").acquire("k")
            inner.clock.advance(7200)
            assert not first.acquire("k")
        outer.clock.advance(3600)
        assert first.acquire("k")
        assert first.wait("k", timeout=3600)


@pytest.mark.parametrize(
    "limit",
    [
        TokenBucket(10, per=60),
        TokenBucket(10, per=60, burst=5, strict=True),
        FixedWindow(10, per=60),
        FixedWindow(10, per="hour", timezone="Asia/Kathmandu"),
        SlidingWindow(10, per=60),
    ],
)
def test_all_kinds_go_by_the_clock(shm: Isolated, limit: TokenBucket) -> None:
    limiter = RateLimiter(limit, name="k")
    most = _admitted(limiter)
    assert most in (5, 10)
    assert _admitted(limiter) == 0
    after = limiter.acquire("k").reset_after
    shm.clock.advance(after / 2)
    if isinstance(limit, FixedWindow):
        assert _admitted(limiter) == 0
    shm.clock.advance(2 * after)
    assert _admitted(limiter) == most


def test_the_calendar(shm: Isolated) -> None:
    limiter = RateLimiter(FixedWindow(1, per="month", timezone="Europe/Berlin"), name="plan")
    budget = Budget(1, per="day", name="money")
    for moment in (datetime(2031, 2, 28, 22, 59), datetime(2024, 2, 29, 22, 59)):  # back, too
        shm.clock.move_to(moment)
        shm.reset()
        assert shm.clock.now == moment.replace(tzinfo=timezone.utc)
        assert limiter.acquire("k") and not limiter.acquire("k")
        with budget.reserve("k", 1) as spent:
            assert spent
            spent.settle(1)
        assert not budget.reserve("k", 1)
        assert budget.reserve("k", 1).retry_after == 3660
        shm.clock.advance(60)
        assert limiter.acquire("k")  # March in Berlin
        assert not budget.reserve("k", 1)
        shm.clock.advance(timedelta(hours=1))
        with budget.reserve("k", 1) as spent:
            assert spent


def test_the_clock_never_goes_back_and_ends(shm: Isolated) -> None:
    clock = shm.clock
    for wrong in (-1, float("nan")):
        with pytest.raises(ValueError, match="must be 0 or more"):
            clock.advance(wrong)
    with pytest.raises(TypeError, match="must be a number or a timedelta"):
        clock.advance("60")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be a datetime"):
        clock.move_to("2030-01-01")  # type: ignore[arg-type]
    before = clock.seconds
    for far in (1e9, 1e300, float("inf")):
        with pytest.raises(ValueError, match=r"4\.5 years"):
            clock.advance(far)
    assert clock.seconds == before
    clock.advance(4 * 365 * 86_400)
    assert clock.seconds - before == pytest.approx(4 * 365 * 86_400)
    frozen = [clock.frozen]
    clock.run()
    at = clock.seconds
    assert [*frozen, clock.frozen] == [True, False]
    assert at >= before
    wait_until("the clock runs", lambda: clock.seconds > at)


def test_a_segment_that_was_open_before_has_no_such_clock(segment: Segment) -> None:
    with isolated(), pytest.raises(RuntimeError, match="cannot be moved: it was opened before"):
        Clock(segment).advance(1)


def test_waits_move_a_clock_that_stands(shm: Isolated) -> None:
    limiter = RateLimiter(TokenBucket(1, per=3600), name="slow")
    before = shm.clock.seconds
    assert limiter.wait("k")
    assert limiter.wait("k", timeout=3600)
    assert shm.clock.seconds - before == pytest.approx(3600)
    assert not limiter.wait("k", timeout=3599)

    @limited("1 per 30 minutes", wait=None)
    def report() -> float:
        return shm.clock.seconds

    assert report() + 1800 == pytest.approx(report())

    quota = Quota(rpm=1, name="q")
    for _ in range(3):
        with quota.wait("k", timeout=61) as admission:
            assert admission

    async def main() -> list[bool]:
        return [
            bool(found)
            for found in await asyncio.gather(*(limiter.wait_async("a") for _ in range(5)))
        ]

    before = shm.clock.seconds
    assert asyncio.run(main()) == [True] * 5
    assert shm.clock.seconds - before == pytest.approx(4 * 3600)


def test_held_waits_go_on_when_the_clock_is_moved(shm: Isolated) -> None:
    shm.clock.freeze(hold_waits=True)
    limiter = RateLimiter(TokenBucket(1, per=3600), name="slow")
    assert limiter.acquire("k")
    admitted: list[bool] = []
    threads = [
        threading.Thread(target=lambda: admitted.append(bool(limiter.wait("k")))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    wait_until("both wait", lambda: limiter.queue_size("k") == 2)
    before = shm.clock.seconds
    shm.clock.advance(3600)
    wait_until("one is admitted", lambda: admitted == [True])
    assert shm.clock.seconds - before == pytest.approx(3600)
    shm.clock.advance(3600)
    for thread in threads:
        thread.join(PATIENCE)
    assert admitted == [True, True]


def test_a_time_out_passes_when_the_clock_is_moved(shm: Isolated) -> None:
    limiter = ConcurrencyLimiter(1, name="gpu")
    held, got = limiter.acquire("k"), []
    thread = threading.Thread(target=lambda: got.append(bool(limiter.wait("k", timeout=86_400))))
    thread.start()
    wait_until("it waits", lambda: limiter.queue_size("k") == 1)
    shm.clock.advance(86_401)
    thread.join(PATIENCE)
    assert got == [False]
    held.release()


def _child(pipe: multiprocessing.connection.Connection) -> None:
    limiter = RateLimiter(TokenBucket(1, per=3600), name="all")
    while pipe.recv():
        pipe.send(bool(limiter.acquire("k")))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_of_the_test_have_its_clock(shm: Isolated, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs,))
    child.start()

    def ask() -> bool:
        ours.send(True)
        assert ours.poll(PATIENCE)
        return bool(ours.recv())

    try:
        assert [ask(), ask()] == [True, False]
        shm.clock.advance(3600)
        assert [ask(), ask()] == [True, False]
        shm.reset()
        assert ask()
    finally:
        ours.send(False)
        child.join(PATIENCE)
        ours.close()
        theirs.close()


def test_a_dead_process_gives_its_permits_back_while_the_clock_stands(shm: Isolated) -> None:
    limiter = ConcurrencyLimiter(1, name="gpu")
    pid = os.fork()
    if not pid:
        os._exit(0 if limiter.acquire("k") else 1)  # dies with its permit
    assert os.waitpid(pid, 0)[1] == 0
    permit = wait_until("the permit is free", lambda: limiter.acquire("k"))
    permit.release()


def test_reset(shm: Isolated) -> None:
    limiters = [RateLimiter(limit, name=limit) for limit in ("1/day", "1/s", "1/minute sliding")]
    assert all(each.acquire("k") for each in limiters)
    quota = Quota(rpm=1, max_parallel=1, name="q")
    admission = quota.admit("k")
    permit = ConcurrencyLimiter(1, name="gpu").acquire("k")
    assert admission and permit and check_rate_limit("k")["allowed"]
    shm.reset()
    assert all(each.acquire("k") for each in limiters)
    with quota.admit("k") as again:
        assert again
    with ConcurrencyLimiter(1, name="gpu").acquire("k") as second:
        assert second
    del admission, permit


def test_check_rate_limit_counts_in_the_test(shm: Isolated) -> None:
    found = [check_rate_limit("k")["allowed"] for _ in range(25)]
    assert found[0] and not found[-1]
    with isolated():
        assert check_rate_limit("k")["allowed"]


class Unit(IsolatedTests, unittest.TestCase):
    def test_first(self) -> None:
        self._test()

    def test_second(self) -> None:
        self._test()

    def _test(self) -> None:
        limiter = RateLimiter("1 per minute", name="unit")
        self.assertTrue(limiter.acquire("k"))
        self.assertFalse(limiter.acquire("k"))
        self.shm.clock.advance(60)
        self.assertTrue(limiter.acquire("k"))


def test_the_plugin_does_not_import_the_package() -> None:
    code = "import sys, pytest_fast_litellm_shm; assert 'fast_litellm_shm' not in sys.modules"
    root = str(pathlib.Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": root})
