"""Quota: one admission for a whole LLM call: requests and tokens a minute, and calls in
parallel."""

from __future__ import annotations

import functools
from typing import Any

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import key_grammar, moved_clock
from fast_litellm_shm._shared.moved_clock import monotonic_ns
from fast_litellm_shm._shared.named_limiter import InnerLimits
from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm._shared.wait_queue import Order, Place, Service
from fast_litellm_shm.limiters import grantors
from fast_litellm_shm.limiters.budget import USD, Budget, Reservation, Reservations, exact
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument, DurableArgument, Held
from fast_litellm_shm.limiters.rate import deadline_ns
from fast_litellm_shm.limiters.waiting import (
    ASYNCIO,
    BLOCKING,
    OnWait,
    Pace,
    Shed,
    Steps,
    Waits,
    Wish,
    in_turn,
    run,
    run_async,
    tenant_hash,
    wish,
)
from fast_litellm_shm.limits import FixedWindow, InFlight, LimitSpec, dollars

_SOON = 1_000_000  # ns: between two attempts
_LOOK_FOR_MONEY = 50_000_000  # ns: a call that settles wakes no caller of another limiter
_MOST_A_MINUTE, _MOST_PARALLEL = 2**31 - 1, 100_000


def _most(limit: LimitSpec | InFlight) -> LimitSpec | InFlight:
    return (
        InFlight(_MOST_PARALLEL) if isinstance(limit, InFlight) else FixedWindow(_MOST_A_MINUTE, 60)
    )


def _check_tokens(where: str, tokens: object) -> None:
    if type(tokens) is not int or not 0 <= tokens < 2**63:
        limits.check_tokens(f"{where}: tokens", tokens)


