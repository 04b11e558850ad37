"""What an import loads: a rate limiter needs none of the other parts, nor what they need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from support.children import PATIENCE

import fast_litellm_shm
from fast_litellm_shm import fast_litellm

# Of the package, what a rate limiter is made of.
LIGHT = {
    "",
    "_native",
    "_native.lib",
    "_shared",
    "_shared.greenlets",
    "_shared.later",
    "_shared.limit_grammar",
    "_shared.log",
    "_shared.moved_clock",
    "_shared.named_limiter",
    "_shared.native",
    "_shared.performance",
    "_shared.segment",
    "_shared.settings",
    "_shared.side_limiters",
    "_shared.states",
    "_shared.wait_queue",
    "_shared.zones",
    "exceptions",
    "fast_litellm",
    "fast_litellm.import_hook",
    "limiters",
    "limiters.choice",
    "limiters.grantors",
    "limiters.rate",
    "limiters.waiting",
    "limits",
}
HEAVY = {"asyncio", "concurrent", "csv", "hashlib", "json", "litellm", "logging", "random"} | {
    *("numpy", "psutil", "redis", "rich", "tiktoken")
}


def python(code: str, *blocked: str, **env: str) -> Any:
    """What the code prints, as JSON, in a new interpreter without the blocked packages."""
    begin = f"import json, sys\nsys.modules.update(dict.fromkeys({blocked!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + code],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def loaded(code: str) -> set[str]:
    """The modules that it loads, beyond those of the start (an editable install has some)."""
    before = "import sys\nbefore = set(sys.modules)\n"
    print_them = "\nprint(__import__('json').dumps(sorted({*sys.modules} - before - {'json'})))"
    done = subprocess.run(
        [sys.executable, "-c", before + code + print_them],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    return {name for name in json.loads(done.stdout) if not name.startswith("json.")}


def ours(modules: set[str]) -> set[str]:
    package = "fast_litellm_shm"
    return {
        name.removeprefix(package).removeprefix(".")
        for name in modules
        if name.partition(".")[0] == package
    }


def test_a_rate_limiter_loads_what_it_needs() -> None:
    code = (
        "from fast_litellm_shm import RateLimiter, Window\n"
        "assert RateLimiter(Window(5, 60), name='light').acquire('k')"
    )
    found = loaded(code)
    assert ours(found) == LIGHT
    assert {name.partition(".")[0] for name in found} & HEAVY == set()


def test_every_name_is_there_and_listed() -> None:
    listed = python(
        "import fast_litellm_shm as package\n"
        "listed = dir(package)\n"
        "print(json.dumps([listed, [getattr(package, name) is None for name in package.__all__]]))"
    )
    assert set(fast_litellm_shm.__all__) <= set(listed[0])
    assert not any(listed[1])
    assert len(set(fast_litellm_shm.__all__)) == len(fast_litellm_shm.__all__)


def test_the_core_leads() -> None:
    names = fast_litellm_shm.__all__
    assert names[:5] == ["TokenBucket", "FixedWindow", "SlidingWindow", "Limit", "Window"]
    assert names[-len(fast_litellm.__all__) :] == fast_litellm.__all__


def test_names_of_fast_litellm_are_those_that_are_loaded_later() -> None:
    names = [name for names in fast_litellm.MODULES.values() for name in names.split()]
    assert sorted([*names, "__version__"]) == sorted(fast_litellm.__all__)
    assert set(fast_litellm.__all__) <= set(dir(fast_litellm))
    for name in fast_litellm.__all__:
        assert getattr(fast_litellm, name) is getattr(fast_litellm_shm, name)


HOOKED = """
import fast_litellm_shm
print(json.dumps([type(each).__name__ for each in sys.meta_path].count("_Finder")))
"""


@pytest.mark.parametrize(("enabled", "count"), [("true", 1), ("false", 0)])
def test_the_import_hook_is_there_where_it_is_enabled(enabled: str, count: int) -> None:
    assert python(HOOKED, FAST_LITELLM_ENABLED=enabled) == count


def test_switched_on_after_the_import_the_reason_says_what_to_do() -> None:
    code = """
import os, fast_litellm_shm as package
os.environ["FAST_LITELLM_ENABLED"] = "true"
print(json.dumps(package.get_patch_status()["reason"]))
"""
    assert python(code, FAST_LITELLM_ENABLED="false") == (
        "FAST_LITELLM_ENABLED was false when fast_litellm_shm was imported: call "
        "apply_acceleration()"
    )


WORKING = """
import fast_litellm_shm as package
from fast_litellm_shm import *
segment = Segment.default()
assert RateLimiter(Window(5, 60), name="r").acquire("k")
assert RateLimiter(Window(5, 60), name="r").check("k")["allowed"]
with ConcurrencyLimiter(1, name="c").slot("k"):
    pass
assert Quota(rpm=5, name="q").admit("k")
assert check_rate_limit("k")["allowed"] and SimpleRateLimiter(5).is_allowed("k")
pool = SimpleConnectionPool("p")
with pool.connection("https://host"):
    pass
router = AdvancedRouter()
found = [{"model_name": "m", "litellm_params": {"model": "x"}}]
assert router.get_available_deployment(found, "m") == found[0]
record_performance("component", "operation", 1.0)
assert get_performance_stats("component")
assert get_feature_status()["rust_routing"]["enabled"]
assert isinstance(get_pricing_status()["models_loaded"], int)
segment.remove()
"""


@pytest.mark.parametrize("missing", ["numpy", "psutil", "rich", "tiktoken"])
def test_what_does_not_need_a_missing_package_works(missing: str) -> None:
    assert python(WORKING + "print(json.dumps(True))", missing) is True


NEEDING = {
    "acquire_many": ("numpy", 'RateLimiter(Window(5, 60), name="r").acquire_many(["k"])'),
    "get_rate_limit_stats": ("numpy", "get_rate_limit_stats()"),
    "get_connection_pool_stats": ("numpy", "get_connection_pool_stats()"),
    "count_tokens": ("tiktoken", 'SimpleTokenCounter().count_tokens("a text", "gpt-4o")'),
    "inspect": ("psutil", "cli.segments.processes_of(Segment.default())"),
    "console": ("rich", "cli.render.console()"),
}


@pytest.mark.parametrize("what", NEEDING)
def test_what_needs_a_missing_package_says_how_to_install_it(what: str) -> None:
    missing, call = NEEDING[what]
    code = f"""
from fast_litellm_shm import *
from fast_litellm_shm import cli
from fast_litellm_shm.cli import inspect, render
try:
    {call}
except MissingPackageError as error:
    print(json.dumps(str(error)))
finally:
    Segment.default().remove()
"""
    assert python(code, missing) == (
        f"this call needs {missing}, which is not installed: pip install {missing}"
    )
    assert issubclass(fast_litellm_shm.MissingPackageError, ImportError)


def test_the_command_says_which_package_is_missing() -> None:
    code = """
from fast_litellm_shm import Segment, cli
Segment.default()
sys.stdout, out = sys.stderr, sys.stdout
status = cli.main(["inspect"])
Segment.default().remove()
print(json.dumps(status), file=out)
"""
    assert python(code, "rich") == 1
