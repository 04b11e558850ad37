"""fast-shm dashboard: what its server answers, and whom it refuses."""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from support.waiting import wait_until  # noqa: E402

for _needed in ("starlette", "uvicorn"):
    pytest.importorskip(_needed, reason=f"not installed: {_needed}")

from support.dashboard import Dashboard  # noqa: E402
from support.puppets import Puppet  # noqa: E402
from support.waiters import waiters  # noqa: E402

from fast_litellm_shm import ConcurrencyLimiter, Limit, RateLimiter, Segment  # noqa: E402
from fast_litellm_shm._shared.wait_queue import ALIKE, Order  # noqa: E402

from .conftest import Command  # noqa: E402

PAGE = ["/", "/page.css", "/page.js", "/icon.svg"]
HOSTILE = ["<script>alert(1)</script>", "\x1b[2J", "\u202eevil", "' onload='", "</script>&amp;"]


@pytest.fixture
def puppet(segment: Segment) -> Iterator[Puppet]:
    made = Puppet(segment.name)
    yield made
    made.end()


@pytest.fixture
def dashboard(segment: Segment) -> Iterator[Dashboard]:
    with Dashboard(segment.name) as made:
        yield made


def until(dashboard: Dashboard, true: Any, **query: str) -> dict[str, Any]:
    """The first look of which this is true."""
    found: dict[str, Any] = {}

    def look() -> Any:
        found.clear()
        found.update(dashboard.snapshot(**query))
        return true(found)

    wait_until(lambda: f"the look that is waited for; the last: {found}", look, every=0.02)
    return found


def test_a_look(dashboard: Dashboard, puppet: Puppet) -> None:
    puppet("acquire", "chat", ["a"], 13)
    puppet("acquire", "wide", ["b"], 5)
    puppet("hold", "m")

    def all_is_seen(found: dict[str, Any]) -> bool:
        """By each part of it: a look that began earlier may read its parts over a time."""
        told = [sum(key[what] for key in found["keys"]) for what in ("admitted", "denied")]
        return told == [15, 3] and found["admitted"]["total"] == 15 and bool(found["permits"])

    found = until(dashboard, all_is_seen)
    keys = {key["key"]: key for key in found["keys"]}
    assert (keys["a"]["admitted"], keys["a"]["denied"], keys["a"]["limiter"]) == (10, 3, "chat")
    assert (keys["a"]["remaining"], keys["a"]["limit"]) == (0, 10)
    assert [worker["pid"] for worker in found["workers"]] == [puppet.pid]
    assert (found["in_flight"], found["permits"][0]["key"]) == (1, "m")
    assert (found["keys_total"], found["keys_fitting"]) == (2, 2)
    assert [k["key"] for k in dashboard.snapshot(sort="key", reverse="1")["keys"]] == ["b", "a"]
    only = dashboard.snapshot(match="A", top="1")
    assert ([k["key"] for k in only["keys"]], only["keys_fitting"]) == (["a"], 1)
    assert dashboard.snapshot(top="0")["keys"] == []


def test_callers_that_wait(dashboard: Dashboard, segment: Segment) -> None:
    gpu = ConcurrencyLimiter(1, name="gpu", segment=segment)
    with gpu.acquire("m\x1b"):
        assert until(dashboard, lambda found: found["in_flight"])["waiting"] == []
        with waiters(gpu, "m\x1b", ALIKE, ALIKE, Order(7)):
            found = until(dashboard, lambda found: found["callers"] == 3)
        assert found["waiting_total"] == 2
        rows = {row["tenant"]: row for row in found["waiting"]}
        assert rows[None]["callers"] == 2 and rows[None]["pids"] == [os.getpid()]
        assert rows["#0000000000000007"]["key"] == "m\\x1b"
        until(dashboard, lambda found: not found["callers"])


def test_hostile_names(dashboard: Dashboard, segment: Segment) -> None:
    limiter = RateLimiter(Limit(5, 3600), name="<b>t", segment=segment)
    for key in HOSTILE:
        limiter.acquire(key)
    found = until(dashboard, lambda found: len(found["keys"]) == len(HOSTILE))
    shown = {key["key"] for key in found["keys"]}
    assert {"<script>alert(1)</script>", "\\x1b[2J", "\\u202eevil"} <= shown
    _, headers, _ = dashboard.ask("/api/snapshot")
    assert headers["Content-Type"] == "application/json"


def test_what_is_held_is_bounded(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=5000)
    limiter = ConcurrencyLimiter(2, name="gpu", segment=segment)
    held = [limiter.acquire(f"user-{i}") for i in range(1000)] + [limiter.acquire("user-777")]
    with Dashboard(segment.name) as dashboard:
        found = until(dashboard, lambda found: found["in_flight"] == len(held))
    for permit in held:
        permit.release()
    assert found["permits_total"] == 1000
    assert len(found["permits"]) == 200
    assert found["permits"][0]["key"] == "user-777"  # the fullest first


