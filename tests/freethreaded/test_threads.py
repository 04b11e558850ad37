"""On a Python without the GIL: `make test-freethreaded`. Objects that threads share."""

from __future__ import annotations

import sys
import sysconfig
import threading
from collections.abc import Callable
from typing import Any

import pytest

from fast_litellm_shm import (
    AdvancedRouter,
    ConcurrencyLimiter,
    Limit,
    Quota,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    Window,
    record_performance,
)
from fast_litellm_shm._shared.native import Memo, address

THREADS, CALLS = 4, 20_000
A = "https://a.example"


def together(work: Callable[[int], Any]) -> list[Any]:
    """What each of the threads, which begin at once, returned."""
    start, found, wrong = threading.Barrier(THREADS), [None] * THREADS, []

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = work(number)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]
    return found


@pytest.fixture(autouse=True)
def _gil_stays_off() -> Any:
    assert sysconfig.get_config_var("Py_GIL_DISABLED"), "not a free-threaded Python"
    yield
    assert not vars(sys)["_is_gil_enabled"]()


@pytest.mark.parametrize("call", ["is_allowed", "acquire", "check"])
def test_four_threads_admit_exactly_the_limit(segment: Segment, call: str) -> None:
    limiter = RateLimiter(Window(CALLS, per=3600), name="w", segment=segment)
    ask = getattr(limiter, call)

    def work(_: int) -> int:
        answers = (ask("k") for _ in range(CALLS))
        return sum(each["allowed"] if isinstance(each, dict) else bool(each) for each in answers)

    assert sum(together(work)) == CALLS


def test_limits_that_change_under_calls(segment: Segment) -> None:
    """The tuple of limits is replaced while others hold it."""
    limiter = RateLimiter(Limit(100, per=1), name="changes", segment=segment)

    def work(number: int) -> None:
        for i in range(CALLS // 10):
            if number == 0:
                RateLimiter(Limit(100 + i % 7, per=1), name="changes", segment=segment)
            else:
                assert limiter.acquire("k").limit is not None
                assert limiter.limits[0].n >= 100
                assert limiter.check("k")["reason"]

    together(work)


def test_permits_and_admissions(segment: Segment) -> None:
    limiter = ConcurrencyLimiter(THREADS - 1, name="c", segment=segment)
    quota = Quota(rpm=2**31 - 1, max_parallel=THREADS - 1, name="q", segment=segment)
    shared: list[Any] = [None]

    def work(_: int) -> None:
        for _ in range(CALLS // 20):
            with limiter.slot("k"):
                pass
            with quota.admit("k", 1) as admission:
                admission.settle(1)
            shared[0] = limiter.acquire("k")  # one that several threads release
            found = shared[0]
            if found is not None:
                found.release()

    together(work)
    shared[0] = None
    assert limiter.in_flight("k") == quota.in_flight("k") == 0


def test_one_pool(segment: Segment) -> None:
    pool = SimpleConnectionPool("p", max_per_endpoint=THREADS, segment=segment)
    used, lock = set(), threading.Lock()

    def work(number: int) -> None:
        for i in range(CALLS // 20):
            with pool.connection(A, 5) as found:
                with lock:
                    assert found not in used  # nobody else has it
                    used.add(found)
                if i % 50 == number:
                    pool.cleanup()
                with lock:
                    used.remove(found)
            if i % 100 == number and (other := pool.get_connection(A)):
                pool.remove_connection(other)

    together(work)
    assert all([pool.get_connection(A) for _ in range(THREADS)])  # none was lost
    assert pool.get_connection(A) is None


def test_routers_memos_and_records(segment: Segment) -> None:
    router = AdvancedRouter("least_busy", name="r", segment=segment)
    deployments = [
        {"model_name": "m", "litellm_params": {"model": f"x/{i}"}, "model_info": {"id": str(i)}}
        for i in range(3)
    ]
    memo = Memo((segment, segment._handle), address(segment._handle), 7, len)

    def work(number: int) -> None:
        for i in range(CALLS // 20):
            copy = list(deployments) if i % 3 else deployments
            assert router.get_available_deployment(copy, "m", [str(number % 3)]) in deployments
            assert memo.count(f"{i % 50}") == len(f"{i % 50}")
            record_performance("c", f"o{i % 5}", 1.0)

    together(work)
