"""The storage for ``limits``: what its own tests (make test-limits) leave out, and what is ours."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("limits")

from limits import RateLimitItemPerHour, RateLimitItemPerMinute, RateLimitItemPerSecond
from limits.aio import strategies as aio_strategies
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string
from limits.strategies import (
    STRATEGIES,
    FixedWindowRateLimiter,
    MovingWindowRateLimiter,
    SlidingWindowCounterRateLimiter,
)

from fast_litellm_shm import Limit, RateLimiter, Segment, SegmentError, SegmentFullError
from fast_litellm_shm._shared import key_grammar
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.integrations.limits import AsyncShmStorage, ShmStorage

MINUTE = RateLimitItemPerMinute(5)


def of(segment_name: str, query: str = "?capacity=2000", **options: Any) -> ShmStorage:
    found = storage_from_string(f"shm://{segment_name}{query}", **options)
    assert isinstance(found, ShmStorage)
    return found


@pytest.fixture
def storage(segment_name: str) -> ShmStorage:
    return of(segment_name)


# A denial consumes nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_a_denied_cost_consumes_nothing(storage: ShmStorage, strategy: Any) -> None:
    limiter = strategy(storage)
    assert limiter.hit(MINUTE, "k", cost=3)
    for _ in range(10):
        assert not limiter.hit(MINUTE, "k", cost=3)
        assert not limiter.hit(MINUTE, "k", cost=6)
    assert limiter.get_window_stats(MINUTE, "k").remaining == 2
    assert limiter.hit(MINUTE, "k", cost=2)
    assert not limiter.hit(MINUTE, "k")


def test_incr_beyond_the_keys_limit_says_what_it_would_be(storage: ShmStorage) -> None:
    key = MINUTE.key_for("k")
    assert storage.incr(key, 60, amount=4) == 4
    assert storage.incr(key, 60, amount=2) == 6
    assert storage.get(key) == 4
    assert storage.incr(key, 60) == 5


@pytest.mark.parametrize(
    ("key", "expiry"),
    [
        ("anything", 60),
        ("LIMITER/k/5/1/minute", 61),  # another period than it says: not limits' own
        ("LIMITER/k/5/1/fortnight", 60),
        ("LIMITER/k/five/1/minute", 60),
        ("5/1/minute", 60),  # key_for() puts at least a namespace before it
        ("/minute", 60),
        ("minute", 60),
        ("", 60),
        ("LIMITER/k/99999999999999999999/1/minute", 60),
    ],
)
def test_a_key_that_names_no_limit_is_counted_without(
    storage: ShmStorage, key: str, expiry: int
) -> None:
    assert [storage.incr(key, expiry, amount=5) for _ in range(3)] == [5, 10, 15]
    assert storage.get(key) == 15


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_a_limit_of_0_admits_nothing(storage: ShmStorage, strategy: Any) -> None:
    assert not strategy(storage).hit(RateLimitItemPerMinute(0), "k")
    assert storage.get(RateLimitItemPerMinute(0).key_for("k")) == 0


# Fixed windows ------------------------------------------------------------------------------------


def test_a_window_begins_at_the_first_hit_and_is_not_prolonged(storage: ShmStorage) -> None:
    before = time.time()
    storage.incr("k", 60)
    after = time.time()
    first = storage.get_expiry("k")
    # limits' clock is the wall's, ours is not: between two looks at it, they differ by little
    assert before + 60 - 0.01 <= first <= after + 60 + 0.01
    storage.incr("k", 3600, amount=100)
    assert storage.get_expiry("k") == pytest.approx(first, abs=0.01)


def test_a_window_ends_when_it_should_also_where_the_count_is_without_a_limit(
    storage: ShmStorage,
) -> None:
    """A count of up to 2**31 kept in one cell could only have an end in whole seconds."""
    before = time.monotonic()
    assert storage.incr("k", 1, amount=1000) == 1000
    left = storage._windows.left("k")
    assert 1 - (time.monotonic() - before) - 0.01 <= left <= 1.00001


def test_get_expiry_of_a_missing_key_is_now(storage: ShmStorage) -> None:
    before = time.time()
    assert before <= storage.get_expiry("missing") <= time.time()
    assert storage.get("missing") == 0


def test_the_largest_count(storage: ShmStorage) -> None:
    most = 2**31 - 1
    assert storage.incr("k", 60, amount=most) == most
    assert storage.incr("k", 60) == most + 1
    assert storage.get("k") == most
    assert storage.incr("other", 60, amount=2**70) > most
    assert storage.get("other") == 0


# Sliding window counters and moving windows -------------------------------------------------------


def test_sliding_windows_are_aligned_to_the_wall_clock(storage: ShmStorage) -> None:
    key, per = "k", 3600
    assert storage.acquire_sliding_window_entry(key, 10, per, amount=4)
    previous, previous_ttl, current, current_ttl = storage.get_sliding_window(key, per)
    assert (previous, previous_ttl, current) == (0, 0.0, 4)
    expected = per - time.time() % per + per
    assert current_ttl == pytest.approx(expected, abs=30) or expected > 2 * per - 30
    storage.clear_sliding_window(key, per)
    assert storage.get_sliding_window(key, per)[2] == 0


def test_what_a_moving_window_shows(storage: ShmStorage) -> None:
    before = time.time()
    start, count = storage.get_moving_window("k", 5, 60)
    assert (before <= start <= time.time(), count) == (True, 0)
    assert storage.acquire_entry("k", 5, 60, amount=2)
    start, count = storage.get_moving_window("k", 5, 60)
    assert (before - 0.01 <= start <= time.time() + 0.01, count) == (True, 2)
    assert not storage.acquire_entry("k", 5, 60, amount=4)
    assert storage.get_moving_window("k", 5, 60)[1] == 2


def test_the_strategies_count_apart(storage: ShmStorage) -> None:
    limiters = [strategy(storage) for strategy in STRATEGIES.values()]
    for limiter in limiters:
        assert [limiter.hit(MINUTE, "k") for _ in range(6)] == [True] * 5 + [False]
    FixedWindowRateLimiter(storage).clear(MINUTE, "k")  # the moving window too, as in redis://
    assert MovingWindowRateLimiter(storage).get_window_stats(MINUTE, "k").remaining == 5
    assert not SlidingWindowCounterRateLimiter(storage).hit(MINUTE, "k")


def test_reset_tells_how_many_keys_of_all_strategies(storage: ShmStorage) -> None:
    for strategy in STRATEGIES.values():
        for i in range(7):
            assert strategy(storage).hit(MINUTE, str(i), cost=3)
    assert storage.reset() == 21
    assert storage.reset() == 0
    for strategy in STRATEGIES.values():
        assert strategy(storage).hit(MINUTE, "0", cost=5)


def test_reset_cannot_tell_where_no_names_are_kept(segment_name: str) -> None:
    storage = of(segment_name, "?capacity=100&names=off")
    storage.incr("k", 60)
    assert storage.reset() is None
    assert storage.get("k") == 0


# All processes ------------------------------------------------------------------------------------


def _hit(name: str, strategy: str, hits: int, results: Any) -> None:
    limiter = STRATEGIES[strategy](of(name))
    results.put(sum(limiter.hit(RateLimitItemPerHour(1000, 24), "k") for _ in range(hits)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_admit_exactly_the_limit(
    storage: ShmStorage, segment_name: str, strategy: str, method: str
) -> None:
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    workers = [
        context.Process(target=_hit, args=(segment_name, strategy, 400, results)) for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    admitted = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join(120)
    assert sum(admitted) == 1000
    assert not STRATEGIES[strategy](storage).hit(RateLimitItemPerHour(1000, 24), "k")


def test_a_forked_child_goes_on_counting(storage: ShmStorage) -> None:
    storage.incr("k", 60)
    child = os.fork()
    if not child:
        os._exit(storage.incr("k", 60))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert storage.incr("k", 60) == 3


@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_threads(storage: ShmStorage, strategy: Any) -> None:
    limiter, item = strategy(storage), RateLimitItemPerHour(100, 24)
    with ThreadPoolExecutor(8) as pool:
        hits = list(pool.map(lambda _: limiter.hit(item, "k"), range(400)))
    assert sum(hits) == 100


def test_async_counts_where_sync_does(storage: ShmStorage, segment_name: str) -> None:
    async def all_three() -> list[bool]:
        found = storage_from_string(f"async+shm://{segment_name}")
        assert isinstance(found, AsyncShmStorage)
        assert await found.check()
        fixed = aio_strategies.FixedWindowRateLimiter(found)
        moving = aio_strategies.MovingWindowRateLimiter(found)
        sliding = aio_strategies.SlidingWindowCounterRateLimiter(found)
        return [await each.hit(MINUTE, "k", cost=2) for each in (fixed, moving, sliding)]

    for strategy in STRATEGIES.values():
        assert strategy(storage).hit(MINUTE, "k", cost=3)
    assert asyncio.run(all_three()) == [True] * 3
    for strategy in STRATEGIES.values():
        assert not strategy(storage).hit(MINUTE, "k")


def test_pickled_it_is_the_same_storage(storage: ShmStorage, segment_name: str) -> None:
    storage.incr("k", 60)
    for each in (storage, AsyncShmStorage(f"async+shm://{segment_name}", wrap_exceptions=True)):
        again = pickle.loads(pickle.dumps(each))
        assert type(again) is type(each)
        assert again.wrap_exceptions == each.wrap_exceptions
        assert again.segment.name == segment_name
    assert pickle.loads(pickle.dumps(storage)).incr("k", 60) == 2


# The URI ------------------------------------------------------------------------------------------


def test_options_in_the_uri_and_as_arguments(segment_name: str) -> None:
    storage = of(segment_name, "?capacity=300&mode=0660&names=hashed&allow_other_owner=true")
    stats = storage.segment.stats()
    assert (stats["capacity"], stats["names"]) == (300, "hashed")
    assert os.stat(storage.segment.path).st_mode & 0o777 == 0o660
    assert of(segment_name, "", capacity=300, mode="660").segment.stats()["capacity"] == 300
    assert of(segment_name, "?capacity=300", capacity=5).segment.name == segment_name


def test_no_name_is_the_default_segment() -> None:
    storage = ShmStorage()
    assert storage.segment.name == os.environ["FAST_LITELLM_SHM_NAME"]
    assert storage.incr("k", 60) == 1


def test_names_keep_their_case(segment_name: str) -> None:
    storage = of(f"{segment_name}-Upper")
    try:
        assert storage.segment.name == f"{segment_name}-Upper"
    finally:
        storage.segment.remove()


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("shm://name/path", "more than a segment's name"),
        ("shm://user@name", "more than a segment's name"),
        ("shm://name?size=3", "no option 'size'; there are capacity, mode, names"),
        ("shm://name?capacity=many", "capacity cannot be 'many'"),
        ("shm://name?capacity=0", "capacity must be an int between 1 and"),
        ("shm://name?capacity=", "capacity cannot be ''"),
        ("shm://name?mode=0999", "mode cannot be '0999'"),
        ("shm://name?names=some", "names"),
        ("shm://name?allow_other_owner=perhaps", "allow_other_owner cannot be 'perhaps'"),
        ("shm://localhost:6379", "segment name must be 1 to 64 characters"),
    ],
)
def test_a_uri_that_cannot_be_understood(uri: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        storage_from_string(uri)


# What cannot be done ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (
            lambda storage: storage.acquire_entry("k", 2_000_000, 60),
            "moving window of 2000000 in 60 seconds .* must be 1 to 1,048,576",
        ),
        (
            lambda storage: storage.acquire_sliding_window_entry("k", 131_072, 1),
            "sliding window counter of 131072 in 1 seconds .* must be 1 to 131,071",
        ),
        (lambda storage: storage.incr("k", 500 * 86_400), "period must be a number of seconds"),
        (lambda storage: storage.incr("k", 0), "period must be a number of seconds"),
        (lambda storage: storage.incr("k", float("nan")), "period must be a number of seconds"),
    ],
)
def test_out_of_range(storage: ShmStorage, call: Callable[[ShmStorage], object], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        call(storage)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        (key_grammar.FIXED, lambda storage: storage.incr("k/5/1/minute", 60)),
        (key_grammar.FIXED, lambda storage: storage.get("k")),
        (key_grammar.FIXED, lambda storage: storage.get_expiry("k")),
        (key_grammar.SLIDING, lambda storage: storage.acquire_sliding_window_entry("k", 5, 60)),
        (key_grammar.SLIDING, lambda storage: storage.get_sliding_window("k", 60)),
        (key_grammar.MOVING, lambda storage: storage.acquire_entry("k", 5, 60)),
        (key_grammar.MOVING, lambda storage: storage.get_moving_window("k", 5, 60)),
        (key_grammar.MOVING, lambda storage: storage.clear("k")),
    ],
)
def test_a_name_that_was_given_other_limits(
    storage: ShmStorage, segment_name: str, name: str, call: Callable[[ShmStorage], object]
) -> None:
    """None of the call's own numbers is wrong."""
    RateLimiter(Limit(5, 60), name=name, segment=storage.segment)
    with pytest.raises(SegmentError) as caught:
        call(storage)
    where = f"limiter '{name}' in segment '{segment_name}'"
    assert str(caught.value).startswith(f"{where} has limits of another kind")
    call(of(segment_name))  # which takes the name back, as the error says
    call(storage)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda storage: storage.incr("k", 60, -1), ValueError),
        (lambda storage: storage.incr("k", 60, "1"), TypeError),
        (lambda storage: storage.incr(5, 60), TypeError),
        (lambda storage: storage.incr("k", "60"), TypeError),
        (lambda storage: storage.acquire_entry("k", -5, 60), ValueError),
    ],
)
def test_wrong_arguments(
    storage: ShmStorage, call: Callable[[ShmStorage], object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        call(storage)


@pytest.mark.parametrize("cost", [7.5, Fraction(15, 2), Decimal("7.5"), 8.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cost_with_a_fraction_takes_the_next_whole_number(
    storage: ShmStorage, segment_name: str, strategy: str, cost: Any
) -> None:
    item = RateLimitItemPerHour(50, 24)
    limiter = STRATEGIES[strategy](storage)
    assert [limiter.hit(item, "k", cost=cost) for _ in range(7)] == [True] * 6 + [False]
    assert limiter.get_window_stats(item, "k").remaining == 2
    made: Any = aio_strategies.STRATEGIES[strategy]

    async def hits() -> list[bool]:
        found = made(storage_from_string(f"async+shm://{segment_name}"))
        return [await found.hit(item, "a", cost=cost) for _ in range(7)]

    assert asyncio.run(hits()) == [True] * 6 + [False]


@pytest.mark.parametrize("cost", [-0.5, float("nan"), float("inf"), Decimal("-Infinity")])
@pytest.mark.parametrize("strategy", STRATEGIES.values())
def test_a_cost_that_no_count_can_take(storage: ShmStorage, strategy: Any, cost: Any) -> None:
    limiter = strategy(storage)
    with pytest.raises(ValueError, match="cost must be a finite number of 0 or more, not"):
        limiter.hit(MINUTE, "k", cost=cost)
    assert limiter.get_window_stats(MINUTE, "k").remaining == 5


def _fill(storage: ShmStorage) -> None:
    for i in range(10_000):
        storage.incr(str(i), 3600)


def test_a_full_segment_is_an_error_that_limits_can_wrap(segment_name: str) -> None:
    with pytest.raises(SegmentFullError, match="no room for another key"):
        _fill(of(segment_name, "?capacity=20"))
    with pytest.raises(StorageError) as caught:
        _fill(of(segment_name, "", wrap_exceptions=True))
    assert isinstance(caught.value.storage_error, SegmentFullError)
    with pytest.raises(SegmentFullError):
        of(segment_name, "").acquire_entry("moving", 1000, 3600, amount=500)
    assert of(segment_name, "").get_moving_window("moving", 1000, 3600)[1] == 0


def test_check_tells_that_the_segment_was_removed(storage: ShmStorage, segment_name: str) -> None:
    assert storage.check()
    Segment(segment_name).remove()
    assert not storage.check()
    assert of(segment_name).check()


def test_storage_is_what_it_counts_in(storage: ShmStorage, segment_name: str) -> None:
    """By the name that limits' own storages have: Flask-Limiter shows it."""
    assert storage.storage is storage.segment
    also = AsyncShmStorage(f"async+shm://{segment_name}")
    assert also.storage is also.segment


def test_it_shows_in_inspect(storage: ShmStorage) -> None:
    item = RateLimitItemPerSecond(2, 3600)
    for strategy in STRATEGIES.values():
        hits = [strategy(storage).hit(item, "somebody") for _ in range(3)]
        assert hits == [True, True, False]
    rows = [
        (row.limiter, row.key, row.admitted, row.denied)
        for row in Inspection(storage.segment).keys(sort="key")
    ]
    assert sorted(rows) == [
        (f"limits {kind} window", item.key_for("somebody"), 2, 1)
        for kind in ("fixed", "moving", "sliding")
    ]
