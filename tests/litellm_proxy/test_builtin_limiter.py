"""LiteLLM's built-in limiter over the segment, called without a proxy: in ``mode: native`` for all
limits, in ``mode: hooks`` for those that the plugin does not keep."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from support.children import PATIENCE, run
from support.waiting import wait_until
from support.workers import meet

from fast_litellm_shm import Segment, exceptions, health_check
from fast_litellm_shm.integrations.litellm import failures, settings
from fast_litellm_shm.integrations.litellm.builtin_limiter import (
    HOOK,
    replacement,
    segment_limiter,
    slots,
    windows,
)

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its dependencies
    try:
        v3: Any = importlib.import_module("litellm.proxy.hooks.parallel_request_limiter_v3")
    except ImportError as error:  # several, and not all of them say so as they should
        pytest.skip(
            f"needs litellm with all that its proxy needs: {error}", allow_module_level=True
        )
    litellm: Any = importlib.import_module("litellm")
    importlib.import_module("litellm.proxy.proxy_server")  # which LiteLLM imports where it is used
    UserAPIKeyAuth: Any = importlib.import_module("litellm.proxy._types").UserAPIKeyAuth
    InternalUsageCache: Any = importlib.import_module("litellm.proxy.utils").InternalUsageCache
    HTTPException: Any = importlib.import_module("fastapi").HTTPException
    Batch: Any = importlib.import_module("litellm.caching.redis_batch").Batch
    scopes: Any = importlib.import_module("litellm.redis.stores.rate_limits.types")
    # the module: the package has an object of the same name
    plugin: Any = importlib.import_module("fast_litellm_shm.integrations.litellm.limiter")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Item .* on TypedDict class:UserWarning"),  # of LiteLLM
    pytest.mark.filterwarnings("ignore:nothing is recorded by record_performance:RuntimeWarning"),
]
# As LiteLLM's own table is before the plugin is imported in a proxy.
TABLE = {HOOK: v3.PROXY_MaxParallelRequestsHandler_v3}
PROCESSES = 4
KEY = "88dc28d0f030c55ed4ab77ed8faf098196cb1c05df778539800c9f1243fe6b4b"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    failures.forget()
    yield
    if hasattr(litellm, settings.ATTRIBUTE):
        delattr(litellm, settings.ATTRIBUTE)


def make() -> Any:
    """As the proxy makes it: by the names of the arguments that it finds."""
    hooks = dict(TABLE)
    assert segment_limiter.install(hooks) is None
    found = hooks[HOOK]
    assert "internal_usage_cache" in inspect.getfullargspec(found).args
    assert "async_pre_call_hook" in vars(found)
    return found(internal_usage_cache=InternalUsageCache(litellm.DualCache()))


def auth(**limits: Any) -> Any:
    return UserAPIKeyAuth(api_key=KEY, user_id="u1", **limits)


def request(**more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "m1", "messages": messages, "litellm_call_id": os.urandom(8).hex(), **more}


async def admitted(limiter: Any, key: Any, data: dict[str, Any] | None = None) -> bool:
    """One request's pre-call hook; False where it was answered with 429."""
    try:
        await limiter.async_pre_call_hook(
            user_api_key_dict=key,
            cache=litellm.DualCache(),
            data=request() if data is None else data,
            call_type="acompletion",
        )
    except HTTPException as error:
        if error.status_code != 429:
            raise
        return False
    return True


async def in_turn(limiter: Any, key: Any, attempts: int, **data: Any) -> int:
    """So many requests, each in a task of its own as in a server. How many were admitted."""
    found = [
        await asyncio.create_task(admitted(limiter, key, request(**data))) for _ in range(attempts)
    ]
    return sum(found)


def _requests(limits: dict[str, Any], attempts: int, data: dict[str, Any]) -> int:
    limiter = make()
    meet(Segment.default().name, PROCESSES)
    return asyncio.run(in_turn(limiter, auth(**limits), attempts, **data))


