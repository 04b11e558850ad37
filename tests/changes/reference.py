"""What is consumed of a limit that changes, by counting tokens: the rules, in exact numbers.

v is the limit under which a state was written, c the one in force now.

- A request is admitted if what is used, in tokens, and its cost fit c. From then on the state is
  one under c.
- Otherwise (it is denied, or something is charged or given back) the state becomes one under c only
  if it is over sooner under c, or at the same time. Else it stays one under v. So a change makes no
  debt of old use, and forgets none. A charge to a bucket of which at most c's burst is used makes
  it one under c, too.
- Under a limit of another kind, or a sliding one with another ``per``, what is used counts as of
  now.

Some things are left open: by how many nanoseconds an end is rounded up, and whether a denial, or
the change itself, writes the state. So there may be several possible states. An answer leaves those
that explain it; one that no state explains is a fault.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil

from changes.driver import BUCKET, SLIDING, WINDOW, Rule

EXACT = 255  # of a sliding window; more in the window before is kept with 8 significant bits
COARSE = 1 << 20  # ns: from there up the interval of a bucket is whole nanoseconds
SLACK = 8  # ns that roundings of one state may add up to

_serial = itertools.count(1)


class GaveUp(Exception):
    """The story leads beyond what the reference can follow."""


def interval(rule: Rule) -> Fraction:
    """ns until a token has flowed back."""
    return Fraction(rule.per, rule.n - rule.burst + 1 if rule.strict else rule.n)


def slow_interval(rule: Rule) -> Fraction:
    """The same, as it is rounded up."""
    coarse = rule.strict or interval(rule) >= COARSE - 1
    return interval(rule) + (1 if coarse else 0)


def within(rule: Rule, ns: int) -> Fraction:
    """Tokens that flow back in so many nanoseconds."""
    return ns / interval(rule)


@dataclass(frozen=True)
class Bucket:
    label: Rule
    at: int
    low: Fraction  # tokens used `at`: between these two
    high: Fraction


@dataclass(frozen=True)
class Window:
    label: Rule
    total: int
    end: int  # without debt: between these two
    late: int
    serial: int  # of the windows that have begun

    @property
    def debt(self) -> int:
        return debt(self.total, self.label)


@dataclass(frozen=True)
class Sliding:
    label: Rule
    index: int
    previous: int
    count: int

    def used(self, now: int) -> int:
        left = self.label.per - now % self.label.per
        return self.count + -(-self.previous * left // self.label.per)


State = Bucket | Window | Sliding | None  # None: nothing is used
States = frozenset[State]
NOTHING: States = frozenset([None])


def debt(total: int, rule: Rule) -> int:
    return -(-max(0, total - rule.n) * rule.per // rule.n)


def rounding(total: int, rule: Rule) -> int:
    return int(2 << max(total, rule.n).bit_length())


def used_now(rule: Rule, tokens: int, now: int) -> State:
    if not tokens:
        return None
    if rule.kind == BUCKET:
        coarse = interval(rule) >= COARSE - 1  # else it is rounded up to a nanosecond
        high = tokens + (Fraction(0) if coarse else within(rule, 2))
        return Bucket(rule, now, Fraction(tokens), high)
    if rule.kind == WINDOW:
        end = now + rule.per
        return Window(rule, tokens, end, end + rounding(tokens, rule), next(_serial))
    if tokens >= 1 << min(rule.per.bit_length() - 1, 41) - 12:
        raise GaveUp("more than its counter holds: it stays under the limits of until now")
    return Sliding(rule, now // rule.per, 0, tokens)


def same_meter(state: State, rule: Rule) -> bool:
    """Do its numbers go on under this rule?"""
    if state is None or state.label.kind != rule.kind:
        return state is None
    return rule.kind != SLIDING or state.label.per == rule.per


def tokens_used(state: State, now: int) -> range:
    """Whole tokens; several where a rounding decides."""
    if state is None:
        return range(1)
    if isinstance(state, Window):
        return range(state.total, state.total + 1)
    if isinstance(state, Sliding):
        return range(state.used(now), state.used(now) + 1)
    slack = within(state.label, SLACK)
    low, high = ceil(max(Fraction(0), state.low - slack)), ceil(state.high + slack)
    if high - low > 4:
        raise GaveUp
    return range(low, high + 1)


def whole_tokens(state: State, rule: Rule, now: int) -> range:
    """As this rule sees them: in the time of a bucket, they are rounded up to a nanosecond."""
    used = tokens_used(state, now)
    return range(used[0], used[-1] + 2) if rule.kind == BUCKET and used[-1] else used


def over_in(state: State, now: int) -> tuple[Fraction, Fraction]:
    """ns until nothing is used, if nothing else happens: between these two."""
    if state is None:
        return Fraction(0), Fraction(0)
    if isinstance(state, Bucket):
        low, high = state.low * interval(state.label), state.high * slow_interval(state.label)
        return low - SLACK, high + SLACK
    if isinstance(state, Window):
        return Fraction(state.end + state.debt - now), Fraction(state.late + state.debt - now)
    windows = 2 if state.count else 1
    per = state.label.per
    return Fraction((state.index + windows) * per - now), Fraction((state.index + 2) * per - now)


def converted(state: State, rule: Rule, now: int) -> Iterator[State]:
    """The same tokens, under this rule."""
    if state is None:
        yield None
    elif not same_meter(state, rule):
        for tokens in tokens_used(state, now):
            yield used_now(rule, tokens, now)
    elif isinstance(state, Bucket):
        slack = within(rule, 4) if state.label != rule else 0
        yield replace(state, label=rule, high=state.high + slack)
    elif isinstance(state, Window):
        late = max(state.late, state.end + rounding(state.total, rule))
        if now >= state.end + debt(state.total, rule):
            yield None  # without its debt, it is over
        if now < late + debt(state.total, rule):
            yield replace(state, label=rule, late=late)
    else:
        yield replace(state, label=rule)


def sooner(state: State, rule: Rule, now: int) -> set[bool]:
    """Is it over sooner under this rule, or at the same time? Both, where a rounding decides."""
    if state is None or state.label == rule:
        return {True}
    if isinstance(state, Bucket) and rule.kind == BUCKET:
        a, b = interval(rule), interval(state.label)
        return {True, False} if abs(a - b) <= 1 else {a < b}
    if isinstance(state, Window) and rule.kind == WINDOW:
        return {debt(state.total, rule) <= state.debt}
    if same_meter(state, rule):
        return {True}
    low, high = over_in(state, now)
    under = [over_in(s, now) for s in converted(state, rule, now)]
    answers = {True} if min(a for a, _ in under) <= high else set()
    return answers | ({False} if max(b for _, b in under) > low else set())


def as_seen(state: State, rule: Rule, now: int) -> Iterator[State]:
    """How a call sees it: a window under c, if it is over sooner then; it may be over by now."""
    if isinstance(state, Window) and rule.kind == WINDOW and True in sooner(state, rule, now):
        yield from converted(state, rule, now)
    else:
        yield state


def pass_time(states: States, now: int) -> States:
    out: set[State] = set()
    for state in states:
        if isinstance(state, Bucket):
            ns = now - state.at
            low = max(Fraction(0), state.low - ns / interval(state.label))
            high = max(Fraction(0), state.high - ns / slow_interval(state.label))
            out.add(Bucket(state.label, now, low, high) if high else None)
        elif isinstance(state, Window):
            if not state.total or now >= state.end + state.debt:
                out.add(None)
            if state.total and now < state.late + state.debt:
                out.add(state)
        elif isinstance(state, Sliding):
            index = now // state.label.per
            if index > state.index:
                previous = state.count if index == state.index + 1 else 0
                if previous > EXACT:
                    raise GaveUp
                later = replace(state, index=index, previous=previous, count=0)
                out.add(later if previous else None)
            else:
                out.add(state if state.count or state.previous else None)
        else:
            out.add(None)
    return frozenset(out)


# What an answer says


def admitted(states: States, rule: Rule, cost: int, now: int) -> States:
    """The states in which it fits, and what they become."""
    if cost > rule.most:
        return frozenset()
    return frozenset(s for state in states for s in _admitted(state, rule, cost, now))


def _admitted(state: State, rule: Rule, cost: int, now: int) -> Iterator[State]:
    if state is None or not same_meter(state, rule):
        for tokens in tokens_used(state, now):
            if tokens + cost <= rule.most:
                yield used_now(rule, tokens + cost, now)
    elif isinstance(state, Bucket):
        room = rule.burst - cost + within(rule, 2)
        if state.low <= room:
            for under in converted(state, rule, now):
                assert isinstance(under, Bucket)
                high = min(under.high, room) + cost + within(rule, 2)
                yield replace(under, low=under.low + cost, high=high)
    elif isinstance(state, Window):
        for under in as_seen(state, rule, now):
            if under is None:
                yield used_now(rule, cost, now)
            elif isinstance(under, Window) and (total := under.total + cost) <= rule.n:
                late = max(under.late, under.end + rounding(total, rule))
                yield replace(under, label=rule, total=total, late=late)
    elif state.used(now) + cost <= rule.n:
        yield replace(state, label=rule, count=state.count + cost)


def may_deny(state: State, rule: Rule, cost: int, now: int) -> bool:
    if cost > rule.most:
        return True
    if isinstance(state, Bucket) and rule.kind == BUCKET:
        return state.high > rule.burst - cost - within(rule, SLACK)
    seen = as_seen(state, rule, now)
    return any(s is not None and whole_tokens(s, rule, now)[-1] + cost > rule.most for s in seen)


def denied(states: States, rule: Rule, cost: int, now: int, *, by_this: bool) -> States:
    out: set[State] = set()
    for state in states:
        if by_this and not may_deny(state, rule, cost, now):
            continue
        seen = state
        if by_this and isinstance(state, Bucket) and rule.kind == BUCKET and cost <= rule.burst:
            low = max(state.low, rule.burst - cost - within(rule, SLACK))
            seen = replace(state, low=min(low, state.high))
        out.add(seen)
        if True in sooner(seen, rule, now):
            out.update(converted(seen, rule, now))
    return frozenset(out)


def left(states: States, rule: Rule, tokens: int, now: int) -> States:
    """The states in which so many are left."""
    out: set[State] = set()
    for state in states:
        if isinstance(state, Bucket) and rule.kind == BUCKET:
            most = rule.burst - state.low + within(rule, 2)
            least = rule.burst - state.high - within(rule, SLACK)
            if (tokens and tokens > most) or tokens + 1 <= least:
                continue
            low, high = state.low, state.high
            if tokens:
                high = min(high, rule.burst - tokens + within(rule, 2))
            if tokens < rule.burst:
                low = max(low, rule.burst - tokens - 1 - within(rule, SLACK))
            out.add(replace(state, low=min(low, high), high=high))
        else:
            seen = (whole_tokens(s, rule, now) for s in as_seen(state, rule, now))
            if any(tokens == max(0, rule.most - used) for each in seen for used in each):
                out.add(state)
    return frozenset(out)


def longest_denial(states: Iterable[State], rule: Rule, cost: int, now: int) -> Fraction:
    """As under v, or as under c, whichever is shorter."""
    longest = Fraction(0)
    for state in states:
        if not may_deny(state, rule, cost, now):
            continue
        if isinstance(state, Bucket) and rule.kind == BUCKET:
            ns = min(slow_interval(state.label), slow_interval(rule))
            shortest = (state.high + cost - rule.burst) * ns + SLACK
        else:
            under = max(over_in(s, now)[1] for s in converted(state, rule, now))
            shortest = min(over_in(state, now)[1], under)
        longest = max(longest, shortest)
    return longest


# What is charged and given back


def to_change(state: State, rule: Rule, cost: int, now: int) -> Iterator[State]:
    """The state that it is charged to, or given back to: under c, or still under v."""
    under_c = sooner(state, rule, now)
    if isinstance(state, Bucket) and rule.kind == BUCKET:
        if state.high <= rule.burst - within(rule, SLACK):
            under_c = {True}
        elif state.low <= rule.burst:
            under_c |= {True}
    elif state is not None and not same_meter(state, rule):
        used = tokens_used(state, now)
        if used[-1] + cost <= rule.most:
            under_c = {True}
        elif used[0] <= rule.most:
            under_c |= {True}
    if True in under_c:
        yield from converted(state, rule, now)
    if False in under_c:
        yield state


def charged(states: States, rule: Rule, cost: int, now: int) -> States:
    out: set[State] = set()
    for state in states:
        for s in to_change(state, rule, cost, now):
            if s is None:
                out.add(used_now(rule, cost, now))
            elif isinstance(s, Bucket):
                high = s.high + cost + within(s.label, 2)
                out.add(replace(s, low=s.low + cost, high=high))
            elif isinstance(s, Window):
                late = max(s.late, s.end + rounding(s.total + cost, s.label))
                out.add(replace(s, total=s.total + cost, late=late))
            elif s.count + cost > EXACT:
                raise GaveUp
            else:
                out.add(replace(s, count=s.count + cost))
    return frozenset(out)


@dataclass(frozen=True)
class Charge:
    """What a settlement knows of its charge: the state that it left."""

    state: State
    rule: Rule
    now: int


def given_back(states: States, rule: Rule, cost: int, now: int, of: Charge | None = None) -> States:
    """of: the charge that it is given back from, as far as that still counts."""
    out: set[State] = set()
    for state in states:
        if of and not _counts(of, state, now):
            out.add(state)  # it may be left as it was, under v too
        for s in to_change(state, rule, 0, now):
            if isinstance(s, Bucket):
                least = most = Fraction(cost)
                if of and isinstance(of.state, Bucket):
                    ns = now - of.now  # what has flowed back since cannot be given back
                    least = min(least, max(Fraction(0), of.state.low - ns / interval(of.rule)))
                    most = min(most, max(Fraction(0), of.state.high - ns / slow_interval(of.rule)))
                if of and of.rule != rule:
                    least, most = Fraction(0), Fraction(cost)
                low = max(Fraction(0), s.low - most - within(s.label, 4))
                high = max(Fraction(0), s.high - max(Fraction(0), least - within(s.label, 4)))
                out.add(replace(s, low=low, high=high) if high else None)
            elif isinstance(s, Window):
                if of and (not isinstance(of.state, Window) or of.state.serial != s.serial):
                    out.add(s)
                else:
                    out.add(replace(s, total=max(0, s.total - cost)))
            elif isinstance(s, Sliding):
                out.add(_sliding_given_back(s, cost, of))
            else:
                out.add(None)
    return pass_time(frozenset(out), now)


def _counts(of: Charge, state: State, now: int) -> bool:
    """Is anything left of the charge that could be given back?"""
    if isinstance(state, Window):
        return isinstance(of.state, Window) and of.state.serial == state.serial
    if isinstance(state, Sliding):
        return isinstance(of.state, Sliding) and of.state.index + 1 >= state.index
    if isinstance(state, Bucket):
        flowed = (now - of.now + SLACK) / interval(of.rule)
        return of.rule == state.label and isinstance(of.state, Bucket) and of.state.low > flowed
    return True


def _sliding_given_back(s: Sliding, cost: int, of: Charge | None) -> Sliding:
    if of is None:
        rest = max(0, cost - s.count)
        return replace(s, count=max(0, s.count - cost), previous=max(0, s.previous - rest))
    assert isinstance(of.state, Sliding)
    if of.state.index == s.index:
        return replace(s, count=max(0, s.count - cost))
    if of.state.index + 1 == s.index:
        return replace(s, previous=max(0, s.previous - cost))
    return s


def blocked(states: States, rule: Rule, ns: int, now: int) -> States:
    """A bucket that admits nothing for so long, and then one token."""
    out: set[State] = set()
    for state in states:
        for changed in to_change(state, rule, 0, now):
            s = changed or Bucket(rule, now, Fraction(0), Fraction(0))
            assert isinstance(s, Bucket)
            least = ns / slow_interval(s.label) + min(s.label.burst, rule.burst) - 1
            least -= within(s.label, 1)  # what may be used then is rounded down to a nanosecond
            most = ns / interval(s.label) + max(s.label.burst, rule.burst) - 1
            high = max(s.high, most + within(s.label, 4))
            out.add(replace(s, low=max(s.low, least), high=high))
    return frozenset(out)
