"""Applications that go on when their clients have gone, under uvicorn and hypercorn (HTTP/2)."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import psutil
import pytest
from support.names import remove
from support.served import START, ask
from support.waiting import wait_until

from fast_litellm_shm import Segment
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.integrations.asgi import (
    Message,
    RateLimitMiddleware,
    Receive,
    Rule,
    Scope,
    Send,
)
from fast_litellm_shm.integrations.web import cancellation
from fast_litellm_shm.limits import InFlight

HERE = pathlib.Path(__file__).parent
KEY = b"one"
SERVERS = {
    "uvicorn": ["uvicorn", "hanging:app", "--log-level", "error", "--uds", "{}"],
    "hypercorn": ["hypercorn", "hanging:app", "--bind", "unix:{}"],
}


def held(segment: Segment) -> int:
    shared = SharedLimits((InFlight(1),), name="hanging: default", segment=segment, on_full="deny")
    return int(lib.fshm_in_flight(shared._handle, KEY, len(KEY)))


@contextmanager
def serving(server: str, name: str, **env: str) -> Iterator[str]:
    if importlib.util.find_spec(server) is None:
        pytest.skip(f"not installed: {server}")
    path = f"/tmp/{name}.sock"
    command = [sys.executable, "-m", *(each.format(path) for each in SERVERS[server])]
    running = subprocess.Popen(
        command, cwd=HERE, env=os.environ | {"FAST_LITELLM_SHM_NAME": name} | env
    )

    def ready() -> bool:
        assert running.poll() is None, f"{server} ended"
        try:
            return ask(path, "/ready")[0] == 200
        except OSError:
            return False

    try:
        wait_until(f"{server} answers", ready)
        yield path
    finally:
        # hypercorn's worker outlives it. (Its resource tracker ends by itself, and cleans up.)
        workers = [
            each
            for each in psutil.Process(running.pid).children(recursive=True)
            if "spawn_main" in " ".join(each.cmdline())
        ]
        running.kill()
        for each in workers:
            each.kill()
        running.wait(START)
        psutil.wait_procs(workers, START)
        pathlib.Path(path).unlink(missing_ok=True)
        remove(name)


def client_that_goes(server: str, path: str, what: str, wait: Callable[[], object]) -> None:
    """Over HTTP/2 to hypercorn: its stream is reset, and the connection goes on."""
    if server == "uvicorn":
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(f"GET {what} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            wait()
        return
    pytest.importorskip("h2", reason="not installed: h2, of httpx[http2]")

    async def ask_and_go() -> None:
        transport = httpx.AsyncHTTPTransport(uds=path, http1=False, http2=True)
        async with httpx.AsyncClient(transport=transport, timeout=None) as client:
            asking = asyncio.ensure_future(client.get(f"http://localhost{what}"))
            await asyncio.to_thread(wait)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    asyncio.run(ask_and_go())


servers = pytest.mark.parametrize("server", SERVERS)
hangs = pytest.mark.parametrize("what", ["/before", "/amid"])


@servers
@hangs
def test_a_client_that_goes_ends_an_application_that_hangs(
    server: str, what: str, segment_name: str
) -> None:
    with serving(server, segment_name, CANCEL="1") as path:
        segment = Segment(segment_name)
        client_that_goes(
            server, path, what, lambda: wait_until("a slot is taken", lambda: held(segment) == 1)
        )
        wait_until("its slot comes back", lambda: held(segment) == 0)
        assert ask(path, "/answers")[0] == 200


@servers
def test_without_that_its_slot_is_in_use(server: str, segment_name: str) -> None:
    with serving(server, segment_name) as path:
        segment = Segment(segment_name)
        client_that_goes(
            server, path, "/amid", lambda: wait_until("a slot is taken", lambda: held(segment) == 1)
        )
        assert ask(path, "/answers")[0] == 429
        assert held(segment) == 1


@servers
def test_who_takes_too_long_is_answered(server: str, segment_name: str) -> None:
    with serving(server, segment_name, SECONDS="0.2") as path:
        status, body, headers = ask(path, "/before")
        assert status == 503 and "given up after 0.2 s" in body
        assert headers["Content-Type"] == "application/problem+json"
        assert headers["RateLimit-Policy"]
        segment = Segment(segment_name)
        wait_until("its slot comes back", lambda: held(segment) == 0)
        with pytest.raises(Exception, match=r"IncompleteRead|closed|reset"):
            ask(path, "/amid")
        wait_until("its slot comes back", lambda: held(segment) == 0)
        assert ask(path, "/answers")[0] == 200


# as a server does ---------------------------------------------------------------------------------


def http(**more: Any) -> Scope:
    return {"type": "http", "method": "GET", "path": "/", "headers": [], "client": ("a", 1), **more}


def middleware(app: Any, segment: Segment, **more: Any) -> RateLimitMiddleware:
    rules = [Rule(in_flight=1, key=lambda _: KEY)]
    return RateLimitMiddleware(app, rules, name="hanging", segment=segment, **more)


class Server:
    """receive() of a server, whose messages come one by one."""

    def __init__(self, *messages: Message) -> None:
        self.messages = asyncio.Queue[Message]()
        self.sent: list[Message] = []
        self.asked = 0
        for each in messages:
            self.messages.put_nowait(each)

    async def receive(self) -> Message:
        self.asked += 1
        return await self.messages.get()

    async def send(self, message: Message) -> None:
        self.sent.append(message)


BODY: Message = {"type": "http.request", "body": b"x" * 10_000, "more_body": True}
GONE: Message = {"type": "http.disconnect"}
ENDED: Message = {"type": "http.response.body", "body": b""}
BEGUN: Message = {"type": "http.response.start", "status": 200, "headers": []}


async def soon(what: str, ready: Callable[[], bool]) -> None:
    await asyncio.to_thread(wait_until, what, ready)


def test_the_application_gets_all_that_was_read_ahead(segment: Segment) -> None:
    """And not all of a large body is read before it asks."""
    total, got = 50, []

    async def scenario() -> None:
        server, started = Server(*[BODY] * total), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await started.wait()
            got.extend([await receive() for _ in range(total)])
            await send(BEGUN)
            await send(ENDED)

        asking = asyncio.ensure_future(
            middleware(app, segment, in_flight_cancel=True)(http(), server.receive, server.send)
        )
        await soon("it reads ahead", lambda: server.asked > 1)
        for _ in range(100):
            await asyncio.sleep(0)
        assert server.asked <= cancellation._MOST // len(BODY["body"]) + 1
        started.set()
        await asking

    asyncio.run(scenario())
    assert got == [BODY] * total


@pytest.mark.parametrize("stubborn", [False, True])
def test_a_slot_is_in_use_until_the_application_has_ended(segment: Segment, stubborn: bool) -> None:
    async def scenario() -> None:
        server, cancelled, let_go = Server(), asyncio.Event(), asyncio.Event()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                await let_go.wait()
                if not stubborn:
                    raise

        asking = asyncio.ensure_future(
            middleware(app, segment, in_flight_cancel=True)(http(), server.receive, server.send)
        )
        server.messages.put_nowait(GONE)
        await cancelled.wait()
        assert held(segment) == 1
        let_go.set()
        await asking  # no error: nobody is there to be told
        assert held(segment) == 0
        assert not server.sent

    asyncio.run(scenario())


def test_work_after_the_answer_goes_on(segment: Segment) -> None:
    """Starlette's background tasks run in the application's call; a server says that the client has
    gone as soon as the answer has been sent."""
    done = []

    async def scenario() -> None:
        server = Server()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send(BEGUN)
            await send(ENDED)
            server.messages.put_nowait(GONE)
            await asyncio.sleep(0.3)
            assert held(segment) == 0
            done.append(True)

        await middleware(app, segment, in_flight_cancel=True, in_flight_seconds=0.1)(
            http(), server.receive, server.send
        )

    asyncio.run(scenario())
    assert done


@pytest.mark.parametrize("options", [{"in_flight_cancel": True}, {"in_flight_seconds": 60}])
def test_what_the_application_raises_and_who_cancels_the_server(
    segment: Segment, options: dict[str, Any]
) -> None:
    async def raising(scope: Scope, receive: Receive, send: Send) -> None:
        raise ValueError("the application failed")

    async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.Event().wait()

    async def scenario() -> None:
        server = Server()
        with pytest.raises(ValueError, match="the application failed"):
            await middleware(raising, segment, **options)(http(), server.receive, server.send)
        assert held(segment) == 0
        asking = asyncio.ensure_future(
            middleware(hanging, segment, **options)(http(), server.receive, server.send)
        )
        await soon("it runs", lambda: held(segment) == 1)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert held(segment) == 0
        assert len(asyncio.all_tasks()) == 1, "something is left"

    asyncio.run(scenario())


def test_a_server_that_fails_to_tell(segment: Segment) -> None:
    """The application hears of it when it asks, and is not cancelled."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.05)
        with pytest.raises(OSError, match="the line is broken"):
            await receive()
        await send(BEGUN)
        await send(ENDED)

    async def receive() -> Message:
        raise OSError("the line is broken")

    async def scenario() -> None:
        server = Server()
        await middleware(app, segment, in_flight_cancel=True)(http(), receive, server.send)
        assert len(server.sent) == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "5", True])
def test_seconds_that_are_none(segment: Segment, seconds: Any) -> None:
    with pytest.raises(ValueError, match="in_flight_seconds must be a number of seconds above 0"):
        middleware(None, segment, in_flight_seconds=seconds)


def test_there_must_be_something_in_flight(segment: Segment) -> None:
    with pytest.raises(ValueError, match="of rules with in_flight"):
        RateLimitMiddleware(
            lambda *_: asyncio.sleep(0), [Rule()], name="a", segment=segment, in_flight_cancel=True
        )
