"""What the workers of a host know together of LiteLLM's deployments, by deployment id
(``model_info.id``, which is the same in every worker).

Kept where :class:`fast_litellm_shm.AdvancedRouter` keeps it, under the name ``litellm``. About 200
deployments that are in use are remembered; beyond that the one that was idle for longest is
forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.limiters.rate import RateLimiter
from fast_litellm_shm.limits import FixedWindow
from fast_litellm_shm.routing.router import AdvancedRouter

NAME = "litellm"
_UNKNOWN = 2**64 - 1
_PLACES = 256  # csrc/core/layout.h, DEPLOYMENTS. A place that is none reads as one nobody uses.
_INFOS, _FLIGHT = ffi.typeof("fshm_deployment_info[]"), ffi.typeof("fshm_request *")
_ID, _IN_FLIGHT, _LATENCY, _COST, _COOLDOWN, _IDLE, _WORDS = 0, 1, 3, 4, 5, 6, 8  # of an info
_MOST_IDS = 4096  # whose hashes are kept
_MOST_NS = 2**62
_HOUR_NS = 3600 * 10**9
_AGES = 400 * 86400.0  # seconds


class Statistics:
    """Opens the default segment; raises SegmentError where none is to be had."""

    def __init__(self) -> None:
        self._router = AdvancedRouter("least_busy", name=NAME)
        self._handle: Any = self._router._handle
        # Counts cooldowns, so that who reads them need not look at all places every time.
        self._changes = RateLimiter(
            FixedWindow(2**31 - 1, per=_AGES), name="litellm cooldowns", cluster=False
        )
        self._seen: int | None = None
        self._cooling: dict[int, int] = {}  # hash of id -> until, monotonic ns
        self._hashes: dict[str, int] = {}

    # in flight ------------------------------------------------------------------------------------

    def begin(self, deployment_id: str) -> Any:
        """Count a request of this process as in flight until :meth:`end`, or until the process
        dies. None where it cannot be counted: the segment's process table is full."""
        flight = ffi.new(_FLIGHT)
        place = self._router._place(deployment_id)
        return flight if lib.fshm_request_begin(self._handle, place, 0, flight) else None

    def end(self, flight: Any) -> None:
        """Once. What a parent began before it forked is not its child's to end."""
        lib.fshm_request_end(self._handle, flight)

    def in_flight(self, deployment_ids: Sequence[str]) -> list[int]:
        """Requests in flight to each, of all living processes; a dead one's vanish within 0.5 s."""
        return self._look(deployment_ids)[_IN_FLIGHT::_WORDS].tolist()

    # latency --------------------------------------------------------------------------------------

    def record(self, deployment_id: str, seconds: float | None, first: float | None) -> None:
        """A request has succeeded. seconds: its latency, first: until the first token of a stream.
        The latter is kept in the place of a cost, which has a mean of its own and is not asked for
        here."""
        lib.fshm_deployment_record(
            self._handle, self._router._place(deployment_id), _ns(seconds), 1, _ns(first), 0, 0, 0
        )

    def latencies(self, deployment_ids: Sequence[str]) -> list[tuple[float | None, float | None]]:
        """Of each the decaying means, in seconds, of what record() was given; None: not known, or
        the deployment was not used for an hour."""
        words = self._look(deployment_ids)
        return [
            (None, None) if idle > _HOUR_NS else (_seconds(latency), _seconds(first))
            for latency, first, idle in zip(
                words[_LATENCY::_WORDS].tolist(),
                words[_COST::_WORDS].tolist(),
                words[_IDLE::_WORDS].tolist(),
                strict=True,
            )
        ]

    def _look(self, names: Sequence[str]) -> memoryview:
        """The words of an fshm_deployment_info for each."""
        count = len(names)
        found = ffi.new(_INFOS, max(count, 1))
        places = [self._router._place(name) for name in names]
        lib.fshm_deployment_look(self._handle, places, count, 0, 0, found)
        return memoryview(ffi.buffer(found)).cast("Q")[: count * _WORDS]

    # cooldowns ------------------------------------------------------------------------------------

    def cool(self, deployment_id: str, seconds: float) -> None:
        """Nobody is to use it for so long. A cooldown that lasts longer already stays."""
        lasts = min(int(seconds * 1e9), _MOST_NS)
        if lasts <= 0:
            return
        place = self._router._place(deployment_id)
        lib.fshm_deployment_record(self._handle, place, _UNKNOWN, 0, _UNKNOWN, 0, lasts, 0)
        self._changes.charge("changes", 1)

    def cooling(self) -> dict[int, int]:
        """Hashes of all ids that cool down now, and until when (:func:`time.monotonic_ns`)."""
        changes = self._changes.peek("changes").remaining
        if changes != self._seen:
            self._cooling = self._look_for_cooling()
            self._seen = changes
        if self._cooling:
            now = time.monotonic_ns()
            over = [hashed for hashed, until in self._cooling.items() if until <= now]
            if over:  # another dict, since another thread may be reading the old one
                self._cooling = {h: until for h, until in self._cooling.items() if until > now}
        return self._cooling

    def _look_for_cooling(self) -> dict[int, int]:
        found = ffi.new(_INFOS, _PLACES)
        lib.fshm_deployment_look(self._handle, list(range(_PLACES)), _PLACES, 0, 0, found)
        now = time.monotonic_ns()
        words = memoryview(ffi.buffer(found)).cast("Q")
        ids, left = words[_ID::_WORDS].tolist(), words[_COOLDOWN::_WORDS].tolist()
        return {known: now + ns for known, ns in zip(ids, left, strict=True) if ns}

    def hash_of(self, deployment_id: str) -> int:
        """What :meth:`cooling` knows an id by."""
        known = self._hashes.get(deployment_id)
        if known is None:
            raw = f"{NAME}\0{deployment_id}".encode("utf-8", "surrogatepass")
            known = int(lib.fshm_deployment_id(self._handle, raw, len(raw)))
            if len(self._hashes) >= _MOST_IDS:
                self._hashes.clear()
            self._hashes[deployment_id] = known
        return known


def _ns(seconds: float | None) -> int:
    return _UNKNOWN if seconds is None else min(max(int(seconds * 1e9), 0), _MOST_NS)


def _seconds(ns: int) -> float | None:
    return None if ns == _UNKNOWN else ns / 1e9
