"""The command line of fast-shm: help, wrong arguments, and what it loads."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
from support.children import PATIENCE

from fast_litellm_shm import Limit, RateLimiter, Segment
from fast_litellm_shm.cli import main

from .conftest import Command, environment

VERBS = [
    *("inspect", "top", "dashboard", "ls", "export", "reset", "release", "rm", "tokens", "cache"),
    *("cache build", "cache rm", "save", "state", "completion"),
]
HEAVY = ("numpy", "rich", "textual", "psutil", "starlette", "uvicorn")


@pytest.mark.parametrize("verb", [[], *(verb.split() for verb in VERBS)])
@pytest.mark.parametrize("columns", [60, 80])
def test_help(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: list[str],
    columns: int,
) -> None:
    """It fits the terminal. Only examples are never wrapped, so that they can be copied."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*verb, "--help"]) == 0
    shown, errors = capsys.readouterr()
    assert "examples:\n  fast-shm" in shown and "exit codes:" in shown and not errors
    for line in shown.splitlines():
        example = line.startswith("  ")
        assert len(line) <= (80 if example else columns), line


def test_version(fast_shm: Command) -> None:
    done = fast_shm("--version")
    assert done.returncode == 0 and done.stdout.startswith("fast-shm 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["lss"],
        ["inspect", "name"],
        ["inspect", "--top", "-1"],
        ["inspect", "--top", "x"],
        ["inspect", "--sort", "size"],
        ["inspect", "--watch", "0"],
        ["inspect", "--watch", "nan"],
        ["inspect", "--watch", "inf"],
        ["inspect", "--name", ""],
        ["rm", "--name", "../etc"],
        ["release"],
        ["release", "--pid", "0"],
        ["release", "--pid", "x"],
        ["release", "--pid", str(2**32)],
        ["release", "--pid", "1", "--dead"],
        ["release", "--dead", "--force"],
        ["tokens", "--model", "gpt-4o", "--encoding", "o200k_base", "-"],
        ["tokens", "-", "--max", "x"],
        ["tokens", "--name", "shop", "-"],
    ],
)
def test_usage(fast_shm: Command, arguments: list[str]) -> None:
    done = fast_shm(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "fast-shm: " in done.stderr and "--help" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["inspect", "rm", "save", "export", "ls"])
def test_a_group_that_is_none(
    verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAST_LITELLM_SHM_GROUP", "no-such-group")
    assert main([verb] if verb == "ls" else [verb, "--name", "shop"]) == 2
    assert "FAST_LITELLM_SHM_GROUP: this host has no group" in capsys.readouterr().err


def test_what_to_do_is_said_on_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Behind a message that points at a place."""
    assert main(["set", "chat", "user", "5/minit"]) == 2
    assert capsys.readouterr().err.endswith("^\nsee `fast-shm set --help`\n")
    assert main(["reset", "chat", "user"]) == 2
    assert "name its limiter by --limiter" in capsys.readouterr().err


def test_usage_is_that_of_the_verb(fast_shm: Command) -> None:
    """Errors that argparse cannot find show the options of the verb, too."""
    for arguments in (["reset"], ["release", "--dead", "--force"], ["rm", "--name", "a/b"]):
        done = fast_shm(*arguments)
        assert done.stderr.startswith(f"usage: fast-shm {arguments[0]} ")
        assert f"see `fast-shm {arguments[0]} --help`" in done.stderr


_LOADED = """
import sys
from fast_litellm_shm.cli import main
status = main(sys.argv[2:])
print("loaded:", *(name for name in sys.argv[1].split(",") if name in sys.modules))
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["inspect", "--help"], ["lss"], ["ls", "--json"], ["cache", "--json"], ["export"]],
)
def test_loads_only_what_it_needs(segment: Segment, arguments: list[str]) -> None:
    RateLimiter(Limit(5), name="l", segment=segment).acquire("k")
    if arguments == ["export"]:
        arguments = ["export", "--name", segment.name]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_LOADED), ",".join(HEAVY), *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env=environment(),
    )
    loaded = done.stdout.splitlines()[-1].removeprefix("loaded:").split()
    needed = {"numpy"} if arguments[0] == "export" else set[str]()  # it reads permits by numpy
    assert set(loaded) <= needed
