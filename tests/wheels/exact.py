"""An installed fast_litellm_shm keeps its limits between processes.

    python exact.py

tests it with the Python that runs this, and needs nothing else: cibuildwheel runs it on each
platform.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

WORKER = pathlib.Path(__file__).with_name("worker.py")
LIMIT, PROCESSES = 200_000, 4


class Worker:
    """A process that runs worker.py."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self._child = child

    def say(self, word: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{word}\n")
        self._child.stdin.flush()

    def hear(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()

    def ask(self, word: str) -> str:
        self.say(word)
        return self.hear()

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()


class Installed:
    """python: the command that starts a Python. env: the environment with which that finds the
    package, and a segment that has no limits yet."""

    def __init__(self, python: Sequence[str], env: Mapping[str, str]) -> None:
        self._python, self._env = python, env

    @contextlib.contextmanager
    def workers(self, count: int) -> Iterator[list[Worker]]:
        with contextlib.ExitStack() as stack:
            workers = []
            for _ in range(count):
                child = subprocess.Popen(
                    [*self._python, str(WORKER), str(LIMIT)],
                    env=self._env,
                    cwd=WORKER.parent,  # where no fast_litellm_shm lies
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
                stack.enter_context(child)
                stack.callback(child.kill)
                workers.append(Worker(child))
            for worker in workers:
                assert worker.hear() == "ready"
            yield workers

    def admits_exactly_the_limit(self) -> None:
        """Each of the processes attempts the whole limit, all at once."""
        with self.workers(PROCESSES) as workers:
            for worker in workers:
                worker.say("admitted")
            admitted = [int(worker.hear()) for worker in workers]
        assert sum(admitted) == LIMIT, f"{admitted} were admitted, not {LIMIT:,} together"

    def wakes_who_waits(self) -> None:
        with self.workers(2) as (holder, waiter):
            assert holder.ask("acquire") == "True"
            assert waiter.ask("wait") == "waits"
            time.sleep(0.5)  # so that it sleeps; it is admitted as well if it does not yet
            assert holder.ask("release") == "True"
            assert waiter.hear() == "True"
            assert holder.ask("acquire") == "False"

    def frees_what_a_killed_process_held(self) -> None:
        with self.workers(2) as (holder, waiter):
            assert holder.ask("acquire") == "True"
            assert waiter.ask("acquire") == "False"
            holder.kill()
            assert waiter.ask("wait") == "waits"
            assert waiter.hear() == "True"

    def removes_its_segment(self) -> None:
        with self.workers(1) as (worker,):
            assert worker.ask("remove") == "None"


def main() -> None:
    """Its own segment, which is gone at the end."""
    env = {**os.environ, "FAST_LITELLM_SHM_NAME": f"exact-{os.getpid()}"}
    installed = Installed([sys.executable], env)
    try:
        installed.admits_exactly_the_limit()
        installed.wakes_who_waits()
        installed.frees_what_a_killed_process_held()
    finally:
        installed.removes_its_segment()
    print(f"{PROCESSES} processes admitted {LIMIT:,} of {PROCESSES * LIMIT:,} attempts")


if __name__ == "__main__":
    main()
