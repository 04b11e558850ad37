"""The httpx transports, sync and async, against a real server."""

from __future__ import annotations

import asyncio
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from integrations.httpx.server import UpstreamServer, upstream_server

from fast_litellm_shm import Limit, RateLimiter, RateLimitExceeded, Segment, Window
from fast_litellm_shm.integrations.httpx import (
    AsyncSharedLimitTransport,
    SharedLimitTimeout,
    SharedLimitTransport,
)

Ask = Callable[..., list[Any]]


@pytest.fixture
def server() -> Iterator[UpstreamServer]:
    with upstream_server() as found:
        yield found


def ask_sync(segment: Segment, urls: list[str], **options: Any) -> list[Any]:
    """All at once: statuses, or what was raised."""

    def one(url: str) -> Any:
        try:
            return client.get(url).status_code
        except httpx.TransportError as error:
            return error

    transport = SharedLimitTransport(name="httpx", segment=segment, **options)
    with httpx.Client(transport=transport) as client, ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(one, urls))


def ask_async(segment: Segment, urls: list[str], **options: Any) -> list[Any]:
    async def many() -> list[Any]:
        transport = AsyncSharedLimitTransport(name="httpx", segment=segment, **options)
        async with httpx.AsyncClient(transport=transport) as client:
            calls = [client.get(url) for url in urls]
            found = await asyncio.gather(*calls, return_exceptions=True)
        return [getattr(each, "status_code", each) for each in found]

    return asyncio.run(many())


both = pytest.mark.parametrize("ask", [ask_sync, ask_async])


