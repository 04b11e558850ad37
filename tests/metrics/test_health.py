"""health_check reports what is so, and never raises."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from support.children import run_one
from support.damage import write_word
from support.names import left_over
from support.routed import hold_and_die

import fast_litellm_shm
from fast_litellm_shm import ConcurrencyLimiter, RateLimiter, Segment, Window, health_check
from fast_litellm_shm._shared import features
from fast_litellm_shm.metrics import health as diagnostics


def test_all_is_well() -> None:
    found = health_check()
    assert found["status"] == "ok"
    assert found["rust_available"] is True
    assert fast_litellm_shm.RUST_ACCELERATION_AVAILABLE is True
    assert fast_litellm_shm.NATIVE_AVAILABLE is True
    assert {"core", "rate_limiter", "connection_pool", "routing", "monitoring"} <= set(
        found["components"]
    )
    assert found["features_off"] == []
    assert found["memo"]["hit_rate"] is None
    segment = found["segment"]
    assert segment == {
        "name": os.environ["FAST_LITELLM_SHM_NAME"],
        "path": Segment.default().path,
        "capacity": 200_000,
        "used": 0,
        "occupancy": 0.0,
        "unlinked": False,
        "damaged": None,
        "liveness_unknown": None,
        "processes_alive": segment["processes_alive"],
        "processes_dead": 0,
        "permits": 0,
        "permits_of_dead": 0,
        "limiters": 0,
        "refused_full": 0,
        "budgets": [],
    }
    json.dumps(found)


def test_components_are_modules() -> None:
    for name, module in diagnostics._COMPONENTS.items():
        path = os.path.join(os.path.dirname(fast_litellm_shm.__file__), *module.split("."))
        exists = os.path.exists(f"{path}.py")
        assert (name in health_check()["components"]) is (exists or module == "_native")


def test_dead_processes_and_their_permits() -> None:
    name = Segment.default().name
    with pytest.raises(AssertionError, match="died"):
        run_one(hold_and_die, name, "c", 3)
    found = health_check()
    assert found["segment"]["permits_of_dead"] == found["segment"]["permits"] == 3
    assert found["segment"]["processes_dead"] == 1
    assert found["segment"]["limiters"] == 1
    assert found["status"] == "ok"  # they are given back when a caller needs one
    permit = ConcurrencyLimiter(1, name="other").acquire("k")
    assert health_check()["segment"]["processes_alive"] == 1
    permit.release()


def test_a_full_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_CAPACITY", "10")
    limiter = RateLimiter(Window(5, 3600), name="full")
    for i in range(10):
        limiter.acquire(f"k{i}")
    status = health_check()["status"]
    assert "100% of the segment's capacity of 10 keys is used" in status
    assert "FAST_LITELLM_SHM_CAPACITY" in status


def test_a_removed_segment() -> None:
    kept = RateLimiter(Window(5, 3600), name="kept")
    assert health_check()["status"] == "ok"
    Segment.default().remove()
    for _ in range(2):  # the first call makes a new one, and that must not hide the old one
        found = health_check()
        assert "was removed while this process used it" in found["status"]
        assert found["segment"]["unlinked"] is False
    assert kept.acquire("k")
    del kept


def test_damage_is_told() -> None:
    segment = Segment.default()
    assert health_check()["segment"]["damaged"] is None
    write_word(segment, segment.geometry().slots_offset + 16 * 7 + 8, 99)
    found = health_check()
    assert found["segment"]["damaged"] == found["status"]
    assert "was damaged: slot 7 holds a value that the library" in found["status"]


def test_a_lock_file_that_was_deleted_is_told() -> None:
    segment = Segment.default()
    with ConcurrencyLimiter(1, name="c").slot("k"):
        (lock,) = (path for path in left_over(segment.name) if path != segment.path)
        os.unlink(lock)
        found = health_check()
        assert lock in found["segment"]["liveness_unknown"]
        assert f"segment {segment.name}: its lock file {lock} was deleted" in found["status"]


def test_features_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(10):
        features.record_error("rust_routing", ValueError("x"))
    monkeypatch.setenv("FAST_LITELLM_RUST_TOKEN_COUNTING", "false")
    found = health_check()
    assert found["status"] == (
        "rust_routing is off after 10 errors: fix their cause, then call "
        "reset_errors('rust_routing')"
    )
    assert found["features_off"] == ["rust_routing", "rust_token_counting"]
    features.reset_errors()
    assert health_check()["status"] == "ok"  # a feature that was switched off is no problem


def _without(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> dict[str, Any]:
    monkeypatch.setenv(variable, value)
    with pytest.warns(RuntimeWarning, match="counted in this process only"):
        found = health_check()
    assert found["segment"] is None
    assert found["memo"] is None
    assert found["rust_available"] is True
    return found


def test_without_a_segment(monkeypatch: pytest.MonkeyPatch, segment_name: str) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_NAME", segment_name)
    found = _without(monkeypatch, "FAST_LITELLM_SHM_CAPACITY", str(2**31))
    assert "no space left" in found["status"]


def test_with_a_bad_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    found = _without(monkeypatch, "FAST_LITELLM_SHM_NAME", "a/b")
    assert "'a/b'" in found["status"]


def test_a_segment_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Segment.default().path
    Segment.default().remove()
    with open(path, "wb") as file:
        file.write(b"not a segment" * 1000)
    with pytest.warns(RuntimeWarning, match="counted in this process only"):
        assert "not a segment of this library" in health_check()["status"]


def test_contents_that_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Segment) -> dict[str, Any]:
        raise ValueError("n is 0")

    monkeypatch.setattr(diagnostics, "segment_state", broken)
    assert "do not add up: ValueError: n is 0" in health_check()["status"]


def test_a_warning_that_is_an_error_does_not_make_it_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_RUST_ROUTING", "maybe")
    assert "FAST_LITELLM_RUST_ROUTING must be" in health_check()["status"]
