"""What a path may mean. (tests/spellings asks real servers and frameworks.)"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fast_litellm_shm import Window
from fast_litellm_shm.integrations.web import Rule, paths
from fast_litellm_shm.integrations.web.request import AsgiRequest, WsgiRequest

# As the server has it; the canonical form, which is one of its readings
CANONICAL = {
    "/login": "/login",
    "/login/": "/login/",
    "//login": "/login",
    "///a//b///": "/a/b/",
    "login": "/login",
    "": "/",
    "/./a/../b/.": "/b/",
    "/..": "/",
    "/a/..": "/",
    "/a/.../b": "/a/.../b",
    "/a/..b/.c": "/a/..b/.c",
    "//../x/../login": "/login",
    "http://x/login": "/login",
    "HTTP://x:80//login?x;y": "/login",
    "x:login": "/login",
    "\n http://x/login\n": "/login",
    "http://[x/login": "/http:/[x/login",  # no URL at all
    "/login\n": "/login",
    "/lo\ufffdgin": "/login",
    "/%6cogin": "/login",
    "/%256cogin": "/login",
    "/%2525%32%65./login": "/login",
    "/x%2f%2e%2e%2flogin": "/login",
    "/100%": "/100%",
    "/a b/\u00e9": "/a b/\u00e9",
}


@pytest.mark.parametrize("path", CANONICAL)
def test_the_canonical_form(path: str) -> None:
    found = paths.read(path)
    assert found.path == CANONICAL[path]
    assert found.routed[0] == path and found.path in found.routed
    assert len(found.routed) == 1 or paths._ODD.search(path)


def test_what_nobody_could_decode() -> None:
    assert "/login" in paths.read("/lo\udc80gin").routed


ABOVE = [
    # path, root_path, what it may be routed by among others
    ("/api/login", "/api", ["/login"]),
    ("/api/login", "/api/", ["/login"]),
    ("/login", "/api", ["/login"]),
    ("/api", "/api", ["/"]),
    ("/apilogin", "/api", ["/apilogin", "/login"]),  # Quart, Django
    ("/x/api/login", "/api", ["/x/api/login", "/login"]),  # Litestar
    ("//api/login", "/api", ["//api/login", "/login"]),
    ("/api//login", "/api", ["/login"]),
    ("/apihttp://x/login", "/api", ["/login"]),
    ("http://x/api/login", "/api", ["/login"]),
    ("/api/api/login", "/api", ["/api/login"]),
    ("/x/../api/login", "/api", ["/login"]),
]


@pytest.mark.parametrize(("path", "root", "routed"), ABOVE)
def test_below_a_root_path(path: str, root: str, routed: list[str]) -> None:
    scope = {"path": path, "root_path": root, "method": "GET", "headers": []}
    found = AsgiRequest(scope)
    assert set(found.readings.routed) >= set(routed)
    assert path in found.readings.routed + found.readings.aliases
    assert found.mount == root


def test_a_slash_that_is_none() -> None:
    """To what goes by the raw path, ``%2F`` is part of a name."""
    scope: dict[str, Any] = {"method": "GET", "headers": [], "path": "/users/a/b"}
    rule = Rule(Window(1, 60), path="/users/{id}")
    assert not rule.matches(AsgiRequest(scope))
    assert rule.matches(AsgiRequest({**scope, "raw_path": b"/users/a%2Fb?x"}))
    assert not rule.matches(AsgiRequest({**scope, "raw_path": b"/users/a/b?%2F"}))


def wsgi(mount: str, path: str) -> WsgiRequest:
    return WsgiRequest({"REQUEST_METHOD": "GET", "SCRIPT_NAME": mount, "PATH_INFO": path})


def test_the_mount_point_of_wsgi_is_no_part_of_the_path() -> None:
    """A proxy may pass on the SCRIPT_NAME that a client wrote: no rule can be got around by it,
    and none that exempts can be reached."""
    found = wsgi("/static", "/login")
    assert (found.path, found.mount) == ("/login", "/static")
    assert Rule(Window(1, 60), path="/login").matches(found)
    assert Rule(Window(1, 60), path="/static/login").matches(found)
    assert not Rule(path="/static/*").matches(found)
    assert Rule(path="/login").matches(found)
    assert Rule(Window(1, 60), path="/login").matches(wsgi("/x", "login"))
    assert Rule(Window(1, 60), path="/login").matches(wsgi("/x/", "//login"))


PIECES = [
    "/",
    "//",
    "a",
    "b",
    ".",
    "..",
    "/..",
    "%",
    "%2",
    "%25",
    "%2f",
    "\n",
    "\ufffd",
    "http://x",
    ":",
]


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join), st.sampled_from(["", "/a", "/a/b"])
)
def test_any_path_has_few_readings(path: str, mount: str) -> None:
    found = paths.read(path, mount)
    assert 1 <= len(found.routed) <= 80
    assert mount or found.path in found.routed
    assert len(set(found.routed + found.aliases)) == len(found.routed + found.aliases)
    below = paths.read(mount + path, mount, path)
    assert below.routed == paths.read(path).routed
    canonical = paths.read(path).path
    # One newline is cut, as `$` does; of two, the first stays.
    stable = "%" not in canonical and not canonical.endswith("\n")
    assert paths.read(canonical).path == canonical or not stable


@pytest.mark.parametrize(
    "piece", ["/", "/.", "/..", "%25", "\n", "a:", "\ufffd", "/a%2f..", "//a/.."]
)
def test_long_paths_take_no_time(piece: str) -> None:
    """A client chooses it, and the worker answers nobody meanwhile."""
    path = piece * (60_000 // len(piece))
    rules = [Rule(Window(1, 60), path=each) for each in ("/*/x/*/y", "/{a}/{b}/{c}/z")]
    for mount in ("", piece):
        readings = paths.read(path, mount)
        assert not any(rule.has(each) for rule in rules for each in readings.routed)
