"""Hosts with addresses of their own: network namespaces on one bridge."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from types import TracebackType

_CLONE_NEWNET = 0x40000000  # sched.h


def why_not() -> str | None:
    """Why this machine cannot have them; None: it can."""
    for command, package in (("ip", "iproute2"), ("unshare", "util-linux")):
        if shutil.which(command) is None:
            return f"there is no {command} here: apt-get install {package}"
    if os.geteuid() != 0:
        return "only root may join a network namespace"
    tried = subprocess.run(
        ["unshare", "--net", "ip", "link", "add", "name", "switch", "type", "bridge"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class _Namespace:
    """Exists as long as a process in it: one that ends with this one, however that ends."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        self._holder.stdout.read(1)  # it is in there

    @property
    def pid(self) -> int:
        return self._holder.pid

    def command(self, *command: str) -> list[str]:
        """The command, to be run in there."""
        return ["nsenter", f"--net=/proc/{self.pid}/ns/net", *command]

    def ip(self, *arguments: str) -> None:
        subprocess.run(self.command("ip", *arguments), check=True)

    def enter(self) -> None:
        """This thread, and those that it starts, are in there from now on."""
        place = os.open(f"/proc/{self.pid}/ns/net", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(place, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        finally:
            os.close(place)

    def close(self) -> None:
        self._holder.communicate()  # the end of its input


class Network:
    """``with Network(hosts=3) as network:`` a server's place and so many hosts', whose lines can be
    cut and joined again. Nothing of it is in this process's own namespace."""

    ADDRESS = "10.0.0.1"  # of the server

    def __init__(self, hosts: int) -> None:
        self._switch, self._server = _Namespace(), _Namespace()
        self._hosts = [_Namespace() for _ in range(hosts)]

    def __enter__(self) -> Network:
        self._switch.ip("link", "add", "name", "switch", "type", "bridge")
        self._switch.ip("link", "set", "switch", "up")
        for i, member in enumerate((self._server, *self._hosts)):
            ends = ("type", "veth", "peer", "name", "eth0", "netns", str(member.pid))
            self._switch.ip("link", "add", "name", f"line{i}", *ends)
            self._switch.ip("link", "set", f"line{i}", "master", "switch", "up")
            member.ip("address", "add", f"10.0.0.{i + 1}/24", "dev", "eth0")
            member.ip("link", "set", "lo", "up")
            member.ip("link", "set", "eth0", "up")
        return self

    def in_server(self, *command: str) -> list[str]:
        """The command, to be run where the server is."""
        return self._server.command(*command)

    def entering(self) -> list[Callable[[], None]]:
        """For each host, what a process calls to be in it."""
        return [each.enter for each in self._hosts]

    def cut(self, host: int) -> None:
        """What it sends gets lost, and nobody is told."""
        self._switch.ip("link", "set", f"line{host + 1}", "down")

    def join(self, host: int) -> None:
        self._switch.ip("link", "set", f"line{host + 1}", "up")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for each in (self._switch, self._server, *self._hosts):
            each.close()
