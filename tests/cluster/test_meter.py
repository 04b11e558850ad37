"""algorithms.lua at given times: against the models of csrc's algorithms, and many hosts by brute
force."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import pytest
from algorithms import models
from algorithms.driver import BUCKET, WINDOW
from algorithms.driver import Rule as ModelRule
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from support import servers

from fast_litellm_shm import Limit, SlidingWindow, Window
from fast_litellm_shm.cluster import algorithms, names
from fast_litellm_shm.limits import LimitSpec

US = 1000  # ns
some = settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_count = itertools.count()


@pytest.fixture(scope="module")
def meter() -> Iterator[Meter]:
    for kind in servers.KINDS:
        if servers.installed(kind):
            with servers.Server(kind) as server:
                yield Meter(server.client())
            return
    pytest.skip("there is neither redis-server nor valkey-server here")


class Meter:
    """The script, told what time it is."""

    def __init__(self, client: Any) -> None:
        source = algorithms.SOURCE.replace("redis.call('TIME')", "{ARGV[#ARGV - 1], ARGV[#ARGV]}")
        assert source != algorithms.SOURCE
        # The server forgets by its own clock, which has nothing to do with these times.
        kept = source
        for life in ("ceil(life / 1000) + 1000", "grant[2]"):
            assert kept.count(f"'PX', {life}") == 1
            kept = kept.replace(f"'PX', {life}", "'PX', 3600000")
        self._client, self._script = client, client.register_script(kept)

    @staticmethod
    def _state_key(key: bytes) -> bytes:
        return names.state_key("t", names.RATES, b"l", key)

    def put(self, key: bytes, value: bytes, command: str = "SET") -> None:
        """What another host may write there."""
        self._client.delete(self._state_key(key))
        self._client.execute_command(command, self._state_key(key), value)

    def value(self, key: bytes) -> bytes:
        return bytes(self._client.get(self._state_key(key)))

    def __call__(
        self,
        at_us: int,
        host: str,
        operation: str,
        key: bytes,
        limits: list[LimitSpec],
        **given: Any,
    ) -> algorithms.Answer:
        minute = given.pop("minute", at_us // 60_000_000)  # by the clock of the host
        if operation == "refund" and "left" not in given:  # of the windows that are there
            looked = self(at_us, host, "look", key, limits, minute=minute)
            given["left"] = tuple(each.window for each in looked.limits)
        rules = [algorithms.dated(algorithms.rule(each), each, minute) for each in limits]
        numbers = {"costs": 0, "kept": 0, "given": 0, "used": 0, "previous": 0, "left": 0} | given
        columns = [
            tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(rules)
            for value in numbers.values()
        ]
        costs, kept, given_back, used, previous, left = columns
        request = algorithms.Request(
            operation, b"l", key, rules, costs, kept, given_back, used, previous, left
        )
        head = [host.encode(), "channel", request.limiter, 0]
        time = [at_us // 1_000_000, at_us % 1_000_000]
        arguments = [*head, request.limits(), request.question(key), *time]
        return request.answer(self._script([request.state_key("t")], arguments))


def new_key() -> bytes:
    return b"key %d" % next(_count)


# one key, one host: the models


@st.composite
def steps(draw: st.DrawFn, per_us: int, n: int) -> list[tuple[str, int, int]]:
    pause = st.one_of(st.just(0), st.integers(0, per_us // n + 2), st.integers(0, 2 * per_us))
    what = st.sampled_from(("single",) * 5 + ("charge", "refund", "look"))
    cost = st.one_of(st.just(1), st.integers(0, n), st.integers(n, n + 2))
    return draw(st.lists(st.tuples(what, pause, cost), min_size=1, max_size=30))


@pytest.mark.parametrize("kind", ["bucket", "window"])
@some
@given(data=st.data())
def test_one_limit(meter: Meter, kind: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    per = data.draw(st.integers(1000, 10**9)) * US
    burst = data.draw(st.integers(1, n))
    limit = Limit(n, per / 1e9, burst=burst) if kind == "bucket" else Window(n, per / 1e9)
    rule = ModelRule(BUCKET if kind == "bucket" else WINDOW, n, limit._per_ns, burst)
    model = models.model_of(rule)
    key, at = new_key(), data.draw(st.integers(10**9, 10**15))
    model.at = at * US
    for what, pause, cost in data.draw(steps(per // US, n)):
        at += pause
        if kind == "window":  # rounding leaves the end open, and what is asked at it undecided
            assume(not (model.count and model.end <= at * US + US <= model.latest_end + 2 * US))  # type: ignore[union-attr]
        model.to(at * US)
        found = meter(at, "a", what, key, [limit], costs=cost)
        if what == "charge":
            model.charge(cost)
        elif what == "refund":
            model.refund(cost)
            # A window whose count is back at 0 lasts on here: somebody may hold tokens of it.
            assume(kind == "bucket" or model.count)  # type: ignore[union-attr]
        else:
            assert not found.admitted or model.may(cost)
            assert found.admitted or not model.must(cost)
            if found.retry_after_ns == -1:
                assert not model.fits(cost)
            elif not found.admitted:
                later = at + found.retry_after_ns // US
                assert meter(later, "a", "look", key + b"!", [limit], costs=0).admitted
            if what == "single" and found.admitted:
                model.charge(cost)


def test_a_window_that_only_debt_has_prolonged_is_over_when_that_is_given_back(
    meter: Meter,
) -> None:
    limit, key, at, second = Window(10, 1), new_key(), 10**12, 10**6
    meter(at, "a", "charge", key, [limit], costs=30)  # lasts for two seconds more
    at += 2 * second + second // 2
    assert not meter(at, "a", "single", key, [limit], costs=1).admitted
    meter(at, "a", "refund", key, [limit], costs=20)
    assert meter(at, "a", "single", key, [limit], costs=10).admitted
    assert not meter(at, "a", "single", key, [limit], costs=1).admitted


@some
@given(data=st.data())
def test_sliding(meter: Meter, data: st.DataObject) -> None:
    """Windows begin at the first hit, and follow each other while something was consumed."""
    n, per = data.draw(st.integers(1, 60)), data.draw(st.integers(1000, 10**8))
    limit, key, at = SlidingWindow(n, per / 1e6), new_key(), 10**12
    begun, previous, count = 0, 0, 0
    for what, pause, cost in data.draw(steps(per, n)):
        at += pause
        if begun and at >= begun + per:
            passed = (at - begun) // per
            previous, count = (count, 0) if passed == 1 else (0, 0)
            begun = begun + per if passed == 1 and previous else 0
        if what in ("charge", "refund"):
            continue
        used = count - (-previous * (begun + per - at) // per)
        found = meter(at, "a", what, key, [limit], costs=cost)
        assert found.admitted == (cost == 0 or used + cost <= n)
        if what == "single" and found.admitted and cost:
            begun, count = begun or at, count + cost


def test_retry_is_the_first_instant_that_fits(meter: Meter) -> None:
    for limit in (
        Limit(7, 1, burst=3), Limit(10**7, 60), Limit(100, 60, burst=10, strict=True),
        Window(3, 0.5), SlidingWindow(10, 1),
    ):  # fmt: skip
        key, at, cost = new_key(), 10**15 + 17, 1
        while True:
            cost = 10**6 if limit.n == 10**7 else 1
            found = meter(at, "a", "single", key, [limit], costs=cost)
            if not found.admitted:
                break
            at += 1
        again = at + found.retry_after_ns // US
        assert not meter(again - 1, "a", "look", key, [limit], costs=cost).admitted, limit
        assert meter(again, "a", "look", key, [limit], costs=cost).admitted, limit


# many hosts: what they admit, against the bound


@dataclass
class Host:
    """A token lease, as csrc/leasing/token_lease.c keeps it; times in us."""

    name: str
    left: int = 0
    until: int = 0

    def has(self, at: int) -> int:
        return self.left if at < self.until else 0


@dataclass
class World:
    """Hosts that use all that they may: hoard, spend at the last instant, give back late."""

    meter: Meter
    limit: LimitSpec
    delay: int  # us that a question is under way
    key: bytes = field(default_factory=new_key)
    at: int = 10**12
    hosts: list[Host] = field(default_factory=lambda: [Host(str(i)) for i in range(3)])
    admitted: list[int] = field(default_factory=list)
    begun: list[int] = field(default_factory=list)  # windows, by the server
    # of each host: when, and until when its window lasts
    calls: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def spend(self, host: Host) -> None:
        self._admit(host, host.has(self.at), host.until)
        host.left = 0

    def _admit(self, host: Host, count: int, end: int) -> None:
        self.admitted += [self.at] * count
        self.calls.setdefault(host.name, []).extend([(self.at, end)] * count)

    def undo(self, host: Host, late: int = 0) -> None:
        """Half of its calls of this window are not made after all; the server hears of it late."""
        calls = [call for call in self.calls.get(host.name, []) if self.at < call[1]]
        undone = calls[: (len(calls) + 1) // 2]
        for call in undone:
            self.calls[host.name].remove(call)
            self.admitted.remove(call[0])
        counts = Counter(end for _, end in undone)
        charged = {end: self.charged(host, end) for end in counts}
        self.at += late
        for end, count in counts.items():
            self._call(host, "refund", costs=count, left=charged[end])

    def charged(self, host: Host, end: int) -> int:
        """What the server calls the window that ends then, or a bit later; as settlement.py finds
        it. 0: it is over, as far as the host knows."""
        (known,) = self._call(host, "look").limits
        latest, per = self.at + known.lease_ns // US, algorithms.rule(self.limit).per_us
        return known.window if self.at < end and latest - end < per // 2 else 0

    def wait(self, host: Host) -> None:
        """Until the last instant at which it can spend."""
        self.at = max(self.at, host.until - 1)

    def ask(self, host: Host) -> bool:
        """Take one, and a batch."""
        given, host.left = host.has(self.at), 0
        sent = self.at
        found = self._call(host, "take", costs=1, given=given)
        if found.admitted:
            self._admit(host, 1, sent + found.limits[0].left_ns // US)
        return found.admitted

    def exhaust(self, host: Host) -> None:
        while self.ask(host):
            self.spend(host)

    def hoard(self, host: Host) -> None:
        """Fill the token lease and spend nothing."""
        for _ in range(12):
            self._call(host, "ahead", costs=1, kept=host.has(self.at))

    def give(self, host: Host, late: int = 0) -> None:
        given, host.left = host.has(self.at), 0
        self.at += late
        self._call(host, "give", given=given)

    def lose(self, host: Host) -> None:
        """The answer does not arrive."""
        before = host.left, host.until
        self._call(host, "ahead", costs=1, kept=host.has(self.at))
        host.left, host.until = before

    def _call(self, host: Host, operation: str, kept: int = 0, **given: int) -> algorithms.Answer:
        sent, self.at = self.at, self.at + self.delay
        found = self.meter(
            self.at, host.name, operation, self.key, [self.limit], kept=kept, **given
        )
        (known,) = found.limits
        if known.used and known.left_ns == algorithms.rule(self.limit).per_us * US:
            self.begun.append(self.at)
        until, left = sent + known.lease_ns // US, host.has(self.at)
        if left > (kept if known.redated else 0):
            until = min(until, host.until)
        if self.at < until and operation not in ("give", "refund", "look"):
            host.left, host.until = left + found.batch, until
        return found


@st.composite
def histories(draw: st.DrawFn, per: int, undo: bool) -> list[tuple[str, int, int, int]]:
    """(what, a pause, which host, and another)"""
    pause = st.one_of(st.just(0), st.just(0), st.integers(0, per // 20), st.integers(0, per))
    what = st.sampled_from(
        (
            "ask",
            "exhaust",
            "exhaust",
            "hoard",
            "hoard",
            "wait",
            "wait",
            "spend",
            "give",
            "late",
            "lose",
            *("undo",) * undo,
        )
    )
    one = st.tuples(what, pause, st.integers(0, 2), st.integers(1, 2))
    return draw(st.lists(one, min_size=4, max_size=25))


@pytest.mark.parametrize("kind", ["bucket", "strict", "window", "sliding"])
@some
@given(data=st.data())
def test_hosts_keep_the_bound(meter: Meter, kind: str, data: st.DataObject) -> None:
    n, per = data.draw(st.integers(20, 100)), data.draw(st.integers(10_000, 10**7))
    burst = data.draw(st.integers(n // 2, n))
    limit: LimitSpec
    if kind in ("bucket", "strict"):
        limit = Limit(n, per / 1e6, burst=burst, strict=kind == "strict")
    else:
        limit = (Window if kind == "window" else SlidingWindow)(n, per / 1e6)
    lease = algorithms.rule(limit).lease_us
    world = World(meter, limit, data.draw(st.integers(0, lease // 10)))
    for what, pause, which, _ in data.draw(histories(per, kind == "window")):
        world.at += pause
        host = world.hosts[which]
        if what == "late":
            world.give(host, pause)
        elif what == "undo":
            world.undo(host, pause)
        else:
            getattr(world, what)(host)
    check_bound(world, kind, burst)


@pytest.mark.parametrize("kind", ["bucket", "strict", "window", "sliding"])
@pytest.mark.parametrize("late", [0, 1, 30, 60, 90, 100])
def test_the_worst_hosts(meter: Meter, kind: str, late: int) -> None:
    """Each way to have more than the limit, were it not for what algorithms.lua does about it."""
    n, per, burst = 100, 1_000_000, 100 if kind != "strict" else 50
    limit: LimitSpec
    if kind in ("bucket", "strict"):
        limit = Limit(n, per / 1e6, burst=burst, strict=kind == "strict")
    else:
        limit = (Window if kind == "window" else SlidingWindow)(n, per / 1e6)
    pause = (algorithms.rule(limit).lease_us or per) * late // 100

    def last_instant(world: World, a: Host, b: Host) -> None:
        world.hoard(a)
        world.wait(a)
        world.spend(a)
        world.exhaust(b)
        for _ in range(97):  # and whatever comes back in time
            world.at += per // 100
            world.exhaust(b)

    def give_back(world: World, a: Host, b: Host) -> None:
        world.hoard(a)
        world.at += pause
        world.exhaust(b)
        world.give(a)
        world.exhaust(b)

    def give_back_late(world: World, a: Host, b: Host) -> None:
        world.hoard(a)
        given, a.left = a.has(world.at), 0
        world.at += per + pause  # on its way until the next window
        world.exhaust(b)
        world._call(a, "give", given=given)
        world.exhaust(b)

    def keep(world: World, a: Host, b: Host) -> None:
        for _ in range(4):  # what is kept is dated anew
            world.hoard(a)
            world.at += pause
            world.exhaust(b)
        world.wait(a)
        world.spend(a)
        world.exhaust(b)

    def undone(world: World, a: Host, b: Host) -> None:
        world.exhaust(a)
        world.at += pause
        world.undo(a)
        world.wait(a)
        world.spend(a)  # at the last instant
        world.exhaust(b)

    def undone_too_late(world: World, a: Host, b: Host) -> None:
        world.exhaust(a)
        calls, end = len(world.calls[a.name]), world.calls[a.name][0][1]
        world.at = max(world.at, end - min(pause, per // 3))
        charged = world.charged(a, end)
        world.at = end  # on its way until the next window, which another has used up
        world.exhaust(b)
        world._call(a, "refund", costs=calls, left=charged)
        world.exhaust(b)

    def undone_and_given_back(world: World, a: Host, b: Host) -> None:
        world.exhaust(a)
        world.undo(a)
        world.give(a, pause)
        world.exhaust(b)
        world.undo(a)
        world.exhaust(b)

    scenarios = [last_instant, give_back, give_back_late, keep]
    if kind == "window":
        scenarios += [undone, undone_too_late, undone_and_given_back]
    for scenario in scenarios:
        world = World(meter, limit, 10)
        scenario(world, world.hosts[0], world.hosts[1])
        check_bound(world, kind, burst)


def check_bound(world: World, kind: str, burst: int) -> None:
    rule, times = algorithms.rule(world.limit), sorted(world.admitted)
    n, per = rule.n, rule.per_us
    for i, start in enumerate(times):
        for k in range(i, len(times)):
            span, count = times[k] - start, k - i + 1
            if kind == "bucket":
                assert count <= burst + Fraction(n * (span + rule.lease_us), per)
            elif kind == "strict" and span < per:
                assert count <= n
            elif kind == "sliding" and span < per:
                assert count <= 2 * n
    if kind == "window":
        for first, following in itertools.pairwise([*world.begun, 2**62]):
            assert sum(first <= each < min(first + per, following) for each in times) <= n


def test_what_has_drained_is_not_given_back(meter: Meter) -> None:
    limit, key, at = Limit(100, 100, burst=100), new_key(), 10**12
    held = 0
    for _ in range(12):
        held += meter(at, "a", "ahead", key, [limit], costs=1, kept=held).batch
    assert held > 90
    at += 50 * 10**6  # half of it is anybody's again
    assert meter(at, "b", "single", key, [limit], costs=50).admitted
    found = meter(at, "a", "give", key, [limit], given=held)
    assert found.limits[0].used == 50  # what b took


# a server that forgets, or whose clock jumps


def test_a_lost_state_grows_together_again(meter: Meter) -> None:
    limit, at = Window(100, 60), 10**12
    first = meter(at, "a", "take", new_key(), [limit], costs=30)
    assert first.admitted
    key = new_key()  # the server forgot: two hosts know what it had told them
    found = meter(at, "a", "take", key, [limit], costs=1, used=90, left=50_000_000)
    assert found.admitted and found.limits[0].used >= 91
    assert found.limits[0].left_ns == 50_000_000 * US
    found = meter(at, "b", "take", key, [limit], costs=1, used=99, left=50_000_000)
    assert found.admitted
    assert not meter(at, "c", "take", key, [limit], costs=1).admitted
    # who is known by now is believed no more: it may be that somebody gave back
    assert meter(at, "b", "refund", key, [limit], costs=40).limits[0].used <= 60
    assert meter(at, "b", "take", key, [limit], costs=1, used=100, left=5).admitted


def test_after_a_reset_nobody_brings_it_back(meter: Meter) -> None:
    limit, key, at = Window(100, 60), new_key(), 10**12
    assert meter(at, "a", "single", key, [limit], costs=100).admitted
    meter(at, "a", "reset", key, [limit])
    found = meter(at, "b", "single", key, [limit], costs=1, used=100, left=50_000_000)
    assert found.admitted and found.limits[0].used == 1


@pytest.mark.parametrize("limit", [Window(10, 60), Limit(10, 60), SlidingWindow(10, 60)])
def test_a_clock_that_jumps(meter: Meter, limit: LimitSpec) -> None:
    """Back: no time passes. Ahead: what is consumed is over sooner, once."""
    key, at = new_key(), 10**12
    assert meter(at, "a", "single", key, [limit], costs=10).admitted
    back = at - 3600 * 10**6
    denied = meter(back, "a", "single", key, [limit], costs=10)
    assert not denied.admitted and 0 < denied.retry_after_ns <= 120 * 10**9
    assert meter(back + 120 * 10**6, "a", "single", key, [limit], costs=10).admitted
    ahead = at + 3600 * 10**6
    assert meter(ahead, "a", "single", key, [limit], costs=10).admitted
    assert not meter(ahead, "a", "single", key, [limit], costs=1).admitted


def test_batches_fit_the_demand(meter: Meter) -> None:
    limit, key, at = Window(10**9, 3600), new_key(), 10**12
    batches = []
    for _ in range(12):
        batches.append(meter(at, "a", "take", key, [limit], costs=1).batch)
        at += 125_000  # used up in half of what a batch should last
    assert batches[0] == 4
    assert batches == sorted(batches) and batches[-1] == 8192
    at += 10**7
    assert meter(at, "a", "take", key, [limit], costs=1).batch <= batches[-1] // 4
    small = Window(40, 3600)
    key = new_key()
    batches = [meter(at, "a", "take", key, [small], costs=1).batch for _ in range(40)]
    assert sum(batches) + sum(1 for _ in batches) >= 40
    assert batches[-1] == 0


def test_others_are_asked_to_give_back(meter: Meter) -> None:
    limit, key, at = Window(10, 3600), new_key(), 10**12
    held = meter(at, "a", "take", key, [limit], costs=1)
    assert held.batch
    while meter(at, "b", "single", key, [limit], costs=1).admitted:
        pass
    refused = meter(at, "b", "single", key, [limit], costs=1)
    assert refused.back_off_ns < 100 * 10**6  # a sees to it now
    meter(at, "a", "give", key, [limit], given=held.batch)
    for _ in range(held.batch):
        assert meter(at, "b", "single", key, [limit], costs=1).admitted
    refused = meter(at, "b", "single", key, [limit], costs=1)
    assert refused.back_off_ns == 10**9  # nobody has anything: no use in asking soon
