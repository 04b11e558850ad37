"""django-ratelimit on RateLimitCache, and what the cache backend does and refuses."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
from support import django_site
from support.damage import damage_limits
from support.django_site import site

django_site.configure()

from django.core import checks  # noqa: E402
from django.core.cache import caches  # noqa: E402
from django.core.exceptions import ImproperlyConfigured  # noqa: E402
from django.http import HttpRequest, HttpResponse  # noqa: E402
from django.test import Client  # noqa: E402
from django.urls import path  # noqa: E402
from django_ratelimit.core import get_usage  # noqa: E402
from django_ratelimit.decorators import ratelimit  # noqa: E402

from fast_litellm_shm import Segment  # noqa: E402
from fast_litellm_shm.integrations.django import RateLimitCache  # noqa: E402

BACKEND = "fast_litellm_shm.integrations.django.RateLimitCache"
CACHES: dict[str, dict[str, Any]] = {
    "default": {"BACKEND": "django.core.cache.backends.locmem.LocMemCache"},
    "limits": {"BACKEND": BACKEND},
}
USED = {
    "CACHES": CACHES,
    "RATELIMIT_USE_CACHE": "limits",
    "SILENCED_SYSTEM_CHECKS": ["django_ratelimit.W001"],
    "MIDDLEWARE": [],
}


@ratelimit(key="ip", rate="3/d")
def view(request: HttpRequest) -> HttpResponse:
    return HttpResponse("ok")


@pytest.fixture
def cache() -> RateLimitCache:
    return RateLimitCache("", {})


def test_django_ratelimit_counts_in_it() -> None:
    with site([path("", view)], **USED):
        client = Client()
        assert [client.get("/").status_code for _ in range(5)] == [200] * 3 + [403] * 2
        request = HttpRequest()
        request.META["REMOTE_ADDR"], request.method = "127.0.0.1", "GET"
        usage = get_usage(request, fn=view, key="ip", rate="3/d")
        assert (usage["count"], usage["limit"], usage["should_limit"]) == (5, 3, True)
        caches["limits"].clear()
        assert client.get("/").status_code == 200


def test_its_system_check_takes_it_with_one_line() -> None:
    from django_ratelimit.checks import check_caches

    with site([path("", view)], **USED):
        (found,) = check_caches(None)
        assert (found.id, found.level) == ("django_ratelimit.W001", checks.WARNING)
        assert found.is_silenced()


def _count(name: str, times: int, found: Any) -> None:
    counts = RateLimitCache(name, {})
    for _ in range(times):
        if counts.add("hot", 1, 600):
            found.put(1)
        else:
            found.put(counts.incr("hot"))


def test_counts_of_four_processes_are_exact(segment_name: str) -> None:
    """Each count is given once: neither ``add`` nor ``incr`` loses one."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    each = 250
    workers = [context.Process(target=_count, args=(segment_name, each, found)) for _ in range(4)]
    for one in workers:
        one.start()
    numbers = sorted(found.get(timeout=60) for _ in range(4 * each))
    for one in workers:
        one.join()
    assert numbers == list(range(1, 4 * each + 1))


def test_calls(cache: RateLimitCache) -> None:
    assert cache.get("k") is None
    assert cache.get("k", 7) == 7
    assert cache.add("k", 0, 60), "a count of 0"
    assert cache.add("k", 2, 60)
    assert not cache.add("k", 2, 60)
    assert not cache.add("k", 0, 60)
    assert cache.get("k") == 2
    assert cache.incr("k") == 3
    assert cache.incr("k", 4) == 7
    assert "k" in cache
    assert cache.get("k", version=2) is None, "another version is another key"
    assert cache.delete("k")
    assert not cache.delete("k")
    with pytest.raises(ValueError, match="key 'k' has no count"):
        cache.incr("k")
    assert cache.add("a", 5, 300)
    assert cache.add("b", 1), "the default time-out"
    assert cache.add("c", 1, 0), "it ends at once"
    assert cache.get_many(["a", "b", "c"]) == {"a": 5, "b": 1}
    cache.clear()
    assert cache.get_many(["a", "b"]) == {}


def test_a_count_ends(cache: RateLimitCache) -> None:
    from support.waiting import wait_until

    assert cache.add("k", 1, 0.05)
    wait_until("the count ends", lambda: cache.get("k") is None)
    assert cache.add("k", 1, 60)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda c: c.set("k", 1), NotImplementedError, r"set\(\): it counts for django-ratelimit"),
        (lambda c: c.touch("k"), NotImplementedError, r"touch\(\): it counts"),
        (lambda c: c.decr("k"), NotImplementedError, r"decr\(\): it counts"),
        (lambda c: c.set_many({"k": 1}), NotImplementedError, "leave 'default' to a cache"),
        (lambda c: c.get_or_set("k", "text"), NotImplementedError, r"add\(\) takes an int"),
        (lambda c: c.add("k", "text"), NotImplementedError, "takes an int, not 'text'"),
        (lambda c: c.add("k", True), NotImplementedError, "takes an int, not True"),
        (lambda c: c.add("k", 1, None), ValueError, "needs a time-out in seconds, not None"),
        (lambda c: c.add("k", 1, 1e9), ValueError, "up to 416 days"),
        (lambda c: c.add("k", -1), ValueError, "counts from 0 to 2147483647, not -1"),
        (lambda c: c.incr("k", -1), ValueError, "counts from 0 to 2147483647, not -1"),
    ],
)
def test_what_it_does_not_do(
    cache: RateLimitCache, call: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        call(cache)


def test_wrong_settings() -> None:
    with pytest.raises(ImproperlyConfigured, match="CACHES, RateLimitCache: .*capacty"):
        RateLimitCache("", {"OPTIONS": {"capacty": 1000}})
    with pytest.raises(ImproperlyConfigured, match="CACHES, RateLimitCache: .*a/b"):
        RateLimitCache("a/b", {})


@pytest.mark.parametrize("open_", [False, True])
def test_a_damaged_segment_is_answered_as_django_ratelimit_is_told(open_: bool) -> None:
    settings = {**USED, "RATELIMIT_FAIL_OPEN": open_}
    with site([path("", view)], **settings):
        assert Client().get("/").status_code == 200
        damage_limits(Segment.default(), 0)
        assert Client().get("/").status_code == (200 if open_ else 403)
