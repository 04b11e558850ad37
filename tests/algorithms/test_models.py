"""Each answer of each algorithm is the model's: never more (I1), never less (I2)."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from algorithms.driver import BUCKET, LATEST, NEVER, SLIDING, WINDOW, OneKey, Rule
from algorithms.models import EXACT, Sliding, Window, model_of
from fast_litellm_shm import Segment

exact = settings(
    max_examples=150,
    deadline=None,
    # The segment is shared by the examples on purpose: each has a key of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
BEGIN = st.integers(1, 1 << 53)
KINDS = ("bucket", "strict", "window", "sliding")


@st.composite
def rules(draw: st.DrawFn, kind: str, coarse: bool = False) -> Rule:
    n = draw(st.integers(1, 60))
    least = max(1 << 14, n << 20 if coarse else n)
    per = draw(st.one_of(st.integers(least, least * 4), st.integers(least, 1 << 44)))
    if kind in ("bucket", "strict"):
        return Rule(BUCKET, n, per, draw(st.integers(1, n)), kind == "strict")
    if kind == "sliding":
        per = max(per, 1 << 19)  # room for 60 in the count
    return Rule(WINDOW if kind == "window" else SLIDING, n, per)


@st.composite
def steps(draw: st.DrawFn, per: int, n: int) -> list[tuple[str, int, int]]:
    """(what, how long after the one before, cost)"""
    pause = st.one_of(st.just(0), st.integers(0, per // n + 2), st.integers(0, 2 * per + 2))
    what = st.sampled_from(("acquire",) * 6 + ("charge", "refund", "peek"))
    cost = st.one_of(st.just(1), st.integers(0, n), st.integers(n, n + 2))
    return draw(st.lists(st.tuples(what, pause, cost), min_size=1, max_size=40))


def check_retry(limiter: OneKey, now: int, costs: int | tuple[int, ...], denied: Any) -> None:
    """Denied until the nanosecond before, admitted from that on."""
    retry = denied.retry_after_ns
    assert retry > 0
    if now + retry <= LATEST:
        assert not limiter.peek(now + retry - 1, costs).status
        assert limiter.peek(now + retry, costs).status


@pytest.mark.parametrize("kind", ["bucket", "window", "sliding"])
@exact
@given(data=st.data())
def test_one_limit(segment: Segment, kind: str, data: st.DataObject) -> None:
    rule = data.draw(rules(kind))
    now = data.draw(BEGIN)
    limiter, model = OneKey(segment, rule), model_of(rule)
    for what, pause, cost in data.draw(steps(rule.per, rule.n)):
        now += pause
        model.to(now)
        if what == "charge":
            if isinstance(model, Sliding) and model.count + cost > EXACT:
                continue
            limiter.charge(now, cost)
            model.charge(cost)
        elif what == "refund":
            limiter.refund(now, cost)
            model.refund(cost)
        else:
            peeked = limiter.peek(now, cost)
            admitted = bool(peeked.status)
            assert not admitted or model.may(cost)
            assert admitted or not model.must(cost)
            if not admitted and peeked.retry_after_ns == NEVER:
                assert not model.fits(cost)
            elif not admitted:
                assert model.fits(cost)
                check_retry(limiter, now, cost, peeked)
            if what == "acquire":
                assert limiter.acquire(now, cost) == admitted
                if admitted:
                    model.charge(cost)
        if isinstance(model, Window):
            # Where rounding leaves open whether the window is over, let it be.
            assume(not (model.count and model.end <= now < model.latest_end))


@pytest.mark.parametrize("kind", KINDS)
@exact
@given(data=st.data())
def test_remaining_is_what_fits(segment: Segment, kind: str, data: st.DataObject) -> None:
    rule = data.draw(rules(kind))
    now = data.draw(BEGIN)
    limiter = OneKey(segment, rule)
    assert limiter.remaining(now) == [rule.burst or rule.n]
    for what, pause, cost in data.draw(steps(rule.per, rule.n)):
        now += pause
        if what == "charge":
            limiter.charge(now, cost)
        else:
            limiter.acquire(now, cost)
        (left,) = limiter.remaining(now)
        assert limiter.peek(now, 0).remaining == left
        assert left == 0 or limiter.peek(now, left).status
        assert not limiter.peek(now, left + 1).status


@exact
@given(data=st.data())
def test_bucket_bound(segment: Segment, data: st.DataObject) -> None:
    """burst + rate x interval, for every pair of admissions; an instant is a nanosecond long."""
    rule = data.draw(rules("bucket"))
    now = data.draw(BEGIN)
    limiter, log = OneKey(segment, rule), []
    for _, pause, cost in data.draw(steps(rule.per, rule.n)):
        now += pause
        if limiter.acquire(now, cost):
            log.append((now, cost))
    for i in range(len(log)):
        tokens = 0
        for at, cost in log[i:]:
            tokens += cost
            assert (tokens - rule.burst) * rule.per < (at - log[i][0] + 1) * rule.n or (
                tokens <= rule.burst
            )


@exact
@given(data=st.data())
def test_strict_bound(segment: Segment, data: st.DataObject) -> None:
    """At most n in any closed interval of length per, asked as often as may help."""
    rule = data.draw(rules("strict"))
    now = data.draw(BEGIN)
    limiter, log = OneKey(segment, rule), []
    for _, pause, cost in data.draw(steps(rule.per, rule.n)):
        now += pause
        denied = limiter.peek(now, cost)
        if not denied.status and denied.retry_after_ns != NEVER:
            now += denied.retry_after_ns  # at the earliest instant
        if limiter.acquire(now, cost):
            log.append((now, cost))
    for i in range(len(log)):
        assert sum(cost for at, cost in log[i:] if at <= log[i][0] + rule.per) <= rule.n


@exact
@given(data=st.data())
def test_strict_is_not_slower_than_it_must_be(segment: Segment, data: st.DataObject) -> None:
    """Sustained, n - burst + 1 in `per`: what a stretched interval leaves, within its rounding."""
    rule = data.draw(rules("strict", coarse=True))
    now = data.draw(BEGIN)
    limiter = OneKey(segment, rule)
    assert [limiter.acquire(now) for _ in range(rule.burst + 1)] == [True] * rule.burst + [False]
    assert limiter.acquire(now + rule.per // (rule.n - rule.burst + 1) + 1)


@exact
@given(data=st.data())
def test_several_limits(segment: Segment, data: st.DataObject) -> None:
    """All or nothing: admitted where all models admit, and a denial consumes nothing anywhere."""
    kinds = data.draw(
        st.lists(st.sampled_from(["bucket", "window", "sliding"]), min_size=2, max_size=4)
    )
    these = [data.draw(rules(kind, coarse=True)) for kind in kinds]
    now = data.draw(BEGIN)
    limiter, models = OneKey(segment, *these), [model_of(rule) for rule in these]
    for what, pause, cost in data.draw(steps(min(r.per for r in these), min(r.n for r in these))):
        now += pause
        costs = tuple(data.draw(st.sampled_from([cost, 1, 0])) for _ in these)
        for model in models:
            model.to(now)
        before = limiter.remaining(now)
        peeked = limiter.peek(now, costs)
        admitted = bool(peeked.status)
        assert not admitted or all(m.may(c) for m, c in zip(models, costs, strict=True))
        assert admitted or not all(m.must(c) for m, c in zip(models, costs, strict=True))
        if not admitted:
            guilty = peeked.limit_index
            assert not models[guilty].must(costs[guilty])
            if peeked.retry_after_ns == NEVER:
                assert not models[guilty].fits(costs[guilty])
            else:
                check_retry(limiter, now, costs, peeked)
        if what == "peek":
            continue
        assert limiter.acquire(now, costs) == admitted
        if admitted:
            for model, each in zip(models, costs, strict=True):
                model.charge(each)
        else:
            assert limiter.remaining(now) == before


@exact
@given(data=st.data())
def test_reserve(segment: Segment, data: st.DataObject) -> None:
    """Charged as of the instant that is given back: at those, each bucket keeps its bound; and
    nobody waits longer than the slowest of them asks for."""
    these = data.draw(st.lists(rules("bucket", coarse=True), min_size=1, max_size=3))
    now = data.draw(BEGIN)
    limiter, log = OneKey(segment, *these), []
    most = min(rule.burst for rule in these)
    for _ in range(data.draw(st.integers(2, 12))):
        now += data.draw(st.integers(0, min(rule.per for rule in these)))
        cost = data.draw(st.integers(1, most))
        wait = limiter.peek(now, cost).retry_after_ns
        if wait:
            assert not limiter.reserve(now, cost, wait - 1).status
        got = limiter.reserve(now, cost, wait)
        assert got.status and got.retry_after_ns == wait
        log.append((now + wait, cost))
    for rule in these:
        interval = -(-rule.per // rule.n)
        for i in range(len(log)):
            for j in range(i, len(log)):
                tokens = sum(cost for _, cost in log[i : j + 1])
                assert (tokens - rule.burst) * interval <= max(log[j][0] - log[i][0], 0)


@pytest.mark.parametrize("kind", ["bucket", "strict"])
@exact
@given(data=st.data())
def test_block(segment: Segment, kind: str, data: st.DataObject) -> None:
    """Nothing is admitted before the latest instant that was asked for, and something is at the
    later of that and what the limit itself says. A block of nothing changes nothing."""
    rule = data.draw(rules(kind))
    now = data.draw(BEGIN)
    limiter, until = OneKey(segment, rule), 0
    for what, pause, cost in data.draw(steps(rule.per, rule.n)):
        now += pause
        if what in ("charge", "refund"):
            before = limiter.peek(now).retry_after_ns
            for_ns = data.draw(st.sampled_from([0, 1, pause, rule.per * cost]))
            limiter.block(now, for_ns)
            until = max(until, now + for_ns)
            assert limiter.peek(now).retry_after_ns == max(before, for_ns)
        elif limiter.acquire(now, max(cost, 1)):
            assert now >= until


@exact
@given(data=st.data())
def test_change_at_run_time(segment: Segment, data: st.DataObject) -> None:
    """What was consumed stays consumed, token for token, however often the limits change."""
    rule = data.draw(rules("bucket", coarse=True))
    rule = Rule(BUCKET, rule.n, rule.n * (rule.per // rule.n), rule.burst)
    now = data.draw(BEGIN)
    limiter = OneKey(segment, rule)
    used = data.draw(st.integers(1, rule.burst))
    assert limiter.acquire(now, used)
    for _ in range(data.draw(st.integers(1, 40))):
        n = data.draw(st.integers(1, 100))
        rule = Rule(BUCKET, n, n * data.draw(st.integers(1 << 20, 1 << 40)), n)
        limiter.change(rule, now=now)
        assert limiter.remaining(now) == [max(n - used, 0)]
        if n > used:
            assert not limiter.acquire(now, n - used + 1)
            assert limiter.acquire(now, 1)
            used += 1
