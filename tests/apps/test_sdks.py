"""The SDKs of OpenAI and Anthropic on our transports: a call that is refused says so."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from apps.model_server import ModelServer, model_server

from fast_litellm_shm import FixedWindow, Segment
from fast_litellm_shm.integrations import httpx as ours
from fast_litellm_shm.integrations import httpx2 as ours2
from fast_litellm_shm.integrations.httpx import NOT_SENT

SDKS: dict[str, Any] = {"openai": openai, "anthropic": anthropic}
CLIENTS = {"openai": ("OpenAI", "AsyncOpenAI"), "anthropic": ("Anthropic", "AsyncAnthropic")}
HOUR = FixedWindow(1, per=3600)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with model_server() as found:
        yield found


def create(name: str, client: Any) -> Any:
    if name == "openai":
        return client.responses.create(model="gpt-5", input="hello")
    messages = [{"role": "user", "content": "hello"}]
    return client.messages.create(model="claude", max_tokens=9, messages=messages)


def ask_sync(which: str, server: ModelServer, count: int, module: Any, **options: Any) -> list[Any]:
    """Answers, or what was raised."""
    sdk, found = SDKS[which], []
    transport = module.SharedLimitTransport(**options)
    http = sdk.DefaultHttpxClient(transport=transport)
    kind = getattr(sdk, CLIENTS[which][0])
    with kind(api_key="key", base_url=server.origin, http_client=http) as client:
        for _ in range(count):
            try:
                found.append(create(which, client))
            except sdk.APIError as error:
                found.append(error)
    return found


def ask_async(
    which: str, server: ModelServer, count: int, module: Any, **options: Any
) -> list[Any]:
    async def scenario() -> list[Any]:
        sdk, found = SDKS[which], []
        transport = module.AsyncSharedLimitTransport(**options)
        http = sdk.DefaultAsyncHttpxClient(transport=transport)
        kind = getattr(sdk, CLIENTS[which][1])
        async with kind(api_key="key", base_url=server.origin, http_client=http) as client:
            for _ in range(count):
                try:
                    found.append(await create(which, client))
                except sdk.APIError as error:
                    found.append(error)
        return found

    return asyncio.run(scenario())


both = pytest.mark.parametrize("ask", [ask_sync, ask_async])
each = pytest.mark.parametrize("name", SDKS)


@both
@each
@pytest.mark.parametrize("max_wait", [0, 5])
def test_a_refusal_is_a_rate_limit_error(
    name: str, ask: Any, max_wait: float, segment: Segment, server: ModelServer
) -> None:
    """At once, without retries, and with the reason and Retry-After."""
    options: dict[str, Any] = {"name": "limits", "segment": segment, "limits": HOUR}
    answer, refused = ask(
        name, server, 2, ours2, max_wait=max_wait, on_refusal="respond", **options
    )
    assert answer.id in ("resp_1", "msg_1")
    assert isinstance(refused, SDKS[name].RateLimitError)
    assert "limits: the rate of requests to http://127.0.0.1:" in str(refused)
    assert int(refused.response.headers["Retry-After"]) > 3000
    error: Any = refused.response.extensions[NOT_SENT]
    assert isinstance(error, ours2.SharedLimitTimeout) and (error.retry_after or 0) > 3000
    assert server.asked == 1


@both
@each
def test_what_is_raised_is_the_cause_of_a_time_out(
    name: str, ask: Any, segment: Segment, server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default, ``on_refusal="raise"``: the SDK tries again, and then says that it timed out."""
    monkeypatch.setattr(SDKS[name]._base_client, "MAX_RETRY_DELAY", 0.01)
    monkeypatch.setattr(SDKS[name]._base_client, "INITIAL_RETRY_DELAY", 0.01)
    options: dict[str, Any] = {"name": "limits", "segment": segment, "limits": HOUR}
    _, refused = ask(name, server, 2, ours2, max_wait=0, **options)
    assert isinstance(refused, SDKS[name].APITimeoutError)
    cause = refused.__cause__
    assert isinstance(cause, ours2.SharedLimitTimeout) and isinstance(cause, httpx2.PoolTimeout)
    assert pickle.loads(pickle.dumps(cause)).retry_after == cause.retry_after


@both
@each
def test_a_pause_that_the_account_gets(
    name: str, ask: Any, segment: Segment, server: ModelServer
) -> None:
    """The SDK gets the 429 of the API. All other workers then keep to its Retry-After."""
    server.refusal = {"Retry-After": "1000", "x-should-retry": "false"}
    options: dict[str, Any] = {"name": "limits", "segment": segment, "on_refusal": "respond"}
    theirs, ours_ = ask(name, server, 2, ours2, max_wait=5, **options)
    assert isinstance(theirs, SDKS[name].RateLimitError) and "slow down" in str(theirs)
    assert NOT_SENT not in theirs.response.extensions
    assert isinstance(ours_, SDKS[name].RateLimitError)
    assert "asked for a pause (Retry-After)" in str(ours_)
    assert server.asked == 1


@both
def test_where_too_many_are_in_flight_it_says_one_second(
    ask: Any, segment: Segment, server: ModelServer
) -> None:
    options: dict[str, Any] = {"name": "limits", "segment": segment, "on_refusal": "respond"}
    transport = ours2.SharedLimitTransport(max_in_flight=1, max_wait=0, **options)
    request = httpx2.Request("POST", f"{server.origin}/v1/responses", json={})
    held = transport.handle_request(request)
    (refused,) = ask("openai", server, 1, ours2, max_in_flight=1, max_wait=0, **options)
    assert refused.response.headers["Retry-After"] == "1", "when another call ends"
    held.close()
    transport.close()


@both
def test_the_transports_for_httpx_serve_httpx2(
    ask: Any, segment: Segment, server: ModelServer
) -> None:
    """OpenAI's SDK takes one; without an inner transport, that is made when it is known of which
    library. (Anthropic's SDK refuses what derives from httpx, and says so.)"""
    options: dict[str, Any] = {"name": "limits", "segment": segment, "limits": HOUR}
    found = ask("openai", server, 2, ours, max_wait=0, on_refusal="respond", **options)
    assert [type(each) for each in found[1:]] == [openai.RateLimitError]
    error: Any = found[1].response.extensions[NOT_SENT]
    both_: tuple[Any, ...] = (ours.SharedLimitTimeout, httpx2.PoolTimeout)
    assert all(isinstance(error, kind) for kind in both_)
    again: Any = pickle.loads(pickle.dumps(error))
    assert isinstance(again, httpx2.PoolTimeout) and str(again) == str(error)


@pytest.mark.parametrize("module", [ours, ours2])
def test_bad_arguments(module: Any, segment: Segment) -> None:
    for kind in (module.SharedLimitTransport, module.AsyncSharedLimitTransport):
        with pytest.raises(ValueError, match='on_refusal must be "raise" or "respond", not 429'):
            kind(name="limits", segment=segment, on_refusal=429)
