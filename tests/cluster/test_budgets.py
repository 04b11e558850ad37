"""Budgets over hosts: a real server leases money to hosts, which are segments here."""

from __future__ import annotations

import asyncio
import gc
import pickle
import random
import threading
from collections.abc import Callable
from decimal import Decimal
from typing import Any

import pytest
from cluster.test_hostile import NAN, RAW, packed
from cluster.test_rights import documented, granting, missed, url_of
from support import servers
from support.children import run, run_one
from support.names import remove, unique_name
from support.waiting import PATIENCE, wait_until

from fast_litellm_shm import Budget, Quota, Segment, exceptions
from fast_litellm_shm._shared.inspection import Inspection
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.hosts import host_count
from fast_litellm_shm.cluster.leader import Leader

D = Decimal
Make = Callable[..., Budget]


@pytest.fixture
def make(server: servers.Server) -> Make:
    def made(segment: Segment, usd: Any = 10, per: str | None = "year", **more: Any) -> Budget:
        more = {"name": "team", "cluster": server.url, **more}
        return Budget(usd, per, segment=segment, **more)

    return made


def evals(server: servers.Server) -> int:
    with server.client() as client:
        return int(client.info("commandstats").get("cmdstat_evalsha", {"calls": 0})["calls"])


def spend(budget: Budget, usd: str, times: int = 1) -> int:
    """How often it could be reserved."""
    done = 0
    for _ in range(times):
        with budget.reserve("k", usd) as reservation:
            if reservation:
                reservation.settle(usd)
                done += 1
    return done


def test_two_hosts_share_a_budget(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment), make(other)
    assert spend(here, "0.5", 7) == 7
    assert spend(there, "1.5", 3) == 3
    wait_until("the rest is had", lambda: spend(there, "1") or here.remaining("k") == 1)
    for budget in (here, there):
        assert not budget.reserve("k", "1.00001")
        assert not budget.reserve("k", "10.1")
    wait_until("the last of it is had", lambda: here.remaining("k") < 1 or spend(here, "1"))
    assert here.spent("k") + here.usage("k").reserved <= 10


def test_no_more_than_the_budget(make: Make, segment: Segment, other: Segment) -> None:
    """Whoever asks, and in whatever amounts; and nearly all of it is had."""
    budgets, rng = [make(segment), make(other)], random.Random(5)
    total = D(0)

    def step() -> bool:
        nonlocal total
        budget = rng.choice(budgets)
        amount = D(rng.randint(1, 10**8)).scaleb(-9)
        with budget.reserve("k", amount) as reservation:
            if reservation:
                actual = D(rng.randint(0, int(amount.scaleb(9)))).scaleb(-9)
                reservation.settle(actual)
                total += actual
        return total > D("9.9")

    wait_until("nearly all is spent", step, every=0.0)
    for _ in range(500):
        step()
        assert total <= 10
    for budget in budgets:
        usage = budget.usage("k")
        assert usage.spent <= total <= usage.spent + usage.reserved <= 10


def test_few_calls_of_the_server(make: Make, segment: Segment, server: servers.Server) -> None:
    budget = make(segment, 1000)
    assert spend(budget, "0.001")
    before = evals(server)
    assert spend(budget, "0.001", 9_000) == 9_000
    assert evals(server) - before <= 2  # each lease is a hundredth of the budget


def test_workers_of_two_hosts(make: Make, segment: Segment, other: Segment) -> None:
    """Processes that reserve at the same time, on both."""
    budget = make(segment, 5)
    names = [(each.name, budget._cluster) for each in (segment, other)] * 2
    done = int(sum(run(_worker, names, "spawn")))
    assert done <= 500

    def rest() -> bool:
        nonlocal done
        done += spend(budget, "0.01", 10)
        return done >= 500

    wait_until("all is had", rest)
    assert done == 500 and not spend(budget, "0.01")
    assert budget.spent("k") == 5


def _worker(segment: str, cluster: Cluster) -> int:
    budget = Budget(5, "year", name="team", segment=Segment(segment), cluster=cluster)
    return spend(budget, "0.01", 400)


def test_what_was_leased_is_given_back(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment), make(other)
    assert here.reserve("k", 6)  # dropped at once: leased, and not used
    gc.collect()
    assert here.usage("k").reserved == 0
    wait_until("the other host gets it", lambda: there.reserve("k", 9))