class Admission:
    """The answer of :meth:`Quota.admit`: true when admitted, also after its release.

    When false: ``reason`` says which limit denied, ``retry_after`` when to try again (seconds;
    None: never; 0.0: when a call in flight ends), ``in_flight`` how many calls there are.
    """

    __slots__ = (
        "_charged", "_key", "_permit", "_quota", "_released", "_requests", "_reservation",
        "_service", "_unpriced", "allowed",
    )  # fmt: skip

    def __init__(
        self, quota: Quota, key: str | bytes, permit: Held, tokens: int, requests: int = 1
    ) -> None:
        self._quota, self._key, self._permit = quota, key, permit
        self._charged, self._requests = tokens, requests
        self._service: Service | None = None  # where it waited: what its tenant was served
        self._reservation: Reservation | Reservations | None = None  # of the quota's budget
        self._unpriced = False  # it is settled, and nobody has said what it cost
        self.allowed = allowed = permit.allowed
        self._released = not allowed

    def _with(self, reservation: Reservation | Reservations) -> Admission:
        self._reservation = reservation
        if not reservation:
            self.cancel()
            self.allowed = False
        elif not self.allowed:
            reservation.release()
        return self

    @property
    def decision(self) -> Decision:
        """The Decision behind it: remaining, retry_after, reset_after, limit."""
        return self._permit.decision

    @property
    def retry_after(self) -> float | None:
        """Seconds until it would be admitted; None: never; 0.0: when a call in flight ends."""
        if self._reservation is not None and not self._reservation:
            return self._reservation.retry_after
        return self._permit.decision.retry_after

    @property
    def in_flight(self) -> int:
        """When too many were in flight: how many."""
        return self._permit.in_flight

    @property
    def released(self) -> bool:
        """True: the call was admitted, and its permit has been released."""
        return self.allowed and self._released

    @property
    def reason(self) -> str:
        """ "Request allowed", or which limit denied: "rpm", "tpm", "max_parallel" or "budget"."""
        if self._reservation is not None and not self._reservation:
            return "budget"
        return "Request allowed" if self.allowed else self._quota._limit_name(self._permit)

    def settle(self, tokens: int, usd: USD | None = None) -> None:
        """Settle the actual number of tokens, and with ``usd`` what the call cost. Tokens beyond
        the estimate are charged. If they exceed the limit, the key is in debt, and its next
        requests are denied until the debt is paid. Unused tokens are given back, as long as their
        minute lasts. It can be called again, with a later number of tokens; money is settled
        once. Without ``usd``, what was reserved is spent when the admission is released: a call
        that was made is not free."""
        if type(tokens) is not int or not 0 <= tokens < 2**63:
            limits.check_tokens("settle: tokens", tokens)
        if self._reservation is not None:
            self._unpriced = usd is None
            if usd is not None:
                self._reservation.settle(usd)
        quota, charged = self._quota, self._charged
        if self.allowed and tokens != charged and quota._tpm >= 0:
            if quota._grantor.limits is not quota._checked:
                quota._check_kinds()
            before, after = quota._before, quota._after
            used = before + (tokens,) + after
            quota._grantor.settle(self._key, before + (charged,) + after, used, self._permit)
            if self._service is not None:
                self._service.correct(tokens - charged)
            self._charged = tokens

    def _left(self) -> tuple[int, ...]:
        """What its key has left now, of rpm and tpm if it has them; over many hosts, what the
        server said last. (For max_parallel the permits would have to be counted.)"""
        quota = self._quota
        if quota._grantor.limits is not quota._checked:
            quota._check_kinds()  # or the numbers would be those of other limits
        return quota._grantor.left(self._key)

    def _count_request(self) -> None:
        """Charge one request more, into debt if need be."""
        if self.allowed and self._quota._names[0] == "rpm":
            before = self._quota._costs(self._charged, self._requests)
            after = self._quota._costs(self._charged, self._requests + 1)
            self._quota._grantor.settle(self._key, before, after, self._permit)
            self._requests += 1

    def cancel(self) -> None:
        """The call will not be made: give back the permit, and (as long as their minute lasts) the
        request and the tokens. After a release, or a second time, it does no harm."""
        if self._released:
            return
        self._unpriced = False
        try:
            tokens, self._charged = self._charged, 0  # once, wherever an exception strikes
            requests, self._requests = self._requests, 0
            charged = self._quota._costs(tokens, requests)
            none = (0,) * len(charged)
            self._quota._grantor.settle(self._key, charged, none, self._permit)
            if self._service is not None:
                self._service.correct(-tokens)
        finally:  # else the permit would be kept for good
            self.release()

    def release(self) -> bool:
        """The call is over: give the permit back. A second call does no harm. False: there was no
        permit left to give back."""
        if self._reservation is not None:
            if isinstance(self._reservation, Reservation) and self._unpriced:
                self._reservation.settle(dollars(self._reservation._nanos))
            else:
                self._reservation.release()
        if self._released:
            return False
        given_back = self._permit.release()
        self._released = True  # after it: an exception may strike in between
        return given_back or "max_parallel" not in self._quota._names

    def __bool__(self) -> bool:
        return self.allowed

    def __enter__(self) -> Admission:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

    async def __aenter__(self) -> Admission:
        return self

    async def __aexit__(self, *exc: object) -> None:
        self.release()

    def __repr__(self) -> str:
        state = "released" if self.released else "admitted" if self else f"denied by {self.reason}"
        return f"Admission({state}, key={self._key!r})"


