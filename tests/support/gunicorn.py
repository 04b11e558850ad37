"""A real gunicorn with four workers, and a client that asks over fresh connections."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from support.waiting import PATIENCE, wait_until

WORKERS = 4


class Server:
    """gunicorn on a Unix socket, so that no port can be taken by somebody else."""

    def __init__(
        self,
        segment_name: str,
        *,
        limit: int = 1,
        preload: bool = False,
        app: str = "support.app:app",
        workers: int = WORKERS,
        options: Sequence[str] = (),
        **env: str,
    ) -> None:
        self.workers = set[int]()  # pids of those that answered when it was ready
        self._count = workers
        self._socket = f"/tmp/{segment_name}.sock"
        command = [
            sys.executable,
            "-m",
            "gunicorn",
            app,
            "--workers",
            str(workers),
            "--bind",
            f"unix:{self._socket}",
            "--log-level",
            "warning",
            *options,
        ]
        tests = str(Path(__file__).parents[1])
        path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            command + ["--preload"] * preload,
            env=os.environ
            | {"FAST_LITELLM_SHM_NAME": segment_name, "PYTHONPATH": path, "APP_LIMIT": str(limit)}
            | env,
        )

    def __enter__(self) -> Server:
        """Ready: each of its workers has answered."""
        seen = self.workers

        def all_have_answered() -> bool:
            assert self._process.poll() is None, f"gunicorn ended: {self._process.poll()}"
            with suppress(OSError):  # it does not listen yet
                seen.update(pid for _, pid in self.ask(32, "/ready"))
            return len(seen) == self._count

        try:
            wait_until(lambda: f"all {self._count} workers answer; {seen} do", all_have_answered)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE)
        finally:
            if self._process.poll() is None:
                self._process.kill()
            Path(self._socket).unlink(missing_ok=True)

    def ask(self, count: int, path: str = "/", at_once: int = 8) -> list[tuple[int, int]]:
        """So many requests, each on its own connection: status, pid of the worker."""
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda _: self._ask_once(path), range(count)))

    def _ask_once(self, path: str) -> tuple[int, int]:
        connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(PATIENCE)
        try:
            connection.sock.connect(self._socket)
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, int(answer.read())
        finally:
            connection.close()
