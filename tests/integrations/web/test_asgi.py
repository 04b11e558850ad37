"""The ASGI middleware, spoken to as a server does: what passes, what is added, permits' ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from fast_litellm_shm import Limit, Segment, Window
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.integrations.asgi import (
    MARK,
    App,
    Message,
    RateLimitMiddleware,
    Receive,
    Rule,
    Scope,
    Send,
)
from fast_litellm_shm.limits import InFlight

START: Message = {"type": "http.response.start", "status": 200, "headers": [(b"x-app", b"1")]}
BODY: Message = {"type": "http.response.body", "body": b"hello"}
KEY = "192.0.2.7"


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    await send({**START})
    await send({**BODY})


def http(**more: Any) -> Scope:
    return {
        "type": "http",
        "method": "GET",
        "path": "/",
        "headers": [],
        "client": (KEY, 1),
        **more,
    }


def talk(app: App, scope: Scope, *received: Message) -> list[Message]:
    """What the app sends."""
    waiting, sent = list(received), []

    async def receive() -> Message:
        return waiting.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    async def serve() -> None:
        await app(scope, receive, send)

    asyncio.run(serve())
    return sent


def held(segment: Segment) -> int:
    """Permits of the only rule in these tests."""
    limits = (InFlight(1),)
    shared = SharedLimits(limits, name="web: default", segment=segment, on_full="deny", keep=True)
    return int(lib.fshm_in_flight(shared._handle, KEY.encode(), len(KEY)))


def headers(message: Message) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in message["headers"]}


def test_admitted_and_refused(segment: Segment) -> None:
    app = RateLimitMiddleware(hello, [Rule(Limit(1, 60))], name="web", segment=segment)
    scope = http()
    start, body = talk(app, scope)
    assert (start["status"], body) == (200, BODY)
    assert {"x-app", "ratelimit", "ratelimit-policy", "x-ratelimit-limit"} <= set(headers(start))
    assert scope[MARK].key == KEY
    start, body = talk(app, http())
    assert start["status"] == 429
    assert headers(start)["retry-after"] == "60"
    assert json.loads(body["body"])["status"] == 429
    start, body = talk(app, http(method="HEAD"))
    assert (start["status"], body["body"]) == (429, b"")


@pytest.mark.parametrize("kind", ["lifespan", "websocket", "something-new"])
def test_other_scopes_pass_as_they_are(segment: Segment, kind: str) -> None:
    seen: list[tuple[Any, ...]] = []

    async def app(*arguments: Any) -> None:
        seen.append(arguments)

    async def nothing(*_: Any) -> Any: ...

    scope: Scope = {"type": kind}
    middleware = RateLimitMiddleware(app, [Rule(Limit(1))], name="web", segment=segment)
    asyncio.run(middleware(scope, nothing, nothing))
    ((given, receive, send),) = seen
    assert given is scope and receive is nothing and send is nothing
    assert scope == {"type": kind}


def test_what_the_app_says_itself_stands(segment: Segment) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(
            {**START, "headers": [(b"X-RateLimit-Limit", b"7"), (b"RateLimit", b'"own";r=1')]}
        )
        await send({**BODY})

    inner = RateLimitMiddleware(app, [Rule(Limit(9, 60))], name="inner", segment=segment)
    outer = RateLimitMiddleware(inner, [Rule(Limit(5, 60))], name="outer", segment=segment)
    found = [(name.lower(), value) for name, value in talk(outer, http())[0]["headers"]]
    assert [v for n, v in found if n == b"x-ratelimit-limit"] == [b"7"]
    assert [v for n, v in found if n == b"ratelimit"] == [
        b'"own";r=1',
        b'"default";r=8;t=7',
        b'"default";r=4;t=12',
    ]


def test_a_header_list_that_is_a_tuple_or_not_there(segment: Segment) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 204})
        await send({"type": "http.response.body"})

    start, _ = talk(RateLimitMiddleware(app, [Rule(Limit(9))], name="web", segment=segment), http())
    assert "ratelimit" in headers(start)


def test_dry_run(segment: Segment) -> None:
    app = RateLimitMiddleware(hello, [Rule(Limit(1), dry_run=True)], name="web", segment=segment)
    assert headers(talk(app, http())[0]) == {"x-app": "1"}
    scope = http()
    start, _ = talk(app, scope)
    assert (start["status"], headers(start)["x-ratelimit-dry-run"]) == (200, "denied")
    assert scope[MARK].denied and not scope[MARK].refused


# permits ----------------------------------------------------------------------------------------


def in_flight(app: App, segment: Segment, **more: Any) -> RateLimitMiddleware:
    return RateLimitMiddleware(app, [Rule(in_flight=1)], name="web", segment=segment, **more)


ENDINGS: dict[str, Message] = {
    "body": BODY,
    "no body": {"type": "http.response.body"},
    "file": {"type": "http.response.pathsend", "path": "/etc/hostname"},
    "descriptor": {"type": "http.response.zerocopysend", "file": 3, "more_body": False},
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_permit_is_held_until_the_body_was_sent(segment: Segment, ending: str) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(held(segment))
        await send({**START})
        await send({**BODY, "more_body": True})
        seen.append(held(segment))
        await send(ENDINGS[ending])
        seen.append(held(segment))  # what it does afterwards keeps nobody out

    talk(in_flight(app, segment), http())
    assert seen == [1, 1, 0]


def test_a_permit_is_held_while_the_last_part_is_being_sent(segment: Segment) -> None:
    seen = []

    async def send(message: Message) -> None:
        seen.append(held(segment))

    async def receive() -> Message:
        raise AssertionError

    asyncio.run(in_flight(hello, segment)(http(), receive, send))
    assert seen == [1, 1]
    assert held(segment) == 0


async def disconnected(scope: Scope, receive: Receive, send: Send) -> None:
    await send({**START})
    await receive()


async def raising(scope: Scope, receive: Receive, send: Send) -> None:
    await send({**START})
    raise ValueError("the app failed")


async def unfinished(scope: Scope, receive: Receive, send: Send) -> None:
    await send({**START})


@pytest.mark.parametrize("app", [disconnected, raising, unfinished])
def test_a_permit_ends_however_the_app_does(segment: Segment, app: App) -> None:
    middleware = in_flight(app, segment)
    for _ in range(2):
        try:
            start, *_ = talk(middleware, http(), {"type": "http.disconnect"})
            assert start["status"] == 200
        except ValueError as error:
            assert str(error) == "the app failed"
        assert held(segment) == 0


def test_the_client_goes_and_the_app_works_on(segment: Segment) -> None:
    """A generator in a thread, say: else clients that go at once make any number of them work."""
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({**START})
        seen.append(held(segment))
        await receive()
        seen.append(held(segment))

    talk(in_flight(app, segment), http(), {"type": "http.disconnect"})
    assert seen == [1, 1]
    assert held(segment) == 0


def test_cancellation(segment: Segment) -> None:
    async def scenario() -> None:
        streaming = asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({**START})
            streaming.set()
            await asyncio.Event().wait()

        async def send(message: Message) -> None: ...

        async def receive() -> Message:
            await asyncio.Event().wait()
            raise AssertionError

        task = asyncio.create_task(in_flight(app, segment)(http(), receive, send))
        await streaming.wait()
        assert held(segment) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert held(segment) == 0

    asyncio.run(scenario())


# websockets -------------------------------------------------------------------------------------


async def socket(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    await receive()


CONNECT, GONE = {"type": "websocket.connect"}, {"type": "websocket.disconnect"}


def handshake(**more: Any) -> Scope:
    return {"type": "websocket", "path": "/ws", "headers": [], "client": (KEY, 1), **more}


def test_websockets_when_asked_for(segment: Segment) -> None:
    rules = [Rule(Limit(1), methods={"WEBSOCKET"})]
    app = RateLimitMiddleware(socket, rules, name="web", segment=segment, websockets=True)
    assert talk(app, handshake(), CONNECT, GONE) == [{"type": "websocket.accept"}]
    (closed,) = talk(app, handshake(), CONNECT)
    assert (closed["type"], closed["code"]) == ("websocket.close", 1013)
    (closed,) = talk(app, handshake(extensions=None), CONNECT)
    assert closed["type"] == "websocket.close"
    extended = handshake(extensions={"websocket.http.response": {}})
    start, body = talk(app, extended, CONNECT)
    assert (start["type"], start["status"]) == ("websocket.http.response.start", 429)
    assert body["type"] == "websocket.http.response.body"


def test_a_method_that_a_client_calls_websocket(segment: Segment) -> None:
    """Servers pass on methods that they do not know (uvicorn with h11), and views that ask for no
    method serve them."""
    rules = [Rule(methods={"WEBSOCKET"}), Rule(Window(1, 60))]
    app = RateLimitMiddleware(hello, rules, name="web", segment=segment, websockets=True)
    asked = [talk(app, http(method=each))[0]["status"] for each in ("WEBSOCKET", "WebSocket")]
    assert asked == [200, 429]


def test_a_rule_for_websockets_that_are_not_asked_about(segment: Segment) -> None:
    with pytest.raises(ValueError, match="rule 'WEBSOCKET' is for WEBSOCKET, .*websockets=True"):
        RateLimitMiddleware(
            socket, [Rule(Limit(1), methods={"WEBSOCKET"})], name="web", segment=segment
        )


def test_a_websocket_holds_its_permit_until_its_application_ends(segment: Segment) -> None:
    seen: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        look: Callable[[], None] = lambda: seen.append(held(segment))  # noqa: E731
        await receive()
        await send({"type": "websocket.accept"})
        look()
        await receive()
        look()

    talk(in_flight(app, segment, websockets=True), handshake(), CONNECT, GONE)
    assert seen == [1, 1]
    assert held(segment) == 0