class Quota(InSegment):
    """Requests a minute, tokens a minute and calls in parallel, for each key, over all workers.

    rpm, tpm: windows of 60 seconds that begin at a key's first request; 1 .. 2,147,483,647.
    max_parallel: 1 .. 100,000. At least one of them. name: processes that use the same name share.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: all
    three hold over all hosts that name the same server; False: this host alone; default: what
    FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``.

    durable: True, or a :class:`~fast_litellm_shm.durable.StateFile`: what was used of rpm and tpm
    outlives a reboot, as of a RateLimiter. Calls in parallel are of living processes, so no file
    keeps them; a budget is durable by its own argument.

    budget: a :class:`~fast_litellm_shm.Budget` that a call must fit into too, with its key, by the
    ``usd`` that admit() is given; settle() says what it cost.

    A denial consumes nothing of any of them. A worker that dies gives its permits back; what
    it charged stays charged. In a gateway::

        with quota.admit(key, tokens=estimate) as admission:
            if not admission:
                return too_many_requests(admission.reason, admission.retry_after)
            answer = call()
            admission.settle(tokens=answer.usage.total_tokens)
    """

    def __init__(
        self,
        rpm: int | None = None,
        tpm: int | None = None,
        max_parallel: int | None = None,
        *,
        name: str,
        segment: Segment | None = None,
        on_full: str = "share",
        cluster: ClusterArgument = None,
        durable: DurableArgument = None,
        budget: Budget | None = None,
        _numbered: bool = False,  # see numbered_quota
    ) -> None:
        found: list[LimitSpec | InFlight] = []
        names = []
        for label, value in (("rpm", rpm), ("tpm", tpm)):
            if value is None:
                continue
            try:
                found.append(FixedWindow(value, per=60))
            except (TypeError, ValueError) as error:
                raise type(error)(f"Quota: {label}: {error}") from None
            names.append(label)
        if max_parallel is not None:
            found.append(limits.in_flight("Quota", "max_parallel", max_parallel))
            names.append("max_parallel")
        if not found:
            raise ValueError("Quota needs at least one of rpm, tpm and max_parallel")
        self._names = tuple(names)
        self._tpm = names.index("tpm") if tpm is not None else -1
        self._ones = (1,) * len(names)
        self._before, self._after = self._ones[: max(self._tpm, 0)], self._ones[self._tpm + 1 :]
        self._checked: Any = None  # the limits whose kinds are known to be ours
        own = tuple(found)
        if _numbered:
            tail = key_grammar.tail_of(names, (each.n for each in own)).encode()
            most = tuple(map(_most, own))
            given: dict[str, Any] = {"name": name, "segment": segment, "on_full": on_full}
            shared = InnerLimits(most, **given, numbered=own)
            self._cluster: grantors.Replayed = False
            self._grantor: grantors.Quotas = grantors.Quotas(shared, tail)
        else:
            grantor = chosen(cluster, durable)
            self._cluster = grantor.argument
            self._grantor = grantor.quota(own, name=name, segment=segment, on_full=on_full)
        self._name, self._segment, self._pace = name, self._grantor.segment, Pace()
        self._given = (rpm, tpm, max_parallel)
        if budget is not None and not isinstance(budget, Budget):
            raise TypeError(
                f"Quota: budget must be a Budget, not {budget!r}; make one, for example "
                "Budget(usd=5, per='day', name='keys')"
            )
        self._budget = budget
        self._options = {
            "name": name, "on_full": on_full, "durable": durable, "budget": budget,
            "_numbered": _numbered,
        }  # fmt: skip

    @property
    def over_hosts(self) -> bool:
        """Whether a server grants its limits, for many hosts (or a file, for this one): a call may
        have to wait for it."""
        return self._grantor.may_wait

    def admit(self, key: str | bytes, tokens: int = 0, usd: USD = 0) -> Admission:
        """Admit a call that is estimated at ``tokens`` tokens and ``usd`` dollars, or say why
        not."""
        _check_tokens("admit", tokens)
        if self._budget is None:
            return self._admit(key, tokens, 1)
        with_money = self._budget.reserve(key, usd)
        if not with_money:
            return self._refused(key, tokens)._with(with_money)
        try:
            return self._admit(key, tokens, 1)._with(with_money)
        except BaseException:
            with_money.release()
            raise

    def _refused(self, key: str | bytes, tokens: int) -> Admission:
        return Admission(self, key, self._grantor.denied(key, self._costs(tokens)), tokens)

    def _admit(self, key: str | bytes, tokens: int, requests: int) -> Admission:
        """The same, for a call that counts as ``requests`` requests and takes one permit."""
        if requests == 1 and self._grantor.limits is self._checked:  # _costs(), without two calls
            costs = self._ones if self._tpm < 0 else self._before + (tokens,) + self._after
        else:
            costs = self._costs(tokens, requests)
        permit = self._grantor.admit(key, costs)
        return Admission(self, key, permit, tokens, requests)

    def _place(self, waits: Waits, key: str | bytes, order: Order) -> Place:
        return self._grantor.place(waits, key, order)

    def _waited_for(self, key: str | bytes) -> bool:
        return self._grantor.waited_for(key)

    async def admit_async(self, key: str | bytes, tokens: int = 0, usd: USD = 0) -> Admission:
        """:meth:`admit` for asyncio: where a server must be asked, a thread does that. Cancelled,
        it consumes and holds nothing. No method of the Admission waits, so an event loop can call
        them::

            async with await quota.admit_async(key, tokens=estimate) as admission:
        """
        _check_tokens("admit_async", tokens)
        if self._budget is None:
            return await self._admit_async(key, tokens, 1)
        with_money = await self._budget.reserve_async(key, usd)
        if not with_money:
            return self._refused(key, tokens)._with(with_money)
        try:
            return (await self._admit_async(key, tokens, 1))._with(with_money)
        except BaseException:
            with_money.release()
            raise

    async def _admit_async(self, key: str | bytes, tokens: int, requests: int) -> Admission:
        permit = await self._grantor.admit_async(key, self._costs(tokens, requests))
        return Admission(self, key, permit, tokens, requests)

    def wait(
        self,
        key: str | bytes,
        tokens: int = 0,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
        usd: USD = 0,
    ) -> Admission:
        """admit(), but waits until rates and permits have room, at most ``timeout`` seconds. It is
        denied when the time is up, or if the call can never fit. It waits for money that other
        calls have reserved, too; where too much is spent, it is denied at once, unless the budget's
        window ends within ``timeout``.

        Callers that wait for a key are served in the order in which they came, over all processes;
        a caller of many tokens holds up those behind it. admit() does not wait.

        tenant, weight, priority, max_waiting, on_wait: as of ConcurrencyLimiter.wait(). Tenants are
        served in tokens; settle() corrects what the tenant was served.
        """
        _check_tokens("wait", tokens)
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return run(self._wait(BLOCKING, key, tokens, timeout, wished, usd))

    async def wait_async(
        self,
        key: str | bytes,
        tokens: int = 0,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
        usd: USD = 0,
    ) -> Admission:
        """:meth:`wait` for asyncio. It needs no thread."""
        _check_tokens("wait_async", tokens)
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return await run_async(self._wait(ASYNCIO, key, tokens, timeout, wished, usd))

    def _wait(
        self,
        waits: Waits,
        key: str | bytes,
        tokens: int,
        timeout: float | None,
        wished: Wish,
        usd: USD,
    ) -> Steps[Admission]:
        deadline = deadline_ns(timeout)
        states, raw = self._grantor.queue(key)
        place = waits.place(states, raw, wished.order)
        money = None if self._budget is None else _Money(self._budget, key, usd, deadline)
        tries = _Tries(self, waits, key, tokens, place, money, deadline)
        try:
            if not states.waited_for(raw):
                admission, again = yield from tries.attempt()
                if again is None or timeout == 0:
                    return admission
            return (
                yield from in_turn(
                    waits, place, tries.attempt, tries.refused, deadline, wished, self._pace
                )
            )
        except Shed:
            return tries.refused()
        except BaseException:
            tries.undo()
            raise

    def queue_size(self, key: str | bytes, tenant: str | None = None) -> int:
        """How many callers of this host's processes wait for the key; tenant: of this one only."""
        states, raw = self._grantor.queue(key)
        return states.waiting(raw, None if tenant is None else tenant_hash(tenant))

    def in_flight(self, key: str | bytes) -> int:
        """Calls of the key in flight, of living processes of this host."""
        return self._grantor.in_flight(key)

    def remaining(self, key: str | bytes) -> dict[str, int]:
        """What is left of each limit now, by name: rpm, tpm, max_parallel. Over many hosts it asks
        the server where this host does not know."""
        self._check_kinds()
        out = dict(zip(self._names, self._grantor.left(key, ask=True), strict=False))
        if "max_parallel" in self._names:
            most = self._grantor.limits[-1].n
            out["max_parallel"] = max(most - self.in_flight(key), 0)
        return out

    def _check_kinds(self) -> None:
        """Check the kinds of the limits in force, and remember these limits: when the limits
        change, they are another tuple."""
        found = self._grantor.limits
        if len(found) != len(self._names):
            raise exceptions.SegmentError(
                f"Quota {self.name!r}: another process gave this name other kinds of limits than "
                f"{', '.join(self._names)}; give all workers the same, or another name"
            )
        self._checked = found

    def _costs(self, tokens: int, requests: int = 1) -> tuple[int, ...]:
        """The costs, one for each limit, in the order of these kinds."""
        if self._grantor.limits is not self._checked:
            self._check_kinds()
        return self._numbers(tokens, requests)

    def _numbers(self, tokens: int, requests: int = 1) -> tuple[int, ...]:
        if requests != 1:
            cost = {"rpm": requests, "tpm": tokens, "max_parallel": 1}
            return tuple(cost[name] for name in self._names)
        return self._ones if self._tpm < 0 else self._before + (tokens,) + self._after

    def _limit_name(self, permit: Held) -> str:
        index = getattr(permit, "index", permit.decision.limit_index)
        return self._names[index] if index < len(self._names) else "limit"

    def __reduce__(self) -> tuple[Any, ...]:
        options = {**self._options, "segment": self.segment, "cluster": self._cluster}
        return (_rebuild, (self._given, options))

    def __repr__(self) -> str:
        shown = ", ".join(limits.describe(limit) for limit in self._grantor.limits)
        return f"Quota({shown}, name={self.name!r})"


