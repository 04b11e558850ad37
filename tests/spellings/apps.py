"""One application in each framework, all with the same routes and rules, behind the middleware.

A server loads ``app``, of the kind that $KIND says. It hands each request, as it is, to the
application that the header X-App names. What a handler served is written to the file $SERVED: a
client that is cut off has been served all the same.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

from fast_litellm_shm import Window
from fast_litellm_shm.integrations import asgi as asgi_middleware
from fast_litellm_shm.integrations import wsgi as wsgi_middleware
from fast_litellm_shm.integrations.web import Request, Rule, forwarded_for

DAY = 86_400
ROOT = "/api"  # of the applications that have a root_path, and of servers that are given one
_served = os.open(os.environ["SERVED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def by(request: Request) -> str:
    """Each of the tests' keys is another client."""
    return request.header("X-Key") or "nobody"


def rules() -> list[Rule]:
    return [
        Rule(path="/ready"),
        Rule(path="/static/*"),
        Rule(Window(1, DAY), path="/login", key=by),
        Rule(Window(1, DAY), path="/users/{id}", key=by),
        Rule(Window(1, DAY), path="/files/*", key=by),
        Rule(Window(1_000_000, DAY), key=by),
    ]


def serve(handler: str, key: str) -> str:
    """What each handler does."""
    os.write(_served, f"{handler} {key}\n".encode())
    return f"served {handler}"


# WSGI --------------------------------------------------------------------------------------------


def flask_app(strict: bool) -> Any:
    from flask import Flask, request

    app = Flask("spelled", static_folder=None)
    app.url_map.strict_slashes = app.url_map.merge_slashes = strict

    def add(path: str, name: str) -> None:
        app.add_url_rule(path, name, lambda **_: serve(name, request.headers.get("X-Key", "")))

    for path, name in ROUTES.items():
        add(path.format(id="<id>", rest="<path:rest>"), name)
    return app


def bottle_app() -> Any:
    import bottle

    app = bottle.Bottle()

    def add(path: str, name: str) -> None:
        app.route(path, callback=lambda **_: serve(name, bottle.request.get_header("X-Key", "")))

    for path, name in ROUTES.items():
        add(path.format(id="<id>", rest="<rest:path>"), name)
    return app


def falcon_app(strict: bool, kind: str) -> Any:
    import falcon
    import falcon.asgi

    class Resource:
        def __init__(self, name: str) -> None:
            self.name = name

        def on_get(self, request: Any, response: Any, **_: Any) -> None:
            response.text = serve(self.name, request.get_header("X-Key") or "")

    class AsyncResource(Resource):
        async def on_get(self, request: Any, response: Any, **_: Any) -> None:  # type: ignore[override]
            response.text = serve(self.name, request.get_header("X-Key") or "")

    app: Any = falcon.App() if kind == "wsgi" else falcon.asgi.App()
    app.req_options.strip_url_path_trailing_slash = not strict
    for path, name in ROUTES.items():
        resource = Resource(name) if kind == "wsgi" else AsyncResource(name)
        app.add_route(path.format(id="{id}", rest="{rest:path}"), resource)
    return app


def _configure_django() -> None:
    import django
    from django.conf import settings
    from django.http import HttpResponse
    from django.urls import re_path

    def add(path: str, name: str) -> Any:
        return re_path(
            f"^{path[1:]}$", lambda r, **_: HttpResponse(serve(name, r.headers.get("X-Key", "")))
        )

    urls = [
        add(path.format(id="(?P<id>[^/]+)", rest="(?P<rest>.+)"), n) for path, n in ROUTES.items()
    ]
    if not settings.configured:
        settings.configure(
            ALLOWED_HOSTS=["*"],
            ROOT_URLCONF=type("Urls", (), {"urlpatterns": urls}),
            SECRET_KEY="x",
        )
        django.setup()


def django_wsgi() -> Any:
    _configure_django()
    from django.core.wsgi import get_wsgi_application

    return get_wsgi_application()


# ASGI --------------------------------------------------------------------------------------------


def django_asgi() -> Any:
    _configure_django()
    from django.core.asgi import get_asgi_application

    return get_asgi_application()


def quart_app() -> Any:
    from quart import Quart, request

    app = Quart("spelled", static_folder=None)
    app.url_map.strict_slashes = app.url_map.merge_slashes = False

    def add(path: str, name: str) -> None:
        async def view(**_: Any) -> str:
            return serve(name, request.headers.get("X-Key", ""))

        app.add_url_rule(path, name, view)

    for path, name in ROUTES.items():
        add(path.format(id="<id>", rest="<path:rest>"), name)
    return app


def _starlette_routes() -> Any:
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    def add(path: str, name: str) -> Any:
        async def view(request: Any) -> Any:
            return PlainTextResponse(serve(name, request.headers.get("X-Key", "")))

        return Route(path, view)

    return [add(path.format(id="{id}", rest="{rest:path}"), n) for path, n in ROUTES.items()]


def starlette_app() -> Any:
    from starlette.applications import Starlette

    return Starlette(routes=_starlette_routes())


def starlette_mounted() -> Any:
    """The middleware is within the mount, whose name the client chooses."""
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.routing import Mount

    limited = Middleware(asgi_middleware.RateLimitMiddleware, rules=rules(), name="mounted")
    inner = Starlette(routes=_starlette_routes(), middleware=[limited])
    return Starlette(routes=[Mount("/t/{tenant}", inner)])


