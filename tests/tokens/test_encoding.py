"""Which encoding a model has, and where its file is found."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import texts

from fast_litellm_shm import EncodingUnavailableError
from fast_litellm_shm.tokens import encoding

O200K = "fb374d419588a4632f3f557e76b4b70aebbca790"
needs_o200k = pytest.mark.skipif(
    "o200k_base" not in texts.encodings_at_hand(), reason=texts.WHY_NOT
)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (None, "cl100k_base"),
        ("", "cl100k_base"),
        ("gpt-4", "cl100k_base"),
        ("gpt-4-0613", "cl100k_base"),
        ("gpt-3.5-turbo", "cl100k_base"),
        ("azure/gpt-35-turbo", "cl100k_base"),
        ("text-embedding-3-small", "cl100k_base"),
        ("openai/text-embedding-ada-002", "cl100k_base"),
        ("gpt-4o", "o200k_base"),
        ("gpt-4o-mini-2024-07-18", "o200k_base"),
        ("chatgpt-4o-latest", "o200k_base"),
        ("gpt-4.1", "o200k_base"),
        ("gpt-4.1-nano", "o200k_base"),
        ("gpt-4.5-preview", "o200k_base"),
        ("gpt-5", "o200k_base"),
        ("gpt-5.1-codex-mini", "o200k_base"),
        ("gpt-6.2", "o200k_base"),
        ("o1", "o200k_base"),
        ("o1-mini", "o200k_base"),
        ("o3-pro", "o200k_base"),
        ("o4-mini", "o200k_base"),
        ("o5", "o200k_base"),
        ("openai/gpt-4o", "o200k_base"),
        ("azure/gpt-4o", "o200k_base"),
        ("azure/eu/gpt-4o-2024-08-06", "o200k_base"),
        ("azure/global-standard/gpt-4o-mini", "o200k_base"),
        ("openrouter/openai/gpt-4.1", "o200k_base"),
        ("ft:gpt-4o-mini-2024-07-18:my-org:name:id", "o200k_base"),
        ("ft:gpt-4.1-2025-04-14:my-org::id", "o200k_base"),
        ("ft:gpt-4-0613:my-org::id", "cl100k_base"),
        ("openai/ft:gpt-3.5-turbo:my-org::id", "cl100k_base"),
        ("ft:o4-mini-2025-04-16", "o200k_base"),
        ("gpt-oss-120b", "o200k_harmony"),
        ("bedrock/openai.gpt-oss-20b-1:0", "o200k_harmony"),
        ("text-davinci-003", "p50k_base"),
        ("davinci", "r50k_base"),
        ("gpt2", "gpt2"),
        ("claude-sonnet-4", "cl100k_base"),
        ("anthropic/claude-3-opus", "cl100k_base"),
        ("meta-llama/llama-3-70b", "cl100k_base"),
        ("gpt-4otter", "cl100k_base"),
        ("o1x", "cl100k_base"),
        ("ft:", "cl100k_base"),
        ("/", "cl100k_base"),
        ("o200k_base", "o200k_base"),
        ("p50k_edit", "p50k_edit"),
    ],
)
def test_name_of_a_model(model: str | None, name: str) -> None:
    assert encoding.name_of(model) == name
    default = encoding.name_of(model, "r50k_base")
    assert default in (name, "r50k_base")


_ALL = """
import json, sys
from fast_litellm_shm.tokens import encoding, prices
known, prefixes = encoding._tables()
some = ["", "x", "gpt-4x", "gpt-4o-x", "o1-", "o10", "ft:gpt-4o", "ft:davinci-002:x", "claude-x"]
models = {*known, *prefixes, *(f"{prefix}x" for prefix in prefixes), *some, *encoding._names()}
models |= {*prices._loaded().models}
models |= {f"azure/eu/{model}" for model in models} | {f"ft:{model}:team::id" for model in models}
names, found = encoding.names(), {model: encoding.name_of(model) for model in models}
assert not {"tiktoken", "tiktoken_ext", "regex", "requests"} & {*sys.modules}
import tiktoken
assert known == tiktoken.model.MODEL_TO_ENCODING
assert prefixes == tiktoken.model.MODEL_PREFIX_TO_ENCODING
assert [*known] == [*tiktoken.model.MODEL_TO_ENCODING]
assert [*prefixes] == [*tiktoken.model.MODEL_PREFIX_TO_ENCODING]  # the first that fits
assert names == encoding.names() == tiktoken.list_encoding_names()
assert found == {model: encoding.name_of(model) for model in models}
print(len(models) > 150)
"""


def test_without_tiktoken_each_model_has_the_same_encoding() -> None:
    assert _run(_ALL) == "True\n"


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    """tiktoken is asked then."""
    path = tmp_path / "module.py"
    assert encoding._literals(str(path), ("A", "B")) == {}
    for source in ("A = {", "\0", "A = make()", "A, B = {}, {}", "A += {}", "import os"):
        path.write_text(source)
        assert encoding._literals(str(path), ("A", "B")) == {}
    path.write_text("A: dict[str, str] = {'x': 'y'}\nB = {}\nC = {}")
    assert {*encoding._literals(str(path), ("A", "B"))} == {"A", "B"}
    code = """
import sys
from fast_litellm_shm.tokens import encoding
encoding._literals = lambda path, names: {}
print(encoding.name_of("gpt-4"), encoding.name_of("gpt-9"), "o200k_base" in encoding.names())
print("tiktoken" in sys.modules)
"""
    assert _run(code) == "cl100k_base o200k_base True\nTrue\n"


def test_encodings_of_another_plugin(tmp_path: Path) -> None:
    """tiktoken's plugins are the modules of a namespace package."""
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "mine.py").write_text("ENCODING_CONSTRUCTORS = {'mine': None}")
    code = f"""
import sys
sys.path.append({str(tmp_path)!r})
from fast_litellm_shm.tokens import encoding
print(encoding.name_of("mine"), encoding.name_of("o200k_base"))
"""
    assert _run(code) == "mine o200k_base\n"


