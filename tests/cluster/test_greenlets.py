"""Limits over many hosts in programs that gevent or eventlet patch: while one greenlet waits for
the server, or the process for its turn to lead the host, the others run."""

from __future__ import annotations

import pytest
from support import green, servers
from support.children import run

from fast_litellm_shm import Segment

KEYS, EACH, PARTIES = 10, 5, 2


def use(hub: str, segment_name: str, url: str) -> None:
    """The limit of each key, over all processes, and nobody takes the server for away."""
    Segment(segment_name, capacity=1000)
    parties = [(hub, segment_name, url, PARTIES, KEYS, EACH)] * PARTIES
    found, leaders = [], []
    for admitted, leading in run(green.over_hosts, parties, "spawn"):
        found += admitted
        leaders.append(leading)
    assert len(found) == PARTIES * KEYS * 4 * EACH
    assert sum(found) == KEYS * EACH
    assert leaders == [1] * PARTIES


@pytest.mark.parametrize("hub", green.HUBS)
def test_greenlets_of_two_processes(hub: str, server: servers.Server, segment_name: str) -> None:
    use(hub, segment_name, server.url)
