"""Every public name of fast-litellm's, with its arguments, against ours: see by_design.NAMES."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from peers import by_design

import fast_litellm_shm

MODULES = ("", "_rust", "feature_flags", "enhanced_monkeypatch")
TELL = """
import importlib, inspect, json, sys, types, warnings
warnings.simplefilter("ignore")
sys.modules["litellm"] = None  # it would be patched
import fast_litellm, fast_litellm._rust as rust

def arguments(found):
    try:
        given = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return None
    return [[one.name, one.default is not one.empty] for one in given if one.name != "self"]

def told(found):
    members = {}
    if isinstance(found, type):
        members = {name: arguments(getattr(found, name)) for name in dir(found) if name[0] != "_"}
    return {"kind": type(found).__name__, "arguments": arguments(found), "members": members}

out = {}
for name in sys.argv[1:]:
    module = importlib.import_module("fast_litellm" + "." * bool(name) + name)
    if name in ("", "_rust"):
        names = {*rust.__all__, *getattr(module, "__all__", ())}
        found = {one: getattr(module, one) for one in names}
    else:
        found = {
            one: value for one, value in vars(module).items()
            if one[0] != "_" and getattr(value, "__module__", "") == module.__name__
        }
    out[name] = {one: told(value) for one, value in found.items()}
print(json.dumps(out))
"""


@pytest.fixture(scope="module")
def theirs() -> Any:
    done = subprocess.run(
        [sys.executable, "-c", TELL, *MODULES],
        env={**os.environ, "PYTHONPATH": os.environ["FAST_LITELLM"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found[""]) >= 29
    return found


def _check_arguments(where: str, wanted: list[tuple[str, bool]] | None, called: Any) -> None:
    """All of theirs first, by position; what has a default there has one here."""
    if wanted is None:  # a property
        return
    here = [one for one in inspect.signature(called).parameters.values() if one.name != "self"]
    names = [name.lstrip("_") for name, _ in wanted]
    assert [one.name for one in here][: len(names)] == names, where
    for (_, has_default), one in zip(wanted, here, strict=False):
        assert one.kind is not inspect.Parameter.KEYWORD_ONLY, where
        assert not has_default or one.default is not inspect.Parameter.empty, where
    for one in here[len(names) :]:
        assert one.default is not inspect.Parameter.empty, where


def test_each_name_is_here_or_listed(theirs: Any) -> None:
    missing = {
        f"{module}.{name}".lstrip(".")
        for module in MODULES
        for name in theirs[module]
        if not hasattr(getattr(fast_litellm_shm, module) if module else fast_litellm_shm, name)
    }
    assert missing == by_design.NAMES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_arguments(theirs: Any, module: str) -> None:
    ours: Any = importlib.import_module("fast_litellm_shm" + "." * bool(module) + module)
    compared = 0
    for name, told in theirs[module].items():
        where = f"{module}.{name}".lstrip(".")
        if where in by_design.NAMES:
            continue
        found = getattr(ours, name)
        if told["kind"] == "EnumType" or told["kind"] == "EnumMeta":
            assert set(told["members"]) == {*found.__members__}, where
            continue
        if not callable(found):
            assert type(found).__name__ == told["kind"], where
            continue
        _check_arguments(where, told["arguments"], found)
        for member, wanted in told["members"].items():
            assert hasattr(found, member), f"{where}.{member}"
            _check_arguments(f"{where}.{member}", wanted, getattr(found, member))
        compared += 1
    assert compared >= 3


def test_modules_are_reached_as_there() -> None:
    assert pathlib.Path(os.environ["FAST_LITELLM"], "fast_litellm").is_dir()
    for module in MODULES[1:]:
        found = importlib.import_module(f"fast_litellm_shm.{module}")
        assert getattr(fast_litellm_shm, module) is found
