"""Several levels that outlive a reboot."""

from __future__ import annotations

import sqlite3

import pytest
from support.reboots import Host, leases_of, link_of, spend
from support.waiting import wait_until

from fast_litellm_shm import FixedWindow, HierarchyLimiter
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.durable import StateFile

HOUR = 3600
PATH = ("acme", "red", "ann")


def hierarchy(host: Host, *n: int) -> HierarchyLimiter:
    levels = dict(
        zip(("org", "team", "user"), (FixedWindow(each, HOUR) for each in n), strict=True)
    )
    made = HierarchyLimiter(
        levels, name="api", segment=host.segment, durable=StateFile(host.folder)
    )
    host.links.append(link_of(made.levels["org"]))
    return made


@pytest.fixture
def no_batch_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """No thread asks for one."""
    monkeypatch.setattr(Background, "refill", lambda *_: None)


@pytest.mark.usefixtures("no_batch_ahead")
@pytest.mark.parametrize("binds", ["org", "team", "user"])
def test_over_a_reboot(host: Host, binds: str) -> None:
    """Exactly the limit of the level that binds, and a denial consumes nothing."""
    n = [60 if level == binds else 1000 for level in ("org", "team", "user")]
    first = hierarchy(host, *n)
    assert sum(first.is_allowed(PATH) for _ in range(30)) == 30
    host.reboot()
    again = hierarchy(host, *n)
    assert sum(again.is_allowed(PATH) for _ in range(200)) == 30
    assert again.acquire(PATH).level == binds
    # What the denied call gave back goes to the file by a thread, if no lease has room for it.
    link = link_of(again.levels["org"])
    wait_until("all of it is given back", lambda: not link.settlements)
    with link.ensure(Background).reporting:
        pass
    host.reboot()
    left = hierarchy(host, *n).remaining(PATH)
    assert list(left.values()) == [each - 60 for each in n]


def given_back(leases: TokenLeases) -> None:
    """Wait until it is, by the thread that does so."""
    wait_until("it is given back", lambda: not leases.connection.settlements)
    with leases.connection.ensure(Background).reporting:
        pass


def test_a_batch_that_comes_between_a_call_and_its_denial(host: Host) -> None:
    """A lease that ends later than the one that the call looked at may be of a later window. What
    the call consumed does not go there: it counts as used until the window ends."""
    level = host.limiter(FixedWindow(1000, HOUR))
    assert level.acquire("k")
    leases = leases_of(level)
    left = leases.look(b"k")[0][0]
    decision, give_back = leases.spend(b"k", left)
    assert decision
    leases.connection.ensure(Background).fetch([(leases, b"k", (1,))])
    assert leases.look(b"k")[0][0] > 0
    give_back()
    given_back(leases)
    assert level.peek("k").remaining == 999 - left
    host.reboot()
    assert host.limiter(FixedWindow(1000, HOUR)).peek("k").remaining == 999 - left


@pytest.mark.usefixtures("no_batch_ahead")
def test_a_reset_between_a_call_and_its_denial(host: Host) -> None:
    """What was charged before it is forgotten, so none of it is given back."""
    level = host.limiter(FixedWindow(1000, HOUR))
    assert level.acquire("k", 3)
    leases = leases_of(level)
    decision, give_back = leases.spend(b"k", leases.look(b"k")[0][0])
    assert decision
    level.reset("k")
    admitted = spend(level, "k")
    give_back()
    given_back(leases)
    assert admitted + spend(level, "k") == 1000


def test_what_an_outage_admits_is_not_given_back(host: Host) -> None:
    """Nobody granted it. What the policy admits beyond the limit is all that goes beyond it."""
    policy = StateFile(host.folder, on_outage="allow", timeout=0.05)
    level = host.limiter(FixedWindow(1000, HOUR), durable=policy)
    assert spend(level, "k") == 1000
    leases = leases_of(level)
    leases.unrefuse(b"k")
    other = sqlite3.connect(host.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # the file does not answer
    decision, give_back = leases.spend(b"k", 5)
    assert decision
    assert leases.connection.outage is not None
    other.execute("ROLLBACK")
    other.close()
    wait_until("the file answers", lambda: leases.connection.outage is None)
    give_back()
    given_back(leases)
    assert spend(level, "k") == 0
