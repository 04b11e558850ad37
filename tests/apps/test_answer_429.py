"""``@limited`` in each framework: where it raises, the client gets 429 and Retry-After, not 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from fastapi import WebSocket

from fast_litellm_shm import FixedWindow, RateLimiter, RateLimitExceeded, Segment, limited
from fast_litellm_shm.integrations.httpx import SharedLimitTimeout
from fast_litellm_shm.integrations.web import answer_429

Answer = tuple[int, Mapping[str, str], bytes]
Asked = Callable[[Segment, list[str]], list[Answer]]


def limits(segment: Segment, name: str, n: int = 1) -> Any:
    return limited(RateLimiter(FixedWindow(n, per=3600), name=f"secret {name}", segment=segment))


def busy() -> None:
    import httpx

    raise SharedLimitTimeout("secret", 7.2, httpx.Request("GET", "http://upstream"))


def never(segment: Segment) -> Any:
    """Costs more than the limit."""
    limiter = RateLimiter(FixedWindow(1, per=3600), name="never", segment=segment)
    return limited(limiter, cost=2)


def _starlette_client(app: Any, paths: list[str]) -> list[Answer]:
    from starlette.testclient import TestClient

    client = TestClient(app, raise_server_exceptions=False)
    found = [client.get(path) for path in paths]
    return [(each.status_code, each.headers, each.content) for each in found]


def ask_fastapi(segment: Segment, paths: list[str]) -> list[Answer]:
    from fastapi import FastAPI

    app = answer_429(FastAPI())

    @app.get("/sync")
    @limits(segment, "sync")
    def sync(q: str = "") -> str:
        return "found"

    @app.get("/async")
    @limits(segment, "async")
    async def get_async(q: str = "") -> str:
        return "found"

    @app.get("/never")
    @never(segment)
    async def get_never() -> str:
        return "found"

    @app.get("/busy")
    async def get_busy() -> None:
        busy()

    return _starlette_client(app, paths)


def ask_starlette(segment: Segment, paths: list[str]) -> list[Answer]:
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    @limits(segment, "sync")
    def sync(request: Any) -> PlainTextResponse:
        return PlainTextResponse("found")

    @limits(segment, "async")
    async def get_async(request: Any) -> PlainTextResponse:
        return PlainTextResponse("found")

    @never(segment)
    async def get_never(request: Any) -> PlainTextResponse:
        return PlainTextResponse("found")

    async def get_busy(request: Any) -> None:
        busy()

    views = {"/sync": sync, "/async": get_async, "/never": get_never, "/busy": get_busy}
    app = answer_429(Starlette(routes=[Route(path, view) for path, view in views.items()]))
    return _starlette_client(app, paths)


def ask_flask(segment: Segment, paths: list[str]) -> list[Answer]:
    from flask import Flask

    app = answer_429(Flask("limited"))

    @app.get("/sync")
    @limits(segment, "sync")
    def sync() -> str:
        return "found"

    @app.get("/async")
    @limits(segment, "async")
    async def get_async() -> str:
        return "found"

    app.add_url_rule("/never", view_func=never(segment)(lambda: "found"))
    app.add_url_rule("/busy", "busy", busy)
    client = app.test_client()
    found = [client.get(path) for path in paths]
    return [(each.status_code, each.headers, each.data) for each in found]


def ask_quart(segment: Segment, paths: list[str]) -> list[Answer]:
    from quart import Quart

    app = answer_429(Quart("limited"))

    @app.get("/sync")
    @limits(segment, "sync")
    def sync() -> str:
        return "found"

    @app.get("/async")
    @limits(segment, "async")
    async def get_async() -> str:
        return "found"

    app.add_url_rule("/never", "never", never(segment)(lambda: "found"))
    app.add_url_rule("/busy", "busy", busy)

    async def scenario() -> list[Answer]:
        client = app.test_client()
        found = [await client.get(path) for path in paths]
        return [(each.status_code, each.headers, await each.get_data()) for each in found]

    return asyncio.run(scenario())


def ask_litestar(segment: Segment, paths: list[str]) -> list[Answer]:
    from litestar import Litestar, get
    from litestar.testing import TestClient

    @get("/sync", sync_to_thread=False)
    @limits(segment, "sync")
    def sync() -> str:
        return "found"

    @get("/async")
    @limits(segment, "async")
    async def get_async() -> str:
        return "found"

    @get("/never")
    @never(segment)
    async def get_never() -> str:
        return "found"

    @get("/busy")
    async def get_busy() -> None:
        busy()

    handlers = [sync, get_async, get_never, get_busy]
    app = Litestar(handlers, on_app_init=[answer_429], logging_config=None)
    with TestClient(app, raise_server_exceptions=False) as client:
        found = [client.get(path) for path in paths]
        return [(each.status_code, each.headers, each.content) for each in found]


def ask_aiohttp(segment: Segment, paths: list[str]) -> list[Answer]:
    from aiohttp import web
    from aiohttp.test_utils import TestClient, TestServer

    @limits(segment, "async")
    async def get_async(request: web.Request) -> web.Response:
        return web.Response(text="found")

    @limits(segment, "sync")
    async def sync(request: web.Request) -> web.Response:  # it has async handlers only
        return web.Response(text="found")

    @never(segment)
    async def get_never(request: web.Request) -> web.Response:
        return web.Response(text="found")

    async def get_busy(request: web.Request) -> None:
        busy()

    async def scenario() -> list[Answer]:
        app = answer_429(web.Application())
        views: dict[str, Any] = {
            **{"/sync": sync, "/async": get_async, "/never": get_never, "/busy": get_busy}
        }
        app.add_routes([web.get(path, view) for path, view in views.items()])
        async with TestClient(TestServer(app)) as client:
            found = [await client.get(path) for path in paths]
            return [(each.status, each.headers, await each.read()) for each in found]

    return asyncio.run(scenario())


ANSWERS_429 = ["fast_litellm_shm.integrations.web.DjangoAnswer429"]


def _django(segment: Segment) -> Any:
    """The module of its URLs."""
    import django
    from django.conf import settings
    from django.http import HttpResponse
    from django.urls import path

    @limits(segment, "sync")
    def sync(request: Any) -> HttpResponse:
        return HttpResponse("found")

    @limits(segment, "async")
    async def get_async(request: Any) -> HttpResponse:
        return HttpResponse("found")

    @never(segment)
    def get_never(request: Any) -> HttpResponse:
        return HttpResponse("found")

    def get_busy(request: Any) -> None:
        busy()

    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            SECRET_KEY="x",
            ROOT_URLCONF=type("Urls", (), {"urlpatterns": []}),
        )
        django.setup()
    views = {"sync": sync, "async": get_async, "never": get_never, "busy": get_busy}
    return type("Urls", (), {"urlpatterns": [path(name, view) for name, view in views.items()]})


def ask_django(segment: Segment, paths: list[str]) -> list[Answer]:
    urls = _django(segment)
    from django.test import Client, override_settings

    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=ANSWERS_429):
        client = Client(raise_request_exception=False)
        found = [client.get(path) for path in paths]
        return [(each.status_code, each.headers, each.content) for each in found]


def ask_django_async(segment: Segment, paths: list[str]) -> list[Answer]:
    urls = _django(segment)
    from django.test import AsyncClient, override_settings

    async def scenario() -> list[Answer]:
        client = AsyncClient(raise_request_exception=False)
        found = [await client.get(path) for path in paths]
        return [(each.status_code, each.headers, each.content) for each in found]

    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=ANSWERS_429):
        return asyncio.run(scenario())


FRAMEWORKS: dict[str, Asked] = {
    "fastapi": ask_fastapi,
    "starlette": ask_starlette,
    "flask": ask_flask,
    "quart": ask_quart,
    "litestar": ask_litestar,
    "aiohttp": ask_aiohttp,
    "django": ask_django,
    "django async": ask_django_async,
}


@pytest.mark.parametrize("name", FRAMEWORKS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks' own
def test_429(name: str, segment: Segment) -> None:
    paths = ["/sync", "/sync", "/async", "/async", "/never", "/busy", "/sync"]
    answers = FRAMEWORKS[name](segment, paths)
    assert [status for status, _, _ in answers] == [200, 429, 200, 429, 429, 503, 429]
    for at in (1, 3):
        _, headers, body = answers[at]
        assert 3500 < int(headers["Retry-After"]) <= 3600
        assert headers["Content-Type"].startswith("application/problem+json")
        said = json.loads(body)
        assert (said["status"], said["retry-after"]) == (429, int(headers["Retry-After"]))
        assert said["detail"] == f"Too many requests. Try again in {headers['Retry-After']} s."
    assert "Retry-After" not in answers[4][1], "it never fits"
    assert "never fits" in json.loads(answers[4][2])["detail"]
    assert answers[5][1]["Retry-After"] == "8", "of an upstream: rounded up"
    assert not any(b"secret" in body for _, _, body in answers), "names and keys stay here"


def test_a_websocket_is_closed(segment: Segment) -> None:
    from fastapi import FastAPI, WebSocketDisconnect
    from starlette.testclient import TestClient

    app = answer_429(FastAPI())

    @app.websocket("/")
    @limits(segment, "websocket")
    async def serve(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    client = TestClient(app)
    with client.websocket_connect("/"):
        pass
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/"):
        raise AssertionError("it was let in")
    assert (refused.value.code, refused.value.reason) == (1013, "rate limit")


@pytest.mark.parametrize("wrong", [object(), lambda environ, start: [], RateLimitExceeded])
def test_what_is_no_application(wrong: Any) -> None:
    with pytest.raises(TypeError, match="takes an application of FastAPI, .*on_app_init"):
        answer_429(wrong)