@pytest.mark.parametrize(
    ("limits", "data", "exactly"),
    [
        ({"rpm_limit": 10}, {}, 10),
        ({"user_rpm_limit": 7, "rpm_limit": 50}, {}, 7),
        ({"team_id": "t", "team_rpm_limit": 9}, {}, 9),
        ({"metadata": {"model_rpm_limit": {"m1": 5}}}, {}, 5),
        ({"end_user_id": "e", "end_user_rpm_limit": 6}, {}, 6),
        ({"tpm_limit": 1000}, {"max_tokens": 92}, 10),  # 93 tokens are reserved
        ({"tpm_limit": 1000, "rpm_limit": 4}, {"max_tokens": 92}, 4),
    ],
)
def test_processes_admit_what_one_would(
    limits: dict[str, Any], data: dict[str, Any], exactly: int
) -> None:
    assert sum(run(_requests, [(limits, 25, data)] * PROCESSES, "fork")) == exactly


def make_for_hooks() -> Any:
    """As it is made in ``mode: hooks``: for what the plugin does not keep."""
    base = v3._PROXY_MaxParallelRequestsHandler_v3
    found: Any = replacement._maker(base, plugin.found_for)
    return found(internal_usage_cache=InternalUsageCache(litellm.DualCache()))


def _requests_of_others(limits: dict[str, Any], attempts: int, data: dict[str, Any]) -> int:
    limiter = make_for_hooks()
    meet(Segment.default().name, PROCESSES)
    return asyncio.run(in_turn(limiter, auth(**limits), attempts, **data))


@pytest.mark.parametrize(
    ("limits", "data", "exactly"),
    [
        ({"project_id": "p", "project_metadata": {"model_rpm_limit": {"m1": 6}}}, {}, 6),
        ({"metadata": {"tag_rpm_limit": {"x": 7}}}, {"metadata": {"tags": ["x"]}}, 7),
        (
            {"project_id": "p", "project_metadata": {"model_tpm_limit": {"m1": 1000}}},
            {"max_tokens": 92},
            10,
        ),
        # what the plugin keeps is left to it
        ({"rpm_limit": 1, "team_id": "t", "team_rpm_limit": 1}, {}, 25 * PROCESSES),
    ],
)
def test_the_rest_of_the_limits_holds_over_all_processes(
    limits: dict[str, Any], data: dict[str, Any], exactly: int
) -> None:
    assert sum(run(_requests_of_others, [(limits, 25, data)] * PROCESSES, "fork")) == exactly


def test_with_litellms_redis_the_rest_is_left_to_it() -> None:
    cache = InternalUsageCache(litellm.DualCache())
    cache.dual_cache.redis_cache = object()
    base = v3._PROXY_MaxParallelRequestsHandler_v3
    assert replacement._counting(base, cache) is base
    cache.dual_cache.redis_cache = None
    assert replacement._counting(base, cache) is segment_limiter.make_handler()


def test_tokens_that_nobody_limits_are_not_counted() -> None:
    """LiteLLM charges an answer's tokens to the key, the team and so on, limited or not."""
    limiter = make_for_hooks()
    scope = ("model_per_project", "p:m1")
    targets = [("api_key", KEY), ("team", "t"), scope]
    given = {"actual_tokens": 30, "reserved_tokens": 0}
    found = limiter._build_reservation_aware_tpm_ops(
        targets=targets, reserved_scopes=frozenset(), **given
    )
    assert [operation.counter.scope.descriptor_key for operation in found] == [scope[0]]
    found = limiter._build_reservation_aware_tpm_ops(
        targets=targets, reserved_scopes=frozenset({("api_key", KEY)}), **given
    )
    assert len(found) == 2  # of the type dynamic, for example


def test_requests_turned_away_are_not_counted_on_and_on() -> None:
    limiter, key = make(), auth(rpm_limit=3)
    assert asyncio.run(in_turn(limiter, key, 50)) == 3
    counter = scopes.RateLimitScope("api_key", KEY).counter("requests")
    assert asyncio.run(limiter.rate_limits.get(counter)) == 4  # one was needed to find out