def test_models_that_a_program_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiktoken

    monkeypatch.setitem(tiktoken.model.MODEL_TO_ENCODING, "my-model", "r50k_base")
    assert encoding.name_of("my-model") == "r50k_base"


def test_unknown_encoding() -> None:
    with pytest.raises(ValueError, match="there is no encoding 'x'; there are .*cl100k_base"):
        encoding.load("x")


def _run(code: str, **env: str | None) -> str:
    """In a process of its own, whose environment has these settings, None for no such one."""
    here = {k: v for k, v in os.environ.items() if k not in ("TIKTOKEN_CACHE_DIR",)}
    here["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    given = {**here, **{k: v for k, v in env.items() if v is not None}}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        env=given,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_COUNT = """
import os, sys
from fast_litellm_shm.tokens import encoding
before = dict(os.environ)
found = encoding.load("o200k_base")
print(len(found.encode("hello world")))
assert dict(os.environ) == before, "the environment was changed"
assert "litellm" not in sys.modules
import tiktoken, tiktoken_ext.openai_public as public, tiktoken.load
assert public.load_tiktoken_bpe is tiktoken.load.load_tiktoken_bpe
assert tiktoken.get_encoding("o200k_base") is found
"""


@pytest.mark.skipif(not encoding.litellm_folder(), reason="litellm is not installed")
def test_file_from_litellms_wheel(tmp_path: Path) -> None:
    for cache in (str(tmp_path / "none"), "", None):
        assert _run(_COUNT, TIKTOKEN_CACHE_DIR=cache, TMPDIR=str(tmp_path)) == "2\n"
    assert not any(tmp_path.iterdir())  # nothing was downloaded, or copied


# A process in which litellm is not to be found, and no download goes far.
_ALONE = """
import os, sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "litellm": raise ImportError("hidden")
sys.meta_path.insert(0, Hide())
import socket
def refuse(*a, **k): raise OSError("no network in this test")
socket.socket.connect = socket.getaddrinfo = refuse
from fast_litellm_shm.tokens import encoding
from fast_litellm_shm import EncodingUnavailableError
"""


@needs_o200k
def test_file_from_tiktokens_cache(tmp_path: Path) -> None:
    source = encoding.litellm_folder()
    if source is None:
        pytest.skip("needs litellm's copy of the file")
    folder = os.path.join(source, "litellm_core_utils", "tokenizers")
    shutil.copy(os.path.join(folder, O200K), tmp_path / O200K)
    code = _ALONE + "print(len(encoding.load('o200k_base').encode('hello world')))"
    assert _run(code, TIKTOKEN_CACHE_DIR=str(tmp_path)) == "2\n"
    with open(tmp_path / O200K, "r+b") as file:  # a damaged one is none
        file.write(b"IQ== 1")
    code = (
        _ALONE
        + """
try: encoding.load("o200k_base")
except EncodingUnavailableError as error: print(error)
"""
    )
    assert "o200k_base.tiktoken is not on this machine" in _run(
        code, TIKTOKEN_CACHE_DIR=str(tmp_path)
    )


def test_without_any_file_the_error_says_how_to_get_one(tmp_path: Path) -> None:
    code = (
        _ALONE
        + """
for _ in range(2):
    try: encoding.load("o200k_base")
    except OSError as error: print(error)
"""
    )
    first, again, _ = _run(code, TIKTOKEN_CACHE_DIR=str(tmp_path)).split("\n")
    assert first == again
    url = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
    assert hashlib.sha1(url.encode()).hexdigest() == O200K
    for part in (
        "tiktoken's file o200k_base.tiktoken is not on this machine",
        "its download fails: no network in this test",
        "`pip install litellm`",
        url,
        "set TIKTOKEN_CACHE_DIR to a folder",
        O200K,
        f"looked in {tmp_path}",
    ):
        assert part in first
    off = _run(
        code, TIKTOKEN_CACHE_DIR=str(tmp_path), FAST_LITELLM_TOKENIZER_DOWNLOAD="false"
    ).split("\n")[0]
    assert "(FAST_LITELLM_TOKENIZER_DOWNLOAD is false)" in off


def test_download_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAST_LITELLM_TOKENIZER_DOWNLOAD", "maybe")
    with pytest.raises(ValueError, match="TOKENIZER_DOWNLOAD must be true or false, not 'maybe'"):
        encoding._check_download("https://example.invalid/x")


def test_a_failure_is_remembered_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fail(name: str) -> object:
        asked.append(name)
        raise EncodingUnavailableError("not here")

    monkeypatch.setattr(encoding, "_load", fail)
    monkeypatch.setattr(encoding, "_failed", {})
    for _ in range(3):
        with pytest.raises(EncodingUnavailableError, match="not here"):
            encoding.load("an encoding")
    assert asked == ["an encoding"]
    monkeypatch.setattr(encoding, "_RETRY_SECONDS", 0.0)
    with pytest.raises(EncodingUnavailableError):
        encoding.load("an encoding")
    assert len(asked) == 2


@needs_o200k
def test_threads_load_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "_loaded", {})
    found: list[object] = []
    threads = [
        threading.Thread(target=lambda: found.append(encoding.load("o200k_base"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(map(id, found))) == 1
