"""The sampler of the live views, on real segments that real processes use."""

from __future__ import annotations

import os
import pathlib
import resource
from collections.abc import Iterator
from typing import Any

import pytest
from support.puppets import Puppet

from fast_litellm_shm import Limit, RateLimiter, Segment, SegmentLinkError, Window
from fast_litellm_shm.cli.key_table import MOST_SHOWN, LiveKey
from fast_litellm_shm.cli.sampler import Sampler, Snapshot


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Looker:
    """A sampler, a second from each look to the next."""

    def __init__(self, name: str) -> None:
        self.clock = Clock()
        self.sampler = Sampler(name, clock=self.clock)

    def __call__(self, seconds: float = 1.0) -> Snapshot:
        self.clock.now += seconds
        found = self.sampler.sample()
        return found


@pytest.fixture
def puppets(segment: Segment) -> Iterator[list[Puppet]]:
    """Two processes that use the segment."""
    made = [Puppet(segment.name) for _ in range(2)]
    yield made
    for puppet in made:
        puppet.end()


def keys_of(snapshot: Snapshot, **how: Any) -> list[LiveKey]:
    assert snapshot.keys is not None, snapshot.problem
    order, _ = snapshot.keys.order(**how)
    return [key for key in snapshot.keys.rows(order) if key is not None]


def names_of(snapshot: Snapshot, **how: Any) -> list[str]:
    return [key.name for key in keys_of(snapshot, **how)]


def test_rates_of_several_processes(puppets: list[Puppet], segment: Segment) -> None:
    look, (one, two) = Looker(segment.name), puppets
    one("acquire", "wide", ["a"], 100)
    first = look()
    assert (first.admitted.total, first.admitted.now) == (100, None)
    assert keys_of(first)[0].rate is None
    one("acquire", "wide", ["a"], 10)
    two("acquire", "wide", ["a", "b"], 4)
    assert two("acquire", "chat", ["c"], 14) == [10]
    second = look(2)
    assert (second.admitted.total, second.admitted.now) == (128, 14.0)
    assert (second.denied.total, second.denied.now, second.denied.history) == (4, 2.0, [2.0])
    found = {key.name: key for key in keys_of(second)}
    assert [key.name for key in keys_of(second)] == ["a", "c", "b"]
    assert [found[name].rate for name in "abc"] == [7.0, 2.0, 7.0]
    assert (found["c"].denied_rate, found["c"].denied_history) == (2.0, [2.0])
    assert (found["c"].row.remaining, found["c"].row.limit) == (0, 10)
    third = look(2)
    assert (third.admitted.now, third.admitted.history) == (7.0, [14.0, 0.0])
    workers = {worker.pid: worker for worker in third.workers}
    assert set(workers) == {one.pid, two.pid}
    assert (workers[one.pid].admitted.total, workers[two.pid].denied.total) == (110, 4)
    assert workers[one.pid].admitted.history == [5.0, 0.0]
    assert (workers[one.pid].memory_bytes or 0) > 1_000_000
    assert workers[one.pid].cpu_percent is not None
    assert "-c" in (workers[one.pid].command or "")
    limiters = {limiter.name: limiter for limiter in third.limiters}
    assert (limiters["chat"].rate, limiters["chat"].denied_rate) == (3.5, 1.0)
    assert (limiters["wide"].limits, limiters["wide"].keys) == ("1000000/3600000s", 2)


def test_everything_else(puppets: list[Puppet], segment: Segment) -> None:
    look, (one, two) = Looker(segment.name), puppets
    look()
    assert [puppet("hold", "m") for puppet in (one, two, one, two)] == [True, True, True, False]
    one("connect", "https://x.example")
    two("route", "gpt-4")
    one("count", "x" * 100, 200)
    found = look()
    (permit,) = found.permits
    assert (permit["key"], permit["in_flight"], permit["max_in_flight"]) == ("m", 3, 3)
    assert permit["pids"] == sorted([one.pid, two.pid]) and found.in_flight == 3
    (pool,) = found.pools
    assert (pool["endpoint"], pool["active"]) == ("https://x.example", 1)
    (deployment,) = found.deployments
    assert (deployment.records.total, deployment.success_rate) == (1, 1.0)
    assert 0.011 < (deployment.latency or 0) < 0.013
    assert deployment.name.startswith("#") and deployment.cost is None
    assert found.memo is not None and found.memo.hit_rate is not None
    assert found.memo.hit_rate > 0.9 and found.memo.lookups.total >= 100
    two.kill()
    (permit,) = look().permits
    assert (permit["in_flight"], permit["dead"], permit["pids"]) == (2, 1, [one.pid])


