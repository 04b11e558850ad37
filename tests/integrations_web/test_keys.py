"""Whom a request counts for: addresses, proxies, headers; and which rule is asked."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fast_litellm_shm import Limit
from fast_litellm_shm.integrations.web import Rule, client_address, forwarded_for, header, keys
from fast_litellm_shm.integrations.web.request import AsgiRequest, Request, WsgiRequest


def asgi(
    path: str = "/", method: str = "GET", client: str | None = "192.0.2.7", **headers: str
) -> AsgiRequest:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    found = None if client is None else (client, 1234)
    return AsgiRequest({"path": path, "method": method, "client": found, "headers": raw})


def wsgi(path: str = "/", **more: str) -> WsgiRequest:
    return WsgiRequest({"REQUEST_METHOD": "get", "PATH_INFO": path, "REMOTE_ADDR": "::1", **more})


ADDRESSES = {
    "192.0.2.7": "192.0.2.7",
    "2001:db8:1:2:3::4": "2001:db8:1:2::/64",
    "2001:db8:1:2::ffff": "2001:db8:1:2::/64",
    "fe80::1%eth0": "fe80::/64",
    "::ffff:192.0.2.7": "192.0.2.7",
    "not an address": "not an address",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_client_address(address: str) -> None:
    assert client_address(asgi(client=address)) == ADDRESSES[address]


def test_no_address_is_told_once() -> None:
    with pytest.warns(RuntimeWarning, match="all clients count as one; use forwarded_for"):
        assert client_address(asgi(client=None)) == "unknown"
    assert client_address(asgi(client=None)) == "unknown"  # an error, if it warned again


def test_an_address_that_is_empty() -> None:
    scope = {"path": "/", "method": "GET", "client": ("", 0), "headers": []}
    assert AsgiRequest(scope).client is None


def test_what_is_no_address_is_not_kept() -> None:
    """Clients that write long ones must not fill the memory of the workers."""
    before = keys._read.cache_info().currsize
    for i in range(100):
        assert forwarded_for(1)(asgi(x_forwarded_for=f"{i:>50000}")) == "192.0.2.7"
    assert keys._read.cache_info().currsize <= before + 1


# proxies, X-Forwarded-For, and whom that counts for; the connection is 192.0.2.7's
FORWARDED = [
    (1, "203.0.113.5", "203.0.113.5"),
    (1, "1.1.1.1, 203.0.113.5", "203.0.113.5"),  # the client wrote 1.1.1.1 himself
    (1, "1.1.1.1,2.2.2.2,3.3.3.3,203.0.113.5", "203.0.113.5"),
    (2, "1.1.1.1, 203.0.113.5, 10.0.0.1", "203.0.113.5"),
    (2, "203.0.113.5", "192.0.2.7"),  # it has not passed both
    (1, "", "192.0.2.7"),
    (1, "unknown", "192.0.2.7"),
    (1, "203.0.113.5:4711", "203.0.113.5"),
    (1, '"[2001:db8::1]:4711"', "2001:db8::/64"),
    (1, "203.0.113.5, \x00\x7f", "192.0.2.7"),
]


@pytest.mark.parametrize(("proxies", "value", "key"), FORWARDED)
def test_forwarded_for(proxies: int, value: str, key: str) -> None:
    assert forwarded_for(proxies)(asgi(x_forwarded_for=value)) == key


def test_forwarded_for_in_several_lines() -> None:
    """A client that sends a line of its own does not hide that of the proxy."""
    raw = [(b"X-Forwarded-For", b"1.1.1.1"), (b"x-forwarded-for", b"203.0.113.5")]
    request = AsgiRequest({"path": "/", "method": "GET", "client": None, "headers": raw})
    assert forwarded_for(1)(request) == "203.0.113.5"


@pytest.mark.parametrize("proxies", [0, -1])
def test_forwarded_for_without_proxies(proxies: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        forwarded_for(proxies)
    with pytest.raises(TypeError, match="must be an int"):
        forwarded_for("1")  # type: ignore[arg-type]


def test_header() -> None:
    key = header("X-Api-Key")
    assert key(asgi(x_api_key="k1")) == "x-api-key=k1"
    assert key(asgi(x_api_key="192.0.2.7")) != key(asgi()) == "192.0.2.7"
    assert header("X-Api-Key", missing=lambda request: None)(asgi()) is None
    hashed = header("Authorization", hashed=True)(asgi(authorization="Bearer secret"))
    assert re.fullmatch("authorization=[0-9a-f]{32}", str(hashed))


def test_headers_of_wsgi() -> None:
    request = wsgi(HTTP_X_API_KEY="k1", CONTENT_TYPE="text/plain", SCRIPT_NAME="/mount")
    assert request.header("x-api-key") == "k1"
    assert request.header("Content-Type") == "text/plain"
    assert request.header("x-other") is None
    assert (request.method, request.path) == ("GET", "/mount/")
    assert wsgi("/caf\xc3\xa9").path == "/café"  # PEP 3333: bytes as latin-1


PATHS = [
    ("/v1/chat", "/v1/chat", True),
    ("/v1/chat", "/v1/chat/", False),
    ("/v1/*", "/v1/", True),
    ("/v1/*", "/v1/a/b", True),
    ("/v1/*", "/v1", False),
    ("/users/{id}", "/users/7", True),
    ("/users/{id}", "/users/7/x", False),
    ("/users/{id}", "/users/", False),
    ("/users/{id}/*", "/users/7/x/y", True),
    ("/a.b+c", "/a.b+c", True),
    ("/a.b+c", "/axb+c", False),
    ("*", "/anything\n at all", True),
    ("/*/files/*/download", "/a/b/files/c/d/download", True),
    ("/*/files/*/download", "/a/files/download", False),
    ("/*a{x}b*c", "/-aab-b-c", True),
    ("/{a}-{b}.{c}", "/x--y.z", True),
    ("/{a}-{b}.{c}", "/x-y/z.z", False),
    ("/{a}{b}", "/x", False),
    ("/v1/chat", "/v1/chat\n", True),  # /v1/chat%0A: Starlette takes it for /v1/chat
    ("/v1/chat", "/v1/chat\n\n", False),
    (re.compile("/v[12]"), "/v1\n", True),
    (re.compile("/v[12]/.*"), "/v2/x", True),
    (re.compile("/v[12]"), "/v2/x", False),
    (None, "/", True),
]


@pytest.mark.parametrize(("path", "asked", "matches"), PATHS)
def test_paths(path: Any, asked: str, matches: bool) -> None:
    assert Rule(Limit(1), path=path).matches(asgi(asked)) is matches


@pytest.mark.parametrize("path", ["/*/files/*/x/*/y", "/*a*b*c", "/{a}-{b}-{c}/x", "/{a}{b}{c}/x"])
def test_long_paths_take_no_time(path: str) -> None:
    """A client chooses it. To try all places took minutes, in which the worker answers nobody."""
    rule = Rule(Limit(1), path=path)
    for part in ("/files/x", "a", "-"):
        assert not rule.matches(asgi("/" + part * (60_000 // len(part)) + "/"))


def test_what_is_exempt_is_that_path_alone() -> None:
    assert Rule(path="/health").matches(asgi("/health"))
    assert not Rule(path="/health").matches(asgi("/health\n"))


def test_methods() -> None:
    rule = Rule(Limit(1), methods=["get", "POST"])
    found = {m: rule.matches(asgi(method=m)) for m in ("GET", "HEAD", "POST", "PUT")}
    assert found == {"GET": True, "HEAD": True, "POST": True, "PUT": False}


def test_names() -> None:
    assert Rule(Limit(1)).name == "default"
    assert Rule(Limit(1), path="/v1/*", methods={"POST", "GET"}).name == "GET POST /v1/*"
    assert Rule(Limit(1), path="/é").name == r"'/\xe9'"


BAD: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((5,), {}, "limits must be Limit, Window or SlidingWindow, not 5"),
    ((Limit(1),) * 5, {}, "a limiter takes 1 to 4 limits, not 5"),
    ((Limit(1),) * 4, {"in_flight": 1}, "at most 4 limits, in_flight among them, not 5"),
    ((), {"path": "v1"}, "path must begin with '/', not 'v1'"),
    ((), {"path": 5}, "path must be a str or a compiled pattern of str, not 5"),
    ((), {"path": re.compile(b"/"), "name": "x"}, "compiled pattern of str, not re.compile(b'/')"),
    ((), {"path": "/files/{p:path}"}, "path '/files/{p:path}' has braces that are no {name}"),
    ((), {"path": "/users/<int:id>"}, "has braces that are no {name}; write {name} for one"),
    ((), {"exempt": [5]}, "key must be a str or bytes, not 5"),
    ((), {"methods": "GET"}, "methods must be a set or list of names, not one str"),
    ((), {"exempt": "root"}, "exempt must be a set or list of names, not one str"),
    ((), {"key": "ip"}, "key must be a function of a request, not 'ip'"),
    ((), {"cost": -1}, "cost must be an int of 0 or more"),
    ((Limit(1),), {"cost": (1, 2)}, "cost has 2 values for 1 limits"),
    ((), {"in_flight": 0}, "in_flight must be between 1 and 100,000, not 0"),
    ((), {"busy_status": 500}, "busy_status must be 429 or 503, not 500"),
    ((), {"name": "a\nb"}, "name must be printable ASCII"),
]


@pytest.mark.parametrize(("limits", "arguments", "message"), BAD)
def test_bad_rules(limits: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Rule(*limits, **arguments)


def test_a_request_shows_itself() -> None:
    assert repr(Request("GET", "/", None, None)) == "Request(GET '/' from None)"
