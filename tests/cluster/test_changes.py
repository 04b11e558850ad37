"""algorithms.lua while the limits change: random stories against references that count tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from fractions import Fraction

import pytest
from cluster.test_meter import Meter, World, meter, new_key
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fast_litellm_shm import Limit, SlidingWindow, Window
from fast_litellm_shm.cluster import algorithms
from fast_litellm_shm.limits import LimitSpec

__all__ = ["meter"]  # the fixture

NS = 1000  # in a us
START = 10**12
some = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
_costs = st.one_of(st.just(1), st.integers(0, 60))
_pauses = st.one_of(st.just(0), st.just(0), st.integers(0, 10**6), st.integers(0, 4 * 10**6))


def most(limit: LimitSpec) -> int:
    return limit.burst if isinstance(limit, Limit) else limit.n


@st.composite
def buckets(draw: st.DrawFn) -> Limit:
    n = draw(st.integers(1, 60))
    per = draw(st.sampled_from([0.1, 1.0, 3.0, 60.0]))
    return Limit(n, per, burst=draw(st.integers(1, n)), strict=draw(st.booleans()))


_windows = st.builds(Window, st.integers(1, 60), st.sampled_from([0.5, 1.0, 2.0]))
_slidings = st.builds(SlidingWindow, st.integers(1, 60), st.sampled_from([0.5, 1.0, 2.0]))
_limits = st.one_of(buckets(), _windows, _slidings)


# as time passes: one limit, whose numbers change


@dataclass
class WindowModel:
    """The tokens, and the end without debt; the limit that wrote them says what is debt. us."""

    label: Window
    end: int = 0
    tokens: int = 0

    def over(self, limit: Window) -> int:
        debt = max(self.tokens - limit.n, 0)
        return self.end - (-debt * algorithms.rule(limit).per_us // limit.n)

    def look(self, at: int, limit: Window) -> None:
        if self.over(self.label) <= at or self.over(limit) <= at:
            self.tokens = self.end = 0
        if self.over(limit) <= self.over(self.label):
            self.label = limit

    def charge(self, at: int, limit: Window, cost: int) -> None:
        if self.tokens <= limit.n:
            self.label = limit
        if cost:
            self.end = self.end or at + algorithms.rule(limit).per_us
            self.tokens += cost

    def refund(self, at: int, limit: Window, cost: int) -> None:
        if self.tokens <= limit.n:
            self.label = limit
        self.tokens -= min(cost, self.tokens)
        self.look(at, self.label)

    def left(self, at: int, limit: Window) -> int:
        return limit.n if self.over(limit) <= at else max(limit.n - self.tokens, 0)


@some
@given(data=st.data())
def test_a_window_counts_on(meter: Meter, data: st.DataObject) -> None:
    key, at, limit = new_key(), START, data.draw(_windows)
    model = WindowModel(limit)
    for _ in range(data.draw(st.integers(1, 30))):
        at += data.draw(_pauses)
        if data.draw(st.booleans()):
            limit = data.draw(_windows)
        what = data.draw(st.sampled_from(["single", "single", "charge", "refund", "look"]))
        cost = data.draw(_costs)
        model.look(at, limit)
        found = meter(at, "a", what, key, [limit], costs=cost)
        if what in ("charge", "refund"):
            getattr(model, what)(at, limit, cost)
        else:
            fits = not cost or model.tokens + cost <= limit.n
            assert found.admitted == fits
            if not fits and cost <= limit.n:
                assert found.retry_after_ns == (model.over(model.label) - at) * NS
            if what == "single" and fits:
                model.charge(at, limit, cost)
        assert max(limit.n - found.limits[0].used, 0) == model.left(at, limit)


@dataclass
class BucketModel:
    """Tokens in it, which drain as the limit says that they are under."""

    label: Limit
    tokens: Fraction = Fraction(0)
    at: int = START

    @staticmethod
    def rate(limit: Limit) -> Fraction:
        """Tokens a us."""
        rule = algorithms.rule(limit)
        return Fraction(rule.den * NS, rule.num)

    def look(self, at: int, limit: Limit) -> None:
        self.tokens = max(self.tokens - self.rate(self.label) * (at - self.at), Fraction(0))
        self.at = at
        if not self.tokens or self.rate(limit) >= self.rate(self.label):
            self.label = limit

    def add(self, limit: Limit, cost: int) -> None:
        if self.tokens <= limit.burst:
            self.label = limit
        self.tokens = max(self.tokens + cost, Fraction(0))

    def wait(self, limit: Limit, cost: int) -> Fraction:
        beyond = self.tokens + cost - limit.burst
        return beyond / max(self.rate(limit), self.rate(self.label))


@some
@given(data=st.data())
def test_a_bucket_keeps_its_tokens(meter: Meter, data: st.DataObject) -> None:
    key, at, limit = new_key(), START, data.draw(buckets())
    model, off = BucketModel(limit), Fraction(0)  # by so much rounding may be above
    for _ in range(data.draw(st.integers(1, 30))):
        at += data.draw(_pauses)
        if data.draw(st.booleans()):
            limit = data.draw(buckets())
        what = data.draw(st.sampled_from(["single", "single", "charge", "refund", "look"]))
        cost = data.draw(_costs)
        model.look(at, limit)
        off += 4 * max(model.rate(limit), model.rate(model.label)) / NS
        found = meter(at, "a", what, key, [limit], costs=cost)
        if what in ("charge", "refund"):
            assume(not limit.burst - off <= model.tokens <= limit.burst)
            model.add(limit, cost if what == "charge" else -cost)
            continue
        assume(not limit.burst - off <= model.tokens + cost <= limit.burst or found.admitted)
        assert found.admitted == (model.tokens + cost <= limit.burst)
        if found.admitted and what == "single" and cost:
            model.add(limit, cost)
        elif not found.admitted and cost <= limit.burst:
            slack = off / min(model.rate(limit), model.rate(model.label)) + 1
            assert abs(Fraction(found.retry_after_ns, NS) - model.wait(limit, cost)) <= slack


@some
@given(data=st.data())
def test_a_sliding_window_counts_on(meter: Meter, data: st.DataObject) -> None:
    """Whatever n is. (Its windows follow each other while something was consumed.)"""
    per = data.draw(st.sampled_from([500_000, 1_000_000]))
    key, at, begun, previous, count = new_key(), START, 0, 0, 0
    for _ in range(data.draw(st.integers(1, 30))):
        at += data.draw(_pauses)
        limit = SlidingWindow(data.draw(st.integers(1, 60)), per / 1e6)
        what = data.draw(st.sampled_from(["single", "single", "charge", "refund"]))
        cost = data.draw(_costs)
        if begun and at >= begun + per:
            passed = (at - begun) // per
            previous, count = (count, 0) if passed == 1 else (0, 0)
            begun = begun + per if previous else 0
        found = meter(at, "a", what, key, [limit], costs=cost)
        used = count - (-previous * (begun + per - at) // per)
        if what == "refund":
            rest = cost - min(cost, count)
            count, previous = count - (cost - rest), previous - min(previous, rest)
        elif what == "charge" or found.admitted:
            assert what == "charge" or not cost or used + cost <= limit.n
            if cost:
                begun, count = begun or at, count + cost
        else:
            assert used + cost > limit.n


# many hosts, which hold tokens while the limit changes


@pytest.mark.parametrize("kind", ["window", "sliding", "bucket"])
@some
@given(data=st.data())
def test_hosts_keep_the_bound_of_the_most_generous(
    meter: Meter, kind: str, data: st.DataObject
) -> None:
    def limit() -> LimitSpec:
        n = data.draw(st.integers(20, 100))
        if kind == "bucket":
            return Limit(n, 1, burst=data.draw(st.integers(n // 2, n)))
        return (Window if kind == "window" else SlidingWindow)(n, 1)

    world = World(meter, limit(), data.draw(st.integers(0, 1000)))
    ever = [world.limit]
    does = ("ask", "exhaust", "exhaust", "hoard", "hoard", "wait", "spend", "give", "late", "lose")
    for _ in range(data.draw(st.integers(4, 25))):
        if data.draw(st.booleans()):
            world.limit = limit()
            ever.append(world.limit)
        world.at += data.draw(st.one_of(st.just(0), st.just(0), st.integers(0, 10**6)))
        what, host = data.draw(st.sampled_from(does)), world.hosts[data.draw(st.integers(0, 2))]
        if what == "late":
            world.give(host, data.draw(st.integers(0, 10**6)))
        else:
            getattr(world, what)(host)
    times = sorted(world.admitted)
    n, burst = max(each.n for each in ever), max(most(each) for each in ever)
    rate = max(BucketModel.rate(each) if isinstance(each, Limit) else Fraction(0) for each in ever)
    lease = algorithms.rule(ever[0]).lease_us
    for i, start in enumerate(times):
        for k in range(i, len(times)):
            span, count = times[k] - start, k - i + 1
            if kind == "bucket":
                assert count <= burst + rate * (span + lease)
            elif kind == "sliding" and span < 10**6:
                assert count <= 2 * n
    if kind == "window":
        for first, following in itertools.pairwise([*world.begun, 2**62]):
            assert sum(first <= each < min(first + 10**6, following) for each in times) <= n


# at one instant: then nothing but what is counted counts, whatever the limits are


@dataclass(eq=False)
class Counter:
    """The tokens of one of a key's limits."""

    limit: LimitSpec
    tokens: int = 0

    def alike(self, limit: LimitSpec) -> bool:
        return type(limit) is type(self.limit) and limit.per == self.limit.per