def test_orders(puppets: list[Puppet], segment: Segment) -> None:
    look, (one, two) = Looker(segment.name), puppets
    one("acquire", "wide", ["a", "b"], 1)
    one("acquire", "chat", ["a"], 9)
    look()
    one("acquire", "wide", ["b"], 5)
    two("acquire", "chat", ["c"], 13)
    two("acquire", "chat", ["d"], 4)
    found = look()
    shown = [(k.name, k.row.limiter) for k in keys_of(found, sort="left")]
    assert shown == [("c", "chat"), ("a", "chat"), ("d", "chat"), ("b", "wide"), ("a", "wide")]
    assert [k.name for k in keys_of(found, sort="left", reverse=True)] == [*"abdac"]
    assert names_of(found, sort="rate")[:3] == ["c", "b", "d"]
    assert names_of(found, sort="denied_rate")[0] == names_of(found, sort="denied")[0] == "c"
    assert names_of(found, sort="admitted")[:3] == ["c", "a", "b"]
    assert names_of(found, sort="admitted", reverse=True)[0] == "a"
    assert names_of(found, sort="key") == [*"aabcd"]
    assert names_of(found, sort="key", reverse=True) == [*"dcbaa"]
    assert names_of(found, sort="limiter") == ["c", "a", "d", "b", "a"]
    with pytest.raises(ValueError, match="sort must be one of rate, .*, not 'x'"):
        keys_of(found, sort="x")


def test_filter(segment: Segment) -> None:
    limiter = RateLimiter(Limit(5, 3600), name="Chat", segment=segment)
    other = RateLimiter(Limit(5, 3600), name="other", segment=segment)
    for key in ("user-1", "User-2", "team[1]"):
        limiter.acquire(key)
    other.acquire("user-3")
    look = Looker(segment.name)
    found = look()
    assert sorted(names_of(found, match="USER")) == ["User-2", "user-1", "user-3"]
    assert names_of(found, match="user-[13]", sort="key") == ["user-1", "user-3"]
    assert names_of(found, match="team") == ["team[1]"]
    assert names_of(found, match="other") == ["user-3"], "of a limiter all keys fit"
    assert names_of(found, match="nobody") == []
    limiter.acquire("user-9")
    assert sorted(names_of(look(), match="user")) == ["User-2", "user-1", "user-3", "user-9"]


@pytest.mark.parametrize("names", ["hashed", "off"])
def test_names_that_are_not_kept(segment_name: str, names: str) -> None:
    segment = Segment(segment_name, capacity=100, names=names)
    RateLimiter(Limit(5, 3600), name="t", segment=segment).acquire("secret")
    found = Looker(segment_name)()
    shown = names_of(found, match="#")
    assert len(shown) == (names == "hashed") and "secret" not in shown
    assert found.admitted.total == 1


def test_more_keys_than_are_shown(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=5000)
    limiter = RateLimiter(Limit(5, 3600), name="t", segment=segment)
    limiter.acquire_many([f"k{i}" for i in range(4000)])
    limiter.acquire_many(["k3999"] * 3)
    found = Looker(segment_name)()
    assert found.keys is not None
    for sort in ("rate", "key", "left", "limiter"):
        order, total = found.keys.order(sort)
        assert (len(order), total) == (MOST_SHOWN, 4000)
    assert names_of(found)[0] == "k3999"
    assert names_of(found, match="k3999") == ["k3999"]


def test_a_key_that_leaves_its_cell(segment: Segment) -> None:
    limiter = RateLimiter(Window(5, 3600), name="t", segment=segment)
    limiter.acquire("gone")
    found = Looker(segment.name)()
    limiter.reset("gone")
    assert found.keys is not None
    order, _ = found.keys.order()
    assert found.keys.rows(order) == [None]


