"""LiteLLM's limits over many hosts, without its proxy: the hooks of one host, and quotas of the
same names on another one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("litellm")

import litellm
from support import servers
from support.leases import connection_of
from support.litellm_auth import auth
from support.names import remove, unique_name
from support.waiting import PATIENCE, wait_until_async

from fast_litellm_shm import Quota, Segment, health_check
from fast_litellm_shm.integrations.litellm import admission, failures, settings
from fast_litellm_shm.integrations.litellm.limiter import SharedLimiter
from fast_litellm_shm.integrations.litellm.subjects import Limits

USAGE = {"usage": {"prompt_tokens": 10, "completion_tokens": 20, "total_tokens": 30}}


@pytest.fixture
def server() -> Iterator[servers.Server]:
    kind = next(filter(servers.installed, servers.KINDS), None)
    if kind is None:
        pytest.skip("there is neither redis-server nor valkey-server here")
    with servers.Server(kind) as started:
        yield started


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    admission.forget()
    failures.forget()
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_TIMEOUT", "30")  # which nothing here reaches
    yield
    admission.forget()


@pytest.fixture(params=["variable", "setting"])
def chosen(
    request: pytest.FixtureRequest, server: servers.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.param == "variable":
        monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    else:
        monkeypatch.setattr(litellm, settings.ATTRIBUTE, {"cluster": server.url}, raising=False)


@pytest.fixture
def other(request: pytest.FixtureRequest) -> Segment:
    name = unique_name("other")
    request.addfinalizer(lambda: remove(name))
    return Segment(name, capacity=1000)


@pytest.fixture
def limiter() -> SharedLimiter:
    return SharedLimiter()


def beside(other: Segment, url: str, **limits: int) -> Quota:
    """The quota of another host's plugin."""
    found = Limits(**limits)
    return Quota(*found, name=admission.quota_of(found).name, segment=other, cluster=url)


def data(id: str = "c") -> dict[str, Any]:
    message = {"role": "user", "content": "x" * 12}
    return {"litellm_call_id": id, "model": "m", "messages": [message], "max_tokens": 40}


async def ask(limiter: SharedLimiter, id: str, user: Any) -> bool:
    try:
        await limiter.async_pre_call_hook(user, None, data(id), "acompletion")
    except Exception as error:
        assert getattr(error, "status_code", None) == 429, error
        return False
    return True


@pytest.mark.usefixtures("chosen")
def test_a_limit_holds_over_both(
    limiter: SharedLimiter, server: servers.Server, other: Segment
) -> None:
    limits = {"rpm_limit": 10, "tpm_limit": 1000, "max_parallel_requests": 3}
    user = auth(**limits)
    there = beside(other, server.url, rpm=10, tpm=1000, max_parallel=3)
    held = [there.admit("api_key:k", 100) for _ in range(2)]
    assert all(held)

    async def scenario() -> None:
        assert await ask(limiter, "1", user)
        assert not await asyncio.create_task(ask(limiter, "2", auth(**limits)))
        await limiter.async_post_call_success_hook(data("1"), user, USAGE)
        found = await limiter.async_post_call_response_headers_hook(data("1"), user, USAGE)
        assert found is not None
        assert int(found["x-ratelimit-remaining-requests"]) <= 7
        for each in held:
            each.release()
        reasons: list[str] = []

        def used_up() -> bool:
            with there.admit("api_key:k") as admission:
                reasons.append(admission.reason)
            return "rpm" in reasons and reasons.count("Request allowed") == 7

        await wait_until_async("both have had ten together", used_up)

    asyncio.run(scenario())


