"""The threads of a process that talk to the grantor, so that calls do not have to: for batches of
tokens that run low, and settlements; and the thread that may lead the host (leader.py)."""

from __future__ import annotations

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import util
from typing import TypeAlias

from fast_litellm_shm.cluster import settlement
from fast_litellm_shm.cluster.link import PROBE, Link, UnreachableError, log
from fast_litellm_shm.cluster.settlement import Leases

Due: TypeAlias = tuple[Leases, bytes, tuple[int, ...]]  # a key that needs a batch, and the costs

_MOST = 200  # keys in one pipeline


class Background:
    """Of one link."""

    def __init__(self, connection: Link) -> None:
        self._connection = connection
        self._due: queue.SimpleQueue[Due | None] = queue.SimpleQueue()
        self.reporting = threading.Lock()
        connection.on_lost = self.wake  # to try the grantor, until it is back

    def start(self) -> None:
        works: dict[str, Callable[[], object]] = {"refill": self._refill}
        if self._connection.lead is not None:
            works["lead"] = functools.partial(self._connection.lead, self._connection)
        for name, work in works.items():
            threading.Thread(
                target=work, name=f"fast-shm-{self._connection.component}_{name}", daemon=True
            ).start()
        # also where a child of multiprocessing ends, which runs no atexit
        util.Finalize(None, self.finish, exitpriority=0)

    def wake(self) -> None:
        self._due.put(None)

    def refill(self, leases: Leases, raw: bytes, costs: tuple[int, ...]) -> None:
        self._due.put((leases, raw, costs))

    def _refill(self) -> None:
        while not self._connection.closed:
            try:
                while self._connection.outage is not None and not self._connection.closed:
                    time.sleep(PROBE)
                    self._try_again()
                got = [self._due.get()]
                while len(got) < _MOST and not self._due.empty():
                    got.append(self._due.get())
                due = [each for each in got if each is not None]
                with self.reporting:
                    self._report()
                    self._ask_ahead({(id(each[0]), each[1]): each for each in due}.values())
            except UnreachableError:
                pass  # a call that finds no leased tokens goes by the policy
            except Exception:
                log.exception("settling, or refilling in advance, failed")

    def _try_again(self) -> None:
        while not self._due.empty():
            self._due.get()  # no batch is asked for in advance
        settlement.keep(self._connection)
        self._connection.probe()

    def finish(self) -> None:
        """Report what is left: a process that ends takes its threads along."""
        if self.reporting.acquire(timeout=2 * self._connection.terms.timeout):
            with contextlib.suppress(UnreachableError):
                self._report()
                self._connection.ending()

    def _report(self) -> None:
        while settlements := settlement.taken(self._connection):
            settlement.report(self._connection, settlements)

    def fetch(self, due: Sequence[Due]) -> None:
        """As refill(), in this thread; it is done when this returns. Nothing during an outage."""
        with contextlib.suppress(UnreachableError):  # each key goes by the policy
            for at in range(0, len(due), _MOST):
                self._ask_ahead(due[at : at + _MOST])

    def _ask_ahead(self, due: Iterable[Due]) -> None:
        asked = []
        with contextlib.ExitStack() as flights:
            for leases, raw, costs in due:
                permit = leases.single_flight.begin(raw)
                if permit is not None:  # else another process asks for it
                    flights.callback(leases.single_flight.end, permit)
                    asked.append((leases, *leases.request("ahead", raw, costs)))
            self._connection.call_all(asked)
