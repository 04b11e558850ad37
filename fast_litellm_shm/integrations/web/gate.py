"""Gate: checks a request against the first rule that matches it. It knows no framework."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, Generic, Literal, NoReturn, TypeAlias, TypeVar

from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.native import Decision
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, SegmentFullError
from fast_litellm_shm.integrations.web import responses
from fast_litellm_shm.integrations.web.keys import IPV6_PREFIX, LONGEST, client_address, key_of
from fast_litellm_shm.integrations.web.log import Log
from fast_litellm_shm.integrations.web.outcome import Left, Outcome, combined
from fast_litellm_shm.integrations.web.request import KEPT, Asked, Request, Target, target
from fast_litellm_shm.integrations.web.routes import Routes
from fast_litellm_shm.integrations.web.rules import Cost, Rule
from fast_litellm_shm.integrations.web.turn import Turns
from fast_litellm_shm.limiters.choice import chosen
from fast_litellm_shm.limiters.grantors import ClusterArgument, Grantor, Held
from fast_litellm_shm.limiters.waiting import ASYNCIO, BLOCKING, Shed, Wish, run, wish

_App = TypeVar("_App")
# Awaits a call that waits for its turn, and cancels it when the client has gone.
Guard: TypeAlias = "Callable[[Coroutine[Any, Any, Held]], Awaitable[Held]]"
_LAST = -100  # the lowest priority
_NOT_ASKED: Any = object()
_BAD_COST = (TypeError, ValueError, OverflowError)  # what a limiter raises for one


class _Opened:
    """A rule and what grants its limits."""

    def __init__(self, rule: Rule, app: str, segment: Segment | None, grantor: Grantor) -> None:
        self.rule = rule
        name, most = f"{app}: {rule.name}", grantor.longest_name(rule.limits)
        if len(name.encode("utf-8", "replace")) > most:
            raise ValueError(
                f"{name!r}, the name of the application and of a rule, has more than {most} bytes; "
                "give the rule a shorter: Rule(..., name=...)"
            )
        # In a flood of new keys those without room are limited together; permits have no such
        # counter, so there a full segment raises an error, which is logged.
        on_full = "raise" if rule.in_flight is not None else "share"
        self._grantor = grantor.quota(
            rule.limits, name=name, segment=segment, on_full=on_full, settles=False
        )
        self._turns = Turns(self._grantor) if rule.wait else None
        self._policies = responses.NO_POLICIES
        #: Whether a request is admitted or refused by one native call.
        self.at_once = not (rule.wait or callable(rule.cost) or self._grantor.may_wait)
        #: Whether that call needs nothing of a request but its client's address.
        self.usual = (
            self.at_once and rule.key is client_address and not (rule.exempt or rule.dry_run)
        )
        admit, cost = self._grantor.admit, rule.cost
        #: The call: of a key.
        self.admit_at_once: Callable[[str | bytes], Held] = admit  # type: ignore[assignment]
        if self.at_once and not callable(cost) and cost != 1:  # which is what it takes by itself
            self.admit_at_once = functools.partial(admit, cost=self._cost(cost))  # type: ignore[call-arg]

    def _cost(self, cost: Cost) -> Cost:
        """With that of the permit."""
        if isinstance(cost, tuple) and self.rule.in_flight is not None:
            return (*cost, 1)
        return cost

    def policies(self) -> responses.Policies:
        """Of the limits in force, which may be changed."""
        found = self._grantor.limits
        if found is not self._policies.found and found != self._policies.found:
            self._policies = responses.Policies(self.rule.public_name, found, self.rule.dry_run)
        return self._policies

    async def admit(
        self,
        key: str | bytes,
        cost: Cost,
        may_await: bool,
        wishing: Callable[[], Awaitable[Wish]],
        guard: Guard | None,
    ) -> Outcome:
        """may_await: where a server must be asked, a thread does that. wishing: how to wait, where
        the request has to. Cancelled, it holds nothing; what it was granted is consumed."""
        cost = self._cost(cost)
        grantor, turns = self._grantor, self._turns
        if turns is None or not grantor.waited_for(key):
            permit = await grantor.admit_async(key, cost) if may_await else grantor.admit(key, cost)
            if turns is None or permit.allowed or not turns.may_come(permit, self.rule.wait):
                return self.outcome(key, permit)
        wished = await wishing()
        waiting = turns.wait(ASYNCIO if may_await else BLOCKING, key, cost, self.rule.wait, wished)
        try:
            return self.outcome(key, await (waiting if guard is None else guard(waiting)))
        except Shed as shed:
            outcome = self.outcome(key, grantor.denied(key, cost))
            outcome.expected = turns.pace.expected(shed.ahead)
            return outcome

    def outcome(self, key: str | bytes, permit: Held) -> Outcome:
        """What an admission or a denial comes to."""
        policies = self._policies
        if policies.found is not self._grantor.limits:
            policies = self.policies()
        outcome = Outcome(self.rule, key, permit, policies, not permit.allowed)
        if len(policies.found) > 1:
            outcome.left = self._left(key, permit.decision, len(policies.found))
        return outcome

    def _left(self, key: str | bytes, decision: Decision, count: int) -> Left:
        """Of the limit that the decision names: what is left, and the seconds until nothing of it
        is used. A decision itself has the least and the longest of all its limits. So if there are
        several limits, these numbers are looked up, from what this host knows."""
        count -= self.rule.in_flight is not None
        if count < 2 or decision.limit_index >= count or self.rule.dry_run:
            return None, None
        return self._grantor.of_limit(key, decision)

    def unchecked(self, key: str | bytes, denied: bool, status: int = 503) -> Outcome:
        """The outcome where the limits cannot be checked. status: of a refusal."""
        return Outcome.unchecked(self.rule, key, self.policies(), denied, status)


class Gate(Generic[_App]):
    """Checks requests against the first of ``rules`` that matches. The ASGI and the WSGI middleware
    derive from it."""

    def __init__(
        self,
        app: _App,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        cluster: ClusterArgument = None,
    ) -> None:
        """Limits the requests to ``app``, the application; None: to what the caller serves itself.

        rules: a request is checked against the first rule that matches it; a request that no rule
        matches is not limited.
        name: of the application. Middlewares of the same name in the same segment share their
        counts.
        segment: default ``Segment.default()``.
        on_error: ``"deny"`` or ``"allow"`` requests that cannot be checked, because the segment is
        full (429) or cannot be used (503).
        on_cost_error: ``"deny"`` requests whose cost function fails, with 503, or ``"count"`` them
        as 1, for the client's address.
        ambiguous_paths: ``"count"`` a request under each rule that its path may mean, or
        ``"refuse"`` it with 400; see "How a path is read" in ``docs/web.md``.
        cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`:
        the limits hold over all hosts that name the same server; False: over this host alone;
        default: what FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``.

        Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment,
        ImportError where a cluster is named and the library for it is missing.
        """
        _one_of("on_error", on_error, "deny", "allow")
        _one_of("on_cost_error", on_cost_error, "deny", "count")
        _one_of("ambiguous_paths", ambiguous_paths, "count", "refuse")
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if not isinstance(rules, Iterable):
            raise TypeError(f"rules must be a list of Rule objects, not {rules!r}")
        found = tuple(rules)
        for rule in found:
            if not isinstance(rule, Rule):
                raise TypeError(f"rules must be Rule objects, not {rule!r}")
        _different_names(found)
        self.app = app
        self.rules, self._on_error, self._on_cost_error = found, on_error, on_cost_error
        self._refuses = Rule(name="ambiguous path") if ambiguous_paths == "refuse" else None
        self._log = Log()
        grantor = chosen(cluster)
        self._rules: list[tuple[Rule, _Opened | None]] = [
            (rule, _Opened(rule, name, segment, grantor) if rule.limits else None) for rule in found
        ]
        self._routes = Routes(self._rules)
        #: Whether usual() may know a request. A derived class may check in a way of its own.
        own = type(self).check is not Gate.check or type(self).checked is not Gate.checked
        self.has_usual = not own and any(opened and opened.usual for _, opened in self._rules)
        self._usual = functools.lru_cache(KEPT)(functools.partial(_usual, self._routes.find))

    def check(self, request: Request) -> Outcome | None:
        """Check a request. None: it is not limited. Does not raise what a key or cost function
        raises. It waits under a rule with ``wait``, and with a cluster for the server."""
        checked = self.checked(request, may_await=False)
        if checked is None or isinstance(checked, Outcome):
            return checked
        return run(checked.__await__())

    async def check_async(self, request: Request, guard: Guard | None = None) -> Outcome | None:
        """check() for asyncio, where the functions of a rule may be async. It waits by await alone.
        guard: awaits the calls that wait for their turn."""
        checked = self.checked(request, guard=guard)
        return checked if checked is None or isinstance(checked, Outcome) else await checked

    def usual(self, asked: Asked, client: str | None) -> Outcome | Literal[False] | None:
        """checked() without a :class:`Request`, for the most usual one: its path has one reading,
        and it counts under one rule, by its client's address, or under none. client: as a Request
        has it. False: it is another request, and nothing was consumed."""
        try:
            opened = self._usual(asked)
        except _TooLongError:
            return False
        if opened is None or opened is False:
            return opened
        if type(client) is not str or len(client) > LONGEST:
            return False
        key = key_of(client, IPV6_PREFIX)
        try:
            permit = opened.admit_at_once(key)
        except Exception:  # nothing was consumed; checked() says what is wrong
            return False
        try:
            return opened.outcome(key, permit)
        except FastShmError as error:
            return self._unchecked(opened, key, error)

    def checked(
        self, request: Request, *, may_await: bool = True, guard: Guard | None = None
    ) -> Outcome | None | Coroutine[Any, Any, Outcome | None]:
        """The outcome of check_async(); or a coroutine that returns it, where there may be
        something to wait for."""
        target = request.target
        if self._refuses is not None and len(target.readings.routed) > 1:
            return Outcome.unchecked(self._refuses, "", responses.NO_POLICIES, True, 400)
        routes = self._routes
        found = routes.kept(target) if target.kept else routes.find(target)
        if not found:
            return None
        opened = found[0]
        if len(found) > 1:
            return self._check(found, request, may_await, guard)
        rule = opened.rule
        if not opened.at_once:
            return self._check_rule(opened, request, may_await, guard)
        key: Any
        try:
            key = rule.key(request)
        except Exception as error:
            key = self._key_failed(rule, request, error)
        if type(key) is str or type(key) is bytes:
            if rule.exempt and key_bytes(key) in rule.exempt:
                return None
            try:
                permit = opened.admit_at_once(key)
            except Exception:  # nothing was consumed; the long way says what is wrong
                return self._check_rule(opened, request, may_await, guard, key)
            try:
                outcome = opened.outcome(key, permit)
            except FastShmError as error:
                return self._unchecked(opened, key, error)
            if outcome.denied and rule.dry_run:
                self._log.dry_run(outcome, request)
            return outcome
        return self._check_rule(opened, request, may_await, guard, key)

    async def _check(
        self,
        found: tuple[_Opened, ...],
        request: Request,
        may_await: bool,
        guard: Guard | None = None,
    ) -> Outcome | None:
        """may_await: if False, nothing here suspends, so that check() can run it without an event
        loop."""
        outcomes: list[Outcome] = []
        try:
            for opened in found:
                outcome = await self._check_rule(opened, request, may_await, guard)
                if outcome is not None:
                    outcomes.append(outcome)
                    if outcome.refused:
                        break
        except BaseException:  # a cancellation, for example
            combined(outcomes, failed=True)
            raise
        return combined(outcomes)

    async def _check_rule(
        self,
        opened: _Opened,
        request: Request,
        may_await: bool,
        guard: Guard | None,
        key: Any = _NOT_ASKED,
    ) -> Outcome | None:
        """key: what the key function returned."""
        rule = opened.rule
        try:
            key = rule.key(request) if key is _NOT_ASKED else key
            if inspect.isawaitable(key):
                key = await key if may_await else _refuse_async(key, "key")
            if key is not None and not isinstance(key, (str, bytes)):
                raise TypeError(f"the key function gave {key!r}, which is no str, bytes or None")
        except Exception as error:
            key = self._key_failed(rule, request, error)
        if key is None or (rule.exempt and key_bytes(key) in rule.exempt):
            return None
        cost: Any = rule.cost
        try:
            if callable(cost):
                cost = cost(request)
                if inspect.isawaitable(cost):
                    cost = await cost if may_await else _refuse_async(cost, "cost")
        except Exception as error:
            if self._refuses_cost(rule, error):
                return opened.unchecked(key, True)
            key, cost = client_address(request), 1
        how = may_await, functools.partial(self._wish, rule, request, may_await), guard
        try:
            try:
                outcome = await opened.admit(key, cost, *how)
            except _BAD_COST as error:
                if self._refuses_cost(rule, error):
                    return opened.unchecked(key, True)
                outcome = await opened.admit(client_address(request), 1, *how)
        except FastShmError as error:
            return self._unchecked(opened, key, error)
        if outcome.denied and rule.dry_run:
            self._log.dry_run(outcome, request)
        return outcome

    def _unchecked(self, opened: _Opened, key: str | bytes, error: FastShmError) -> Outcome:
        denied = self._on_error == "deny"
        shown = "refused" if denied else "let through, uncounted"
        name = opened.rule.name
        self._log.failure(f"rule {name!r} cannot be checked; requests are {shown}", error)
        full = isinstance(error, SegmentFullError)
        return opened.unchecked(key, denied, 429 if full else 503)

    def _key_failed(self, rule: Rule, request: Request, error: Exception) -> str:
        """The key of the request then."""
        self._log.failure(
            f"rule {rule.name!r}: its key function failed; such requests count for the "
            "client's address",
            error,
        )
        return client_address(request)

    async def _wish(self, rule: Rule, request: Request, may_await: bool) -> Wish:
        """How a request waits. Where a function fails, it waits behind all others: who can make it
        fail gains nothing."""
        found: dict[str, Any] = {}
        try:
            for name in ("tenant", "weight", "priority"):
                value: Any = getattr(rule, name)
                if callable(value):
                    value = value(request)
                    if inspect.isawaitable(value):
                        value = await value if may_await else _refuse_async(value, name)
                found[name] = value
            return wish(**found, max_waiting=rule.max_waiting, on_wait=None)
        except Exception as error:
            self._log.failure(
                f"rule {rule.name!r}: its tenant, weight or priority function failed; such "
                "requests wait behind all others",
                error,
            )
            return wish(None, 1.0, _LAST, rule.max_waiting, None)

    def _refuses_cost(self, rule: Rule, error: Exception) -> bool:
        """A cost function raised, or returned a value that cannot be a cost. Is the request
        refused?"""
        denied = self._on_cost_error == "deny"
        shown = "are refused" if denied else "count as 1, for the client's address"
        self._log.failure(
            f"rule {rule.name!r}: its cost function failed; such requests {shown}", error
        )
        return denied


class _TooLongError(Exception):
    """What is asked for is not remembered: clients choose it, and must not fill the memory."""


def _usual(
    find: Callable[[Target], tuple[_Opened, ...]], asked: Asked
) -> _Opened | Literal[False] | None:
    """What is found for a usual request; None: it is not limited; False: it is another one."""
    wanted = target(*asked)
    if not wanted.kept:
        raise _TooLongError
    found = find(wanted)
    if len(wanted.readings.routed) > 1 or len(found) > 1:
        return False
    if not found:
        return None
    return found[0] if found[0].usual else False


def _refuse_async(value: Any, what: str) -> NoReturn:
    if inspect.iscoroutine(value):
        value.close()
    raise TypeError(f"the {what} function is async, which only the ASGI middleware can await")


def _one_of(argument: str, value: object, one: str, other: str) -> None:
    if value not in (one, other):
        raise ValueError(f"{argument} must be {one!r} or {other!r}, not {value!r}")


def _different_names(rules: Sequence[Rule]) -> None:
    seen: set[str] = set()
    for rule in rules:
        if rule.limits and rule.name in seen:
            raise ValueError(
                f"two rules have the name {rule.name!r}, which names their limits in the segment; "
                "give one of them another: Rule(..., name=...)"
            )
        seen.add(rule.name)
