"""Rules that let a request wait for its turn: in order, by priority and tenant, and not for a
client that has gone."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from integrations.web.test_gate import fails, gate, late, request, told_once
from integrations.web.test_gone import GONE, Server, client_that_goes, http, servers, serving
from support.served import ask
from support.waiting import PATIENCE, wait_until, wait_until_async

from fast_litellm_shm import ConcurrencyLimiter, Limit, Segment, Window
from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Receive, Scope, Send
from fast_litellm_shm.integrations.web import Outcome, Request, Rule
from fast_litellm_shm.integrations.web.gate import Gate

KEY = "192.0.2.7"


def permits(segment: Segment, name: str = "web: default", most: int = 1) -> ConcurrencyLimiter:
    """The permits of a rule."""
    return ConcurrencyLimiter(most, name=name, segment=segment)


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"wait": None}, TypeError, "wait must be a number of seconds, not None"),
    ({"wait": "5"}, TypeError, "wait must be a number of seconds, not '5'"),
    ({"wait": True}, TypeError, "wait must be a number of seconds, not True"),
    ({"wait": -1}, ValueError, "wait must be a number of seconds of 0 or more, not -1"),
    (
        {"wait": float("inf")},
        ValueError,
        "wait must be a number of seconds of 0 or more, not inf",
    ),
    ({"wait": 1, "in_flight": None}, ValueError, "wait is for rules with limits or in_flight"),
    ({"wait": 1, "tenant": "ann"}, TypeError, "tenant must be a function of a request, not 'ann'"),
    ({"wait": 1, "weight": 0}, ValueError, "weight must be 0.001 to 1000, not 0"),
    ({"wait": 1, "priority": 101}, ValueError, "priority must be -100 to 100, not 101"),
    ({"wait": 1, "max_waiting": -1}, ValueError, "max_waiting must be 0 or more, not -1"),
    ({"max_waiting": 5}, ValueError, "max_waiting is for requests that wait: add wait=5, or leave"),
    ({"priority": 5}, ValueError, "priority is for requests that wait: add wait=5, or leave"),
    ({"tenant": len}, ValueError, "tenant is for requests that wait: add wait=5, or leave"),
]


@pytest.mark.parametrize(("given", "kind", "said"), BAD, ids=lambda each: str(each)[:30])
def test_a_bad_argument_is_named(given: dict[str, Any], kind: type[Exception], said: str) -> None:
    with pytest.raises(kind) as caught:
        Rule(**{"in_flight": 1, **given})
    assert str(caught.value).startswith(f"Rule: {said}")


async def _check(rules: Gate[None], found: Request) -> Outcome:
    outcome = await rules.check_async(found)
    assert outcome is not None
    return outcome


def test_threads_and_tasks_wait_for_a_permit(segment: Segment) -> None:
    rules, limiter = gate(segment, Rule(in_flight=1, wait=PATIENCE)), permits(segment)
    got: list[str] = []

    def one() -> None:
        outcome = rules.check(request())
        assert outcome is not None and outcome.holds
        got.append("thread")
        outcome.release()

    async def main() -> None:
        held = limiter.acquire(KEY)
        thread = threading.Thread(target=one)
        thread.start()
        await wait_until_async("the thread waits", lambda: limiter.queue_size(KEY) == 1)
        task = asyncio.ensure_future(_check(rules, request()))
        await wait_until_async("both wait", lambda: limiter.queue_size(KEY) == 2)
        assert not got
        held.release()
        outcome = await task
        assert outcome.holds and got == ["thread"]
        outcome.release()
        await asyncio.to_thread(thread.join)

    asyncio.run(main())
    assert (limiter.in_flight(KEY), limiter.queue_size(KEY)) == (0, 0)


def test_who_does_not_come_in_time_is_refused(segment: Segment) -> None:
    rules = gate(segment, Rule(in_flight=1, wait=0.05, busy_status=503))
    with permits(segment).acquire(KEY):
        for outcome in (rules.check(request()), asyncio.run(_check(rules, request()))):
            assert outcome is not None and outcome.refused
            assert (outcome.status, outcome.retry_after) == (503, 1)
    assert permits(segment).queue_size(KEY) == 0


def test_who_comes_while_others_wait_stands_behind_them(segment: Segment) -> None:
    """Also where there is room at that moment."""
    rules, limiter = gate(segment, Rule(in_flight=1, wait=PATIENCE)), permits(segment)
    order: list[int] = []

    async def one(number: int) -> None:
        outcome = await _check(rules, request())
        order.append(number)
        outcome.release()

    async def main() -> None:
        held = limiter.acquire(KEY)
        first = asyncio.ensure_future(one(0))
        await wait_until_async("one waits", lambda: limiter.queue_size(KEY) == 1)
        held.release()
        await asyncio.gather(one(1), one(2), first)

    asyncio.run(main())
    assert order == [0, 1, 2]


def _of(path: str) -> tuple[str | None, int]:
    tenant, _, priority = path.strip("/").partition("-")
    return tenant or None, int(priority or 0)


async def _order(
    rules: Gate[None], limiter: ConcurrencyLimiter, key: str, paths: list[str]
) -> list[str]:
    """The order in which requests are served that came in this order."""
    held, served = limiter.acquire(key), list[str]()

    async def one(path: str) -> None:
        outcome = await _check(rules, request(path))
        served.append(path)
        outcome.release()

    tasks = []
    for path in paths:
        tasks.append(asyncio.ensure_future(one(path)))
        await wait_until_async("it waits", lambda: limiter.queue_size(key) == len(tasks))
    held.release()
    await asyncio.gather(*tasks)
    return served


def test_priorities_and_tenants_of_requests(segment: Segment) -> None:
    async def tenant(found: Request) -> str | None:
        return _of(found.path)[0]

    rule = Rule(
        in_flight=1,
        wait=PATIENCE,
        tenant=tenant,
        weight=lambda _: 2,
        priority=lambda found: _of(found.path)[1],
    )
    found = asyncio.run(
        _order(gate(segment, rule), permits(segment), KEY, ["/a", "/a", "/a", "/b", "/c-5"])
    )
    assert found[0] == "/c-5"
    assert found.index("/b") == 2, found


FAILING: list[dict[str, Any]] = [
    {"priority": lambda found: fails(found) if found.path == "/x" else 0},
    {"priority": lambda found: 1000 if found.path == "/x" else 0},
    {"priority": lambda found: "9" if found.path == "/x" else 0},
    {"tenant": lambda found: 5 if found.path == "/x" else None},
    {"weight": lambda found: 0 if found.path == "/x" else 1},
]


@pytest.mark.parametrize("given", FAILING)
def test_whose_function_fails_waits_behind_all_others(
    segment: Segment, given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    rules = gate(segment, Rule(in_flight=1, wait=PATIENCE, **given))
    found = asyncio.run(_order(rules, permits(segment), KEY, ["/x", "/a", "/x", "/b"]))
    assert found == ["/a", "/b", "/x", "/x"]
    told_once(caplog, "its tenant, weight or priority function failed; such requests wait behind")


def test_an_async_function_in_wsgi_is_told(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    rules = gate(segment, Rule(in_flight=1, wait=0.01, tenant=late))
    with permits(segment).acquire(KEY):
        assert rules.check(request()) is not None
    told_once(caplog, "its tenant, weight or priority function failed")
    assert "only the ASGI middleware can await" in str(caplog.records[0].exc_info)


def test_too_many_wait(segment: Segment) -> None:
    rules = gate(segment, Rule(in_flight=1, wait=PATIENCE, max_waiting=2))
    limiter = permits(segment)

    async def main() -> None:
        for _ in range(2):  # once to learn how long it takes
            held = limiter.acquire(KEY)
            tasks = [asyncio.ensure_future(_check(rules, request())) for _ in range(2)]
            await wait_until_async("two wait", lambda: limiter.queue_size(KEY) == 2)
            await asyncio.sleep(1.2)
            refused = await _check(rules, request())
            assert refused.refused and refused.status == 429
            shown = refused.retry_after, refused.expected is None
            assert dict(refused.headers())["Retry-After"] == str(refused.retry_after)
            assert not (await asyncio.to_thread(rules.check, request()) or refused).holds
            assert limiter.queue_size(KEY) == 2
            held.release()
            for task in tasks:
                (await task).release()
        assert shown[0] is not None and shown[0] > 1 and not shown[1]

    asyncio.run(main())


def test_nobody_may_wait(segment: Segment) -> None:
    rules = gate(segment, Rule(in_flight=1, wait=PATIENCE, max_waiting=0))
    with permits(segment).acquire(KEY):
        outcome = rules.check(request())
        assert outcome is not None and outcome.refused and outcome.retry_after == 1


def test_rates(segment: Segment) -> None:
    """Not charged before their turn; refused at once where that comes too late, or never."""
    rules = gate(segment, Rule(Limit(20, per=1, burst=1), wait=0.5, cost=lambda r: len(r.path)))
    held = [rules.check(request("/")) for _ in range(4)]
    assert [each is not None and each.denied for each in held] == [False] * 4
    never = rules.check(request("/too much"))
    assert never is not None and never.refused and never.retry_after is None
    strict = gate(segment, Rule(Window(1, 3600), wait=PATIENCE), name="strict")
    assert [each and each.denied for each in map(strict.check, [request()] * 2)] == [False, True]


def test_rates_and_permits(segment: Segment) -> None:
    rule = Rule(Window(2, 3600), in_flight=1, wait=PATIENCE)
    rules = gate(segment, rule)

    async def main() -> list[Outcome]:
        first = await _check(rules, request())
        second = asyncio.ensure_future(_check(rules, request()))
        await asyncio.sleep(0.05)
        assert not second.done()
        first.release()
        return [await second, await _check(rules, request())]

    second, third = asyncio.run(main())
    assert second.holds and not second.denied
    assert third.refused and third.violated == "default 2/3600s window"
    second.release()


def test_a_dry_run_lets_nobody_wait(segment: Segment) -> None:
    rules = gate(segment, Rule(in_flight=1, wait=PATIENCE, dry_run=True))
    with permits(segment).acquire(KEY):
        outcome = rules.check(request())
    assert outcome is not None and outcome.denied and not outcome.refused


def test_a_cost_that_is_none_is_told_while_others_wait(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    def cost(found: Request) -> int:
        return -1 if found.path == "/x" else 1

    rules = gate(segment, Rule(Window(9, 60), in_flight=1, wait=PATIENCE, cost=cost))
    opened = rules._rules[0][1]
    assert opened is not None
    states = opened._grantor.queue(KEY)[0]

    async def main() -> None:
        first = await _check(rules, request("/a"))
        second = asyncio.ensure_future(_check(rules, request("/a")))
        await wait_until_async("it waits", lambda: states.waiting(KEY.encode()) == 1)
        wrong = asyncio.ensure_future(_check(rules, request("/x")))
        await wait_until_async("it waits too", lambda: states.waiting(KEY.encode()) == 2)
        first.release()
        (await second).release()
        assert (await wrong).status == 503 and (await wrong).refused

    asyncio.run(main())
    told_once(caplog, "its cost function failed; such requests are refused")


def test_a_cancelled_request_holds_nothing(segment: Segment) -> None:
    """Also not under the rule before, where the path has two readings."""
    rules = gate(
        segment,
        Rule(in_flight=1, path="/a/*", name="one"),
        Rule(in_flight=1, path="/b", wait=PATIENCE, name="two"),
    )
    two = permits(segment, "web: two")

    async def main() -> None:
        held = two.acquire(KEY)
        task = asyncio.ensure_future(_check(rules, request("/a/../b")))
        await wait_until_async("it waits for the second", lambda: two.queue_size(KEY) == 1)
        assert permits(segment, "web: one").in_flight(KEY) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert permits(segment, "web: one").in_flight(KEY) == two.queue_size(KEY) == 0
        held.release()

    asyncio.run(main())
    assert two.in_flight(KEY) == 0


# clients that go --------------------------------------------------------------------------------


@servers
def test_a_client_that_goes_leaves_the_queue(server: str, segment_name: str) -> None:
    with serving(server, segment_name, WAIT="60") as path:
        limiter = permits(Segment(segment_name), "hanging: default")
        held = limiter.acquire("one")
        client_that_goes(
            server,
            path,
            "/answers",
            lambda: wait_until("it waits", lambda: limiter.queue_size("one") == 1),
        )
        wait_until("it has left", lambda: limiter.queue_size("one") == 0)
        held.release()
        assert ask(path, "/answers")[0] == 200
        assert ask(path, "/served")[1] == "2", "the application was given the other too"
    assert limiter.in_flight("one") == 0


async def _echo(scope: Scope, receive: Receive, send: Send) -> None:
    body, more = b"", True
    while more:
        message = await receive()
        body += message["body"]
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def _talk(
    segment: Segment, what: Callable[[Server, ConcurrencyLimiter], Any], serve_ends: bool = False
) -> Server:
    """What a server is told while its request waits. serve_ends: that ends it."""
    limiter = permits(segment)
    app = RateLimitMiddleware(
        _echo, [Rule(in_flight=1, wait=PATIENCE)], name="web", segment=segment
    )

    async def main() -> Server:
        server = Server()
        held = limiter.acquire(KEY)
        serve = asyncio.ensure_future(app(http(client=(KEY, 1)), server.receive, server.send))
        await wait_until_async("it waits", lambda: limiter.queue_size(KEY) == 1)
        what(server, limiter)
        await wait_until_async("all was read", server.messages.empty)
        if serve_ends:
            await serve
        held.release()
        await serve
        assert (limiter.in_flight(KEY), limiter.queue_size(KEY)) == (0, 0)
        assert len(asyncio.all_tasks()) == 1, "something is left"
        return server

    return asyncio.run(main())


def test_the_application_gets_what_came_while_it_waited(segment: Segment) -> None:
    def send_all(server: Server, _: ConcurrencyLimiter) -> None:
        for part in (b"a", b"b", b""):
            server.messages.put_nowait(
                {"type": "http.request", "body": part, "more_body": bool(part)}
            )

    assert _talk(segment, send_all).sent[-1]["body"] == b"ab"


def test_the_application_does_not_get_who_has_gone(segment: Segment) -> None:
    assert _talk(segment, lambda server, _: server.messages.put_nowait(GONE), True).sent == []


@pytest.mark.parametrize("wait", [0.05, PATIENCE])
def test_a_handshake_waits(segment: Segment, wait: float) -> None:
    """And is refused when its time is up."""
    limiter, got = permits(segment, "web: WEBSOCKET"), list[str]()

    async def accept(scope: Scope, receive: Receive, send: Send) -> None:
        got.append((await receive())["type"])
        await send({"type": "websocket.accept"})
        got.append((await receive())["type"])

    rules = [Rule(in_flight=1, methods={"WEBSOCKET"}, wait=wait)]
    app = RateLimitMiddleware(accept, rules, name="web", segment=segment, websockets=True)

    async def main() -> list[str]:
        server = Server({"type": "websocket.connect"})
        held = limiter.acquire(KEY)
        scope = {"type": "websocket", "path": "/", "headers": [], "client": (KEY, 1)}
        serve = asyncio.ensure_future(app(scope, server.receive, server.send))
        if wait == PATIENCE:
            await wait_until_async("it waits", lambda: limiter.queue_size(KEY) == 1)
            held.release()
            await wait_until_async("it is accepted", lambda: bool(server.sent))
            assert limiter.in_flight(KEY) == 1
            server.messages.put_nowait({"type": "websocket.disconnect"})
        await serve
        held.release()
        assert len(asyncio.all_tasks()) == 1, "something is left"
        return [message["type"] for message in server.sent]

    found = asyncio.run(main())
    accepted = wait == PATIENCE
    assert found == ["websocket.accept" if accepted else "websocket.close"]
    assert got == (["websocket.connect", "websocket.disconnect"] if accepted else [])
    assert limiter.in_flight(KEY) == 0


def test_nothing_is_logged_for_clients_that_go(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    _talk(segment, lambda server, _: server.messages.put_nowait(GONE), True)
    assert not [each for each in caplog.records if each.name != "asyncio"]
