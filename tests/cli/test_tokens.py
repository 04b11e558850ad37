"""fast-shm tokens, from outside."""

from __future__ import annotations

import json
import os
import pathlib
import pty
import subprocess
import sys
from typing import Any

import pytest
from support import texts
from support.children import PATIENCE

from fast_litellm_shm import cli
from fast_litellm_shm.cli import blocks
from fast_litellm_shm.tokens import encoding, vocabulary

from .conftest import COMMAND, Command, environment

NAME = "cl100k_base"
pytestmark = pytest.mark.skipif(NAME not in texts.encodings_at_hand(), reason=texts.WHY_NOT)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user whose cache has the file of cl100k_base."""
    folder = tmp_path_factory.mktemp("cache")
    found = environment(FAST_LITELLM_SHM_CACHE=str(folder), FAST_LITELLM_TOKENIZER_DOWNLOAD="false")
    subprocess.run([*COMMAND, "cache", "build", NAME], env=found, check=True, timeout=PATIENCE)
    return found


def _expected(text: str) -> int:
    return len(encoding.load(NAME).encode_ordinary(text))


def _files(folder: pathlib.Path, **contents: str | bytes) -> dict[str, str]:
    """Their paths, by name."""
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
    return {name: str(folder / name) for name in contents}


def test_counts(fast_shm: Command, tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    contents = {
        "prose": texts.CORPUS["english"],
        "many": "".join(text for name, text in texts.CORPUS.items() if "surrogates" not in name),
        "empty": "",
        "windows": "one\r\ntwo\r\n\r\nthree",
        "special": "<|endoftext|>",
    }
    paths = _files(tmp_path, **contents)
    done = fast_shm("tokens", "--json", "--encoding", NAME, *paths.values(), env=cache)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    expected = {paths[name]: _expected(text) for name, text in contents.items()}
    assert {each["file"]: each["tokens"] for each in found["files"]} == expected
    assert (found["encoding"], found["model"]) == (NAME, None)
    assert found["tokens"] == sum(expected.values())
    assert found["files"][1]["size_bytes"] == len(contents["many"].encode())

    done = fast_shm("tokens", *paths.values(), env=cache)  # cl100k_base is the default
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == [NAME] and lines[1] == ["tokens", "size", "file"]
    rows = {line[-1]: line[0] for line in lines[3:]}
    assert rows == {path: f"{n:,}" for path, n in expected.items()} | {
        "total": f"{found['tokens']:,}"
    }
    done = fast_shm("tokens", paths["prose"], env=cache)
    assert "total" not in done.stdout


def test_standard_input(fast_shm: Command, tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    paths = _files(tmp_path, file="one two")
    for arguments in ([], ["-"], [paths["file"], "-"]):
        with open(paths["file"], "rb") as stdin:
            done = fast_shm("tokens", "--json", *arguments, env=cache, stdin=stdin)
        found = json.loads(done.stdout)["files"][-1]
        assert (found["file"], found["tokens"]) == ("-", 2)
    assert "standard input" in fast_shm("tokens", env=cache).stdout
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, "tokens"],
        env=cache,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert closed.returncode == 1 and "standard input is closed" in closed.stderr


def test_a_text_that_is_typed(cache: dict[str, str]) -> None:
    """One Ctrl-D at the beginning of a line ends it. Without a file, it is a mistake."""
    ours, theirs = pty.openpty()
    options: dict[str, Any] = {"stdin": theirs, "env": cache, "timeout": PATIENCE, "text": True}
    os.write(ours, b"one two\n\x04")
    done = subprocess.run([*COMMAND, "tokens", "-"], capture_output=True, check=True, **options)
    assert f"{_expected('one two' + chr(10))}    8 B   standard input" in done.stdout
    done = subprocess.run([*COMMAND, "tokens"], capture_output=True, check=False, **options)
    assert done.returncode == 2 and "name files, or -" in done.stderr
    os.close(ours)
    os.close(theirs)


def test_what_is_not_counted(
    fast_shm: Command, tmp_path: pathlib.Path, cache: dict[str, str]
) -> None:
    """It is told of, the others are counted, and the exit code is 1."""
    paths = _files(
        tmp_path, good="one two", bad=b"one \xff\xfe two", wide="one".encode("utf-16"), late="x"
    )
    missing = str(tmp_path / "mis\nsing")
    names = [paths["bad"], missing, paths["good"], str(tmp_path), paths["wide"], paths["late"]]
    done = fast_shm("tokens", *names, env=cache)
    assert done.returncode == 1
    said = done.stderr.splitlines()
    assert said[0].startswith(
        f"fast-shm: {paths['bad']} was not counted: it is not UTF-8: byte 0xff at offset 4."
    )
    assert said[1].endswith("mis\\nsing was not counted: No such file or directory")
    assert said[2].endswith("Is a directory")
    assert f"`iconv -f UTF-16 -t UTF-8 {paths['wide']} | fast-shm tokens -`" in said[3]
    lines = [line.split() for line in done.stdout.splitlines()[3:]]
    assert [line[0] for line in lines] == ["2", "1", "3"]  # both, and the total

    done = fast_shm("tokens", "--json", *names, env=cache)
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["tokens"] == 3
    assert [each["tokens"] for each in found["files"]] == [None, None, 2, None, None, 1]
    assert [each["error"] is None for each in found["files"]] == [
        each["tokens"] is not None for each in found["files"]
    ]
    done = fast_shm("tokens", "--json", "--replace", paths["bad"], env=cache)
    expected = _expected("one \ufffd\ufffd two")
    assert done.returncode == 0 and json.loads(done.stdout)["tokens"] == expected
    done = fast_shm("tokens", missing, env=cache)
    assert (done.returncode, done.stdout) == (1, "")


def test_max(fast_shm: Command, tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    paths = _files(tmp_path, short="one two", long="one two three four")
    done = fast_shm("tokens", "--max", "2", *paths.values(), env=cache)
    assert done.returncode == 1
    assert done.stderr == f"fast-shm: {paths['long']} has 2 tokens more than 2\n"
    done = fast_shm("tokens", "--max", "2", "--json", *paths.values(), env=cache)
    assert [each["fits"] for each in json.loads(done.stdout)["files"]] == [True, False]
    assert fast_shm("tokens", "--max", "4", *paths.values(), env=cache).returncode == 0
    assert fast_shm("tokens", "--max", "x", *paths.values(), env=cache).returncode == 2


def test_model(fast_shm: Command, tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    paths = _files(tmp_path, file="one two", prices=json.dumps({"gpt-4": _PRICE, "mine": _PRICE}))
    env = cache | {"FAST_LITELLM_PRICES": paths["prices"]}
    done = fast_shm("tokens", "--model", "gpt-4", paths["file"], env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].strip() == f"{NAME} (gpt-4)"
    assert done.stdout.splitlines()[3].split() == ["2", "7", "B", "$1.0000", paths["file"]]
    done = fast_shm("tokens", "--json", "--model", "mine", paths["file"], env=env)
    found = json.loads(done.stdout)
    assert (found["encoding"], found["files"][0]["input_cost"]) == (NAME, 1.0)
    assert "the model mine" in done.stderr and "an estimate" in done.stderr
    done = fast_shm("tokens", "--model", "unknown", paths["file"], env=env)
    assert done.returncode == 0 and "cost" not in done.stdout
    done = fast_shm("tokens", "--model", "gpt-4", paths["file"], env=env | {_PRICES: "/nowhere"})
    assert done.returncode == 0 and "no costs are shown: " in done.stderr


_PRICE, _PRICES = {"input_cost_per_token": 0.5}, "FAST_LITELLM_PRICES"


@pytest.mark.parametrize("name", ["cl100k", "", "../cl100k_base", "a\x1b[31m"])
def test_no_such_encoding(fast_shm: Command, cache: dict[str, str], name: str) -> None:
    done = fast_shm("tokens", "--encoding", name, "-", env=cache)
    assert (done.returncode, done.stdout) == (1, "") and "\x1b" not in done.stderr
    assert "there is no encoding '" in done.stderr and "o200k_base" in done.stderr


def test_without_tiktokens_file(
    fast_shm: Command, cache: dict[str, str], tmp_path: pathlib.Path
) -> None:
    done = fast_shm(
        "tokens", "--encoding", "gpt2", "-", env=cache | {"TIKTOKEN_CACHE_DIR": str(tmp_path)}
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "FAST_LITELLM_TOKENIZER_DOWNLOAD is false" in done.stderr
    assert "TIKTOKEN_CACHE_DIR" in done.stderr and "Traceback" not in done.stderr
    done = fast_shm("tokens", "-", env=cache | {"FAST_LITELLM_TOKENIZER_DOWNLOAD": "maybe"})
    assert done.returncode == 2 and "must be true or false, not 'maybe'" in done.stderr


def test_loads_no_more_than_it_needs(tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    """Least of all tiktoken, and no segment is made."""
    code = (
        "import sys\nfrom fast_litellm_shm.cli import main\nmain(sys.argv[1:])\n"
        "print(*(name for name in ('tiktoken', 'numpy', 'rich', 'psutil') if name in sys.modules))"
    )
    path = _files(tmp_path, file="x")["file"]
    ran = subprocess.run(
        [sys.executable, "-c", code, "tokens", "--json", "--encoding", NAME, path],
        env=cache | {"FAST_LITELLM_SHM_NAME": "not.made"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    assert ran.stdout.splitlines()[-1] == ""
    assert not [name for name in os.listdir("/dev/shm") if name.endswith(".not.made")]


def test_a_large_file(tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    """It takes no memory, and on a terminal its progress is shown."""
    small, large = tmp_path / "small", tmp_path / "lar\tge"
    text = texts.CORPUS["english"] + texts.CORPUS["japanese"] + "\r\n\n"
    small.write_text(text, newline="")
    with open(large, "w", encoding="utf-8", newline="") as file:
        for _ in range(60):
            file.write(text * ((1 << 20) // len(text)))
    most = []
    for path in (small, large):
        ours, theirs = pty.openpty()
        with open(tmp_path / "out", "w+b") as out:
            child = subprocess.Popen(
                [*COMMAND, "tokens", "--json", str(path)],
                stdout=out,
                stderr=theirs,
                env=cache | {"TERM": "xterm", "COLUMNS": "70"},
            )
            os.close(theirs)
            shown = b""
            try:
                while more := os.read(ours, 65536):
                    shown += more
            except OSError:
                pass  # it ended
            os.close(ours)
            _, status, usage = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
            most.append(usage.ru_maxrss)
            out.seek(0)
            found = json.load(out)
        assert child.returncode == 0
        assert (b"lar\\tge" in shown) == (path is large), shown
    # cl100k_base has the line ends at the end of each text in a piece of their own.
    assert found["tokens"] == 60 * ((1 << 20) // len(text)) * _expected(text)
    assert most[1] - most[0] < 50 << 10, "KB"  # of 100 MB


def test_a_pattern_that_the_engine_does_not_know(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such a file is counted as one text, by tiktoken: nobody knows where it may be cut."""
    monkeypatch.setattr(vocabulary, "load", lambda name: None)
    monkeypatch.setattr(blocks, "SIZE", 100)
    texts_counted = []
    found = encoding.load(NAME)

    class Spy:
        def encode_ordinary(self, text: str) -> list[int]:
            texts_counted.append(text)
            return found.encode_ordinary(text)

    monkeypatch.setattr(encoding, "load", lambda name: Spy())
    text = "one two " * 1000
    assert cli.main(["tokens", "--json", _files(tmp_path, file=text)["file"]]) == 0
    assert texts_counted == [text]
    assert json.loads(capsys.readouterr().out)["tokens"] == len(found.encode_ordinary(text))


def test_a_narrow_terminal(tmp_path: pathlib.Path, cache: dict[str, str]) -> None:
    """Names are cut, numbers are not."""
    path = _files(tmp_path, **{"n" * 60: "one two"})["n" * 60]
    ours, theirs = pty.openpty()
    subprocess.run(
        [*COMMAND, "tokens", path],
        stdout=theirs,
        env=cache | {"COLUMNS": "40", "NO_COLOR": "1"},
        timeout=PATIENCE,
        check=True,
    )
    shown = os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 40 and lines[3].split()[:3] == ["2", "7", "B"]
    assert "…" in lines[3] and "\x1b[3" not in shown
