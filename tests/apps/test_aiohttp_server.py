"""The middleware for aiohttp's server: in real servers, and under gunicorn with four workers."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from support.served import ask, ask_of_several, gunicorn, opened, served
from support.waiting import PATIENCE
from yarl import URL

from fast_litellm_shm import FixedWindow, Segment, TokenBucket
from fast_litellm_shm.integrations.aiohttp_server import (
    MARK,
    Outcome,
    RateLimitMiddleware,
    Request,
    Rule,
    header,
)

Client = Callable[..., Awaitable[tuple[int, Any, bytes]]]
ONE = FixedWindow(1, per=3600)


async def index(request: web.Request) -> web.Response:
    return web.Response(text="found")


@asynccontextmanager
async def serving(*middlewares: Any, prepare: Any = None, **routes: Any) -> AsyncIterator[Client]:
    """A server, and a function that asks it: status, headers, body."""
    app = web.Application(middlewares=middlewares)
    app.router.add_route("*", "/", index)
    for name, handler in routes.items():
        app.router.add_route("*", f"/{name}", handler)
    if prepare is not None:
        app.on_response_prepare.append(prepare)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with aiohttp.ClientSession() as session:

            async def client(path: str = "/", method: str = "GET", **more: Any) -> Any:
                url = URL(origin + path, encoded=True)
                async with session.request(method, url, allow_redirects=False, **more) as found:
                    return found.status, found.headers, await found.read()

            client.session, client.origin, client.runner = session, origin, runner  # type: ignore[attr-defined]
            yield client
    finally:
        await runner.cleanup()


def middleware(segment: Segment, *rules: Rule, **options: Any) -> RateLimitMiddleware:
    return RateLimitMiddleware(rules, name="aiohttp", segment=segment, **options)


def test_headers_and_refusal(segment: Segment) -> None:
    async def scenario() -> None:
        async with serving(middleware(segment, Rule(FixedWindow(2, per=60)))) as client:
            answers = [await client() for _ in range(3)]
            assert [status for status, _, _ in answers] == [200, 200, 429]
            assert answers[0][1]["RateLimit-Policy"] == '"default";q=2;w=60'
            assert answers[0][1]["X-RateLimit-Remaining"] == "1"
            status, headers, body = answers[2]
            assert headers["Retry-After"] == "60"
            assert headers["Content-Type"] == "application/problem+json"
            assert b'"violated-policies": ["default"]' in body
            status, headers, body = await client(method="HEAD")
            assert (status, headers["Retry-After"], body) == (429, "60", b"")

    asyncio.run(scenario())


def test_keys_costs_and_outcomes(segment: Segment) -> None:
    found: list[Outcome] = []

    async def look(request: web.Request) -> web.Response:
        found.append(request[MARK])
        return web.Response()

    async def cost(request: Request) -> int:
        return int(request.raw.query["cost"])  # aiohttp's own request

    rule = Rule(TokenBucket(5, per=3600), key=header("X-Key"), cost=cost)

    async def scenario() -> None:
        async with serving(middleware(segment, rule), look=look) as client:
            for key in ("a", "b"):
                asked = [await client("/look?cost=3", headers={"X-Key": key}) for _ in range(2)]
                assert [status for status, _, _ in asked] == [200, 429]
            assert [each.key for each in found] == ["x-key=a", "x-key=b"]
            repeated = [("X-Key", "a"), ("X-Key", "c")]  # counts for the address
            assert (await client("/look?cost=3", headers=repeated))[0] == 200
            assert (await client("/look?cost=x"))[0] == 503

    asyncio.run(scenario())


def test_responses_that_are_raised(segment: Segment) -> None:
    """A redirect, an error of the handler, and an unknown path are limited, and have headers."""

    async def go(request: web.Request) -> web.Response:
        raise web.HTTPFound("/")

    async def fail(request: web.Request) -> web.Response:
        raise RuntimeError("of the test")

    limit = middleware(segment, Rule(FixedWindow(3, per=3600), in_flight=1))

    async def scenario() -> None:
        async with serving(limit, go=go, fail=fail) as client:
            status, headers, _ = await client("/go")
            assert (status, headers["X-RateLimit-Remaining"]) == (302, "2")
            assert (await client("/fail"))[0] == 500
            status, headers, _ = await client("/nowhere")
            assert (status, headers["X-RateLimit-Remaining"]) == (404, "0")
            assert (await client("/go"))[0] == 429

    asyncio.run(scenario())


@pytest.mark.parametrize("told", [True, False])
def test_a_stream_holds_its_permit_until_it_ends(segment: Segment, told: bool) -> None:
    go = asyncio.Event()

    async def stream(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"begun ")
        await go.wait()
        await response.write(b"ended")
        return response

    limit = middleware(segment, Rule(TokenBucket(99, per=60), in_flight=1, busy_status=503))
    prepare = limit.on_response_prepare if told else None

    async def scenario() -> None:
        async with serving(limit, prepare=prepare, stream=stream) as client:
            session, origin = client.session, client.origin  # type: ignore[attr-defined]
            async with session.get(f"{origin}/stream") as held:
                assert ("RateLimit-Policy" in held.headers) is told
                assert (await client())[0] == 503
                go.set()
                assert await held.read() == b"begun ended"
            answer = await client()
            assert answer[0] == 200
            assert len(answer[1].getall("RateLimit-Policy")) == 1

    asyncio.run(scenario())


def test_a_plain_response_holds_its_permit_until_it_is_sent(segment: Segment) -> None:
    """Also where a middleware outside this one takes its time and changes the response, or gives
    another one."""
    reached, go = asyncio.Event(), asyncio.Event()

    @web.middleware
    async def outer(request: web.Request, handler: Any) -> web.StreamResponse:
        response: web.StreamResponse = await handler(request)
        if request.path == "/other":
            return web.Response(status=204)
        if not reached.is_set():
            reached.set()
            await go.wait()
        response.headers["X-Outer"] = "yes"
        return response

    limit = middleware(segment, Rule(in_flight=1))

    async def scenario() -> None:
        async with serving(outer, limit, other=index) as client:

            async def first() -> Any:
                return await client()

            held = asyncio.create_task(first())
            await reached.wait()
            assert (await client())[0] == 429
            go.set()
            status, headers, _ = await held
            assert (status, headers["X-Outer"]) == (200, "yes")
            assert [(await client("/other"))[0] for _ in range(3)] == [204] * 3
            assert (await client())[0] == 200

    asyncio.run(scenario())


def test_a_client_that_goes(segment: Segment) -> None:
    """Its handler holds the permit until it ends."""
    begun, go = asyncio.Event(), asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        begun.set()
        await go.wait()
        return web.Response()

    async def scenario() -> None:
        limit = middleware(segment, Rule(in_flight=1))
        async with serving(limit, slow=slow) as client:
            origin = client.origin  # type: ignore[attr-defined]
            async with aiohttp.ClientSession() as session:
                task = asyncio.create_task(session.get(f"{origin}/slow"))
                await begun.wait()
                task.cancel()
            assert (await client())[0] == 429

            async def answered() -> int:
                return (await client())[0]

            go.set()
            while await answered() == 429:
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_a_websocket(segment: Segment) -> None:
    """A handshake is a GET request. The permit is held until the websocket is closed."""

    async def echo(request: web.Request) -> web.WebSocketResponse:
        found = web.WebSocketResponse()
        await found.prepare(request)
        async for message in found:
            await found.send_str(message.data)
        return found

    limit = middleware(segment, Rule(in_flight=1, path="/echo", methods={"GET"}))

    async def scenario() -> None:
        async with serving(limit, echo=echo) as client:
            session, origin = client.session, client.origin  # type: ignore[attr-defined]
            async with session.ws_connect(f"{origin}/echo") as websocket:
                await websocket.send_str("hello")
                assert await websocket.receive_str() == "hello"
                with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
                    await session.ws_connect(f"{origin}/echo")
                assert refused.value.status == 429
                assert refused.value.headers is not None
                assert refused.value.headers["Retry-After"] == "1"

            async def opened_again() -> bool:
                try:
                    async with session.ws_connect(f"{origin}/echo"):
                        return True
                except aiohttp.WSServerHandshakeError:
                    return False

            while not await opened_again():
                await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


def test_requests_that_wait(segment: Segment) -> None:
    """Beyond max_waiting they are refused; the others are served in turn."""
    served_ = list[str]()

    async def note(request: web.Request) -> web.Response:
        served_.append(request.query["n"])
        return web.Response()

    # One in half a second: all six come before the second is served.
    rule = Rule(TokenBucket(2, per=1, burst=1), wait=PATIENCE, max_waiting=3)

    async def scenario() -> list[int]:
        async with serving(middleware(segment, rule), note=note) as client:

            async def one(number: int) -> int:
                return (await client(f"/note?n={number}"))[0]

            return await asyncio.gather(*map(one, range(6)))

    assert sorted(asyncio.run(scenario())) == [200] * 4 + [429] * 2
    assert len(served_) == 4


SPELLINGS = [
    *("/login", "//login", "/%6cogin", "/%2Flogin", "/x/../login", "/login/", "/./login"),
    *("/login?x=1", "/login%0A", "/login;x", "/%256cogin", "http://x/login", "/LOGIN", "/login#x"),
    *("/login%20", "/login%00", "/.//login", "/lo%FFgin", "login"),
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_no_spelling_passes_the_limit(spelling: str, segment: Segment) -> None:
    """Of the requests that the handler serves, no more than the limit, however they are written."""
    count = 0

    async def login(request: web.Request) -> web.Response:
        nonlocal count
        count += 1
        return web.Response()

    limit = middleware(segment, Rule(ONE, path="/login"), Rule(FixedWindow(9999, per=3600)))

    def ask_raw(port: int) -> int:
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as connection:
            lines = f"GET {spelling} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            connection.sendall(lines.encode())
            found = b""
            while part := connection.recv(4096):
                found += part
        return int(found.split()[1]) if found else 0

    async def scenario() -> list[int]:
        async with serving(limit, login=login) as client:
            port = client.runner.addresses[0][1]  # type: ignore[attr-defined]
            return [await asyncio.to_thread(ask_raw, port) for _ in range(3)]

    statuses = asyncio.run(scenario())
    assert count <= 1, "served beyond the limit"
    assert statuses.count(200) == count


def test_bad_arguments(segment: Segment) -> None:
    with pytest.raises(ValueError, match="to aiohttp's server a handshake is a GET request"):
        middleware(segment, Rule(ONE, methods={"WEBSOCKET"}))
    with pytest.raises(TypeError, match="rules must be a list of Rule objects"):
        RateLimitMiddleware(ONE, name="aiohttp", segment=segment)  # type: ignore[arg-type]


def test_four_workers_of_gunicorn(segment_name: str) -> None:
    """The example: exactly its limits, and the permit of a stream that comes back."""
    command = gunicorn("app:app", "--worker-class", "aiohttp.GunicornWebWorker")
    env = {"FAST_LITELLM_SHM_NAME": segment_name}
    with served("aiohttp_server", command, ["aiohttp", "gunicorn"], segment_name, env) as path:
        answers = ask_of_several(path, "/", 160, 50)
        assert Counter(status for status, _, _ in answers) == {200: 100, 429: 60}
        assert len({body for status, body, _ in answers if status == 200}) > 1
        found = [ask(path, "/report")[0] for _ in range(8)]
        assert Counter(found) == {200: 5, 429: 3}
        streams = [opened(path) for _ in range(3)]
        status, _, headers = ask(path, "/stream")
        assert (status, headers["Retry-After"]) == (503, "1")
        streams[0].close()
        streams[0] = opened(path)
        assert ask(path, "/stream")[0] == 503
        for each in streams:
            each.close()