def fastapi_app(root_path: str = "") -> Any:
    from fastapi import FastAPI
    from starlette.responses import PlainTextResponse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        app = FastAPI(root_path=root_path)

    def add(path: str, name: str) -> None:
        async def view(request: Any) -> Any:
            return PlainTextResponse(serve(name, request.headers.get("X-Key", "")))

        app.add_route(path, view)

    for path, name in ROUTES.items():
        add(path.format(id="{id}", rest="{rest:path}"), name)
    return app


def fastapi_within() -> Any:
    """The middleware stands within, and sees the root_path."""
    app = fastapi_app(ROOT)
    app.add_middleware(asgi_middleware.RateLimitMiddleware, rules=rules(), name="fastapi-within")
    return app


def fastapi_dependency() -> Any:
    """A dependency for each route, in a sub-application whose mount the client names."""
    from fastapi import Depends, FastAPI
    from fastapi import Request as FastAPIRequest

    from fast_litellm_shm.integrations.fastapi import RateLimit

    inner = FastAPI()

    def add(path: str, name: str) -> None:
        async def view(request: Any) -> str:
            return serve(name, request.headers.get("X-Key", ""))

        view.__annotations__["request"] = FastAPIRequest  # where no text could be resolved
        limit = RateLimit(Window(1, DAY), key=by)
        inner.add_api_route(path, view, dependencies=[Depends(limit)])

    for path, name in ROUTES.items():
        if name not in ("ready", "static", "root"):
            add(path.format(id="{id}", rest="{rest:path}"), name)
    outer = FastAPI()
    outer.mount("/t/{tenant}", inner)
    return outer


def litestar_app() -> Any:
    from litestar import Litestar, MediaType, get
    from litestar import Request as LitestarRequest

    def add(path: str, name: str) -> Any:
        async def view(request: Any) -> str:
            return serve(name, request.headers.get("X-Key", ""))

        view.__annotations__["request"] = LitestarRequest  # where no text could be resolved
        view.__annotations__["return"] = str
        return get(path, media_type=MediaType.TEXT, name=name)(view)

    handlers = [
        add(path.format(id="{id:str}", rest="{rest:path}"), n) for path, n in ROUTES.items()
    ]
    return Litestar(handlers, openapi_config=None)


#: Paths, and the names of their handlers.
ROUTES = {
    "/": "root",
    "/ready": "ready",
    "/static/{rest}": "static",
    "/login": "login",
    "/users/{id}": "users",
    "/files/{rest}": "files",
}
WSGI: dict[str, Callable[[], Any]] = {
    "flask": lambda: flask_app(True),
    "flask-lenient": lambda: flask_app(False),
    "django": django_wsgi,
    "bottle": bottle_app,
    "falcon": lambda: falcon_app(True, "wsgi"),
    "falcon-lenient": lambda: falcon_app(False, "wsgi"),
}
ASGI: dict[str, Callable[[], Any]] = {
    "quart": quart_app,
    "django": django_asgi,
    "starlette": starlette_app,
    "fastapi": fastapi_app,
    "fastapi-root": lambda: fastapi_app(ROOT),
    "litestar": litestar_app,
    "falcon": lambda: falcon_app(True, "asgi"),
    "falcon-lenient": lambda: falcon_app(False, "asgi"),
}
#: The middleware, or the dependency, is within.
WITHIN: dict[str, Callable[[], Any]] = {
    "fastapi-within": fastapi_within,
    "fastapi-dependency": fastapi_dependency,
    "starlette-mounted": starlette_mounted,
}


#: By the client's address, as a proxy on loopback tells it; by the header of that name.
ADDRESSED = {
    f"by {name}": [Rule(Window(1, DAY), key=forwarded_for("127.0.0.0/8", name=name))]
    for name in ("X-Forwarded-For", "Forwarded")
}


def _wsgi() -> Any:
    apps: dict[str, Any] = {
        name: wsgi_middleware.RateLimitMiddleware(make(), rules(), name=name)
        for name, make in WSGI.items()
    }

    for name, rules_ in ADDRESSED.items():
        apps[name] = wsgi_middleware.RateLimitMiddleware(flask_app(True), rules_, name=name)

    def application(environ: Any, start_response: Any) -> Any:
        return apps[environ["HTTP_X_APP"]](environ, start_response)

    return application


def _asgi() -> Any:
    apps: dict[str, Any] = {
        name: asgi_middleware.RateLimitMiddleware(make(), rules(), name=name)
        for name, make in ASGI.items()
    } | {name: make() for name, make in WITHIN.items()}
    for name, rules_ in ADDRESSED.items():
        apps[name] = asgi_middleware.RateLimitMiddleware(starlette_app(), rules_, name=name)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            name = next(value for name, value in scope["headers"] if name == b"x-app")
            await apps[name.decode()](scope, receive, send)
            return
        with contextlib.suppress(Exception):
            while (message := await receive())["type"] != "lifespan.shutdown":
                await send({"type": f"{message['type']}.complete"})
            await send({"type": "lifespan.shutdown.complete"})

    return application


logging.disable(logging.CRITICAL)  # of each request that is not found
app = _asgi() if os.environ["KIND"] == "asgi" else _wsgi()
