"""SlowAPI on ``shm://``. Its sdist has no tests: these are ours, on what its repository's ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peers.timeline import Timeline
from slowapi import Limiter, _rate_limit_exceeded_handler
from slowapi.errors import RateLimitExceeded
from slowapi.middleware import SlowAPIASGIMiddleware, SlowAPIMiddleware
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.testclient import TestClient

import fast_litellm_shm.integrations.limits  # noqa: F401 - registers shm://

STRATEGIES = ["fixed-window", "moving-window", "sliding-window-counter"]
Build = Callable[..., tuple[Any, Any]]


def _key(request: Request) -> str:
    return request.headers.get("x-key", "k")


@pytest.fixture(params=[SlowAPIMiddleware, SlowAPIASGIMiddleware])
def build(request: pytest.FixtureRequest, segment_name: str) -> Build:
    def made(**options: Any) -> tuple[Any, Any]:
        uri = f"shm://{segment_name}?capacity=1000"
        limiter = Limiter(key_func=_key, storage_uri=uri, **options)
        app = Starlette()
        app.state.limiter = limiter
        app.add_exception_handler(RateLimitExceeded, _rate_limit_exceeded_handler)
        app.add_middleware(request.param)
        return app, limiter

    return made


def _route(app: Any, path: str, *limits: Any) -> None:
    async def answer(request: Request) -> Response:
        return PlainTextResponse("done")

    answer.__name__ = f"answer_{path.strip('/')}"
    for limit in limits:
        answer = limit(answer)
    app.add_route(path, answer)


def _statuses(client: Any, path: str, times: int, **headers: str) -> list[int]:
    return [client.get(path, headers=headers).status_code for _ in range(times)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_costs(build: Build, strategy: str) -> None:
    """With a fraction too, which memory:// takes: 6 of its own tests ask for 5 * 1.5."""
    app, limiter = build(strategy=strategy)
    _route(app, "/whole", limiter.limit("50/day", cost=10))
    cost = lambda request: int(request.headers["foo"]) * 1.5  # noqa: E731
    _route(app, "/fraction", limiter.limit("50/day", cost=cost))
    client = TestClient(app)
    assert _statuses(client, "/whole", 7) == [200] * 5 + [429] * 2
    assert _statuses(client, "/fraction", 8, foo="5") == [200] * 6 + [429] * 2


def test_shared_limits_count_together_and_keys_apart(build: Build) -> None:
    app, limiter = build()
    shared = limiter.shared_limit("5/hour", scope="both")
    _route(app, "/a", shared)
    _route(app, "/b", shared)
    client = TestClient(app)
    assert _statuses(client, "/a", 3) + _statuses(client, "/b", 3) == [200] * 5 + [429]
    assert _statuses(client, "/b", 1, **{"x-key": "other"}) == [200]


def test_all_of_several_limits_hold(build: Build) -> None:
    app, limiter = build()
    _route(app, "/", limiter.limit("4/minute"), limiter.limit("2/second"))
    client = TestClient(app)
    with Timeline().freeze() as timeline:
        assert _statuses(client, "/", 2) == [200, 200]
        assert _statuses(client, "/", 3, **{"x-key": "other"}) == [200, 200, 429]
        timeline.forward(1)
        assert _statuses(client, "/", 2) == [200, 200]
        timeline.forward(1)
        assert _statuses(client, "/", 1) == [429]
        timeline.forward(58)
        assert _statuses(client, "/", 2) == [200, 200]


def test_headers(build: Build) -> None:
    app, limiter = build(headers_enabled=True)
    _route(app, "/", limiter.limit("3/minute"))
    client = TestClient(app)
    with Timeline().freeze() as timeline:
        seen = [client.get("/") for _ in range(4)]
        left = [answer.headers["x-ratelimit-remaining"] for answer in seen]
        assert left == ["2", "1", "0", "0"]
        assert seen[-1].status_code == 429
        assert seen[-1].headers["x-ratelimit-limit"] == "3"
        assert 59 <= int(seen[-1].headers["retry-after"]) <= 61
        timeline.forward(30)
        assert 29 <= int(client.get("/").headers["retry-after"]) <= 31


def test_default_limits_exempt_routes_and_reset(build: Build) -> None:
    app, limiter = build(default_limits=["2/hour"])
    _route(app, "/limited")
    _route(app, "/free", limiter.exempt)
    client = TestClient(app)
    assert _statuses(client, "/limited", 3) == [200, 200, 429]
    assert _statuses(client, "/free", 5) == [200] * 5
    limiter.reset()
    assert _statuses(client, "/limited", 1) == [200]