class _Money:
    """What a call that waits reserves of a budget."""

    __slots__ = ("_budget", "_deadline", "_denied", "_key", "_usd", "held")

    def __init__(self, budget: Budget, key: str | bytes, usd: USD, deadline: int) -> None:
        self._budget, self._key, self._deadline = budget, key, deadline
        self._usd = exact(usd, "wait: usd")
        self._denied: Reservation | None = None
        self.held: Reservation | None = None

    def reserve(self) -> tuple[Reservation, int | None]:
        """A reservation, and if it was denied, when to try again, in ns (None: not before the
        deadline). It counts as a denied call the first time alone."""
        if self._denied is None or self._budget.remaining(self._key) >= self._usd:
            self.held = self._budget.reserve(self._key, self._usd)
            self._denied = None if self.held else self.held
        found = self.held if self._denied is None else self._denied
        assert found is not None
        return found, None if found else self._again()

    def _again(self) -> int | None:
        usage = self._budget.usage(self._key)
        if usage.spent + self._usd <= usage.limit:
            return _LOOK_FOR_MONEY
        if usage.reset_after is None or self._usd > usage.limit:
            return None
        until = int(usage.reset_after * 1e9)
        if monotonic_ns() + until > self._deadline:
            return None
        if moved_clock.jump(self._budget.segment, until):
            return _SOON
        return max(min(until, _LOOK_FOR_MONEY), _SOON)

    def release(self) -> None:
        if self.held is not None:
            self.held.release()


