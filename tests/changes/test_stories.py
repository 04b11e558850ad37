"""Stories of limits that change, any number of times: what the library answers is what the
reference says that counts the tokens (I8), and nothing is left to the number of changes.

tests/c/test_stories.c tells the same stories, faster. FAST_LITELLM_SHM_STORIES: how many examples.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.names import remove, unique_name

from changes import reference
from changes.driver import (
    BUCKET,
    PERMITS,
    SECOND,
    SLIDING,
    WINDOW,
    Limiter,
    Rule,
    bucket,
    permits,
    sliding,
    window,
)
from changes.reference import EXACT, NOTHING, Charge, GaveUp, States
from fast_litellm_shm import Segment
from fast_litellm_shm._shared.native import lib

STORIES = int(os.environ.get("FAST_LITELLM_SHM_STORIES", "60"))
NOW = 10**16  # far from the time at which limits are really changed: nothing may depend on that
NEVER = lib.FSHM_NEVER
KEYS = ("a", "b")
TOO_LONG = 1 << 50  # ns, of a bucket that is to flow back
SETTINGS = settings(
    max_examples=STORIES,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)

PERIODS = st.sampled_from([SECOND, 60 * SECOND, 7 * SECOND + 3, 3600 * SECOND, 5 * 86400 * SECOND])
PAUSES = st.one_of(
    st.just(0), st.integers(0, 3), PERIODS, st.integers(0, 2 * SECOND), st.integers(0, 1 << 50)
)
COSTS = st.one_of(st.integers(1, 3), st.integers(1, 110))


@st.composite
def limits(draw: st.DrawFn, kind: int, periods: st.SearchStrategy[int] = PERIODS) -> Rule:
    n, per = draw(st.integers(1, 100)), draw(periods)
    if kind == WINDOW:
        return window(draw(st.one_of(st.just(n), st.integers(1, 100_000))), per)
    if kind == SLIDING:
        return sliding(n, per)
    burst = draw(st.one_of(st.just(n), st.integers(1, n)))
    return bucket(n, per, burst, draw(st.booleans()) and burst < n)


@st.composite
def families(draw: st.DrawFn) -> list[tuple[Rule, ...]]:
    """Sets of up to four limits, each known by its kind and period, of which any are left out."""
    kinds = draw(
        st.lists(
            st.tuples(st.sampled_from([BUCKET, WINDOW, SLIDING]), PERIODS),
            min_size=1,
            max_size=4,
            unique=True,
        )
    )
    sets = []
    for _ in range(draw(st.integers(1, 4))):
        present = [k for k in kinds if draw(st.integers(0, 3))] or kinds[:1]
        rules = tuple(draw(limits(kind, st.just(per))) for kind, per in present)
        if len(rules) < 4 and draw(st.integers(0, 3)) == 0:
            rules += (permits(draw(st.integers(1, 3))),)
        sets.append(rules)
    return sets


@st.composite
def one_limit(draw: st.DrawFn) -> list[tuple[Rule, ...]]:
    """One limit, whose numbers, and perhaps its kind, change."""
    kinds = st.just(draw(st.sampled_from([BUCKET, WINDOW, SLIDING])))
    if draw(st.integers(0, 3)) == 0:
        kinds = st.sampled_from([BUCKET, WINDOW, SLIDING])
    return [(draw(limits(draw(kinds))),) for _ in range(draw(st.integers(1, 5)))]


@dataclass
class Since:
    """All that a key was admitted since one of its admissions, and the most generous of the limits
    that were in force meanwhile, and back to when the key was asked before."""

    at: int
    burst: int
    rate: Fraction  # tokens a nanosecond
    taken: int = 0

    def widen(self, rule_: Rule) -> None:
        self.burst = max(self.burst, rule_.burst)
        self.rate = max(self.rate, 1 / reference.interval(rule_))


@dataclass
class Key:
    states: dict[int, States] = field(default_factory=dict)  # by the number of the limit
    held: list[Any] = field(default_factory=list)  # permits
    since: list[Since] = field(default_factory=list)  # of a limit that is always a bucket
    asked: list[Rule] = field(default_factory=list)  # those in force since it was last asked

    def of(self, number: int) -> States:
        return self.states.setdefault(number, NOTHING)


@dataclass
class Admitted:
    key: str
    cost: int
    permit: Any
    shape: int
    charges: list[Charge | None]


class Stories(RuleBasedStateMachine):
    def teardown(self) -> None:
        if hasattr(self, "name"):
            remove(self.name)

    @initialize(sets=st.one_of(one_limit(), one_limit(), families()))
    def begin(self, sets: list[tuple[Rule, ...]]) -> None:
        self.sets, self.now, self.given_up = sets, NOW, False
        self.keys = {key: Key() for key in KEYS}
        self.admitted: list[Admitted] = []
        self.shape = 0  # differs after a change of which limits there are, or of their kind
        self.numbers: list[int] = []  # of the limits in force
        self.last: dict[int, Rule] = {}  # each limit as it was last in force
        self.earlier: set[tuple[int, Rule]] = set()  # as each was at any time
        # One for each story: a name remembers the limits that it had, and finds what they counted.
        self.name = unique_name("stories")
        self.limiter = Limiter(Segment(self.name, capacity=1000), *sets[0])
        self.partners(sets[0])
        self.changed()

    # Limits that change

    def partners(self, rules: tuple[Rule, ...]) -> None:
        """Which limits of the new set go on from which of the old: those of the same kind and
        period first, also such as were there before, where there are more new ones than old; then
        in order. Others are new."""
        rates = [r for r in rules if r.kind != PERMITS]
        found = [-1] * len(rates)
        for i, rule_ in enumerate(rates):
            same = [n for n in self.numbers if n not in found and self.last[n].like(rule_)]
            found[i] = same[0] if same else -1
        for i, rule_ in enumerate(rates):
            if found.count(-1) <= len(set(self.numbers) - set(found)):
                break
            before = [
                number
                for number, was in self.last.items()
                if number not in self.numbers and number not in found and was.like(rule_)
            ]
            if found[i] < 0 and any(
                was.like(rule_) and not self.last[number].like(rule_)
                for number, was in self.earlier
                if number not in self.numbers and number not in found
            ):
                self.given_up = True  # it was this one, and another one since
            if found[i] < 0 and before:
                found[i] = before[0]
                # Of what is over, nobody need know; and of several, which is the library's to say.
                self.given_up |= len(before) > 1 or not self.is_alive(before[0])
        for i, rule_ in enumerate(rates):
            rest = [number for number in self.numbers if number not in found]
            if found[i] < 0:
                found[i] = rest[0] if rest else len(self.last)
                self.last.setdefault(found[i], rule_)
        self.given_up |= len(self.last) > 6  # the library has room for some
        if found != self.numbers or any(
            not reference.same_meter(reference.used_now(self.last[number], 1, 0), rule_)
            for number, rule_ in zip(found, rates, strict=True)
        ):
            self.shape += 1
        self.numbers = found
        self.last.update(zip(found, rates, strict=True))
        self.earlier |= set(zip(found, rates, strict=True))

    @property
    def rates(self) -> list[tuple[int, Rule]]:
        return [(number, self.last[number]) for number in self.numbers]

    @property
    def most_permits(self) -> int | None:
        last = self.limiter.rules[-1]
        return last.n if last.kind == PERMITS else None

    @contextmanager
    def following(self) -> Iterator[None]:
        try:
            yield
        except GaveUp:
            self.given_up = True

    def is_alive(self, number: int) -> bool:
        """Has any key used of this limit what is not over by now?"""
        states = (reference.pass_time(k.of(number), self.now) for k in self.keys.values())
        return any(None not in each for each in states)

    def changed(self) -> None:
        """Other limits are in force."""
        rules = self.limiter.rules
        for key in self.keys.values():
            if len(rules) != 1 or rules[0].kind != BUCKET:
                key.since = []
                continue
            key.asked.append(rules[0])
            for since in key.since:
                since.widen(rules[0])

    def took(self, key: str, tokens: int, *, admitted: bool = False) -> None:
        """In any interval that begins with an admission: no more than the most generous of the
        limits allows, whatever else was charged and given back in it."""
        rules, k = self.limiter.rules, self.keys[key]
        if len(rules) != 1 or rules[0].kind != BUCKET:
            return
        if admitted:
            k.since.append(Since(self.now, 0, Fraction(0)))
            for one in (*k.asked, rules[0]):
                k.since[-1].widen(one)
        for since in k.since:
            since.taken += tokens
            most = since.burst + (self.now - since.at + 2 * reference.SLACK) * since.rate
            assert not admitted or since.taken <= most, (since, self.now)
        k.asked = [rules[0]]

    # What is left

    def look(self, key: str) -> list[int]:
        told = self.limiter.remaining(key, self.now)
        assert len(told) == len(self.rates)
        for (number, rule_), tokens in zip(self.rates, told, strict=True):
            before = reference.pass_time(self.keys[key].of(number), self.now)
            after = reference.left(before, rule_, tokens, self.now)
            assert after, f"{tokens} are left of {rule_}; by the reference, used: {before}"
            self.keys[key].states[number] = after
        if self.most_permits:
            assert self.limiter.in_flight(key) == len(self.keys[key].held)
        return told

    def too_long(self, key: str, cost: int) -> bool:
        """Beyond what buckets are tried with: 4.5 years end them."""
        return any(
            (getattr(state, "high", Fraction(0)) + cost) * reference.slow_interval(rule_) > TOO_LONG
            for number, rule_ in self.rates
            for state in self.keys[key].of(number)
            if rule_.kind == BUCKET
        )

    # Steps

    alive = precondition(lambda self: not self.given_up)

    @rule(ns=PAUSES)
    def sleep(self, ns: int) -> None:
        self.now += ns
        self.given_up |= self.now > 1 << 56

    @alive
    @rule(data=st.data())
    def change(self, data: st.DataObject) -> None:
        self.change_to(data.draw(st.sampled_from(self.sets)))

    def change_to(self, to: tuple[Rule, ...]) -> None:
        self.limiter.change(*to, now=self.now)
        self.may_go_over()  # to those that were in force until now
        self.partners(to)
        self.changed()
        self.may_go_over()

    def may_go_over(self) -> None:
        """A change may bring what was used under the limits in force, where it is over sooner."""
        for key in self.keys.values():
            for number, rule_ in self.rates:
                with self.following():
                    before = reference.pass_time(key.of(number), self.now)
                    after = reference.denied(before, rule_, 1, self.now, by_this=False)
                    key.states[number] = after

    @alive
    @rule(first=st.integers(0, 4), times=st.one_of(st.integers(1, 70), st.integers(1, 400)))
    def change_often(self, first: int, times: int) -> None:
        for to in itertools.islice(itertools.cycle(self.sets), first, first + times):
            self.change_to(to)

    @alive
    @rule(key=st.sampled_from(KEYS), times=st.integers(1, 40))
    def change_while_denied(self, key: str, times: int) -> None:
        for to in itertools.islice(itertools.cycle(self.sets), times):
            self.change_to(to)
            if self.given_up or not self.rates:
                return
            with self.following():
                self.ask(key, min(self.look(key)) + 1, admit=False)

    @alive
    @rule(key=st.sampled_from(KEYS), cost=COSTS, admit=st.booleans())
    def acquire(self, key: str, cost: int, admit: bool) -> None:
        with self.following():
            self.ask(key, cost, admit)

    @alive
    @rule(key=st.sampled_from(KEYS), more=st.integers(0, 1), admit=st.booleans())
    def acquire_what_is_left(self, key: str, more: int, admit: bool) -> None:
        with self.following():
            told = self.look(key)
            self.ask(key, max(1, min(told, default=0) + more), admit)

    def ask(self, key: str, cost: int, admit: bool) -> None:
        before, most = self.look(key), self.most_permits
        if self.too_long(key, cost):
            raise GaveUp
        if admit or most:
            permit, d = self.limiter.admit(key, self.now, cost)
        else:
            permit, d = None, self.limiter.apply(lib.FSHM_ACQUIRE, key, self.now, cost)
        if not d.status:
            self.took(key, 0)
            self.check_denial(key, cost, d, looked=bool(admit or most))
            for a, b, (_, rule_) in zip(before, self.look(key), self.rates, strict=True):
                assert a == b or (rule_.kind == BUCKET and a == b + 1), (
                    "a denial consumed something"
                )
            return
        assert d.status == lib.FSHM_ALLOWED
        held = self.keys[key].held
        assert not most or len(held) < most
        self.took(key, cost, admitted=True)
        charges: list[Charge | None] = []
        for number, rule_ in self.rates:
            states = self.keys[key].of(number)
            after = reference.admitted(states, rule_, cost, self.now)
            assert after, f"{cost} of {rule_} admitted; by the reference, used: {states}"
            self.keys[key].states[number] = after
            one = next(iter(after))
            charges.append(Charge(one, rule_, self.now) if len(after) == 1 else None)
        if most:
            held.append(permit)
        if permit:
            self.admitted.append(Admitted(key, cost, permit, self.shape, charges))
        self.look(key)

    def check_denial(self, key: str, cost: int, d: Any, looked: bool) -> None:
        if d.limit_index == len(self.rates):
            assert self.most_permits == len(self.keys[key].held) or (
                self.most_permits and len(self.keys[key].held) > self.most_permits
            )
            return
        longest, old = Fraction(0), False
        for i, (number, rule_) in enumerate(self.rates):
            states = self.keys[key].of(number)
            longest = max(longest, reference.longest_denial(states, rule_, cost, self.now))
            old |= looked and any(s and s.label != rule_ for s in states)
            by_this = i == d.limit_index
            after = reference.denied(states, rule_, cost, self.now, by_this=by_this)
            assert after, f"{cost} of {rule_} denied; by the reference, used: {states}"
            self.keys[key].states[number] = after
        if any(cost > rule_.most for _, rule_ in self.rates):
            assert d.retry_after_ns == NEVER
            return
        retry = d.retry_after_ns
        assert 0 < retry <= longest + 16, (retry, float(longest))
        # An admission only looks, so what was used may stay under old limits; else this is certain.
        if not old:
            assert self.limiter.peek(key, self.now + retry + 16, cost).status
            assert retry <= 8 or not self.limiter.peek(key, self.now + retry - 8, cost).status

    @alive
    @rule(key=st.sampled_from(KEYS), cost=st.one_of(COSTS, st.integers(1, 10**5)))
    def charge(self, key: str, cost: int) -> None:
        with self.following():
            if not self.rates or self.too_long(key, cost):
                return
            if cost > EXACT and any(r.kind == SLIDING for r in self.last.values()):
                return
            self.look(key)
            for number, rule_ in self.rates:
                states = self.keys[key].of(number)
                after = reference.charged(states, rule_, cost, self.now)
                self.keys[key].states[number] = after
            self.limiter.charge(key, self.now, cost)
            self.took(key, cost)
            self.given_up |= self.too_long(key, 0)
            self.look(key)

    @alive
    @rule(key=st.sampled_from(KEYS), cost=COSTS)
    def refund(self, key: str, cost: int) -> None:
        with self.following():
            if not self.rates:
                return
            self.look(key)
            self.limiter.refund(key, self.now, cost)
            self.took(key, -cost)
            for number, rule_ in self.rates:
                states = self.keys[key].of(number)
                after = reference.given_back(states, rule_, cost, self.now)
                self.keys[key].states[number] = after
            self.look(key)

    @alive
    @rule(which=st.integers(0, 5), more=st.integers(-110, 20))
    def settle(self, which: int, more: int) -> None:
        if not self.admitted:
            return
        one = self.admitted.pop(which % len(self.admitted))
        if one.shape != self.shape or not all(one.charges) or not self.rates:
            return
        with self.following():
            self._settle(one, max(0, one.cost + more))

    def _settle(self, one: Admitted, actual: int) -> None:
        key = self.keys[one.key]
        self.look(one.key)
        more = actual - one.cost
        for (number, rule_), of in zip(self.rates, one.charges, strict=True):
            states = key.of(number)
            if of and _near_another_window(of, states):
                return
            if more > 0:
                key.states[number] = reference.charged(states, rule_, more, self.now)
            elif more < 0:
                key.states[number] = reference.given_back(states, rule_, -more, self.now, of)
        self.limiter.settle(one.key, self.now, one.cost, actual, one.permit)
        self.took(one.key, more)
        self.look(one.key)

    @alive
    @rule(key=st.sampled_from(KEYS), which=st.integers(0, 5))
    def release(self, key: str, which: int) -> None:
        held = self.keys[key].held
        if held:
            assert self.limiter.release(held.pop(which % len(held)))
        with self.following():
            self.look(key)

    @alive
    @rule(key=st.sampled_from(KEYS))
    def reset(self, key: str) -> None:
        """In all limits in force, and perhaps in those that are not."""
        self.limiter.reset(key)
        for number, states in self.keys[key].states.items():
            self.keys[key].states[number] = NOTHING if number in self.numbers else states | NOTHING
        self.keys[key].since = []
        self.shape += 1  # what was charged before cannot be settled
        with self.following():
            self.look(key)

    @alive
    @rule(key=st.sampled_from(KEYS), ns=PAUSES)
    def block(self, key: str, ns: int) -> None:
        with self.following():
            if not self.rates:
                return
            self.look(key)
            buckets = [(number, r) for number, r in self.rates if r.kind == BUCKET]
            states = [s for number, _ in buckets for s in self.keys[key].of(number)]
            if any(s is not None and not isinstance(s, reference.Bucket) for s in states):
                return
            status = self.limiter.block(key, self.now, ns)
            self.took(key, 0)
            assert status == (lib.FSHM_ALLOWED if buckets else lib.FSHM_E_ARGUMENT)
            for number, rule_ in buckets:
                before = self.keys[key].of(number)
                if ns:
                    after = reference.blocked(before, rule_, ns, self.now)
                    self.keys[key].states[number] = after
            self.given_up |= self.too_long(key, 0)
            if buckets and ns:
                retry = self.limiter.peek(key, self.now).retry_after_ns
                assert retry == NEVER or retry >= ns - 8
            if not self.given_up:
                self.look(key)


def _near_another_window(of: Charge, states: States) -> bool:
    """All was given back, and another window began whose end may be the same."""
    return any(
        isinstance(s, reference.Window)
        and isinstance(of.state, reference.Window)
        and s.serial != of.state.serial
        and s.end - of.state.end < 1 << 20
        for s in states
    )


def test_stories() -> None:
    run_state_machine_as_test(Stories, settings=SETTINGS)
