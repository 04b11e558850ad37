"""fast-shm top in a real terminal: tmux, as a person uses it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest
from support.children import PATIENCE
from support.puppets import Puppet
from support.waiting import wait_until

from fast_litellm_shm import Segment

from .conftest import COMMAND, environment

pytest.importorskip("textual", reason="not installed: textual")
if shutil.which("tmux") is None:
    pytest.skip("not installed: tmux (apt-get install tmux)", allow_module_level=True)


class Terminal:
    """A terminal of its own, in a tmux server of its own."""

    def __init__(self, name: str, columns: int = 80, rows: int = 24) -> None:
        self._tmux = ["tmux", "-L", name, "-f", "/dev/null"]
        self._ends = f"ended-{name}"
        shell = ["sh"]
        self._run("new-session", "-d", "-x", str(columns), "-y", str(rows), *shell)
        self._run("set-option", "-g", "remain-on-exit", "on")

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._tmux, *arguments],
            check=True,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=environment(TERM="xterm-256color"),
        )
        return done.stdout

    def run(self, *arguments: str) -> None:
        """Type the command; it prints its exit code at its end."""
        self.type("clear; " + shlex.join([*COMMAND, *arguments]) + "; echo status=$?")
        self.press("Enter")

    def type(self, text: str) -> None:
        """Letter by letter."""
        self._run("send-keys", "-l", text)

    def press(self, *keys: str) -> None:
        """By tmux's names of keys."""
        self._run("send-keys", *keys)

    def resize(self, columns: int, rows: int) -> None:
        """As one draws at its corner."""
        self._run("resize-window", "-x", str(columns), "-y", str(rows))

    def screen(self) -> str:
        """What is to be read on it."""
        return self._run("capture-pane", "-p")

    def sees(self, pattern: str) -> str:
        """The screen, once it has this."""
        screen = ""

        def look() -> object:
            nonlocal screen
            screen = self.screen()
            return re.search(pattern, screen, re.MULTILINE)

        wait_until(lambda: f"{pattern!r} in:\n{screen}", look, every=0.05)
        return screen

    def pid(self) -> int:
        """Of what runs in it."""
        shell = self._run("display-message", "-p", "#{pane_pid}").strip()
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", shell], capture_output=True, text=True, check=True
        )
        return int(found.stdout.split()[0])

    def close(self) -> None:
        """The server too."""
        self._run("kill-server")


@pytest.fixture
def terminal(segment_name: str) -> Iterator[Terminal]:
    made = Terminal(segment_name)
    yield made
    made.close()


@pytest.fixture
def puppet(segment: Segment) -> Iterator[Puppet]:
    made = Puppet(segment.name)
    made("acquire", "chat", ["over-the-limit"], 14)
    made("acquire", "wide", ["user-1", "[bold]"], 3)
    made("hold", "model")
    yield made
    made.end()


def test_a_session(terminal: Terminal, puppet: Puppet, segment_name: str) -> None:
    terminal.run("top", "--name", segment_name, "--every", "0.2")
    screen = terminal.sees(r"^over-the-limit +chat .* 0/10 ")
    assert re.search(r"^\[bold\] +wide ", screen, re.MULTILINE)
    assert re.search(rf"^admitted .* {puppet.pid} ", terminal.sees("1 permit,"), re.MULTILINE)
    puppet("acquire", "wide", ["user-1"], 500)
    terminal.sees(r"^user-1 +wide +[1-9]")  # it has a rate
    terminal.type("/over")
    terminal.sees(r"^over$")
    terminal.press("Enter")
    assert "user-1" not in terminal.sees("/over ")
    terminal.type("x")
    terminal.sees("Forget what over-the-limit has consumed")
    terminal.type("y")
    terminal.sees("Reset over-the-limit.")
    terminal.press("Escape")
    terminal.sees("^user-1 ")
    terminal.resize(120, 40)
    terminal.sees("admitted +denied +left +reset +wait")
    terminal.resize(60, 15)
    assert max(map(len, terminal.sees(r"\? help").splitlines())) <= 60
    terminal.type("q")
    assert "user-1" not in terminal.sees("^status=0$"), "the first screen was not given back"


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_give_the_screen_back(
    terminal: Terminal, puppet: Puppet, segment_name: str, number: int, status: int
) -> None:
    terminal.run("top", "--name", segment_name)
    terminal.sees("^user-1 ")
    os.kill(terminal.pid(), number)
    assert "user-1" not in terminal.sees(f"^status={status}$")
    terminal.type("echo it echo")
    terminal.sees("echo it echo$")  # the shell echoes what is typed again


def test_control_c(terminal: Terminal, puppet: Puppet, segment_name: str) -> None:
    terminal.run("top", "--name", segment_name)
    terminal.sees("^user-1 ")
    terminal.press("C-c")
    terminal.sees("^status=0$")


def test_a_segment_that_cannot_be_read(terminal: Terminal, segment_name: str) -> None:
    segment = Segment(segment_name, capacity=100)
    os.truncate(segment.path, 4096)
    terminal.run("top", "--name", segment_name)
    assert "fast-shm: " in terminal.sees("^status=1$")
