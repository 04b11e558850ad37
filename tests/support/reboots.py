"""A host whose clocks a test sets, and which it reboots: in one process."""

from __future__ import annotations

import json
import sqlite3
import time
from typing import Any

import pytest

from fast_litellm_shm import Budget, Quota, RateLimiter, Segment
from fast_litellm_shm._shared.named_limiter import SharedLimits
from fast_litellm_shm._shared.native import lib
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.grantor import ServerRates
from fast_litellm_shm.cluster.quota import ClusterQuota
from fast_litellm_shm.cluster.token_lease import TokenLeases
from fast_litellm_shm.durable import StateFile, clock
from fast_litellm_shm.durable.books import Books
from fast_litellm_shm.durable.grantor import File
from fast_litellm_shm.durable.link import FileLink
from fast_litellm_shm.limits import LimitSpec
from support.names import remove

START = 1_800_000_000 * 10**9  # ns: the time of day at the beginning


def leases_of(limiter: RateLimiter) -> TokenLeases:
    assert isinstance(limiter._grantor, ServerRates)
    return limiter._grantor.leases


def link_of(limiter: RateLimiter) -> FileLink:
    found = leases_of(limiter).connection
    assert isinstance(found, FileLink)
    return found


def of_quota(quota: Quota) -> FileLink:
    assert isinstance(quota._grantor, ClusterQuota)
    found = quota._grantor.connection
    assert isinstance(found, FileLink)
    return found


def books_of(budget: Budget) -> Books:
    assert budget._books is not None
    return budget._books


def _end(link: FileLink) -> None:
    """It gives nothing back when the test's process ends."""
    link.ending = lambda: None  # type: ignore[method-assign]


class Host:
    """Its file's clock stands still unless a test moves it; the segment's own clock is the
    kernel's. So a test that lets hours pass reboots. (A segment's time of day is the host's.)"""

    def __init__(self, name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name, self.folder = name, folder
        self.boots, self.since_boot, self.time_of_day = 1, 10**12, START
        monkeypatch.setattr(clock, "boot", lambda: f"boot {self.boots}")
        monkeypatch.setattr(clock, "since_boot", lambda: self.since_boot)
        monkeypatch.setattr(clock, "time_of_day", lambda: self.time_of_day)
        self.segment = self._made()
        self.links: list[FileLink] = []

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        for each in self.links:
            each.store.close()
            _end(each)
        lib.fshm_wall_pretend(self.segment._handle, 0)

    def _made(self) -> Segment:
        segment = Segment(self.name, capacity=1000)
        self._show(segment)
        return segment

    def _show(self, segment: Segment) -> None:
        lib.fshm_wall_pretend(segment._handle, self.time_of_day - time.time_ns())

    def set_clock(self, ns: int) -> None:
        """The time of day, by hand."""
        self.time_of_day = ns
        self._show(self.segment)

    def limiter(self, *limits: LimitSpec, name: str = "free", **given: Any) -> RateLimiter:
        given.setdefault("durable", StateFile(self.folder))
        made = RateLimiter(*limits, name=name, segment=self.segment, **given)
        self.links.append(link_of(made))
        return made

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.name}.db"

    def rows(self) -> dict[bytes, list[list[int]]]:
        """The states of each key, as the file has them."""
        with sqlite3.connect(self.path) as db:
            found = db.execute("SELECT name, states FROM key").fetchall()
        db.close()
        return {name: json.loads(states) for name, states in found}

    def pass_time(self, seconds: float) -> None:
        self.since_boot += round(seconds * 1e9)
        self.set_clock(self.time_of_day + round(seconds * 1e9))

    def remove_segment(self) -> None:
        """As `fast-shm rm` does: what it had is gone."""
        remove(self.name)
        self.segment = self._made()

    def lose_power(self, down: float = 60.0) -> None:
        """The processes and the segment are gone, and what the file had is there."""
        for each in self.links:
            each.store.close()
            _end(each)
        self.links.clear()
        self.boots += 1
        self.pass_time(down)
        self.since_boot = 10**10
        self.remove_segment()

    def reboot(self, down: float = 60.0) -> None:
        """As the init system does it: the processes end first."""
        for each in {id(link): link for link in self.links}.values():
            with each.ensure(Background).reporting:  # as a process does at its end
                each.ending()
                each.call_all = lambda *_: None  # type: ignore[method-assign]  # no batch ahead
        self.lose_power(down)


def spend(limiter: SharedLimits, key: str, most: int = 10**6) -> int:
    """How many calls are admitted until one is denied."""
    for count in range(most):
        if not limiter.acquire(key):
            return count
    return most


__all__ = ["File", "Host", "books_of", "leases_of", "link_of", "of_quota", "spend"]
