"""Workers that find the vocabulary files, that build them at once, that are killed meanwhile."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import texts
from support.waiting import wait_until

from fast_litellm_shm import SimpleTokenCounter
from fast_litellm_shm.tokens import encoding, vocabulary

TWO = ("cl100k_base", "o200k_base")
pytestmark = pytest.mark.skipif(not {*TWO} <= {*texts.encodings_at_hand()}, reason=texts.WHY_NOT)

# What only tiktoken needs.
HEAVY = ("tiktoken", "tiktoken_ext", "regex", "requests", "numpy", "litellm")

_WORKER = """
import json, sys
def private():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private"))
import fast_litellm_shm.tokens.counter as tokens
before = private()
counter = tokens.SimpleTokenCounter()
text = "How many tokens are these? " * 20
models = ("gpt-4", "openai/gpt-4o", "claude-x", "o200k_base")
counts = [counter.count_tokens(text, model) for model in models]
grown = private() - before
counts += counter.count_tokens_batch([text, "x"], "gpt-4.1")
assert counter.decode(counter.encode(text, "gpt-4o"), "gpt-4o") == text
assert counter.fits(text, 1000) and counter.truncate(text, 3).startswith("How many")
counts.append(counter.count_chat([{"role": "user", "content": text}], "gpt-4"))
print(json.dumps([counts, grown, sorted({name.split(".")[0] for name in sys.modules})]))
"""


def _start(code: str, cache: Path, **settings: str) -> subprocess.Popen[str]:
    env = {**os.environ, "FAST_LITELLM_SHM_CACHE": str(cache), **settings}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True
    )


def _said(process: subprocess.Popen[str]) -> str:
    out = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    return out


def _fill(cache: Path, *names: str) -> None:
    """Copy the files of this session's cache."""
    cache.mkdir()
    for name in names:
        assert vocabulary.load(name) is not None
        path = vocabulary.path_of(name)
        assert path
        os.link(path, cache / os.path.basename(path))


def test_a_second_worker_loads_no_tiktoken(tmp_path: Path) -> None:
    """Nor what tiktoken imports; and little memory is its own."""
    cache = tmp_path / "cache"
    _fill(cache, *TWO)
    counts, grown, modules = json.loads(_said(_start(_WORKER, cache)))
    text = "How many tokens are these? " * 20
    four, four_o = (len(encoding.load(name).encode_ordinary(text)) for name in TWO)
    assert counts == [four, four_o, four, four_o, four_o, 1, four + 8 - 1]
    assert not {*HEAVY} & {*modules}
    assert grown < 8192  # KB, for two encodings


def test_nor_does_the_first_worker(tmp_path: Path) -> None:
    """A child builds the files: who loads tiktoken's tables never gives all of them back."""
    _, _, modules = json.loads(_said(_start(_WORKER, tmp_path / "cache")))
    assert not {*HEAVY} & {*modules}
    assert len([*(tmp_path / "cache").glob("*.vocabulary")]) == len(TWO)


def test_a_server_that_has_python_built_in_builds_them_itself(tmp_path: Path) -> None:
    code = f"import sys; sys.executable = '/usr/bin/uwsgi'\n{_WORKER}"
    _, _, modules = json.loads(_said(_start(code, tmp_path / "cache")))
    assert "tiktoken" in modules
    assert len([*(tmp_path / "cache").glob("*.vocabulary")]) == len(TWO)


def test_tiktokens_files_are_not_needed(tmp_path: Path) -> None:
    """Where the vocabulary files are there: as in an image that brings these alone. Nothing is
    downloaded: the worker has no network and no litellm."""
    cache = tmp_path / "cache"
    _fill(cache, *TWO)
    alone = """
import sys, importlib.abc, socket
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "litellm": raise ImportError("hidden")
sys.meta_path.insert(0, Hide())
def refuse(*a, **k): raise AssertionError("a download was started")
socket.socket.connect = socket.getaddrinfo = refuse
"""
    empty = str(tmp_path / "none")
    process = _start(alone + _WORKER, cache, TIKTOKEN_CACHE_DIR=empty)
    assert json.loads(_said(process))[0][-2] == 1
    code = (
        alone
        + """
from fast_litellm_shm import EncodingUnavailableError, SimpleTokenCounter
counter = SimpleTokenCounter()
for call in (counter.count_tokens, counter.encode, counter.count_chat):
    try: call("a text", "gpt2")
    except EncodingUnavailableError as error: print(error)
"""
    )
    said = _said(
        _start(code, cache, TIKTOKEN_CACHE_DIR=empty, FAST_LITELLM_TOKENIZER_DOWNLOAD="false")
    )
    lines = said.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "is not on this machine (FAST_LITELLM_TOKENIZER_DOWNLOAD is false)" in line
        assert "set TIKTOKEN_CACHE_DIR to a folder" in line