@both
def test_in_flight(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    """Never more than two at once, and all get their turn."""
    urls = [f"{server.origin}/{i}" for i in range(20)]
    assert ask(segment, urls, max_in_flight=2, max_wait=60) == [200] * 20
    assert (server.asked, server.most <= 2) == (20, True)


@both
def test_too_many_in_flight(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    transport = SharedLimitTransport(name="httpx", segment=segment, max_in_flight=1)
    with httpx.Client(transport=transport) as client:
        with client.stream("GET", f"{server.origin}/hold") as held:
            assert transport.upstream.in_flight(server.origin) == 1
            (error,) = ask(segment, [server.origin], max_in_flight=1, max_wait=0)
            assert isinstance(error, SharedLimitTimeout) and isinstance(error, httpx.PoolTimeout)
            assert isinstance(error, RateLimitExceeded)
            assert str(error) == (
                f"httpx: 1 of 1 requests to {server.origin} are in flight, and none ended within 0 "
                "s; wait longer, or raise max_in_flight"
            )
            assert error.request.url == server.origin
            assert held.status_code == 200
        # closed in mid-body: given back
        assert transport.upstream.in_flight(server.origin) == 0
        assert server.asked == 1


@both
def test_the_wait_is_the_pool_timeout(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    """Of httpx's four timeouts, unless max_wait says another."""
    transport = SharedLimitTransport(name="httpx", segment=segment, limits=Window(1, 3600))
    with httpx.Client(transport=transport, timeout=httpx.Timeout(9, pool=0)) as client:
        assert client.get(server.origin).status_code == 200
        with pytest.raises(SharedLimitTimeout, match="not within 0 s; wait longer"):
            client.get(server.origin)
    (error,) = ask(segment, [server.origin], limits=Window(1, 3600))
    assert "not within 5" in str(error)  # at once, since its turn would come in an hour


@both
def test_rates(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    found = ask(segment, [server.origin] * 5, limits=[Limit(3, 3600), Window(9, 3600)], max_wait=0)
    assert [each for each in found if each == 200] == [200] * 3
    errors = [each for each in found if each != 200]
    assert all(isinstance(each, SharedLimitTimeout) for each in errors)
    assert all(each.retry_after > 1000 for each in errors)
    assert server.asked == 3


@both
def test_each_origin_counts_apart(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    with upstream_server() as other:
        urls = [server.origin, other.origin, f"{server.origin}/x?y"]
        found = ask(segment, urls, limits=Window(1, 3600), max_wait=0)
    assert sorted(map(str, found))[:2] == ["200", "200"]
    assert (server.asked, other.asked) == (1, 1)


@both
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_heard_by_all(
    ask: Ask, segment: Segment, server: UpstreamServer, status: int
) -> None:
    server.answer = (status, {"Retry-After": "1000"})
    assert ask(segment, [server.origin]) == [status]
    server.answer = (200, {})
    (error,) = ask(segment, [server.origin], max_wait=30)  # another client of another transport
    assert isinstance(error, SharedLimitTimeout)
    assert error.retry_after is not None and 990 < error.retry_after <= 1000
    assert "asked for a pause (Retry-After)" in str(error)
    assert server.asked == 1
    SharedLimitTransport(name="httpx", segment=segment).upstream.unblock(server.origin)
    assert ask(segment, [server.origin]) == [200]


@both
def test_a_pause_is_waited_out(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    server.answer = (429, {"Retry-After": "1"})
    assert ask(segment, [server.origin]) == [429]
    server.answer = (200, {})
    assert ask(segment, [server.origin] * 3, max_wait=30, max_in_flight=9) == [200] * 3
    assert server.arrivals[1] >= server.arrivals[0] + 1


@both
def test_what_asks_for_no_pause(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    answers: list[tuple[int, dict[str, str]]] = [
        (429, {}),
        (503, {"Retry-After": "whenever"}),
        (429, {"Retry-After": "0"}),
        (200, {"Retry-After": "1000"}),
        (301, {"Retry-After": "1000"}),
    ]
    for answer in answers:
        server.answer = answer
        assert ask(segment, [server.origin], max_wait=0) == [answer[0]]


@both
def test_a_pause_has_a_longest(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    """Whatever the network says, nobody is stopped for years."""
    server.answer = (429, {"Retry-After": "9" * 1000})
    assert ask(segment, [server.origin], max_retry_after=100) == [429]
    left = SharedLimitTransport(name="httpx", segment=segment).upstream.blocked(server.origin)
    assert 90 < left <= 100


@both
def test_a_pause_that_cannot_be_shared(
    ask: Ask, segment_name: str, server: UpstreamServer, caplog: pytest.LogCaptureFixture
) -> None:
    full = Segment(segment_name, capacity=1)
    filler = SharedLimitTransport(name="httpx", segment=full).upstream
    with pytest.raises(Exception, match="no room for another key"):
        for i in range(1000):
            filler.block(f"http://{i}", 100)
    server.answer = (429, {"Retry-After": "1000"})
    assert ask(full, [server.origin]) == [429]
    assert "the other workers cannot be told" in caplog.messages[0]


@both
def test_a_failing_request_gives_back(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    transport = SharedLimitTransport(name="httpx", segment=segment)
    gone = "http://127.0.0.1:1"
    (error,) = ask(segment, [gone], max_in_flight=1)
    assert isinstance(error, httpx.ConnectError)
    assert (
        SharedLimitTransport(name="httpx", segment=segment, max_in_flight=1).upstream.in_flight(
            gone
        )
        == 0
    )
    assert transport.upstream.in_flight(gone) == 0  # it has no such limit


def test_a_client_of_httpx2(segment: Segment, server: UpstreamServer) -> None:
    """OpenAI's SDK uses it. It accepts no streams and responses but its own."""
    httpx2 = pytest.importorskip("httpx2", reason="not every release of OpenAI's SDK brings it")
    options: dict[str, Any] = {"name": "httpx2", "segment": segment, "max_in_flight": 1}
    transport = SharedLimitTransport(httpx2.HTTPTransport(), **options)
    with httpx2.Client(transport=transport) as client:
        assert [client.get(server.origin).text for _ in range(2)] == ["1234567890"] * 2

    async def scenario() -> list[str]:
        limited = AsyncSharedLimitTransport(httpx2.AsyncHTTPTransport(), **options)
        async with httpx2.AsyncClient(transport=limited) as client:
            return [(await client.get(server.origin)).text for _ in range(2)]

    assert asyncio.run(scenario()) == ["1234567890"] * 2
    assert transport.upstream.in_flight(server.origin) == 0


def test_a_cancelled_request_gives_back(segment: Segment, server: UpstreamServer) -> None:
    async def scenario() -> None:
        transport = AsyncSharedLimitTransport(
            name="httpx", segment=segment, max_in_flight=1, max_wait=60
        )
        async with httpx.AsyncClient(transport=transport) as client:
            async with client.stream("GET", f"{server.origin}/hold"):
                waiting = asyncio.create_task(client.get(server.origin))
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert transport.upstream.in_flight(server.origin) == 0
            assert (await client.get(server.origin)).status_code == 200

    asyncio.run(scenario())


def test_an_answer_that_was_read_already_gives_back(segment: Segment) -> None:
    """As a MockTransport's, or a cache's: nobody reads it, and nobody closes it."""
    options: dict[str, Any] = {"name": "httpx", "segment": segment, "max_in_flight": 1}
    inner = httpx.MockTransport(lambda request: httpx.Response(200, text="read"))
    with httpx.Client(transport=SharedLimitTransport(inner, **options)) as client:
        assert [client.get("http://a").text for _ in range(2)] == ["read"] * 2

    async def scenario() -> list[str]:
        transport = AsyncSharedLimitTransport(inner, **options)
        async with httpx.AsyncClient(transport=transport) as client:
            return [(await client.get("http://a")).text for _ in range(2)]

    assert asyncio.run(scenario()) == ["read"] * 2


@both
def test_a_pause_that_comes_while_waiting_for_a_turn(
    ask: Ask, segment: Segment, server: UpstreamServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn has passed then, and another is waited for: else all who had one would go at the end
    of the pause at once, whatever the rate."""
    upstream = SharedLimitTransport(name="httpx", segment=segment).upstream
    real_wait, real_wait_async, turns = RateLimiter.wait, RateLimiter.wait_async, list[Any]()

    def told(decision: Any) -> Any:
        turns.append(decision)
        if len(turns) == 1:
            upstream.block(server.origin, 0.05)  # what another worker was answered
        return decision

    async def wait_async(self: RateLimiter, *arguments: Any, **more: Any) -> Any:
        return told(await real_wait_async(self, *arguments, **more))

    monkeypatch.setattr(RateLimiter, "wait", lambda *a, **more: told(real_wait(*a, **more)))
    monkeypatch.setattr(RateLimiter, "wait_async", wait_async)
    assert ask(segment, [server.origin], limits=Window(9, 3600), max_wait=60) == [200]
    assert [turn.remaining for turn in turns] == [8, 7]


@both
def test_a_pause_that_is_lifted(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    """Those who wait for its end hear of it."""
    upstream = SharedLimitTransport(name="httpx", segment=segment).upstream
    upstream.block(server.origin, 3000)
    lift = threading.Timer(0.1, upstream.unblock, [server.origin])
    lift.start()
    assert ask(segment, [server.origin], max_wait=3600) == [200]
    lift.join()


def test_origins(segment: Segment, server: UpstreamServer) -> None:
    """By scheme, host and port, however the URL is written."""
    server.answer = (429, {"Retry-After": "1000"})
    transport = SharedLimitTransport(name="httpx", segment=segment, max_wait=0)
    with httpx.Client(transport=transport) as client:
        client.get(f"HTTP://127.0.0.1:{server.server_port}/a?b#c")
        assert transport.upstream.blocked(server.origin) > 0
        transport.upstream.block("https://example.com:443", 100)
        with pytest.raises(SharedLimitTimeout, match="https://example.com:443 asked"):
            client.get("https://EXAMPLE.com/x")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_wait": -1}, "max_wait must be a number of seconds of 0 or more, not -1"),
    ({"max_wait": "5"}, "max_wait must be a number"),
    ({"max_in_flight": 0}, "max_in_flight must be between 1 and 100,000, not 0"),
    ({"max_retry_after": -1}, "max_retry_after must be 0 s to 30 days, not -1"),
    ({"max_retry_after": None}, "max_retry_after must be a number, not None"),
    ({"limits": 5}, "limits must be TokenBucket, FixedWindow or SlidingWindow, not 5"),
    ({"name": "x" * 100}, "name must be 1 to 96 bytes"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("kind", [SharedLimitTransport, AsyncSharedLimitTransport])
def test_bad_arguments(segment: Segment, kind: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(segment=segment, **{"name": "t", **options})


def test_the_error_survives_pickle() -> None:
    error = SharedLimitTimeout("no", 1.5, httpx.Request("GET", "http://a"))
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.retry_after, found.request.url) == ("no", 1.5, "http://a")


def test_nothing_is_logged_where_all_is_well(
    segment: Segment, server: UpstreamServer, caplog: pytest.LogCaptureFixture
) -> None:
    ask_sync(segment, [server.origin], max_in_flight=1)
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


class Noting(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """What is called of a transport that needs its context. fails: leaving it does."""

    def __init__(self, fails: bool = False) -> None:
        self.calls: list[object] = []
        self._fails = fails

    def __enter__(self) -> Any:
        self.calls.append("enter")
        return self

    def __exit__(self, *raised: object) -> None:
        self.calls.append(("exit", *raised))
        if self._fails:
            raise OSError("it cannot be left")

    def close(self) -> None:
        self.calls.append("close")

    async def __aenter__(self) -> Any:
        return self.__enter__()

    async def __aexit__(self, *raised: object) -> None:
        self.__exit__(*raised)

    async def aclose(self) -> None:
        self.close()


def through_sync(transport: Noting, segment: Segment, error: Exception | None) -> None:
    shared = SharedLimitTransport(transport, name="httpx", segment=segment)
    with httpx.Client(mounts={"http://mounted": shared}), shared as entered:
        assert entered is shared
        if error is not None:
            raise error
    shared.close()


def through_async(transport: Noting, segment: Segment, error: Exception | None) -> None:
    async def through() -> None:
        shared = AsyncSharedLimitTransport(transport, name="httpx", segment=segment)
        async with httpx.AsyncClient(mounts={"http://mounted": shared}), shared as entered:
            assert entered is shared
            if error is not None:
                raise error
        await shared.aclose()

    asyncio.run(through())


through_both = pytest.mark.parametrize("through", [through_sync, through_async])


@through_both
def test_the_context_of_what_sends_is_entered_and_left(
    through: Callable[..., None], segment: Segment
) -> None:
    """By a client that it is mounted in, and by whoever uses it alone."""
    transport, nothing = Noting(), (None, None, None)
    through(transport, segment, None)
    assert transport.calls == ["enter", "enter", ("exit", *nothing), ("exit", *nothing), "close"]


@through_both
def test_what_sends_hears_of_what_was_raised(
    through: Callable[..., None], segment: Segment
) -> None:
    error, transport = KeyError("raised within"), Noting()
    with pytest.raises(KeyError, match="raised within"):
        through(transport, segment, error)
    assert transport.calls[2][:3] == ("exit", KeyError, error)  # type: ignore[index]


@through_both
def test_what_goes_wrong_when_it_is_left_is_told(
    through: Callable[..., None], segment: Segment
) -> None:
    with pytest.raises(OSError, match="it cannot be left"):
        through(Noting(fails=True), segment, None)
