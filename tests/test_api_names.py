"""Every name, argument and dict key of the API that fast-litellm has, in one table.

What each does is tested in the file of its subject; this one notices when a name goes.
"""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any

import pytest
from support.routed import deployments

import fast_litellm_shm as package
from fast_litellm_shm._shared import features
from fast_litellm_shm.fast_litellm import enhanced_monkeypatch, feature_flags

# name -> its parameters, each with its default (NEEDED: none)
NEEDED = inspect.Parameter.empty
FUNCTIONS: dict[str, dict[str, Any]] = {
    "apply_acceleration": {},
    "remove_acceleration": {},
    "get_patch_status": {},
    "health_check": {},
    "rust_acceleration_available": {},
    "is_enabled": {"feature_name": NEEDED, "request_id": None},
    "get_feature_status": {},
    "reset_errors": {"feature_name": None},
    "record_performance": {
        "component": NEEDED,
        "operation": NEEDED,
        "duration_ms": NEEDED,
        "success": True,
        "input_size": None,
        "output_size": None,
        "metadata": None,
    },
    "get_performance_stats": {"component": None},
    "compare_implementations": {"rust_component": NEEDED, "python_component": NEEDED},
    "get_recommendations": {},
    "export_performance_data": {"component": None, "format": "json"},
    "get_pricing_status": {},
    "check_rate_limit": {"key": NEEDED},
    "get_rate_limit_stats": {},
    "get_connection": {"endpoint": NEEDED},
    "return_connection": {"connection_id": NEEDED},
    "remove_connection": {"connection_id": NEEDED},
    "health_check_connection": {"connection_id": NEEDED},
    "cleanup_expired_connections": {},
    "get_connection_pool_stats": {},
    "get_available_deployment": {
        "model_list": NEEDED,
        "model": NEEDED,
        "blocked_models": None,
        "context": None,
        "settings": None,
    },
}
CLASSES: dict[str, dict[str, dict[str, Any]]] = {
    "SimpleRateLimiter": {
        "__init__": {"requests_per_minute": 60},
        "check": {"key": None},
        "is_allowed": {"key": None},
        "get_remaining": {"key": None},
        "get_stats": {},
    },
    "SimpleConnectionPool": {
        "__init__": {"pool_name": "default"},
        "get_connection": {"endpoint": NEEDED},
        "return_connection": {"connection_id": NEEDED},
        "health_check": {"connection_id": NEEDED},
        "cleanup": {},
        "get_stats": {},
    },
    "SimpleTokenCounter": {
        "__init__": {"model_max_tokens": 4096},
        "count_tokens": {"text": NEEDED, "model": None},
        "count_tokens_batch": {"texts": NEEDED, "model": None},
        "estimate_cost": {"input_tokens": NEEDED, "output_tokens": NEEDED, "model": NEEDED},
        "get_model_limits": {"model": NEEDED},
        "validate_input": {"text": NEEDED, "model": NEEDED},
    },
    "AdvancedRouter": {
        "__init__": {"strategy": "simple_shuffle"},
        "get_available_deployment": {
            "model_list": NEEDED,
            "model": NEEDED,
            "blocked_models": None,
        },
    },
}
# Modules of fast-litellm that `import fast_litellm` brings along.
MODULES: dict[str, dict[str, dict[str, Any]]] = {
    "_rust": FUNCTIONS,
    "feature_flags": {
        "is_enabled": {"feature_name": NEEDED, "request_id": None},
        "record_error": {"feature_name": NEEDED, "error": NEEDED},
        "record_performance": {"feature_name": NEEDED, "duration_ms": NEEDED},
        "get_status": {},
        "reset_errors": {"feature_name": None},
    },
    "enhanced_monkeypatch": {
        "enhanced_apply_acceleration": {"rust_extensions_module": NEEDED},
        "remove_enhanced_acceleration": {},
        "get_patch_status": {},
    },
}
PROPERTIES = {"SimpleTokenCounter": ("model_max_tokens",), "AdvancedRouter": ("strategy",)}
VALUES = {
    "RUST_ACCELERATION_AVAILABLE": bool,
    "NATIVE_AVAILABLE": bool,
    "__version__": str,
}
MEASURED = {
    "total_calls",
    "average_duration_ms",
    "success_rate",
    "error_count",
    "min_duration_ms",
    "max_duration_ms",
    "total_duration_ms",
    "p50_duration_ms",
    "p95_duration_ms",
    "p99_duration_ms",
}
LIMITED = {
    "config",
    "remaining_requests",
    "bucket_tokens",
    "minute_remaining",
    "hour_remaining",
    "total_checks",
    "allowed_count",
    "denied_count",
}


