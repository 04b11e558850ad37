"""Whoever dies: nothing is over-admitted, and no more is lost than what the dead was granted."""

from __future__ import annotations

import os
import random
import signal
from functools import partial
from typing import Any

import pytest
from support import servers
from support.fleet import Fleet
from support.leases import tokens_of
from support.waiting import wait_until

from fast_litellm_shm import RateLimiter, Segment, Window
from fast_litellm_shm._shared.native import lib

LIMIT = 100_000
HOUR = 3600


def test_killed_workers(server: servers.Server) -> None:
    """At any moment; what the host holds stays the host's."""
    chosen = random.Random(1)
    with Fleet(server.url, [Window(LIMIT, HOUR)], hosts=3, workers=3) as fleet:
        for victim in (0, 1, 3, 4, 6):  # each host keeps one
            mark = sum(fleet.asked) + chosen.randrange(1, 8000)
            fleet.until(partial(has_asked, fleet, mark), "some more")
            fleet.kill(victim)
        fleet.until(lambda: is_used_up(server, fleet, 0), "all of the limit is granted")
        fleet.go_on()
        # A killed asker loses the batch that was on its way to it: a quarter of what was left, at
        # most.
        assert LIMIT * 0.75**5 <= fleet.total <= LIMIT


def has_asked(fleet: Fleet, often: int) -> bool:
    return bool(sum(fleet.asked) >= often)


def is_used_up(server: servers.Server, fleet: Fleet, host: int) -> bool:
    """Nothing is left at the server, nor in this host's wallet."""
    segment = Segment(fleet.names[host], create=False)
    limiter = RateLimiter(Window(LIMIT, HOUR), name="fleet", segment=segment, cluster=server.url)
    return limiter.get_remaining("key") == 0


def test_a_killed_host_loses_what_it_held_and_no_more(server: servers.Server) -> None:
    with Fleet(server.url, [Window(LIMIT, HOUR)], hosts=3) as fleet:
        fleet.until(lambda: fleet.total >= LIMIT // 10, "some of it is used")
        fleet.kill(0)
        fleet.kill(1)
        held = Segment(fleet.names[0], create=False)
        fleet.until(lambda: is_used_up(server, fleet, 2), "all of the limit is granted")
        fleet.go_on()
        lost = held_by(held, server)
        assert fleet.total <= LIMIT - lost
        assert fleet.total >= LIMIT - lost - LIMIT // 3  # and a batch on its way, as above


def held_by(segment: Segment, server: servers.Server) -> int:
    limiter = RateLimiter(Window(LIMIT, HOUR), name="fleet", segment=segment, cluster=server.url)
    return tokens_of(limiter).look(b"key")[0][0]


def test_the_leader_is_succeeded(server: servers.Server) -> None:
    """And its successor gives back what others want."""
    with Fleet(server.url, [Window(1000, HOUR)], hosts=2, workers=3, attempts=[30, None]) as fleet:
        segment = Segment(fleet.names[0], capacity=1000)
        fleet.until(lambda: leader(segment) in pids(fleet), "a worker leads the host")
        first = leader(segment)
        fleet.kill(pids(fleet).index(first))
        fleet.until(lambda: leader(segment) not in (0, first), "another leads")
        fleet.until(lambda: fleet.total >= 1000, "what it held was given back and used")
        fleet.go_on()
        assert fleet.total == 1000


def leader(segment: Segment) -> int:
    return int(lib.fshm_leader(segment._handle))


def pids(fleet: Fleet) -> list[Any]:
    return [process.pid for process in fleet.processes]


def test_a_stopped_asker_holds_up_nobody(server: servers.Server) -> None:
    # At full speed the limit is used up in a tenth of a second, perhaps before one is stopped.
    with Fleet(server.url, [Window(LIMIT, HOUR)], hosts=1, workers=3, pause=0.001) as fleet:
        for victim in (0, 1):
            fleet.kill(victim, signal.SIGSTOP)
            fleet.until(lambda: fleet.asked[2] > 0, "the third has asked")
            before = fleet.admitted[2]
            fleet.until(
                lambda before=before: fleet.admitted[2] > before + 100,  # type: ignore[misc]
                "it goes on being admitted",
            )
        for victim in (0, 1):
            fleet.kill(victim, signal.SIGCONT)
        fleet.pause(0.0)
        fleet.until(lambda: fleet.total >= LIMIT, "all of the limit is used")
        fleet.go_on()
        assert fleet.total == LIMIT


@pytest.mark.parametrize("preload", [False, True])
def test_a_fork_goes_on(server: servers.Server, segment: Segment, preload: bool) -> None:
    """Threads and connections stay in the parent; a child has its own."""
    limiter = RateLimiter(Window(1000, HOUR), name="api", segment=segment, cluster=server.url)
    if preload:
        assert limiter.acquire("key")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        admitted = sum(limiter.is_allowed("key") for _ in range(300))
        os.write(writer, b"%d" % admitted)
        os._exit(0)
    admitted = sum(limiter.is_allowed("key") for _ in range(300))
    wait_until("the child ends", lambda: os.waitpid(child, os.WNOHANG)[0])
    theirs = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    assert (admitted, theirs) == (300, 300)