def _release(found: tuple[Reservation, int | None]) -> None:
    found[0].release()


class _Tries:
    """Of a call that waits."""

    __slots__ = (
        "_costs", "_deadline", "_granted", "_key", "_money", "_place", "_quota", "_service",
        "_tokens", "_waits",
    )  # fmt: skip

    def __init__(
        self,
        quota: Quota,
        waits: Waits,
        key: str | bytes,
        tokens: int,
        place: Place,
        money: _Money | None,
        deadline: int,
    ) -> None:
        self._deadline = deadline
        self._quota, self._waits, self._key, self._tokens = quota, waits, key, tokens
        self._place, self._costs, self._money = place, quota._costs(tokens), money
        self._granted: Held | None = None
        self._service: Service | None = None

    def attempt(self) -> Steps[tuple[Admission, int | None]]:
        quota, key, grantor = self._quota, self._key, self._quota._grantor
        money = None
        if self._money is not None:
            money, again = yield from self._waits.ask(self._money.reserve, _release)
            if not money:
                return quota._refused(key, self._tokens)._with(money), again
        # First of all: what a local variable holds is kept by the traceback of an exception.
        self._granted = permit = yield from grantor.admitting(self._waits, key, self._costs)
        admission = Admission(quota, key, permit, self._tokens)
        if money is not None:
            admission._with(money)
        if admission:
            self._service = admission._service = self._place.served(max(self._tokens, 1))
            return admission, None
        retry = permit.decision.retry_after_ns
        if retry is None:
            return admission, None
        within = retry and monotonic_ns() + retry <= self._deadline
        if within and grantor.segment_clock and moved_clock.jump(quota.segment, retry):
            return admission, _SOON
        # Other calls settle, and give tokens back: look again soon, whatever it says.
        return admission, min(max(retry, _SOON), grantor.wake_ns) if retry else grantor.wake_ns

    def refused(self) -> Admission:
        permit = self._quota._grantor.denied(self._key, self._costs)
        return Admission(self._quota, self._key, permit, self._tokens)

    def undo(self) -> None:
        if self._money is not None:
            self._money.release()
        if self._granted is not None:
            admission = Admission(self._quota, self._key, self._granted, self._tokens)
            admission._service = self._service
            admission.cancel()


# For the LiteLLM plugin. Quotas of one name that may differ in their numbers, not in which of them
# they have: keys of different numbers are different keys. On this host alone.
numbered_quota = functools.partial(Quota, cluster=False, _numbered=True)
# admit() of several requests, without a check of the tokens.
admit_calls, admit_calls_async = Quota._admit, Quota._admit_async
count_request, left_of = Admission._count_request, Admission._left
# How its requests wait: a place in the queue of a key, and whether any caller waits for the key.
place_of, is_waited_for = Quota._place, Quota._waited_for


def _rebuild(given: tuple[int | None, ...], options: dict[str, Any]) -> Quota:
    return Quota(*given, **options)
