"""Real Redis and Valkey servers, each on a unix socket of its own, while a test needs them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from support.waiting import PATIENCE, wait_until

KINDS = ("redis", "valkey")
HIGHEST_OF_A_CLUSTER = 55_535  # ports: nodes talk to each other at 10,000 more
# Seconds that calls wait for a server. The usual 0.25 pass by chance on a busy machine, and who
# takes it for away goes by the policy.
SLOWEST = 2.0


def installed(kind: str) -> bool:
    return shutil.which(f"{kind}-server") is not None


def starts(kind: str, *options: str) -> bool:
    """Whether a server takes these options: not all are built into each."""
    tried = Server(kind, *options)
    try:
        with tried:
            return True
    except EndedError:
        return False


def encrypted(kind: str, port: int, certificate: Path) -> tuple[str, ...]:
    """Options of a server that speaks TLS at a port, and nothing else but on its unix socket.
    Skips the test where it was built without."""
    import pytest

    options = (
        "--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no",
        "--tls-cert-file", str(certificate), "--tls-ca-cert-file", str(certificate),
        "--tls-key-file", str(certificate.with_name("key.pem")),
    )  # fmt: skip
    if not starts(kind, *options):
        pytest.skip(f"this {kind}-server was built without TLS")
    return options


class EndedError(AssertionError):
    """A server that ended by itself."""


def free_port(most: int = 65_535) -> int:
    """A TCP port of loopback that nobody had just now."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port <= most:
            return port


class Server:
    """``with Server("redis") as server:`` an empty one, that keeps nothing on disk. options: as on
    its command line. within: a command that runs another one elsewhere."""

    def __init__(self, kind: str, *options: str, port: int = 0, within: Sequence[str] = ()) -> None:
        self._kind, self._options, self.port, self._within = kind, options, port, within
        self._folder = tempfile.TemporaryDirectory(prefix="fast-shm-", dir="/tmp")
        self.path = os.path.join(self._folder.name, "s")
        self.url = f"unix://{self.path}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Server:
        """Empty, whatever it held before."""
        command = [
            *self._within, f"{self._kind}-server", "--port", str(self.port), "--bind", "127.0.0.1",
            "--unixsocket", self.path, "--save", "", "--appendonly", "no",
            "--dir", self._folder.name,
            "--logfile", os.path.join(self._folder.name, "log"), *self._options,
        ]  # fmt: skip
        self._run(command)
        return self

    @contextmanager
    def sentinel(self, config: str) -> Iterator[Server]:
        """It watches others, instead of serving."""
        command = [
            f"{self._kind}-server", config, "--port", str(self.port), "--bind", "127.0.0.1",
            "--unixsocket", self.path, "--sentinel",
        ]  # fmt: skip
        self._run(command)
        try:
            yield self
        finally:
            self.__exit__(None, None, None)

    def _run(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(f"{command[len(self._within)]} answers", self._answers)

    def _answers(self) -> bool:
        import redis

        assert self._process is not None
        if self._process.poll() is not None:
            raise EndedError(f"{self._kind}-server ended: {self._process.poll()}")
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False

    def client(self) -> Any:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        once = Retry(NoBackoff(), 0)  # we ask again ourselves
        return redis.Redis(unix_socket_path=self.path, socket_timeout=PATIENCE, retry=once)

    def calls(self) -> int:
        """How many scripts were asked for so far."""
        with self.client() as client:
            stats = client.info("commandstats")
        return int(stats.get("cmdstat_evalsha", {}).get("calls", 0))

    def freeze(self) -> None:
        """It still accepts connections, by its kernel, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(PATIENCE)

    def _signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()
        self._folder.cleanup()
