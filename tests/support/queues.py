"""Real workers of a task queue on a real Redis, and what their tasks wrote down."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from support.servers import Server
from support.waiting import PATIENCE, wait_until

EXAMPLES = Path(__file__).parents[2] / "examples"


class Line(NamedTuple):
    at: float  # time.monotonic() of this machine
    pid: int
    what: str


class Workers:
    """What they have written so far, each line by one task."""

    def __init__(self, server: Server, folder: Path, env: Mapping[str, str], file: Path) -> None:
        self.server, self._folder, self._env, self._file = server, folder, env, file
        self.logs: list[Path] = []

    def lines(self, what: str) -> list[Line]:
        """Those whose text begins so."""
        if not self._file.exists():
            return []
        found = []
        for line in self._file.read_text(encoding="utf-8").splitlines():
            at, pid, text = line.split(" ", 2)
            if text.startswith(what):
                found.append(Line(float(at), int(pid), text))
        return found

    def python(self, *arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=self._folder,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def wait_for(self, what: str, count: int) -> list[Line]:
        wait_until(
            lambda: f"{count} times {what!r}; {len(self.lines(what))} so far\n{self.told()}",
            lambda: len(self.lines(what)) >= count,
            every=0.05,
        )
        return self.lines(what)

    def told(self) -> str:
        """The logs."""
        return "\n".join(each.read_text(encoding="utf-8") for each in self.logs)


@contextmanager
def workers(
    folder: Path,
    commands: Sequence[Sequence[str]],
    name: str,
    tmp_path: Path,
    variable: str,
    scheme: str,
) -> Iterator[Workers]:
    """So many workers, in ``folder``, with the server's URL in ``variable``; "{}" in a command is
    that URL. They are gone at the end."""
    if shutil.which("redis-server") is None:
        pytest.skip("not installed: redis-server")
    with ExitStack() as stack:
        server = stack.enter_context(Server("redis"))
        url = f"{scheme}://{server.path}"
        file = tmp_path / "lines"
        paths = [str(folder), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        env = os.environ | {
            "FAST_LITELLM_SHM_NAME": name,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "STARTS": str(file),
            variable: url,
        }
        found = Workers(server, folder, env, file)
        for number, command in enumerate(commands):
            log = tmp_path / f"log-{number}"
            found.logs.append(log)
            process = subprocess.Popen(
                [sys.executable, "-m", *(each.format(url) for each in command)],
                cwd=folder,
                env=env,
                stdout=stack.enter_context(log.open("wb")),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(_end, process)
        yield found


def _end(process: subprocess.Popen[bytes]) -> None:
    """It, and its own children."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def check_windows(started: Sequence[Line], asked: Sequence[Line], limit: int, per: float) -> None:
    """No window has had more than its limit. A task asked before it was admitted and wrote after
    that, so this holds however late they were: the window of number ``limit * i`` cannot begin
    before i windows have passed since the first that asked."""
    first = min(line.at for line in asked)
    times = sorted(line.at for line in started)
    for number in range(limit, len(times), limit):
        windows = number // limit
        assert times[number] >= first + windows * per, f"more than {limit} in a window: {times}"
