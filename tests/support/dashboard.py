"""The real ``fast-shm dashboard`` in a process of its own."""

from __future__ import annotations

import http.client
import json
import re
import select
import signal
import subprocess
import sys
from types import TracebackType
from typing import Any
from urllib.parse import urlencode

from support.children import PATIENCE


class Dashboard:
    """Serves a segment's page on a free port, until the block ends."""

    def __init__(self, segment: str, *options: str, every: str = "0.1") -> None:
        command = [sys.executable, "-m", "fast_litellm_shm.cli", "dashboard", "--name", segment]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--every", every, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.errors = ""

    def __enter__(self) -> Dashboard:
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        found = re.search(r"on (http://.*:(\d+)/)", said)
        if found is None:
            raise AssertionError(f"it did not start: {said}{self.end()}")
        self.url, self.port = found[1], int(found[2])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        status = self.end()
        if kind is None:
            assert status == 0, f"{status}: {self.errors}"

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._process.pid

    def said(self) -> str:
        """The next line on its stderr, which is then not in ``errors``."""
        assert self._process.stderr is not None
        if not select.select([self._process.stderr], [], [], PATIENCE)[0]:
            raise AssertionError("it says nothing")
        return self._process.stderr.readline()

    def end(self) -> int:
        """As Ctrl-C does. The exit code; what it wrote to stderr is in ``errors``."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        try:
            _, self.errors = self._process.communicate(timeout=PATIENCE)
        finally:
            self._process.kill()
        return self._process.returncode

    def ask(
        self, path: str, method: str = "GET", **headers: str
    ) -> tuple[int, http.client.HTTPMessage, str]:
        """Status, headers, body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read().decode()
        finally:
            connection.close()

    def snapshot(self, **query: str) -> dict[str, Any]:
        """The JSON that the page gets."""
        status, _, body = self.ask(f"/api/snapshot?{urlencode(query)}")
        assert status == 200, body
        found: dict[str, Any] = json.loads(body)
        return found
