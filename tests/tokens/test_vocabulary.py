"""The vocabulary file: built once, found by others, rebuilt when it is damaged, never trusted."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
from support import texts

from fast_litellm_shm import EncodingUnavailableError, _native
from fast_litellm_shm._shared import settings
from fast_litellm_shm.tokens import encoding, vocabulary

NAME = "cl100k_base"
needs_encoding = pytest.mark.skipif(NAME not in texts.encodings_at_hand(), reason=texts.WHY_NOT)


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder, and a process that has opened nothing."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FAST_LITELLM_SHM_CACHE", str(folder))
    monkeypatch.setattr(vocabulary, "_opened", {})
    monkeypatch.setattr(vocabulary, "_warned", set())
    return folder


@pytest.fixture(name="small")
def _small(monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """An encoding that is compiled at once, in place of those that are loaded."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, b"abc": 257}
    pattern = next(iter(vocabulary.PATTERNS))
    small = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(encoding, "load", lambda name: small)
    return small


def _again() -> _native.Vocabulary:
    """As another process would get it."""
    vocabulary._opened.clear()
    found = vocabulary.load(NAME)
    assert found is not None
    return found


def _path() -> Path:
    path = vocabulary.path_of(NAME)
    assert path
    return Path(path)


def _refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> tiktoken.Encoding:
        raise AssertionError("tiktoken was asked")

    monkeypatch.setattr(encoding, "load", load)


