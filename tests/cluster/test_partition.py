"""A host that is cut off from the server, and joined again."""

from __future__ import annotations

import pytest
from support import servers
from support.fleet import Fleet
from support.relay import Relay

from fast_litellm_shm import Segment, Window
from fast_litellm_shm.cluster import Cluster
from fast_litellm_shm.cluster.hosts import host_count

LIMIT = 2000
HOUR = 3600


@pytest.mark.parametrize("policy", ["deny", "local"])
def test_a_host_that_is_cut_off_and_joined_again(server: servers.Server, policy: str) -> None:
    """It spends what it has, then goes by the policy; the others go on. Nothing is over-admitted
    but the share that the policy gives it, which is charged when it is back."""
    with Relay(server.path) as relay:
        clusters = [
            Cluster(f"unix://{path}", on_outage=policy, timeout=servers.SLOWEST)
            for path in (relay.path, server.path, server.path)
        ]
        with Fleet(clusters, [Window(LIMIT, HOUR)], hosts=3, pause=0.05) as fleet:
            segments = [Segment(name, create=False) for name in fleet.names]
            fleet.until(lambda: host_count(segments[0]) == 3, "all hosts are known")
            relay.cut()
            fleet.pause(0.002)
            fleet.until(lambda: fleet.total >= LIMIT * 2 // 3, "the others go on")
            alone = sum(fleet.admitted[:2])
            fleet.pause(0.05)
            relay.join()
            fleet.until(lambda: sum(fleet.admitted[:2]) > alone, "it is back")
            fleet.pause(0.0)
            fleet.until(lambda: fleet.total >= LIMIT * 9 // 10, "nearly all is used")
            fleet.go_on(50_000)
            share = LIMIT // 3 if policy == "local" else 0
            assert fleet.total <= LIMIT + share
