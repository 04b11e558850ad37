"""What all workers of the host know of LiteLLM's deployments, by deployment id (``model_info.id``,
which is the same in every worker): requests in flight, latencies, cooldowns.

It is kept in the segment's table of deployments, as :class:`fast_litellm_shm.AdvancedRouter` does,
under the router name ``litellm``. The table remembers about 200 that are in use; beyond that, the
one that was idle for longest is forgotten. A deployment whose times to the first token are recorded
takes a second entry, under the router name ``litellm first token``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm.integrations.litellm.window_counter import WindowCounter
from fast_litellm_shm.routing.router import AdvancedRouter

NAME, FIRST_TOKEN = "litellm", "litellm first token"
_UNKNOWN = 2**64 - 1
_ENTRIES = 256  # csrc/core/layout.h, DEPLOYMENTS
_NO_ENTRY = 2**32 - 1  # reads as an entry that is not used
_LOOK_SECONDS = 1.0  # between two looks for new entries of FIRST_TOKEN
_INFOS, _REQUEST = ffi.typeof("fshm_deployment_info[]"), ffi.typeof("fshm_request *")
_ID, _IN_FLIGHT, _LATENCY, _COOLDOWN, _IDLE, _WORDS = 0, 1, 3, 5, 6, 8  # of an info
_MOST_IDS = 4096  # whose hashes are kept
_MOST_NS = 2**62
_HOUR_NS = 3600 * 10**9
_LONGEST_WINDOW = 400 * 86400.0  # seconds


class Deployments:
    """Opens the default segment; raises SegmentError where there is none."""

    def __init__(self) -> None:
        self._router = AdvancedRouter("least_busy", name=NAME)
        self._first_tokens = AdvancedRouter("least_busy", name=FIRST_TOKEN)
        self._entry_of: dict[int, int] = {}  # by hash of id, as last looked for
        self._look_at_all_again = 0.0  # time.monotonic()
        self._handle: Any = self._router._handle
        # The number of cooldowns so far: a reader looks at all entries only when it has changed.
        self._cooldowns = WindowCounter(
            "litellm cooldowns", 2**31 - 1, _LONGEST_WINDOW, on_full="share"
        )
        self._cooldowns_seen: int | None = None
        self._cooling: dict[int, int] = {}  # hash of id -> until, monotonic ns
        self._hashes: dict[tuple[str, str], int] = {}

    # in flight ------------------------------------------------------------------------------------

    def begin(self, deployment_id: str) -> Any:
        """Count a request of this process as in flight, until :meth:`end` or the death of the
        process. None where it cannot be counted: the segment's process table is full."""
        request = ffi.new(_REQUEST)
        entry = self._router._index(deployment_id)
        return request if lib.fshm_request_begin(self._handle, entry, 0, request) else None

    def end(self, request: Any) -> None:
        """Once. A forked child cannot end what its parent began."""
        lib.fshm_request_end(self._handle, request)

    def in_flight(self, deployment_ids: Sequence[str]) -> list[int]:
        """Requests in flight to each, of all living processes. Those of a dead process vanish
        within 0.5 s."""
        return self._look(self._entries(deployment_ids))[_IN_FLIGHT::_WORDS].tolist()

    # latency --------------------------------------------------------------------------------------

    def record(self, deployment_id: str, latency: float | None, first_token: float | None) -> None:
        """A request has succeeded. latency: in seconds, as the strategy measures it. first_token:
        seconds to the first token of a stream."""
        for router, seconds in ((self._router, latency), (self._first_tokens, first_token)):
            if seconds is not None:
                router.record(deployment_id, max(seconds, 0.0) * 1e3)
        hashed = self.hash_of(deployment_id, FIRST_TOKEN)
        if first_token is not None and hashed not in self._entry_of:
            self._look_at_all_again = 0.0

    def latencies(self, deployment_ids: Sequence[str]) -> list[tuple[float | None, float | None]]:
        """For each the decaying means of what :meth:`record` was given, in seconds. None: not
        known, or not recorded for an hour."""
        latencies = _means(self._look(self._entries(deployment_ids)))
        return list(zip(latencies, self._first_token_means(deployment_ids), strict=True))

    def _first_token_means(self, deployment_ids: Sequence[str]) -> list[float | None]:
        """Reading takes no entry: most deployments may have no streams. So another worker's first
        record of a deployment is seen up to a second later."""
        if time.monotonic() >= self._look_at_all_again:
            ids = self._look(list(range(_ENTRIES)))[_ID::_WORDS].tolist()
            self._entry_of = {known: entry for entry, known in enumerate(ids)}
            self._look_at_all_again = time.monotonic() + _LOOK_SECONDS
        hashes = [self.hash_of(each, FIRST_TOKEN) for each in deployment_ids]
        words = self._look([self._entry_of.get(hashed, _NO_ENTRY) for hashed in hashes])
        found = words[_ID::_WORDS].tolist()  # an entry may be another deployment's since the look
        return [
            mean if known == hashed else None
            for mean, known, hashed in zip(_means(words), found, hashes, strict=True)
        ]

    def _entries(self, deployment_ids: Sequence[str]) -> list[int]:
        return [self._router._index(each) for each in deployment_ids]

    def _look(self, entries: list[int]) -> memoryview:
        """The words of an fshm_deployment_info for each."""
        count = len(entries)
        found = ffi.new(_INFOS, max(count, 1))
        lib.fshm_deployment_look(self._handle, entries, count, 0, 0, found)
        return memoryview(ffi.buffer(found)).cast("Q")[: count * _WORDS]

    # cooldowns ------------------------------------------------------------------------------------

    def cool(self, deployment_id: str, seconds: float) -> None:
        """No worker is to use the deployment for so long. A cooldown that ends later stays."""
        lasts = min(int(seconds * 1e9), _MOST_NS)
        if lasts <= 0:
            return
        entry = self._router._index(deployment_id)
        lib.fshm_deployment_record(self._handle, entry, _UNKNOWN, 0, _UNKNOWN, 0, lasts, 0)
        self._cooldowns.add("changes", 1)

    def cooling(self) -> dict[int, int]:
        """Hashes of all ids that cool down now, and until when (:func:`time.monotonic_ns`)."""
        cooldowns = self._cooldowns.count("changes")
        if cooldowns != self._cooldowns_seen:
            self._cooling = self._look_for_cooling()
            self._cooldowns_seen = cooldowns
        if self._cooling:
            now = time.monotonic_ns()
            if any(until <= now for until in self._cooling.values()):
                # another dict, since another thread may be reading the old one
                self._cooling = {h: until for h, until in self._cooling.items() if until > now}
        return self._cooling

    def _look_for_cooling(self) -> dict[int, int]:
        words = self._look(list(range(_ENTRIES)))
        now = time.monotonic_ns()
        ids, left = words[_ID::_WORDS].tolist(), words[_COOLDOWN::_WORDS].tolist()
        return {known: now + ns for known, ns in zip(ids, left, strict=True) if ns}

    def hash_of(self, deployment_id: str, router: str = NAME) -> int:
        """The key of an id in :meth:`cooling`, and in the segment's table."""
        known = self._hashes.get((router, deployment_id))
        if known is None:
            raw = f"{router}\0{deployment_id}".encode("utf-8", "surrogatepass")
            known = int(lib.fshm_deployment_id(self._handle, raw, len(raw)))
            if len(self._hashes) >= _MOST_IDS:
                self._hashes.clear()
            self._hashes[router, deployment_id] = known
        return known

    def known_ids(self) -> list[str]:
        """The ids that were looked up in :meth:`cooling`."""
        return [deployment_id for router, deployment_id in self._hashes if router == NAME]


def _means(words: memoryview) -> list[float | None]:
    """The mean latency of each entry, in seconds."""
    found = zip(words[_LATENCY::_WORDS].tolist(), words[_IDLE::_WORDS].tolist(), strict=True)
    return [None if ns == _UNKNOWN or idle > _HOUR_NS else ns / 1e9 for ns, idle in found]