_BUILDER = """
import sys
from fast_litellm_shm.tokens import vocabulary
found = vocabulary.load("cl100k_base")
print(found.count("How many tokens are these?"), found.shared, "tiktoken" in sys.modules)
"""


def test_eight_that_start_at_once(tmp_path: Path) -> None:
    """All count right, one builds, and nothing temporary stays."""
    cache = tmp_path / "cache"
    said = [_said(process) for process in [_start(_BUILDER, cache) for _ in range(8)]]
    assert {line.rsplit(" ", 1)[0] for line in said} == {"6 True"}
    path = vocabulary.path_of("cl100k_base")
    assert path
    assert [file.name for file in cache.iterdir()] == [os.path.basename(path)]


def _writes_or_ended(cache: Path, process: subprocess.Popen[str]) -> bool:
    return bool([*cache.glob("*.tmp")]) or process.poll() is not None


def _stopped_while_it_writes(cache: Path, how: signal.Signals) -> subprocess.Popen[str]:
    """A process that got the signal when its temporary file was there."""
    for _ in range(20):
        process = _start(f"import sys; sys.executable = ''\n{_BUILDER}", cache)  # itself, no child
        wait_until("it writes", functools.partial(_writes_or_ended, cache, process))
        process.send_signal(how)
        if how == signal.SIGKILL:
            process.wait()
        if [*cache.glob("*.tmp")]:
            return process
        process.kill()  # it was done before the signal came
        process.communicate()
        for file in cache.iterdir():
            file.unlink()
    raise AssertionError("it was always done sooner")


def _again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("FAST_LITELLM_SHM_CACHE", str(cache))
    monkeypatch.setattr(vocabulary, "_opened", {})
    found = vocabulary.load("cl100k_base")
    assert found and found.shared and found.count("How many tokens are these?") == 6
    return found


def test_one_that_is_killed_while_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is free, its temporary file is no vocabulary, and goes later."""
    cache = tmp_path / "cache"
    process = _stopped_while_it_writes(cache, signal.SIGKILL)
    process.communicate()
    [left] = cache.glob("*.tmp")
    monkeypatch.setattr(vocabulary, "_PATIENCE", 3600.0)
    first = _again(cache, monkeypatch)
    assert left.exists()  # it might be written to now
    past = time.time() - 2 * vocabulary._LEFT
    os.utime(left, (past, past))
    (cache / "another.tmp").write_text("")  # not ours
    os.utime(cache / "another.tmp", (past, past))
    assert _again(cache, monkeypatch).identity == first.identity
    assert sorted(file.suffix for file in cache.iterdir()) == [".tmp", ".vocabulary"]
    assert (cache / "another.tmp").exists()


def test_one_that_is_stopped_while_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it for ever; when it goes on, its file replaces the other one."""
    cache = tmp_path / "cache"
    process = _stopped_while_it_writes(cache, signal.SIGSTOP)
    try:
        monkeypatch.setattr(vocabulary, "_PATIENCE", 0.1)
        first = _again(cache, monkeypatch)
    finally:
        process.send_signal(signal.SIGCONT)
    assert _said(process).startswith("6 True")
    assert not [*cache.glob("*.tmp")]
    assert _again(cache, monkeypatch).identity == first.identity
    assert first.count("How many tokens are these?") == 6


def test_a_lock_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system without locks."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    _again(tmp_path / "cache", monkeypatch)


def test_in_a_worker_that_was_forked(tmp_path: Path) -> None:
    counter = SimpleTokenCounter()
    expected = counter.count_tokens("How many tokens are these?")
    child = os.fork()
    if not child:
        os._exit(counter.count_tokens("How many tokens are these?") != expected)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
