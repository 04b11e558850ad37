"""The WSGI middleware between wsgiref's validator and apps of each kind."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest

from fast_litellm_shm import Limit, Segment
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.integrations.wsgi import MARK, App, Environ, RateLimitMiddleware, Rule
from fast_litellm_shm.limits import InFlight

KEY = "192.0.2.7"


def hello(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("X-App", "1")])
    return [b"hello"]


def environ(**more: Any) -> Environ:
    found: Environ = {"REMOTE_ADDR": KEY, "QUERY_STRING": "", **more}
    setup_testing_defaults(found)
    return found


class Answer:
    """What a server is given; ``close()`` it, as a server does."""

    def __init__(self, app: App, **more: Any) -> None:
        self.environ = environ(**more)
        self.status, self.headers = "", dict[str, str]()
        self.body: Any = validator(app)(self.environ, self._start)

    def _start(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self.status, self.headers = status, dict(headers)
        return lambda data: None

    def read(self) -> bytes:
        try:
            return b"".join(iter(self.body))
        finally:
            self.close()

    def close(self) -> None:
        self.body.close()


def held(segment: Segment) -> int:
    limits = (InFlight(1),)
    shared = SharedLimits(limits, name="web: default", segment=segment, on_full="deny", keep=True)
    return int(lib.fshm_in_flight(shared._handle, KEY.encode(), len(KEY)))


def test_admitted_and_refused(segment: Segment) -> None:
    app = RateLimitMiddleware(hello, [Rule(Limit(1, 60))], name="web", segment=segment)
    answer = Answer(app)
    assert (answer.read(), answer.status) == (b"hello", "200 OK")
    assert answer.headers["X-App"] == "1"
    assert answer.headers["RateLimit-Policy"] == '"default";q=1;w=60'
    assert answer.environ[MARK].key == KEY
    refused = Answer(app)
    assert json.loads(refused.read())["status"] == 429
    assert refused.status == "429 Too Many Requests"
    assert refused.headers["Retry-After"] == "60"
    head = Answer(app, REQUEST_METHOD="HEAD")
    assert (head.read(), head.status) == (b"", "429 Too Many Requests")


def test_unlimited_is_untouched(segment: Segment) -> None:
    app = RateLimitMiddleware(hello, [Rule(path="/")], name="web", segment=segment)
    answer = Answer(app)
    assert answer.read() == b"hello"
    assert set(answer.headers) == {"Content-Type", "X-App"}
    assert MARK not in answer.environ


def test_what_the_app_says_itself_stands(segment: Segment) -> None:
    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("x-ratelimit-limit", "7")])
        return [b""]

    answer = Answer(RateLimitMiddleware(app, [Rule(Limit(9))], name="web", segment=segment))
    answer.close()
    assert answer.headers["x-ratelimit-limit"] == "7"
    assert "X-RateLimit-Limit" not in answer.headers
    assert answer.headers["X-RateLimit-Remaining"] == "8"


def test_dry_run(segment: Segment) -> None:
    app = RateLimitMiddleware(hello, [Rule(Limit(1), dry_run=True)], name="web", segment=segment)
    assert [Answer(app).read() for _ in range(2)] == [b"hello"] * 2
    last = Answer(app)
    last.close()
    assert last.headers["X-RateLimit-Dry-Run"] == "denied"


# permits ------------------------------------------------------------------------------------------


def in_flight(app: App, segment: Segment) -> RateLimitMiddleware:
    return RateLimitMiddleware(
        app, [Rule(in_flight=1, busy_status=503)], name="web", segment=segment
    )


class Body:
    """A body whose close() is seen, and may fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.closed, self._error = False, error

    def __iter__(self) -> Iterator[bytes]:
        yield b"part"
        yield b"part"

    def close(self) -> None:
        self.closed = True
        if self._error is not None:
            raise self._error


def test_a_permit_is_held_until_the_server_closes(segment: Segment) -> None:
    body = Body()

    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return body

    middleware = in_flight(app, segment)
    answer = Answer(middleware)
    assert next(iter(answer.body)) == b"part"
    assert held(segment) == 1
    busy = Answer(middleware)
    assert busy.status == "503 Service Unavailable"
    kind = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
    assert json.loads(busy.read())["type"] == kind
    answer.close()  # in mid-body: the client has gone
    assert body.closed
    assert held(segment) == 0


def test_a_permit_ends_where_the_app_fails(segment: Segment) -> None:
    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise ValueError("the app failed")

    for _ in range(2):
        with pytest.raises(ValueError, match="the app failed"):
            Answer(in_flight(app, segment))
        assert held(segment) == 0


def test_a_permit_ends_where_the_body_fails(segment: Segment) -> None:
    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"part"
        raise ValueError("the body failed")

    answer = Answer(in_flight(app, segment))
    with pytest.raises(ValueError, match="the body failed"):
        answer.read()
    assert held(segment) == 0


def test_a_permit_ends_where_close_fails(segment: Segment) -> None:
    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return Body(ValueError("close failed"))

    answer = Answer(in_flight(app, segment))
    with pytest.raises(ValueError, match="close failed"):
        answer.read()
    assert held(segment) == 0


def test_an_error_after_the_beginning(segment: Segment) -> None:
    """exc_info is handed on, so that the server can tell that headers were sent already."""
    seen = []

    def app(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            raise ValueError
        except ValueError as error:
            information = (type(error), error, error.__traceback__)
            start_response("500 Error", [("Content-Type", "text/plain")], information)
        return [b""]

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        seen.append((status, exc_info is not None, "RateLimit" in dict(headers)))
        return lambda data: None

    middleware = RateLimitMiddleware(app, [Rule(Limit(9))], name="web", segment=segment)
    list(middleware(environ(), start))
    assert seen == [("200 OK", False, True), ("500 Error", True, True)]
