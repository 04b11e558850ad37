"""fast-shm cache, and the vocabulary files that inspect shows."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import pytest
import tiktoken
from support.children import PATIENCE

from fast_litellm_shm import EncodingUnavailableError, _native, cli
from fast_litellm_shm.tokens import encoding, vocabulary

from .conftest import COMMAND, Command, environment
from .test_missing_extras import without

NAMES = ["cl100k_base", "o200k_base"]  # that `build` makes, without a name

_USER = """
import sys
from fast_litellm_shm import Limit, RateLimiter, Segment, _native

limiter = RateLimiter(Limit(5), name="l", segment=Segment(sys.argv[1], capacity=100))
held = [_native.open_vocabulary(path) for path in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(name="folder")
def _folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A cache folder, and encodings that are compiled at once."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FAST_LITELLM_SHM_CACHE", str(folder))
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    pattern = next(iter(vocabulary.PATTERNS))
    small = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(encoding, "load", lambda name: small)
    return folder


class _Cache:
    """Runs ``fast-shm cache ARGUMENTS`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        status = cli.main(["cache", *arguments])
        self.out, self.err = self._capsys.readouterr()
        return status

    def states(self) -> dict[str, str | None]:
        """Of each file, by its name."""
        assert self("--json") == 0
        rows = json.loads(self.out)["files"]
        return {os.path.basename(row["path"]): row["state"] for row in rows}


@pytest.fixture(name="cache")
def _cache(capsys: pytest.CaptureFixture[str]) -> _Cache:
    return _Cache(capsys)


def _path(name: str = "cl100k_base") -> pathlib.Path:
    path = vocabulary.path_of(name)
    assert path
    return pathlib.Path(path)


@pytest.fixture(name="user")
def _user(folder: pathlib.Path, cache: _Cache, segment_name: str) -> Iterator[int]:
    """The pid of a process that maps the file of cl100k_base, and uses a segment."""
    cache("build")
    child = subprocess.Popen(
        [sys.executable, "-c", _USER, segment_name, str(_path())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert child.stdout is not None and child.stdout.readline() == b"ready\n"
    yield child.pid
    child.communicate(timeout=PATIENCE)


def test_build(folder: pathlib.Path, cache: _Cache) -> None:
    assert cache() == 0 and cache.out.startswith(f"No file in {folder}: ")
    assert cache("rm") == 0 and cache.out == f"Nothing to remove in {folder}.\n"
    assert not folder.exists()
    assert cache("build") == 0
    lines = cache.out.splitlines()
    for name, line in zip(NAMES, lines, strict=False):
        assert line.startswith(f"Built {name} in ") and f": {_path(name)} (" in line
        assert _native.open_vocabulary(str(_path(name))).count("abab") == 2
    assert folder.stat().st_mode & 0o777 == 0o755
    before = _path().stat()
    assert cache("build", "cl100k_base", "r50k_base", "cl100k_base") == 0
    lines = cache.out.splitlines()
    assert lines[0].startswith(f"cl100k_base is there: {_path()} (")
    assert lines[1].startswith("Built r50k_base in ")
    assert _path().stat() == before
    assert cache() == 0
    rows = [line.split() for line in cache.out.splitlines()]
    assert rows[0] == [str(folder)]
    assert [row[0] for row in rows[3:]] == [*NAMES, "r50k_base"]
    assert rows[3][1] == tiktoken.__version__ and rows[3][-1] == "0"
    assert cache.states() == dict.fromkeys((_path(row[0]).name for row in rows[3:]), None)


@pytest.mark.parametrize(
    ("what", "state"),
    [
        ("damaged", "damaged"),
        ("cut off", "damaged"),
        ("mode", "others may write"),
        ("link", "no regular file"),
        ("pipe", "no regular file"),
        ("owner", "other owner"),
    ],
)
def test_what_no_worker_would_use(
    folder: pathlib.Path, cache: _Cache, what: str, state: str
) -> None:
    """It is shown, and built again, or removed."""
    cache("build", "cl100k_base")
    path = _path()
    if what == "damaged":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif what == "cut off":
        os.truncate(path, 1000)
    elif what == "mode":
        path.chmod(0o666)
    elif what == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        os.chown(path, 12345, -1)
    else:
        path.unlink()
        if what == "link":
            path.symlink_to("/dev/zero")
        else:
            os.mkfifo(path)
    assert cache.states() == {path.name: state}
    assert cache() == 0 and f"{state}: no worker uses it" in cache.out
    assert cache("build", "cl100k_base") == 0 and f" (there was one: {state}): " in cache.out
    assert cache.states() == {path.name: None}
    path.chmod(0o666)
    assert cache("rm", "--old") == 0 and cache.out == f"Removed 1 file from {folder}.\n"
    assert cache.states() == {}


def test_left_over(folder: pathlib.Path, cache: _Cache) -> None:
    cache("build", "cl100k_base")
    path = _path()
    older = path.with_name("cl100k_base-0.1.0-1.vocabulary")
    layout = path.with_name(f"o200k_base-{tiktoken.__version__}-0.vocabulary")
    for other in (older, layout):
        shutil.copy(path, other)
    killed = path.with_name(f"{path.name}.0123456789abcdef.tmp")
    fresh = path.with_name(f"{path.name}.ffffffffffffffff.tmp")
    for each in (killed, fresh, path.with_name("not ours"), path.with_name("x.vocabulary")):
        each.write_bytes(b"x")
    os.utime(killed, (time.time() - 3600,) * 2)
    states = {path.name: None, older.name: "old", layout.name: "old"}
    states |= {killed.name: "unfinished", fresh.name: "being written"}
    assert cache.states() == states
    assert cache() == 0
    for said in ("old: made for another version", "unfinished: the process that wrote it"):
        assert said in cache.out
    assert cache("rm", "--old", "o200k_base") == 0
    assert not layout.exists() and older.exists()
    assert cache("rm", "--old") == 0 and cache.out.endswith(f"Removed 2 files from {folder}.\n")
    assert cache.states() == {path.name: None, fresh.name: "being written"}
    assert cache("rm") == 0 and f"Left alone: {fresh}" in cache.out
    assert sorted(each.name for each in folder.iterdir()) == sorted(
        (fresh.name, "not ours", "x.vocabulary")
    )


def test_what_cannot_be_removed(folder: pathlib.Path, cache: _Cache) -> None:
    cache("build")
    assert cache("rm", "gpt2") == 1
    assert "no file of 'gpt2'" in cache.err and "cl100k_base, o200k_base" in cache.err
    _path().unlink()
    _path().mkdir()
    assert cache.states()[_path().name] == "no regular file"
    assert cache("build", "cl100k_base") == 1
    assert f"cannot write {_path()}: something else lies there" in cache.err
    assert cache("rm") == 1
    assert f"cannot remove {_path()}: Is a directory" in cache.err and "Removed 1 file" in cache.out
    assert not _path("o200k_base").exists()


def test_no_folder(folder: pathlib.Path, cache: _Cache) -> None:
    folder.write_text("a file")
    assert cache("build", "cl100k_base") == 1
    assert f"cannot write to {folder}: " in cache.err and "FAST_LITELLM_SHM_CACHE" in cache.err
    assert cache() == 1 and f"cannot read {folder}: Not a directory" in cache.err
    assert cache("rm") == 1


def test_without_tiktokens_file(
    folder: pathlib.Path, cache: _Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others are made."""
    load = encoding.load

    def some(name: str) -> tiktoken.Encoding:
        if name == "gpt2":
            raise EncodingUnavailableError("tiktoken's file vocab.bpe is not on this machine")
        return load(name)

    monkeypatch.setattr(encoding, "load", some)
    assert cache("build", "gpt2", "no_such", "cl100k_base") == 1
    assert "vocab.bpe is not on this machine" in cache.err
    assert "there is no encoding 'no_such'; there are cl100k_base, " in cache.err
    assert list(cache.states()) == [_path().name]