async def _hold(limiter: Any, key: Any, started: Any, end: asyncio.Event) -> bool:
    """One request from its admission to its end."""
    try:
        found = await admitted(limiter, key)
    finally:
        started.release()
    if found:
        await end.wait()
        await limiter.async_release_max_parallel_requests_on_disconnect(key)
    return found


async def _together(limiter: Any, key: Any, count: int, go_on: Callable[[], None]) -> int:
    started, end = asyncio.Semaphore(0), asyncio.Event()
    tasks = [asyncio.create_task(_hold(limiter, key, started, end)) for _ in range(count)]
    for _ in tasks:
        await started.acquire()
    go_on()
    end.set()
    return sum(await asyncio.gather(*tasks))


def _at_once(limits: dict[str, Any], count: int, rounds: int) -> list[int]:
    limiter, name = make(), Segment.default().name
    meet(name, PROCESSES)
    key, found = auth(**limits), []
    for turn in range(1, rounds + 1):
        # Nobody gives anything back before all have asked.
        done = (turn * 2 - 1) * PROCESSES
        found.append(
            asyncio.run(_together(limiter, key, count, lambda: meet_again(name, done)))  # noqa: B023
        )
        meet_again(name, turn * 2 * PROCESSES)
    return found


def meet_again(name: str, parties: int) -> None:
    meet(name, PROCESSES + parties)


@pytest.mark.parametrize(
    "limits", [{"max_parallel_requests": 4}, {"max_parallel_requests": 4, "rpm_limit": 10_000}]
)
def test_processes_hold_as_many_in_parallel_as_one_would(limits: dict[str, Any]) -> None:
    """Twice, since all that is over has given its slot back."""
    results = run(_at_once, [(limits, 10, 2)] * PROCESSES, "fork")
    assert [sum(turn) for turn in zip(*results, strict=True)] == [4, 4]


def _hold_until_killed(ready: Any) -> None:
    async def hold() -> None:
        limiter, key = make(), auth(max_parallel_requests=4)
        held = [asyncio.create_task(admitted(limiter, key)) for _ in range(3)]
        ready.send(sum(await asyncio.gather(*held)))
        signal.pause()

    asyncio.run(hold())


def test_a_killed_worker_gives_its_slots_back() -> None:
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_hold_until_killed, args=(theirs,), daemon=True)
    child.start()
    assert mine.poll(PATIENCE) and mine.recv() == 3
    limiter, key = make(), auth(max_parallel_requests=4)
    assert asyncio.run(in_turn(limiter, key, 5)) == 1
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join(PATIENCE)
    assert asyncio.run(in_turn(limiter, key, 5)) == 3


# What is settled after the call -------------------------------------------------------------------


def usage(total: int) -> Any:
    """An answer that used so many tokens."""
    types = importlib.import_module("litellm.types.utils")
    counts = types.Usage(prompt_tokens=total, completion_tokens=0, total_tokens=total)
    return types.ModelResponse(usage=counts)


async def call(limiter: Any, key: Any, used: int, before_end: Callable[[], None]) -> None:
    data = request(max_tokens=92)
    assert await admitted(limiter, key, data)
    before_end()
    metadata = {"user_api_key": KEY, "user_api_key_user_id": "u1"}
    kwargs = {
        "litellm_call_id": data["litellm_call_id"],
        "model": "m1",
        "standard_logging_object": {"metadata": metadata | {"user_api_key_hash": KEY}},
        "litellm_params": {"metadata": metadata},
    }
    await limiter.async_log_success_event(kwargs, usage(used), None, None)


def tokens(limiter: Any) -> Any:
    counter = scopes.RateLimitScope("api_key", KEY).counter("tokens")
    return asyncio.run(limiter.rate_limits.get(counter))


@pytest.mark.parametrize("used", [30, 100, 170])
def test_a_reservation_is_settled_with_what_was_used(used: int) -> None:
    limiter, key = make(), auth(tpm_limit=1000)
    before: list[Any] = []

    async def both() -> None:
        for _ in range(2):
            await asyncio.create_task(call(limiter, key, used, lambda: before.append(None)))

    asyncio.run(both())
    assert len(before) == 2 and tokens(limiter) == 2 * used


