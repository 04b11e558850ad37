"""What a call holds, and that it gives it back exactly once; the hooks in the orders that LiteLLM
calls them in (measured with its proxy), without the proxy."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import importlib
import logging
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("litellm")

import litellm
from support.children import run
from support.litellm_auth import auth
from support.workers import meet

from fast_litellm_shm import Segment, exceptions, get_performance_stats, health_check
from fast_litellm_shm._shared import performance as monitoring
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm.integrations.litellm import (
    admission,
    attempts,
    failures,
    settings,
    usage,
)
from fast_litellm_shm.integrations.litellm.builtin_limiter import replacement
from fast_litellm_shm.integrations.litellm.limiter import SharedLimiter, found_for
from fast_litellm_shm.integrations.litellm.subjects import Limits, Subject, subjects
from fast_litellm_shm.limiters.quota import Quota
from fast_litellm_shm.metrics.health import PLUGIN

# the module: the package has an object of the same name
limiting: Any = importlib.import_module("fast_litellm_shm.integrations.litellm.limiter")
PROCESSES = 4
USAGE = {"usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    admission.forget()
    attempts._unchecked.clear()
    usage._mean_outputs.clear()
    failures.forget()
    yield
    admission.forget()
    attempts._unchecked.clear()


@pytest.fixture
def limiter() -> SharedLimiter:
    return SharedLimiter()


def set_up(monkeypatch: pytest.MonkeyPatch, **chosen: Any) -> None:
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, chosen, raising=False)


def left(**limits: int) -> dict[str, int]:
    """What the key has left of limits."""
    return admission.quota_of(Limits(**limits)).remaining("api_key:k")


def data(id: str = "c", **more: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "x" * 12}
    return {"litellm_call_id": id, "model": "m", "messages": [message], "max_tokens": 40, **more}


async def ask(limiter: SharedLimiter, id: str = "c", /, **limits: int) -> bool:
    """Whether a request of the key is admitted."""
    given = {"rpm": "rpm_limit", "tpm": "tpm_limit", "max_parallel": "max_parallel_requests"}
    user = auth(**{given[name]: n for name, n in limits.items()})
    try:
        await limiter.async_pre_call_hook(user, None, data(id), "acompletion")
    except Exception as error:
        assert getattr(error, "status_code", None) == 429, error
        return False
    return True


LIMITS = {"rpm": 10, "tpm": 1000, "max_parallel": 2}


def logged(id: str = "c", /, **more: Any) -> dict[str, Any]:
    """kwargs of a log event."""
    return {
        "litellm_call_id": id,
        "model": "m",
        "litellm_params": {"model_info": {"id": "d"}},
        **more,
    }


# requests ------------------------------------------------------------------------------------


def test_answered(limiter: SharedLimiter, unfinished: Callable[[], int]) -> None:
    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        assert left(**LIMITS) == {"rpm": 9, "tpm": 950, "max_parallel": 1}
        assert await limiter.async_post_call_success_hook(data(), auth(), USAGE) is USAGE
        assert left(**LIMITS) == {"rpm": 9, "tpm": 970, "max_parallel": 2}
        await limiter.async_log_success_event(logged(**USAGE), USAGE, None, None)
        assert left(**LIMITS) == {"rpm": 9, "tpm": 970, "max_parallel": 2}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_streamed(limiter: SharedLimiter, unfinished: Callable[[], int]) -> None:
    async def chunks() -> Any:
        yield 1
        yield 2

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        stream = limiter.async_post_call_streaming_iterator_hook(auth(), chunks(), data())
        assert left(**LIMITS)["max_parallel"] == 1
        assert [chunk async for chunk in stream] == [1, 2]
        assert left(**LIMITS)["max_parallel"] == 2
        payload: dict[str, Any] = {"standard_logging_object": USAGE["usage"], "stream": True}
        await limiter.async_log_success_event(logged(**payload), None, None, None)
        assert left(**LIMITS) == {"rpm": 9, "tpm": 970, "max_parallel": 2}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_the_client_leaves_a_stream(limiter: SharedLimiter) -> None:
    async def chunks() -> Any:
        yield 1
        yield 2

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        stream = limiter.async_post_call_streaming_iterator_hook(auth(), chunks(), data())
        assert await anext(stream) == 1
        await stream.aclose()  # type: ignore[attr-defined]
        assert left(**LIMITS)["max_parallel"] == 2

    asyncio.run(scenario())


def test_tried_again(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        await limiter.async_log_failure_event(logged(), None, None, None)
        assert left(**LIMITS)["max_parallel"] == 1  # the second attempt is about to be made
        await limiter.async_post_call_success_hook(data(), auth(), USAGE)
        assert left(**LIMITS) == {"rpm": 9, "tpm": 970, "max_parallel": 2}

    asyncio.run(scenario())


def test_failed(limiter: SharedLimiter, unfinished: Callable[[], int]) -> None:
    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        await limiter.async_log_failure_event(logged(), None, None, None)
        await limiter.async_post_call_failure_hook(data(), ValueError(), auth())
        # the request counts; it has used no tokens
        assert left(**LIMITS) == {"rpm": 9, "tpm": 1000, "max_parallel": 2}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_a_stream_that_is_cut(limiter: SharedLimiter, unfinished: Callable[[], int]) -> None:
    """Its partial usage, which LiteLLM tells in log_failure, counts."""

    async def chunks() -> Any:
        yield 1
        raise ConnectionError

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        stream = limiter.async_post_call_streaming_iterator_hook(auth(), chunks(), data())
        with pytest.raises(ConnectionError):
            assert [chunk async for chunk in stream]
        part: dict[str, Any] = {"standard_logging_object": {"total_tokens": 12}}
        await limiter.async_log_failure_event(logged(**part), None, None, None)
        await limiter.async_post_call_failure_hook(data(), ValueError(), auth())
        assert left(**LIMITS) == {"rpm": 9, "tpm": 988, "max_parallel": 2}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_whatever_ends_without_a_hook(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        task = asyncio.create_task(ask(limiter, **LIMITS))
        assert await task
        await asyncio.sleep(0)  # its callbacks run
        assert left(**LIMITS)["max_parallel"] == 2

    asyncio.run(scenario())


def test_a_tool_call_within_a_request_counts_with_it(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        assert await ask(limiter, max_parallel=1)
        user = auth(max_parallel_requests=1)
        await limiter.async_pre_call_hook(user, None, data(), "call_mcp_tool")
        assert left(max_parallel=1) == {"max_parallel": 0}
        await limiter.async_post_call_success_hook(data(), user, USAGE)
        assert left(max_parallel=1) == {"max_parallel": 1}

    asyncio.run(scenario())


def test_clients_that_choose_the_same_call_id(
    limiter: SharedLimiter, unfinished: Callable[[], int]
) -> None:
    async def request(go_on: asyncio.Event) -> bool:
        if not await ask(limiter, "mine", max_parallel=2, tpm=1000):
            return False
        await go_on.wait()
        await limiter.async_post_call_success_hook(data("mine"), auth(), USAGE)
        return True

    async def scenario() -> None:
        for round in (1, 2):
            go_on = asyncio.Event()
            tasks = [asyncio.create_task(request(go_on)) for _ in range(5)]
            await asyncio.sleep(0)
            go_on.set()
            assert sorted(await asyncio.gather(*tasks)) == [False] * 3 + [True] * 2
            assert left(max_parallel=2, tpm=1000) == {"tpm": 1000 - 60 * round, "max_parallel": 2}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_a_hook_of_a_request_that_was_not_admitted(limiter: SharedLimiter) -> None:
    """One that fails its authentication, say, with the id of a call that runs in its body."""

    async def stranger() -> None:
        body = {"litellm_call_id": "mine", "model": "m"}
        await limiter.async_post_call_failure_hook(body, ValueError(), auth())
        await limiter.async_log_failure_event(logged("mine"), None, None, None)
        await limiter.async_log_success_event(logged("mine"), USAGE, None, None)
        await limiter.async_post_call_success_hook(body, auth(), USAGE)

    async def scenario() -> None:
        outside = contextvars.copy_context()
        assert await ask(limiter, "mine", **LIMITS)
        await outside.run(asyncio.create_task, stranger())
        assert left(**LIMITS) == {"rpm": 9, "tpm": 950, "max_parallel": 1}

    asyncio.run(scenario())


def test_a_request_that_is_checked_again(
    limiter: SharedLimiter, unfinished: Callable[[], int]
) -> None:
    """A later callback has denied it, and LiteLLM asks for a fallback of its model."""

    async def scenario() -> None:
        user = auth(rpm_limit=10, tpm_limit=1000, max_parallel_requests=1)
        for id in ("c", "another"):
            await limiter.async_pre_call_hook(user, None, data(id), "acompletion")
        assert left(rpm=10, tpm=1000, max_parallel=1) == {"rpm": 9, "tpm": 950, "max_parallel": 0}
        await limiter.async_post_call_success_hook(data("another"), auth(), USAGE)
        assert left(rpm=10, tpm=1000, max_parallel=1) == {"rpm": 9, "tpm": 970, "max_parallel": 1}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_a_call_within_a_call(limiter: SharedLimiter) -> None:
    """An embedding that LiteLLM makes to serve a chat is a request of its own."""

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        user = auth(rpm_limit=10, tpm_limit=1000, max_parallel_requests=2)
        body = {"model": "e", "input": "x" * 40}
        await limiter.async_pre_call_hook(user, None, body, "aembedding")
        assert left(**LIMITS) == {"rpm": 8, "tpm": 940, "max_parallel": 0}
        await limiter.async_post_call_success_hook(data(), user, USAGE)
        assert left(**LIMITS) == {"rpm": 8, "tpm": 960, "max_parallel": 1}

    asyncio.run(scenario())
    assert left(**LIMITS)["max_parallel"] == 2


def test_a_request_that_gets_several_answers(limiter: SharedLimiter) -> None:
    """A list of models: the first answer is logged while the others are on their way."""

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        await limiter.async_log_success_event(logged(**USAGE), USAGE, None, None)
        assert left(**LIMITS)["max_parallel"] == 1
        await limiter.async_post_call_success_hook(data(), auth(), [USAGE, USAGE, None, USAGE])
        assert left(**LIMITS) == {"rpm": 9, "tpm": 910, "max_parallel": 2}
        await limiter.async_log_success_event(logged(**USAGE), USAGE, None, None)
        assert left(**LIMITS)["tpm"] == 910

    asyncio.run(scenario())


def test_a_list_of_models_counts_for_each(
    limiter: SharedLimiter, unfinished: Callable[[], int]
) -> None:
    async def scenario() -> None:
        user = auth(rpm_limit=10, tpm_limit=1000, max_parallel_requests=3)
        limits = {"rpm": 10, "tpm": 1000, "max_parallel": 3}
        body = data(model="m,m", max_tokens=40)
        await limiter.async_pre_call_hook(user, None, body, "acompletion")
        assert left(**limits) == {"rpm": 8, "tpm": 900, "max_parallel": 1}
        await limiter.async_post_call_success_hook(data(), auth(), [USAGE, USAGE])
        assert left(**limits) == {"rpm": 8, "tpm": 940, "max_parallel": 3}
        assert unfinished() == 0
        for models in ("m,m,m,m", ",".join("m" * 9), "m," * 10**5):  # too many, of one of them
            with pytest.raises(Exception, match="Rate limit exceeded"):
                body = data("2", model=models)
                await limiter.async_pre_call_hook(user, None, body, "acompletion")
            assert left(**limits) == {"rpm": 8, "tpm": 940, "max_parallel": 3}

    asyncio.run(scenario())


def test_who_is_counted_for_some_calls_of_a_list_is_charged_that_part(
    limiter: SharedLimiter,
) -> None:
    metadata = {"model_tpm_limit": {"m": 500}}

    async def scenario() -> None:
        user = auth(tpm_limit=1000, metadata=metadata)
        body = data(model="m,n,n", max_tokens=40)
        await limiter.async_pre_call_hook(user, None, body, "acompletion")
        await limiter.async_post_call_success_hook(data(), auth(), [USAGE] * 3)
        of_model = admission.quota_of(Limits(tpm=500)).remaining("model_per_key:k:m")
        assert (left(tpm=1000)["tpm"], of_model["tpm"]) == (910, 470)

    asyncio.run(scenario())


def test_the_fastest_answer_tells_for_all(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        body = data(model="m,m", fastest_response=True)
        await limiter.async_pre_call_hook(auth(tpm_limit=1000), None, body, "acompletion")
        await limiter.async_post_call_success_hook(data(), auth(), USAGE)
        assert left(tpm=1000)["tpm"] == 940

    asyncio.run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_do_not_count(limiter: SharedLimiter, stream: bool) -> None:
    """LiteLLM's payload for logs has them in its sums."""
    details = {"prompt_tokens_details": {"cached_tokens": 8}}
    answer = {"usage": {**USAGE["usage"], **details}}

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        if not stream:
            await limiter.async_post_call_success_hook(data(), auth(), answer)
        more = {"standard_logging_object": USAGE["usage"], "stream": stream}
        await limiter.async_log_success_event(logged(**more), answer, None, None)
        assert left(**LIMITS)["tpm"] == 978

    asyncio.run(scenario())