def test_a_cell_that_went_to_another_limiter(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=16)
    first = RateLimiter(Window(5, 3600), name="first", segment=segment)
    second = RateLimiter(Window(900, 3600), name="second", segment=segment)
    for key in range(12):
        first.acquire(f"old-{key}")
    found = Looker(segment.name)()  # a frozen view reads its rows when they are scrolled to
    for key in range(12):
        first.reset(f"old-{key}")
        second.acquire(f"new-{key}")
    assert found.keys is not None
    order, total = found.keys.order()
    assert total == 12
    assert found.keys.rows(order) == [None] * 12  # not new keys with the old ones' limiter


def test_waits_for_a_segment(segment_name: str) -> None:
    look = Looker(segment_name)
    look.sampler.open()
    first = look()
    assert first.keys is None and first.stats is None
    assert first.problem is not None
    assert first.problem.startswith(f"there is no segment {segment_name!r}. Waiting for one.")
    segment = Segment(segment_name, capacity=100)
    found = look()
    assert found.problem is None and found.notice is None and found.stats is not None
    RateLimiter(Limit(5, 3600), name="t", segment=segment).acquire("k")
    assert names_of(look()) == ["k"]


def test_a_segment_that_is_removed_and_made_again(segment_name: str) -> None:
    Segment(segment_name, capacity=1000)
    puppet = Puppet(segment_name)
    look = Looker(segment_name)
    try:
        puppet("acquire", "chat", ["old"], 3)
        look()
        Segment(segment_name, create=False).remove()
        removed = look()
        assert names_of(removed) == ["old"], "its processes still count in it"
        assert removed.stats is not None and removed.stats["unlinked"]
        assert any(f"pids: {puppet.pid}" in text for text in removed.warnings)
        puppet("acquire", "chat", ["old"], 3)
        assert keys_of(look())[0].rate == 1.5
    finally:
        puppet.end()
    gone = look()
    assert gone.problem is not None and "was removed. Waiting for a new one" in gone.problem
    again = Segment(segment_name, capacity=200)
    RateLimiter(Limit(5, 3600), name="t", segment=again).acquire("new")
    found = look()
    assert names_of(found) == ["new"] and keys_of(found)[0].rate is None
    assert found.notice is not None and "new segment" in found.notice
    assert found.stats is not None and found.stats["capacity"] == 200
    assert look(60).notice is None


def test_a_segment_that_is_replaced_under_its_feet(segment_name: str) -> None:
    old = Segment(segment_name, capacity=1000)
    RateLimiter(Limit(5, 3600), name="t", segment=old).acquire_many(["a"] * 5)
    look = Looker(segment_name)
    look()
    old.remove()
    new = Segment(segment_name, capacity=100)
    RateLimiter(Limit(5, 3600), name="t", segment=new).acquire("b")
    found = look()
    assert names_of(found) == ["b"] and found.admitted.now is None
    assert found.admitted.total == 1 and found.notice is not None


def test_what_cannot_be_read_is_told_and_tried_again(segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100)
    look = Looker(segment_name)
    assert look().problem is None
    path = pathlib.Path(segment.path)
    segment.remove()
    path.symlink_to("/nowhere")
    try:
        told = look()
        assert told.problem is not None and "symbolic link" in told.problem
        with pytest.raises(SegmentLinkError):
            Sampler(segment_name).open()
    finally:
        path.unlink()
    Segment(segment_name, capacity=100)
    assert look().problem is None


def test_no_descriptors_left(segment: Segment) -> None:
    """What it says is about descriptors, and not about the segment."""
    look = Looker(segment.name)
    assert look().problem is None
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        told = look(60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert told.problem is not None and "add up" not in told.problem
    assert "no file descriptor left" in told.problem and "ulimit -n" in told.problem
    assert look().problem is None


def test_a_segment_that_is_cut(segment: Segment) -> None:
    look = Looker(segment.name)
    assert look().problem is None
    os.truncate(segment.path, 4096)
    told = look()
    assert told.problem is not None and "has 4096 bytes" in told.problem
    assert look().problem is not None


def test_it_disturbs_nothing(segment: Segment) -> None:
    RateLimiter(Limit(5, 3600), name="t", segment=segment).acquire("k")
    before = pathlib.Path(segment.path).read_bytes()
    look = Looker(segment.name)
    for _ in range(3):
        names_of(look(), match="k")
    assert pathlib.Path(segment.path).read_bytes() == before
    assert [process["pid"] for process in segment.processes()] == [os.getpid()]