def test_what_comes_back_late_is_not_taken_from_the_next_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LITELLM_RATE_LIMIT_WINDOW_SIZE", "1")
    limiter, key = make(), auth(tpm_limit=1000)
    window = scopes.RateLimitScope("api_key", KEY).window

    def roll_over() -> None:
        shared = limiter.shared_memory._shared()
        assert shared is not None
        scope = f"{{api_key:{KEY}}}"
        wait_until("the window is over", lambda: shared.windows.opened(scope, 1) is None)
        assert shared.windows.take(scope, "tokens", 1, 500, 1000).allowed  # another request's

    async def one() -> Any:
        await call(limiter, key, 30, roll_over)
        counter = scopes.RateLimitScope("api_key", KEY).counter("tokens")
        return await limiter.rate_limits.get(window), await limiter.rate_limits.get(counter)

    start, count = asyncio.run(one())
    assert start is not None and count == 500


# The scripts, one by one --------------------------------------------------------------------------


def store() -> Any:
    return make().rate_limits


def counter(value: str = "k", kind: str = "requests") -> Any:
    return scopes.RateLimitScope("api_key", value).counter(kind)


def atomic(limit: int, increment: int, *, size: int = 60, value: str = "k") -> Any:
    return scopes.AtomicCounter(counter(value, "tokens"), limit, increment, size, size)


def test_all_counters_or_none() -> None:
    async def body() -> None:
        rates = store()
        reply = await rates.check_and_increment(
            [atomic(10, 4), atomic(9, 4, value="l")], batch=NONE
        )
        assert [count for count, _ in reply.counters] == [4, 4]
        reply = await rates.check_and_increment(
            [atomic(10, 6), atomic(9, 6, value="l")], batch=NONE
        )
        assert (reply.index, reply.current, reply.limit) == (1, 4, 9)
        assert [await rates.get(counter(v, "tokens")) for v in "kl"] == [4, 4]

    asyncio.run(body())


NONE = Batch.NONE


def test_a_guarded_increment_counts_in_its_own_window_only() -> None:
    async def body() -> None:
        rates = store()
        reply = await rates.check_and_increment([atomic(10, 4)], batch=NONE)
        start = str(reply.counters[0][1])
        assert abs(int(start) - time.time()) < 5
        tokens = counter(kind="tokens")
        assert await rates.read_counters([tokens], batch=NONE) == (start, "4")
        found = await rates.guarded_increment(tokens, start, -3, 0, batch=NONE)
        assert (found.applied, found.count) == (True, 1)
        found = await rates.guarded_increment(tokens, str(int(start) - 60), -1, 0, batch=NONE)
        assert (found.applied, found.count) == (False, 1)
        found = await rates.guarded_increment(tokens, start, 2.6, 60, batch=NONE)
        assert (found.applied, found.count) == (True, 4)
        assert await rates.read_counters([counter("other")], batch=NONE) == (None, None)

    asyncio.run(body())


def test_windows_of_a_day_beside_those_of_a_minute() -> None:
    async def body() -> None:
        rates = store()
        day = await rates.check_and_increment([atomic(10, 4, size=86400, value="d")], batch=NONE)
        start = str(day.counters[0][1])
        other = store()  # a worker that has not met windows of a day
        found = await other.guarded_increment(counter("d", "tokens"), start, -1, 86400, batch=NONE)
        assert (found.applied, found.count) == (True, 3)
        assert await rates.get(counter("d").scope.window) == start

    asyncio.run(body())


def test_increments_without_a_check_and_what_they_answer() -> None:
    async def body() -> None:
        rates = store()
        up = scopes.CounterIncrement(counter(kind="tokens"), 5, 60)
        down = scopes.CounterIncrement(counter(kind="tokens"), -2, 60)
        assert await rates.token_increment([up], batch=NONE) == (0.0,)  # no window: counts nothing
        await rates.sliding_window([counter()], 0, 60, batch=NONE)
        assert await rates.token_increment([up, down], batch=NONE) == (5.0, 3.0)
        assert await rates.increment(up) == 8.0
        await rates.increment_many([down, down])
        await rates.increment_many_post_call([up])
        assert await rates.get(counter(kind="tokens")) == 9
        assert await rates.get(counter()) == 1

    asyncio.run(body())


