"""Token leases: the tokens that a server has leased to this host, in batches. Nearly all calls of a
limiter are answered from them by csrc/leasing/token_lease.c. This module does the rest."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeAlias

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes, lease_from, states_of
from fast_litellm_shm._shared.native import Decision, ffi, lib
from fast_litellm_shm._shared.side_limiters import REFUSED, TOKEN_LEASES
from fast_litellm_shm.cluster import algorithms, settlement
from fast_litellm_shm.cluster.algorithms import most_leased
from fast_litellm_shm.cluster.background import Background
from fast_litellm_shm.cluster.link import Link, UnreachableError
from fast_litellm_shm.cluster.outage import Decided, Outage, decided
from fast_litellm_shm.cluster.single_flight import SingleFlight, beside
from fast_litellm_shm.cluster.sliding import KIND, SlidingCounts
from fast_litellm_shm.limiters.waiting import may_wait
from fast_litellm_shm.limits import Granted, LimitSpec, TokenBucket

Cost: TypeAlias = int | tuple[int, ...] | list[int]

_NONE = (0, 0, 0, 0)
_ONES = (1, 1, 1, 1)
_ADJUSTING = ("charge", "fill")
_MOST = 200  # keys in one pipeline
_LARGEST = 2**52  # a cost that no limit of a server admits


class TokenLeases:
    """Of one limiter: the tokens that are leased, what was refused of late, and which process asks
    the server about a key just now."""

    def __init__(self, limiter: SharedLimits, connection: Link) -> None:
        self.connection = connection
        self.limiter, self.states = limiter, states_of(limiter)
        self._limits: tuple[LimitSpec, ...] = ()
        self._rules: tuple[algorithms.Rule, ...] = ()
        self._sliding: SlidingCounts | None = None
        self.rules()  # or an error that names what a server cannot count
        self.name = limiter.name.encode("utf-8", "surrogatepass")
        if limiter.planned:
            connection.planned[self.name] = self
        granted = [Granted()] * len(limiter.limits)
        self._leased = beside(limiter, TOKEN_LEASES, granted)
        self._refused = beside(limiter, REFUSED, granted)
        self.single_flight = SingleFlight(limiter, connection.terms.timeout)
        self._brief: tuple[tuple[LimitSpec, ...], Any] = ((), None)
        self._outage = Outage(limiter, connection, self.rules, self.request, self.learn)
        lease_from(limiter, self._leased, self._refused, _ask=self.ask, _low=self.refill)

    def rules(self) -> tuple[algorithms.Rule, ...]:
        """Of the limits in force: they may change at run time."""
        found = self.limiter.limits
        if found != self._limits:
            self._rules = tuple(self.connection.rule(each) for each in found)
            sliding = self.connection.forgets and any(each.kind == KIND for each in self._rules)
            if sliding and self._sliding is None:
                self._sliding = SlidingCounts(self.limiter)
            self._limits = found
        return self._rules

    def _questions(self) -> Any:
        """questions.Questions, for the limits in force; None: they need the long way."""
        limits = self.limiter.limits
        if self._brief[0] is not limits:
            make, rules = self.connection.questions, self.rules()
            handles = (self.states, self._leased, self._refused, self.single_flight.states)
            made = make and make(self.connection, self.name, self._limits, rules, *handles)
            self._brief = (limits, made)
        return self._brief[1]

    def costs(self, cost: object) -> tuple[int, ...]:
        """One for each limit."""
        count = len(self.limiter.limits)
        if cost is None:
            return (1,) * count
        if isinstance(cost, (tuple, list)):
            return tuple(int(each) for each in cost)
        return (int(cost),) * count  # type: ignore[call-overload]

    def is_refused(self, raw: bytes) -> bool:
        return self._refused.leased(raw)[1][0] > 0

    def refill(self, key: str | bytes, cost: object) -> None:
        """Have a thread ask for the next batch. Called by the native part when a call has brought
        the key's leased tokens to a low."""
        raw, costs = key_bytes(key), self.costs(cost)
        self.connection.ensure(Background).refill(self, raw, costs)

    def prepare(self, keys: Sequence[str | bytes], costs: int | Sequence[int]) -> None:
        """Ask for batches of all these keys that this host cannot answer, many in one round trip.
        Keys that were granted none (near a limit), and invalid costs, are left to ask()."""
        if len(keys) < 2:
            return
        each = costs if isinstance(costs, Sequence) else [costs] * len(keys)
        questions = self._questions()
        if questions is not None:
            self.connection.ensure(Background)
            with contextlib.suppress(UnreachableError):  # each key goes by the policy
                self.connection.check()
                questions.ahead(self._sound(keys, each))
            return
        due: dict[bytes, tuple[int, ...]] = {}
        for raw, wanted in self._sound(keys, each):
            have = self.look(raw)[0]
            enough = all(c <= left for c, left in zip(wanted, have, strict=True))
            if not enough and not self.is_refused(raw):
                due[raw] = wanted
        if len(due) > 1:
            asked = [(self, raw, costs) for raw, costs in due.items()]
            self.connection.ensure(Background).fetch(asked)

    def _sound(
        self, keys: Sequence[str | bytes], costs: Sequence[int]
    ) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Keys and costs that the server may be asked about together: each key once."""
        seen, last = set[bytes](), 0
        each: tuple[int, ...] = _NONE
        for key, cost in zip(keys, costs, strict=True):
            raw = key_bytes(key)
            if raw not in seen and type(cost) is int and 0 < cost < _LARGEST:
                if cost != last:
                    last, each = cost, self.costs(cost)
                seen.add(raw)
                yield raw, each

    # calls that the host cannot answer by itself

    def ask(self, op: int, key: str | bytes, cost: object) -> Decided:
        """Called by the native part."""
        raw, costs = key_bytes(key), self.costs(cost)
        self.connection.ensure(Background)
        try:
            if op == lib.FSHM_ACQUIRE:
                return self._acquire(raw, costs)
            if op == lib.FSHM_PEEK:
                return self._peek(raw, costs)
            if op == lib.FSHM_CHARGE:
                return self._adjust("charge", raw, costs)
            if op == lib.FSHM_REFUND:
                return self._adjust("refund", raw, costs)
        except UnreachableError:
            return self._outage.decide(op, raw, costs)
        raise exceptions.ClusterError(f"limiter {self.limiter.name!r}: no operation {op}")

    def _acquire(self, raw: bytes, costs: tuple[int, ...]) -> Decided:
        if max(costs) >= _LARGEST:
            self.states.count(raw, lib.FSHM_DENIED)
            return (0, 0, 0, lib.FSHM_NEVER, 0)
        self.connection.check()
        may_wait()
        questions = self._questions()
        if questions is not None:
            answered: Decided | None = questions.take(raw, costs)
            if answered is not None:
                return answered
        with self.single_flight.turn(raw) as (for_all, waited):
            if waited:  # another process has asked meanwhile
                found = self._spend(raw, costs)
                if found is not None:
                    return found
            # Tokens that are left and do not suffice go back, and count as the server's. A caller
            # that asks for itself alone leaves them to others.
            have = self.look(raw, take=True)[0] if for_all else _NONE
            answer = self._call("take" if for_all else "single", raw, costs, have)
        if answer.admitted:
            # for the statistics of the key: these tokens were granted, not spent from a lease
            self._spend(raw, _NONE)
            if answer.back_off_ns:
                self._refused.refuse(raw, costs, answer.back_off_ns)
            return (1, *self._left(answer, self.look(raw)[0]), 0, _reset_ns(answer))
        self.states.count(raw, lib.FSHM_DENIED)
        self._refused.refuse(raw, costs, answer.back_off_ns)
        left = self._left(answer, self.look(raw)[0])[1]
        return (0, answer.refused, left, answer.retry_after_ns, _reset_ns(answer))

    def _peek(self, raw: bytes, costs: tuple[int, ...]) -> Decided:
        have, _ = self.look(raw)
        if any(costs) and all(cost <= left for cost, left in zip(costs, have, strict=True)):
            found = self.states.apply(lib.FSHM_PEEK, raw, costs)
            return (1, found.limit_index, found.remaining + min(have), 0, found.reset_after_ns)
        answer = self._call("look", raw, costs)
        index, left = self._left(answer, have)
        index = index if answer.admitted else answer.refused
        return (int(answer.admitted), index, left, answer.retry_after_ns, _reset_ns(answer))

    def _adjust(self, operation: str, raw: bytes, costs: tuple[int, ...]) -> Decided:
        """Charge or refund after the fact."""
        if operation == "refund":
            of = settlement.Refund(self, raw, costs, None)
            (answer,) = settlement.give_back(self.connection, [of])
        else:
            answer = self._call(operation, raw, costs)
        found = self.states.apply(lib.FSHM_PEEK, raw, _ONES)
        index, left = self._left(answer, self.look(raw)[0])
        return (int(left > 0), index, left, found.retry_after_ns, _reset_ns(answer))

    def settle(self, settled: settlement.Settlement, later: bool) -> None:
        """later: a thread reports it, for callers that may not wait."""
        if self.connection.alone:
            settled = self._settled_here(settled)
            if not any(settled.more) and not any(settled.less):
                return
        if later:
            self.connection.settlements.append(settled)
            self.connection.ensure(Background).wake()
            return
        with contextlib.suppress(UnreachableError):  # it is charged later
            settlement.report(self.connection, [settled])

    def _settled_here(self, settled: settlement.Settlement) -> settlement.Settlement:
        """Book it in the token lease, as far as that goes. Returns the rest."""
        raw, more, less = settled.raw, settled.more, settled.less
        leases = self._leased.handle
        if any(more):
            numbers, low = ffi.new("uint64_t[4]", more), ffi.new("uint32_t *")
            status = lib.fshm_spend(
                leases, ffi.NULL, ffi.NULL, raw, len(raw), numbers, 0, ffi.NULL, low
            )
            if low[0]:
                self.connection.ensure(Background).refill(self, raw, more)
            if status == lib.FSHM_ALLOWED:
                more = _NONE
        if any(less):
            most = ffi.new("uint64_t[4]", [most_leased(each.limit) for each in self.rules()])
            numbers, ends = ffi.new("uint64_t[4]", less), ffi.new("uint64_t[4]", settled.ends)
            out = ffi.new("uint64_t[4]")
            lib.fshm_token_lease_return(leases, raw, len(raw), numbers, ends, most, 0, out)
            less = tuple(each - done for each, done in zip(less, out, strict=False))
            self.unrefuse(raw)
        return settled._replace(more=more, less=less)

    def charge_later(self, raw: bytes, costs: Sequence[int]) -> None:
        """Charge it when the server is back."""
        self._outage.decide(lib.FSHM_CHARGE, raw, tuple(costs))

    # several levels, all or nothing: limiters/hierarchy.py

    def spend(self, raw: bytes, cost: Cost) -> tuple[Decision, Callable[[], object]]:
        """acquire(), and what gives back what it consumed. Nothing in an outage: what the policy
        admits was granted by nobody, so it may not come into a lease."""
        outage, have = self.connection.outage, self.look(raw)[1]
        until = [self.states.now() + ns if ns else 0 for ns in have]
        before = self.states.now()
        decision = self.limiter.acquire(raw, cost)
        if not decision or outage is not None or self.connection.outage is not None:
            return decision, lambda: None
        costs = self.costs(cost)
        ends: tuple[int, ...] = _NONE
        if not all(until):
            ends, until = self._asked(raw, before, decision, until)
        return decision, partial(self._give_back, raw, costs, until, ends)

    def _asked(
        self, raw: bytes, before: int, decision: Decision, until: list[int]
    ) -> tuple[tuple[int, ...], list[int]]:
        """Of a call that found no lease, so that the server granted it: the ends of its windows
        (0: not to be given back), and until when its tokens may lie in a lease."""
        now, have = self.states.now(), self.look(raw)[1]
        until = [
            end or (now + ns if ns and rule.kind == 0 else 0)
            for end, ns, rule in zip(until, have, self._rules, strict=False)
        ]
        # As in quota.py: what is known may be of the next window by now.
        last = before + int(decision.reset_after * 1e9) - 1000
        known = self.states.known(raw)[1]
        ends = [min(now + ns, last) for ns in known[: len(self._rules)]]
        for i, rule in enumerate(self._rules):
            if rule.kind == 0:
                ends[i] = 0
            elif rule.kind == KIND:  # what is known has no window of the server's
                ends[i] = before + rule.per_us * 1000
        return (*ends, *_NONE)[:4], until

    def _give_back(
        self, raw: bytes, costs: tuple[int, ...], until: Sequence[int], ends: tuple[int, ...]
    ) -> None:
        """Into the lease that it came from, or one of the same window; what does not fit there, to
        the server. A lease that ends later is of a later window: what was charged before counts in
        the earlier one."""
        alone = self.connection.alone
        most = [most_leased(each.limit) if alone else Granted().n for each in self.rules()]
        numbers, out = ffi.new("uint64_t[4]", (*costs, *_NONE)[:4]), ffi.new("uint64_t[4]")
        lib.fshm_token_lease_return(
            self._leased.handle, raw, len(raw), numbers,
            ffi.new("uint64_t[4]", (*until, *_NONE)[:4]),
            ffi.new("uint64_t[4]", (*most, *_NONE)[:4]), 0, out,
        )  # fmt: skip
        now = self.states.now()
        less = tuple(
            cost - done if end > now else 0
            for cost, done, end in zip(costs, out, ends, strict=False)
        )
        if any(less):
            settled = settlement.Settlement(self, raw, _NONE, less, ends)
            self.settle(settled, later=True)

    # what changes a key at the server, and raises ClusterError during an outage

    def block(self, raw: bytes, ns: int) -> None:
        """Deny a key for so long. What other hosts have leased before, they may spend."""
        with self._needed("blocked"):
            have = self.look(raw, take=True)[0]
            self._call("block", raw, (ns,) * len(self._rules), have)

    def reset(self, raw: bytes) -> bool:
        """Forget what a key has consumed, at the server and in this host. Returns whether the
        server knew of any. What other hosts have leased before, they may spend."""
        with self._needed("reset"):
            self.look(raw, take=True)
            self.states.reset(raw)
            self.unrefuse(raw)
            asked = [self.request(operation, raw, _NONE)[0] for operation in ("look", "reset")]
            before, _ = self.connection.call(asked)
        return any(each.used for each in before.limits)

    def reset_all(self) -> int:
        """reset() of each key that the server knows of this limiter. Returns how many."""
        with self._needed("reset"):
            found = self.connection.keys(self.name)
            for states in (self._leased, self.states, self._refused):
                states.reset()
            request, _ = self.request("reset", b"", _NONE)
            for at in range(0, len(found), _MOST):
                part = [request._replace(at=name) for name in found[at : at + _MOST]]
                self.connection.call(part)
        return len(found)

    @contextlib.contextmanager
    def _needed(self, what: str) -> Iterator[None]:
        try:
            self.connection.check()  # before anything is done here
            yield
        except UnreachableError as error:
            self.connection.ensure(Background)  # whose thread tries the server again
            shown, no_answer = self.connection.terms.shown, self.connection.no_answer
            raise self.connection.error(
                f"limiter {self.limiter.name!r}: nothing was {what}, since {shown} {no_answer} "
                f"({error}): try again later"
            ) from error

    # requests and answers

    def request(
        self,
        operation: str,
        raw: bytes,
        costs: Sequence[int],
        given: Sequence[int] = _NONE,
    ) -> tuple[algorithms.Request, int]:
        """And the segment's time before it is sent: the answer is about a later instant. (Refunds:
        refund_request().)"""
        rules = self.rules()
        used, left = self.states.known(raw)
        kept = self.look(raw)[0] if operation == "ahead" else _NONE
        if self.connection.alone and operation in _ADJUSTING:
            # What is leased is not used: else it would count against a debt.
            given = self.look(raw, take=True)[0]
        # The limits may have become more since these were counted: a new one is asked for nothing.
        costs, given = ((*each, *_NONE)[: len(rules)] for each in (costs, given))
        known = tuple(
            ns if rule.kind == 0 else ns // 1000 for rule, ns in zip(rules, left, strict=False)
        )
        sent = self.states.now()
        before: tuple[int, ...] = _NONE
        if self._sliding is not None:
            used, before, known = self._sliding.recall(raw, rules, used, known)
        if not self.connection.alone:  # a file has the calendar's arithmetic itself
            minute = self.states.wall() // 60_000_000_000
            rules = tuple(
                algorithms.dated(rule, limit, minute)
                for rule, limit in zip(rules, self._limits, strict=True)
            )
        request = algorithms.Request(
            operation, self.name, raw, rules, costs, kept, given, used, before, known
        )
        return request, sent

    def refund_request(
        self, look: algorithms.Request, found: algorithms.Answer, costs: tuple[int, ...]
    ) -> tuple[algorithms.Request, int]:
        """Of the windows that this look has found."""
        given = look.given
        if self.connection.alone:  # what is leased is not used: else it would be given back
            given = (*self.look(look.key, take=True)[0], *_NONE)[: len(look.rules)]
        left = tuple(each.window for each in found.limits)
        request = look._replace(operation="refund", costs=costs, given=given, left=left)
        return request, self.states.now()

    def _call(
        self, operation: str, raw: bytes, costs: Sequence[int], given: Sequence[int] = _NONE
    ) -> algorithms.Answer:
        request, sent = self.request(operation, raw, costs, given)
        (found,) = self.connection.call([request])
        answer: algorithms.Answer = found
        self.learn(request, answer, sent)
        return answer

    def learn(self, request: algorithms.Request, found: algorithms.Answer, sent: int) -> None:
        """Put granted tokens into the lease, and what the server says into the limiter's states.
        sent: of request()."""
        raw = request.key
        used, left = [each.used for each in found.limits], [each.left_ns for each in found.limits]
        self.states.learn(raw, used, left, sent)
        if self._sliding is not None:
            self._sliding.keep(raw, request.rules, found, sent)
        if request.operation not in ("take", "ahead"):
            return
        leases = ffi.new("fshm_token_lease[4]")
        for i, each in enumerate(found.limits):
            kept = request.kept[i] if each.redated else 0
            tokens = found.batch * request.costs[i]
            leases[i] = {"tokens": tokens, "kept": kept, "until_ns": sent + each.lease_ns}
        lib.fshm_token_lease_put(self._leased.handle, raw, len(raw), leases, 0)

    def look(self, raw: bytes, take: bool = False) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Leased tokens that are left, and for how many ns, by limit. take: and take them out."""
        left, ns = self._leased.leased(raw, take)
        count = len(self._rules)
        return left[:count], ns[:count]

    def unrefuse(self, raw: bytes) -> None:
        self._refused.refuse(raw, _NONE, 0)

    def _spend(self, raw: bytes, costs: tuple[int, ...]) -> Decided | None:
        """As the native part does: None where the server must be asked."""
        out, low = ffi.new("fshm_decision *"), ffi.new("uint32_t *")
        numbers = ffi.new("uint64_t[4]", costs)
        handles = self._leased.handle, self._refused.handle, self.states.handle
        status = lib.fshm_spend(*handles, raw, len(raw), numbers, 0, out, low)
        if status == lib.FSHM_ASK:
            return None
        if status < 0:
            self.states.fail(status)
        if low[0]:
            self.connection.ensure(Background).refill(self, raw, costs)
        return (status, *decided(out)[1:])

    def _left(self, answer: algorithms.Answer, have: Sequence[int]) -> tuple[int, int]:
        """The limit with least left, and how much that is: at the server, and leased."""
        most = [each.burst if isinstance(each, TokenBucket) else each.n for each in self._limits]
        left = [
            max(n - each.used, 0) + mine
            for n, each, mine in zip(most, answer.limits, have, strict=False)
        ]
        least = min(left)
        return left.index(least), least


def _reset_ns(answer: algorithms.Answer) -> int:
    return max(each.left_ns for each in answer.limits)
