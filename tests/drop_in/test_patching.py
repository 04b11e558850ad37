"""What is patched, when, and that it is put back."""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from drop_in.cases import CHAT
from support.locks import is_free_in_a_fork
from support.texts import CORPUS

import fast_litellm_shm
from fast_litellm_shm import Segment
from fast_litellm_shm._shared import features
from fast_litellm_shm.fast_litellm import acceleration, enhanced_monkeypatch
from fast_litellm_shm.metrics.health import memo_state
from fast_litellm_shm.tokens import counter as tokens

MODULE = "litellm.litellm_core_utils.token_counter"
NAME = "_get_exact_count_function"
ENCODINGS, ENCODING = "litellm.rust_bridge.tokenizer", "_python_encoding"
OURS = "fast_litellm_shm.fast_litellm.acceleration"
LONG = [{"role": "user", "content": CORPUS["english"] * 2}]


@pytest.fixture(name="module")
def _module(litellm: Any) -> Any:
    return sys.modules[MODULE]


def _everything() -> dict[tuple[str, str], int]:
    """Each name of each module of litellm, and the object behind it."""
    return {
        (name, key): id(value)
        for name, module in list(sys.modules.items())
        if name.partition(".")[0] == "litellm"
        for key, value in list(vars(module).items())
    }


def test_two_names_are_replaced_and_put_back(litellm: Any, module: Any) -> None:
    assert acceleration.get_patch_status()["components"] == []
    litellm.token_counter("gpt-4o", messages=CHAT)
    before, original = _everything(), getattr(module, NAME)
    router, counter = litellm.Router, litellm.token_counter
    assert acceleration.apply_acceleration() is True
    assert acceleration.apply_acceleration() is True
    litellm.token_counter("gpt-4o", messages=CHAT)
    assert acceleration.get_patch_status() == {
        "applied": True,
        "components": ["token_counting", "encoding"],
        "reason": None,
    }
    after = _everything()
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed == {(MODULE, NAME), (ENCODINGS, ENCODING)}
    assert litellm.Router is router
    assert litellm.token_counter is counter
    assert acceleration.remove_acceleration() is None  # type: ignore[func-returns-value]
    acceleration.remove_acceleration()
    assert _everything() == before
    assert getattr(module, NAME) is original
    status = acceleration.get_patch_status()
    assert (status["applied"], status["components"]) == (False, [])
    assert "remove_acceleration" in status["reason"]


def test_by_the_names_of_fast_litellm(module: Any) -> None:
    originals = getattr(module, NAME), getattr(sys.modules[ENCODINGS], ENCODING)
    assert enhanced_monkeypatch.get_patch_status()["patched_functions"] == {}
    assert enhanced_monkeypatch.enhanced_apply_acceleration(fast_litellm_shm) is True
    status = enhanced_monkeypatch.get_patch_status()
    assert status["total_patches"] == 2
    assert status["patched_functions"] == dict.fromkeys(
        (f"{MODULE}.{NAME}", f"{ENCODINGS}.{ENCODING}"),
        {
            "feature_flag": "rust_token_counting",
            "enabled": True,
            "has_original": True,
            "has_rust": True,
        },
    )
    enhanced_monkeypatch.remove_enhanced_acceleration()
    assert originals == (getattr(module, NAME), getattr(sys.modules[ENCODINGS], ENCODING))


def test_the_replacement_looks_like_what_it_replaces(module: Any) -> None:
    import inspect

    for where, name in ((MODULE, NAME), (ENCODINGS, ENCODING)):
        original = getattr(sys.modules[where], name)
        acceleration.apply_acceleration()
        ours = getattr(sys.modules[where], name)
        assert inspect.signature(ours) == inspect.signature(original)
        assert (ours.__name__, ours.__module__, ours.__doc__) == (name, where, original.__doc__)
        acceleration.remove_acceleration()


