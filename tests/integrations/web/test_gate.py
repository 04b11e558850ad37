"""Which rule is asked, what becomes of a request, and what the client is told."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import re
import time
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

import http_sf
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from support.damage import damage_limits

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm.integrations.web import Outcome, Rule
from fast_litellm_shm.integrations.web.gate import Gate
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.integrations.web.routes import Routes
from fast_litellm_shm.limits import describe
from fast_litellm_shm.testing import isolated


def request(path: str = "/", method: str = "GET", client: str = "192.0.2.7") -> Request:
    return Request(method, path, client, None)


def gate(segment: Segment, *rules: Rule, **more: Any) -> Gate[None]:
    return Gate(None, rules, segment=segment, **{"name": "web", **more})


def asked(gate: Gate[None], **arguments: str) -> Outcome:
    outcome = gate.check(request(**arguments))
    assert outcome is not None
    return outcome


def fields(outcome: Outcome) -> dict[str, Any]:
    """The structured ones as a parser of RFC 9651 reads them."""
    found: dict[str, Any] = {}
    for name, value in outcome.headers():
        assert name not in found
        found[name] = (
            http_sf.parse(value.encode(), tltype="list") if name.startswith("RateLimit") else value
        )
    return found


# rules ------------------------------------------------------------------------------------------

PATTERNS = (
    "/",
    "/a",
    "/a/{id}",
    "/a/*",
    "*b",
    "/{x}/b",
    "/a/b",
    "/ab{x}c",
    None,
    re.compile("/a+"),
)


@given(
    st.lists(st.tuples(st.sampled_from(PATTERNS), st.booleans(), st.booleans()), max_size=8),
    st.text("/ab.%2fc\n", max_size=8),
)
def test_the_index_of_rules_finds_what_each_rule_says(
    given_rules: list[tuple[Any, bool, bool]], path: str
) -> None:
    rules = [
        Rule(*([Limit(5)] if limited else []), path=pattern, methods={"GET"} if get else None)
        for pattern, limited, get in given_rules
    ]
    asked_for = request("/" + path)
    wanted, (_, routed, aliases) = [], asked_for.readings
    for place, rule in enumerate(rules):
        if not rule.takes("GET") or not routed:
            continue
        left = tuple(each for each in routed if not rule.has(each))
        if rule.limits and (
            left != routed
            or rule.matches(asked_for)
            and (any(map(rule.may_have, routed)) or any(map(rule.has, aliases)))
        ):
            wanted.append(place)
        routed = left
    routes = Routes((rule, place if rule.limits else None) for place, rule in enumerate(rules))
    for find in (routes.find, routes.kept, routes.kept):
        assert find(asked_for.target) == tuple(wanted)


@given(
    st.lists(
        st.tuples(st.sampled_from(PATTERNS), *[st.booleans()] * 2, st.integers(0, 12)), max_size=4
    ),
    st.sampled_from(["", "a", "a/b", "aa"]) | st.text("/ab.%2fc\n", max_size=4),
    st.sampled_from(["GET", "GET", "get", "POST", "WEBSOCKET", "A" * 300]),
    st.sampled_from(["", "/a"]),
    st.sampled_from(["10.0.0.2", "2001:db8::1", "10.0.0.1", "nobody", "", "x" * 200]),
)
def test_a_usual_request_is_checked_as_every_other(
    given_rules: list[tuple[Any, bool, bool, int]], path: str, method: str, mount: str, client: str
) -> None:
    """usual() needs no Request. Whatever it answers, checked() answers too."""
    options: list[dict[str, Any]] = [
        {"key": lambda request: "k"}, {"key": lambda request: 5}, {"exempt": ["10.0.0.1"]},
        {"dry_run": True}, {"in_flight": 1}, {"cost": 3}, {"cost": 0},
    ]  # fmt: skip
    rules = [
        Rule(
            *([Limit(2, per=60)] if limited else []),
            **(options[which] if limited and which < len(options) else {}),
            path=pattern,
            methods={"GET"} if get else None,
            name=f"rule {place}",
        )  # fmt: skip
        for place, (pattern, limited, get, which) in enumerate(given_rules)
    ]
    with isolated(frozen=True):
        usual, other = (Gate(None, rules, name=name) for name in ("usual", "other"))
        for _ in range(4):  # the last are denied
            found = usual.usual((method, mount + "/" + path, mount, None, ""), client or None)
            if found is False:
                event("another")
                return
            event("not limited" if found is None else "denied" if found.denied else "admitted")
            wanted = other.check(
                Request(method, mount + "/" + path, client or None, None, mount=mount)
            )
            assert (found is None) == (wanted is None)
            if found is not None and wanted is not None:
                for name in ("rule", "key", "denied", "refused", "holds", "retry_after"):
                    assert getattr(found, name) == getattr(wanted, name)
                assert found.headers() == wanted.headers()
                found.release()
                wanted.release()


def test_what_a_usual_request_is(segment: Segment) -> None:
    """And what is none: it is not even counted there."""

    def said(*rules: Rule, method: str = "GET", path: str = "/", client: Any = "10.0.0.1") -> Any:
        checks = gate(segment, *rules, name="usual")
        found = checks.usual((method, path, "", None, ""), client)
        assert checks.has_usual or not found
        return found

    plain = Rule(Limit(5, per=60), name="plain")
    assert said(plain).decision.remaining == 4
    assert said(plain, client="10.0.0.1").key == "10.0.0.1"
    assert said(plain, client="2001:db8::1").key == "2001:db8::/64"
    assert said(Rule(path="/"), plain) is None
    assert said(Rule(path="/x"), plain).decision.remaining == 2
    for other in (
        {"client": None},
        {"client": "1" * 101},
        {"client": ipaddress.ip_address("10.0.0.1")},
        {"path": "//"},
        {"path": "/" + "x" * 200},
        {"method": "X" * 200},
    ):
        assert said(plain, **other) is False
    for rule in (
        Rule(Limit(5, per=60), name="plain", key=lambda request: "k"),
        Rule(Limit(5, per=60), name="plain", exempt=["10.0.0.1"]),
        Rule(Limit(5, per=60), name="plain", dry_run=True),
        Rule(Limit(5, per=60), name="plain", wait=1),
        Rule(Limit(5, per=60), name="plain", cost=lambda request: 1),
    ):
        assert said(rule) is False
    assert said(plain).decision.remaining == 1
    assert said(Rule(Limit(5, per=60), path="/x"), client=5) is None  # no rule needs the address


def test_a_derived_class_checks_in_its_own_way(segment: Segment) -> None:
    class Own(Gate[None]):
        def checked(self, request: Request, **more: Any) -> Any:
            return None

    assert gate(segment, Rule(Limit(5))).has_usual
    assert not Own(None, [Rule(Limit(5))], name="web", segment=segment).has_usual


@pytest.mark.parametrize(
    "rule",
    [
        Rule(Limit(1, per=60)),
        Rule(Limit(1, per=60), dry_run=True),
        Rule(Limit(1, per=60), Window(5, per=3600)),
        Rule(Limit(1, per=60), in_flight=1),
        Rule(in_flight=1),
    ],
)
def test_a_response_keeps_its_headers_and_gets_ours(segment: Segment, rule: Rule) -> None:
    """Those of a plain request are made in one native call, others in Python: the same fields."""
    checks = gate(segment, rule)
    outcomes = [asked(checks), asked(checks)]  # the second is denied
    if rule.in_flight is None:
        gate(segment, Rule(Limit(3, per=60)))  # other limits for the same name
        outcomes.append(asked(checks))
    present: list[tuple[str, str]]
    for present in (
        [],
        [("Content-Type", "text/plain"), ("X-Request-Id", "1"), ("Range", "none")],
        [("X-RateLimit-Remaining", "7"), ("retry-after", "9")],
        [("RATELIMIT", '"inner";r=1'), ("ratelimit-policy", '"inner";q=1;w=1')],
        [("\udc80", "no UTF-8"), ("retry-after", "9")],
    ):
        raw = [(name.lower().encode("utf-8", "replace"), value.encode()) for name, value in present]
        for outcome in outcomes:
            ours = outcome.headers_beside(name for name, _ in present)
            assert outcome.pairs_with(present) == [*present, *ours]
            assert outcome.pairs_with(iter(present)) == [*present, *ours]
            assert outcome.raw_headers_with(iter(raw)) == [
                *raw,
                *((name.lower().encode(), value.encode()) for name, value in ours),
            ]
    for outcome in outcomes:
        outcome.release()


@pytest.mark.parametrize("limits", [[Limit(1, per=60)], [Limit(1, per=60), Window(5, per=3600)]])
def test_headers_of_an_application_that_no_server_would_send(
    segment: Segment, limits: list[Any]
) -> None:
    """It is the server that says so."""
    outcome = asked(gate(segment, Rule(*limits)))
    odd: list[Any] = [
        (bytearray(b"x-odd"), b""),
        (memoryview(b"odd"), b""),
        (None, 1),
        (b"a", 1, 2),
    ]
    assert outcome.raw_headers_with(odd)[:4] == odd
    assert outcome.pairs_with(odd)[:4] == odd


def test_a_websocket_that_a_program_describes(segment: Segment) -> None:
    rule = Rule(Limit(1, per=60), methods={"WEBSOCKET"})
    assert gate(segment, rule).check(Request("WEBSOCKET", "/", None, None)) is not None
    assert gate(segment, rule).check(Request("websocket", "/", None, None)) is None


def test_the_first_that_matches_is_asked(segment: Segment) -> None:
    rules = gate(
        segment,
        Rule(path="/health"),
        Rule(Limit(5), path="/v1/*", methods={"POST"}),
        Rule(Limit(9)),
    )
    assert rules.check(request("/health")) is None
    assert asked(rules, path="/v1/x", method="POST").rule.name == "POST /v1/*"
    assert asked(rules, path="/v1/x", method="GET").rule.name == "default"
    assert gate(segment, Rule(Limit(5), path="/v1/*")).check(request("/other")) is None


def test_a_path_that_may_mean_several_counts_under_the_rule_of_each(segment: Segment) -> None:
    login, files = Rule(Window(1, 60), path="/login"), Rule(Window(9, 60), path="/files/*")
    rules = gate(segment, Rule(path="/ready"), login, files, Rule(Window(99, 60)))
    odd = asked(rules, path="/files/../login")  # to one server that file, to another /login
    assert (odd.refused, odd.rule) == (False, login)
    again = asked(rules, path="/files/../login")
    assert (again.refused, again.rule) == (True, login)
    plain = [asked(rules, path=path) for path in ("/login", "/files/a", "/ready/../files/a")]
    assert [each.refused for each in plain] == [True, False, False]
    left = [each.decision.remaining for each in plain[1:] if each.decision is not None]
    assert left == [7, 6]  # one was charged beside /login, and none where that refused
    assert rules.check(request("/ready")) is None
    assert rules.check(request("/x/../ready")) is not None


def test_plain_paths_count_under_one_rule(segment: Segment) -> None:
    rules = gate(segment, Rule(Window(9, 60), path="/login"), Rule(Window(99, 60)))
    for path in ("/login", "/", "/docs/", "/a.b/..c/d%", "/caf\u00e9 %zz;x"):
        assert request(path).readings.routed == (path,)
        asked(rules, path=path)
    last = asked(rules, path="/other").decision
    assert last is not None and last.remaining == 99 - 5


def test_permits_of_several_rules_are_released_together(segment: Segment) -> None:
    one, two = Rule(in_flight=1, path="/one"), Rule(in_flight=1, path="/two/*")
    rules = gate(segment, one, two)
    both = asked(rules, path="/two/../one")
    assert both.holds and not both.refused
    assert asked(rules, path="/one").refused and asked(rules, path="/two/a").refused
    both.release()
    taken = asked(rules, path="/two/a")
    assert asked(rules, path="/two/../one").refused  # and it holds nothing of the other
    asked(rules, path="/one").release()
    taken.release()
    last = asked(rules, path="/two/../one")
    assert not last.refused
    last.release()


@pytest.mark.parametrize(
    "path", ["//login", "/x/../login", "/login\n", "http://x/login", "/%6cogin"]
)
def test_paths_that_may_mean_several_may_be_refused(segment: Segment, path: str) -> None:
    rules = gate(segment, Rule(Limit(9)), ambiguous_paths="refuse")
    refused = asked(rules, path=path)
    status, headers, body = refused.refusal()
    assert (status, refused.refused, refused.retry_after) == (400, True, None)
    assert "Retry-After" not in dict(headers)
    problem = json.loads(body)
    assert (problem["title"], problem["type"]) == ("Bad Request", "about:blank")
    assert "write it without repeated slashes" in problem["detail"]
    assert not asked(rules, path="/login/").refused


def test_each_rule_counts_apart(segment: Segment) -> None:
    rules = gate(segment, Rule(Limit(1), path="/a"), Rule(Limit(1), path="/b"))
    outcomes = [asked(rules, path=path) for path in ("/a", "/b", "/a", "/b")]
    assert [each.refused for each in outcomes] == [False, False, True, True]


def test_each_key_counts_apart(segment: Segment) -> None:
    rules = gate(segment, Rule(Limit(1)))
    outcomes = [asked(rules, client=client) for client in ("10.0.0.1", "10.0.0.2", "10.0.0.1")]
    assert [each.refused for each in outcomes] == [False, False, True]
    assert outcomes[2].key == "10.0.0.1"


def test_keys_that_are_not_limited(segment: Segment) -> None:
    rule = Rule(Limit(1), key=lambda r: r.client if r.client != "none" else None, exempt=["root"])
    rules = gate(segment, rule)
    assert rules.check(request(client="none")) is None
    assert rules.check(request(client="root")) is None
    assert rules.check(request(client="other")) is not None
    in_bytes = gate(segment, Rule(Limit(1), key=lambda r: b"root", exempt=["root"], name="b"))
    assert in_bytes.check(request()) is None


def test_costs(segment: Segment) -> None:
    rule = Rule(
        Limit(2, 60), Limit(1000, 60, burst=1000), cost=lambda r: (1, int(r.path[1:])), in_flight=9
    )
    rules = gate(segment, rule)
    outcomes = [asked(rules, path=path) for path in ("/900", "/200", "/100")]
    assert [each.violated for each in outcomes] == [None, "default 1000/60s", None]
    for each in outcomes:
        each.release()


def test_names_that_are_taken_twice(segment: Segment) -> None:
    with pytest.raises(ValueError, match="two rules have the name 'default'"):
        gate(segment, Rule(Limit(1)), Rule(Limit(2)))
    gate(segment, Rule(path="/a", name="free"), Rule(path="/b", name="free"))


def test_bad_arguments(segment: Segment) -> None:
    with pytest.raises(TypeError, match="rules must be Rule objects, not TokenBucket"):
        Gate(None, [Limit(5)], name="web")  # type: ignore[list-item]
    with pytest.raises(TypeError, match="rules must be a list of Rule objects, not Rule"):
        Gate(None, Rule(Limit(5)), name="web")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="on_error must be 'deny' or 'allow', not 'raise'"):
        gate(segment, on_error="raise")
    with pytest.raises(ValueError, match="on_cost_error must be 'deny' or 'count', not 'raise'"):
        gate(segment, on_cost_error="raise")
    with pytest.raises(ValueError, match="ambiguous_paths must be 'count' or 'refuse', not True"):
        gate(segment, ambiguous_paths=True)
    with pytest.raises(TypeError, match="name must be a str, not 5"):
        gate(segment, name=5)


# in flight --------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_in_flight(segment: Segment, status: int) -> None:
    rules = gate(segment, Rule(Limit(100), in_flight=2, busy_status=status))
    first, second, third = (asked(rules) for _ in range(3))
    assert [first.holds, second.holds, third.holds] == [True, True, False]
    assert third.refused and third.status == status
    assert third.violated == "default 2 in flight"
    assert dict(third.headers())["Retry-After"] == "1"
    first.release()
    first.release()
    fourth = asked(rules)
    assert fourth.holds
    assert fourth.decision is not None
    assert fourth.decision.remaining == 97, "the refused one was charged"
    second.release()
    fourth.release()


# what fails -------------------------------------------------------------------------------------


def fails(_: Request) -> Any:
    raise RuntimeError("no database")


async def late(_: Request) -> str:
    return "k"


@pytest.mark.parametrize("key", [fails, late, lambda r: 5, lambda r: ["unhashable"]])
def test_key_functions_that_fail_count_for_the_address(
    segment: Segment, key: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """For what they cost: a client that makes it fail does not go cheaper."""
    rules = gate(segment, Rule(Limit(4), key=key, cost=lambda r: 2))
    outcomes = [asked(rules) for _ in range(3)]
    assert [each.refused for each in outcomes] == [False, False, True]
    assert outcomes[0].key == "192.0.2.7"
    told_once(caplog, "its key function failed; such requests count for the client's address")


COSTS_THAT_FAIL: list[Any] = [
    fails,
    late,
    lambda r: -1,
    lambda r: "many",
    lambda r: None,
    lambda r: (1, 2, 3),
]


@pytest.mark.parametrize("cost", COSTS_THAT_FAIL)
def test_cost_functions_that_fail(
    segment: Segment, cost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody knows what it costs: a client that can make it fail would go for 1."""
    rules = gate(segment, Rule(Limit(2), key=lambda r: "k", cost=cost))
    first, second = asked(rules), asked(rules)
    assert first.refused and second.refused
    assert (first.status, first.key, first.decision) == (503, "k", None)
    assert dict(first.headers()) == {"Retry-After": "1"}
    told_once(caplog, "its cost function failed; such requests are refused")


