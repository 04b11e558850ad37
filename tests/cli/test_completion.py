"""fast-shm completion, in the real shells: what the Tab key makes of a command line."""

from __future__ import annotations

import contextlib
import os
import pathlib
import pty
import select
import shutil
import subprocess
import time
from collections.abc import Iterator

import pytest
from support.children import PATIENCE

from fast_litellm_shm import Segment
from fast_litellm_shm.cli import arguments, completion

from .conftest import Command, environment
from .test_missing_extras import without

# What is typed, and what Tab adds to it.
TYPED = {
    "verb": ("fast-shm insp", "ect"),
    "option": ("fast-shm inspect --allow-o", "ther-owner"),
    "value": ("fast-shm export --format prom", "etheus"),
    "second verb": ("fast-shm cache bui", "ld"),
    "action": ("fast-shm state comp", "act"),
    "shell": ("fast-shm completion ba", "sh"),
    "segment": ("fast-shm inspect --name %s", "-tab"),
    "file": ("fast-shm tokens an-uncommon-f", "ile.txt"),
}


@pytest.fixture(autouse=True)
def shtab() -> None:
    pytest.importorskip("shtab", reason="not installed: shtab")


def _shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"not installed: {name}")
    return found


@contextlib.contextmanager
def _terminal(folder: pathlib.Path, *command: str) -> Iterator[int]:
    """A shell on a terminal without escapes, in a folder that is its home too."""
    pid, screen = pty.fork()
    if not pid:
        os.chdir(folder)
        more = {"TERM": "dumb", "HOME": str(folder), "ZDOTDIR": str(folder), "PS1": "$ "}
        os.execve(command[0], [*command], environment(**more))
    try:
        yield screen
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
        os.close(screen)


def _shows(screen: int, wanted: str) -> None:
    """Read until the terminal shows it."""
    seen, end = "", time.monotonic() + PATIENCE
    while wanted not in seen:
        ready, _, _ = select.select([screen], [], [], max(end - time.monotonic(), 0))
        assert ready, f"never shown: {wanted!r}; seen: {seen!r}"
        seen += os.read(screen, 4096).decode(errors="replace").replace("\r", "").replace("\b", "")


def _script(fast_shm: Command, shell: str, into: pathlib.Path) -> pathlib.Path:
    done = fast_shm("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(done.stdout)
    return into


def _typed(case: str, segment_name: str, folder: pathlib.Path) -> tuple[str, str]:
    """Makes what is to be found, too."""
    (folder / "an-uncommon-file.txt").touch()
    Segment(f"{segment_name}-tab"[:64], capacity=10)
    text, added = TYPED[case]
    return text.replace("%s", segment_name), added


@pytest.mark.parametrize("case", TYPED)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab(
    fast_shm: Command, tmp_path: pathlib.Path, segment_name: str, shell: str, case: str
) -> None:
    segment_name = segment_name[:40]
    program = _shell(shell)
    text, added = _typed(case, segment_name, tmp_path)
    command: tuple[str, ...]
    if shell == "bash":
        script = _script(fast_shm, shell, tmp_path / "complete")
        command, load = (program, "--norc", "--noprofile", "-i"), f"source {script}"
    else:
        _script(fast_shm, shell, tmp_path / "zfunc" / "_fast-shm")
        command = (program, "-f", "-i")
        load = f"fpath+={tmp_path}/zfunc; autoload -Uz compinit; compinit -u"
    try:
        with _terminal(tmp_path, *command) as screen:
            os.write(screen, f"{load} && echo loa''ded\n".encode())
            _shows(screen, "loaded\n")
            os.write(screen, f"{text}\t".encode())
            _shows(screen, text + added)
    finally:
        Segment(f"{segment_name}-tab", create=False).remove()


@pytest.mark.parametrize("case", TYPED)
def test_fish(fast_shm: Command, tmp_path: pathlib.Path, segment_name: str, case: str) -> None:
    segment_name = segment_name[:40]
    program = _shell("fish")
    _script(fast_shm, "fish", tmp_path / ".config" / "fish" / "completions" / "fast-shm.fish")
    text, added = _typed(case, segment_name, tmp_path)
    (tmp_path / "fast-shm").symlink_to("/bin/true")  # fish looks for the command first
    done = subprocess.run(
        [program, "-c", "complete -C $argv[1]", text],
        cwd=tmp_path,
        env=environment(
            HOME=str(tmp_path),
            XDG_CONFIG_HOME=str(tmp_path / ".config"),
            PATH=f"{tmp_path}:{os.environ['PATH']}",
        ),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    Segment(f"{segment_name}-tab", create=False).remove()
    assert done.stderr == ""
    words = [line.split("\t")[0] for line in done.stdout.splitlines()]
    assert text.split()[-1] + added in words


def test_no_helper_files_among_the_segments(segment_name: str) -> None:
    """Lock files and half-made segments are none."""
    segment = Segment(segment_name, capacity=10)
    helpers = [pathlib.Path(f"{segment.path}.{'c' * 16}.{end}") for end in ("lock", "tmp")]
    for helper in helpers:
        helper.touch()
    names = completion._segment_names()["preamble"]["bash"]
    done = subprocess.run(
        ["bash", "-c", f'{names}\n_fast_shm_segments "$0"', segment_name],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    for helper in helpers:
        helper.unlink()
    assert (done.stdout, done.stderr) == (f"{segment_name}\n", "")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_verb_is_there(fast_shm: Command, shell: str) -> None:
    text = fast_shm("completion", shell).stdout
    assert [verb for verb in arguments.parsers()[1] if verb not in text] == []


@pytest.mark.parametrize("given", [[], ["tcsh"], ["bash", "zsh"]])
def test_usage(fast_shm: Command, given: list[str]) -> None:
    done = fast_shm("completion", *given)
    assert done.returncode == 2 and "fast-shm completion --help" in done.stderr


def test_without_shtab(fast_shm: Command, tmp_path: pathlib.Path) -> None:
    done = fast_shm("completion", "bash", env=without(tmp_path, "shtab"))
    assert (done.returncode, done.stdout) == (1, "")
    assert 'needs shtab, which is not installed: pip install "fast-litellm-shm[completion]"' in (
        done.stderr
    )