def accepts(called: Any, parameters: dict[str, Any], *, bound: bool) -> None:
    signature = inspect.signature(called)
    names = [name for name in signature.parameters if name != "self" or not bound]
    assert names[: len(parameters)] == list(parameters)
    for name, parameter in signature.parameters.items():
        if name in parameters:
            assert parameter.default == parameters[name], name
            assert parameter.kind is not inspect.Parameter.KEYWORD_ONLY
        elif name != "self":
            assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str) -> None:
    accepts(getattr(package, name), FUNCTIONS[name], bound=False)
    assert name in package.__all__


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in CLASSES for method in CLASSES[name]]
)
def test_methods(name: str, method: str) -> None:
    accepts(getattr(getattr(package, name), method), CLASSES[name][method], bound=True)
    assert name in package.__all__


@pytest.mark.parametrize(
    ("module", "name"), [(one, name) for one in MODULES for name in MODULES[one]]
)
def test_functions_of_modules(module: str, name: str) -> None:
    found = getattr(package, module)
    accepts(getattr(found, name), MODULES[module][name], bound=False)
    assert name in found.__all__


def test_modules_are_loaded_when_they_are_used() -> None:
    code = """
import sys
import fast_litellm_shm as fast_litellm
names = ("_rust", "feature_flags", "enhanced_monkeypatch")
assert not any(f"fast_litellm_shm.{name}" in sys.modules for name in names)
for name in names:
    assert getattr(fast_litellm, name) is sys.modules[f"fast_litellm_shm.{name}"]
try:
    fast_litellm.no_such_name
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'fast_litellm_shm' has no attribute 'no_such_name'\n"


def test_rust_has_the_classes_too() -> None:
    for name in (*CLASSES, *VALUES):
        if name != "NATIVE_AVAILABLE":  # ours
            assert getattr(package._rust, name) is getattr(package, name)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties(name: str) -> None:
    for attribute in PROPERTIES[name]:
        assert hasattr(getattr(package, name)(), attribute)


@pytest.mark.parametrize("name", VALUES)
def test_values(name: str) -> None:
    assert isinstance(getattr(package, name), VALUES[name])


def test_keys_of_health_check() -> None:
    health = package.health_check()
    assert {"status", "rust_available", "components"} <= set(health)
    assert health["status"] == "ok"
    assert isinstance(health["components"], list)


def test_keys_of_get_feature_status() -> None:
    status = package.get_feature_status()
    assert set(status) == set(features.FEATURES)
    for one in status.values():
        assert {
            "enabled",
            "state",
            "error_count",
            "errors",
            "error_threshold",
            "rollout_percentage",
        } == set(one)
    package.reset_errors()


def test_keys_of_feature_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_RUST_ROUTING", "rollout:25")
    monkeypatch.setenv("FAST_LITELLM_BATCH_TOKEN_COUNTING", "false")
    feature_flags.record_performance("rust_routing", 4.0)
    for _ in range(10):
        feature_flags.record_error("rust_token_counting", ValueError("x"))
    status = feature_flags.get_status()
    assert status["features"]["rust_routing"] == {
        "state": "gradual_rollout",
        "rollout_percentage": 25.0,
        "error_count": 0,
        "avg_performance_ms": pytest.approx(4.0, rel=0.05),
        "dependencies": [],
    }
    states = {name: one["state"] for name, one in status["features"].items()}
    assert states == dict.fromkeys(features.FEATURES, "enabled") | {
        "rust_routing": "gradual_rollout",
        "rust_token_counting": "disabled",
        "batch_token_counting": "disabled",
    }
    assert status["global_status"] == {
        "total_features": 5,
        "enabled_features": 3,
        "error_count": 10,
    }
    assert {feature_flags.FeatureState(state) for state in states.values()}


def test_keys_of_monitoring() -> None:
    for name in ("rust_x", "py_x"):
        package.record_performance(name, "o", 1.0)
    stats = package.get_performance_stats()
    assert set(stats) == {"rust_x", "py_x"}
    for one in stats.values():
        assert set(one) >= MEASURED
    assert set(package.compare_implementations("rust_x", "py_x")) == {
        "rust",
        "python",
        "rust_avg_ms",
        "python_avg_ms",
        "speedup",
        "improvement_percentage",
        "recommendation",
    }
    assert package.compare_implementations("rust_x", "nobody") == {}
    assert set(json.loads(package.export_performance_data("rust_x"))) == {"rust_x"}
    assert package.export_performance_data(format="csv").startswith("component,")


def test_keys_of_get_recommendations() -> None:
    for i in range(100):
        package.record_performance("c", "o", 1.0, success=i > 50)
    (one,) = package.get_recommendations()
    assert set(one) == {
        "type",
        "component",
        "description",
        "message",
        "priority",
        "suggestion",
    }


def test_keys_of_rate_limits() -> None:
    assert package.check_rate_limit("k")["allowed"] is True
    limiter = package.SimpleRateLimiter(1)
    assert {*limiter.check("k")} == {"allowed", "reason", "remaining_requests"}
    denied = limiter.check("k")
    assert {*denied} == {"allowed", "reason", "remaining_requests", "retry_after_ms"}
    assert denied["reason"].startswith("Rate limit exceeded (requests per ")
    for stats in (package.get_rate_limit_stats(), limiter.get_stats()):
        assert set(stats["k"]) >= LIMITED
        assert set(stats["k"]["config"]) == {
            "requests_per_second",
            "requests_per_minute",
            "requests_per_hour",
            "burst_size",
        }
        assert stats["total_checks"] == stats["allowed_count"] + stats["denied_count"]
        assert stats.get("total_checks", 0) > 0


def test_keys_of_connection_pools() -> None:
    taken = package.get_connection("https://a")
    assert isinstance(taken, str)
    assert package.health_check_connection(taken) is True
    stats = package.get_connection_pool_stats()
    assert set(stats) >= {
        "active_connections",
        "idle_connections",
        "total_connections",
        "max_total_connections",
        "endpoints",
    }
    assert set(stats["endpoints"]["https://a"]) >= {"available_connections", "max_connections"}
    package.return_connection(taken)
    package.remove_connection(taken)
    assert package.cleanup_expired_connections() == 0


def test_strategies() -> None:
    listed = deployments(2)
    for strategy in ("simple_shuffle", "least_busy", "latency_based", "cost_based"):
        router = package.AdvancedRouter(strategy)
        assert router.strategy == strategy
        assert router.get_available_deployment(listed, "m") in listed
    assert package.get_available_deployment(listed, "m") in listed


def test_keys_of_model_limits() -> None:
    counter = package.SimpleTokenCounter()
    assert counter.model_max_tokens == 4096
    assert {"context_window", "max_output_tokens", "max_input_tokens"} <= set(
        counter.get_model_limits("gpt-4o")
    )
    assert {"json_loaded", "models_loaded", "lookup_failures"} <= set(package.get_pricing_status())


def test_keys_of_acceleration() -> None:
    assert enhanced_monkeypatch.enhanced_apply_acceleration(object()) is False
    assert isinstance(enhanced_monkeypatch.enhanced_apply_acceleration(package), bool)
    assert {*enhanced_monkeypatch.get_patch_status()} == {
        "patched_functions",
        "feature_flags",
        "total_patches",
    }
    assert isinstance(package.apply_acceleration(), bool)
    status = package.get_patch_status()
    assert {"applied", "components"} <= set(status)
    package.remove_acceleration()
