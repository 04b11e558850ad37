"""Each call of a limiter whose limits are those of many hosts."""

from __future__ import annotations

import asyncio
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
from support import servers
from support.leases import connection_of, tokens_of

from fast_litellm_shm import (
    Limit,
    RateLimiter,
    Segment,
    SimpleRateLimiter,
    SlidingWindow,
    Window,
)
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.connection import Connection

HOUR = 3600


@pytest.fixture
def hosts(server: servers.Server, segment: Segment, other: Segment) -> list[RateLimiter]:
    """The same limiter on two hosts."""
    return [
        RateLimiter(Window(100, HOUR), name="api", segment=each, cluster=server.url)
        for each in (segment, other)
    ]


def test_acquire_tells_what_is_left_of_all_hosts(hosts: list[RateLimiter]) -> None:
    first = hosts[0].acquire("key", 60)
    assert first and first.remaining == 40 and first.retry_after == 0.0
    assert HOUR - 60 < first.reset_after <= HOUR
    denied = hosts[1].acquire("key", 60)
    assert not denied and denied.remaining <= 40
    assert HOUR - 60 < (denied.retry_after or 0) <= HOUR and denied.limit == Window(100, HOUR)
    assert denied.limit_index == 0


def test_a_denied_call_consumes_nothing(hosts: list[RateLimiter]) -> None:
    assert hosts[0].acquire("key", 60)
    for _ in range(5):
        assert not hosts[1].acquire("key", 60)
    assert hosts[0].acquire("key", 40)


def test_a_smaller_cost_fits_after_a_larger_was_refused(hosts: list[RateLimiter]) -> None:
    assert hosts[0].acquire("key", 60)
    assert not hosts[1].acquire("key", 41)
    assert not hosts[1].acquire("key", 50)  # remembered
    assert hosts[1].acquire("key", 3)


def test_a_cost_that_never_fits(hosts: list[RateLimiter]) -> None:
    for cost in (101, 2**31, 2**53, 2**70):
        denied = hosts[0].acquire("key", cost)
        assert not denied and denied.retry_after is None, cost


def test_check_and_is_allowed_and_remaining(hosts: list[RateLimiter]) -> None:
    assert hosts[0].is_allowed("key")
    assert hosts[0].check("key") == {
        "allowed": True, "reason": "Request allowed", "remaining_requests": 98,
    }  # fmt: skip
    assert hosts[0].get_remaining("key") == 98
    assert hosts[0].acquire("key", 98)
    denied = hosts[0].check("key")
    assert not denied["allowed"] and denied["reason"].startswith("Rate limit exceeded")
    assert HOUR * 1000 - 60_000 < denied["retry_after_ms"] <= HOUR * 1000
    assert hosts[0].is_allowed() and hosts[0].is_allowed(None)  # the key "default"


def test_peek_charges_nothing(hosts: list[RateLimiter]) -> None:
    for host in hosts:
        assert host.peek("key", 100)
        assert not host.peek("key", 101)
    assert hosts[0].acquire("key", 100)
    assert not hosts[1].peek("key")


def test_charge_and_refund(hosts: list[RateLimiter]) -> None:
    assert hosts[0].charge("key", 90).remaining == 10
    assert not hosts[1].acquire("key", 11)
    assert hosts[1].refund("key", 50).remaining == 60
    assert hosts[1].acquire("key", 11)
    after = hosts[0].charge("key", 100)  # into debt: the window is prolonged
    assert after.remaining == 0 and after.reset_after > HOUR


def test_block(server: servers.Server, segment: Segment, other: Segment) -> None:
    first, second = (
        RateLimiter(Limit(100, HOUR), name="api", segment=each, cluster=server.url)
        for each in (segment, other)
    )
    assert first.acquire("key")
    first.block("key", 60)
    for limiter in (first, second):
        denied = limiter.acquire("key")
        assert not denied and 50 < (denied.retry_after or 0) <= 60
    windows = RateLimiter(Window(9), name="windows", segment=segment, cluster=server.url)
    with pytest.raises(ValueError, match="none of its limits is a TokenBucket"):
        windows.block("key", 1)


