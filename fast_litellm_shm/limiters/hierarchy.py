"""HierarchyLimiter: an organization, its team, its user: each with its own key and limits, in one
admission."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fast_litellm_shm import limits
from fast_litellm_shm._shared import performance
from fast_litellm_shm._shared.named_limiter import refused, states_of
from fast_litellm_shm._shared.native import Decision, HierarchyCore, lib
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm.limiters.grantors import ClusterArgument, Cost, DurableArgument, ns_until
from fast_litellm_shm.limiters.rate import RateLimiter, deadline_ns
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
    off_loop,
    run,
    run_async,
    wish,
)
from fast_litellm_shm.limits import LimitSpec, Spelled

Keys: TypeAlias = (
    tuple[str | bytes, ...]
    | list[str]
    | list[bytes]
    | Mapping[str, str]
    | Mapping[str, str | bytes]
)
Costs: TypeAlias = int | Mapping[str, int] | Mapping[str, Cost]
Level: TypeAlias = "Spelled | Sequence[Spelled] | RateLimiter"

_SOON = 200_000  # ns: between two attempts


def _drop(_: object) -> None: ...


def _named(levels: object) -> list[tuple[str, Any]]:
    """The levels by name. Raises TypeError or ValueError."""
    given: Iterable[Any]
    if isinstance(levels, Mapping):
        given = levels.items()
    elif isinstance(levels, (list, tuple)) and all(
        isinstance(each, tuple) and len(each) == 2 for each in levels
    ):
        given = levels
    else:
        raise TypeError(
            "HierarchyLimiter: levels must be a mapping from the name of a level to its limits, "
            f"outermost first, not {levels!r}"
        )
    found: list[tuple[str, Any]] = []
    for level, spelled in given:
        if not isinstance(level, str):
            raise TypeError(f"HierarchyLimiter: the name of a level must be a str, not {level!r}")
        if not level or "/" in level:
            raise ValueError(
                f"HierarchyLimiter: the name of a level must have a character, and no '/', "
                f"not {level!r}"
            )
        if level in dict(found):
            raise ValueError(f"HierarchyLimiter: two levels have the name {level!r}")
        found.append((level, spelled))
    most = lib.FSHM_MAX_LEVELS
    if not 1 <= len(found) <= most:
        raise ValueError(f"HierarchyLimiter takes 1 to {most} levels, not {len(found)}")
    return found


def _checked(level: str, spelled: Any) -> tuple[LimitSpec, ...] | RateLimiter:
    """The limits of a level, or its limiter. Raises what limits.checked() raises."""
    if isinstance(spelled, RateLimiter):
        if type(spelled) is not RateLimiter:
            from fast_litellm_shm.limiters.plans import PlannedRateLimiter

            if isinstance(spelled, PlannedRateLimiter):
                raise ValueError(
                    f"HierarchyLimiter: level {level!r}: the limiter {spelled.name!r} has plans, "
                    "and the levels of a hierarchy have the same limits for all their keys; give "
                    "it its limits, and check the plan by a call of its own"
                )
        return spelled
    several = isinstance(spelled, (tuple, list))
    try:
        return limits.checked(spelled if several else (spelled,))
    except (TypeError, ValueError) as error:
        raise type(error)(f"HierarchyLimiter: level {level!r}: {error}") from None


class HierarchyLimiter(HierarchyCore, InSegment):
    """Admit requests by a path of keys: an organization, its team, its user. All levels admit, or
    none, and then nothing is consumed. Shared by all processes.

        >>> limiter = HierarchyLimiter({"org": "1000/minute", "user": "60/minute"}, name="doctest")
        >>> limiter.acquire(("acme", "ann")).allowed
        True
        >>> limiter.remaining(("acme", "ann"))
        {'org': 999, 'user': 59}
        >>> limiter.reset()

    levels: a mapping from 1 to 8 names of levels, outermost first, to the limits of each: as text,
    one limit, a tuple of up to 4, or a RateLimiter that is there already. name: each level is a
    RateLimiter of the name ``name/level``, which processes share. segment: default: that of a
    RateLimiter given as a level, else ``Segment.default()``. on_full, cluster, durable: of the
    levels, as of RateLimiter; over many hosts, or durable, are all levels or none.

    Levels nest: a level's key is the path down to it, so the team ``red`` of ``acme`` is another
    key than the team ``red`` of ``beta``. All methods take ``keys``: a tuple with one key for each
    level, outermost first, or of the first levels only; or a mapping from level to key, which may
    leave levels out. A level without a key is neither checked nor charged; what lies below it is
    the key of no such level: the user ``ann`` of no team. cost: an int for all levels, or a
    mapping from level to cost.

    Raises TypeError and ValueError, which name the level. See ``docs/hierarchy.md``.
    """

    def __init__(
        self,
        levels: Mapping[str, Level] | Sequence[tuple[str, Level]],
        *,
        name: str,
        segment: Segment | None = None,
        on_full: str = "share",
        cluster: ClusterArgument = None,
        durable: DurableArgument = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        # All are checked before the first is made: that sets the limits of a name.
        found = [(level, _checked(level, spelled)) for level, spelled in _named(levels)]
        there = [each for _, each in found if isinstance(each, RateLimiter)]
        if segment is None and there:
            segment = there[0].segment
        made = {
            level: each
            if isinstance(each, RateLimiter)
            else RateLimiter(
                *each,
                name=f"{name}/{level}",
                segment=segment,
                on_full=on_full,
                cluster=cluster,
                durable=durable,
            )
            for level, each in found
        }
        self._begin(name, made)

    def _begin(self, name: str, levels: dict[str, RateLimiter]) -> None:
        self._name, self._levels = name, levels
        limiters = tuple(levels.values())
        self._segment = limiters[0].segment
        by_name: dict[str, str] = {}
        for level, limiter in levels.items():
            if limiter.segment is not self._segment:
                raise ValueError(
                    f"HierarchyLimiter {name!r}: level {level!r} is in segment "
                    f"{limiter.segment.name!r}, and another one in {self._segment.name!r}: give "
                    "all levels the same Segment"
                )
            other = by_name.setdefault(limiter.name, level)
            if other != level:
                raise ValueError(
                    f"HierarchyLimiter {name!r}: the levels {other!r} and {level!r} are the same "
                    f"limiter {limiter.name!r}: give each a name of its own"
                )
        kinds = {limiter._grantor.in_batches for limiter in limiters}
        if len(kinds) > 1:
            alone = [level for level, each in levels.items() if not each._grantor.in_batches]
            raise ValueError(
                f"HierarchyLimiter {name!r}: of its levels, {', '.join(alone)} count in this host "
                "alone, and the others have cluster= or durable=: give all levels the same"
            )
        self._states, self._pace = [states_of(each) for each in limiters], Pace()
        self._bind(name, tuple(levels), limiters, kinds == {True})
        self._measure(*performance.measured_by("rate_limiter", "acquire", self._segment))

    @property
    def levels(self) -> dict[str, RateLimiter]:
        """The RateLimiter of each level, outermost first. Their keys: :meth:`key`."""
        return dict(self._levels)

    @property
    def limits(self) -> dict[str, tuple[LimitSpec, ...]]:
        """The limits in force, by level."""
        return {level: limiter.limits for level, limiter in self._levels.items()}

    def key(self, keys: Keys) -> bytes:
        """The key that the innermost of these levels has in its RateLimiter, which ``fast-shm
        inspect`` shows: the path down to it, joined by ``/``. In a key, ``/`` is written as
        ``\\/``, and ``\\`` as ``\\\\``; ``\\-`` stands for a level that is left out."""
        return self._paths(keys)[-1][1]

    def check(self, keys: Keys) -> dict[str, Any]:
        """acquire(keys) as a dict: allowed, reason, remaining_requests; and when denied,
        retry_after_ms (None: never) and level."""
        decision = self.acquire(keys)
        found = {
            "allowed": decision.allowed,
            "reason": "Request allowed",
            "remaining_requests": decision.remaining,
        }
        if not decision:
            ns = decision.retry_after_ns
            reason = limits.reason(decision.limit)
            found |= {
                "reason": f"{reason}, of the {decision.level}",
                "retry_after_ms": None if ns is None else -(-ns // 1_000_000),
                "level": decision.level,
            }
        return found

    async def acquire_async(self, keys: Keys, cost: Costs = 1) -> Decision:
        """acquire() for asyncio: where a server has to be asked, a thread does that. Cancelled
        meanwhile, it has consumed what it was granted."""
        return await off_loop(lambda: self.acquire(keys, cost))

    def remaining(self, keys: Keys) -> dict[str, int]:
        """Tokens that each level would still admit now, by its tightest limit."""
        names = tuple(self._levels)
        if not self._in_batches:
            return {names[number]: left for number, left in self._remaining(keys)}
        return {
            names[number]: self._levels[names[number]].peek(raw).remaining
            for number, raw in self._paths(keys)
        }

    def reset(self, keys: Keys | None = None, *, level: str | None = None) -> None:
        """Forget what was consumed: by the innermost level of ``keys``, and by no other level.
        level: by this one instead; without ``keys``: by all keys of this level. With neither: by
        all keys of all levels.

        ``reset(("acme", "red"))`` resets the team red: neither its users, nor acme."""
        if level is not None and level not in self._levels:
            raise ValueError(
                f"limiter {self._name!r} has no level {level!r}; its levels are "
                f"{', '.join(self._levels)}"
            )
        if keys is None:
            for each in (level,) if level is not None else tuple(self._levels):
                self._levels[each].reset()
            return
        names, paths = tuple(self._levels), dict(self._paths(keys))
        number = max(paths) if level is None else names.index(level)
        if number not in paths:
            raise ValueError(f"limiter {self._name!r}: {keys!r} has no key of level {level!r}")
        self._levels[names[number]].reset(paths[number])

    # waiting

    def wait(
        self,
        keys: Keys,
        cost: Costs = 1,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> Decision:
        """Block until admitted; at most ``timeout`` seconds.

        A caller waits in the queue of the level that denies it: callers that the same team denies
        are served in the order in which they came, over all processes. When its turn has come and
        another level denies it, it goes to the end of that level's queue. Nothing is charged for a
        caller that waits. A caller that cannot be admitted before its deadline, or ever, is denied
        at once.

        tenant, weight, priority, max_waiting, on_wait: as of ConcurrencyLimiter.wait(), in the
        queue where it stands.
        """
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return run(self._wait(BLOCKING, keys, cost, timeout, wished))

    async def wait_async(
        self,
        keys: Keys,
        cost: Costs = 1,
        timeout: float | None = None,
        *,
        tenant: str | None = None,
        weight: float = 1.0,
        priority: int = 0,
        max_waiting: int | None = None,
        on_wait: OnWait | None = None,
    ) -> Decision:
        """wait() for asyncio. It needs no thread."""
        wished = wish(tenant, weight, priority, max_waiting, on_wait)
        return await run_async(self._wait(ASYNCIO, keys, cost, timeout, wished))

    def queue_size(self, keys: Keys) -> int:
        """How many callers of all processes wait for the innermost level of ``keys``."""
        number, raw = self._paths(keys)[-1]
        return self._states[number].waiting(raw)

    def _wait(
        self, waits: Waits, keys: Keys, cost: Costs, timeout: float | None, wished: Wish
    ) -> Steps[Decision]:
        deadline, paths = deadline_ns(timeout), dict(self._paths(keys))
        keys = dict(keys) if isinstance(keys, Mapping) else tuple(keys)
        names = tuple(self._levels)
        here: int | None = None  # the level in whose queue it stands
        move: int | None = None  # the level to whose queue it goes
        place: Any = None

        def outer_queue() -> int | None:
            """The outermost level, of those outside of `here`, where callers wait: they come
            first."""
            for number, raw in paths.items():
                if number == here:
                    return None
                if self._states[number].waited_for(raw):
                    return number
            return None

        def attempt() -> Steps[tuple[Decision, int | None]]:
            nonlocal move
            move = outer_queue()
            ask = self.acquire if move is None else self.peek
            decision = yield from waits.ask(lambda: ask(keys, cost), _drop)
            if decision:
                if place is not None and move is None:
                    given = self._cost(names[here or 0], cost)
                    place.served(max(given) if isinstance(given, Sequence) else given)
                return decision, None
            denied, retry = names.index(decision.level or names[0]), decision.retry_after_ns
            if retry is None or retry > ns_until(deadline):
                move = None
                return decision, None
            move = denied if denied != here else None
            return decision, max(retry, _SOON) if move is None else None

        def turned_away() -> Decision:
            number = here or 0
            raw, limiter = paths[number], self._levels[names[number]]
            found = refused(limiter, raw, self._cost(names[number], cost))
            return self._joined((found,), (number,), 0)

        decision, _ = yield from attempt()
        while move is not None:
            here, move = move, None
            place = waits.place(self._states[here], paths[here], wished.order)
            try:
                decision = yield from in_turn(
                    waits, place, attempt, turned_away, deadline, wished, self._pace
                )
            except Shed:
                return (yield from waits.ask(turned_away, _drop))
        return decision

    # levels whose tokens come in batches, from a server or a file

    @property
    def _in_batches(self) -> bool:
        return next(iter(self._levels.values()))._grantor.in_batches

    def _cost(self, level: str, cost: Costs | None) -> Cost:
        """What a level is charged."""
        if cost is None:
            return 1
        return cost.get(level, 1) if isinstance(cost, Mapping) else cost

    def _leased(self, op: int, keys: Keys, cost: Costs | None) -> Decision:
        """Called by the native part, which has checked the keys."""
        names = tuple(self._levels)
        asked = [
            (number, self._levels[names[number]], raw, self._cost(names[number], cost))
            for number, raw in self._paths(keys)
        ]
        if op == lib.FSHM_ACQUIRE:
            return self._acquire_leased(asked)
        calls: dict[int, Callable[..., Decision]] = {
            lib.FSHM_PEEK: RateLimiter.peek,
            lib.FSHM_CHARGE: RateLimiter.charge,
            lib.FSHM_REFUND: RateLimiter.refund,
        }
        found = tuple(calls[op](limiter, raw, given) for _, limiter, raw, given in asked)
        denied = [i for i, each in enumerate(found) if not each]
        never = [i for i in denied if found[i].retry_after_ns is None]
        longest = max(denied, key=lambda i: found[i].retry_after_ns or 0, default=-1)
        numbers = tuple(number for number, *_ in asked)
        return self._joined(found, numbers, never[0] if never else longest)

    def _acquire_leased(self, asked: list[tuple[int, RateLimiter, bytes, Cost]]) -> Decision:
        """One level after the other: first those that are known to deny, which consumes nothing;
        then the innermost, whose key the fewest calls share. What the earlier ones have consumed
        is given back when one denies."""
        asked.reverse()
        asked.sort(key=lambda each: not each[1]._grantor.is_refused(each[2]))
        undo: list[Callable[[], object]] = []
        found: list[Decision] = []
        try:
            for number, limiter, raw, cost in asked:
                decision, give_back = limiter._grantor.spend(limiter, raw, cost)
                if not decision:
                    return self._joined((decision,), (number,), 0)
                found.append(decision)
                undo.append(give_back)
            undo.clear()
        finally:  # also where a call raises: another thread is to ask, or the server failed
            for each in reversed(undo):
                each()
        numbers = tuple(number for number, *_ in asked)
        return self._joined(tuple(found), numbers, -1)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self._name, self._levels))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.limits!r}, name={self._name!r})"


def _rebuild(
    cls: type[HierarchyLimiter], name: str, levels: dict[str, RateLimiter]
) -> HierarchyLimiter:
    limiter = cls.__new__(cls)
    limiter._begin(name, levels)
    return limiter
