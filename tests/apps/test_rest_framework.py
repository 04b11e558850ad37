"""Throttles of Django REST framework: the same settings, exact counts."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from support import django_site
from support.damage import damage_limits
from support.django_site import site
from support.served import ask, gunicorn, served
from support.waiting import wait_until

django_site.configure()

from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from django.test import override_settings  # noqa: E402
from django.urls import path  # noqa: E402
from rest_framework import renderers  # noqa: E402
from rest_framework.decorators import api_view, throttle_classes  # noqa: E402
from rest_framework.response import Response  # noqa: E402
from rest_framework.settings import api_settings  # noqa: E402
from rest_framework.test import APIClient  # noqa: E402
from rest_framework.views import APIView  # noqa: E402

from fast_litellm_shm import FixedWindow, Segment, SlidingWindow, TokenBucket  # noqa: E402
from fast_litellm_shm.integrations.django import checks, limited  # noqa: E402
from fast_litellm_shm.integrations.rest_framework import (  # noqa: E402
    AnonRateThrottle,
    ScopedRateThrottle,
    SimpleRateThrottle,
    UserRateThrottle,
    limits_of,
)

WORKERS, REQUESTS = 4, 60


class User:
    is_authenticated = True

    def __init__(self, pk: object) -> None:
        self.pk = pk


def view_of(*throttles: type, **more: Any) -> Any:
    class Shown(APIView):
        throttle_classes = list(throttles)
        authentication_classes: list[type] = []
        renderer_classes = [renderers.JSONRenderer]

        def get(self, request: Any) -> Response:
            return Response("ok")

    for name, value in more.items():
        setattr(Shown, name, value)
    return Shown


def statuses(client: Any, count: int, what: str = "/", **more: Any) -> list[int]:
    return [client.get(what, **more).status_code for _ in range(count)]


def named(pk: object) -> APIClient:
    client = APIClient()
    client.force_authenticate(User(pk))
    return client


@pytest.mark.parametrize(
    ("module", "expected"),
    [("fast_litellm_shm.integrations.rest_framework", 10), ("rest_framework.throttling", 40)],
)
def test_four_workers(module: str, expected: int, segment_name: str) -> None:
    """60 requests, 15 to each worker: while one answers, the others are stopped. The framework's
    own throttle counts in the memory of each worker."""
    env = {"FAST_LITELLM_SHM_NAME": segment_name, "THROTTLES": module}
    command = gunicorn("app:application")
    with served("django_rest", command, ("rest_framework", "gunicorn"), segment_name, env) as at:
        pids: set[int] = set()

        def all_answer() -> bool:
            pids.add(int(ask(at, "/ready")[1]))
            return len(pids) == WORKERS

        wait_until("all workers answer", all_answer)
        found = []
        for one in pids:
            others = pids - {one}
            try:
                for pid in others:
                    os.kill(pid, signal.SIGSTOP)
                found += [ask(at, "/") for _ in range(REQUESTS // WORKERS)]
            finally:
                for pid in others:
                    os.kill(pid, signal.SIGCONT)
        admitted = [body for status, body, _ in found if status == 200]
        assert len(found) == REQUESTS
        assert len(admitted) == expected
        denied = [headers for status, _, headers in found if status == 429]
        assert len(denied) == REQUESTS - expected
        assert all(1 <= int(headers["Retry-After"]) <= 66 for headers in denied)


def test_users_and_addresses() -> None:
    with site([path("", view_of(UserRateThrottle).as_view())]):
        assert statuses(named(1), 4) == [200] * 3 + [429]
        assert statuses(named(2), 1) == [200]
        assert statuses(APIClient(), 4) == [200] * 3 + [429]
        assert statuses(APIClient(), 1, headers={"X-Forwarded-For": "192.0.2.1"}) == [429]
        six = [f"2001:db8::{i}" for i in range(4)]
        found = [APIClient().get("/", REMOTE_ADDR=each).status_code for each in six]
        assert found == [200] * 3 + [429], "one client has a /64"


def test_users_are_not_throttled_as_anonymous() -> None:
    with site([path("", view_of(AnonRateThrottle).as_view())]):
        assert statuses(named(1), 5) == [200] * 5
        assert statuses(APIClient(), 3) == [200, 200, 429]


def test_scopes() -> None:
    scoped = view_of(ScopedRateThrottle, throttle_scope="anon")
    free = view_of(ScopedRateThrottle, throttle_scope="free")
    without = view_of(ScopedRateThrottle)
    urls = [path("1", scoped.as_view()), path("2", free.as_view()), path("3", without.as_view())]
    with site(urls):
        assert statuses(APIClient(), 3, "/1") == [200, 200, 429]
        assert statuses(APIClient(), 3, "/2") == [200] * 3, "a rate of None"
        assert statuses(APIClient(), 3, "/3") == [200] * 3
        wrong = view_of(ScopedRateThrottle, throttle_scope="uploads")
        with pytest.raises(ImproperlyConfigured, match="scope 'uploads'; it has 'anon', 'free'"):
            wrong.as_view()(APIClient().get("/1").wsgi_request)


@contextmanager
def proxies(number: int) -> Iterator[None]:
    with override_settings(
        REST_FRAMEWORK={**_rest_framework(), "NUM_PROXIES": number}, MIDDLEWARE=[]
    ):
        yield


def _rest_framework() -> dict[str, Any]:
    from django.conf import settings

    return dict(settings.REST_FRAMEWORK)


def test_proxies() -> None:
    """NUM_PROXIES counts from the right; without it, a client writes X-Forwarded-For in vain."""
    with site([path("", view_of(AnonRateThrottle).as_view())]):
        with proxies(1):
            assert api_settings.NUM_PROXIES == 1
            one, two = ({"X-Forwarded-For": f"8.8.8.8, 192.0.2.{i}"} for i in (1, 2))
            assert statuses(APIClient(), 3, headers=one) == [200, 200, 429]
            assert statuses(APIClient(), 1, headers=two) == [200]
        with override_settings(FAST_LITELLM_SHM_TRUSTED_PROXIES=["127.0.0.1"]):
            assert statuses(APIClient(), 1, headers=one) == [429]
            assert statuses(APIClient(), 2, headers=two) == [200, 429]


class Burst(UserRateThrottle):
    scope = "burst"
    rate = "2/min"


class Sustained(UserRateThrottle):
    scope = "sustained"
    rate = "3/day"


def test_a_denial_consumes_nothing_of_any_throttle() -> None:
    """Neither of those before it nor of those after it."""
    for order in ((Burst, Sustained), (Sustained, Burst)):
        with site([path("", view_of(*order).as_view())]):
            client = named(f"user of {order[0].__name__}")
            assert statuses(client, 8) == [200, 200] + [429] * 6
            left = _left("support: throttle sustained 3/86400s sliding")
            assert left[f"throttle_sustained_user of {order[0].__name__}"] == 1


def _left(limiter: str) -> dict[str, Any]:
    from fast_litellm_shm._shared.inspection import Inspection

    rows = Inspection(Segment.default()).keys(limiter=limiter)
    return {row.key: row.remaining for row in rows}


def test_several_limits_in_one_throttle() -> None:
    class Both(UserRateThrottle):
        rate = "2/min; 3/day"

    with site([path("", view_of(Both).as_view())]):
        answer = named(1).get("/")
        assert answer["RateLimit-Policy"] == (
            '"user 2/60s sliding";q=2;w=60, "user 3/86400s sliding";q=3;w=86400'
        )
        assert statuses(named(1), 2) == [200, 429]


def test_what_the_client_gets() -> None:
    with site([path("", view_of(AnonRateThrottle).as_view())]):
        client = APIClient()
        first = client.get("/")
        assert first["RateLimit-Policy"] == '"anon";q=2;w=60'
        assert first["RateLimit"].startswith('"anon";r=1;t=')
        client.get("/")
        denied = client.get("/")
        assert denied.status_code == 429
        seconds = int(denied["Retry-After"])
        assert denied.data["detail"] == (
            f"Request was throttled. Expected available in {seconds} seconds."
        )
        assert f'"anon";r=0;t={seconds}' == denied["RateLimit"]
        # Of two, half of the next window must pass: 90 s, less what has passed.
        assert 60 < seconds <= 90


def test_after_wait_the_request_is_admitted() -> None:
    class Quick(UserRateThrottle):
        rate = TokenBucket(1, per=0.2)

    request = APIClient().get("/nowhere").wsgi_request
    request.user = User(1)
    throttle = Quick()
    assert throttle.allow_request(request, None)
    assert throttle.wait() is None or throttle.wait() == 0
    again = Quick()
    assert not again.allow_request(request, None)
    pause = again.wait()
    assert pause is not None
    assert 0 < pause <= 0.2
    fresh = APIClient().get("/nowhere").wsgi_request
    fresh.user = User(1)
    wait_until("it is admitted", lambda: Quick().allow_request(fresh, None))


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ("10/s", [SlidingWindow(10, 1)]),
        ("10/sec", [SlidingWindow(10, 1)]),
        ("10/m", [SlidingWindow(10, 60)]),
        ("10/min", [SlidingWindow(10, 60)]),
        ("10/minute", [SlidingWindow(10, 60)]),
        ("10/h", [SlidingWindow(10, 3600)]),
        ("10/hour", [SlidingWindow(10, 3600)]),
        ("10/d", [SlidingWindow(10, 86400)]),
        ("10/day", [SlidingWindow(10, 86400)]),
        ("10/month", [FixedWindow(10, per="month")]),  # to the framework: 10 a minute
        ("10 per minute", [TokenBucket(10, 60)]),
        ("10 per 30 s burst 2", [TokenBucket(10, 30, burst=2)]),
        ("10/day in Europe/Berlin", [FixedWindow(10, per="day", timezone="Europe/Berlin")]),
        ("10/min; 100/day", [SlidingWindow(10, 60), SlidingWindow(100, 86400)]),
        (TokenBucket(3, 5), [TokenBucket(3, 5)]),
        (("1/s", FixedWindow(9, 60)), [SlidingWindow(1, 1), FixedWindow(9, 60)]),
    ],
)
def test_rates(rate: Any, expected: list[Any]) -> None:
    assert list(limits_of(rate)) == expected


@pytest.mark.parametrize("rate", ["ten/min", "10/fortnight", "0/min", "10", 10, "1/s;" * 5])
def test_wrong_rates_are_errors_when_the_class_is_made(rate: Any) -> None:
    with pytest.raises(
        ImproperlyConfigured, match=r"Mine \(scope 'user'\): the rate .* is wrong: "
    ):
        type("Mine", (UserRateThrottle,), {"rate": rate})


def test_wrong_rates_of_scopes_are_errors_at_start() -> None:
    """Of DEFAULT_THROTTLE_CLASSES: when Django starts; of views: by manage.py check."""

    class Mine(UserRateThrottle):
        THROTTLE_RATES = {"user": "10/fortnight"}

    with pytest.raises(ImproperlyConfigured, match=r"Mine \(scope 'user'\): the rate '10/fort"):
        Mine.check_rate()
    with (
        override_settings(REST_FRAMEWORK={"DEFAULT_THROTTLE_CLASSES": [f"{__name__}.Lost"]}),
        pytest.raises(ImproperlyConfigured, match="no rate for the scope 'nowhere'"),
    ):
        checks.check_default_throttles()
    with pytest.raises(ImproperlyConfigured, match="on_error must be 'deny' or 'allow'"):
        type("Mine", (UserRateThrottle,), {"on_error": "ignore"})


class Lost(UserRateThrottle):
    scope = "nowhere"


def test_a_subclass_with_its_own_key_and_rate() -> None:
    class ByPlan(SimpleRateThrottle):
        scope = "plan"

        def get_rate(self) -> str:
            return "2/min"

        def get_cache_key(self, request: Any, view: Any) -> Any:
            return request.query_params.get("plan")

    class Own(UserRateThrottle):
        rate = "1/5"

        def parse_rate(self, rate: str) -> tuple[int, int]:
            number, seconds = rate.split("/")
            return int(number), int(seconds) * 86_400

    with site([path("1", view_of(ByPlan).as_view()), path("2", view_of(Own).as_view())]):
        assert statuses(APIClient(), 3, "/1?plan=gold") == [200, 200, 429]
        assert statuses(APIClient(), 3, "/1") == [200] * 3, "no key: not limited"
        assert statuses(named(1), 2, "/2") == [200, 429]


@pytest.mark.parametrize(("on_error", "status"), [("deny", 429), ("allow", 200)])
def test_a_segment_that_cannot_be_used(on_error: str, status: int) -> None:
    class Mine(UserRateThrottle):
        pass

    Mine.on_error = on_error
    with site([path("", view_of(Mine).as_view())]):
        assert statuses(named(1), 1) == [200]
        damage_limits(Segment.default(), 0)
        answer = named(1).get("/")
        assert answer.status_code == status
        assert answer.get("Retry-After") == ("1" if status == 429 else None)


def test_the_browsable_api_shows_a_denial_and_costs_one() -> None:
    shown = view_of(UserRateThrottle, renderer_classes=[renderers.BrowsableAPIRenderer])
    with site([path("", shown.as_view())]):
        client = APIClient()
        found = [client.get("/", headers={"Accept": "text/html"}) for _ in range(4)]
        assert [each.status_code for each in found] == [200] * 3 + [429]
        assert b"429 Too Many Requests" in found[-1].content


def test_the_decorator_on_views_of_the_framework() -> None:
    @api_view(["GET"])
    @throttle_classes([])
    @limited("1 per 24 hours window")
    def shown(request: Any) -> Response:
        return Response("ok")

    with site([path("", shown)]):
        client = named("ann")
        assert statuses(client, 2) == [200, 429]
        assert statuses(named("bob"), 1) == [200]
        assert client.get("/")["Content-Type"] == "application/problem+json"