def test_switched_off(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(module, NAME)
    monkeypatch.setenv("FAST_LITELLM_ENABLED", "false")
    assert acceleration.apply_acceleration() is False
    assert getattr(module, NAME) is original
    assert acceleration.get_patch_status()["reason"] == "FAST_LITELLM_ENABLED is false"


def test_feature_off_passes_everything_on(
    litellm: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "is_enabled", lambda name, request_id=None: False)
    plain = litellm.token_counter("gpt-4o", messages=CHAT)
    acceleration.apply_acceleration()
    assert litellm.token_counter("gpt-4o", messages=CHAT) == plain
    assert acceleration._counters == {}
    assert getattr(module, NAME)("gpt-4o").__module__ == MODULE
    assert type(getattr(sys.modules[ENCODINGS], ENCODING)("o200k_base")).__name__ == "Encoding"


def test_another_litellm_is_left_alone(
    module: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(module, NAME)
    with caplog.at_level(logging.WARNING):
        assert acceleration.apply_acceleration() is False
    assert not hasattr(module, NAME)
    status = acceleration.get_patch_status()
    assert not status["applied"]
    assert f"has no function {MODULE}.{NAME}, so it is left as it is" in status["reason"]
    assert [record.getMessage() for record in caplog.records] == [status["reason"]]


@pytest.mark.parametrize("change", ["a class", "other closures", "an unknown encoding"])
def test_unknown_functions_are_passed_on(
    litellm: Any, module: Any, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    original = getattr(module, NAME)
    made: list[Any] = []

    class Count:
        def __call__(self, text: str) -> int:
            return 4321

    def factory(*_: Any, **__: Any) -> Any:
        chunk_size, encode_length = 10, object()

        def count(text: str) -> int:
            return 4321 + chunk_size * 0 + (encode_length is None)

        def other(text: str) -> int:
            return 4321

        function = {"a class": Count(), "other closures": other}.get(change, count)
        if hasattr(function, "__code__"):
            function.__module__ = MODULE
        made.append(function)
        return function

    factory.__module__ = MODULE
    monkeypatch.setattr(module, NAME, factory)
    acceleration.apply_acceleration()
    assert litellm.token_counter("gpt-4o", text="x") == 4321
    assert getattr(module, NAME)("gpt-4o") is made[-1]
    assert acceleration._counters == {}
    acceleration.remove_acceleration()
    assert getattr(module, NAME) is factory is not original


def test_somebody_elses_patch_stays(litellm: Any, module: Any) -> None:
    original = getattr(module, NAME)
    plain = litellm.token_counter("gpt-4o", messages=CHAT)
    acceleration.apply_acceleration()
    ours = getattr(module, NAME)

    def theirs(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    theirs.__module__ = MODULE
    setattr(module, NAME, theirs)
    assert not acceleration.get_patch_status()["applied"]
    assert "another library" in acceleration.get_patch_status()["reason"]
    assert litellm.token_counter("gpt-4o", messages=CHAT) == plain
    acceleration.remove_acceleration()
    assert getattr(module, NAME) is theirs
    assert litellm.token_counter("gpt-4o", messages=CHAT) == plain
    assert theirs("gpt-4o").__module__ == MODULE  # ours in it is off
    acceleration.apply_acceleration()
    assert theirs("gpt-4o").__module__ == MODULE  # for ever: another one is on
    assert getattr(module, NAME)("gpt-4o").__module__ == OURS
    acceleration.remove_acceleration()
    assert getattr(module, NAME) is theirs
    setattr(module, NAME, original)


def test_a_failure_of_ours_is_told_and_not_felt(
    litellm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(features, "record_error", lambda name, e: told.append(f"{name} {e}"))

    def fail(*_: object) -> Any:
        raise ArithmeticError("broken")

    plain = litellm.token_counter("gpt-4o", messages=CHAT)
    acceleration.apply_acceleration()
    monkeypatch.setattr(tokens, "make_memo", fail)
    assert litellm.token_counter("gpt-4o", messages=CHAT) == plain
    assert told == ["rust_token_counting broken"]


def test_our_warnings_are_not_felt_where_they_are_errors(
    litellm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = litellm.token_counter("gpt-4o", messages=CHAT)
    acceleration.apply_acceleration()
    monkeypatch.setenv("FAST_LITELLM_RUST_TOKEN_COUNTING", "maybe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert litellm.token_counter("gpt-4o", messages=CHAT) == plain
        assert litellm.token_counter("gpt-4o", messages=CHAT) == plain  # now with the memo
        monkeypatch.setenv("FAST_LITELLM_RUST_TOKEN_COUNTING", "rollout:200")
        counter = next(iter(acceleration._counters.values()))
        assert len({counter.count("a text") for _ in range(64)}) == 1
        assert litellm.encode("gpt-4o", "a text") == litellm.encode("gpt-4o", "a text")


def test_fork_while_another_thread_makes_a_memo() -> None:
    assert is_free_in_a_fork(acceleration, "_lock")


def test_tokenizers_beyond_the_table_are_counted_without(
    litellm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceleration, "_MOST_COUNTERS", 1)
    acceleration.apply_acceleration()
    counts = [litellm.token_counter(model, messages=CHAT) for model in ("gpt-4", "gpt-4o")]
    assert len(acceleration._counters) == 1
    acceleration.remove_acceleration()
    assert counts == [litellm.token_counter(m, messages=CHAT) for m in ("gpt-4", "gpt-4o")]


def test_reloaded(litellm: Any, module: Any) -> None:
    acceleration.apply_acceleration()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.reload(module)
    assert not acceleration.get_patch_status()["applied"]
    assert acceleration.apply_acceleration()
    assert acceleration.get_patch_status()["applied"]
    acceleration.remove_acceleration()
    assert getattr(module, NAME).__code__.co_filename == module.__file__


# on import, each in a process of its own ------------------------------------------------------


_BEFORE = """
import importlib.util, os, sys
import fast_litellm_shm as ours
from fast_litellm_shm._shared import segment
assert not any(name.startswith("litellm") for name in sys.modules)
assert not os.path.exists(segment.path_of(os.environ["FAST_LITELLM_SHM_NAME"]))
assert ours.get_patch_status() == {
    "applied": False, "components": [], "reason": "litellm is not imported yet"}
"""
_AFTER = f"""
import litellm
import {MODULE} as module
from fast_litellm_shm.fast_litellm import acceleration
status = ours.get_patch_status()
print(status["applied"], status["components"], status["reason"])
print(litellm.token_counter("gpt-4o", text="hello there"), len(acceleration._counters))
assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
assert "exec_module" not in vars(module.__spec__.loader)
assert importlib.util.find_spec("{MODULE}").loader is module.__loader__
"""
_ON, _OFF = "True ['token_counting', 'encoding'] None\n2 1\n", "False [] {}\n2 0\n"


def test_ours_first_then_litellm(python: Callable[..., str]) -> None:
    assert python(_BEFORE + _AFTER) == _ON
    assert Segment.default().stats()["processes"] >= 0  # the child made it
    looked = f"import litellm\nimportlib.util.find_spec('{MODULE}')\n"
    assert python(_BEFORE.replace("assert not os", "0 and os") + looked + _AFTER) == _ON


def test_litellm_first_then_ours(python: Callable[..., str]) -> None:
    code = "import sys, importlib.util, litellm\nimport fast_litellm_shm as ours\n"
    assert python(code + _AFTER) == _ON


def test_not_where_it_is_switched_off(python: Callable[..., str]) -> None:
    found = python(
        _BEFORE.replace("litellm is not imported yet", "FAST_LITELLM_ENABLED is false") + _AFTER,
        FAST_LITELLM_ENABLED="false",
    )
    assert found == _OFF.format("FAST_LITELLM_ENABLED is false")


def test_removed_before_litellm_comes(python: Callable[..., str]) -> None:
    found = python(_BEFORE + "ours.remove_acceleration()\n" + _AFTER)
    assert found == _OFF.format("it was removed by remove_acceleration()")
    found = python(
        _BEFORE
        + "ours.remove_acceleration()\nassert ours.apply_acceleration() is True\n"
        + "assert not ours.get_patch_status()['applied']\n"
        + _AFTER
    )
    assert found == _ON


def test_where_litellm_is_not_installed(python: Callable[..., str]) -> None:
    code = """
import sys
import warnings
class Hide:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "litellm": raise ModuleNotFoundError("hidden")
sys.meta_path.insert(0, Hide)
import fast_litellm_shm as ours
print(ours.apply_acceleration(), ours.get_patch_status())
"""
    assert python(code) == (
        "False {'applied': False, 'components': [], 'reason': 'litellm is not installed'}\n"
    )


@pytest.mark.parametrize(
    "source", ["def _get_count_function(): ...\n", None], ids=["other", "none"]
)
def test_an_older_litellm_is_told_before_it_is_imported(
    python: Callable[..., str], tmp_path: Path, source: str | None
) -> None:
    utils = tmp_path / "litellm" / "litellm_core_utils"
    utils.mkdir(parents=True)
    (tmp_path / "litellm" / "__init__.py").touch()
    if source is not None:
        (utils / "token_counter.py").write_text(source)
    info = tmp_path / "litellm-1.81.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: litellm\nVersion: 1.81.9\n")
    found = python(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import fast_litellm_shm as ours\n"
        "print(ours.get_patch_status()['reason'])\n"
        "print(ours.apply_acceleration(), ours.get_patch_status()['reason'])\n"
        "assert 'litellm' not in sys.modules"
    )
    why = (
        f"litellm 1.81.9 has no function {MODULE}.{NAME}, so it is left as it is; 1.102.0 and "
        "later have it"
    )
    assert found == f"{why}\nFalse {why}\n"


def test_a_litellm_whose_source_cannot_be_read_is_waited_for(
    python: Callable[..., str], tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "litellm.zip", "w") as archive:
        archive.writestr("litellm/__init__.py", "")
    found = python(
        f"import sys; sys.path.insert(0, {str(tmp_path / 'litellm.zip')!r})\n"
        "import fast_litellm_shm as ours\n"
        "print(ours.apply_acceleration(), ours.get_patch_status()['reason'])"
    )
    assert found == "True litellm is not imported yet\n"


@pytest.mark.parametrize(("tenant", "texts"), [(None, 0), ("key", 2)])
def test_in_the_proxy_texts_are_remembered_for_their_key_alone(
    litellm: Any, monkeypatch: pytest.MonkeyPatch, tenant: str | None, texts: int
) -> None:
    """How long a count takes would tell one client what others have sent: where nobody says whose
    text it is (/utils/token_counter, say), it is not remembered."""
    monkeypatch.setitem(sys.modules, "litellm.proxy.proxy_server", ModuleType("proxy"))
    token = tokens.tenant_of_context.set(tenant)
    acceleration.apply_acceleration()
    try:
        found = [litellm.token_counter("gpt-4", messages=LONG) for _ in range(2)]
        acceleration.remove_acceleration()  # brings the sums
        assert (memo_state(Segment.default())["texts"] > 0) == bool(texts)
        tokens.tenant_of_context.set("other")
        acceleration.apply_acceleration()
        hits = memo_state(Segment.default())["hits"]
        found.append(litellm.token_counter("gpt-4", messages=LONG))
        acceleration.remove_acceleration()
        assert memo_state(Segment.default())["hits"] == hits
    finally:
        tokens.tenant_of_context.reset(token)
    assert len(set(found)) == 1


def test_workers_share_what_they_counted(python: Callable[..., str]) -> None:
    code = """
import fast_litellm_shm as ours, litellm
from fast_litellm_shm._shared.native import ffi, lib
chat = [{"role": "user", "content": "of one worker " * 99}]
found = litellm.token_counter("gpt-4", messages=chat)
ours.remove_acceleration()
info = ffi.new("fshm_memo_info *")
lib.fshm_memo_at(ours.Segment.default()._handle, info)
print(found, info.hits, info.misses)
"""
    first, second = python(code).split(), python(code).split()
    assert first[0] == second[0]
    assert (first[1:], second[1:]) == (["0", "1"], ["1", "1"])  # the role is too short
