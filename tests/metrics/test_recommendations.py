"""Each recommendation comes from figures, says what to do, and goes when its cause is gone."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.damage import write_word
from support.names import left_over
from support.waiters import waiters

from fast_litellm_shm import (
    ConcurrencyLimiter,
    RateLimiter,
    Segment,
    SimpleConnectionPool,
    Window,
    get_recommendations,
    record_performance,
)
from fast_litellm_shm._shared import features
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm._shared.wait_queue import ALIKE
from fast_litellm_shm.metrics import health as diagnostics
from fast_litellm_shm.metrics import recommendations


def by_type() -> dict[str, dict[str, Any]]:
    found = get_recommendations()
    for one in found:
        assert set(one) == {
            "type",
            "component",
            "description",
            "message",
            "priority",
            "suggestion",
        }
        assert all(isinstance(value, str) and value for value in one.values())
        assert one["message"] == f"{one['description']} {one['suggestion']}"
    order = ["high", "medium", "low"]
    assert [one["priority"] for one in found] == sorted(
        (one["priority"] for one in found), key=order.index
    )
    return {one["type"]: one for one in found}


def test_nothing_to_recommend() -> None:
    RateLimiter(Window(500, 3600), name="fine").acquire("k")
    record_performance("fine", "o", 1.0)
    assert get_recommendations() == []


def test_a_segment_that_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "10")
    limiter = RateLimiter(Window(5, 3600), name="full", on_full="deny")
    for i in range(8):
        limiter.acquire(f"k{i}")
    found = by_type()["segment_full"]
    assert found["priority"] == "medium"
    assert "80% of the capacity of 10 keys" in found["description"]
    assert "FAST_LITELLM_SHM_CAPACITY=20" in found["suggestion"]
    for i in range(500):
        limiter.acquire(f"k{i}")
    assert by_type()["segment_full"]["priority"] == "high"
    assert "calls met a full table" in by_type()["keys_refused"]["description"]


def test_a_key_that_is_always_denied() -> None:
    limiter = RateLimiter(Window(5, 3600), name="tight")
    for _ in range(99):
        limiter.acquire("greedy")
    assert "key_denied" not in by_type()
    limiter.acquire("greedy")
    for i in range(20):
        for _ in range(5):
            limiter.acquire(f"modest{i}")
    found = by_type()["key_denied"]
    assert "'greedy'" in found["description"]
    assert "'tight'" in found["description"]
    assert "95 of 100 calls" in found["description"]
    assert len(get_recommendations()) == 1


def test_a_pool_at_its_limit() -> None:
    pool = SimpleConnectionPool("llm")
    taken = [pool.get_connection("https://a") for _ in range(10)]
    found = by_type()["pool_full"]
    assert found["component"] == "connection_pool"
    assert "'pool llm'" in found["description"]
    assert "'https://a'" in found["description"]
    assert "all 10 connections are out" in found["description"]
    assert taken[0] is not None
    pool.return_connection(taken[0])  # idle: to be had
    assert get_recommendations() == []
    pool.close()


def test_permits_at_their_limit() -> None:
    limiter = ConcurrencyLimiter(2, name="c")
    with limiter.acquire("k"), limiter.acquire("k"):
        found = by_type()["permits_full"]
        assert "'c', 'k': all 2 permits are out" in found["description"]
    assert get_recommendations() == []


def test_a_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    limiter = ConcurrencyLimiter(2, name="c")
    with limiter.acquire("k"), waiters(limiter, "k", ALIKE, ALIKE):
        monkeypatch.setattr(recommendations, "_WAITED", 3600.0)
        assert get_recommendations() == []
        monkeypatch.setattr(recommendations, "_WAITED", 0.0)
        found = by_type()["long_wait"]
        assert "'c', 'k': 2 callers wait, the first for " in found["description"]
        assert "timeout" in found["suggestion"]
    assert get_recommendations() == []


def test_a_high_error_rate() -> None:
    for i in range(100):
        record_performance("routing", "bad" if i % 2 else "good", 1.0, success=i % 20 != 1)
    found = by_type()["error_rate"]
    assert found["component"] == "routing"
    assert found["priority"] == "medium"
    assert "5 of 100 calls failed (5%), most of them in 'bad'" in found["description"]
    for _ in range(100):
        record_performance("routing", "bad", 1.0, success=False)
    assert by_type()["error_rate"]["priority"] == "high"


def test_too_many_names_of_metrics() -> None:
    for i in range(50):
        record_performance("c", f"request {i}", 1.0)
    assert "no ids of requests" in by_type()["metrics_full"]["suggestion"]


def test_the_memo() -> None:
    handle = Segment.default()._handle
    lib.fshm_memo_count(handle, 90, 909)
    assert get_recommendations() == []  # too few to say
    lib.fshm_memo_count(handle, 0, 1)
    assert "9% of 1000 texts were known" in by_type()["memo_misses"]["description"]
    lib.fshm_memo_count(handle, 400, 0)
    assert get_recommendations() == []


def test_a_full_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "1")
    handle = Segment.default()._handle
    encoding = lib.fshm_memo_encoding(handle, b"e", 1)
    for i in range(20_000):
        text = str(i).encode()
        lib.fshm_memo_put(handle, encoding, text, len(text), 1)
    lib.fshm_memo_count(handle, 400, 600)
    state = diagnostics.memo_state(Segment.default())
    assert state["texts"] >= 0.95 * state["places"]
    assert "larger FAST_LITELLM_SHM_CAPACITY" in by_type()["memo_full"]["suggestion"]


def test_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_RUST_RATE_LIMITING", "false")
    found = by_type()["feature_off"]
    assert (found["component"], found["priority"]) == ("rust_rate_limiting", "low")
    assert "limits stay in force" in found["description"]
    for i in range(10):
        features.record_error("rust_routing", ValueError(f"error {i}"))
    found = by_type()["feature_failed"]
    assert (found["component"], found["priority"]) == ("rust_routing", "high")
    assert "ValueError: error 9" in found["description"]
    assert "reset_errors('rust_routing')" in found["suggestion"]
    features.reset_errors()
    assert "feature_failed" not in by_type()


def test_a_removed_segment() -> None:
    kept = Segment.default()
    kept.remove()
    assert "Restart the workers" in by_type()["segment_removed"]["suggestion"]
    del kept


def test_a_full_table_of_limiters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "1")
    most = Segment.default().geometry().limiters
    for i in range(most):
        RateLimiter(Window(5, 60), name=f"user {i}")
    assert f"{most} of {most} entries for limiters" in by_type()["limiters_full"]["description"]


def test_without_a_segment(monkeypatch: pytest.MonkeyPatch, segment_name: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment_name)
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", str(2**31))
    with pytest.warns(RuntimeWarning, match="counted in this process only"):
        assert "no space left" in by_type()["no_segment"]["description"]


def test_damage_and_a_deleted_lock_file() -> None:
    segment = Segment.default()
    with ConcurrencyLimiter(2, name="c").slot("k"):
        (lock,) = (path for path in left_over(segment.name) if path != segment.path)
        os.unlink(lock)
        write_word(segment, segment.geometry().slots_offset + 16 * 7 + 8, 99)
        found = by_type()
    damaged, unknown = found["segment_damaged"], found["segment_liveness_unknown"]
    assert damaged["priority"] == unknown["priority"] == "high"
    assert "slot 7 holds a value that the library" in damaged["description"]
    assert f"its lock file {lock} was deleted" in unknown["description"]
    assert damaged["suggestion"].startswith("Stop the workers")
    assert unknown["suggestion"].startswith("Stop the workers")
