"""Gate: checks a request against the first rule that matches it. It knows no framework."""

from __future__ import annotations

import inspect
from collections.abc import Coroutine, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from fast_litellm_shm._shared import settings
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import Decision, Permit, ffi, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.exceptions import FastShmError, SegmentFullError
from fast_litellm_shm.integrations.web import responses
from fast_litellm_shm.integrations.web.keys import client_address
from fast_litellm_shm.integrations.web.log import Log
from fast_litellm_shm.integrations.web.outcome import Outcome, combined
from fast_litellm_shm.integrations.web.request import Request
from fast_litellm_shm.integrations.web.rules import Cost, Rule
from fast_litellm_shm.limits import InFlight, LimitSpec

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster
    from fast_litellm_shm.cluster.quota import Granted, Parts
    from fast_litellm_shm.cluster.wallet import Wallet

_ON_ERROR = ("deny", "allow")
_ON_COST_ERROR = ("deny", "count")
_AMBIGUOUS = ("count", "refuse")
_BAD_COST = (TypeError, ValueError, OverflowError)  # what a limiter raises for one


class _Opened:
    """A rule and its limits in the segment; with a cluster, those that its server keeps."""

    _parts: Parts | None = None
    _rates: SharedLimits | None  # None: it has permits alone, over many hosts
    _wallet: Wallet | None = None

    def __init__(
        self, rule: Rule, app: str, segment: Segment | None, cluster: Cluster | None
    ) -> None:
        self.rule = rule
        name, most = f"{app}: {rule.name}", lib.FSHM_MAX_LIMITER_NAME
        if cluster is not None:
            from fast_litellm_shm.cluster.quota import Parts, most_name

            most = most_name(rule.limits)
        if len(name.encode("utf-8", "replace")) > most:
            raise ValueError(
                f"{name!r}, the name of the application and of a rule, has more than {most} bytes; "
                "give the rule a shorter: Rule(..., name=...)"
            )
        # In a flood of new keys those without room are limited together; permits have no such
        # counter, so there a full segment is told as an error, which is logged.
        on_full = "raise" if rule.in_flight is not None else "share"
        if cluster is not None:
            self._parts = Parts(rule.limits, name, segment, "raise", cluster, settles=False)
            rates = self._rates = self._parts.rates
            self._wallet = rates._wallet if rates is not None else None
        else:
            self._rates = SharedLimits(rule.limits, name=name, segment=segment, on_full=on_full)
        self._described: tuple[Any, tuple[str, ...], str] | None = None

    @property
    def _limits(self) -> tuple[LimitSpec | InFlight, ...]:
        """Those in force, which may be changed."""
        if self._parts is not None:
            return self._parts.limits
        assert self._rates is not None
        found: tuple[LimitSpec | InFlight, ...] = self._rates.limits
        return found

    def described(self) -> tuple[tuple[str, ...], str]:
        """Names of the limits, and RateLimit-Policy: of those in force."""
        found = self._limits
        if self._described is None or self._described[0] != found:
            names = responses.policy_names(self.rule.public_name, found)
            self._described = (found, names, responses.policy(names, found))
        return self._described[1:]

    def admit(self, key: str | bytes, cost: Cost) -> Outcome:
        if self._parts is not None:
            return self._outcome(key, self._parts.admit(key, cost))
        assert self._rates is not None
        if isinstance(cost, tuple) and self.rule.in_flight is not None:
            cost = (*cost, 1)
        return self._outcome(key, self._rates._admit(key, cost))

    async def admit_async(self, key: str | bytes, cost: Cost) -> Outcome:
        """admit() for asyncio: where the server must be asked, that is done in a thread; else
        nothing is awaited. Cancelled, it holds nothing; what it was granted is consumed."""
        if self._parts is None:
            return self.admit(key, cost)
        return self._outcome(key, await self._parts.admit_async(key, cost))

    def _outcome(self, key: str | bytes, permit: Permit | Granted) -> Outcome:
        decision, described = permit.decision, self.described()
        left = self._left(key, decision, len(described[0]))
        return Outcome(self.rule, key, permit, *described, not decision.allowed, left)

    def _left(self, key: str | bytes, decision: Decision, count: int) -> tuple[int, float]:
        """Of the limit that the decision names: what is left, and seconds until that is all.
        A decision itself tells the least and the longest of all its limits, so where there are
        several it is looked up, by what this host knows. While a server is away, a decision tells
        of this host's share."""
        left, until, index = decision.remaining, decision.reset_after, decision.limit_index
        count -= self.rule.in_flight is not None
        if self._rates is None or count < 2 or index >= count or self.rule.dry_run:
            return left, until
        raw, found, unused = key_bytes(key), ffi.new("uint64_t[4]"), ffi.new("uint64_t[4]")
        place = self._rates._handle, raw, len(raw), 0
        wallet = self._wallet
        if not decision.allowed if wallet is None else wallet.link.away is None:
            lib.fshm_remaining(*place, found)
            mine = () if wallet is None else wallet.look(raw)[0]
            left = int(found[index]) + sum(mine[index : index + 1])
        if decision.allowed:
            lib.fshm_known(*place, unused, found)
            until = found[index] / 1e9
        return left, until

    def unchecked(self, key: str | bytes, denied: bool, status: int = 503) -> Outcome:
        """The outcome where the limits cannot be checked. status: of a refusal."""
        return Outcome(self.rule, key, None, *self.described(), denied, error_status=status)


