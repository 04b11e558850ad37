"""The limits of web requests over many hosts: as on one, and no event loop waits for the server."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from fastapi import Depends, FastAPI
from support import servers
from support.damage import damage_limits
from support.names import remove, unique_name
from support.served import Stream, ask, ask_of_several, gunicorn, opened, served, uvicorn
from support.waiting import PATIENCE, ticking, wait_until, wait_until_async

from fast_litellm_shm import (
    ConcurrencyLimiter,
    Limit,
    RateLimiter,
    RateLimitExceeded,
    Segment,
    SlidingWindow,
    Window,
    limited,
)
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.exceptions import SegmentFullError
from fast_litellm_shm.integrations import asgi, wsgi
from fast_litellm_shm.integrations.fastapi import RateLimit
from fast_litellm_shm.integrations.web import Outcome, Rule
from fast_litellm_shm.integrations.web.gate import Gate
from fast_litellm_shm.integrations.web.request import Request

KEY = "192.0.2.7"
LONG = 30.0  # a time-out that nothing here reaches


def gate(segment: Segment, url: str, *rules: Rule, **more: Any) -> Gate[None]:
    given: dict[str, Any] = {"name": "web", "cluster": Cluster(url, timeout=LONG)}
    return Gate(None, rules, segment=segment, **(given | more))


def asked(gate: Gate[None], path: str = "/", client: str = KEY) -> Outcome:
    outcome = gate.check(Request("GET", path, client, None))
    assert outcome is not None
    return outcome


async def asked_async(gate: Gate[None], path: str = "/") -> Outcome:
    outcome = await gate.check_async(Request("GET", path, KEY, None))
    assert outcome is not None
    return outcome


# each way in ---------------------------------------------------------------------------------


Ask = Callable[[], int]


def by_wsgi(segment: Segment, **more: Any) -> Ask:
    def hello(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [b"hello"]

    app = wsgi.RateLimitMiddleware(
        hello, [Rule(Window(10, per=3600))], name="shop", segment=segment, **more
    )

    def ask_it() -> int:
        found: list[str] = []
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/", "REMOTE_ADDR": KEY}
        b"".join(app(environ, lambda status, headers: found.append(status)))
        return int(found[0][:3])

    return ask_it


def _by_httpx(app: Any) -> Ask:
    async def ask_it() -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return (await client.get("/")).status_code

    return lambda: asyncio.run(ask_it())


def by_asgi(segment: Segment, **more: Any) -> Ask:
    async def hello(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"hello"})

    rules = [Rule(Window(10, per=3600))]
    return _by_httpx(asgi.RateLimitMiddleware(hello, rules, name="shop", segment=segment, **more))


def by_fastapi(segment: Segment, **more: Any) -> Ask:
    app = FastAPI()
    limit = RateLimit(Window(10, per=3600), segment=segment, **more)

    @app.get("/", dependencies=[Depends(limit)])
    async def hello() -> str:
        return "hello"

    return _by_httpx(app)


@pytest.mark.parametrize("named", ["variable", "argument"])
@pytest.mark.parametrize("way", [by_wsgi, by_asgi, by_fastapi])
def test_one_limit_over_two_hosts(
    server: servers.Server,
    segment: Segment,
    other: Segment,
    monkeypatch: pytest.MonkeyPatch,
    way: Callable[..., Ask],
    named: str,
) -> None:
    given = {"cluster": server.url} if named == "argument" else {}
    if named == "variable":
        monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    hosts = [way(each, **given) for each in (segment, other)]
    found = [host() for _ in range(15) for host in hosts]
    wait_until("both are refused", lambda: {429} == {host() for host in hosts})
    assert Counter(found)[200] == 10


@pytest.mark.parametrize("way", [by_wsgi, by_asgi, by_fastapi])
def test_this_host_alone(
    segment: Segment, other: Segment, monkeypatch: pytest.MonkeyPatch, way: Callable[..., Ask]
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", "redis://localhost:1")
    for host in [way(each, cluster=False) for each in (segment, other)]:
        assert Counter(host() for _ in range(15)) == {200: 10, 429: 5}


EXAMPLES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "asgi": (uvicorn("app:app"), ("fastapi", "uvicorn")),
    "wsgi": (gunicorn("app:app", "--threads", "4", "--preload"), ("flask", "gunicorn")),
}


def admits(paths: list[str], found: Counter[int]) -> bool:
    """Does any host admit another one? Beside, what it lies idle over is called back."""
    statuses = [ask(path, "/", X_Api_Key="k")[0] for path in paths]
    found.update(statuses)
    return 200 in statuses


@pytest.mark.parametrize("name", EXAMPLES)
def test_two_hosts_of_four_workers(name: str, server: servers.Server, segment_name: str) -> None:
    """The examples as they are, with one variable: 100 an hour, and three streams at once."""
    command, needs = EXAMPLES[name]
    with ExitStack() as stack:
        paths = []
        for host in (segment_name, unique_name("other")):
            stack.callback(remove, host)
            env = {"FAST_LITELLM_SHM_NAME": host, "FAST_LITELLM_SHM_CLUSTER": server.url}
            env["FAST_LITELLM_SHM_CLUSTER_TIMEOUT"] = str(servers.SLOWEST)
            paths.append(stack.enter_context(served(name, command, needs, host, env)))
        found: Counter[int] = Counter()
        for path in paths:
            answers = ask_of_several(path, "/", 20, 10, X_Api_Key="k")
            found.update(status for status, *_ in answers)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda path: ask(path, "/", X_Api_Key="k"), paths * 50))
            found.update(status for status, *_ in answers)
        assert found[429] == sum(found.values()) - found[200]
        wait_until("nothing is left", lambda: not admits(paths, found))
        assert found[200] == 100

        streams = [Stream(path) for path in (*paths, paths[0])]
        for each in streams:
            stack.callback(each.close)
        assert [each.status for each in streams] == [200, 200, 200]
        refused = [ask(path, "/stream") for path in paths]
        assert [status for status, *_ in refused] == [503, 503]
        assert all('"violated-policies": ["/stream"]' in body for _, body, _ in refused)
        streams[0].close()  # its client goes, and the other host may have one
        opened(paths[1]).close()


# the loop ------------------------------------------------------------------------------------


RULES = {
    "rates": Rule(Window(10, 3600), Limit(10, 3600)),
    "permits": Rule(in_flight=3),
    "both": Rule(SlidingWindow(10, 3600), in_flight=3),
}


@pytest.mark.parametrize("kind", RULES)
def test_the_loop_goes_on_while_the_server_is_asked(
    server: servers.Server, segment: Segment, kind: str
) -> None:
    rules = gate(segment, server.url, RULES[kind])

    async def scenario() -> None:
        server.freeze()
        task = asyncio.create_task(asked_async(rules))
        async with ticking() as ticks:
            await wait_until_async("the loop comes round", lambda: ticks() > 1000)
            assert not task.done()
            server.thaw()
            outcome = await task
        assert not outcome.denied and outcome.holds == (kind != "rates")
        outcome.release()

    asyncio.run(scenario())


@pytest.mark.parametrize("asks", ["permits", "rates"])
def test_cancelled_while_it_asks(
    server: servers.Server, segment: Segment, other: Segment, asks: str
) -> None:
    """It holds nothing: the one permit that there is comes over. What it charges is charged."""
    rule = Rule(Window(10, 3600), in_flight=1, cost=lambda r: int(r.path[1:]))
    first, second = (gate(each, server.url, rule) for each in (segment, other))
    if asks == "rates":  # a permit is granted, and some of the tokens
        asked(first, "/1").release()

    async def scenario() -> None:
        server.freeze()
        task = asyncio.create_task(asked_async(first, "/9"))
        async with ticking() as ticks:
            await wait_until_async("the loop comes round", lambda: ticks() > 200)
            assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        server.thaw()

        async def come_over() -> None:
            while not (outcome := await asked_async(second, "/0")).holds:
                await asyncio.sleep(0.01)
            outcome.release()

        await asyncio.wait_for(come_over(), PATIENCE)

    asyncio.run(scenario())


def test_a_decorated_function(server: servers.Server, segment: Segment, other: Segment) -> None:
    hosts = []
    for each in (segment, other):
        cluster = Cluster(server.url, timeout=LONG)
        limiter = RateLimiter(Window(10, 3600), name="calls", segment=each, cluster=cluster)

        @limited(limiter, key="k")
        async def work() -> int:
            return 1

        @limited(limiter, key="k")
        def work_now() -> int:
            return 1

        hosts.append((work, work_now))

    async def scenario() -> int:
        server.freeze()
        task = asyncio.create_task(hosts[0][0]())
        async with ticking() as ticks:
            await wait_until_async("the loop comes round", lambda: ticks() > 1000)
            assert not task.done()
            server.thaw()
            return await task

    assert asyncio.run(scenario()) == 1
    done = 1
    for _ in range(15):
        for _, work_now in hosts:
            try:
                done += work_now()
            except RateLimitExceeded:
                continue
    assert done == 10


# as on one host ------------------------------------------------------------------------------


def admitted(gate: Gate[None], path: str = "/") -> Outcome:
    """As soon as what another host does not use has come back."""
    found: list[Outcome] = []

    def admits() -> bool:
        found.append(asked(gate, path))
        return not found[-1].denied

    wait_until("it is admitted", admits)
    return found[-1]


def test_in_flight(server: servers.Server, segment: Segment, other: Segment) -> None:
    rule = Rule(Limit(100, 3600), in_flight=2, busy_status=503)
    first, second = (gate(each, server.url, rule) for each in (segment, other))
    held = [asked(first), asked(second)]
    assert [each.holds for each in held] == [True, True]
    for each in (first, second):
        refused = asked(each)
        assert refused.refused and not refused.holds and refused.status == 503
        assert refused.violated == "default 2 in flight"
        fields = dict(refused.headers())
        assert (fields["RateLimit"], fields["Retry-After"]) == ('"default 2 in flight";r=0', "1")
        assert "The limit is 2 in flight." in refused.detail
    held[0].release()
    held[0].release()
    held[0] = admitted(second)
    assert held[0].decision is not None and isinstance(held[0].decision.limit, Limit)
    for outcome in held:
        outcome.release()


def test_a_request_waits_for_a_permit_of_another_host(
    server: servers.Server, segment: Segment, other: Segment
) -> None:
    rule = Rule(Limit(100), in_flight=1, wait=PATIENCE)
    here, there = gate(segment, server.url, rule), gate(other, server.url, rule)

    async def main() -> None:
        for _ in range(2):
            held = await asked_async(there)
            assert held.holds
            thread = asyncio.create_task(asyncio.to_thread(asked, here))
            task = asyncio.create_task(asked_async(here))
            await asyncio.sleep(0.2)
            assert not thread.done() and not task.done()
            held.release()
            done, _ = await asyncio.wait([thread, task], return_when=asyncio.FIRST_COMPLETED)
            first = next(iter(done)).result()
            assert first.holds and len(done) == 1
            first.release()
            for each in await asyncio.gather(thread, task):
                each.release()

    asyncio.run(main())


def test_permits_alone(server: servers.Server, segment: Segment) -> None:
    rules = gate(segment, server.url, Rule(in_flight=1))
    held = asked(rules)
    policy = '"default";q=1;qu="concurrent-requests"'
    assert held.holds and held.headers() == [("RateLimit-Policy", policy)]
    assert dict(asked(rules).headers())["RateLimit"] == '"default";r=0'
    held.release()


def test_costs(server: servers.Server, segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    """An int counts for each rate; of a tuple there is one for each, and none for the permits."""

    def cost(request: Request) -> Any:
        return tuple(int(each) for each in request.path[1:].split(","))

    rates = Window(2, 3600), Window(1000, 3600)
    rule = Rule(*rates, cost=cost, in_flight=9)
    rules = gate(segment, server.url, rule, name="a", on_cost_error="count")
    outcomes = [asked(rules, path) for path in ("/1,900", "/1,200", "/1,100", "/1,0")]
    assert [each.violated for each in outcomes] == [
        None,
        "default 1000/3600s window",
        None,
        "default 2/3600s window",
    ]
    assert "function failed" not in caplog.text  # (threads of other tests tell of their servers)
    for path in ("/1,1,1", "/1", "/-1,1", "/many,1"):
        outcome = asked(rules, path, client="198.51.100.1")
        assert outcome.key == "198.51.100.1"
        outcomes.append(outcome)
    assert [each.denied for each in outcomes[-4:]] == [False, False, True, True]
    assert "its cost function failed" in caplog.text
    many = gate(segment, server.url, Rule(Window(10, 3600), Window(99, 3600), cost=5), name="b")
    assert [asked(many).denied for _ in range(3)] == [False, False, True]
    for each in outcomes:
        each.release()


def of_limit(outcome: Outcome) -> tuple[str, int, int]:
    """The limit that RateLimit names, what is left of it, and for how many minutes."""
    fields = dict(outcome.headers())
    found = re.fullmatch(r'"(.*)";r=(\d+);t=(\d+)', fields["RateLimit"])
    assert found and found[2] == fields["X-RateLimit-Remaining"]
    return found[1], int(found[2]), round(int(found[3]) / 60)


def test_fields_are_of_the_limit_that_they_name(
    server: servers.Server, segment: Segment, other: Segment
) -> None:
    """Also where the answer comes from what the host was granted."""
    limits = Window(20, 3600), Limit(10_000, 50, burst=5000), Window(10**6, 86400)
    rules = gate(segment, server.url, Rule(*limits, cost=lambda r: int(r.path[1:]), name="r"))
    window = "r 20/3600s window"
    found = [of_limit(asked(rules, "/1")) for _ in range(10)]
    assert found == [(window, left, 60) for left in range(19, 9, -1)]
    assert server.calls() < 10
    assert of_limit(asked(rules, "/15")) == (window, 10, 60)
    burst = "r 60/3600s burst 2"
    rule = Rule(Window(1000, 86400), Limit(60, 3600, burst=2), name="r")
    rules = gate(other, server.url, rule, name="b")
    found = [of_limit(asked(rules)) for _ in range(3)]
    assert found == [(burst, 1, 1), (burst, 0, 2), (burst, 0, 1)]


def test_limits_that_are_changed_meanwhile(server: servers.Server, segment: Segment) -> None:
    rules = gate(segment, server.url, Rule(Limit(10), in_flight=5))
    asked(rules).release()
    RateLimiter(Limit(20), name="web: default", segment=segment, cluster=server.url)
    ConcurrencyLimiter(7, name="web: default (parallel)", segment=segment, cluster=server.url)
    asked(rules).release()
    outcome = asked(rules)
    outcome.release()
    fields = dict(outcome.headers())
    assert "q=20" in fields["RateLimit-Policy"] and "q=7" in fields["RateLimit-Policy"]
    assert fields["X-RateLimit-Limit"] == "20"


def test_dry_run(
    server: servers.Server, segment: Segment, other: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fast_litellm_shm")
    rule = Rule(Window(1, 3600), in_flight=5, dry_run=True)
    first, second = (gate(each, server.url, rule) for each in (segment, other))
    outcomes = [asked(first), asked(second)]
    assert [(each.denied, each.refused) for each in outcomes] == [(False, False), (True, False)]
    assert outcomes[1].headers() == [("X-RateLimit-Dry-Run", "denied")]
    assert "would have refused" in caplog.text
    outcomes[0].release()


@pytest.mark.parametrize("policy", ["deny", "allow", "local"])
def test_outages(server: servers.Server, segment: Segment, policy: str) -> None:
    """By the cluster's policy; on_error is for what cannot be checked. One host of one, so that its
    share is all of it."""
    cluster = Cluster(server.url, on_outage=policy, timeout=0.2)
    rule = Rule(Window(10, 3600), Limit(100, 3600), in_flight=3)
    rules = gate(segment, server.url, rule, cluster=cluster, on_error="allow")
    asked(rules, client="other").release()
    wait_until("the leader has told how many hosts are", lambda: host_count(segment) == 1)
    server.kill()

    async def scenario() -> list[Outcome]:
        found = []
        for _ in range(30):
            found.append(await asked_async(rules))
            found[-1].release()
        return found

    outcomes = asyncio.run(scenario())
    admitted = sum(not each.denied for each in outcomes)
    assert admitted == {"deny": 0, "allow": 30, "local": 10}[policy]
    for each in outcomes:
        assert each.decision is not None
        if each.refused:
            assert each.status == 429 and int(dict(each.headers())["Retry-After"]) >= 1


@pytest.mark.parametrize("damaged", [0, 4], ids=["rates", "permits"])
@pytest.mark.parametrize(("on_error", "refused"), [("deny", True), ("allow", False)])
def test_what_cannot_be_checked(
    server: servers.Server,
    segment: Segment,
    on_error: str,
    refused: bool,
    damaged: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And where it is the rates, the permit is given back."""
    rules = gate(segment, server.url, Rule(Limit(20), in_flight=2), on_error=on_error)
    asked(rules).release()
    damage_limits(segment, damaged)
    for outcome in (asked(rules), asyncio.run(asked_async(rules))):
        assert (outcome.decision, outcome.refused, outcome.status) == (None, refused, 503)
        assert not outcome.holds
    assert "cannot be checked" in caplog.text


