"""Whom a request counts for: addresses, proxies, headers; and which rule is asked."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fast_litellm_shm import Limit
from fast_litellm_shm.integrations.web import (
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
    keys,
)
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
        forwarded_for(True)


# who holds the connection, X-Forwarded-For, and whom that counts for
TRUSTED = ["10.0.0.5", "10.1.0.0/16", "2001:db8:7::/64"]
HOPS = [
    ("10.0.0.5", "203.0.113.5", "203.0.113.5"),
    ("10.0.0.5", "1.1.1.1, 203.0.113.5", "203.0.113.5"),  # the client wrote 1.1.1.1 himself
    ("10.0.0.5", "1.1.1.1, 203.0.113.5, 10.1.2.3", "203.0.113.5"),
    ("10.0.0.5", "1.1.1.1, 203.0.113.5, 10.1.2.3:80, [2001:db8:7::1]:80", "203.0.113.5"),
    ("10.0.0.5", "10.1.2.3", "10.1.2.3"),  # all are proxies: the farthest
    ("10.0.0.5", "", "10.0.0.5"),
    ("10.0.0.5", "203.0.113.5, unknown", "10.0.0.5"),
    ("10.0.0.5", "203.0.113.5, unknown, 10.1.2.3", "10.1.2.3"),
    ("::ffff:10.0.0.5", "2001:db8:1:2::9", "2001:db8:1:2::/64"),
    ("2001:db8:7::1", "203.0.113.5", "203.0.113.5"),
    ("198.51.100.9", "203.0.113.5", "198.51.100.9"),  # no proxy of ours
    ("10.0.0.6", "10.0.0.5", "10.0.0.6"),
    (None, "203.0.113.5", "unknown"),
]


@pytest.mark.parametrize(("client", "value", "key"), HOPS)
@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded"])
@pytest.mark.filterwarnings("ignore:rate limits by client_address:RuntimeWarning")
def test_the_rightmost_that_is_no_proxy(
    client: str | None, value: str, key: str, name: str
) -> None:
    if name == "Forwarded" and value:
        value = ", ".join(f'proto=https;For="{each.strip()}"' for each in value.split(","))
    request = asgi(client=client, **{name.replace("-", "_"): value})
    assert forwarded_for(TRUSTED, name=name)(request) == key


def test_a_proxy_on_a_unix_socket() -> None:
    request = asgi(client=None, x_forwarded_for="1.1.1.1, 203.0.113.5")
    assert forwarded_for(["unix:"])(request) == "203.0.113.5"
    assert forwarded_for("unix:")(request) == "203.0.113.5"


FORWARDED_7239 = [
    ("for=203.0.113.5;proto=http;by=10.0.0.5", "203.0.113.5"),
    ('For="[2001:db8:1::9]:4711"', "2001:db8:1::/64"),
    ('for=1.1.1.1, FOR = x, for="203.0.113.5"', "10.0.0.5"),  # no blanks around =
    ('for=1.1.1.1,for=203.0.113.5;host="a,for=9.9.9.9"', "203.0.113.5"),
    ('for="203.0.\\113.5"', "203.0.113.5"),
    ("for=203.0.113.5, by=10.0.0.5", "10.0.0.5"),
    ("for=203.0.113.5,", "10.0.0.5"),
    # What the client wrote would swallow what the proxy adds: none of it is believed.
    ('for="1.1.1.1, for=203.0.113.5', "10.0.0.5"),
    ('for=1.1.1.1;x=", for="203.0.113.5"', "10.0.0.5"),
    ('for="\\", for="203.0.113.5"', "10.0.0.5"),
    ("for=_hidden, for=203.0.113.5", "203.0.113.5"),
    ("for=203.0.113.5, for=_hidden", "10.0.0.5"),
    ("", "10.0.0.5"),
]


@pytest.mark.parametrize(("value", "key"), FORWARDED_7239)
def test_forwarded_of_rfc_7239(value: str, key: str) -> None:
    request = asgi(client="10.0.0.5", forwarded=value, x_forwarded_for="9.9.9.9")
    assert forwarded_for(TRUSTED, name="Forwarded")(request) == key


@settings(deadline=None)
@given(
    written=st.text('fFor=";,\\\\ :[]109.a\t', max_size=30),
    host=st.text('";,\\\\=for19. ', max_size=20),
)
@example(written='for="', host=";for=9.9.9.9,for=")
@example(written='for="\\', host=",for=9.9.9.9")
def test_what_a_client_writes_itself_chooses_no_key(written: str, host: str) -> None:
    """Whatever it puts before what the proxy adds, and into what the proxy tells of it."""
    request = asgi(client="10.0.0.5", x_forwarded_for=f"{written}, 203.0.113.5")
    assert forwarded_for(TRUSTED)(request) == "203.0.113.5"
    quoted = host.replace("\\", "\\\\").replace('"', '\\"')
    request = asgi(client="10.0.0.5", forwarded=f'{written}, for=203.0.113.5;host="{quoted}"')
    assert forwarded_for(TRUSTED, name="Forwarded")(request) in ("203.0.113.5", "10.0.0.5")


@pytest.mark.parametrize("value", [" " * 60_000 + "\x01", "a" * 60_000, 'a="' + "\\x" * 30_000])
def test_a_long_header_takes_no_time(value: str) -> None:
    request = asgi(client="10.0.0.5", forwarded=value)
    assert forwarded_for(TRUSTED, name="Forwarded")(request) == "10.0.0.5"


@pytest.mark.parametrize(
    "proxies", ["*", "0.0.0.0/0", "::/0", "128.0.0.0/1", "10.0.0.5/8", "1", ""]
)
def test_proxies_that_are_everybody_or_nobody(proxies: str) -> None:
    for named in (proxies, ["10.0.0.5", proxies]):
        with pytest.raises(ValueError, match=re.escape(f"{proxies!r} in trusted_proxies is")):
            forwarded_for(named)


def test_no_proxies() -> None:
    with pytest.raises(ValueError, match="trusted_proxies is empty"):
        forwarded_for([])
    with pytest.raises(TypeError, match="addresses and networks"):
        forwarded_for(None)  # type: ignore[arg-type]


def test_the_length_of_an_ipv6_prefix() -> None:
    request = asgi(client="2001:db8:1:2::9", x_forwarded_for="2001:db8:3:4::9")
    assert client_network(ipv6_prefix=48)(request) == "2001:db8:1::/48"
    assert client_network(ipv6_prefix=56)(asgi()) == "192.0.2.7"
    assert forwarded_for(1, ipv6_prefix=48)(request) == "2001:db8:3::/48"
    assert forwarded_for("2001:db8:1::/48", ipv6_prefix=128)(request) == "2001:db8:3:4::9/128"
    for bits in (0, 15, 129):
        with pytest.raises(ValueError, match=f"must be 16 to 128 bits, not {bits}"):
            client_network(ipv6_prefix=bits)
    with pytest.raises(TypeError, match="ipv6_prefix must be an int, not '64'"):
        forwarded_for(1, ipv6_prefix="64")  # type: ignore[arg-type]


def test_a_keyed_hash_of_a_header() -> None:
    """Whoever sees the segment, and not the secret, cannot try out guesses."""
    request = asgi(x_api_key="k1")
    first, same, other = (
        header("X-Api-Key", secret=secret)(request)
        for secret in ("0123456789abcdef", b"0123456789abcdef", "another 16 bytes")
    )
    assert re.fullmatch("x-api-key=[0-9a-f]{32}", str(first))
    assert first == same != other
    with pytest.raises(ValueError, match="16 bytes or more, not 5") as told:
        header("X-Api-Key", secret="short")
    assert "short" not in str(told.value)
    with pytest.raises(TypeError, match="secret must be a str or bytes$"):
        header("X-Api-Key", secret=5)  # type: ignore[arg-type]


def test_header() -> None:
    key = header("X-Api-Key")
    assert key(asgi(x_api_key="k1")) == "x-api-key=k1"
    assert key(asgi(x_api_key="192.0.2.7")) != key(asgi()) == "192.0.2.7"
    assert header("X-Api-Key", missing=lambda request: None)(asgi()) is None
    with pytest.warns(RuntimeWarning, match="without a secret: a reader of the hashes"):
        hashed = header("Authorization", hashed=True)(asgi(authorization="Bearer secret"))
    assert re.fullmatch("authorization=[0-9a-f]{32}", str(hashed))


def test_headers_of_wsgi() -> None:
    request = wsgi(HTTP_X_API_KEY="k1", CONTENT_TYPE="text/plain", SCRIPT_NAME="/mount")
    assert request.header("x-api-key") == "k1"
    assert request.header("Content-Type") == "text/plain"
    assert request.header("x-other") is None
    assert (request.method, request.mount, request.path) == ("GET", "/mount", "/")
    assert wsgi("/caf\xc3\xa9").path == "/café"  # PEP 3333: bytes as latin-1


PATHS = [
    ("/v1/chat", "/v1/chat", True),
    ("/v1/chat", "/v1/chat/", True),  # Litestar takes it for /v1/chat
    ("/v1/chat/", "/v1/chat", True),
    ("/v1/*", "/v1/", True),
    ("/v1/*", "/v1/a/b", True),
    ("/v1/*", "/v1", True),
    ("/v1/*", "/v", False),
    ("/users/{id}", "/users/7", True),
    ("/users/{id}", "/users/7/x", False),
    ("/users/{id}", "/users/", True),  # Falcon: the id is empty
    ("/users/{id}", "/users", False),
    ("/users/{id}/*", "/users/7/x/y", True),
    ("/a.b+c", "/a.b+c", True),
    ("/a.b+c", "/axb+c", False),
    ("*", "/anything\n at all", True),
    ("/*/files/*/download", "/a/b/files/c/d/download", True),
    ("/*/files/*/download", "/a/files/download", False),
    ("/*a{x}b*c", "/-aab-b-c", True),
    ("/{a}-{b}.{c}", "/x--y.z", True),
    ("/{a}-{b}.{c}", "/x-y/z.z", False),
    ("/{a}{b}", "/x", True),  # the second is empty
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
    for odd in ("/health\n", "/health/", "//health", "/x/../health", "/%68ealth"):
        assert not Rule(path="/health").matches(asgi(odd))


def test_methods() -> None:
    rule = Rule(Limit(1), methods=["get", "POST"])
    found = {m: rule.matches(asgi(method=m)) for m in ("GET", "HEAD", "POST", "PUT")}
    assert found == {"GET": True, "HEAD": True, "POST": True, "PUT": False}


def test_names() -> None:
    assert Rule(Limit(1)).name == "default"
    assert Rule(Limit(1), path="/v1/*", methods={"POST", "GET"}).name == "GET POST /v1/*"
    assert Rule(Limit(1), path="/é").name == r"'/\xe9'"


BAD: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((5,), {}, "limits must be TokenBucket, FixedWindow or SlidingWindow, not 5"),
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
