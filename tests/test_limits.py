"""Limit, Window, SlidingWindow: what they accept, and what they say of what they do not."""

from __future__ import annotations

import pickle
from datetime import timedelta
from typing import Any

import pytest

from fast_litellm_shm import Limit, RateLimiter, Segment, SlidingWindow, Window
from fast_litellm_shm.limits import checked, describe, parse, parse_all, reason
from fast_litellm_shm.testing import isolated

KINDS: list[Any] = [Limit, Window, SlidingWindow]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [0, -1, -(2**70)])
def test_n_below_one(kind: Any, n: int) -> None:
    with pytest.raises(ValueError, match=rf"{kind.__name__}: n must be at least 1, not {n}"):
        kind(n)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1.0, "5", None, True, float("nan"), float("inf"), [3]])
def test_n_not_an_int(kind: Any, n: Any) -> None:
    with pytest.raises(TypeError) as caught:
        kind(n)
    assert str(caught.value) == f"{kind.__name__}: n must be an int, not {n!r}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", [0, -1, 0.0, float("nan"), float("inf"), -float("inf")])
def test_per_not_positive_and_finite(kind: Any, per: float) -> None:
    with pytest.raises(ValueError, match=r"per must be a positive, finite number of seconds, not"):
        kind(5, per=per)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", ["60", None, True, [], 1j])
def test_per_not_a_number(kind: Any, per: Any) -> None:
    with pytest.raises(TypeError) as caught:
        kind(5, per=per)
    assert "per must be a number of seconds" in str(caught.value)
    assert repr(per) in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per", [1e-9, 1e12, 10**400], ids=["short", "long", "endless"])
def test_per_out_of_range_names_the_range(kind: Any, per: float) -> None:
    with pytest.raises(ValueError, match="per must be"):
        kind(1, per=per)


@pytest.mark.parametrize("burst", [0, -3, 11])
def test_burst_out_of_range(burst: int) -> None:
    with pytest.raises(ValueError) as caught:
        Limit(10, burst=burst)
    assert str(caught.value) == f"TokenBucket: burst must be between 1 and n = 10, not {burst}"


@pytest.mark.parametrize("burst", [1.5, "2", True])
def test_burst_not_an_int(burst: Any) -> None:
    with pytest.raises(TypeError) as caught:
        Limit(10, burst=burst)
    assert str(caught.value) == f"TokenBucket: burst must be an int, not {burst!r}"