class Gate:
    """Checks requests against the first of ``rules`` that matches; a request that no rule matches
    is not limited. The arguments are those of ``integrations.web.Middleware``."""

    def __init__(
        self,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        cluster: Cluster | str | Literal[False] | None = None,
    ) -> None:
        _one_of("on_error", on_error, _ON_ERROR)
        _one_of("on_cost_error", on_cost_error, _ON_COST_ERROR)
        _one_of("ambiguous_paths", ambiguous_paths, _AMBIGUOUS)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if not isinstance(rules, Iterable):
            raise TypeError(f"rules must be a list of Rule objects, not {rules!r}")
        found = tuple(rules)
        for rule in found:
            if not isinstance(rule, Rule):
                raise TypeError(f"rules must be Rule objects, not {rule!r}")
        _different_names(found)
        self.rules, self._on_error, self._on_cost_error = found, on_error, on_cost_error
        self._refuses = Rule(name="ambiguous path") if ambiguous_paths == "refuse" else None
        self._log = Log()
        server: Cluster | None = None
        if settings.names_server(cluster):
            from fast_litellm_shm.cluster import settings as cluster_settings

            server = cluster_settings.found(cluster)
        self._rules: list[tuple[Rule, _Opened | None]] = [
            (rule, _Opened(rule, name, segment, server) if rule.limits else None) for rule in found
        ]

    def check(self, request: Request) -> Outcome | None:
        """Check a request. None: it is not limited. Does not raise what a key or cost function
        raises. With a cluster it may wait for the server."""
        try:
            self._check(request, may_await=False).send(None)
        except StopIteration as done:
            outcome: Outcome | None = done.value
            return outcome
        raise AssertionError("a synchronous check awaited something")

    def check_async(self, request: Request) -> Coroutine[Any, Any, Outcome | None]:
        """check() for asyncio, where the key and cost functions may be async. It waits by await
        alone."""
        return self._check(request, may_await=True)

    async def _check(self, request: Request, may_await: bool) -> Outcome | None:
        """may_await: else nothing here suspends, so that check() can run it without an event
        loop."""
        if self._refuses is not None and len(request.readings.routed) > 1:
            return Outcome(self._refuses, "", None, (), "", True, error_status=400)
        outcomes: list[Outcome] = []
        try:
            for opened in self._find(request):
                outcome = await self._check_rule(opened, request, may_await)
                if outcome is not None:
                    outcomes.append(outcome)
                    if outcome.refused:
                        break
        except BaseException:  # a cancellation, for example
            combined(outcomes, failed=True)
            raise
        return combined(outcomes)

    async def _check_rule(
        self, opened: _Opened, request: Request, may_await: bool
    ) -> Outcome | None:
        rule = opened.rule
        key: Any
        try:
            key = rule.key(request)
            if inspect.isawaitable(key):
                key = await key if may_await else _refuse_async(key, "key")
            if key is not None and not isinstance(key, (str, bytes)):
                raise TypeError(f"the key function gave {key!r}, which is no str, bytes or None")
        except Exception as error:
            self._log.failure(
                f"rule {rule.name!r}: its key function failed; such requests count for the "
                "client's address",
                error,
            )
            key = client_address(request)
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
        try:
            try:
                outcome = await _admit(opened, key, cost, may_await)
            except _BAD_COST as error:
                if self._refuses_cost(rule, error):
                    return opened.unchecked(key, True)
                outcome = await _admit(opened, client_address(request), 1, may_await)
        except FastShmError as error:
            denied = self._on_error == "deny"
            shown = "refused" if denied else "let through, uncounted"
            self._log.failure(f"rule {rule.name!r} cannot be checked; requests are {shown}", error)
            full = isinstance(error, SegmentFullError)
            return opened.unchecked(key, denied, 429 if full else 503)
        if outcome.denied and rule.dry_run:
            self._log.dry_run(outcome, request)
        return outcome

    def _find(self, request: Request) -> list[_Opened]:
        """The first rule that matches each path by which the request may be routed; and before it
        the rules with limits that match another name of that path."""
        routed, aliases = request.readings.routed, request.readings.aliases
        found = []
        for rule, opened in self._rules:
            if not rule.takes(request.method):
                continue
            left = tuple(path for path in routed if not rule.has(path))
            if opened is not None and (
                left != routed or any(map(rule.may_have, routed)) or any(map(rule.has, aliases))
            ):
                found.append(opened)
            routed = left
            if not routed:
                break
        return found

    def _refuses_cost(self, rule: Rule, error: Exception) -> bool:
        """A cost function raised, or returned what is no cost. Is the request refused?"""
        denied = self._on_cost_error == "deny"
        shown = "are refused" if denied else "count as 1, for the client's address"
        self._log.failure(
            f"rule {rule.name!r}: its cost function failed; such requests {shown}", error
        )
        return denied


async def _admit(opened: _Opened, key: str | bytes, cost: Cost, may_await: bool) -> Outcome:
    return await opened.admit_async(key, cost) if may_await else opened.admit(key, cost)


def _refuse_async(value: Any, what: str) -> NoReturn:
    if inspect.iscoroutine(value):
        value.close()
    raise TypeError(f"the {what} function is async, which only the ASGI middleware can await")


def _one_of(argument: str, value: object, known: tuple[str, str]) -> None:
    if value not in known:
        raise ValueError(f"{argument} must be {known[0]!r} or {known[1]!r}, not {value!r}")


def _different_names(rules: Sequence[Rule]) -> None:
    seen: set[str] = set()
    for rule in rules:
        if rule.limits and rule.name in seen:
            raise ValueError(
                f"two rules have the name {rule.name!r}, which names their limits in the segment; "
                "give one of them another: Rule(..., name=...)"
            )
        seen.add(rule.name)