@pytest.mark.parametrize(("status", "used"), [(None, 0), ("completed", 0), ("queued", 50)])
def test_an_answer_that_tells_no_tokens(
    limiter: SharedLimiter, unfinished: Callable[[], int], status: Any, used: int
) -> None:
    """A picture has used none; one that is made in the background is not there yet."""

    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        answer = SimpleNamespace(status=status, usage=None)
        await limiter.async_post_call_success_hook(data(), auth(), answer)
        payload: dict[str, Any] = {"standard_logging_object": {"total_tokens": 0}}
        await limiter.async_log_success_event(logged(**payload), answer, None, None)
        assert left(**LIMITS) == {"rpm": 9, "tpm": 1000 - used, "max_parallel": 2}
        assert unfinished() == 0

    asyncio.run(scenario())


def test_a_pass_through(limiter: SharedLimiter) -> None:
    """Its data is the client's body: the id of its logs is that of its logging object."""

    async def scenario() -> None:
        body = {**data("the client's"), "litellm_logging_obj": SimpleNamespace(litellm_call_id="c")}
        user = auth(rpm_limit=10, tpm_limit=1000, max_parallel_requests=2)
        await limiter.async_pre_call_hook(user, None, body, "pass_through_endpoint")
        assert left(**LIMITS)["tpm"] == 950
        await limiter.async_log_success_event(logged(**USAGE), USAGE, None, None)
        assert left(**LIMITS)["tpm"] == 970
        await limiter.async_post_call_success_hook(body, auth(), USAGE)
        assert left(**LIMITS) == {"rpm": 9, "tpm": 970, "max_parallel": 2}

    asyncio.run(scenario())


