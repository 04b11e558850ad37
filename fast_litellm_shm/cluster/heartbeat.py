"""The heartbeat of permits: each process that holds some reports them to the server once in some
seconds, and gives back unused ones. A host that reports nothing loses what it was granted."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

from fast_litellm_shm.cluster.connection import Connection, UnreachableError, log

_SECONDS = 1.0
_MOST = 200  # keys in one pipeline


class Leases(Protocol):
    """PermitLeases, as this module uses them."""

    keys: dict[str | bytes, int]

    def due(self, key: str | bytes) -> tuple[Any, Any] | None: ...
    def put(self, request: Any, lease: Any, answer: Any) -> bool: ...


class Heartbeat:
    """Of one connection, in one process."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.leases: weakref.WeakSet[Leases] = weakref.WeakSet()

    def start(self) -> None:
        threading.Thread(target=self._run, name="fast-shm-cluster-heartbeat", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_SECONDS)
            try:
                if self._connection.outage is None:
                    self._report()
            except UnreachableError:
                pass  # what is held is reported before anything is asked again
            except Exception:
                log.exception("reporting held permits to the server failed")

    def _report(self) -> None:
        for leases in list(self.leases):
            keys = list(leases.keys)
            for start in range(0, len(keys), _MOST):
                found = [leases.due(key) for key in keys[start : start + _MOST]]
                due = [each for each in found if each is not None]
                if due:
                    answers = self._connection.call([request for request, _ in due])
                    for (request, lease), answer in zip(due, answers, strict=True):
                        leases.put(request, lease, answer)