@pytest.mark.parametrize("kind", KINDS)
def test_n_above_what_can_be_counted_names_the_most(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"n must be at most [1-9]\d* for per = 1, not"):
        kind(2**62, per=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_most_that_is_named_is_accepted(kind: Any) -> None:
    with pytest.raises(ValueError) as caught:
        kind(2**62, per=1)
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert kind(most, per=1).n == most
    with pytest.raises(ValueError):
        kind(most + 1, per=1)


def test_defaults() -> None:
    assert (Limit(7).per, Limit(7).burst, Limit(7).strict) == (60.0, 7, False)
    assert (Window(7).per, SlidingWindow(7).per) == (60.0, 60.0)


def test_a_timedelta_is_a_number_of_seconds() -> None:
    two_minutes: Any = timedelta(minutes=2)
    assert Limit(7, two_minutes) == Limit(7, 120)
    assert hash(Limit(7, two_minutes)) == hash(Limit(7, 120))


def test_kinds_differ() -> None:
    limits = [Window(5), SlidingWindow(5), Limit(5), Limit(5, strict=True)]
    assert len(set(limits)) == len(limits)


@pytest.mark.parametrize(
    "limit", [Limit(9, 7, burst=3, strict=True), Window(9, 0.5), SlidingWindow(9)]
)
def test_pickle(limit: Any) -> None:
    assert pickle.loads(pickle.dumps(limit)) == limit


def test_a_limiter_needs_limits() -> None:
    with pytest.raises(ValueError, match="a limiter takes 1 to 4 limits, not 0"):
        RateLimiter()
    with pytest.raises(ValueError, match="a limiter takes 1 to 4 limits, not 5"):
        RateLimiter(*[Limit(1)] * 5)


@pytest.mark.parametrize("other", [5, b"5/min", None, (Limit(1),)])
def test_only_limits_are_limits(other: Any) -> None:
    with pytest.raises(TypeError) as caught:
        RateLimiter(other)
    assert (
        str(caught.value)
        == f"limits must be TokenBucket, FixedWindow or SlidingWindow, not {other!r}"
    )


def test_checked_keeps_the_order() -> None:
    limits = (Window(5), Limit(5), SlidingWindow(5), Window(6))
    assert checked(iter(limits)) == limits


@pytest.mark.parametrize(
    ("limit", "text"),
    [
        (Limit(100, 60, burst=10), "100/60s burst 10"),
        (Limit(100, 1), "100/1s"),
        (Limit(9, 60, burst=2, strict=True), "9/60s burst 2 strict"),
        (Window(5000, 3600), "5000/3600s window"),
        (SlidingWindow(3, 0.5), "3/0.5s sliding"),
    ],
)
def test_describe(limit: Any, text: str) -> None:
    assert describe(limit) == text


@pytest.mark.parametrize(
    ("limit", "period"),
    [
        (Limit(1, 1), "second"),
        (Window(1, 60), "minute"),
        (SlidingWindow(1, 3600), "hour"),
        (Limit(1, 86400), "day"),
        (Limit(1, 2.5), "2.5 seconds"),
    ],
)
def test_reason_names_the_period(limit: Any, period: str) -> None:
    assert reason(limit) == f"Rate limit exceeded (requests per {period})"


def test_a_strict_limit_that_would_refill_for_years_is_refused() -> None:
    """burst = n leaves one token every ``per``: 1,000 of 100 hours are 11 years, and segment time
    ends before. It must be refused as an argument, not when the limiter is used."""
    with pytest.raises(ValueError, match="burst"):
        Limit(1000, 360_000, burst=1000, strict=True)


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("100 per minute", Limit(100, 60)),
        ("100/60s", Limit(100, 60)),
        ("5/second", Limit(5, 1)),
        ("100 per 30 s burst 10", Limit(100, 30, burst=10)),
        ("100 per  2 minutes burst 10 strict", Limit(100, 120, burst=10, strict=True)),
        ("10 per 0.5s", Limit(10, 0.5)),
        ("1000 per day", Window(1000, "day")),
        ("1000 per day in Europe/Berlin", Window(1000, "day", timezone="Europe/Berlin")),
        ("9/month America/Port-au-Prince", Window(9, "month", timezone="America/Port-au-Prince")),
        ("1000/year Etc/GMT+1 window", Window(1000, "year", timezone="Etc/GMT+1")),
        ("1000 per hour window", Window(1000, "hour")),
        ("1000 per 24 hours window", Window(1000, 86_400)),
        ("1000 per 1 day window", Window(1000, 86_400)),
        ("1000 per 24 hours", Limit(1000, 86_400)),
        ("100 per minute sliding", SlidingWindow(100, 60)),
        ("100 per hour sliding", SlidingWindow(100, 3600)),
        ("100 per week burst 3", Limit(100, 7 * 86_400, burst=3)),
        ("5r/s", Limit(5, 1)),
        ("30r/m", Limit(30, 60)),
        ("5 requests per second", Limit(5, 1)),
        ("1 request/2 hours", Limit(1, 7200)),
        ("7 reqs per 10 s burst=2", Limit(7, 10, burst=2)),
        ("10 PER MINUTE BURST 3 Strict", Limit(10, 60, burst=3, strict=True)),
        ("5/Hours Window", Window(5, "hour")),
        ("  7per3hr ", Limit(7, 3 * 3600)),
        ("1/day burst = 1", Limit(1, 86_400)),
        ("rate=10r/s", Limit(10, 1, burst=1)),
        ("rate=30r/m burst=5 nodelay", Limit(30, 60, burst=6)),
        ("rate = 10r/s burst=20 nodelay", Limit(30, 3, burst=21)),
        ("RATE=1r/s BURST=9 NODELAY", Limit(10, 10, burst=10)),
    ],
)
def test_limits_as_text(text: str, limit: Any) -> None:
    assert parse(text) == limit
    assert parse(describe(limit)) == limit
    assert checked([text]) == (limit,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "100",
        "per day",
        "-5 per day",
        "1.5 per day",
        "100 per",
        "100 per fortnight",
        "1 per day in",
        "100 per minute in Europe/Berlin",
        "100 per 2 days in Europe/Berlin",
        "100 per month sliding",
        "100 per 2 months",
        "100 per day in Nowhere/Else",
        "0 per day",
        "100 per minute window sliding",
        "100 per minute; 5 per fortnight",
        "100 per day in ../../etc/passwd",
        "10 per 0 s",
    ],
)
def test_texts_that_are_no_limits(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert str(caught.value)
    with pytest.raises(ValueError):
        checked([text])


@pytest.mark.parametrize("between", ["; ", ";", ", ", " | "])
def test_several_limits_in_a_text(between: str) -> None:
    text = f"10 per second{between}1000 per day in Europe/Berlin"
    found = (Limit(10, 1), Window(1000, "day", timezone="Europe/Berlin"))
    assert parse_all(text) == checked([text]) == found
    assert checked([text, Limit(3, 60)]) == (*found, Limit(3, 60))
    with pytest.raises(ValueError, match="must be written as"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("often", "must be written as '100 per minute'.*not 'often'"),
        ("100/minut", "not '100/minut': do you mean minute"),
        ("10/second; 1000/dya", "limit 2 of '10/second; 1000/dya': .*do you mean day"),
        ("10/second;", "limit 2 of '10/second;': .* not ''"),
        ("1,000 per day", "limit 1 of '1,000 per day'"),
        ("10/second; 0/day", "limit 2 of '10/second; 0/day': .*n must be"),
        ("1/s; 2/m; 3/h; 4/d; 5/week", "takes 1 to 4 limits, not 5"),
        ("10 pre minute", r"do you mean per\?\n  10 pre minute\n     \^\^\^$"),
        ("5/minute brust 3", r"do you mean burst\?\n  5/minute brust 3\n           \^{5}$"),
        ("1/s; 5/dya", r"mean day\?\n  1/s; 5/dya\n         \^{3}$"),
        ("1/s;5/minute nodelay", r"belongs to nginx.*\n  1/s;5/minute nodelay\n {15}\^{7}$"),
        ("rate=10r/s burst=20", "without nodelay, nginx delays"),
        ("rate=10r/h", "nginx's rate is 1 or more r/s or r/m"),
        ("rate=10r/s window", "goes with burst and nodelay alone"),
        ("10r/s zone=one", "nginx's zone is the name of the limiter"),
        ("10/2/minute", "a period must follow"),
        ("9/minute window burst 3", "'burst' does not go with what is before it"),
        ("100 per 2 months", "'100 per 60 days'"),
        ("99999999999999999999/s", "is too large"),
        ("5/minute\nburst x", "burst must be a whole number$"),
    ],
)
def test_what_is_said_of_a_bad_text(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked([text])


def test_a_limiter_of_texts(segment: Segment) -> None:
    limiter = RateLimiter("10 per second", "3 per day in Asia/Tokyo", name="texts", segment=segment)
    assert limiter.limits == (Limit(10, 1), Window(3, "day", timezone="Asia/Tokyo"))
    assert [limiter.is_allowed("k") for _ in range(4)] == [True] * 3 + [False]
    assert pickle.loads(pickle.dumps(limiter)).limits == limiter.limits


# Of limits' own tests, and of its documentation.
OF_LIMITS = [
    *(f"1{between}{unit}" for between in (" per ", "/", " / ") for period in (
        "second", "minute", "hour", "day", "month", "year",
    ) for unit in (period, period.upper(), period.title(), f"{period}s")),
    "1 per 3 hour", "1 per 2 hours", "1/2 day", "1 per 3 hour; 1 per second",
    "1 per 3 hour, 1 per second", "10/minute", "10 per hour", "10/hour;100/day;2000 per year",
    "100/day, 500/7days", "1/second|5/2minutes",
]  # fmt: skip


@pytest.mark.parametrize("text", OF_LIMITS)
def test_texts_of_pypis_limits_have_the_same_numbers(text: str) -> None:
    """Except the length of one month and one year, which are those of the calendar here."""
    from limits import parse_many

    ours, theirs = parse_all(text), parse_many(text)
    assert [each.n for each in ours] == [each.amount for each in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        calendar = other.multiples == 1 and other.GRANULARITY.name not in ("second", "minute")
        assert isinstance(mine, Window if calendar else Limit)
        if calendar:
            assert mine.per == other.GRANULARITY.name
        else:
            assert mine.per == other.get_expiry()


@pytest.mark.parametrize(
    "text", ["1 per millienium", "1 per year; 2 per decade", "", "10", "1/", "a/day", "1/day;"]
)
def test_texts_that_limits_refuses_are_refused(text: str) -> None:
    from limits import parse_many

    for read in (parse_all, parse_many):
        with pytest.raises(ValueError):
            read(text)


def test_a_text_must_be_one() -> None:
    for wrong in (None, 5, b"1/day"):
        with pytest.raises(TypeError, match="must be a str"):
            parse(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("n, burst, per", [(10, 20, "s"), (3, 100, "m"), (1, 0, "s"), (7, 6, "m")])
def test_nginx_admits_one_and_the_burst_and_then_the_rate(n: int, burst: int, per: str) -> None:
    with isolated(frozen=True) as shm:
        limiter = RateLimiter(f"rate={n}r/{per} burst={burst} nodelay", name="nginx")
        admitted = [bool(limiter.acquire("k")) for _ in range(burst + 3)]
        assert admitted == [True] * (burst + 1) + [False] * 2
        shm.clock.advance({"s": 1, "m": 60}[per] * (burst + 1) / n + 1e-6)
        assert sum(bool(limiter.acquire("k")) for _ in range(burst + 3)) == burst + 1