def test_a_process_that_ends_gives_back(make: Make, segment: Segment, other: Segment) -> None:
    there = make(other)
    run_one(_reserves_and_ends, segment.name, there._cluster)
    assert there.usage("k").reserved == 0
    assert there.reserve("k", D("9.5"))
    assert there.spent("k") == D("0.5")


def test_a_process_that_ends_while_it_gives_back(
    make: Make, segment: Segment, other: Segment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the leader's thread has taken out of the segment, the server is told before the end."""
    here, there = make(segment), make(other)
    assert here.reserve("k", 6)  # dropped at once: leased, and not used
    gc.collect()
    connection: Any = here._leases.connection  # type: ignore[union-attr]
    call, taken, go_on = connection.call, threading.Event(), threading.Event()

    def slow(requests: Any) -> Any:
        taken.set()
        assert go_on.wait(PATIENCE)
        return call(requests)

    monkeypatch.setattr(connection, "call", slow)
    window = here._look(b"k").window
    gives = threading.Thread(
        target=Leader(connection)._give_back_money, args=(b"team", b"k", window)
    )
    gives.start()
    assert taken.wait(PATIENCE)
    ends = threading.Thread(target=connection.ensure(Background).finish)
    ends.start()
    ends.join(0.5)
    assert ends.is_alive()
    go_on.set()
    for thread in (gives, ends):
        thread.join()
    assert there.reserve("k", 10)


def _reserves_and_ends(segment: str, cluster: Cluster) -> None:
    budget = Budget(10, "year", name="team", segment=Segment(segment), cluster=cluster)
    budget.reserve("k", 4).release()
    budget.reserve("k", 1).settle("0.5")


def test_a_reservation_is_never_given_back(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment), make(other)
    with here.reserve("k", 6) as reservation:
        for _ in range(20):
            assert not there.reserve("k", "4.01")
        wait_until("the rest is had", lambda: there.reserve("k", 4))
        reservation.settle(6)
    assert here.spent("k") == 6


def test_what_costs_more_than_was_reserved(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment), make(other)
    here.reserve("k", 1).settle(9)
    here.reserve("k", "0.5")  # tells the server
    wait_until("the others know", lambda: there.spent("k") == 9)
    assert not there.reserve("k", "1.01")
    here.charge("k", 5)
    assert there.spent("k") == 14
    assert not there.reserve("k", "0.01")
    assert there.remaining("k") == 0
    here.refund("k", 5)
    assert here.spent("k") == 9


def test_more_for_this_window(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment), make(other)
    assert spend(here, "10") and not spend(here, "1")
    there.add("k", 5)
    assert here.usage("k").limit == there.usage("k").limit == 15
    wait_until("it is had", lambda: spend(here, "4"))
    there.add("k", "-2")
    assert here.usage("k").limit == 13
    assert not spend(there, "2")


def test_reset(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment), make(other)
    assert spend(here, "4") and spend(there, "5")
    here.reset("k")
    assert here.spent("k") == 0
    wait_until("the other host has heard of it", lambda: there.spent("k") == 0)
    wait_until("all is there again", lambda: here.reserve("k", 10))
    here.reset()
    assert here.spent("k") == 0
    wait_until("all is there again", lambda: here.reserve("k", 10))


def test_what_is_given_back_after_a_reset(make: Make, segment: Segment, other: Segment) -> None:
    """It was leased before, so it makes no room now."""
    here, there = make(segment), make(other)
    leases = there._leases
    assert leases is not None
    there.reserve("k", 8).release()
    window = leases.look(b"k").window
    with Deaf(there):
        here.reset("k")
    given = leases.withdrawn(b"k", window)
    if given is not None:  # it has not heard of the reset
        leases.connection.call([given])
    assert here.reserve("k", 10)
    assert not there.reserve("k", 1)


class Deaf:
    """The process hears of no reset meanwhile."""

    def __init__(self, budget: Budget) -> None:
        self._connection = budget._leases.connection  # type: ignore[union-attr]

    def __enter__(self) -> None:
        self._kept = dict(self._connection.budgets)
        self._connection.budgets.clear()

    def __exit__(self, *_: object) -> None:
        self._connection.budgets.update(self._kept)


def test_windows_and_amounts(make: Make, segment: Segment, other: Segment) -> None:
    for per in ("hour", "month", None):
        here, there = (make(each, 10**9, per, name=f"of {per}") for each in (segment, other))
        assert spend(here, "999999999.999999")
        assert not spend(there, "0.000002")
        here.usage("k")  # tells the server what it has spent
        assert there.spent("k") == D("999999999.999999")
    small = make(segment, "0.000001", name="small")
    assert spend(small, "0.000000001", 1000) == 1000 and not spend(small, "0.000000001")


def test_a_window_that_is_over(make: Make, segment: Segment, other: Segment) -> None:
    here, there = make(segment, per="hour"), make(other, per="hour")
    assert spend(here, "10") and not spend(there, "1")
    try:
        lib.fshm_wall_pretend(segment._handle, 3600 * 10**9)
        lib.fshm_wall_pretend(other._handle, 3600 * 10**9)
        wait_until("the next window", lambda: there.reserve("k", 10))
        assert here.spent("k") == 0
    finally:
        lib.fshm_wall_pretend(segment._handle, 0)


def test_a_warning_comes_once(make: Make, segment: Segment, other: Segment) -> None:
    told: list[Any] = []
    how = {"warn_at": 0.8, "on_warn": lambda key, usage: told.append((key, usage.limit))}
    here, there = make(segment, **how), make(other, **how)
    assert spend(here, "4") and spend(there, "3") and not told
    assert spend(there, "1") and told == [("k", 10)]
    assert spend(here, "1.5") and len(told) == 1
    here.charge("k", 1)
    assert len(told) == 1


def test_the_counters(make: Make, segment: Segment) -> None:
    budget = make(segment)
    assert spend(budget, "10") and not spend(budget, "1")
    counts = Inspection(segment).counts
    assert (counts.admitted.sum(), counts.denied.sum()) == (1, 1)


def test_other_ways_to_a_budget(make: Make, segment: Segment, other: Segment) -> None:
    budget = make(segment)
    copy = pickle.loads(pickle.dumps(budget))
    assert spend(copy, "4") and budget.spent("k") == 4
    quota = Quota(rpm=100, name="q", budget=budget, segment=segment, cluster=False)

    async def admitted() -> bool:
        async with await quota.admit_async("k", usd="5") as admission:
            if admission:
                admission.settle(0, usd=5)
            return bool(admission)

    assert asyncio.run(admitted()) and not asyncio.run(admitted())
    with make(other).reserve("k", "0.5", also=[(make(other, name="wide"), "t")]) as both:
        assert both
    assert not asyncio.run(budget.reserve_async("k", "1.1"))


@pytest.mark.parametrize("policy", ["deny", "local", "allow"])
def test_outages(policy: str, segment: Segment, other: Segment, server: servers.Server) -> None:
    cluster = Cluster(server.url, on_outage=policy, timeout=0.5)
    here, there = (
        Budget(10, "year", name="team", segment=each, cluster=cluster) for each in (segment, other)
    )
    assert spend(here, "1") and spend(there, "1")
    connection = here._leases.connection  # type: ignore[union-attr]
    wait_until("both hosts are known", lambda: host_count(segment) == host_count(other) == 2)
    server.kill()
    wanted = {"deny": 0, "local": 4, "allow": 20}[policy]  # a host's share of 10 is 5
    for budget in (here, there):
        assert spend(budget, "1", 20) == wanted
    if policy != "allow":
        denied = here.reserve("k", "8")
        assert "cannot be used" in denied.reason and 0 < (denied.retry_after or 0) < 10
    with pytest.raises(exceptions.ClusterError, match="nothing was added"):
        here.add("k", 1)
    assert here.usage("k").limit == 10
    server.start()
    spent = 2 + 2 * wanted
    wait_until("it is reported", lambda: here.spent("k") + here.usage("k").reserved >= spent)
    fits = wait_until("the outage is over", lambda: connection.outage is None) and spent < 10
    wait_until("it is as before", lambda: bool(here.reserve("k", "0.5")) == fits)
    wait_until("the other host is back too", lambda: there.remaining("k") <= max(10 - spent, 0))


VALID = {"t": 1, "a": 0, "h": {"x": {"t": 1, "g": 1, "d": 0, "n": 0}}, "z": 0, "d": 0, "n": 0, "r": 0}  # noqa: E501  # fmt: skip
HOST = VALID["h"]["x"]  # type: ignore[index]
WRONG = [
    *RAW.values(),
    *(
        packed({**VALID, name: value})
        for name in ("t", "a", "z", "d", "n", "r", "h")
        for value in (NAN, "1", [1], None)
    ),
    *(packed({**VALID, "h": {"x": {**HOST, n: NAN}}}) for n in ("t", "g", "m", "d", "n")),
    packed({**VALID, "h": {"x": {**HOST, "k": 5}}}),
    packed({**VALID, "z": -1}),
]


def test_junk_counts_as_used_up(make: Make, segment: Segment, server: servers.Server) -> None:
    budget = make(segment)
    budget.usage("k")
    leases = budget._leases
    assert leases is not None
    with server.client() as client:
        for number, junk in enumerate(WRONG):
            raw = b"k%d" % number
            asked = leases._request("look", raw, leases.look(raw))
            at = asked.state_key("fast-shm")
            client.set(at, junk)
            assert not budget.reserve(raw, "0.01"), junk[:50]
            budget.reset(raw)
            assert budget.reserve(raw, "0.01"), junk[:50]
        client.set(at, packed(VALID))
        assert budget.reserve(raw, "0.01")


def test_messages_of_hostile_hosts(make: Make, segment: Segment, server: servers.Server) -> None:
    """They take back what nobody uses, at most."""
    budget = make(segment)
    with budget.reserve("k", 3) as reservation, server.client() as client:
        window = str(budget._look(b"k").window)
        wait_until("it listens", lambda: client.pubsub_numsub("fast-shm:recall")[0][1])
        for message in (
            ["b"], ["b", "team"], ["b", "team", "k"], ["b", "team", "k", "x"],
            ["b", "no", "k", "5"], ["b", "team", "k", "-1"],
            ["b", "team", "k", window], ["B", "team", "", window, "a"], ["b", "team", "k", "0"],
            ["b", "team", "k", "9" * 11], ["b", "team", "", window], ["b", "team", "k", "5"],
        ):  # fmt: skip
            client.publish("fast-shm:recall", packed(message))
        wait_until("they are read", lambda: budget._look(b"k").granted == 3 * 10**9)
        assert budget.usage("k").reserved == 3
        reservation.settle(3)
    assert spend(budget, "7") and not spend(budget, "0.01")


def test_the_documented_rights_suffice(kind: str, segment: Segment, other: Segment) -> None:
    with granting(kind, *documented()) as server:
        cluster = Cluster(url_of(server))
        here, there = (
            Budget(10, name="team", segment=each, cluster=cluster) for each in (segment, other)
        )
        here.reserve("k", 6).release()
        wait_until("it is given back", lambda: there.reserve("k", 9))
        here.add("k", 1)
        here.reset()
        assert here.spent("k") == 0
        with server.client() as client:
            assert not missed(client)


def test_no_names(make: Make, request: pytest.FixtureRequest, other: Segment) -> None:
    """A host that keeps no names is asked to give back all the same."""
    name = unique_name("sealed")
    request.addfinalizer(lambda: remove(name))
    here, there = make(Segment(name, capacity=100, names="hashed")), make(other)
    here.reserve("k", 6).release()
    wait_until("it is given back", lambda: there.reserve("k", 9))


def test_this_host_alone(segment: Segment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER", "unix:///nowhere/to/be/found")
    monkeypatch.setenv("FAST_LITELLM_SHM_CLUSTER_OUTAGE", "deny")
    assert not Budget(10, name="over hosts", segment=segment).reserve("k", 1)
    budget = Budget(10, name="here", segment=segment, cluster=False)
    copy = pickle.loads(pickle.dumps(budget))
    assert spend(budget, "5") and spend(copy, "5") and not spend(copy, "1")


def _spends_and_gives_nothing_back(segment: str, cluster: Cluster) -> None:
    there = Segment(segment, capacity=100)
    budget = Budget(10, "year", name="team", segment=there, cluster=cluster)
    assert spend(budget, "0.5", 7) == 7
    budget._leases.connection.budgets.clear()  # type: ignore[union-attr]


def test_a_killed_host_loses_what_it_had(make: Make, segment: Segment) -> None:
    """Its lease stays leased: at most a hundredth of the budget beyond what was reserved."""
    name = unique_name("gone")
    here = make(segment)
    run_one(_spends_and_gives_nothing_back, name, here._cluster)
    remove(name)
    usage = here.usage("k")
    assert usage.spent + usage.reserved >= D("3.5")
    assert here.remaining("k") >= D("6.3")
