"""The drop-in rate limiter: the names and dicts of fast-litellm, shared by all workers."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
from support.children import run, run_one

import fast_litellm_shm as fast_litellm
from fast_litellm_shm import (
    Limit,
    RateLimiter,
    Segment,
    SegmentNotFoundError,
    SimpleRateLimiter,
    Window,
)
from fast_litellm_shm.fast_litellm import simple


def test_the_guides_two_limiters_in_one_process() -> None:
    standard = fast_litellm.SimpleRateLimiter(requests_per_minute=60)
    premium = fast_litellm.SimpleRateLimiter(requests_per_minute=300)
    assert [standard.is_allowed("user1") for _ in range(8)] == [True] * 6 + [False] * 2
    assert [premium.is_allowed("user1") for _ in range(33)][:30] == [True] * 30
    assert standard.get_remaining("user2") == 6
    assert premium.get_remaining("user2") == 30


@pytest.mark.parametrize(
    ("per_minute", "burst"), [(1, 1), (9, 1), (10, 1), (11, 2), (60, 6), (61, 7), (6000, 600)]
)
def test_burst_is_a_tenth_rounded_up(per_minute: int, burst: int) -> None:
    limiter = SimpleRateLimiter(per_minute)
    assert limiter.limits == (Limit(per_minute, 60, burst=burst, strict=True),)
    assert limiter.get_remaining("k") == burst


def test_burst_can_be_given() -> None:
    assert SimpleRateLimiter(60, burst=20).get_remaining("k") == 20
    with pytest.raises(ValueError, match="burst must be between 1 and n = 60, not 61"):
        SimpleRateLimiter(60, burst=61)


def test_check() -> None:
    limiter = SimpleRateLimiter(requests_per_minute=20)
    assert limiter.check("u") == {
        "allowed": True,
        "reason": "Request allowed",
        "remaining_requests": 1,
    }
    limiter.check("u")
    denied = limiter.check("u")
    retry = denied.pop("retry_after_ms")
    assert denied == {
        "allowed": False,
        "reason": "Rate limit exceeded (requests per minute)",
        "remaining_requests": 0,
    }
    assert isinstance(retry, int)
    assert 0 < retry <= 60_000 / 19 + 1  # a bucket of 20 with a burst of 2 refills every 60/19 s


def test_no_key_is_the_key_default() -> None:
    limiter = SimpleRateLimiter(20)
    assert limiter.is_allowed()
    assert limiter.is_allowed(None)
    assert not limiter.is_allowed("default")
    assert limiter.get_remaining() == 0


@pytest.mark.parametrize("bad", [0, -1])
def test_too_few(bad: int) -> None:
    with pytest.raises(ValueError, match=f"requests_per_minute must be at least 1, not {bad}"):
        SimpleRateLimiter(bad)


@pytest.mark.parametrize("bad", [1.5, "60", None, True])
def test_not_an_int(bad: Any) -> None:
    with pytest.raises(TypeError) as caught:
        SimpleRateLimiter(bad)
    assert str(caught.value) == f"requests_per_minute must be an int, not {bad!r}"


def _admit(settings: dict[str, Any], attempts: int) -> int:
    limiter = SimpleRateLimiter(**settings)
    return sum(limiter.is_allowed("user") for _ in range(attempts))


# slow: at one a minute, or after a burst, nothing refills within a test
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_equal_settings_share_in_all_processes(method: str) -> None:
    settings = {"requests_per_minute": 50, "burst": 50}  # refills one a minute
    assert sum(run(_admit, [(settings, 100)] * 4, method)) == 50
    assert _admit(settings, 10) == 0


def test_other_settings_and_names_do_not_share() -> None:
    settings: list[dict[str, Any]] = [
        {"requests_per_minute": 10, "burst": 10},
        {"requests_per_minute": 20, "burst": 10},
        {"requests_per_minute": 10, "burst": 9},
        {"requests_per_minute": 10, "burst": 10, "name": "team a"},
        {"requests_per_minute": 10, "burst": 10, "name": "team b"},
    ]
    assert [_admit(given, 9) for given in settings] == [9] * 5
    assert run_one(_admit, settings[3], 20) <= 1 + 1  # the tenth, and one that may refill


def test_making_one_again_resets_nothing() -> None:
    SimpleRateLimiter(10).is_allowed("u")
    assert SimpleRateLimiter(10).get_remaining("u") == 0


def test_stats_by_key_and_totals() -> None:
    limiter = SimpleRateLimiter(60, burst=60)
    for key in ("a", "a", "b"):
        limiter.check(key)
    SimpleRateLimiter(61).check("other limiter")
    stats = limiter.get_stats()
    assert set(stats) == {"a", "b"}
    assert stats["a"] == {
        "config": {
            "requests_per_second": 1,
            "requests_per_minute": 60,
            "requests_per_hour": 3600,
            "burst_size": 60,
        },
        "remaining_requests": 58,
        "bucket_tokens": 58,
        "minute_remaining": 58,
        "hour_remaining": 3598,
        "total_checks": 2,
        "allowed_count": 2,
        "denied_count": 0,
    }
    assert (stats["total_checks"], stats["allowed_count"], stats["denied_count"]) == (3, 3, 0)


def test_check_rate_limit() -> None:
    answers = [fast_litellm.check_rate_limit("k") for _ in range(21)]
    assert answers[0] == {"allowed": True, "reason": "Request allowed", "remaining_requests": 19}
    assert all(answer["allowed"] for answer in answers[:20])


def _configure(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, config: object) -> None:
    found = {"features": {"rust_rate_limiting": {"enabled": True, "config": config}}}
    (tmp_path / "c.json").write_text(json.dumps(found))
    monkeypatch.setenv("FAST_LITELLM_FEATURE_CONFIG", str(tmp_path / "c.json"))


def test_check_rate_limit_by_the_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    _configure(monkeypatch, tmp_path, {"requests_per_minute": 5, "burst_size": 30})
    answers = [fast_litellm.check_rate_limit("k") for _ in range(6)]
    assert [answer["allowed"] for answer in answers] == [True] * 5 + [False]
    assert answers[-1]["reason"] == "Rate limit exceeded (requests per minute)"
    assert fast_litellm.get_rate_limit_stats()["k"]["config"] == {
        "requests_per_second": 10,
        "requests_per_minute": 5,
        "requests_per_hour": 10_000,
        "burst_size": 30,
    }


@pytest.mark.parametrize("bad", [0, -1, 1.5, "5", True, None, 10**30])
def test_check_rate_limit_by_a_bad_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, bad: object
) -> None:
    _configure(monkeypatch, tmp_path, {"requests_per_minute": bad, "burst_size": 3})
    with pytest.warns(RuntimeWarning, match="requests_per_minute must be a whole number") as caught:
        assert fast_litellm.check_rate_limit("k")["allowed"]
    assert repr(bad) in str(caught[0].message)
    config = fast_litellm.get_rate_limit_stats()["k"]["config"]
    assert (config["requests_per_minute"], config["burst_size"]) == (600, 3)


def test_check_rate_limit_names_its_periods() -> None:
    limiter = simple._limiter()
    for costs, period in (
        ((20, 0, 0), "second"),
        ((0, 600, 0), "minute"),
        ((0, 0, 10_000), "hour"),
    ):
        limiter.charge(period, costs)
        limiter.charge(period, costs)
        denied = fast_litellm.check_rate_limit(period)
        assert denied["reason"] == f"Rate limit exceeded (requests per {period})"
        assert not denied["allowed"]
        assert denied["retry_after_ms"] > 0


def test_get_rate_limit_stats() -> None:
    for key in ("user1", "user1", "user2", b"raw"):
        fast_litellm.check_rate_limit(key)
    stats = fast_litellm.get_rate_limit_stats()
    assert set(stats) == {"user1", "user2", "raw"}
    assert len(stats) == 3
    user = stats["user1"]
    assert user["config"] == {
        "requests_per_second": 10,
        "requests_per_minute": 600,
        "requests_per_hour": 10_000,
        "burst_size": 20,
    }
    assert 18 <= user["bucket_tokens"] <= 20
    assert 18 <= user["remaining_requests"] <= 20
    assert 598 <= user["minute_remaining"] <= 600
    assert 9998 <= user["hour_remaining"] <= 10_000
    assert (user["total_checks"], user["allowed_count"], user["denied_count"]) == (2, 2, 0)


def test_totals_are_read_like_keys_and_are_none() -> None:
    fast_litellm.check_rate_limit("user1")
    stats = fast_litellm.get_rate_limit_stats()
    assert (stats["total_checks"], stats["allowed_count"], stats["denied_count"]) == (1, 1, 0)
    assert stats.get("total_checks") == 1
    assert "total_checks" in stats
    assert list(stats) == ["user1"]
    assert stats.get("nobody", 7) == 7
    with pytest.raises(KeyError):
        stats["nobody"]


def test_a_key_wins_over_a_total() -> None:
    fast_litellm.check_rate_limit("total_checks")
    stats = fast_litellm.get_rate_limit_stats()
    assert stats["total_checks"]["allowed_count"] == 1
    assert stats["allowed_count"] == 1


def test_stats_of_nothing() -> None:
    stats = fast_litellm.get_rate_limit_stats()
    assert dict(stats) == {}
    assert stats["total_checks"] == 0


def _check_twice(key: str) -> None:
    fast_litellm.check_rate_limit(key)
    fast_litellm.check_rate_limit(key)


def test_stats_of_all_processes() -> None:
    run(_check_twice, [("shared",)] * 3, "spawn")
    assert fast_litellm.get_rate_limit_stats()["shared"]["total_checks"] == 6


def test_check_rate_limit_after_its_segment_was_removed() -> None:
    fast_litellm.check_rate_limit("k")
    Segment.default().remove()
    fast_litellm.check_rate_limit("k")  # no worker dies of it
    with pytest.raises(SegmentNotFoundError):
        Segment(create=False)


def test_it_is_a_rate_limiter(segment: Segment) -> None:
    limiter = SimpleRateLimiter(60, segment=segment)
    assert isinstance(limiter, RateLimiter)
    assert limiter.acquire("k", cost=2).remaining == 4
    assert repr(limiter).startswith(
        "SimpleRateLimiter(TokenBucket(n=60, per=60, burst=6, strict=True)"
    )
    assert RateLimiter(Window(1), name="w", segment=segment).acquire("k")


def test_names_of_the_module() -> None:
    assert fast_litellm.RUST_ACCELERATION_AVAILABLE is True
    assert fast_litellm.NATIVE_AVAILABLE is True
    assert isinstance(fast_litellm.__version__, str)
    assert all(hasattr(fast_litellm, name) for name in fast_litellm.__all__)
