"""What counts on this host alone, although the environment names a server. There is none: whoever
asked it would be denied."""

from __future__ import annotations

import asyncio
import pickle

import pytest
from support.names import remove, unique_name

from fast_litellm_shm import ConcurrencyLimiter, Quota, RateLimiter, Segment, Window
from fast_litellm_shm._shared import settings


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", "unix:///nowhere/to/be/found")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", "deny")


def test_a_limiter_that_is_told_so(segment: Segment) -> None:
    assert not RateLimiter(Window(3, 60), name="over hosts", segment=segment).acquire("key")
    limiter = RateLimiter(Window(3, 60), name="here", segment=segment, cluster=False)
    copy = pickle.loads(pickle.dumps(limiter))
    assert [bool(each.acquire("key")) for each in (limiter, copy, limiter, copy)] == [True] * 3 + [
        False
    ]
    limiter.reset("key")
    assert copy.acquire("key")


def test_permits_that_are_told_so(segment: Segment) -> None:
    permits = ConcurrencyLimiter(2, name="here", segment=segment, cluster=False)
    copy = pickle.loads(pickle.dumps(permits))
    with permits.acquire("key") as one, copy.acquire("key") as other:
        assert one and other and not permits.acquire("key")


def test_a_quota_that_is_told_so(segment: Segment) -> None:
    quota = Quota(rpm=2, max_parallel=2, name="here", segment=segment, cluster=False)
    copy = pickle.loads(pickle.dumps(quota))
    assert not quota.over_hosts and not copy.over_hosts
    with quota.admit("key") as one, copy.admit("key") as other:
        assert one and other and not quota.admit("key")


def test_pauses_of_an_upstream(segment: Segment) -> None:
    from fast_litellm_shm.integrations._httpx_upstream import Upstream

    upstream = Upstream((), None, 60.0, "up", segment)
    assert not upstream.begin("http://a", 0.0).holds
    assert not asyncio.run(upstream.begin_async("http://a", 0.0)).holds
    upstream.block("http://a", 30.0)
    assert 29 < upstream.blocked("http://a") <= 30
    upstream.unblock("http://a")
    assert not upstream.blocked("http://a")


def test_the_storage_of_limits(request: pytest.FixtureRequest) -> None:
    pytest.importorskip("limits")
    from limits import parse
    from limits.storage import storage_from_string
    from limits.strategies import STRATEGIES

    import fast_litellm_shm.integrations.limits  # noqa: F401

    name = unique_name("storage")
    request.addfinalizer(lambda: remove(name))
    settings._warned.clear()
    with pytest.warns(RuntimeWarning, match="the storage shm:// counts on this host alone"):
        storage = storage_from_string(f"shm://{name}?capacity=2000")
    item = parse("2/hour")
    limiters = [strategy(storage) for strategy in STRATEGIES.values()]
    for limiter in limiters:
        assert [limiter.hit(item, "key") for _ in range(3)] == [True, True, False]
        limiter.clear(item, "key")
        assert limiter.hit(item, "key")
    assert storage.reset()
    assert all(limiter.get_window_stats(item, "key").remaining == 2 for limiter in limiters)


def test_windows_of_litellms_own_limiter(segment: Segment) -> None:
    pytest.importorskip("litellm")
    from fast_litellm_shm.integrations.litellm.builtin_limiter.windows import Windows

    windows = Windows(segment)
    assert [windows.take("key", "requests", 60, 1, 2)[:2] for _ in range(3)] == [
        *((True, 1), (True, 2)),
        (False, 2),
    ]
    window = windows.open("key", 60)
    windows.give_back(window, "key", "requests", 1)
    assert windows.count(window, "key", "requests") == 1


def test_state_of_litellms_routers(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("litellm")
    from fast_litellm_shm.integrations.litellm.router.deployments import Deployments

    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment.name)
    deployments = Deployments()
    deployments.cool("deployment", 30)
    assert Deployments().cooling()
