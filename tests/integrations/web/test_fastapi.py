"""The FastAPI dependency, in a FastAPI app."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import httpx
import pytest
from fastapi import (
    APIRouter,
    Depends,
    FastAPI,
    Header,
    HTTPException,
    Response,
    Security,
    WebSocket,
    WebSocketDisconnect,
)
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.security import APIKeyHeader
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse
from support.waiting import PATIENCE

from fast_litellm_shm import Limit, Segment, Window
from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Rule
from fast_litellm_shm.integrations.fastapi import MARK, Outcome, RateLimit, header
from fast_litellm_shm.integrations.web.request import Request


def asked(app: FastAPI, *paths: str, **more: Any) -> list[httpx.Response]:
    async def ask() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return [await client.request(*path.split(), **more) for path in paths]

    return asyncio.run(ask())


def statuses(app: FastAPI, *paths: str, **more: Any) -> list[int]:
    return [answer.status_code for answer in asked(app, *paths, **more)]


def test_requests_that_wait(segment: Segment) -> None:
    """All are served, those of higher priority first; beyond max_waiting they are refused."""
    app, served = FastAPI(), list[str]()
    limit = RateLimit(
        Limit(4, per=1, burst=1),
        key=lambda _: "all",
        wait=PATIENCE,
        priority=lambda request: int(request.header("X-Priority") or 0),
        max_waiting=4,
        segment=segment,
    )

    @app.get("/search", dependencies=[Depends(limit)])
    async def search(x_priority: Annotated[str, Header()] = "") -> None:
        served.append(x_priority)

    async def ask_all() -> list[int]:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(priority: int) -> int:
                headers = {"X-Priority": str(priority)}
                return (await client.get("/search", headers=headers)).status_code

            return await asyncio.gather(*map(ask, [0, 0, 5, 0, 9, 0, 0]))

    assert sorted(asyncio.run(ask_all())) == [200] * 5 + [429] * 2
    assert served == ["0", "9", "5", "0", "0"]


def test_headers_and_refusal(segment: Segment) -> None:
    app = FastAPI()
    limit = RateLimit(Window(2, 60), name="search", segment=segment)

    @app.get("/search", dependencies=[Depends(limit)])
    async def search() -> str:
        return "found"

    first, second, third = asked(app, *["GET /search"] * 3)
    assert (first.status_code, second.status_code, third.status_code) == (200, 200, 429)
    assert first.headers["RateLimit-Policy"] == '"search";q=2;w=60'
    assert first.headers["X-RateLimit-Remaining"] == "1"
    assert "Retry-After" not in first.headers
    assert third.headers["Retry-After"] == "60"
    assert third.headers["RateLimit"] == '"search";r=0;t=60'
    assert third.headers["Content-Type"] == "application/json"
    assert third.json() == {"detail": "The limit is 2/60s window. Try again in 60 s."}


def test_a_key_that_was_checked_and_another_line_of_its_header(segment: Segment) -> None:
    """FastAPI checks the first line. The others are the client's, and new each time."""
    app, scheme = FastAPI(), APIKeyHeader(name="X-Api-Key")

    def checked(key: str = Security(scheme)) -> None:
        if key != "good":
            raise HTTPException(401)

    limit = RateLimit(Window(2, 60), key=header("X-Api-Key"), segment=segment)

    @app.get("/", dependencies=[Depends(checked), Depends(limit)])
    async def index() -> str:
        return "found"

    def ask(*lines: str) -> int:
        return asked(app, "GET /", headers=[("X-Api-Key", each) for each in lines])[0].status_code

    assert [ask("good", f"{n}") for n in range(4)] == [200, 200, 429, 429]
    assert [ask("good") for _ in range(3)] == [200, 200, 429]


def test_headers_show_no_name_of_the_segment(segment: Segment) -> None:
    """Without a name of its own, a dependency once told clients ``each route + 2/60s window``."""
    app = FastAPI()
    limits = RateLimit(Window(2, 60), Limit(9, 60), segment=segment)

    @app.get("/search", dependencies=[Depends(limits)])
    async def search() -> str:
        return "found"

    (answer,) = asked(app, "GET /search")
    names = '"default 2/60s window";q=2;w=60, "default 9/60s";q=9;w=60'
    assert answer.headers["RateLimit-Policy"] == names
    assert "route" not in str(answer.headers)


def test_each_route_counts_apart_or_not(segment: Segment) -> None:
    app, router = FastAPI(), APIRouter(prefix="/api")
    shared = Depends(RateLimit(Limit(1, 60), name="shared", segment=segment))

    for path, limit in {"/a": None, "/b": None, "/c": shared, "/d": shared}.items():
        own = limit or Depends(RateLimit(Limit(1, 60), segment=segment))

        @router.get(path, dependencies=[own])
        async def get(item: int = 0) -> int:
            return item

    @router.post("/a", dependencies=[Depends(RateLimit(Limit(1, 60), segment=segment))])
    async def post() -> None: ...

    app.include_router(router)
    each = ["GET /api/a", "GET /api/b", "POST /api/a", "GET /api/a?item=1"]
    assert statuses(app, *each) == [200, 200, 200, 429]
    assert statuses(app, "GET /api/c", "GET /api/d") == [200, 429]


