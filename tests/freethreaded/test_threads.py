"""On a Python without the GIL: `make test-free-threaded`. Objects that threads share: the threads
of one process admit exactly what one would."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import pytest

from fast_litellm_shm import (
    AdaptiveConcurrency,
    AdvancedRouter,
    Budget,
    ConcurrencyLimiter,
    HierarchyLimiter,
    Limit,
    Quota,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    Window,
    _native,
    record_performance,
)
from fast_litellm_shm._shared.native import Counts, Memo, address
from fast_litellm_shm.tokens.vocabulary import _records

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


@pytest.mark.filterwarnings("ignore:a permit was dropped:ResourceWarning")  # one that was replaced
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


def test_four_threads_in_batches(segment: Segment) -> None:
    limiter = RateLimiter(Window(CALLS, per=3600), name="w", segment=segment)

    def work(_: int) -> int:
        batches = (limiter.acquire_many(["k"] * 100) for _ in range(CALLS // 100))
        return sum(int(batch.allowed.sum()) for batch in batches)

    assert sum(together(work)) == CALLS


def test_four_threads_with_plans(segment: Segment) -> None:
    """While overrides change, so that each thread looks for plans again and again."""
    plans = {"small": Window(CALLS // 4, per=3600), "large": Window(CALLS // 2, per=3600)}
    limiter = RateLimiter(
        Window(CALLS, per=3600),
        name="p",
        segment=segment,
        plans=plans,
        plan_of={"s": "small", "l": "large"}.get,
    )

    def work(number: int) -> tuple[int, int, int]:
        admitted = [0, 0, 0]
        for i in range(CALLS // 2):
            which = i % 3
            admitted[which] += limiter.is_allowed(("s", "l", "none")[which])
            if i % 2000 == number:
                limiter.set_override(f"other {number}", Window(1 + i, per=3600))
                assert limiter.acquire(f"other {number}")
        return admitted[0], admitted[1], admitted[2]

    small, large, none = map(sum, zip(*together(work), strict=True))
    assert (small, large, none) == (CALLS // 4, CALLS // 2, min(CALLS, none))
    assert limiter.get_remaining("none") == CALLS - none


def test_four_threads_on_a_quota_and_a_hierarchy(segment: Segment) -> None:
    quota = Quota(rpm=CALLS // 10, max_parallel=THREADS, name="q", segment=segment)
    levels = {"org": Window(CALLS // 20, per=3600), "user": Window(CALLS // 40, per=3600)}
    tree = HierarchyLimiter(levels, name="h", segment=segment)

    def work(number: int) -> tuple[int, int]:
        admitted = allowed = 0
        for _ in range(CALLS // 10):
            with quota.admit("k") as admission:
                admitted += bool(admission)
            allowed += tree.is_allowed(("o", f"u{number}"))
        return admitted, allowed

    admitted, allowed = map(sum, zip(*together(work), strict=True))
    # A bucket of 2,000 a minute fills by 33 a second: what it admitted more came back meanwhile.
    assert admitted >= CALLS // 10
    assert allowed == CALLS // 20
    assert all(tree.peek(("o", f"u{i}")).remaining == 0 for i in range(THREADS))


def test_four_threads_spend_a_budget(segment: Segment) -> None:
    budget = Budget(CALLS // 10, name="b", segment=segment)

    def work(_: int) -> int:
        spent = 0
        for i in range(CALLS // 10):
            with budget.reserve("k", 1) as reservation:
                if reservation and i % 3:
                    reservation.settle(1)
                    spent += 1  # the others are given back by the block
        return spent

    spent = sum(together(work))
    assert budget.spent("k") == spent == CALLS // 10


def test_permits_are_never_more_than_the_limit(segment: Segment) -> None:
    limiter = ConcurrencyLimiter(THREADS - 2, name="c", segment=segment)
    learned = AdaptiveConcurrency(
        name="a", initial=THREADS - 2, min=1, max=THREADS - 2, segment=segment
    )
    both: tuple[Any, Any] = (limiter, learned)
    held, lock = [0, 0], threading.Lock()

    def count(which: int, by: int) -> None:
        with lock:
            held[which] += by
            assert held[which] <= THREADS - 2

    def work(_: int) -> None:
        for _ in range(CALLS // 20):
            for which, each in enumerate(both):
                with each.slot("k", timeout=60):
                    count(which, 1)
                    count(which, -1)

    together(work)
    assert limiter.in_flight("k") == learned.in_flight("k") == 0


def test_new_limiters_while_others_call(segment: Segment) -> None:
    """Each call by an object that was just made: of one limiter, admitted as by one."""
    shared = RateLimiter(Window(CALLS // 10, per=3600), name="w", segment=segment)

    def work(number: int) -> int:
        admitted = 0
        for i in range(CALLS // 20):
            fresh = RateLimiter(Window(CALLS // 10, per=3600), name="w", segment=segment)
            admitted += bool(fresh.acquire("k")) + shared.is_allowed("k")
            RateLimiter(Limit(5, per=1), name=f"of {number} {i % 5}", segment=segment).check("k")
        return admitted

    assert sum(together(work)) == CALLS // 10


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_forks_while_others_call(segment: Segment) -> None:
    """Children of threads, which call too, and end at once: all together admit the limit."""
    limiter = RateLimiter(Window(CALLS, per=3600), name="w", segment=segment)
    permits = ConcurrencyLimiter(2, name="c", segment=segment)

    def child(writes: int) -> NoReturn:
        admitted = sum(limiter.is_allowed("k") for _ in range(100))
        permits.acquire("k")  # its death frees it
        os.write(writes, admitted.to_bytes(4, "little"))
        os._exit(0)

    def work(number: int) -> int:
        admitted = 0
        for i in range(CALLS // 2):
            admitted += limiter.is_allowed("k")
            if number < 2 and i % 500 == 0:
                reads, writes = os.pipe()
                pid = os.fork()
                if not pid:
                    child(writes)
                os.close(writes)
                admitted += int.from_bytes(os.read(reads, 4), "little")
                os.close(reads)
                assert os.waitpid(pid, 0) == (pid, 0)
        return admitted

    assert sum(together(work)) == CALLS
    with permits.slot("k", timeout=30), permits.slot("k", timeout=30):
        assert permits.in_flight("k") == 2


def test_a_list_of_deployments_that_changes(segment: Segment) -> None:
    """The router compares the caller's list with its plan while others shorten and extend it."""
    router = AdvancedRouter(name="r", segment=segment)
    all_of_them = [
        {"model_name": "m", "litellm_params": {"model": f"x/{i}"}, "model_info": {"id": str(i)}}
        for i in range(64)
    ]
    shared = list(all_of_them)

    def work(number: int) -> None:
        for i in range(CALLS // 20):
            if number == 0:
                del shared[1 + i % 60 :]
                shared.extend(all_of_them[len(shared) :])
            else:
                assert router.get_available_deployment(shared, "m") in all_of_them

    together(work)


def test_token_counts_and_sums(segment: Segment) -> None:
    """One vocabulary, and one object with the counts of PyPI's `limits`."""
    handles = tuple(
        RateLimiter(Window(2**31 - 1, per=86400), name=name, segment=segment)._handle
        for name in ("fixed", "sliding", "moving")
    )
    counts = Counts()
    counts._bind(handles, *map(address, handles))
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b" b": 257, b"bab": 258}
    vocabulary = _native.build_vocabulary(_records(ranks), _records({}), 2)
    texts = ["a b", "ab ba", "bab " * 50, "a" * 2000]
    right = [vocabulary.count(text) for text in texts]

    def work(_: int) -> int:
        for i in range(CALLS // 20):
            assert vocabulary.count(texts[i % 4]) == right[i % 4]
            counts.incr("LIMITS/k/1000000/1/hour", 3600, 1)
        return CALLS // 20

    charged = sum(together(work))
    assert counts.get("LIMITS/k/1000000/1/hour") == charged
