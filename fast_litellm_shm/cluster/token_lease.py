"""A limiter whose limits are kept by a server for many hosts. Nearly all its calls are answered by
csrc/leasing/wallet.c from what the host was granted; here is the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.inspection import HELD, REFUSED
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import address, ffi, lib
from fast_litellm_shm.cluster import background, settlement, connection, loops, names, outage, algorithms, sliding
from fast_litellm_shm.cluster.single_flight import SingleFlight, open_limiter
from fast_litellm_shm.cluster.settings import Cluster
from fast_litellm_shm.limits import Granted, LimitSpec, TokenBucket

Told = tuple[int, int, int, int, int]  # status, limit_index, remaining, retry_after_ns, reset_ns

_NONE = (0, 0, 0, 0)
_MOST = 200  # keys in one pipeline
_LARGEST = 2**52  # a cost that no limit of a server admits


class TokenLeases:
    """What a limiter needs beside its own limits: what was granted, what was refused of late, and
    who of this host is asking for a key just now."""

    def __init__(self, shared: SharedLimits, cluster: Cluster) -> None:
        cluster.check()
        self.cluster = cluster
        self._shared = shared
        self._limits: tuple[LimitSpec, ...] = ()
        self._rules: tuple[algorithms.Rule, ...] = ()
        self._told: sliding.Told | None = None
        self.rules()  # or an error that names what a server cannot count
        self.limiter = shared.name.encode("utf-8", "surrogatepass")
        self.link = connection.of(cluster, shared.segment)
        count = len(shared.limits)
        self.purse = open_limiter(shared, HELD, [Granted()] * count)
        self._refused = open_limiter(shared, REFUSED, [Granted()] * count)
        self.asking = SingleFlight(shared, cluster.timeout)
        self._outage = outage.Outage(shared, self)
        shared._bind_cluster(self.purse, address(self.purse), self._refused, address(self._refused))

    def rules(self) -> tuple[algorithms.Rule, ...]:
        """Of the limits in force: they may change at run time."""
        found = self._shared.limits
        if found != self._limits:
            self._rules = tuple(algorithms.rule(each) for each in found)
            if self._told is None and any(each.kind == sliding.KIND for each in self._rules):
                self._told = sliding.Told(self._shared)
            self._limits = found
        return self._rules

    def costs(self, cost: object) -> tuple[int, ...]:
        """One for each limit."""
        count = len(self._shared.limits)
        if cost is None:
            return (1,) * count
        if isinstance(cost, (tuple, list)):
            return tuple(int(each) for each in cost)
        return (int(cost),) * count  # type: ignore[call-overload]

    def has(self, key: str | bytes, cost: object) -> bool:
        """Can acquire() be answered without the server, as things are now?"""
        raw, costs = key_bytes(key), self.costs(cost)
        if all(c <= left for c, left in zip(costs, self.look(raw)[0], strict=True)):
            return True
        return self._is_refused(raw)

    def _is_refused(self, raw: bytes) -> bool:
        left, ns = ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        lib.fshm_wallet_look(self._refused, raw, len(raw), 0, 0, left, ns)
        return bool(ns[0])

    def refill(self, key: str | bytes, cost: object) -> None:
        """Have the next batch fetched, in a thread."""
        background.refill(self, key_bytes(key), self.costs(cost))

    def prepare(self, keys: Sequence[str | bytes], costs: int | Sequence[int]) -> None:
        """Have batches fetched for all of these keys that the host cannot answer for, many in one
        round trip. What was not granted (near a limit), and what is no cost, is left to ask()."""
        each = costs if isinstance(costs, Sequence) else [costs] * len(keys)
        due: dict[bytes, tuple[int, ...]] = {}
        for key, cost in zip(keys, each, strict=True):
            raw = key_bytes(key)
            if raw in due or type(cost) is not int or not 0 < cost < _LARGEST:
                continue
            if not self.has(raw, cost):
                due[raw] = self.costs(cost)
        if len(due) > 1:
            background.fetch(self, due)

    # calls that the host cannot answer by itself

    def ask(self, op: int, key: str | bytes, cost: object) -> Told:
        raw, costs = key_bytes(key), self.costs(cost)
        background.ensure(self.link)
        try:
            if op == lib.FSHM_ACQUIRE:
                return self._acquire(raw, costs)
            if op == lib.FSHM_PEEK:
                return self._peek(raw, costs)
            if op == lib.FSHM_CHARGE:
                return self._book("charge", raw, costs)
            if op == lib.FSHM_REFUND:
                return self._book("refund", raw, costs)
        except connection.UnreachableError:
            return self._outage.decide(op, raw, costs)
        raise exceptions.ClusterError(f"limiter {self._shared.name!r}: no operation {op}")

    def _acquire(self, raw: bytes, costs: tuple[int, ...]) -> Told:
        if any(each >= _LARGEST for each in costs):
            self.count(raw, lib.FSHM_DENIED)
            return (0, 0, 0, lib.FSHM_NEVER, 0)
        self.link.check()
        loops.may_wait()
        with self.asking.turn(raw) as (claimed, waited):
            if waited:  # somebody else has asked meanwhile
                told = self._spend(raw, costs)
                if told is not None:
                    return told
            # What is left and does not suffice goes back, and counts as the server's. Who asks for
            # itself alone leaves it to others.
            have = self.look(raw, take=True)[0] if claimed else _NONE
            request, sent = self.request("take" if claimed else "single", raw, costs, have)
            (found,) = self.link.call([request])
            self.learn(request, found, sent)
        if found.admitted:
            # for the counts that people look at: what was granted for this call passes no wallet
            self._spend(raw, _NONE)
            if found.calm_ns:
                self._refuse(raw, costs, found.calm_ns)
            return (1, *self._left(found, self.look(raw)[0]), 0, self._reset_ns(found))
        self.count(raw, lib.FSHM_DENIED)
        self._refuse(raw, costs, found.calm_ns)
        wait = found.retry_after_ns
        left = self._left(found, self.look(raw)[0])[1]
        return (0, found.refused, left, wait, self._reset_ns(found))

    def _peek(self, raw: bytes, costs: tuple[int, ...]) -> Told:
        have, _ = self.look(raw)
        if any(costs) and all(cost <= left for cost, left in zip(costs, have, strict=True)):
            told = self._apply(self._shared._handle, lib.FSHM_PEEK, raw, costs)
            return (1, told.limit_index, told.remaining + min(have), 0, told.reset_after_ns)
        request, sent = self.request("look", raw, costs)
        (found,) = self.link.call([request])
        self.learn(request, found, sent)
        index, left = self._left(found, have)
        index = index if found.admitted else found.refused
        return (int(found.admitted), index, left, found.retry_after_ns, self._reset_ns(found))

    def _book(self, operation: str, raw: bytes, costs: tuple[int, ...]) -> Told:
        request, sent = self.request(operation, raw, costs)
        (found,) = self.link.call([request])
        self.learn(request, found, sent)
        if operation == "refund":
            self.unrefuse(raw)
        told = self._apply(self._shared._handle, lib.FSHM_PEEK, raw, _ONES)
        index, left = self._left(found, self.look(raw)[0])
        return (int(left > 0), index, left, told.retry_after_ns, self._reset_ns(found))

    def book(self, booked: settlement.Settlement, later: bool) -> None:
        """What a call has used beside what it was charged. later: told by a thread, for callers
        that may not wait."""
        if later:
            self.link.booked.append(booked)
            background.ensure(self.link).wake()
            return
        with contextlib.suppress(connection.UnreachableError):  # it is owed
            settlement.tell(self.link, [booked])

    def owe(self, raw: bytes, costs: Sequence[int]) -> None:
        """To be charged when the server is back."""
        self._outage.decide(lib.FSHM_CHARGE, raw, tuple(costs))

    # what changes a key at the server, and raises ClusterError while that is away

    def block(self, raw: bytes, ns: int) -> None:
        """Deny a key for so long. What other hosts were granted before, they may spend."""
        with self._needed("blocked"):
            have = self.look(raw, take=True)[0]
            request, sent = self.request("block", raw, (ns,) * len(self._rules), have)
            (found,) = self.link.call([request])
            self.learn(request, found, sent)

    def reset(self, raw: bytes) -> bool:
        """Forget what a key has consumed, at the server and in this host; whether the server knew
        of anything. What other hosts were granted before, they may spend."""
        with self._needed("reset"):
            self.look(raw, take=True)
            lib.fshm_reset_key(self._shared._handle, raw, len(raw))
            self.unrefuse(raw)
            asked = [self.request(operation, raw, _NONE)[0] for operation in ("look", "reset")]
            before, _ = self.link.call(asked)
        return any(each.used for each in before.limits)

    def reset_all(self) -> int:
        """reset() of each key that the server knows of this limiter; how many there were."""
        with self._needed("reset"):
            found = self.link.names(names.start(self.cluster.prefix, names.RATES, self.limiter))
            for each in (self.purse, self._shared._handle, self._refused):
                lib.fshm_reset_all(each)
            request, _ = self.request("reset", b"", _NONE)
            for at in range(0, len(found), _MOST):
                self.link.call([request._replace(at=name) for name in found[at : at + _MOST]])
        return len(found)

    @contextlib.contextmanager
    def _needed(self, what: str) -> Iterator[None]:
        try:
            self.link.check()  # before anything is done here
            yield
        except connection.UnreachableError as error:
            background.ensure(self.link)  # who tries it again
            raise exceptions.ClusterError(
                f"limiter {self._shared.name!r}: nothing was {what}, since {self.cluster.shown} "
                f"does not answer ({error}): try again when it does"
            ) from error

    def count(self, raw: bytes, status: int) -> None:
        """A call that was decided elsewhere than by the limiter's own meter: for people."""
        lib.fshm_count_call(self._shared._handle, raw, len(raw), status)

    # what the agent needs too

    def request(
        self,
        operation: str,
        raw: bytes,
        costs: Sequence[int],
        given: Sequence[int] = _NONE,
        ends: Sequence[int] | None = None,
    ) -> tuple[algorithms.Request, int]:
        """And the segment's time before it is sent: whatever the server says was so after it.
        ends: of the windows that it is about (ns), where they may not be those that are known."""
        used, left = ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        rules = self.rules()
        lib.fshm_known(self._shared._handle, raw, len(raw), 0, used, left)
        kept = self.look(raw)[0] if operation == "ahead" else _NONE
        # The limits may have become more since these were counted: of a new one nothing is asked.
        costs, given = ((*each, *_NONE)[: len(rules)] for each in (costs, given))
        known = tuple(
            int(left[i]) if each.kind == 0 else int(left[i]) // 1000 for i, each in enumerate(rules)
        )
        sent = int(lib.fshm_now(self._shared.segment._handle))
        if ends is not None:
            ends = (*ends, *_NONE)[: len(rules)]
            known = tuple(max((end - sent) // 1000, 0) for end in ends)
            costs = tuple(cost if left else 0 for cost, left in zip(costs, known, strict=True))
        before: tuple[int, ...] = _NONE
        if self._told is not None:
            used, before, known = self._told.recall(raw, rules, used, known)
        request = algorithms.Request(
            operation, self.limiter, raw, rules, costs, kept, given, tuple(used), before, known
        )
        return request, sent

    def learn(self, request: algorithms.Request, found: algorithms.Answer, sent: int) -> None:
        """Put what was granted into the wallet, and what was told into the limits' own cells."""
        raw, handle = request.key, self._shared._handle
        used = ffi.new("uint64_t[4]", [each.used for each in found.limits])
        left = ffi.new("uint64_t[4]", [each.left_ns for each in found.limits])
        lib.fshm_learn(handle, raw, len(raw), used, left, sent)
        if self._told is not None:
            self._told.keep(raw, request.rules, found, sent)
        if request.operation not in ("take", "ahead"):
            return
        leases = ffi.new("fshm_lease[4]")
        for i, each in enumerate(found.limits):
            kept = request.kept[i] if each.redated else 0
            tokens = found.batch * request.costs[i]
            leases[i] = {"tokens": tokens, "kept": kept, "until_ns": sent + each.lease_ns}
        lib.fshm_wallet_put(self.purse, raw, len(raw), leases, 0)

    def look(self, raw: bytes, take: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What is left in the wallet, and for how many ns, by limit. take: and take it out."""
        left, ns = ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        lib.fshm_wallet_look(self.purse, raw, len(raw), take, 0, left, ns)
        count = len(self._rules)
        return tuple(left)[:count], tuple(ns)[:count]

    def unrefuse(self, raw: bytes) -> None:
        self._refuse(raw, _NONE, 0)

    def _refuse(self, raw: bytes, costs: Sequence[int], ns: int) -> None:
        numbers = ffi.new("uint64_t[4]", costs)
        lib.fshm_wallet_refuse(self._refused, raw, len(raw), numbers, ns, 0)

    # helpers

    def _spend(self, raw: bytes, costs: tuple[int, ...]) -> Told | None:
        """As the native part does: None where the server must be asked."""
        numbers, out, low = (
            ffi.new("uint64_t[4]", costs),
            ffi.new("fshm_decision *"),
            ffi.new("uint32_t *"),
        )
        status = lib.fshm_spend(
            self.purse, self._refused, self._shared._handle, raw, len(raw), numbers, 0, out, low
        )
        if status == lib.FSHM_ASK:
            return None
        if status < 0:
            self._shared._failed(status)
        if low[0]:
            background.refill(self, raw, costs)
        return (status, out.limit_index, out.remaining, out.retry_after_ns, out.reset_after_ns)

    def _apply(self, handle: Any, op: int, raw: bytes, costs: Sequence[int]) -> Any:
        out = ffi.new("fshm_decision *")
        lib.fshm_apply(handle, op, raw, len(raw), ffi.new("uint64_t[4]", costs), 0, 0, out)
        return out

    def _left(self, found: algorithms.Answer, have: Sequence[int]) -> tuple[int, int]:
        """The limit with least left, and how much that is: at the server, and in the wallet."""
        most = [each.burst if isinstance(each, TokenBucket) else each.n for each in self._limits]
        left = [
            max(n - each.used, 0) + mine
            for n, each, mine in zip(most, found.limits, have, strict=False)
        ]
        least = min(left)
        return left.index(least), least

    @staticmethod
    def _reset_ns(found: algorithms.Answer) -> int:
        return max(each.left_ns for each in found.limits)


_ONES = (1, 1, 1, 1)