def search_app(segment: Segment) -> FastAPI:
    app = FastAPI()

    @app.get("/search", dependencies=[Depends(RateLimit(Limit(1, 60), segment=segment))])
    async def search() -> None: ...

    return app


def test_a_mount_point_that_the_client_names_is_one(segment: Segment) -> None:
    outer = FastAPI()
    outer.mount("/t/{tenant}", search_app(segment))
    assert statuses(outer, "GET /t/a/search", "GET /t/b/search", "GET /t/c/search") == [
        200,
        429,
        429,
    ]


def test_mount_points_of_the_program_count_apart(segment: Segment) -> None:
    outer, middle, inner = FastAPI(), FastAPI(), search_app(segment)
    outer.mount("/a", search_app(segment))
    outer.mount("/b", inner)
    middle.mount("/x/{x}", inner)
    outer.mount("/m/{m:path}/n", middle)
    once = ["GET /a/search", "GET /b/search", "GET /m/1/2/n/x/3/search"]
    assert statuses(outer, *once) == [200, 200, 200]
    assert statuses(outer, *once, "GET /m/4/n/x/5/search") == [429] * 4


def test_routers_that_are_included_twice(segment: Segment) -> None:
    app, router = FastAPI(), APIRouter()

    @router.get("/search", dependencies=[Depends(RateLimit(Limit(1, 60), segment=segment))])
    async def search() -> None: ...

    app.include_router(router, prefix="/v1")
    app.include_router(router, prefix="/of/{user}")
    paths = ["GET /v1/search", "GET /of/a/search", "GET /of/b/search", "GET /v1/search"]
    assert statuses(app, *paths) == [200, 200, 429, 429]
    outer = FastAPI()
    outer.mount("/t/{tenant}", app)
    assert statuses(outer, *(path.replace("/", "/t/a/", 1) for path in paths)) == [
        200,
        200,
        429,
        429,
    ]
    assert statuses(outer, "GET /t/b/v1/search") == [429]


@pytest.mark.filterwarnings("ignore:The `root_path` parameter")
@pytest.mark.parametrize("within", [True, False])
def test_a_path_with_the_root_path_and_without(segment: Segment, within: bool) -> None:
    app: Any = FastAPI(root_path="/api")

    @app.get("/login")
    async def login() -> None: ...

    rules: Any = {"rules": [Rule(Window(1, 60), path="/login")], "name": "x", "segment": segment}
    if within:
        app.add_middleware(RateLimitMiddleware, **rules)
    else:
        app = RateLimitMiddleware(GZipMiddleware(app), **rules)
    assert statuses(app, "GET /api/login", "GET /login") == [200, 429]


def test_a_name_made_of_long_limits(segment: Segment) -> None:
    limits: list[Any] = [
        Window(10**6, 31_536_000),
        Window(10**5, 2_678_400),
        Limit(10**6, 86_400, burst=999),
    ]
    app = FastAPI()

    @app.get("/", dependencies=[Depends(RateLimit(*limits, Limit(1, 60), segment=segment))])
    async def get() -> None: ...

    assert statuses(app, *["GET /"] * 2) == [200, 429]


def test_two_dependencies_of_a_route(segment: Segment) -> None:
    """The fields that are lists tell both; of the others the route's own stand, and once."""
    app = FastAPI(dependencies=[Depends(RateLimit(Limit(9, 60), name="all", segment=segment))])

    @app.get("/", dependencies=[Depends(RateLimit(Limit(5, 60), name="own", segment=segment))])
    async def get() -> None: ...

    (answer,) = asked(app, "GET /")
    assert answer.headers.get_list("X-RateLimit-Limit") == ["5"]
    assert answer.headers.get_list("X-RateLimit-Remaining") == ["4"]
    assert len(answer.headers.get_list("RateLimit")) == 2
    assert len(answer.headers.get_list("RateLimit-Policy")) == 2


def test_dependencies_of_other_limits_do_not_meet(segment: Segment) -> None:
    app = FastAPI()
    few, many = RateLimit(Limit(1), segment=segment), RateLimit(Limit(3), segment=segment)

    @app.get("/few", dependencies=[Depends(few)])
    async def get_few() -> None: ...

    @app.get("/many", dependencies=[Depends(many)])
    async def get_many() -> None: ...

    assert statuses(app, *["GET /many"] * 4) == [200, 200, 200, 429]
    assert statuses(app, *["GET /few"] * 2) == [200, 429]


def test_keys_costs_and_exempt_ones(segment: Segment) -> None:
    app = FastAPI()

    async def key(request: Request) -> Any:
        user = request.raw.query_params["user"]  # FastAPI's own request
        return int(user) if user.isdigit() else user

    limit = RateLimit(Limit(4), key=key, cost=lambda r: 2, exempt=["root"], segment=segment)

    @app.get("/", dependencies=[Depends(limit)])
    async def get() -> None: ...

    assert statuses(app, *["GET /?user=a"] * 3) == [200, 200, 429]
    assert statuses(app, "GET /?user=b", *["GET /?user=root"] * 4) == [200] * 5
    # no key: counted for the address
    assert statuses(app, *["GET /?user=5"] * 3) == [200, 200, 429]