def test_reset_of_a_key_and_of_all(hosts: list[RateLimiter]) -> None:
    for key in ("a", "b*[x]", b"\xff\x00"):
        assert hosts[0].acquire(key, 100)
        assert not hosts[0].acquire(key)
    hosts[0].reset("a")
    assert hosts[0].acquire("a", 50) and hosts[1].acquire("a", 50)
    assert not hosts[0].acquire("b*[x]")
    hosts[0].reset()
    assert hosts[0].acquire("b*[x]") and hosts[0].acquire(b"\xff\x00")


def test_names_and_keys_do_not_meet(server: servers.Server, segment: Segment) -> None:
    def limiter(name: str) -> RateLimiter:
        return RateLimiter(Window(1, HOUR), name=name, segment=segment, cluster=server.url)

    for name, key in (("a/b", "c"), ("a", "b/c"), ("a%2Fb", "c"), ("a}", "{c"), ("a", "")):
        assert limiter(name).acquire(key), (name, key)
        assert not limiter(name).acquire(key), (name, key)


def test_several_limits_and_costs(server: servers.Server, segment: Segment) -> None:
    limiter = RateLimiter(
        Window(10, HOUR), Limit(1000, HOUR), SlidingWindow(5000, HOUR),
        name="api", segment=segment, cluster=server.url,
    )  # fmt: skip
    assert limiter.acquire("key", (1, 900, 0))
    denied = limiter.acquire("key", (1, 200, 0))
    assert not denied and denied.limit == Limit(1000, HOUR)
    assert limiter.acquire("key", (1, 50, 5000))
    denied = limiter.acquire("key", (1, 0, 1))
    assert not denied and denied.limit_index == 2
    with pytest.raises(ValueError, match="3 limits"):
        limiter.acquire("key", (1, 2))


def test_acquire_many(hosts: list[RateLimiter]) -> None:
    batch = hosts[0].acquire_many(["a", "b", "a"], [100, 1, 1])
    assert batch.allowed.tolist() == [True, True, False]
    assert batch.remaining.tolist() == [0, 99, 0]
    assert batch.retry_after[2] > HOUR - 60
    assert hosts[1].acquire_many(["c"], 101).retry_after.tolist() == [math.inf]