@pytest.mark.parametrize("path", [*PAGE, "/api/snapshot", "/nothing"])
def test_headers(dashboard: Dashboard, path: str) -> None:
    status, headers, body = dashboard.ask(path, Origin="https://evil.example")
    assert status == (404 if path == "/nothing" else 200) and body
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert not [name for name in headers if name.lower().startswith("access-control")]
    assert "server" not in {name.lower() for name in headers}


def test_the_page_asks_nobody_else(dashboard: Dashboard) -> None:
    for path in PAGE:
        text = dashboard.ask(path)[2].replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "@import" not in text
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text and "eval(" not in text


def test_hosts(dashboard: Dashboard) -> None:
    """A name that leads here by a stranger's will (DNS rebinding) is refused."""
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:8099", "[::1]:8099", "[::1]", "192.0.2.7"):
        assert dashboard.ask("/api/snapshot", Host=host)[0] == 200, host
    for host in ("evil.example", "evil.example:8099", "localhost.evil.example", "1.2.3.4.evil", ""):
        status, headers, body = dashboard.ask("/api/snapshot", Host=host)
        assert (status, "--allow-host" in body) == (421, True), host
        assert "Content-Security-Policy" in headers and "keys" not in body


def test_a_host_that_is_allowed(segment: Segment) -> None:
    with Dashboard(segment.name, "--allow-host", "Ops.Example") as dashboard:
        assert dashboard.ask("/", Host="ops.example:8099")[0] == 200
        assert dashboard.ask("/", Host="x.ops.example")[0] == 421


@pytest.mark.parametrize("query", ["sort=x", "top=x", "top=-1", "top=501", "top=²", "top=9999999"])
def test_wrong_questions(dashboard: Dashboard, query: str) -> None:
    status, _, body = dashboard.ask(f"/api/snapshot?{query.replace('²', '%C2%B2')}")
    assert status == 400 and body.startswith(f"{query.split('=', maxsplit=1)[0]} must be")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_it_takes_nothing(dashboard: Dashboard, method: str) -> None:
    assert dashboard.ask("/api/snapshot", method)[0] == 405
    assert dashboard.ask("/", method)[0] == 405


def test_waits_for_a_segment(segment_name: str) -> None:
    with Dashboard(segment_name) as dashboard:
        found = until(dashboard, lambda found: "no segment" in (found["problem"] or ""))
        assert (found["segment"], found["keys"]) == (None, [])
        segment = Segment(segment_name, capacity=100)
        until(dashboard, lambda found: found["problem"] is None)
        segment.remove()
        again = Segment(segment_name, capacity=200)
        found = until(dashboard, lambda found: (found["segment"] or {}).get("capacity") == 200)
        assert "new segment" in found["notice"]
        RateLimiter(Limit(5, 3600), name="t", segment=again).acquire("k")
        until(dashboard, lambda found: [key["key"] for key in found["keys"]] == ["k"])


def test_beyond_this_host_is_warned_of(segment: Segment) -> None:
    with Dashboard(segment.name, "--host", "0.0.0.0") as dashboard:
        assert dashboard.url.startswith("http://127.0.0.1:")
        assert dashboard.ask("/")[0] == 200
    assert dashboard.errors.startswith("fast-shm: WARNING: ") and "ssh -L" in dashboard.errors
    with Dashboard(segment.name) as dashboard:
        pass
    assert dashboard.errors == ""


def test_no_descriptors_left(segment: Segment) -> None:
    """It says so once, with what to do, and answers again when there are some."""
    said = ""
    with Dashboard(segment.name) as dashboard:
        assert dashboard.ask("/")[0] == 200
        used = len(os.listdir(f"/proc/{dashboard.pid}/fd"))
        resource.prlimit(dashboard.pid, resource.RLIMIT_NOFILE, (used + 3, used + 3))
        idle = [socket.create_connection(("127.0.0.1", dashboard.port)) for _ in range(12)]
        while "cannot accept another connection" not in said:
            said = dashboard.said()
            assert said, "it has ended"
        for each in idle:
            each.close()
        until(dashboard, lambda found: found["problem"] is None)
    assert "no file descriptor left" in said and "ulimit -n" in said
    assert "cannot accept" not in dashboard.errors and "Traceback" not in dashboard.errors


def test_a_port_that_is_taken(fast_shm: Command, segment: Segment) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = fast_shm("dashboard", "--name", segment.name, "--port", port)
    assert done.returncode == 1 and f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "--port" in done.stderr and "Traceback" not in done.stderr


def test_an_address_that_is_none(fast_shm: Command, segment: Segment) -> None:
    for host in ("no such host", "203.0.113.7"):
        done = fast_shm("dashboard", "--name", segment.name, "--host", host, "--port", "0")
        assert done.returncode == 1 and "cannot listen on " in done.stderr
        assert host in done.stderr and "Traceback" not in done.stderr