def test_a_pattern_that_the_engine_does_not_know(
    folder: pathlib.Path, cache: _Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "compile_encoding", lambda found: None)
    assert cache("build", "cl100k_base") == 1
    assert "no file of cl100k_base was made" in cache.err


def test_without_tiktoken(fast_shm: Command, tmp_path: pathlib.Path) -> None:
    hidden = without(tmp_path, "tiktoken") | {"FAST_LITELLM_SHM_CACHE": str(tmp_path / "cache")}
    for arguments in (["cache", "build"], ["tokens", "-"]):
        done = fast_shm(*arguments, env=hidden)
        assert (done.returncode, done.stdout) == (1, "")
        assert "pip install tiktoken" in done.stderr and "Traceback" not in done.stderr
    assert fast_shm("cache", env=hidden).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_built_by_root_for_another_user(
    folder: pathlib.Path, cache: _Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container image. The folder of a test is closed to other users, and build says so."""
    assert cache("build", "cl100k_base") == 0 and "Only root's processes can use them" in cache.out
    with tempfile.TemporaryDirectory() as top:
        os.chmod(top, 0o755)
        monkeypatch.setenv("FAST_LITELLM_SHM_CACHE", f"{top}/cache")
        assert cache("build", "cl100k_base") == 0 and "Only root" not in cache.out
        path = _path()
        child = os.fork()
        if not child:
            os.setuid(12345)
            try:
                os._exit(_native.open_vocabulary(str(path)).count("abab") == 2)
            finally:
                os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_in_use(cache: _Cache, fast_shm: Command, user: int, segment_name: str) -> None:
    path = _path()
    assert cache("--json") == 0
    found = {each["encoding"]: each for each in json.loads(cache.out)["files"]}
    assert found["cl100k_base"]["pids"] == [user] and found["o200k_base"]["pids"] == []

    done = fast_shm("inspect", "--name", segment_name)
    assert "tokens   cl100k_base in 1 process\n" in done.stdout
    expected: dict[str, Any] = {"encoding": "cl100k_base", "tiktoken": tiktoken.__version__}
    expected |= {"path": str(path), "pids": [user]}
    done = fast_shm("inspect", "--name", segment_name, "--json")
    assert json.loads(done.stdout)["vocabularies"] == [expected]

    done = fast_shm("cache", "rm")
    assert (done.returncode, done.stdout) == (1, "") and path.exists()
    assert f"cl100k_base is in use by 1 process: {user}\n" in done.stderr
    assert "--yes" in done.stderr
    assert cache("rm", "--old") == 0 and path.exists()
    assert cache("rm", "o200k_base") == 0 and not _path("o200k_base").exists()
    assert cache("rm", "--yes") == 0 and not path.exists()

    assert cache() == 0 and "deleted: it was removed or replaced" in cache.out
    rows = [line.split() for line in cache.out.splitlines()[3:4]]
    assert rows == [["cl100k_base", tiktoken.__version__, "1", "deleted"]]
    assert cache("rm") == 0 and cache.out.startswith("Nothing to remove")
    done = fast_shm("inspect", "--name", segment_name)
    assert "tokens   cl100k_base in 1 process\n" in done.stdout


def test_inspect_without_any(fast_shm: Command, workers: list[int], segment_name: str) -> None:
    assert "tokens  " not in fast_shm("inspect", "--name", segment_name).stdout
    done = fast_shm("inspect", "--name", segment_name, "--json")
    assert "vocabularies" not in json.loads(done.stdout)


@pytest.mark.parametrize(("answer", "status"), [(b"n\n", 1), (b"y\n", 0)])
def test_rm_asks_on_a_terminal(user: int, answer: bytes, status: int) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    done = subprocess.run(
        [*COMMAND, "cache", "rm", "cl100k_base"],
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env=environment(),
    )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == status and "[y/N]" in done.stderr
    assert _path().exists() == (status != 0)


@pytest.mark.parametrize(
    "arguments",
    [["ls"], ["cl100k_base"], ["--json", "build"], ["rm", "--all"], ["build", "--yes"]],
)
def test_usage(cache: _Cache, arguments: list[str]) -> None:
    assert cache(*arguments) == 2 and not cache.out
    assert cache.err.startswith("usage: fast-shm cache") and "--help" in cache.err
