"""The heartbeat of permits: each process that holds some reports them to the server once in some
seconds, and gives back unused ones. A host that reports nothing loses what it was granted."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any, Protocol

from fast_litellm_shm.cluster.link import Learner, Link, UnreachableError, log

_SECONDS = 1.0


class Leases(Learner, Protocol):
    """PermitLeases, as this module uses them."""

    keys: dict[str | bytes, int]

    def due(self, key: str | bytes) -> tuple[Any, Any] | None: ...


class Heartbeat:
    """Of one connection, in one process."""

    def __init__(self, connection: Link) -> None:
        self._connection = connection
        self.leases: weakref.WeakSet[Leases] = weakref.WeakSet()

    def start(self) -> None:
        threading.Thread(target=self._run, name="fast-shm-cluster-heartbeat", daemon=True).start()

    def _run(self) -> None:
        while not self._connection.closed:
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
            due = (leases.due(key) for key in list(leases.keys))
            self._connection.call_all((leases, *each) for each in due if each is not None)