def test_acquire_many_asks_for_many_keys_at_once(
    hosts: list[RateLimiter], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    run = Connection.run

    def counted(link: Connection, operation: str, calls: Any, began: int, size: int) -> bytes:
        sizes.append(size // 104)  # bytes of an answer
        return run(link, operation, calls, began, size)

    monkeypatch.setattr(Connection, "run", counted)
    keys = [f"user {i}" for i in range(300)]
    assert hosts[0].acquire_many(keys).allowed.all()
    assert sizes == [200, 100]
    # Of what is left of 100 the other host gets no batch that holds 60, and asks for each.
    other = [hosts[1].acquire_many(keys[:3] + ["user 0"], 60).allowed.tolist() for _ in range(2)]
    assert other == [[True, True, True, False], [False] * 4]
    for bad in (-1, "1", None):
        with pytest.raises((TypeError, ValueError), match="cost"):
            hosts[0].acquire_many(["new", "newer"], [1, bad])  # type: ignore[list-item]
    assert hosts[0].acquire_many(["a", "b"], [2**60, 1]).allowed.tolist() == [False, True]


def test_wait(server: servers.Server, segment: Segment) -> None:
    limiter = RateLimiter(Window(2, 5), name="api", segment=segment, cluster=server.url)
    assert limiter.acquire("key", 2)
    assert not limiter.wait("key", timeout=0.0)
    assert not limiter.wait("key", 3, timeout=10)  # never
    assert limiter.wait("key", timeout=30)


def test_async_calls(server: servers.Server, segment: Segment) -> None:
    limiter = RateLimiter(Window(20, 5), name="api", segment=segment, cluster=server.url)

    async def calls() -> int:
        found = await asyncio.gather(*(limiter.acquire_async("key") for _ in range(50)))
        assert not await limiter.acquire_async("key")
        assert await limiter.wait_async("key", timeout=30)
        return sum(bool(each) for each in found)

    assert asyncio.run(calls()) == 20


def test_acquire_async_of_one_host(segment: Segment) -> None:
    limiter = RateLimiter(Window(1, HOUR), name="api", segment=segment)
    assert asyncio.run(limiter.acquire_async("key"))
    assert not asyncio.run(limiter.acquire_async("key"))


def test_pickle(hosts: list[RateLimiter]) -> None:
    assert hosts[0].acquire("key", 100)
    copy = pickle.loads(pickle.dumps(hosts[0]))
    assert not copy.acquire("key")
    assert connection_of(copy).cluster == connection_of(hosts[0]).cluster


def test_the_variable_alone(
    server: servers.Server, segment: Segment, other: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code with it and without."""

    def admitted() -> list[int]:
        return [
            sum(limiter.is_allowed("key") for _ in range(10))
            for limiter in (
                SimpleRateLimiter(5, burst=5, segment=each, name="simple")
                for each in (segment, other)
            )
        ]

    assert admitted() == [5, 5]
    segment_reset, other_reset = (
        SimpleRateLimiter(5, burst=5, segment=each, name="simple") for each in (segment, other)
    )
    segment_reset.reset()
    other_reset.reset()
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    assert admitted() == [5, 0]


def test_limits_change_at_run_time(server: servers.Server, segment: Segment) -> None:
    """What was consumed stays consumed."""

    def limiter(*limits: Limit | Window) -> RateLimiter:
        return RateLimiter(*limits, name="api", segment=segment, cluster=server.url)

    first = limiter(Window(100, HOUR))
    assert first.acquire("key", 100)
    second = limiter(Window(150, HOUR))
    second.reset("other")
    assert first.limits == second.limits
    tokens_of(first).unrefuse(b"key")
    assert first.acquire("key", 50) and not first.acquire("key")
    bucket = limiter(Limit(100, HOUR))
    assert bucket.acquire("bucket", 100)
    slower = limiter(Limit(50, HOUR))
    denied = slower.acquire("bucket", 50)  # until then it drains as before
    assert not denied and 0.9 * HOUR < (denied.retry_after or 0) < 1.1 * HOUR


def test_limits_that_become_more_during_a_call(server: servers.Server, segment: Segment) -> None:
    """What the call has counted already is for those that there were."""
    first = RateLimiter(Window(100, HOUR), name="api", segment=segment, cluster=server.url)
    wallet = tokens_of(first)
    before, have = wallet.costs(7), wallet.look(b"key", take=True)[0]
    RateLimiter(Window(100, HOUR), Limit(5), name="api", segment=segment, cluster=server.url)
    assert not first.acquire("other", 200)  # it has met them
    request, _ = wallet.request("take", b"key", before, have)
    (found,) = wallet.connection.call([request])
    assert found.admitted and [each.used >= 7 for each in found.limits] == [True, False]


def test_what_a_server_cannot_count_is_refused_at_once(segment: Segment) -> None:
    cluster = Cluster("redis://127.0.0.1:1")
    with pytest.raises(ValueError, match="67,108,864"):
        RateLimiter(Limit(10**9 + 7, 60), name="a", segment=segment, cluster=cluster)
    with pytest.raises(ValueError, match="52 days"):
        RateLimiter(Limit(10, 86_400 * 400), name="b", segment=segment, cluster=cluster)
    with pytest.raises(ValueError, match="86 bytes"):
        RateLimiter(Window(10), name="c" * 96, segment=segment, cluster=cluster)
    with pytest.raises(TypeError, match="cluster must be"):
        RateLimiter(Window(10), name="d", segment=segment, cluster=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("found", "complaint"),
    [("None", "need the redis library"), ("redis", "from version 6 on, not 5.3.0")],
)
def test_without_the_extra(segment_name: str, found: str, complaint: str) -> None:
    """In a process of its own: the threads of other tests have the library already."""
    code = (
        "import sys, types; redis = types.ModuleType('redis'); redis.__version__ = '5.3.0'\n"
        f"sys.modules['redis'] = {found}\n"
        "from fast_litellm_shm import RateLimiter, Segment, Window\n"
        f"segment = Segment({segment_name!r}, capacity=10)\n"
        "RateLimiter(Window(1), name='a', segment=segment, cluster='redis://127.0.0.1:1')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError") and complaint in last
    assert 'pip install "fast-litellm-shm[cluster]"' in last


def test_without_it_nothing_is_imported() -> None:
    code = "import sys, fast_litellm_shm; print('redis' in sys.modules)"
    code += "; print('fast_litellm_shm.cluster' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert out.stdout.split() == ["False", "False"]