@pytest.mark.parametrize("cost", COSTS_THAT_FAIL)
def test_cost_functions_that_fail_may_count_as_one(
    segment: Segment, cost: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rule = Rule(Limit(2), key=lambda r: "k", cost=cost)
    rules = gate(segment, rule, on_cost_error="count")
    outcomes = [asked(rules) for _ in range(3)]
    assert [each.refused for each in outcomes] == [False, False, True]
    assert outcomes[0].key == "192.0.2.7"
    told_once(caplog, "its cost function failed; such requests count as 1, for the client's")


def told_once(caplog: pytest.LogCaptureFixture, what: str) -> None:
    """For clients can cause it at will."""
    (told,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert what in told.getMessage()
    assert told.exc_info is not None


@pytest.mark.parametrize("cost", [fails, late, lambda r: -1])
def test_async_gates_and_costs_that_fail(segment: Segment, cost: Any) -> None:
    async def late_failing(r: Request) -> Any:
        found = cost(r)
        return -1 if asyncio.iscoroutine(found) and found.close() is None else found

    for policy, refused in (("deny", True), ("count", False)):
        rule = Rule(Limit(2), cost=late_failing)
        rules = gate(segment, rule, on_cost_error=policy, name=policy)
        outcome = asyncio.run(rules.check_async(request()))
        assert outcome is not None
        assert (outcome.refused, outcome.decision is None) == (refused, refused)


def test_async_functions(segment: Segment) -> None:
    async def cost(_: Request) -> int:
        return 2

    rules = gate(segment, Rule(Limit(2), key=late, cost=cost))

    async def twice() -> list[Outcome | None]:
        return [await rules.check_async(request()) for _ in range(2)]

    first, second = asyncio.run(twice())
    assert first is not None and second is not None
    assert (first.key, first.refused, second.refused) == ("k", False, True)


@pytest.mark.parametrize(("on_error", "refused"), [("deny", True), ("allow", False)])
def test_a_limiter_that_cannot_be_asked(
    segment: Segment, on_error: str, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rules = gate(segment, Rule(Limit(2)), on_error=on_error)
    damage_limits(segment, 0)
    outcome = asked(rules)
    assert outcome.decision is None
    assert outcome.refused is refused
    assert outcome.status == 503
    if refused:
        status, headers, body = outcome.refusal()
        assert dict(headers)["Retry-After"] == "1"
        assert json.loads(body)["title"] == "Service Unavailable"
    assert "cannot be checked" in caplog.records[0].getMessage()


@pytest.mark.parametrize(("on_error", "refused"), [("deny", True), ("allow", False)])
def test_a_segment_that_is_full(
    segment_name: str, on_error: str, refused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """No quota is used up, and the client is not told so; the log says what to do, not often."""
    full = Segment(segment_name, capacity=1)
    rules = gate(full, Rule(Window(1, 3600), in_flight=1, key=lambda r: r.path), on_error=on_error)
    outcomes = [asked(rules, path=f"/{i}") for i in range(1000)]
    last = outcomes[-1]
    assert (last.refused, last.decision, last.holds) == (refused, None, False)
    if refused:
        status, headers, body = last.refusal()
        assert (status, dict(headers)["Retry-After"]) == (429, "1")
        assert json.loads(body)["detail"] == "The rate limit cannot be checked at the moment."
        assert "RateLimit" not in dict(headers)
    (told,) = caplog.records
    assert told.exc_info is not None and "no room for another key" in str(told.exc_info[1])
    for each in outcomes:
        each.release()


def test_a_flood_of_new_keys_is_limited_together(segment_name: str) -> None:
    """Once each new key was answered 503, or passed, by ``on_error``."""
    full = Segment(segment_name, capacity=1)
    rules = gate(full, Rule(Window(2, 3600), key=lambda r: r.path))
    outcomes = [asked(rules, path=f"/{i}") for i in range(1000)]
    assert all(each.decision is not None for each in outcomes)
    passed = [i for i, each in enumerate(outcomes) if not each.refused]
    assert len(passed) < 200
    refused = outcomes[-1]
    status, headers, _ = refused.refusal()
    assert status == 429 and int(dict(headers)["Retry-After"]) > 1000
    assert not asked(rules, path="/0").refused  # it was there: one of its two is left
    assert asked(rules, path="/0").refused


def test_a_name_that_is_too_long(segment: Segment) -> None:
    with pytest.raises(ValueError, match=r"more than 96 bytes; give the rule a shorter: Rule\("):
        gate(segment, Rule(Limit(5), path="/" + "x" * 100))


# what is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit",
    [Limit(10, 60), Window(10, 60), SlidingWindow(10, 60), Limit(10, 60, burst=5)],
    ids=repr,
)
def test_fields_of_one_limit(segment: Segment, limit: Any) -> None:
    rules = gate(segment, Rule(limit, name='odd "name" \\'))
    found = fields(asked(rules))
    assert found["RateLimit-Policy"] == [('odd "name" \\', {"q": 10, "w": 60})]
    ((name, values),) = found["RateLimit"]
    left = getattr(limit, "burst", limit.n) - 1
    assert (name, values["r"]) == ('odd "name" \\', left)
    assert 1 <= values["t"] <= 60
    assert found["X-RateLimit-Limit"] == "10"
    assert found["X-RateLimit-Remaining"] == str(left)
    assert abs(int(found["X-RateLimit-Reset"]) - time.time() - values["t"]) < 5
    assert "Retry-After" not in found


def test_fields_of_a_refusal(segment: Segment) -> None:
    rules = gate(segment, Rule(Window(1, 60), Limit(100, 3600), in_flight=5, name="r"))
    asked(rules).release()
    refused = asked(rules)
    found = fields(refused)
    assert found["RateLimit-Policy"] == [
        ("r 1/60s window", {"q": 1, "w": 60}),
        ("r 100/3600s", {"q": 100, "w": 3600}),
        ("r 5 in flight", {"q": 5, "qu": "concurrent-requests"}),
    ]
    assert found["RateLimit"] == [("r 1/60s window", {"r": 0, "t": 60})]
    assert found["Retry-After"] == "60"  # not before the end of the window
    status, headers, body = refused.refusal()
    assert status == 429
    assert dict(headers)["Content-Type"] == "application/problem+json"
    assert dict(headers)["Content-Length"] == str(len(body))
    assert json.loads(body) == {
        "type": "https://iana.org/assignments/http-problem-types#quota-exceeded",
        "title": "Request cannot be satisfied as assigned quota has been exceeded",
        "status": 429,
        "detail": "The limit is 1/60s window. Try again in 60 s.",
        "violated-policies": ["r 1/60s window"],
        "retry-after": 60,
    }


def of_limit(outcome: Outcome) -> tuple[str, int, int]:
    """The limit that RateLimit names, what is left of it, and for how long."""
    ((name, values),) = fields(outcome)["RateLimit"]
    return name, values["r"], values["t"]


def test_fields_are_of_the_limit_that_they_name(segment: Segment) -> None:
    """Not the least that is left of any, nor the longest that any takes."""
    burst = "r 60/3600s burst 2"
    rules = gate(segment, Rule(Window(1000, 86400), Limit(60, 3600, burst=2), name="r"), name="a")
    assert [of_limit(asked(rules)) for _ in range(3)] == [
        (burst, 1, 60),
        (burst, 0, 120),
        (burst, 0, 60),
    ]
    rules = gate(segment, Rule(Window(3, 5), Limit(10, 3600), name="r"), name="b")
    assert of_limit(asked(rules)) == ("r 3/5s window", 2, 5)
    rule = Rule(Window(10, 60), Window(3, 3600), cost=(4, 1), in_flight=9, name="r")
    rules = gate(segment, rule, name="c")
    outcomes = [asked(rules) for _ in range(3)]
    assert [of_limit(each) for each in outcomes] == [
        ("r 3/3600s window", 2, 3600),
        ("r 3/3600s window", 1, 3600),
        ("r 10/60s window", 2, 60),  # which denies 4, and has more left than the other
    ]
    assert outcomes[2].violated == "r 10/60s window"
    for each in outcomes:
        each.release()


def test_a_cost_that_never_fits(segment: Segment) -> None:
    refused = asked(gate(segment, Rule(Limit(5), cost=6)))
    assert refused.refused and refused.retry_after is None
    assert "Retry-After" not in dict(refused.headers())
    assert "it never fits" in refused.detail


@pytest.mark.parametrize("rates", [(), (Limit(1000, 1),)], ids=["alone", "with another"])
def test_windows_of_the_calendar(segment: Segment, rates: tuple[Limit, ...]) -> None:
    """The headers say when the month ends in Berlin, whether there is room or not."""
    rules = gate(segment, Rule("2 per month in Europe/Berlin", *rates, name="plan"))
    berlin = ZoneInfo("Europe/Berlin")
    for left in (1, 0, 0):
        today = datetime.now(berlin)
        ends = datetime(today.year + today.month // 12, today.month % 12 + 1, 1, tzinfo=berlin)
        found = fields(asked(rules))
        (name, values) = found["RateLimit"][0]
        assert name.startswith("plan") and values["r"] == left
        assert abs(values["t"] - (ends.timestamp() - time.time())) < 5
        assert abs(int(found["X-RateLimit-Reset"]) - ends.timestamp()) < 5
        assert found["RateLimit-Policy"][0][1] == {"q": 2, "w": 31 * 86_400 + 3600}
    assert int(found["Retry-After"]) == values["t"]
    outcome = asked(rules)
    assert outcome.detail.startswith("The limit is 2/month Europe/Berlin window. Try again in")


def test_periods_below_a_second_and_huge_limits(segment: Segment) -> None:
    """w is whole seconds, and an Integer has 15 digits."""
    rules = gate(segment, Rule(Limit(10, 0.25), name="fast"), name="a")
    assert fields(asked(rules))["RateLimit-Policy"] == [("fast", {"q": 10, "w": 1})]
    rules = gate(segment, Rule(Limit(10**16, 3e7), name="huge"), name="b")
    most = 999_999_999_999_999
    found = fields(asked(rules))
    assert found["RateLimit-Policy"] == [("huge", {"q": most, "w": 30_000_000})]
    assert found["RateLimit"][0][1]["r"] == most


def test_limits_in_flight_alone(segment: Segment) -> None:
    rules = gate(segment, Rule(in_flight=1))
    held = asked(rules)
    assert fields(held) == {
        "RateLimit-Policy": [("default", {"q": 1, "qu": "concurrent-requests"})]
    }
    assert fields(asked(rules))["RateLimit"] == [("default", {"r": 0})]
    held.release()


def test_limits_that_are_changed_meanwhile(segment: Segment) -> None:
    """From any process: the headers tell those in force."""
    rules = gate(segment, Rule(Limit(10)), name="app")
    asked(rules)
    RateLimiter(Limit(20), name="app: default", segment=segment)
    asked(rules)
    found = fields(asked(rules))
    assert found["RateLimit-Policy"][0][1]["q"] == 20
    assert found["X-RateLimit-Limit"] == "20"


def test_dry_run(segment: Segment, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fast_litellm_shm")
    rules = gate(segment, Rule(Limit(1), in_flight=5, dry_run=True))
    first, second = asked(rules), asked(rules)
    assert (first.denied, second.denied, second.refused) == (False, True, False)
    assert first.headers() == []
    assert second.headers() == [("X-RateLimit-Dry-Run", "denied")]
    assert "would have refused" in caplog.messages[0] and describe(Limit(1)) in caplog.messages[0]
    assert segment.stats()["denied"] == 1
    first.release()


def test_a_dry_run_logs_less_than_clients_send(
    segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "fast_litellm_shm")
    rules = gate(segment, Rule(Limit(1), key=lambda asks: asks.path, dry_run=True))
    paths = ["/" + "x" * 1000] * 50 + ["/y"] * 50
    for path in paths:
        asked(rules, path=path)
    assert 1 <= len(caplog.messages) < 50
    assert sum(map(len, caplog.messages)) < sum(map(len, paths))
