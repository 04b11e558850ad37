"""Django: the middleware, @limited, users, proxies; in one process. Workers: test_workers.py."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import django
import pytest
from support import django_site
from support.damage import damage_limits
from support.django_site import AUTHENTICATION, LIMITS, site
from support.served import ask, ask_of_several, served, uvicorn

django_site.configure()

from asgiref.sync import iscoroutinefunction, sync_to_async  # noqa: E402
from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.core.management.base import SystemCheckError  # noqa: E402
from django.db import connections  # noqa: E402
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse  # noqa: E402
from django.test import AsyncClient, Client, RequestFactory, override_settings  # noqa: E402
from django.urls import include, path  # noqa: E402
from django.utils.decorators import method_decorator  # noqa: E402
from django.views import View  # noqa: E402
from django.views.decorators.csrf import csrf_exempt  # noqa: E402

from fast_litellm_shm import Segment, Window  # noqa: E402
from fast_litellm_shm._shared.inspection import Inspection  # noqa: E402
from fast_litellm_shm.integrations.django import (  # noqa: E402
    MARK,
    Rule,
    client_address,
    forwarded_for,
    limited,
    user_or,
    user_or_address,
)
from fast_litellm_shm.integrations.django import checks as our_checks  # noqa: E402

DAY = "per 24 hours window"
HERE = {"MIDDLEWARE": [*AUTHENTICATION, LIMITS]}


def ok(request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok")


async def ok_async(request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok")


@pytest.fixture(scope="module")
def _tables() -> Iterator[None]:
    """Of django.contrib.auth, in the database."""
    call_command("migrate", verbosity=0)
    yield
    connections.close_all()


@pytest.fixture
def ann(_tables: None) -> Iterator[Any]:
    from django.contrib.auth.models import User

    user = User.objects.create_user("ann")
    yield user
    user.delete()


def keys() -> set[str]:
    """That count in the segment."""
    return {row.key for row in Inspection(Segment.default()).keys(sort="key")}


def statuses(client: Any, what: str, count: int, **more: Any) -> list[int]:
    return [client.get(what, **more).status_code for _ in range(count)]


def test_the_middleware_answers_429() -> None:
    rules = [Rule(path="/ready"), Rule(f"2 {DAY}", name="all")]
    with site([path("", ok), path("ready", ok)], **HERE, FAST_LITELLM_SHM_RULES=rules):
        client = Client()
        first = client.get("/")
        assert (first.status_code, first["RateLimit-Policy"]) == (200, '"all";q=2;w=86400')
        assert first["X-RateLimit-Remaining"] == "1"
        assert first.wsgi_request.META[MARK].decision.remaining == 1
        client.get("/")
        denied = client.get("/")
        assert denied.status_code == 429
        assert denied["Content-Type"] == "application/problem+json"
        assert int(denied["Retry-After"]) > 80_000
        assert json.loads(denied.content)["violated-policies"] == ["all"]
        assert client.head("/").content == b""
        assert statuses(client, "/ready", 3) == [200] * 3
        assert statuses(client, "/", 1, REMOTE_ADDR="192.0.2.9") == [200]
        six = [f"2001:db8::{i:x}" for i in range(3)]
        assert [client.get("/", REMOTE_ADDR=each).status_code for each in six] == [200, 200, 429]


@pytest.mark.parametrize("how", ["sync", "async"])
def test_users_count_by_user(ann: Any, how: str) -> None:
    """Under async, the user is not loaded on the event loop: Django would refuse that."""
    rules = [Rule(f"2 {DAY}", key=user_or_address)]
    views = [path("", ok), path("async", ok_async)]
    with site(views, **HERE, FAST_LITELLM_SHM_RULES=rules):
        client = Client() if how == "sync" else AsyncClient()
        client.force_login(ann)
        named, nobody = (client, Client()) if how == "sync" else (client, AsyncClient())
        what = "/" if how == "sync" else "/async"

        async def ask() -> list[int]:
            found = [(await each.get(what)).status_code for each in (named, nobody) for _ in "abc"]
            await sync_to_async(connections.close_all)()
            return found

        expected = [200, 200, 429] * 2
        if how == "sync":
            assert statuses(named, what, 3) + statuses(nobody, what, 3) == expected
        else:
            assert asyncio.run(ask()) == expected
    assert keys() == {f"user={ann.pk}", "127.0.0.1"}


@pytest.mark.parametrize("how", ["sync", "async"])
def test_a_request_without_a_user_counts_by_address(how: str) -> None:
    """There is no AuthenticationMiddleware: that is said once, and is no error 500."""
    rules = [Rule(f"1 {DAY}", key=user_or_address)]
    changed = {"MIDDLEWARE": [LIMITS], "FAST_LITELLM_SHM_RULES": rules}
    with (
        site([path("", ok), path("async", ok_async)], **changed),
        pytest.warns(RuntimeWarning, match="put django.contrib.auth.middleware.Auth"),
    ):
        if how == "sync":
            assert statuses(Client(), "/", 2) == [200, 429]
        else:
            answers = [asyncio.run(AsyncClient().get("/async")) for _ in range(2)]
            assert [each.status_code for each in answers] == [200, 429]
    assert keys() == {"127.0.0.1"}


def test_the_middleware_runs_on_the_event_loop() -> None:
    with site([path("", ok_async)], MIDDLEWARE=[LIMITS], FAST_LITELLM_SHM_RULES=[Rule(f"1 {DAY}")]):
        client = AsyncClient()

        async def ask() -> list[int]:
            return [(await client.get("/")).status_code for _ in range(2)]

        assert asyncio.run(ask()) == [200, 429]
        from django.core.handlers.asgi import ASGIHandler

        assert iscoroutinefunction(ASGIHandler()._middleware_chain)


def test_what_is_in_flight_is_released() -> None:
    """When the response is closed, when the view fails, and when another limit refuses."""

    def fails(request: HttpRequest) -> HttpResponse:
        raise RuntimeError("the view")

    def streams(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(iter([b"a", b"b"]))

    rules = [Rule(in_flight=1, name="busy", busy_status=503)]
    urls = [path("", ok), path("fails", fails), path("stream", streams)]
    with site(urls, MIDDLEWARE=[LIMITS], FAST_LITELLM_SHM_RULES=rules):
        client = Client(raise_request_exception=False)
        assert statuses(client, "/", 3) == [200] * 3
        assert statuses(client, "/fails", 3) == [500] * 3
        stream = client.get("/stream")
        assert client.get("/").status_code == 503
        assert b"".join(stream.streaming_content) == b"ab"
        stream.close()
        assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "FAST_LITELLM_SHM_RULES is not set"),
        ({"FAST_LITELLM_SHM_RULES": "100 per minute"}, "must be a list of Rule objects"),
        ({"FAST_LITELLM_SHM_RULES": ["100 per minute"]}, "one is '100 per minute'"),
        (
            {"FAST_LITELLM_SHM_RULES": [Rule("1/s"), Rule("2/s")]},
            "two rules have the name 'default'",
        ),
        (
            {"FAST_LITELLM_SHM_RULES": [Rule("1/s")], "FAST_LITELLM_SHM_OPTIONS": {"nme": "x"}},
            "'nme', which is unknown; there are name",
        ),
        (
            {
                "FAST_LITELLM_SHM_RULES": [Rule("1/s")],
                "FAST_LITELLM_SHM_OPTIONS": {"on_error": "no"},
            },
            "on_error must be 'deny' or 'allow', not 'no'",
        ),
        (
            {
                "FAST_LITELLM_SHM_RULES": [Rule("1/s")],
                "FAST_LITELLM_SHM_TRUSTED_PROXIES": ["0.0.0.0/0"],
            },
            "FAST_LITELLM_SHM_TRUSTED_PROXIES: .* is everybody",
        ),
    ],
)
def test_wrong_settings_are_errors_at_start(changed: dict[str, Any], says: str) -> None:
    with site([path("", ok)], MIDDLEWARE=[LIMITS], **changed):
        from django.core.handlers.wsgi import WSGIHandler

        with pytest.raises(ImproperlyConfigured, match=says):
            WSGIHandler()


def test_no_rules_no_middleware() -> None:
    with site([path("", ok)], MIDDLEWARE=[LIMITS], FAST_LITELLM_SHM_RULES=[]):
        assert statuses(Client(), "/", 3) == [200] * 3


def test_proxies_are_trusted_by_address_alone() -> None:
    """A client that is no proxy writes X-Forwarded-For in vain; behind one the last counts."""
    changed = {
        "MIDDLEWARE": [LIMITS],
        "FAST_LITELLM_SHM_RULES": [Rule(f"1 {DAY}")],
        "FAST_LITELLM_SHM_TRUSTED_PROXIES": ["10.0.0.0/24"],
    }
    with site([path("", ok)], **changed):
        client = Client()

        def ask(peer: str, forwarded: str) -> int:
            headers = {"X-Forwarded-For": forwarded}
            return int(client.get("/", REMOTE_ADDR=peer, headers=headers).status_code)

        assert ask("192.0.2.1", "192.0.2.2") == 200
        assert ask("192.0.2.1", "192.0.2.3") == 429
        assert ask("10.0.0.1", "8.8.8.8, 192.0.2.2, 10.0.0.2") == 200
        assert ask("10.0.0.1", "9.9.9.9, 192.0.2.2") == 429
        assert ask("10.0.0.1", "2001:db8::1") == 200
        assert ask("10.0.0.1", "2001:db8::2") == 429
        assert ask("10.0.0.1", "") == 200  # the proxy's own
    assert keys() == {"192.0.2.1", "192.0.2.2", "2001:db8::/64", "10.0.0.1"}


def test_paths_below_a_mount_point() -> None:
    rules = [Rule(f"1 {DAY}", path="/login"), Rule(f"9 {DAY}")]
    with site([path("login", ok)], MIDDLEWARE=[LIMITS], FAST_LITELLM_SHM_RULES=rules):
        client = Client()
        assert client.get("/login").status_code == 200
        assert client.get("/", PATH_INFO="//login").status_code == 429, "another spelling"
        assert client.get("/", SCRIPT_NAME="/shop", PATH_INFO="/login").status_code == 429


# @limited


def test_each_view_counts_apart_and_views_of_a_name_together() -> None:
    one = limited(f"1 {DAY}")(lambda request: HttpResponse("one"))
    together = limited(f"1 {DAY}", name="together")

    @limited(f"1 {DAY}")
    def two(request: HttpRequest) -> HttpResponse:
        return HttpResponse("two")

    urls = [path("one", one), path("two", two), path("3", together(ok)), path("4", together(two))]
    with site(urls, MIDDLEWARE=[]), pytest.warns(RuntimeWarning, match="no user"):
        client = Client()
        assert [client.get(f"/{each}").status_code for each in ("one", "two", "3", "4")] == [
            *(200, 200, 200, 429)
        ]
        denied = client.get("/one")
        assert denied.status_code == 429
        assert int(denied["Retry-After"]) > 80_000
        assert json.loads(denied.content)["violated-policies"] == ["default"]


def test_methods_keys_and_costs() -> None:
    @limited(f"2 {DAY}", methods=["POST"], key="ip")
    def posted(request: HttpRequest) -> HttpResponse:
        return HttpResponse("posted")

    @limited(f"1 {DAY}", key=lambda request: request.raw.GET.get("key"), exempt=["free"])
    def keyed(request: HttpRequest) -> HttpResponse:
        return HttpResponse("keyed")

    @limited(f"10 {DAY}", key="address", cost=lambda request: int(request.raw.GET["cost"]))
    def costly(request: HttpRequest) -> HttpResponse:
        return HttpResponse("costly")

    urls = [path("posted", csrf_exempt(posted)), path("keyed", keyed), path("costly", costly)]
    with site(urls, MIDDLEWARE=[]):
        client = Client()
        assert statuses(client, "/posted", 4) == [200] * 4
        assert [client.post("/posted").status_code for _ in range(3)] == [200, 200, 429]
        assert statuses(client, "/keyed", 2) == [200] * 2, "None: not limited"
        assert statuses(client, "/keyed?key=a", 2) == [200, 429]
        assert statuses(client, "/keyed?key=free", 2) == [200] * 2
        assert statuses(client, "/costly?cost=6", 2) == [200, 429]
        assert statuses(client, "/costly?cost=x", 1) == [503], "a cost function that fails"


def test_views_that_are_classes() -> None:
    @method_decorator(limited(f"1 {DAY}", key="ip"), name="dispatch")
    class One(View):
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse("one")

    class Two(One):
        """It inherits the limit, and has counts of its own."""

    class Three(View):
        @method_decorator(limited(f"1 {DAY}", key="ip"))
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse("three")

    fourth = limited(f"1 {DAY}", key="ip")(One.as_view())
    with site(
        [path("1", One.as_view()), path("3", Three.as_view()), path("4", fourth)], MIDDLEWARE=[]
    ):
        client = Client()
        assert statuses(client, "/1", 2) == [200, 429]
        assert statuses(client, "/3", 2) == [200, 429]
        assert statuses(client, "/4", 1) == [429], "the class itself is used up"
    with site([path("2", Two.as_view())], MIDDLEWARE=[]):
        assert statuses(Client(), "/2", 2) == [200, 429]


def test_async_views_of_users(ann: Any) -> None:
    """Functions and classes; a user that is not loaded yet is loaded off the event loop."""

    @limited(f"1 {DAY}", in_flight=3)
    async def one(request: HttpRequest) -> HttpResponse:
        return HttpResponse("one")

    @method_decorator(limited(f"1 {DAY}"), name="dispatch")
    class Two(View):
        async def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse("two")

    class Three(View):
        @method_decorator(limited(f"1 {DAY}"))
        async def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse("three")

    assert iscoroutinefunction(one)
    urls = [path("1", one), path("2", Two.as_view()), path("3", Three.as_view())]
    with site(urls, MIDDLEWARE=AUTHENTICATION):
        client, plain = AsyncClient(), Client()
        client.force_login(ann)
        plain.force_login(ann)

        async def ask(what: str) -> list[int]:
            found = [(await client.get(what)).status_code for _ in range(2)]
            await sync_to_async(connections.close_all)()
            return found

        methods = ("/3",) if django.VERSION >= (5, 2) else ()  # not before, by Django's own word
        for what in ("/1", "/2", *methods):
            assert asyncio.run(ask(what)) == [200, 429], what
            assert plain.get(what).status_code == 429, "the same counts under WSGI"
    assert len(keys()) == 2 + len(methods)
    assert all(each.endswith(f" user={ann.pk}") for each in keys())


def test_atomic_requests(ann: Any) -> None:
    """A refusal is a response: nothing is rolled back, and nothing of the view has begun."""
    from django.contrib.auth.models import User

    @limited(f"1 {DAY}")
    def add(request: HttpRequest) -> HttpResponse:
        User.objects.create_user(f"user {User.objects.count()}")
        return HttpResponse("added")

    @limited(f"1 {DAY}", key="ip")
    def fails(request: HttpRequest) -> HttpResponse:
        User.objects.create_user("never")
        raise RuntimeError

    with site([path("add", add), path("fails", fails)], MIDDLEWARE=AUTHENTICATION):
        client = Client(raise_request_exception=False)
        client.force_login(ann)
        before = User.objects.count()
        connections["default"].settings_dict["ATOMIC_REQUESTS"] = True
        try:
            assert statuses(client, "/add", 2) == [200, 429]
            assert statuses(client, "/fails", 2) == [500, 429], "what failed stays consumed"
        finally:
            connections["default"].settings_dict["ATOMIC_REQUESTS"] = False
        assert User.objects.count() == before + 1
        User.objects.exclude(pk=ann.pk).delete()


def test_a_failing_view_releases_and_csrf_exempt_stays() -> None:
    @limited(in_flight=1, key="ip")
    def fails(request: HttpRequest) -> HttpResponse:
        raise RuntimeError

    wrapped = limited(f"5 {DAY}")(csrf_exempt(ok))
    assert wrapped.csrf_exempt
    with site([path("", fails)], MIDDLEWARE=[]):
        client = Client(raise_request_exception=False)
        assert statuses(client, "/", 3) == [500] * 3


def test_misuse_of_the_decorator_says_what_to_write() -> None:
    for wrong, says in (
        (lambda: limited()(ok), "needs a limit"),
        (lambda: limited(ok), 'write @limited\\("10 per minute"\\)'),  # type: ignore[arg-type]
        (lambda: limited("ten per minute")(ok), "a limit must be written as"),
        (lambda: limited("1/s", key="user")(ok), "key must be 'user_or_address'"),
        (lambda: limited("1/s", methods="GET")(ok), "methods must be a set or list"),
        (lambda: limited("1/s")(View), "View is a class: write @method_decorator"),
        (lambda: user_or("ip"), "other must be a function"),  # type: ignore[arg-type]
    ):
        with pytest.raises((TypeError, ValueError), match=says):
            wrong()

    class Mine(View):
        @limited("1/s")
        def get(self, request: HttpRequest) -> HttpResponse:
            return HttpResponse()

    with pytest.raises(TypeError, match=r"called with Mine, which is no request.*method_decorator"):
        Mine.as_view()(RequestFactory().get("/"))


def test_a_segment_that_cannot_be_used_is_503_and_no_error_500() -> None:
    view = limited(Window(5, 60), name="taken", key="ip")(ok)
    allowed = limited(Window(5, 60), name="taken", key="ip", on_error="allow")(ok)
    damage_limits(Segment.default(), 0)
    request = RequestFactory().get("/")
    assert view(request).status_code == 503
    assert view(request)["Retry-After"] == "1"
    assert allowed(request).status_code == 200


def test_behind_proxies_by_hand() -> None:
    view = limited(f"1 {DAY}", key=user_or(forwarded_for(["10.0.0.5"])))(ok)
    ask = RequestFactory().get
    headers = {"x-forwarded-for": "192.0.2.2"}
    with pytest.warns(RuntimeWarning, match="no user"):
        assert view(ask("/", REMOTE_ADDR="10.0.0.5", headers=headers)).status_code == 200
    assert view(ask("/", REMOTE_ADDR="10.0.0.5", headers=headers)).status_code == 429
    assert view(ask("/", REMOTE_ADDR="10.0.0.6", headers=headers)).status_code == 200


# manage.py check


def test_the_example_under_four_workers_of_asgi(segment_name: str) -> None:
    """Under WSGI: tests/integrations/web/test_workers.py."""
    env = {"FAST_LITELLM_SHM_NAME": segment_name}
    command = uvicorn("app:asgi", "--lifespan", "off")
    with served("django", command, ("django", "uvicorn"), segment_name, env) as at:
        for what, limit in (("/search-async", 5), ("/search", 5)):
            answers = ask_of_several(at, what, 40, 4, X_Api_Key="key-of-ann")
            admitted = [body for status, body, _ in answers if status == 200]
            assert len(admitted) == limit
            assert {status for status, _, _ in answers} == {200, 429}
        # Each of the 80 has consumed one of the user's 100.
        found = [ask(at, "/", X_Api_Key="key-of-ann")[0] for _ in range(30)]
        assert found == [200] * 20 + [429] * 10


def test_the_checks_name_what_is_wrong() -> None:
    user_rules = [Rule("1/s", key=user_or_address), Rule(path="/x", key=client_address)]
    with override_settings(MIDDLEWARE=[LIMITS, *AUTHENTICATION], FAST_LITELLM_SHM_RULES=user_rules):
        (found,) = our_checks.check_rules()
        assert found.id == "fast_litellm_shm.W002"
        assert "rule 'default' counts by user" in found.msg
    with override_settings(**HERE, FAST_LITELLM_SHM_RULES=user_rules):
        assert our_checks.check_rules() == []
    with override_settings(**HERE, FAST_LITELLM_SHM_RULES=["1/s"]):
        (found,) = our_checks.check_rules()
        assert found.id == "fast_litellm_shm.E001"
    with override_settings(MIDDLEWARE=[], FAST_LITELLM_SHM_RULES=user_rules):
        (found,) = our_checks.check_rules()
        assert found.id == "fast_litellm_shm.W001"
    with override_settings(MIDDLEWARE=[]):
        assert our_checks.check_rules() == []


def test_views_in_included_urls_are_checked() -> None:
    from rest_framework.views import APIView

    from fast_litellm_shm.integrations.rest_framework import ScopedRateThrottle

    class Wrong(APIView):
        throttle_classes = [ScopedRateThrottle]
        throttle_scope = "uploads"

    class Right(Wrong):
        throttle_scope = "free"

    urls = [path("api/", include([path("w", Wrong.as_view()), path("r", Right.as_view())]))]
    with site([*urls, path("", ok)], MIDDLEWARE=[]):
        (found,) = our_checks.check_throttles()
        assert found.id == "fast_litellm_shm.E002"
        assert "Wrong: ScopedRateThrottle: DEFAULT_THROTTLE_RATES has no rate for the scope" in (
            found.msg
        )
        assert "'uploads'; it has 'anon', 'free', 'user'" in found.msg
        with pytest.raises(SystemCheckError, match="uploads"):
            call_command("check")


def test_without_django_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['django'] = None; import fast_litellm_shm.integrations.django"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert 'pip install "fast-litellm-shm[django]"' in done.stderr.splitlines()[-1]