@pytest.mark.usefixtures("server")
def test_sets_that_have_no_room_are_kept_on_this_host(
    limiter: SharedLimiter,
    server: servers.Server,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A set takes up to nine places of the segment's table. Nobody passes because it is full, no
    worker counts alone, and the log says so."""
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "1000")  # 32 places
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)

    async def scenario() -> None:
        for n in range(1, 8):
            user = auth(api_key=f"k{n}", rpm_limit=n, tpm_limit=10**6, max_parallel_requests=n)
            found = [
                await asyncio.create_task(ask(limiter, f"{n} {i}", user)) for i in range(n + 1)
            ]
            assert found == [True] * n + [False]

    asyncio.run(scenario())
    over_hosts = [quota.over_hosts for quota in admission._quotas.values()]
    assert over_hosts[0] and not over_hosts[-1]
    assert "they are limits of this host alone, not over many" in caplog.text
    assert health_check()["litellm"]["could_not_judge"] >= 1


@pytest.mark.usefixtures("chosen")
def test_a_denial_books_nothing_anywhere(
    limiter: SharedLimiter, server: servers.Server, other: Segment
) -> None:
    """The key has room, its team has none: at another host the key has all of its own."""
    user = auth(rpm_limit=10, team_id="t", team_rpm_limit=1)
    key, team = beside(other, server.url, rpm=10), beside(other, server.url, rpm=1)
    assert team.admit("team:t")

    async def scenario() -> None:
        for i in range(5):
            assert not await asyncio.create_task(ask(limiter, str(i), user))
        admitted: list[bool] = []

        def all_of_it() -> bool:
            admitted.append(key.admit("api_key:k").allowed)
            return sum(admitted) == 10

        await wait_until_async("the key has all of its requests", all_of_it)

    asyncio.run(scenario())


@pytest.mark.usefixtures("chosen")
def test_the_loop_goes_on_and_a_client_that_leaves_takes_nothing(
    limiter: SharedLimiter, server: servers.Server, other: Segment
) -> None:
    """It is cancelled while its second limit is asked for."""
    user = auth(max_parallel_requests=1, team_id="t", team_rpm_limit=5)
    key = beside(other, server.url, max_parallel=1)
    team = beside(other, server.url, rpm=5)
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async def scenario() -> None:
        quota = admission.quota_of(Limits(max_parallel=1))
        quota.admit("api_key:k").release()  # granted to this host
        server.freeze()
        beating = asyncio.create_task(tick())
        task = asyncio.create_task(ask(limiter, "1", user))
        await wait_until_async("the loop comes round", lambda: ticks > 500)
        assert not task.done() and quota.in_flight("api_key:k") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert quota.in_flight("api_key:k") == 0
        server.thaw()
        admitted: list[bool] = []

        def all_of_it() -> bool:
            admitted.append(team.admit("team:t").allowed)
            return sum(admitted) == 5

        await wait_until_async("the team has all of its requests", all_of_it)
        await wait_until_async("the slot is to be had", lambda: key.admit("api_key:k").release())
        beating.cancel()

    asyncio.run(scenario())


@pytest.mark.usefixtures("chosen")
def test_what_comes_after_the_answer_asks_no_server(
    limiter: SharedLimiter, server: servers.Server, unfinished: Callable[[], int]
) -> None:
    """The hooks of an answer, of a failure, and the headers, while the server does not answer."""
    user = auth(rpm_limit=10, tpm_limit=1000, max_parallel_requests=3)

    async def request(id: str) -> None:
        assert await ask(limiter, id, user)
        frozen.set()
        await go_on.wait()
        if id == "1":
            await limiter.async_post_call_success_hook(data(id), user, USAGE)
            found = await limiter.async_post_call_response_headers_hook(data(id), user, USAGE)
            assert found and "x-ratelimit-remaining-tokens" in found
        else:
            await limiter.async_post_call_failure_hook(data(id), ValueError(), user)

    frozen, go_on = asyncio.Event(), asyncio.Event()

    async def scenario() -> None:
        tasks = [asyncio.create_task(request(id)) for id in ("1", "2")]
        quota = admission.quota_of(Limits(10, 1000, 3))
        await wait_until_async("both are admitted", lambda: quota.in_flight("api_key:k") == 2)
        await wait_until_async("and said so", lambda: unfinished() == 2)
        server.freeze()
        go_on.set()
        await asyncio.gather(*tasks)
        assert connection_of(quota).outage is None  # no call has timed out
        server.thaw()
        await wait_until_async("it is booked", lambda: quota.remaining("api_key:k")["tpm"] == 970)

    asyncio.run(scenario())


@pytest.mark.usefixtures("chosen")
def test_attempts_at_a_deployment(
    limiter: SharedLimiter, server: servers.Server, other: Segment
) -> None:
    narrow = {
        "litellm_params": {"model": "m", "max_parallel_requests": 1},
        "model_info": {"id": "d"},
    }
    there = beside(other, server.url, max_parallel=1)

    async def attempt() -> bool:
        try:
            await limiter.async_pre_call_check(narrow)
        except litellm.RateLimitError:
            return False
        return True

    async def scenario() -> None:
        with there.admit("deployment:d") as admission:
            assert admission
            assert not await attempt()
            with pytest.raises(litellm.RateLimitError):  # of a Router's synchronous calls
                limiter.pre_call_check(narrow)
        admitted: list[bool] = []
        while not admitted or not admitted[-1]:
            admitted.append(await attempt())
            await asyncio.sleep(0.005)

    asyncio.run(asyncio.wait_for(scenario(), PATIENCE))


@pytest.mark.parametrize(("policy", "passes"), [("deny", False), ("allow", True)])
def test_outages_go_by_the_clusters_policy(
    limiter: SharedLimiter,
    server: servers.Server,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    passes: bool,
) -> None:
    """fail_open is for requests that cannot be checked: these can."""
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", policy)
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, {"fail_open": not passes}, raising=False)
    user = auth(rpm_limit=10, max_parallel_requests=3)
    server.kill()

    async def scenario() -> None:
        assert await ask(limiter, "1", user) == passes

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (True, "cluster must be a URL, not True; FAST_LITELLM_SHM_CLUSTER applies"),
        ("http://h", "cluster: Cluster: url must begin with one of redis://"),
        ("http://u:secret@h", r"not 'http://u:\*\*\*@h'; FAST"),
    ],
)
def test_a_setting_that_is_wrong(monkeypatch: pytest.MonkeyPatch, given: Any, said: str) -> None:
    monkeypatch.setattr(litellm, settings.ATTRIBUTE, {"cluster": given}, raising=False)
    with pytest.warns(RuntimeWarning, match=said):
        assert settings.current() == settings.Settings()


@pytest.mark.parametrize(
    ("url", "missing"), [("nonsense", False), ("redis://h?x=1", False), ("redis://h", True)]
)
def test_a_server_that_cannot_be_used_lets_no_request_pass(
    segment: Segment,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    url: str,
    missing: bool,
) -> None:
    """This host keeps the limits, and says so once."""
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", url)
    monkeypatch.setattr("fast_litellm_shm._shared.settings._warned", set())
    if missing:
        monkeypatch.setitem(sys.modules, "redis", None)
    limiter, user = SharedLimiter(), auth(rpm_limit=3)

    async def scenario() -> list[bool]:
        return [await asyncio.create_task(ask(limiter, str(i), user)) for i in range(5)]

    with pytest.warns(RuntimeWarning, match="on this host alone"):
        found = asyncio.run(scenario())
    assert found == [True] * 3 + [False] * 2
    logged = [each.message for each in caplog.records if "on this host alone" in each.message]
    assert len(logged) == 1