@dataclass
class Counters:
    """Which is which when their number changes: one of the kind and the period, those in force
    first, and others where each in force has one that goes on from it; else the next in force."""

    known: list[Counter] = field(default_factory=list)
    now: list[Counter] = field(default_factory=list)

    def change(self, limits: list[LimitSpec]) -> None:
        found: dict[int, Counter] = {}
        left = [each for each in self.known if each.tokens]
        for candidates, alike in ((self.now, True), (left, True), (self.now, False)):
            for i, limit in enumerate(limits):
                # Of several that are there no more, which one is the script's to say.
                gone = [e for e in left if e not in self.now and e not in found.values()]
                unclear = candidates is left and sum(e.alike(limit) for e in gone) > 1
                assume(not unclear or i in found)
                for each in candidates:
                    free = i not in found and each not in found.values()
                    without = sum(one not in found.values() for one in self.now)
                    if candidates is left and len(limits) - len(found) <= without:
                        continue
                    if free and (each.alike(limit) or not alike):
                        found[i] = each
        self.now = [found.get(i) or Counter(limit) for i, limit in enumerate(limits)]
        self.known = left + [each for each in self.now if each not in left]
        for each, limit in zip(self.now, limits, strict=True):
            each.limit = limit

    def fit(self, costs: list[int]) -> bool:
        return all(
            not cost or each.tokens + cost <= most(each.limit)
            for each, cost in zip(self.now, costs, strict=True)
        )

    def add(self, costs: list[int]) -> None:
        for each, cost in zip(self.now, costs, strict=True):
            each.tokens = max(each.tokens + cost, 0)


