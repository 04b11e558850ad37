"""The clients for requests and aiohttp, against a real server. What they have in common with the
httpx transports (the three bounds, Retry-After) is tested in tests/integrations/httpx/ too."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
import httpx
import pytest
import requests
from aiohttp import web
from integrations.httpx.server import UpstreamServer, upstream_server
from requests.adapters import BaseAdapter, HTTPAdapter
from support.waiting import wait_until_async
from urllib3.util import Timeout
from urllib3.util.retry import Retry

from fast_litellm_shm import FixedWindow, RateLimitExceeded, Segment, TokenBucket
from fast_litellm_shm.integrations import aiohttp as ours_aiohttp
from fast_litellm_shm.integrations import requests as ours_requests
from fast_litellm_shm.integrations.aiohttp import SharedLimitMiddleware
from fast_litellm_shm.integrations.httpx import SharedLimitTransport
from fast_litellm_shm.integrations.requests import SharedLimitAdapter

Ask = Callable[..., list[Any]]
HOUR = FixedWindow(1, per=3600)


@pytest.fixture
def server() -> Iterator[UpstreamServer]:
    with upstream_server() as found:
        yield found


def session_of(adapter: BaseAdapter) -> requests.Session:
    session = requests.Session()
    session.mount("http://", adapter)
    return session


def ask_requests(segment: Segment, urls: list[str], **options: Any) -> list[Any]:
    """All at once: statuses, or what was raised."""
    inner = options.pop("inner", None)

    def one(url: str) -> Any:
        try:
            return session.get(url).status_code
        except requests.RequestException as error:
            return error

    adapter = SharedLimitAdapter(inner, name="clients", segment=segment, **options)
    with session_of(adapter) as session, ThreadPoolExecutor(len(urls)) as pool:
        return list(pool.map(one, urls))


def ask_aiohttp(segment: Segment, urls: list[str], **options: Any) -> list[Any]:
    async def many() -> list[Any]:
        limit = SharedLimitMiddleware(name="clients", segment=segment, **options)
        async with aiohttp.ClientSession(middlewares=[limit]) as session:

            async def one(url: str) -> Any:
                async with session.get(url) as response:
                    await response.read()
                    return response.status

            return await asyncio.gather(*map(one, urls), return_exceptions=True)

    return asyncio.run(many())


both = pytest.mark.parametrize("ask", [ask_requests, ask_aiohttp])


@both
def test_in_flight(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    """Never more than two at once, and all get their turn."""
    urls = [f"{server.origin}/{i}" for i in range(20)]
    assert ask(segment, urls, max_in_flight=2, max_wait=60) == [200] * 20
    assert (server.asked, server.most <= 2) == (20, True)


@both
def test_rates(ask: Ask, segment: Segment, server: UpstreamServer) -> None:
    limits = [TokenBucket(3, per=3600), "9/hour"]
    found = ask(segment, [server.origin] * 5, limits=limits, max_wait=0)
    errors = [each for each in found if each != 200]
    assert len(errors) == 2 and server.asked == 3
    for error in errors:
        assert isinstance(error, RateLimitExceeded) and error.retry_after is not None
        assert str(error).startswith("clients: the rate of requests to http://127.0.0.1:")
        again = pickle.loads(pickle.dumps(error))
        assert (str(again), again.retry_after) == (str(error), error.retry_after)
        assert type(again) is type(error)


@both
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_heard_by_all_libraries(
    ask: Ask, segment: Segment, server: UpstreamServer, status: int
) -> None:
    server.answer = (status, {"Retry-After": "1000"})
    assert ask(segment, [server.origin]) == [status]
    server.answer = (200, {})
    for other in (ask_requests, ask_aiohttp):
        (error,) = other(segment, [server.origin], max_wait=30)
        assert "asked for a pause (Retry-After)" in str(error)
    transport = SharedLimitTransport(name="clients", segment=segment, max_wait=30)
    with httpx.Client(transport=transport) as client:
        with pytest.raises(httpx.PoolTimeout, match="asked for a pause"):
            client.get(server.origin)
        assert server.asked == 1
        transport.upstream.unblock(server.origin)
    assert ask(segment, [server.origin]) == [200]


@both
def test_a_failing_request_gives_back(ask: Ask, segment: Segment) -> None:
    gone = "http://127.0.0.1:1"
    (error,) = ask(segment, [gone], max_in_flight=1)
    assert isinstance(error, (requests.ConnectionError, aiohttp.ClientConnectorError))
    upstream = SharedLimitAdapter(name="clients", segment=segment, max_in_flight=1).upstream
    assert upstream.in_flight(gone) == 0


@both
def test_a_redirect_is_a_request_of_its_own(
    ask: Ask, segment: Segment, server: UpstreamServer
) -> None:
    """The first response is closed before the second request is sent: one permit is enough."""
    server.let_go.set()
    server.answer = (302, {"Location": "/hold"})
    assert ask(segment, [server.origin], max_in_flight=1, max_wait=60) == [200]
    assert server.asked == 2
    (error,) = ask(segment, [server.origin], limits=HOUR, max_wait=0)
    assert isinstance(error, RateLimitExceeded) and server.asked == 3, "there is a turn for one"


def test_requests_that_stream(segment: Segment, server: UpstreamServer) -> None:
    """A permit is held until the response is read to its end, or closed."""
    adapter = SharedLimitAdapter(name="clients", segment=segment, max_in_flight=1, max_wait=0)
    in_flight = adapter.upstream.in_flight
    with session_of(adapter) as session:
        response = session.get(f"{server.origin}/hold", stream=True)
        assert in_flight(server.origin) == 1
        with pytest.raises(requests.ConnectTimeout, match="1 of 1 requests to") as refused:
            session.get(server.origin)
        assert isinstance(refused.value, ours_requests.SharedLimitTimeout)
        assert refused.value.request is not None
        response.close()  # in mid-body
        assert in_flight(server.origin) == 0
        server.let_go.set()
        with session.get(f"{server.origin}/hold", stream=True) as response:
            assert in_flight(server.origin) == 1
            assert response.raw.read() == b"1234567890"
            assert in_flight(server.origin) == 0, "read to its end, without requests"
        response = session.get(f"{server.origin}/hold", stream=True)
        assert in_flight(server.origin) == 1
        assert b"".join(response.iter_content(3)) == b"1234567890"
        assert in_flight(server.origin) == 0
        session.head(server.origin, stream=True).close()
        assert in_flight(server.origin) == 0


def test_aiohttp_that_streams(segment: Segment, server: UpstreamServer) -> None:
    async def scenario() -> None:
        limit = SharedLimitMiddleware(name="clients", segment=segment, max_in_flight=1)
        in_flight = limit.upstream.in_flight
        async with aiohttp.ClientSession(middlewares=[limit]) as session:
            async with session.get(f"{server.origin}/hold"):
                assert in_flight(server.origin) == 1
                waiting = asyncio.create_task(session.get(server.origin))
                await asyncio.sleep(0)
                waiting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await waiting
            assert in_flight(server.origin) == 0, "released in mid-body"
            server.let_go.set()
            response = await session.get(f"{server.origin}/hold")
            assert await response.read() == b"1234567890"
            await wait_until_async("it is given back", lambda: not in_flight(server.origin))

    asyncio.run(scenario())


def test_retries_of_urllib3_count(segment: Segment, server: UpstreamServer) -> None:
    """Each attempt has a turn of its own, and its Retry-After is heard by all."""
    retry = Retry(5, status_forcelist=[503], backoff_factor=0, respect_retry_after_header=False)
    server.answer = (503, {})
    found = ask_requests(
        segment, [server.origin], inner=HTTPAdapter(max_retries=retry), limits="3/hour", max_wait=0
    )
    assert isinstance(found[0], ours_requests.SharedLimitTimeout)
    assert server.asked == 3
    server.answer = (503, {"Retry-After": "1000"})
    (error,) = ask_requests(
        segment, [server.origin], inner=HTTPAdapter(max_retries=retry), max_wait=9
    )
    assert "asked for a pause" in str(error) and server.asked == 4


def test_retries_of_urllib3_end_as_they_do(segment: Segment, server: UpstreamServer) -> None:
    retry = Retry(2, status_forcelist=[500], backoff_factor=0)
    server.answer = (500, {})
    options: dict[str, Any] = {"max_in_flight": 1, "max_wait": 60}

    (error,) = ask_requests(
        segment, [server.origin], inner=HTTPAdapter(max_retries=retry), **options
    )
    assert isinstance(error, requests.exceptions.RetryError)
    assert "too many 500 error responses" in str(error) and server.asked == 3

    given = retry.new(raise_on_status=False)
    adapter = SharedLimitAdapter(
        HTTPAdapter(max_retries=given), name="clients", segment=segment, **options
    )
    with session_of(adapter) as session:
        response: Any = session.get(server.origin)
        assert (response.status_code, server.asked) == (500, 6)
        assert len(response.raw.retries.history) == 2
        assert adapter.upstream.in_flight(server.origin) == 0
    assert type(given) is Retry, "the user's own is left as it was"

    (error,) = ask_requests(
        segment,
        ["http://127.0.0.1:1"],
        inner=HTTPAdapter(max_retries=Retry(1, backoff_factor=0), pool_block=True),
        **options,
    )
    assert isinstance(error, requests.ConnectionError) and "Max retries exceeded" in str(error)


def test_a_body_that_is_sent_again(segment: Segment, server: UpstreamServer, tmp_path: Any) -> None:
    """A retry sends a file from where it began."""
    bodies = list[bytes]()

    class Noting(HTTPAdapter):
        def send(self, request: Any, *args: Any, **options: Any) -> Any:
            at = request.body.tell()
            bodies.append(request.body.read())
            request.body.seek(at)
            return super().send(request, *args, **options)

    path = tmp_path / "body"
    path.write_bytes(b"whole")
    server.answer = (503, {})
    retry = Retry(1, status_forcelist=[501], allowed_methods=None, backoff_factor=0)
    adapter = SharedLimitAdapter(Noting(max_retries=retry), name="clients", segment=segment)
    with (
        session_of(adapter) as session,
        path.open("rb") as body,
        pytest.raises(requests.exceptions.RetryError),
    ):
        session.post(server.origin, data=body)  # http.server answers 501 to a POST
    assert bodies == [b"whole"] * 2


def test_how_long_a_request_may_wait(segment: Segment, server: UpstreamServer) -> None:
    """As its own timeout says for the connection, unless max_wait says another."""
    adapter = SharedLimitAdapter(name="clients", segment=segment, limits=HOUR)
    with session_of(adapter) as session:
        assert session.get(server.origin).status_code == 200
        timeouts: list[Any] = [7, (7, 9), Timeout(connect=7, read=9)]
        for timeout in timeouts:
            with pytest.raises(requests.ConnectTimeout, match="not within 7 s; wait longer"):
                session.get(server.origin, timeout=timeout)

    async def scenario() -> None:
        limit = SharedLimitMiddleware(name="clients", segment=segment, limits=HOUR)
        for timeout in (
            aiohttp.ClientTimeout(connect=7, total=9),
            aiohttp.ClientTimeout(connect=0, total=7),
        ):
            async with aiohttp.ClientSession(middlewares=[limit], timeout=timeout) as session:
                with pytest.raises(aiohttp.ConnectionTimeoutError, match="not within 7 s"):
                    await session.get(server.origin)

    asyncio.run(scenario())


def test_a_websocket_counts_until_it_is_closed(segment: Segment) -> None:
    async def serve(request: web.Request) -> web.WebSocketResponse:
        found = web.WebSocketResponse()
        await found.prepare(request)
        await found.receive()
        return found

    async def scenario() -> None:
        app = web.Application()
        app.router.add_get("/", serve)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        (address,) = runner.addresses
        origin = f"http://127.0.0.1:{address[1]}"
        limit = SharedLimitMiddleware(name="clients", segment=segment, max_in_flight=1)
        async with aiohttp.ClientSession(middlewares=[limit]) as session:
            async with session.ws_connect(origin):
                assert limit.upstream.in_flight(origin) == 1
            await wait_until_async("it is free", lambda: not limit.upstream.in_flight(origin))
        await runner.cleanup()

    asyncio.run(scenario())


def test_a_session_that_is_pickled(segment: Segment, server: UpstreamServer) -> None:
    """Its limits are the same ones. (requests' sessions can be pickled.)"""
    retry = Retry(3, status_forcelist=[503])
    adapter = SharedLimitAdapter(
        HTTPAdapter(max_retries=retry), name="clients", segment=segment, limits=HOUR, max_wait=0
    )
    with pickle.loads(pickle.dumps(session_of(adapter))) as session:
        assert session.get(server.origin).status_code == 200
    found = ask_requests(segment, [server.origin], limits=HOUR, max_wait=0)
    assert isinstance(found[0], ours_requests.SharedLimitTimeout) and server.asked == 1


class Files(BaseAdapter):
    """Answers without urllib3."""

    def send(self, request: Any, *_: Any, **__: Any) -> requests.Response:
        response = requests.Response()
        response.status_code, response.request, response.url = 200, request, request.url
        response._content = b"found"
        return response

    def close(self) -> None: ...


def test_an_adapter_of_another_kind(segment: Segment) -> None:
    adapter = SharedLimitAdapter(Files(), name="clients", segment=segment, max_in_flight=1)
    with session_of(adapter) as session:
        assert [session.get("http://a").text for _ in range(2)] == ["found"] * 2
    assert adapter.upstream.in_flight("http://a:80") == 0


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_wait": -1}, "max_wait must be a number of seconds of 0 or more, not -1"),
    ({"max_in_flight": 0}, "max_in_flight must be between 1 and 100,000, not 0"),
    ({"limits": "5 a day or so"}, "5 a day or so"),
    ({"name": "x" * 100}, "name must be 1 to 96 bytes"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
@pytest.mark.parametrize("kind", [SharedLimitAdapter, SharedLimitMiddleware])
def test_bad_arguments(segment: Segment, kind: Any, options: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kind(segment=segment, **{"name": "t", **options})


def test_errors_are_those_of_their_library() -> None:
    assert issubclass(ours_requests.SharedLimitTimeout, requests.exceptions.ConnectTimeout)
    assert issubclass(ours_aiohttp.SharedLimitTimeout, aiohttp.ConnectionTimeoutError)
    assert issubclass(ours_aiohttp.SharedLimitTimeout, asyncio.TimeoutError)