def test_built_once(
    folder: Path, small: tiktoken.Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _again()
    assert first.shared and first.count("abcab") == 2
    assert [file.name for file in folder.iterdir()] == [_path().name]  # nothing temporary
    assert tiktoken.__version__ in _path().name
    assert folder.stat().st_mode & 0o777 == 0o700
    assert _path().stat().st_mode & 0o777 == 0o644
    _refuse(monkeypatch)
    second = _again()
    assert second.shared and second.identity == first.identity and second.count("abcab") == 2


@pytest.mark.parametrize("at", [0, 8, 40, 200, 5000, -100])
def test_damaged(
    folder: Path, small: tiktoken.Encoding, at: int, caplog: pytest.LogCaptureFixture
) -> None:
    _again()
    data = bytearray(_path().read_bytes())
    data[at] ^= 0x55
    _path().write_bytes(data)
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        assert _again().shared
    assert "it is built again" in caplog.text
    assert _path().read_bytes() != bytes(data)
    caplog.clear()
    assert _again().count("abcab") == 2 and not caplog.text


@pytest.mark.parametrize("size", [0, 10, 127, 4096])
def test_cut_off(folder: Path, small: tiktoken.Encoding, size: int) -> None:
    _again()
    whole = _path().stat().st_size
    os.truncate(_path(), size)
    assert _again().shared
    assert _path().stat().st_size == whole


@pytest.mark.parametrize("what", ["writable by all", "link", "folder", "pipe"])
def test_not_trusted(
    folder: Path, small: tiktoken.Encoding, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept = _again()
    path = _path()
    if what == "writable by all":
        path.chmod(0o666)
    else:
        path.unlink()
        if what == "link":
            path.symlink_to("/dev/zero")
        elif what == "folder":
            path.mkdir()
        else:
            os.mkfifo(path)
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        found = _again()
    assert found.count("abcab") == kept.count("abcab") == 2
    assert f"{path} is not used" in caplog.text
    assert found.shared == (what != "folder")  # which no rename replaces
    if found.shared:
        assert path.stat().st_mode & 0o777 == 0o644 and not path.is_symlink()


@pytest.mark.parametrize("why", ["a file", "full"])
def test_no_folder(
    folder: Path,
    small: tiktoken.Encoding,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Counted from memory of this process, with one warning."""
    if why == "a file":
        folder.write_text("")
    else:  # each write fails with ENOSPC
        monkeypatch.setattr(vocabulary, "path_of", lambda name: "/dev/full/file")
    with caplog.at_level(logging.WARNING, "fast_litellm_shm"):
        found, second = _again(), _again()
    assert not found.shared and found.count("abcab") == second.count("abcab") == 2
    assert caplog.text.count("the tables for counting tokens cannot be shared") == 1
    assert "FAST_LITELLM_SHM_CACHE" in caplog.text


def test_file_size_limit(folder: Path, small: tiktoken.Encoding) -> None:
    """A file beyond RLIMIT_FSIZE would end the process (SIGXFSZ)."""
    code = (
        "import resource, sys\n"
        "from fast_litellm_shm import _native\n"
        "v = _native.open_vocabulary(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    v.save(sys.argv[1])\n"
        "except OSError as error:\n    print(error.errno)\n"
    )
    _again()
    ran = subprocess.run(
        [sys.executable, "-c", code, str(_path())], capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == "27"  # EFBIG
    assert [file.name for file in folder.iterdir()] == [_path().name]


def test_patterns_that_are_not_known(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tiktoken counts then; so also where the ranks are such that the engine would count wrong."""
    ranks = {bytes([i]): i for i in range(256)}
    other = tiktoken.Encoding("x", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(encoding, "load", lambda name: other)
    monkeypatch.setattr(encoding, "is_loaded", lambda name: True)
    assert vocabulary.load(NAME) is None
    pattern = next(iter(vocabulary.PATTERNS))
    for bad in (ranks | {b"abc": 256, b"ab": 257}, ranks | {b"x" * 256: 256}):
        found = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=bad, special_tokens={})
        assert vocabulary.compile_encoding(found) is None
    assert not [*folder.iterdir()]


@needs_encoding
def test_no_child_compiles_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no folder can be had, what a child compiles is lost."""

    def run(*args: object, **kwargs: object) -> None:
        raise AssertionError("a child was started")

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FAST_LITELLM_SHM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(vocabulary, "_opened", {})
    monkeypatch.setattr(encoding, "is_loaded", lambda name: False)
    monkeypatch.setattr(subprocess, "run", run)
    found = vocabulary.load(NAME)
    assert found is not None and not found.shared


def test_without_tiktokens_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> tiktoken.Encoding:
        raise EncodingUnavailableError("no file")

    monkeypatch.setattr(encoding, "load", load)
    with pytest.raises(EncodingUnavailableError, match="no file"):
        vocabulary.load(NAME)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAST_LITELLM_SHM_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert settings.cache_folder() == "/home/x/.cache/fast_litellm_shm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert settings.cache_folder() == "/home/x/.cache/fast_litellm_shm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert settings.cache_folder() == "/var/x/fast_litellm_shm"
    monkeypatch.setenv("FAST_LITELLM_SHM_CACHE", "/opt/y")
    assert settings.cache_folder() == "/opt/y"


@needs_encoding
def test_a_second_process_needs_no_tiktoken(folder: Path) -> None:
    """Nor memory of its own for the tables."""
    first = _again()
    code = (
        "import sys\n"
        "from fast_litellm_shm.tokens import vocabulary\n"
        "def private():\n"
        "    lines = open('/proc/self/smaps_rollup').read().splitlines()\n"
        "    return sum(int(line.split()[1]) for line in lines if line.startswith('Private'))\n"
        "before = private()\n"
        "v = vocabulary.load('cl100k_base')\n"
        "print(v.count('How many tokens are these?'), v.shared, 'tiktoken' in sys.modules)\n"
        "print(v.size // 1024, private() - before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, numbers = ran.stdout.splitlines()
    assert said == f"{first.count('How many tokens are these?')} True False"
    size, private = map(int, numbers.split())  # KB
    assert size > 10_000 and private < 2_000
    # The tables are mapped in this process too, else they would be private to that one.
    assert first.shared


def test_in_a_forked_child(folder: Path, small: tiktoken.Encoding) -> None:
    found = _again()
    child = os.fork()
    if not child:
        os._exit(found.count("abcab") == 2 and vocabulary.load(NAME) is found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