def test_by_header(segment: Segment) -> None:
    app = FastAPI()
    limit = RateLimit(Limit(1), key=header("X-Api-Key"), segment=segment)

    @app.get("/", dependencies=[Depends(limit)])
    async def get() -> None: ...

    for key in ("a", "b"):
        assert statuses(app, *["GET /"] * 2, headers={"X-Api-Key": key}) == [200, 429]


RESOLVED: list[str] = []


def token(authorization: Annotated[str, Header()]) -> str:
    RESOLVED.append(authorization)
    return authorization


async def current_user(of: Annotated[str, Depends(token)]) -> dict[str, str]:
    if of == "bad":
        raise HTTPException(401)
    return {"name": of}


def user_name(user: Annotated[dict[str, str], Depends(current_user)]) -> str | None:
    return None if user["name"] == "root" else user["name"]


def test_the_key_is_a_dependency(segment: Segment) -> None:
    """FastAPI resolves it with all that it depends on, once for a request; OpenAPI has it."""
    app = FastAPI()
    RESOLVED.clear()
    limit = RateLimit(Limit(2), key=Depends(user_name), exempt=["ann"], segment=segment)

    @app.get("/", dependencies=[Depends(limit)])
    async def get(user: Annotated[dict[str, str], Depends(current_user)]) -> str:
        return user["name"]

    def ask(user: str, count: int) -> list[int]:
        return statuses(app, *["GET /"] * count, headers={"Authorization": user})

    assert ask("bob", 3) == [200, 200, 429]
    assert RESOLVED == ["bob"] * 3
    assert ask("eve", 1) == [200]
    assert ask("ann", 3) + ask("root", 3) == [200] * 6
    assert ask("bad", 1) == [401]
    assert statuses(app, "GET /") == [422], "without the header"
    (parameter,) = app.openapi()["paths"]["/"]["get"]["parameters"]
    assert parameter["name"] == "authorization"


def test_a_dependency_of_a_websocket_gives_the_key(segment: Segment) -> None:
    app = FastAPI()

    def user(name: str) -> str:
        return name

    limit = Depends(RateLimit(Window(1, 3600), key=Depends(user), segment=segment))

    @app.websocket("/ws", dependencies=[limit])
    async def serve(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close()

    client = TestClient(app)
    for name in ("ann", "bob"):
        with client.websocket_connect(f"/ws?name={name}"):
            pass
    with pytest.raises(WebSocketDenialResponse), client.websocket_connect("/ws?name=ann"):
        raise AssertionError("it was let in")


def test_dependencies_that_are_none(segment: Segment) -> None:
    def by_default(authorization: str = Depends(token)) -> str:
        return authorization

    for wrong in (by_default, user_name):
        with pytest.raises(TypeError, match=f"say key=Depends\\({wrong.__name__}\\)"):
            RateLimit(Limit(1), key=wrong, segment=segment)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"key=Depends\(\) names no dependency"):
        RateLimit(Limit(1), key=Depends(), segment=segment)


def test_the_outcome_is_the_dependency(segment: Segment) -> None:
    app = FastAPI()
    limit = RateLimit(Limit(1), dry_run=True, segment=segment)
    found: list[Outcome] = []

    @app.get("/")
    async def get(response: Response, outcome: Outcome = Depends(limit)) -> None:  # noqa: B008
        found.append(outcome)

    first, second = asked(app, *["GET /"] * 2)
    assert (first.status_code, second.status_code) == (200, 200)
    assert "X-RateLimit-Dry-Run" not in first.headers
    assert second.headers["X-RateLimit-Dry-Run"] == "denied"
    assert [each.denied for each in found] == [False, True]
    assert MARK == "fast_litellm_shm.rate_limit"


def test_without_limits() -> None:
    with pytest.raises(ValueError, match="at least one limit, such as TokenBucket"):
        RateLimit()


@pytest.mark.parametrize("answers", [True, False])
def test_the_handshake_of_a_websocket(segment: Segment, answers: bool) -> None:
    app = FastAPI()

    @app.websocket("/ws", dependencies=[Depends(RateLimit(Window(1, 3600), segment=segment))])
    async def serve(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        await websocket.close()

    async def plain(scope: Any, receive: Any, send: Any) -> None:  # a server without the extension
        await app({**scope, "extensions": {}}, receive, send)

    client = TestClient(app if answers else plain)
    with client.websocket_connect("/ws") as websocket:
        assert websocket.receive_text() == "hello"
    with pytest.raises(WebSocketDisconnect) as refused, client.websocket_connect("/ws"):
        raise AssertionError("it was let in")
    if answers:
        assert isinstance(refused.value, WebSocketDenialResponse)
        assert refused.value.status_code == 429
        assert int(refused.value.headers["retry-after"]) > 3000
    else:
        assert (refused.value.code, refused.value.reason) == (1013, "rate limit")