def test_slots_by_the_store() -> None:
    async def body() -> None:
        rates, scope = store(), scopes.RateLimitScope("api_key", "k")
        got = await rates.parallel_acquire([(scope, 1)], 3600, "one", batch=NONE)
        assert got.in_flight == [1]
        got = await rates.parallel_acquire([(scope, 1)], 3600, "two", batch=NONE)
        assert (got.index, got.in_flight, got.limit) == (0, 1, 1)
        assert await rates.parallel_count([scope], 3600, batch=NONE) == (1,)
        assert await rates.get(scope.gauge) == 1
        assert await rates.parallel_release([scope], "two", batch=NONE) == (1,)
        assert await rates.parallel_release([scope], "one", batch=NONE) == (0,)

    asyncio.run(body())


def test_a_script_that_is_not_awaited_counts_nothing() -> None:
    async def body() -> None:
        rates = store()
        rates.sliding_window([counter()], 0, 60, batch=NONE)
        assert await rates.get(counter()) is None

    asyncio.run(body())


def test_the_scripts_run_within_the_batches_of_a_request() -> None:
    """The proxy opens such a scope for each request; LiteLLM takes other ways then."""
    batch = importlib.import_module("litellm.caching.redis_batch")

    async def body() -> int:
        limiter, found = make(), 0
        for _ in range(20):
            with batch.request_redis_batch_scope():
                key = auth(rpm_limit=12, tpm_limit=1000, team_id="t", team_tpm_limit=700)
                found += await asyncio.create_task(admitted(limiter, key, request(max_tokens=92)))
        team = scopes.RateLimitScope("team", "t").counter("tokens")
        assert await limiter.rate_limits.get(team) == 7 * 93
        assert await limiter.rate_limits.get(counter(KEY, "tokens")) == 7 * 93  # the rest came back
        return found

    assert asyncio.run(body()) == 7


# Where there is no segment ------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Segment:
        raise exceptions.SegmentSpaceError("there is no room")

    monkeypatch.setattr(Segment, "default", none)