@pytest.mark.parametrize("model", [["m"], {"m": 1}, 7, None])
def test_a_model_that_is_no_text_passes_no_limit(limiter: SharedLimiter, model: Any) -> None:
    async def scenario() -> None:
        body = {"litellm_call_id": "c", "model": model, "messages": []}
        await limiter.async_pre_call_hook(auth(rpm_limit=5, tpm_limit=100), None, body, "x")
        assert left(rpm=5, tpm=100)["rpm"] == 4

    asyncio.run(scenario())


def test_a_body_is_not_kept(limiter: SharedLimiter) -> None:
    class Body(dict[str, Any]):
        pass

    async def scenario() -> weakref.ref[Body]:
        body = Body(data())
        await limiter.async_pre_call_hook(auth(tpm_limit=1000), None, body, "acompletion")
        return weakref.ref(body)

    async def kept() -> Any:
        found = await scenario()
        gc.collect()
        return found()

    assert asyncio.run(kept()) is None


def test_what_could_not_be_checked_is_left_to_litellms_limiter(
    limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Theirs:
        async def async_pre_call_hook(self) -> None: ...

        async def _build_request_rate_limit_descriptors(self, *_: Any) -> list[Any]:
            limited = {"requests_per_unit": 1, "tokens_per_unit": None}
            return [{"key": "api_key", "value": "k", "rate_limit": limited}]

    theirs = replacement._reduced(Theirs, found_for)()

    async def keeps(call_type: str = "acompletion") -> bool:
        user = auth(rpm_limit=1)
        return bool(await theirs._build_request_rate_limit_descriptors(user, data(), call_type))

    async def scenario() -> None:
        assert await ask(limiter, rpm=1)
        assert not await keeps()
        assert await keeps("_aresponses_websocket")  # a turn of it, which passes no hook of ours
        with monkeypatch.context() as broken:
            broken.setattr(admission, "admit_here", _broken)
            assert await ask(limiter, rpm=1)
            assert await keeps()
        assert not await ask(limiter, rpm=1)
        assert not await keeps()

    asyncio.run(scenario())


def test_litellms_limiter_leaves_what_our_hook_has_found(
    limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not looked for again, for the same key and model; of another it is."""
    user, other = auth(rpm_limit=1), auth(api_key="other", rpm_limit=2)

    async def scenario() -> None:
        await limiter.async_pre_call_hook(user, None, data(), "acompletion")
        with monkeypatch.context() as looked:
            looked.setattr(limiting, "subjects_of", _broken)
            (found,) = found_for(user, data())
            assert found == Subject("api_key", "k", Limits(1))
            for auth_, model in ((other, "m"), (user, "m2"), (user, None), (user, ["m"])):
                with pytest.raises(exceptions.SegmentFullError):
                    found_for(auth_, data(model=model))
        assert [s.value for s in found_for(other, data())] == ["other"]
        assert not await ask(limiter, rpm=1)  # a denied one has left nothing
        assert [s.value for s in found_for(user, data())] == ["k"]

    asyncio.run(scenario())
    assert [s.value for s in found_for(other, data())] == ["other"]  # no request here


@pytest.mark.parametrize(("seconds", "warned"), [(60, False), (30, True)])
def test_a_window_of_litellms_that_is_not_ours(
    seconds: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    class Theirs:
        def __init__(self, internal_usage_cache: Any) -> None:
            self.window_size = seconds  # LITELLM_RATE_LIMIT_WINDOW_SIZE

    replacement._maker(Theirs, found_for)(None)
    assert ("LITELLM_RATE_LIMIT_WINDOW_SIZE is 30" in caplog.text) == warned


def test_a_prompt_that_cannot_be_read_passes_no_limit(limiter: SharedLimiter) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]

    async def scenario() -> None:
        user = auth(tpm_limit=1000)
        bad = {**data(), "messages": [{"role": "user", "content": deep}]}
        await limiter.async_pre_call_hook(user, None, bad, "acompletion")
        assert left(tpm=1000) == {"tpm": 0}

    try:
        asyncio.run(scenario())
    finally:
        while deep:  # or its destruction would recurse
            deep = deep.pop()


def test_a_denial_books_nothing(limiter: SharedLimiter, unfinished: Callable[[], int]) -> None:
    async def scenario() -> None:
        first, second = (auth(rpm_limit=5, user_id="u", user_rpm_limit=1) for _ in range(2))
        await limiter.async_pre_call_hook(first, None, data("1"), "acompletion")
        with pytest.raises(Exception, match="Rate limit exceeded for user: u"):
            await limiter.async_pre_call_hook(second, None, data("2"), "acompletion")
        assert left(rpm=5) == {"rpm": 4}
        assert unfinished() == 1

    asyncio.run(scenario())


def test_a_limit_of_zero(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        assert not await ask(limiter, rpm=0)
        assert not await ask(limiter, "2", max_parallel=0)

    asyncio.run(scenario())


def test_headers(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        user = auth(rpm_limit=10, user_id="u", user_rpm_limit=5, max_parallel_requests=3)
        await limiter.async_pre_call_hook(user, None, data(), "acompletion")
        await limiter.async_post_call_success_hook(data(), user, USAGE)
        found = await limiter.async_post_call_response_headers_hook(data(), user, USAGE)
        assert found == {
            "x-ratelimit-api_key-remaining-requests": "9",
            "x-ratelimit-api_key-limit-requests": "10",
            "x-ratelimit-user-remaining-requests": "4",
            "x-ratelimit-user-limit-requests": "5",
            "x-ratelimit-remaining-requests": "4",
            "x-ratelimit-limit-requests": "5",
        }
        other = data("another")
        assert await limiter.async_post_call_response_headers_hook(other, user, None) is None

    asyncio.run(scenario())


def test_what_a_denial_says(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        first, second = auth(rpm_limit=1), auth(rpm_limit=1)
        await limiter.async_pre_call_hook(first, None, data("1"), "acompletion")
        with pytest.raises(Exception, match="Limit type: requests. Current limit: 1") as raised:
            await limiter.async_pre_call_hook(second, None, data("2"), "acompletion")
        headers = raised.value.headers  # type: ignore[attr-defined]
        assert 50 <= int(headers["retry-after"]) <= 60
        assert headers["x-ratelimit-api_key-remaining-requests"] == "0"
        assert headers["rate_limit_type"] == "requests"

    pytest.importorskip("fastapi", reason="the proxy is not installed")
    asyncio.run(scenario())


def test_a_denial_for_tokens_says_how_many_are_left(limiter: SharedLimiter) -> None:
    limits = {"rpm_limit": 100, "tpm_limit": 1000}

    async def scenario() -> None:
        await limiter.async_pre_call_hook(auth(**limits), None, data("1"), "acompletion")
        await limiter.async_post_call_success_hook(data("1"), auth(), USAGE)
        large = data("2", max_tokens=990)
        with pytest.raises(Exception, match="Limit type: tokens.*, Remaining: 970") as raised:
            await limiter.async_pre_call_hook(auth(**limits), None, large, "acompletion")
        headers = raised.value.headers  # type: ignore[attr-defined]
        assert headers["x-ratelimit-remaining-tokens"] == "970"
        assert headers["x-ratelimit-api_key-remaining-tokens"] == "970"
        assert "x-ratelimit-remaining-requests" not in headers

    pytest.importorskip("fastapi", reason="the proxy is not installed")
    asyncio.run(scenario())


def _many(name: str, each: int) -> int:
    meet(name, PROCESSES)
    limiter = SharedLimiter()

    async def all_of_them() -> int:
        return sum([await ask(limiter, str(i), rpm=10) for i in range(each)])

    return asyncio.run(all_of_them())


def test_four_processes(_own_default_segment: None) -> None:
    name = Segment.default().name
    assert sum(run(_many, [(name, 25)] * PROCESSES, "fork")) == 10


def test_sets_of_limits_do_not_run_out(limiter: SharedLimiter) -> None:
    """The segment's table has 250 places for limiters."""

    async def scenario() -> None:
        for n in range(1, 600):
            assert await ask(limiter, str(n), rpm=n, tpm=10**6 + n)
            assert left(rpm=n, tpm=10**6 + n)["rpm"] == n - 1
        assert not await ask(limiter, "again", rpm=1, tpm=10**6 + 1)

    asyncio.run(scenario())
    assert health_check()["litellm"] is None
    shown = Inspection(Segment.default())
    assert [found["limits"] for found in shown.limiters()] == [["of each key"]]
    rows = {row.key: row for row in shown.keys(match="api_key:*")}
    assert len(rows) == 599
    row = rows["api_key:k/5 rpm/1000005 tpm"]
    assert (row.remaining, row.limit) == (4, 5)
    assert rows["api_key:k/1 rpm/1000001 tpm"].denied == 1


def test_a_key_whose_name_ends_in_numbers_is_no_other(limiter: SharedLimiter) -> None:
    """An end user's id is what the client sends."""

    async def asked(user: str) -> None:
        who = auth(end_user_id=user, end_user_rpm_limit=1)
        await limiter.async_pre_call_hook(who, None, data(), "acompletion")

    async def scenario() -> None:
        for user in ("u", "u/1 rpm", "u/1 rpm/1 rpm"):
            await asked(user)
        with pytest.raises(Exception, match="end_user: u/1 rpm"):
            await asked("u/1 rpm")

    asyncio.run(scenario())


def test_a_fallback_counts_for_its_model(limiter: SharedLimiter) -> None:
    """That the request did not name."""
    user = auth(metadata={"model_rpm_limit": {"n": 1}})
    there = {"model_name": "n", "litellm_params": {"model": "x"}, "model_info": {"id": "d"}}

    async def request() -> None:
        await limiter.async_pre_call_hook(user, None, data(), "acompletion")
        for _ in range(2):  # a retry is no other request
            assert await limiter.async_pre_call_check(there) == there
        await limiter.async_post_call_success_hook(data(), auth(), USAGE)

    async def scenario() -> None:
        await asyncio.create_task(request())
        with pytest.raises(litellm.RateLimitError, match="model_per_key: k:n"):
            await asyncio.create_task(request())

    asyncio.run(scenario())


def test_tries_that_a_client_asks_for(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        body = data(num_retries=50)
        await limiter.async_pre_call_hook(auth(rpm_limit=4), None, body, "acompletion")
        assert body["num_retries"] == 3  # as many as it has left
        for tries in range(4):
            await limiter.async_pre_call_check(deployment())
            assert left(rpm=4) == {"rpm": 3 - tries}
        with pytest.raises(litellm.RateLimitError, match="api_key"):
            await limiter.async_pre_call_check(deployment())

    asyncio.run(scenario())


# attempts at deployments ---------------------------------------------------------------------


def deployment(**params: Any) -> dict[str, Any]:
    return {
        "model_name": "m",
        "litellm_params": {"model": "openai/m", **params},
        "model_info": {"id": "d"},
    }


def test_attempts(limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, deployment_limits=True)

    async def attempt() -> None:
        await limiter.async_pre_call_check(deployment(rpm=2, max_parallel_requests=1))
        await limiter.async_log_success_event(logged(), USAGE, None, None)

    async def scenario() -> None:
        for _ in range(2):
            await asyncio.create_task(attempt())
        with pytest.raises(litellm.RateLimitError, match="deployment: d") as raised:
            await asyncio.create_task(attempt())
        assert raised.value.num_retries == 0
        quota = admission.quota_of(Limits(2, None, 1))
        assert quota.remaining("deployment:d") == {"rpm": 0, "max_parallel": 1}

    asyncio.run(scenario())


def test_tokens_of_a_deployment(limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt of a request is charged the request's estimate; any other, one token until
    they are known."""
    set_up(monkeypatch, deployment_limits=True)
    there = deployment(tpm=1000)

    def tokens_left() -> int:
        return admission.quota_of(Limits(tpm=1000)).remaining("deployment:d")["tpm"]

    async def of_a_request() -> None:
        assert await ask(limiter, tpm=10**6)
        await limiter.async_pre_call_check(there)
        assert tokens_left() == 950
        await limiter.async_log_success_event(logged(), USAGE, None, None)
        assert tokens_left() == 970

    async def alone() -> None:
        await limiter.async_pre_call_check(there)
        assert tokens_left() == 969
        await limiter.async_log_success_event(logged("other"), USAGE, None, None)
        assert tokens_left() == 940

    async def both() -> None:
        await asyncio.create_task(of_a_request())
        await asyncio.create_task(alone())

    asyncio.run(both())


def test_attempts_at_once(limiter: SharedLimiter) -> None:
    narrow = deployment(max_parallel_requests=2)

    async def attempt(hold: asyncio.Event) -> bool:
        try:
            await limiter.async_pre_call_check(narrow)
        except litellm.RateLimitError as error:
            assert error.num_retries is None  # another deployment may have a free slot
            return False
        await hold.wait()
        await limiter.async_log_success_event(logged(), USAGE, None, None)
        return True

    async def scenario() -> None:
        for _ in range(2):
            hold = asyncio.Event()
            tasks = [asyncio.create_task(attempt(hold)) for _ in range(5)]
            await asyncio.sleep(0)  # each has come to its end, or holds
            hold.set()
            assert sorted(await asyncio.gather(*tasks)) == [False] * 3 + [True] * 2

    asyncio.run(scenario())


def test_an_attempt_without_an_event(limiter: SharedLimiter) -> None:
    """It is cancelled, or its stream is not read to its end: the slot comes back with what LiteLLM
    kept of it, though contexts that were copied in it live on."""
    narrow = deployment(max_parallel_requests=2)
    quota = admission.quota_of(Limits(None, None, 2))

    async def scenario() -> None:
        contexts = []
        for _ in range(4):
            await limiter.async_pre_call_check(narrow)
            contexts.append(contextvars.copy_context())
            kwargs = logged()
            limiter.log_pre_api_call("m", [], kwargs)
            assert quota.in_flight("deployment:d") == 1
            del kwargs
            gc.collect()
            assert quota.in_flight("deployment:d") == 0

    asyncio.run(scenario())


def test_rpm_of_a_deployment_is_a_weight_unless_it_is_to_be_kept(
    limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        for _ in range(3):
            await limiter.async_pre_call_check(deployment(rpm=1))
        set_up(monkeypatch, deployment_limits=True)
        await limiter.async_pre_call_check(deployment(rpm=1))
        with pytest.raises(litellm.RateLimitError):
            await limiter.async_pre_call_check(deployment(rpm=1))

    asyncio.run(scenario())


# failing safe --------------------------------------------------------------------------------


def _broken(*_: Any, **__: Any) -> Any:
    raise exceptions.SegmentFullError("the segment is full")


def test_it_fails_open(
    limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(admission, "admit_here", _broken)

    async def scenario() -> None:
        for i in range(5):
            assert await ask(limiter, str(i), rpm=1)
        monkeypatch.setattr(attempts, "of_deployment", _broken)
        assert await limiter.async_pre_call_check(deployment()) == deployment()

    with caplog.at_level(logging.ERROR):
        asyncio.run(scenario())
    (said,) = caplog.messages  # once a minute
    assert "the segment is full; it passes (fail_open)" in said
    assert health_check()["litellm"] == {"could_not_judge": 6}


@pytest.mark.filterwarnings("ignore:.*cannot open segment:RuntimeWarning")
def test_what_no_segment_could_count(
    limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker counts it, and then, in the segment, the host."""
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", str(2**31))  # there is no room for it

    async def asked(**limits: int) -> list[bool]:
        return [await ask(limiter, str(i), **limits) for i in range(3)]

    assert asyncio.run(asked(rpm=1)) == [True] * 3
    assert health_check()["litellm"] == {"could_not_judge": 3}
    monkeypatch.delenv("FAST_LITELLM_SHM_CAPACITY")
    assert asyncio.run(asked()) == [True] * 3  # they have no limits: nothing is asked of a segment
    assert monitoring.kept(PLUGIN) == 3
    assert asyncio.run(asked(rpm=1)) == [True, False, False]
    assert monitoring.kept(PLUGIN) == 0
    assert get_performance_stats(PLUGIN)[PLUGIN]["error_count"] == 3
    assert health_check()["litellm"] == {"could_not_judge": 3}


def test_what_a_worker_keeps_is_shown_with_the_segments_count() -> None:
    Segment.default()
    failures.report("a", ValueError("b"), "c")
    monitoring._kept[PLUGIN, failures.OPERATION] = 4
    assert health_check()["litellm"] == {"could_not_judge": 5}
    assert get_performance_stats(PLUGIN)[PLUGIN]["error_count"] == 5


def test_a_fork_leaves_what_is_kept_to_its_parent() -> None:
    monitoring._kept[PLUGIN, failures.OPERATION] = 4
    assert run(monitoring.kept, [(PLUGIN,)], "fork") == [0]
    assert monitoring.kept(PLUGIN) == 4


def test_it_fails_closed(limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, fail_open=False)
    monkeypatch.setattr(admission, "admit_here", _broken)
    pytest.importorskip("fastapi", reason="the proxy is not installed")

    async def scenario() -> None:
        with pytest.raises(Exception, match="could not be checked") as raised:
            await limiter.async_pre_call_hook(auth(rpm_limit=1), None, data(), "acompletion")
        assert raised.value.status_code == 503  # type: ignore[attr-defined]
        monkeypatch.setattr(attempts, "of_deployment", _broken)
        with pytest.raises(litellm.ServiceUnavailableError):
            await limiter.async_pre_call_check(deployment())

    asyncio.run(scenario())


def test_what_gives_back_never_fails_the_request(
    limiter: SharedLimiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        assert await ask(limiter, **LIMITS)
        monkeypatch.setattr(admission.Admissions, "settle", _broken)
        assert await limiter.async_post_call_success_hook(data(), auth(), USAGE) is USAGE
        assert left(**LIMITS)["max_parallel"] == 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mode": "other"}, "mode must be one of hooks, native, not 'other'; hooks applies"),
        ({"fail_open": "yes"}, "fail_open must be true or false, not 'yes'; True applies"),
        ({"fial_open": True}, "there is no 'fial_open', it is ignored; known are mode, fail_open"),
        ("native", "must be a mapping, not 'native'; the defaults apply"),
    ],
)
def test_settings_that_are_wrong(monkeypatch: pytest.MonkeyPatch, given: Any, said: str) -> None:
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, given, raising=False)
    with pytest.warns(RuntimeWarning, match=said):
        assert settings.current() == settings.Settings()
    assert settings.current() == settings.Settings()  # warned once


def test_a_fork_leaves_the_calls_to_its_parent(limiter: SharedLimiter) -> None:
    async def scenario() -> None:
        assert await ask(limiter, max_parallel=1)
        assert run(_end_it, [(limiter,)], "fork") == [True]
        assert not await asyncio.create_task(ask(limiter, "2", max_parallel=1))

    asyncio.run(scenario())


def _end_it(limiter: SharedLimiter) -> bool:
    """The call of this context, as the child of the fork has it; whether it has it."""
    has_it = limiter._find(data()) is not None
    asyncio.run(limiter.async_post_call_success_hook(data(), auth(), USAGE))
    return has_it


def test_a_key_that_is_seldom_used_keeps_no_quotas_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With more sets of limits than quotas are kept open, they are opened anew again and again."""
    most, rounds = 8, 40
    monkeypatch.setattr(admission, "_MOST_QUOTAS", most)

    def quotas() -> int:
        gc.collect()
        return sum(type(each) is Quota for each in gc.get_objects())

    def ask(key: str, rpm: int) -> None:
        found = subjects(auth(api_key=key, rpm_limit=rpm), "m")
        admitted = admission.admit_here(found, 0) or admission.admit(found, 0)
        assert isinstance(admitted, admission.Admissions)
        admitted.release()

    before = quotas()  # of other tests
    often = [(f"often {i}", 10**6 + i) for i in range(most + 2)]
    for i in range(rounds):
        for key, rpm in [*often, *[(f"seldom {i}", 5000)] * 2]:
            ask(key, rpm)
    assert quotas() - before <= rounds + len(often) + most  # each key's own


def test_subjects_are_asked_for_where_the_quotas_are_now() -> None:
    found = subjects(auth(rpm_limit=5), "m")
    admission.admit(found, 0)
    first = admission.admit_here(found, 0)
    assert isinstance(first, admission.Admissions)
    assert admission.admit_here(found, 0) is not None
    admission.forget()
    assert admission.admit_here(found, 0) is None  # the quota is not open
    again = admission.admit(found, 0)
    assert isinstance(again, admission.Admissions)
    assert again.requests_left() == 1  # of the same counts