def test_what_a_single_limit_counted_goes_to_the_one_that_replaces_it(meter: Meter) -> None:
    """Once the last had 99 left: it went on from the one by the hour that was there before."""
    key = new_key()
    story: list[tuple[list[LimitSpec], int]] = [
        ([Window(100, 60.0), Window(100, 3600.0)], 1),
        ([Window(10, 1.0)], 9),
        ([Window(100, 3600.0)], 1),
    ]
    for limits, cost in story:
        costs, none = (cost,) * len(limits), (0,) * len(limits)
        found = meter(START, "a", "single", key, limits, costs=costs, given=none, kept=none)
        assert found.admitted
    assert [known.used for known in found.limits] == [11]


@some
@given(data=st.data())
def test_what_is_consumed_stays_consumed(meter: Meter, data: st.DataObject) -> None:
    """Kinds and the number of limits change too. Hosts hold tokens, and give them back or not."""
    key, counters = new_key(), Counters()
    limits: list[LimitSpec] = []
    held = {host: [0] * 4 for host in "abc"}
    for _ in range(data.draw(st.integers(1, 25))):
        if not limits or data.draw(st.integers(0, 2)) == 0:
            kinds = [type(each) for each in limits]
            limits = data.draw(st.lists(_limits, min_size=1, max_size=4))
            counters.change(limits)
            assume(len(counters.known) <= 12)  # more are not kept apart
            if kinds != [type(each) for each in limits]:
                held = {host: [0] * 4 for host in "abc"}  # nobody's, and stay consumed
        host = data.draw(st.sampled_from("abc"))
        costs = [data.draw(_costs) for _ in limits]
        mine, count = held[host], len(limits)
        what = data.draw(
            st.sampled_from(["single", "take", "ahead", "give", "charge", "refund", "look"])
        )
        if what in ("take", "give"):
            counters.add([-each for each in mine[:count]])
            given = tuple(mine[:count])
            mine[:count] = [0] * count
        else:
            given = (0,) * count
        kept = tuple(mine[:count]) if what == "ahead" else (0,) * count
        found = meter(START, host, what, key, limits, costs=tuple(costs), given=given, kept=kept)
        if what in ("charge", "refund"):
            counters.add([cost if what == "charge" else -cost for cost in costs])
        elif what in ("single", "take", "look"):
            # A bucket in debt denies a cost of 0 too.
            fits = counters.fit(costs)
            assume(all(costs) or found.admitted == fits)
            assert found.admitted == fits
            if fits and what != "look":
                counters.add(costs)
        for each, known, mine_kept in zip(counters.now, found.limits, kept, strict=True):
            if known.redated:  # given back and taken anew: held, though refunds took all of it back
                each.tokens = max(each.tokens - mine_kept, 0) + mine_kept
        if found.batch:
            batch = [found.batch * cost for cost in costs]
            assert counters.fit(batch)
            counters.add(batch)
            mine[:count] = [a + b for a, b in zip(mine, batch, strict=False)]
        for each, known in zip(counters.now, found.limits, strict=True):
            left = max(most(each.limit) - known.used, 0)
            assert left == max(most(each.limit) - each.tokens, 0), each