def test_installing_and_making_it_open_no_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that preloads forks after it."""
    broken(monkeypatch)
    handle = make().shared_memory
    assert handle._why is None
    assert isinstance(handle.missing(), exceptions.SegmentSpaceError)  # the first use opens it


def test_without_a_segment_each_worker_counts_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken(monkeypatch)
    limiter, limits = make(), {"rpm_limit": 10, "max_parallel_requests": 40, "tpm_limit": 100_000}
    with caplog.at_level(logging.ERROR, "fast_litellm_shm"):
        assert asyncio.run(in_turn(limiter, auth(**limits), 25)) == 10
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "there is no room; this worker counts alone" in caplog.text
    key = auth(max_parallel_requests=2)
    assert asyncio.run(_together(limiter, key, 5, lambda: None)) == 0  # ten are in flight
    assert not limiter.rate_limits.has_redis


def test_without_a_segment_and_fail_open_requests_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    litellm.fast_litellm_shm = {"mode": "native", "fail_open": False}
    broken(monkeypatch)
    limiter = make()
    with pytest.raises(HTTPException) as refused:
        asyncio.run(admitted(limiter, auth(rpm_limit=10)))
    assert refused.value.status_code == 503
    assert "fail_open is false" in refused.value.detail["error"]


def test_a_segment_that_comes_later_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter, key = make(), auth(max_parallel_requests=2)

    async def body() -> None:
        started, end = asyncio.Semaphore(0), asyncio.Event()
        early = asyncio.create_task(_hold(limiter, key, started, end))
        await started.acquire()  # its slot is in this worker's memory
        monkeypatch.undo()
        monkeypatch.setattr(limiter.shared_memory, "_retry_at", 0.0)
        assert limiter.rate_limits.has_redis
        assert await in_turn(limiter, key, 3) == 2
        end.set()
        assert await early
        local = limiter.shared_memory._memory.get_local(scopes.RateLimitScope("api_key", KEY).gauge)
        assert not local  # given back where it was taken

    broken(monkeypatch)
    asyncio.run(body())


@pytest.mark.parametrize("fail_open", [True, False])
def test_a_full_segment(fail_open: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    litellm.fast_litellm_shm = {"fail_open": fail_open}
    full = exceptions.SegmentFullError("no room for another key")

    def refuse(*_: Any) -> Any:
        raise full

    monkeypatch.setattr(windows.Windows, "open", refuse)
    monkeypatch.setattr(slots.Slots, "acquire", refuse)
    limiter = make()
    for key in (auth(rpm_limit=4), auth(max_parallel_requests=4), auth(tpm_limit=10_000)):
        failures.forget()
        limits = key.rpm_limit or key.max_parallel_requests
        if fail_open:  # in memory, with LiteLLM's estimate of what an answer takes
            found = asyncio.run(in_turn(limiter, key, 20, max_tokens=1992))
            assert found == (limits or 5)
        else:
            with pytest.raises(HTTPException) as refused:
                asyncio.run(admitted(limiter, key))
            assert refused.value.status_code == 503
            assert "fail_open is false" in refused.value.detail["error"]


def test_each_request_that_could_not_be_checked_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter, key = make(), auth(rpm_limit=2)
    Segment.default()
    monkeypatch.setattr(limiter.shared_memory, "_retry_at", time.monotonic() + PATIENCE)
    limiter.shared_memory._why = exceptions.SegmentError("it is not there")
    assert asyncio.run(in_turn(limiter, key, 5)) == 2
    assert health_check()["litellm"] == {"could_not_judge": 5}


# Where the installed litellm has no place for it --------------------------------------------------


def sentence(hooks: dict[str, Any] | None = None) -> str:
    before = TABLE if hooks is None else hooks
    given = dict(before)
    found = segment_limiter.install(given)
    assert given == before, "the table was changed"
    assert found is not None
    return found


def test_it_can_be_installed_twice() -> None:
    hooks = dict(TABLE)
    assert segment_limiter.install(hooks) is None
    once = hooks[HOOK]
    assert segment_limiter.install(hooks) is None and hooks[HOOK] is once


def test_it_says_that_it_counts_on_one_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", "redis://127.0.0.1:1")
    said = r"built-in limiter \(mode native\) counts on this host alone"
    with pytest.warns(RuntimeWarning, match=said):
        assert segment_limiter.install(dict(TABLE)) is None


def test_another_limiter_of_the_proxy_is_left_alone() -> None:
    class Older:
        pass

    assert "LEGACY_MULTI_INSTANCE_RATE_LIMITING" in sentence({HOOK: Older})
    assert "is None" in sentence({})


def test_a_limiter_that_takes_no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def __init__(self, internal_usage_cache: Any) -> None: ...

    monkeypatch.setattr(v3, "PROXY_MaxParallelRequestsHandler_v3", Closed)
    assert "takes no rate_limit_store and no fail_closed_resolver" in sentence()


def test_a_litellm_without_the_limiter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_limiter, "LIMITER", "litellm.proxy.hooks.no_such_limiter")
    assert "no limiter with a store of its own" in sentence()


def test_a_store_that_asks_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("litellm.redis.stores.rate_limits.handle")

    def method(self: Any, counters: Any, send: Any) -> None: ...

    class More(module.RateLimitsHandle):  # type: ignore[misc, name-defined]
        decay = method

    monkeypatch.setattr(module, "RateLimitsHandle", More)
    assert "needs decay()" in sentence()

    class Other(module.RateLimitsHandle):  # type: ignore[misc, name-defined]
        sliding_window = method

    monkeypatch.setattr(module, "RateLimitsHandle", Other)
    assert "sliding_window() takes other arguments: self, counters, send" in sentence()


def test_answers_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(scopes, "GuardedReply")
    assert "has no GuardedReply" in sentence()