@pytest.mark.parametrize(("on_error", "refused"), [("deny", True), ("allow", False)])
def test_a_segment_that_is_full(
    server: servers.Server,
    segment_name: str,
    on_error: str,
    refused: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Of permits, which it has no room for. Rates are asked of the server then, each request."""
    full = Segment(segment_name, capacity=1)

    def key(request: Request) -> str:
        return request.path

    permits = gate(full, server.url, Rule(in_flight=1, key=key), name="a", on_error=on_error)
    outcomes: list[Outcome] = []
    while not outcomes or outcomes[-1].decision is not None:
        assert len(outcomes) < 2000
        outcomes.append(asked(permits, f"/{len(outcomes)}"))
    assert (outcomes[-1].refused, outcomes[-1].status) == (refused, 429)
    (told,) = (each for each in caplog.records if "cannot be checked" in each.getMessage())
    assert told.exc_info is not None and isinstance(told.exc_info[1], SegmentFullError)
    rates = gate(full, server.url, Rule(Window(1, 3600), key=key), name="b")
    found = [asked(rates, f"/{i // 2}").denied for i in range(200)]
    assert found == [False, True] * 100
    for each in outcomes:
        each.release()


# made ----------------------------------------------------------------------------------------


def test_names_that_are_too_long(segment: Segment) -> None:
    url = "redis://localhost"
    for in_flight, room in ((None, 86), (1, 75)):
        with pytest.raises(ValueError, match=f"more than {room} bytes; give the rule a shorter"):
            gate(segment, url, Rule(Limit(5), name="x" * (room + 1), in_flight=in_flight), name="")
        with pytest.raises(ValueError, match=f"more than {room} bytes; give the rule a shorter"):
            gate(segment, url, Rule(Limit(5), name="x" * (room - 4), in_flight=in_flight))
        gate(segment, url, Rule(Limit(5), name="x" * (room - 5), in_flight=in_flight))
    limits = Window(10**6, 31_536_000), Limit(10**6, 86_400, burst=999), Window(10**5, 2_678_400)
    RateLimit(*limits, segment=segment, cluster=url)


def test_servers_that_cannot_be_used(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error when it is made, and not at the first request."""
    local = "redis://localhost"
    with pytest.raises(ValueError, match="Cluster: url must begin with one of"):
        gate(segment, local, Rule(Limit(5)), cluster="http://localhost")
    with pytest.raises(TypeError, match="cluster must be a URL, a Cluster, False or None"):
        gate(segment, local, Rule(Limit(5)), cluster=5)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", local)
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ImportError, match="need the redis library: pip install"):
        Gate(None, [Rule(Limit(5))], name="web", segment=segment)
    Gate(None, [Rule(path="/free")], name="web", segment=segment)  # it has no limits
