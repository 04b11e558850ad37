"""Permit leases: how many permits of a key this host may hold, as a server grants them. Nearly all
calls are answered within them by csrc/leasing/permit_lease.c. This module does the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared.named_limiter import InnerLimits, key_bytes, lease_from, states_of
from fast_litellm_shm._shared.native import ffi, lib
from fast_litellm_shm._shared.side_limiters import PERMIT_LEASES, REFUSED
from fast_litellm_shm.cluster import permits
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.connection import Connection
from fast_litellm_shm.cluster.heartbeat import Heartbeat
from fast_litellm_shm.cluster.link import UnreachableError
from fast_litellm_shm.cluster.outage import known_hosts
from fast_litellm_shm.cluster.single_flight import SingleFlight, beside
from fast_litellm_shm.limiters.waiting import may_wait

_LOOK_AGAIN = 0
_NO_ROOM = -1_000_000_000  # denied; try again in a second: as one host alone has it
_TRIES = 4  # of a request whose answer came after another one's
_RENEW_NS = 5_000_000_000  # with less than that left
_OVERDUE_NS = 3_500_000_000  # the processes that hold them had more than a second to report them
_RESTS_NS = 700_000_000  # since the last request, before unused permits go back


class PermitLease(NamedTuple):
    """``fshm_permit_lease``, of a key. version: of the lease; the server compares it."""

    version: int
    leased: int
    held: int
    reported: int
    left_ns: int
    now_ns: int

    @property
    def unused(self) -> int:
        return max(self.leased - self.held, 0)


Asked: TypeAlias = tuple[permits.Request, PermitLease]  # as the lease was before


class PermitLeases:
    """Of one limiter, in one process."""

    def __init__(self, limiter: InnerLimits, connection: Connection) -> None:
        self.connection, self.cluster = connection, connection.cluster
        self.name = limiter.name.encode("utf-8", "surrogatepass")
        self.limiter, self.states = limiter, states_of(limiter)
        self._leased = beside(limiter, PERMIT_LEASES, [limits.Granted()])
        self._refused = beside(limiter, REFUSED, [limits.Granted()])
        self._single_flight = SingleFlight(limiter, self.cluster.timeout)
        # Keys whose permits this process may hold: how many looks in a row found none held.
        self.keys: dict[str | bytes, int] = {}
        # What all hosts hold too much, since the limit was lowered: a fair share, and how much.
        self._crowded: dict[bytes, tuple[int, int]] = {}
        lease_from(
            limiter, self._leased, self._refused, self.keys, _note=self.note, _grant=self.grant
        )
        connection.unreported.add(self)

    # for the native part

    def note(self, key: str | bytes) -> None:
        """For a key that this process has not used of late."""
        self.keys.setdefault(key, 0)
        self.connection.ensure(Background)
        self.connection.ensure(Heartbeat).leases.add(self)

    def grant(self, key: str | bytes, tries: int) -> int:
        """Where this host holds all that it may. 0: retry. -1: denied until a release. Below -1:
        denied for that many ns. Above 0: how many may be held without the server."""
        raw = key_bytes(key)
        self.note(key)
        if not self.look(raw, begin=True).version:  # no place for what the server would grant
            return self._no_room()
        try:
            self.connection.check()
            may_wait()
            with self._single_flight.turn(raw) as (_, waited):
                # Another process has asked meanwhile. (After some tries: others take what it got.)
                if waited and tries < _TRIES and self.answers(raw):
                    return _LOOK_AGAIN
                if not self._ask(raw, 1):
                    return self._no_room()
        except UnreachableError:
            return self._alone()
        return _LOOK_AGAIN

    def _no_room(self) -> int:
        if self.limiter.on_full == "raise":
            self.states.fail(lib.FSHM_FULL)
        return _NO_ROOM

    def answers(self, raw: bytes) -> bool:
        """Can acquire() be answered without the server now?"""
        return self._refused.leased(raw)[1][0] > 0 or self.look(raw).unused > 0

    def _alone(self) -> int:
        policy, denied = self.cluster.on_outage, -self.connection.retry_after_ns
        if policy == "local":
            hosts = known_hosts(self.connection)
            return (self._most // hosts if hosts else 0) or denied
        return self._most if policy == "allow" else denied

    @property
    def _most(self) -> int:
        return int(self.limiter.limits[0].n)

    # for the heartbeat and the leader

    def due(self, key: str | bytes) -> Asked | None:
        """What to report of a key, once a second. Forgets the key where that is nothing."""
        # Out of the keys first: a taker that comes after the look finds it missing, and notes it.
        rests = self.keys.pop(key, None)
        if rests is None:
            return None
        raw = key_bytes(key)
        crowded = self._crowded.pop(raw, None)
        found = self.look(raw)
        if not found.leased and not found.held:
            return None
        self.keys[key] = 0 if found.held else rests + 1
        if crowded is not None:
            return self._report(raw, self.lower(raw, self._keep(found, *crowded)), 0)
        if found.left_ns < _RENEW_NS:
            return self._question(raw, 0)
        if found.unused and found.left_ns < permits.USED_NS - _RESTS_NS:
            all_of_it = found.unused == 1 or (not found.held and rests > 0)
            keep = found.held if all_of_it else found.leased - (found.unused + 1) // 2
            return self._report(raw, self.lower(raw, keep), 0)
        return None

    def overdue(self, raw: bytes) -> Asked | None:
        """What to report of a key with permits held that no process has reported in time."""
        found = self.look(raw)
        return self._question(raw, 0) if found.held and found.left_ns < _OVERDUE_NS else None

    def recalled(self, raw: bytes, share: int, need: int) -> None:
        """Others want permits: give back the unused ones. Where these are too few, and more are
        held than a fair share, give up as many of the held ones as are wanted, when they end."""
        found = self.look(raw)
        if not found.left_ns and not found.held:
            return  # no key of this host
        keep, unclean = self._keep(found, share, need), not found.version & 1
        if found.leased > keep or unclean:  # or fewer are held than was reported
            self.connection.call_all([(self, *self._report(raw, self.lower(raw, keep), 0))])
            self._crowded.pop(raw, None)  # the processes that hold them see to that

    @staticmethod
    def _keep(found: PermitLease, share: int, need: int) -> int:
        if found.unused >= need or found.held <= share:
            return found.held
        return max(share, found.held - need)

    def take_unreported(self) -> list[permits.Request]:
        """What is held, before anything is asked after an outage."""
        asked = [self._question(key_bytes(key), 0) for key in list(self.keys)]
        return [request for request, found in asked if found.reported]

    def put_back(self, requests: Sequence[Any]) -> None:
        """The next take_unreported() looks again."""

    def forked(self) -> None:
        """A child holds nothing yet: its parent's permits are its parent's."""
        self.keys.clear()

    # the server

    def _ask(self, raw: bytes, want: int) -> bool:
        """Whether another look is worth it: not where the segment has no room for the key."""
        for _ in range(_TRIES):
            request, found = self._question(raw, want)
            if not found.version:
                return False
            (answer,) = self.connection.call([request])
            if self.learn(request, answer, found):
                break
        return True

    def _question(self, raw: bytes, want: int) -> Asked:
        return self._report(raw, self.look(raw, begin=True), want)

    def _report(self, raw: bytes, found: PermitLease, want: int) -> Asked:
        numbers = self._most, found.version, found.reported, want
        return permits.Request(self.name, raw, *numbers), found

    def learn(self, request: permits.Request, answer: permits.Answer, found: PermitLease) -> bool:
        """Use the answer. False: the lease has another version by now, ask again."""
        raw = request.key
        leased = answer.leased if request.want else min(answer.leased, found.leased)
        done = answer.known and lib.fshm_permit_lease_put(
            self.states.handle, self._leased.handle, raw, len(raw), request.version, leased,
            found.now_ns + permits.USED_NS, 0,
        ) == lib.FSHM_OK  # fmt: skip
        if done and answer.back_off_ns:
            self._refused.refuse(raw, (1, 1, 1, 1), answer.back_off_ns)
        if done and answer.total > request.n:
            share = max(request.n // answer.hosts, 1)
            self._crowded[raw] = share, answer.total - request.n
        return bool(done)

    # the segment

    def look(self, raw: bytes, begin: bool = False) -> PermitLease:
        return self._call(lib.fshm_permit_lease_look, raw, begin)

    def lower(self, raw: bytes, to: int) -> PermitLease:
        return self._call(lib.fshm_permit_lease_lower, raw, to)

    def _call(self, call: Any, raw: bytes, argument: int) -> PermitLease:
        out = ffi.new("fshm_permit_lease *")
        call(self.states.handle, self._leased.handle, raw, len(raw), argument, 0, out)
        return PermitLease(out.word, out.leased, out.held, out.reported, out.left_ns, out.now_ns)
