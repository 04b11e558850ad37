"""A limiter of permits that a server grants to each host. Nearly all its calls are answered by
csrc/leasing/allowance.c within what this host was granted; here is the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fast_litellm_shm import limits
from fast_litellm_shm._shared.inspection import LEASED, REFUSED
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import address, ffi, lib
from fast_litellm_shm._shared.settings import warn_once
from fast_litellm_shm.cluster import background, heartbeat, connection, loops, permits
from fast_litellm_shm.cluster.single_flight import SingleFlight, open_limiter
from fast_litellm_shm.cluster.settings import Cluster

_LOOK_AGAIN = 0
_NO_ROOM = -1_000_000_000  # denied, and worth another call in a second: as one host alone has it
_TRIES = 4  # of a question that was overtaken by another one's answer
_RENEW_NS = 5_000_000_000  # with less than that left
_OVERDUE_NS = 3_500_000_000  # those who should have told had more than a second for it
_RESTS_NS = 700_000_000  # since the last question, before what is unused goes back


class Lease(NamedTuple):
    """``fshm_allowance``."""

    word: int
    allowance: int
    held: int
    told: int
    left_ns: int
    now_ns: int

    @property
    def unused(self) -> int:
        return max(self.allowance - self.held, 0)


class LeasedLimits(SharedLimits):
    """The permits of a name, of which the host has what the server grants."""

    _leases: PermitLeases

    def join(self, cluster: Cluster) -> PermitLeases:
        self._leases = PermitLeases(self, cluster)
        return self._leases

    def _note(self, key: str | bytes) -> None:
        """Called by the native part for a key that this process has not used of late."""
        self._leases.note(key)

    def _grant(self, key: str | bytes, tries: int) -> int:
        """Called by the native part where the host's allowance is used up: 0: look again; less: it
        is denied, for so many ns (-1: until a holder lets go); else how many may be held without
        the server."""
        found = self._leases.grant(key, tries)
        if found == _NO_ROOM and self._on_full == "raise":
            self._failed(lib.FSHM_FULL)
        return found


class PermitLeases:
    """Of one limiter, in one process."""

    def __init__(self, shared: LeasedLimits, cluster: Cluster) -> None:
        cluster.check()
        self.cluster, self.limiter = cluster, shared.name.encode("utf-8", "surrogatepass")
        self.link = connection.of(cluster, shared.segment)
        self._permits, self._segment, self._shared_name = (
            shared._handle,
            shared.segment,
            shared.name,
        )
        self._most: Any = lambda: int(shared.limits[0].n)
        self._allowances = open_limiter(shared, LEASED, [limits.Granted()])
        self._refused = open_limiter(shared, REFUSED, [limits.Granted()])
        self._asking = SingleFlight(shared, cluster.timeout)
        # Keys whose permits this process may hold: how often in a row nothing was held of them.
        self.keys: dict[str | bytes, int] = {}
        # What all hosts have too much of, since the limit was lowered: a fair share, and how much.
        self._crowded: dict[bytes, tuple[int, int]] = {}
        shared._bind_cluster(
            self._allowances,
            address(self._allowances),
            self._refused,
            address(self._refused),
            self.keys,
        )
        self.link.owing.add(self)

    # for the native part

    def note(self, key: str | bytes) -> None:
        self.keys.setdefault(key, 0)
        background.ensure(self.link)
        heartbeat.ensure(self.link).add(self)

    def grant(self, key: str | bytes, tries: int) -> int:
        raw = key_bytes(key)
        self.note(key)
        if not self.look(raw, begin=True).word:
            return _NO_ROOM  # in the segment: what the server granted could not be put in
        try:
            self.link.check()
            loops.may_wait()
            with self._asking.turn(raw) as (_, waited):
                # Somebody else has asked meanwhile. (After some tries: others take what it got.)
                if waited and tries < _TRIES and self.answers(raw):
                    return _LOOK_AGAIN
                if not self._ask(raw, 1):
                    return _NO_ROOM
        except connection.UnreachableError:
            return self._alone()
        return _LOOK_AGAIN

    def answers(self, raw: bytes) -> bool:
        """Can acquire() be answered without the server, as things are now?"""
        left, ns = ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        lib.fshm_wallet_look(self._refused, raw, len(raw), 0, 0, left, ns)
        return bool(ns[0]) or self.look(raw).unused > 0

    def _alone(self) -> int:
        policy, denied = self.cluster.on_outage, -self.link.retry_after_ns
        if policy == "local":
            hosts = host_count(self._segment)
            if not hosts:
                warn_once(
                    f"{self.cluster.shown} has never answered here, so it is not known how many "
                    "hosts share the limits: requests are denied until it does"
                )
                return denied
            return self._most() // hosts or denied
        return self._most() if policy == "allow" else denied

    # for the heartbeat and the leader

    def due(self, key: str | bytes) -> tuple[permits.Request, Lease] | None:
        """What is to be said of a key, once a second. Forgets it where that is nothing."""
        # Out of the keys first: whoever takes a permit after the look finds it missing, notes it.
        rests = self.keys.pop(key, None)
        if rests is None:
            return None
        raw = key_bytes(key)
        crowded = self._crowded.pop(raw, None)
        found = self.look(raw)
        if not found.allowance and not found.held:
            return None
        self.keys[key] = 0 if found.held else rests + 1
        if crowded is not None:
            return self._told(raw, self.lower(raw, self._keep(found, *crowded)), 0)
        if found.left_ns < _RENEW_NS:
            return self._question(raw, 0)
        if found.unused and found.left_ns < permits.USED_NS - _RESTS_NS:
            all_of_it = found.unused == 1 or (not found.held and rests > 0)
            keep = found.held if all_of_it else found.allowance - (found.unused + 1) // 2
            return self._told(raw, self.lower(raw, keep), 0)
        return None

    def overdue(self, raw: bytes) -> tuple[permits.Request, Lease] | None:
        """What is to be said of a key that some are held of, where nobody has said it in time."""
        found = self.look(raw)
        return self._question(raw, 0) if found.held and found.left_ns < _OVERDUE_NS else None

    def recalled(self, raw: bytes, share: int, need: int) -> None:
        """Others want permits: give back what is unused; where that is too little, and more is held
        than a fair share, let as many go as are wanted."""
        found = self.look(raw)
        if not found.left_ns and not found.held:
            return  # no key of this host
        keep, unclean = self._keep(found, share, need), not found.word & 1
        if found.allowance > keep or unclean:  # or fewer are held than was told
            request, found = self._told(raw, self.lower(raw, keep), 0)
            (answer,) = self.link.call([request])
            self.put(request, found, answer)
            self._crowded.pop(raw, None)  # those whose key it is see to that

    @staticmethod
    def _keep(found: Lease, share: int, need: int) -> int:
        if found.unused >= need or found.held <= share:
            return found.held
        return max(share, found.held - need)

    def owed(self) -> list[permits.Request]:
        """What is held, before anything is asked of a server that was away."""
        asked = [self._question(key_bytes(key), 0) for key in list(self.keys)]
        return [request for request, found in asked if found.told]

    def put_back(self, requests: Sequence[Any]) -> None:
        """It is looked at anew."""

    def forked(self) -> None:
        """What is held is told by who holds it."""

    # the server

    def _ask(self, raw: bytes, want: int) -> bool:
        """Whether another look is worth it: not where the segment has no room for the key."""
        for _ in range(_TRIES):
            request, found = self._question(raw, want)
            if not found.word:
                return False
            (answer,) = self.link.call([request])
            if self.put(request, found, answer):
                break
        return True

    def _question(self, raw: bytes, want: int) -> tuple[permits.Request, Lease]:
        return self._told(raw, self.look(raw, begin=True), want)

    def _told(self, raw: bytes, found: Lease, want: int) -> tuple[permits.Request, Lease]:
        told = (found.word, found.told, want)
        return permits.Request(self.limiter, raw, self._most(), *told), found

    def put(self, request: permits.Request, found: Lease, answer: permits.Answer) -> bool:
        """Use the answer; False: the word is another by now, ask again."""
        raw = request.key
        allowance = answer.allowance if request.want else min(answer.allowance, found.allowance)
        done = answer.known and lib.fshm_allowance_put(
            self._permits, self._allowances, raw, len(raw), request.word, allowance,
            found.now_ns + permits.USED_NS, 0,
        ) == lib.FSHM_OK  # fmt: skip
        if done and answer.calm_ns:
            one = ffi.new("uint64_t[4]", (1, 1, 1, 1))
            lib.fshm_wallet_refuse(self._refused, raw, len(raw), one, answer.calm_ns, 0)
        if done and answer.total > request.n:
            share = max(request.n // answer.hosts, 1)
            self._crowded[raw] = share, answer.total - request.n
        return bool(done)

    # the segment

    def look(self, raw: bytes, begin: bool = False) -> Lease:
        out = ffi.new("fshm_allowance *")
        lib.fshm_allowance_look(self._permits, self._allowances, raw, len(raw), begin, 0, out)
        return Lease(out.word, out.allowance, out.held, out.told, out.left_ns, out.now_ns)

    def lower(self, raw: bytes, to: int) -> Lease:
        out = ffi.new("fshm_allowance *")
        lib.fshm_allowance_lower(self._permits, self._allowances, raw, len(raw), to, 0, out)
        return Lease(out.word, out.allowance, out.held, out.told, out.left_ns, out.now_ns)
