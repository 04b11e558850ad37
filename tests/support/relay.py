"""A line between a host and a server, which can be cut and joined again."""

from __future__ import annotations

import os
import selectors
import socket
import tempfile
import threading
from types import TracebackType


class Relay:
    """Forwards connections to a unix socket of its own to another one. ``cut()``: as of then nobody
    gets through, and nobody is told: what is sent waits, as on a network that lost its route."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._folder = tempfile.TemporaryDirectory(prefix="fast-shm-", dir="/tmp")
        self.path = os.path.join(self._folder.name, "r")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(64)
        self._wake, self._waker = socket.socketpair()
        self._whole, self._end = True, False
        self._others: dict[socket.socket, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, daemon=True)

    def cut(self) -> None:
        self._whole = False
        self._waker.send(b"x")

    def join(self) -> None:
        """What waited is dropped with its connections."""
        self._whole = True
        self._waker.send(b"j")

    def _run(self) -> None:
        with selectors.DefaultSelector() as select:
            select.register(self._listener, selectors.EVENT_READ)
            select.register(self._wake, selectors.EVENT_READ)
            while not self._end:
                for key, _ in select.select():
                    found = key.fileobj
                    assert isinstance(found, socket.socket)
                    if found is self._wake:
                        if found.recv(1) == b"j":
                            while self._others:
                                self._close(select, next(iter(self._others)))
                        self._watch(select)
                    elif self._whole:
                        self._move(select, found)

    def _watch(self, select: selectors.BaseSelector) -> None:
        """Nothing is looked at while the line is cut, or it would be ready all the time."""
        for each in (self._listener, *self._others):
            known = each in select.get_map()
            if self._whole and not known:
                select.register(each, selectors.EVENT_READ)
            elif not self._whole and known:
                select.unregister(each)

    def _move(self, select: selectors.BaseSelector, found: socket.socket) -> None:
        if found is self._listener:
            here, there = found.accept()[0], socket.socket(socket.AF_UNIX)
            try:
                there.connect(self._target)
            except OSError:
                here.close()
                there.close()
                return
            self._others |= {here: there, there: here}
            self._watch(select)
        elif found in self._others:
            try:
                data = found.recv(65536)
                self._send(self._others[found], data)
            except OSError:
                data = b""
            if not data:
                self._close(select, found)

    def _send(self, to: socket.socket, data: bytes) -> None:
        to.sendall(data)

    def _close(self, select: selectors.BaseSelector, found: socket.socket) -> None:
        other = self._others.pop(found, None)
        for each in (found, other):
            if each is None:
                continue
            self._others.pop(each, None)
            if each in select.get_map():
                select.unregister(each)
            each.close()

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end = True
        self._waker.send(b"x")
        self._thread.join(10)
        for each in (self._listener, self._wake, self._waker, *self._others):
            each.close()
        self._folder.cleanup()
