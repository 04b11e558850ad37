"""Quota over many hosts: requests and tokens a minute, and calls in parallel."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
from support import servers
from support.waiting import wait_until

from fast_litellm_shm import ConcurrencyLimiter, Quota, Segment
from fast_litellm_shm.limiters.quota import Admission


@pytest.fixture
def hosts(server: servers.Server, segment: Segment, other: Segment) -> tuple[Quota, Quota]:
    first, second = (
        Quota(rpm=10, tpm=1000, max_parallel=3, name="api", segment=each, cluster=server.url)
        for each in (segment, other)
    )
    return first, second


def reasons(quota: Quota, denials: list[Admission]) -> list[str]:
    """Why 800 tokens were denied, so far and now."""
    denials.append(quota.admit("key", 800))
    return [each.reason for each in denials]


def admitted(quota: Quota, tokens: int) -> Admission:
    """As soon as what another host does not use has come back, or a refusal is forgotten."""
    found: list[Admission] = []

    def admits() -> bool:
        found.append(quota.admit("key", tokens))
        return bool(found[-1])

    wait_until("it is admitted", admits)
    return found[-1]


def test_each_limit_holds_over_all_hosts(hosts: tuple[Quota, Quota]) -> None:
    first, second = hosts
    held = [first.admit("key", 100), first.admit("key", 100), second.admit("key", 100)]
    assert all(held)
    for each in hosts:
        denied = each.admit("key", 100)
        assert not denied and denied.reason == "max_parallel" and denied.retry_after == 0.0
        assert denied.in_flight == each.in_flight("key")
    held[0].release()
    denials: list[Admission] = []
    wait_until("a permit is to be had", lambda: reasons(first, denials)[-1] == "tpm")
    assert 50 < (denials[-1].retry_after or 0) <= 60
    assert first.in_flight("key") == 1  # it has given its permit back
    left = {"rpm": 7, "tpm": 700, "max_parallel": 2}
    # Whoever is denied has the others asked, again and again: one that has just begun may not
    # listen.
    wait_until(
        "what the other was granted has come back",
        lambda: not first.admit("key", 800) and first.remaining("key") == left,
    )
    for admission in held:
        admission.release()
    while first.admit("key").release():
        pass
    wait_until("a permit is to be had", lambda: second.admit("key").reason == "rpm")


def test_a_denial_consumes_nothing(hosts: tuple[Quota, Quota]) -> None:
    first, second = hosts
    for _ in range(30):
        assert not first.admit("key", 1001)
    held = [admitted(second, 300) for _ in range(3)]
    for admission in held:
        admission.release()


def test_settle_and_cancel(hosts: tuple[Quota, Quota]) -> None:
    first, second = hosts
    admission = first.admit("key", 500)
    admission.settle(900)
    wait_until("a permit is to be had", lambda: second.admit("key", 200).reason == "tpm")
    admission.settle(100)
    admitted(second, 800).release()
    admission.cancel()
    assert not admission.release() and admission.released
    wait_until("it is given back", lambda: first.remaining("key")["tpm"] == 200)
    wait_until("the request too", lambda: first.remaining("key")["rpm"] == 9)


@pytest.mark.parametrize("given", [{"rpm": 2}, {"tpm": 20}, {"max_parallel": 2}])
def test_one_limit_alone(
    server: servers.Server, segment: Segment, other: Segment, given: dict[str, Any]
) -> None:
    hosts = [
        Quota(name="one", segment=each, cluster=server.url, **given) for each in (segment, other)
    ]
    held = [each.admit("key", 10) for each in hosts]
    assert all(held)
    denied = hosts[0].admit("key", 10)
    assert not denied and denied.reason == next(iter(given))
    assert hosts[1].remaining("key") == {next(iter(given)): 1 if "max_parallel" in given else 0}
    for admission in held:
        assert admission.release()


def test_errors_have_the_name_that_was_given(server: servers.Server, segment: Segment) -> None:
    for size in (76, 86, 96):
        with pytest.raises(ValueError, match=f"at most 75 bytes .*not '{'n' * size}'$"):
            Quota(rpm=1, max_parallel=1, name="n" * size, segment=segment, cluster=server.url)
    Quota(rpm=1, max_parallel=1, name="n" * 75, segment=segment, cluster=server.url)
    with Quota(rpm=1, max_parallel=1, name="q", segment=segment, cluster=server.url).admit("k"):
        other = ConcurrencyLimiter(1, name="q (parallel)", segment=segment, cluster=server.url)
        assert other.name == "q (parallel)" and not other.acquire("k")


def test_pickle_and_the_variable(
    server: servers.Server, segment: Segment, other: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", server.url)
    first = Quota(rpm=5, max_parallel=2, name="api", segment=segment)
    copy = pickle.loads(pickle.dumps(first))
    held = [first.admit("key"), copy.admit("key")]
    assert all(held)
    assert not Quota(rpm=5, max_parallel=2, name="api", segment=other).admit("key")
    assert repr(first) == "Quota(5/60s window, 2 in flight, name='api')"
    for admission in held:
        admission.release()


def test_a_fork_goes_on(hosts: tuple[Quota, Quota]) -> None:
    with hosts[0].admit("key"):
        child = os.fork()
        if not child:
            os._exit(sum(map(bool, [hosts[0].admit("key") for _ in range(5)])))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
