"""What does a middleware add to a request, over the application that answers “hello” alone?

ASGI and WSGI, called as a server calls them, by 100 clients in turn: under one rule for all; and
under the last of 100 rules, whose paths have names in them. And by a middleware that finds the
client's address and adds two fixed headers, and checks nothing: the least that one in Python can
take. All in one process, interleaved, in time of the processor: what another process takes does
not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from typing import Any

from bench import peers
from bench.result import OURS, REFERENCE, Plot, Ratio, Result, Row, Settings, Values, asked
from bench.timing import calls_in
from fast_litellm_shm import TokenBucket
from fast_litellm_shm.integrations import asgi, wsgi

LIMIT = TokenBucket(10**9, per=60)  # which nobody meets
CLIENTS = [f"10.0.0.{i}" for i in range(100)]
RULES = 100
#: µs over the bare application.
TARGETS = {"ASGI, one rule": 4.0, f"ASGI, {RULES} rules": 6.0, "WSGI, one rule": 3.0}
_SLICE_NS, _QUICK_SLICE_NS = 4_000_000, 1_000_000


def rules_of(count: int) -> list[asgi.Rule]:
    """So many, of which the last matches."""
    named = [asgi.Rule(LIMIT, path=f"/api/v1/kind{i}/{{id}}") for i in range(count - 1)]
    return [*named, asgi.Rule(LIMIT, name="all")]


async def _asgi_app(scope: Any, receive: Any, send: Any) -> None:
    fields = [(b"content-type", b"text/plain"), (b"content-length", b"6")]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": b"hello\n"})


def _wsgi_app(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "6")])
    return [b"hello\n"]


FIELDS = [("RateLimit-Policy", '"all";q=1000000000;w=60'), ("RateLimit", '"all";r=999999999;t=60')]
RAW = [(name.lower().encode(), value.encode()) for name, value in FIELDS]


class _HeadersOnly:
    """Of ASGI. Without classes and checks of arguments: what is left is what ASGI asks for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["key"] = scope["client"][0]

        def sending(message: Any) -> Any:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *RAW]}
            return send(message)

        await self._app(scope, receive, sending)


class _WsgiHeadersOnly:
    def __init__(self, app: Any) -> None:
        self._app = app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        environ["key"] = environ["REMOTE_ADDR"]

        def starting(status: str, headers: Any, exc_info: Any = None) -> Any:
            return start_response(status, [*headers, *FIELDS], exc_info)

        return self._app(environ, starting)


def _finished(steps: Coroutine[Any, Any, None]) -> None:
    """Run what waits for nothing."""
    try:
        steps.send(None)
    except StopIteration:
        return
    raise RuntimeError("a request waited")


def _asgi_loop(app: Any) -> Callable[[int], None]:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start" and message["status"] != 200:
            raise AssertionError(f"answered {message['status']}")

    async def requests(calls: int) -> None:
        fields = [(b"host", b"bench"), (b"accept", b"*/*")]
        for i in range(calls):
            scope = {
                **{"type": "http", "method": "GET", "path": "/hello", "raw_path": b"/hello"},
                **{"root_path": "", "query_string": b"", "headers": fields},
                "client": (CLIENTS[i % 100], 1234),
            }
            await app(scope, receive, send)

    return lambda calls: _finished(requests(calls))


def _wsgi_loop(app: Any) -> Callable[[int], None]:
    def start(status: str, headers: Any, exc_info: Any = None) -> None:
        if not status.startswith("200"):
            raise AssertionError(f"answered {status}")

    def loop(calls: int) -> None:
        for i in range(calls):
            environ = {
                **{"REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/hello"},
                **{"QUERY_STRING": "", "REMOTE_ADDR": CLIENTS[i % 100], "HTTP_HOST": "bench"},
            }
            app(environ, start)

    return loop


def run(settings: Settings) -> Result:
    """Measure."""
    result = asked(__doc__)
    with peers.Place() as place:
        given: dict[str, Any] = {"segment": place.segment()}
        loops = {"ASGI, bare": _asgi_loop(_asgi_app), "WSGI, bare": _wsgi_loop(_wsgi_app)}
        loops["ASGI, headers only"] = _asgi_loop(_HeadersOnly(_asgi_app))
        loops["WSGI, headers only"] = _wsgi_loop(_WsgiHeadersOnly(_wsgi_app))
        for count, shown in ((1, "one rule"), (RULES, f"{RULES} rules")):
            found = rules_of(count)
            limited = asgi.RateLimitMiddleware(_asgi_app, found, name=f"asgi {count}", **given)
            loops[f"ASGI, {shown}"] = _asgi_loop(limited)
            app = wsgi.RateLimitMiddleware(_wsgi_app, found, name=f"wsgi {count}", **given)
            loops[f"WSGI, {shown}"] = _wsgi_loop(app)
        slice_ns = settings.pick(_SLICE_NS, _QUICK_SLICE_NS)
        calls = {name: calls_in(loop, slice_ns) for name, loop in loops.items()}
        took: dict[str, list[float]] = {name: [] for name in loops}
        for _ in range(settings.rounds):
            for name, loop in loops.items():
                start = time.thread_time_ns()
                loop(calls[name])
                took[name].append((time.thread_time_ns() - start) / calls[name] / 1e3)
    for name, values in took.items():
        group, _, what = name.partition(", ")
        who = REFERENCE if what in ("bare", "headers only") else OURS
        result.rows.append(Row(name, "µs", Values(values), who, group))
        if who == OURS:
            pairs = zip(values, took[f"{group}, bare"], strict=True)
            added = Values(with_it - bare for with_it, bare in pairs)
            target = TARGETS.get(name)
            pairs = zip(took[f"{group}, headers only"], took[f"{group}, bare"], strict=True)
            least = Values(with_it - bare for with_it, bare in pairs).median
            why = (
                f"a middleware that only adds two fields adds {least:.1f} µs; the rest is what a "
                "rule promises: one spelling of the path, the client's key, the check, and the "
                "fields of its result"
            )
            result.ratios.append(
                Ratio(
                    f"{name}, adds", added, target, False, "µs", promise="web middleware", why=why
                )
            )
    result.plots.append(
        Plot(
            "web_cost",
            "bars",
            "A request, with a middleware and without",
            ("ASGI", "WSGI"),
            "microseconds a request",
            log_value=False,
        )
    )
    return result
