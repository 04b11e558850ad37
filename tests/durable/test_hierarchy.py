"""Several levels that outlive a reboot."""

from __future__ import annotations

import pytest
from support.reboots import Host, leases_of, link_of
from support.waiting import wait_until

from fast_litellm_shm import FixedWindow, HierarchyLimiter
from fast_litellm_shm.cluster.background import Background
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


def test_a_batch_that_comes_between_a_call_and_its_denial(host: Host) -> None:
    """A thread refills the lease of a level, which then seems to end a little later than when the
    call looked at it. What a call consumed that another level denies, goes to the file."""
    level = host.limiter(FixedWindow(1000, HOUR))
    assert level.acquire("k")
    leases = leases_of(level)
    left = leases.look(b"k")[0][0]
    decision, give_back = leases.spend(b"k", left)
    assert decision
    background = leases.connection.ensure(Background)
    background.fetch([(leases, b"k", (1,))])
    assert leases.look(b"k")[0][0] > 0
    give_back()
    wait_until("it is given back", lambda: not leases.connection.settlements)
    with background.reporting:
        pass
    assert level.peek("k").remaining == 999
    host.reboot()
    assert host.limiter(FixedWindow(1000, HOUR)).peek("k").remaining == 999
