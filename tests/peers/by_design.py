"""What of the peers' own tests does not pass here, and why. Whatever else fails, and whatever
passes although it is listed here, fails the run (make test-peers). Of httpx: httpx_tests.py.

Keys are pytest's ids below the peer's sources; of LEFT_OUT, parts of them.
"""

from __future__ import annotations

_REDIS_DIES = "it breaks the Redis client under Limiter, to see the fallback; shm:// has no client"

# By peer and test.
FAILS: dict[str, dict[str, str]] = {
    "flask-limiter": {
        "tests/test_configuration.py::test_constructor_arguments_over_config": (
            "it asks whether memory:// is a MemoryStorage, and here it is shm://"
        ),
        "tests/test_error_handling.py::test_fallback_to_memory": _REDIS_DIES,
        "tests/test_error_handling.py::test_fallback_to_memory_backoff_check": _REDIS_DIES,
        "tests/test_error_handling.py::test_fallback_to_memory_with_global_override": _REDIS_DIES,
    },
    "fast-litellm": {},
}

# By peer: not run at all.
LEFT_OUT: dict[str, dict[str, str]] = {
    "flask-limiter": {
        "memcached://": "of Memcached, which would have to run",
        "mongodb://": "of MongoDB, which would have to run",
        "test_reset_unsupported": "of Memcached, whose storage cannot be reset",
    },
    "fast-litellm": {},
}

# By peer: tried again twice.
AT_A_MOMENT: dict[str, dict[str, str]] = {
    "flask-limiter": {
        "tests/test_configuration.py::test_header_names_config": (
            "it fails, with any storage, where a second of the clock ends within it"
        ),
    },
    "fast-litellm": {},
}

# SlowAPI's sdist has no tests: slowapi_tests.py is ours, of what its repository tests most.

# Names of fast-litellm's modules that are not here.
NAMES: dict[str, str] = {
    "feature_flags.FeatureConfig": "features are set by the environment and a JSON file",
    "feature_flags.FeatureFlagManager": "the state of features is the host's, not an object's",
    "enhanced_monkeypatch.AsyncPerformanceWrapper": "it wraps functions of litellm's: nobody does",
    "enhanced_monkeypatch.PerformanceWrapper": "it wraps functions of litellm's: nobody does",
    "enhanced_monkeypatch.enhanced_patch_class": "it replaces classes of litellm's: nobody does",
    "enhanced_monkeypatch.enhanced_patch_function": "one function is patched, and only that",
    "enhanced_monkeypatch.temporary_disable_feature": "in 0.1.10 it raises AttributeError",
}
