"""Limits by key: each key has a plan, and a plan has limits.

A plan is a native handle with limits of its own (``csrc/limits/plans.c``). All handles of a name
count a key together, so a key that changes its plan keeps what it has consumed. Which handle
answers for a key is found here, and remembered for ``plan_age`` seconds.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, NoReturn
from weakref import WeakValueDictionary

from fast_litellm_shm import exceptions, limits
from fast_litellm_shm._shared import log, performance
from fast_litellm_shm._shared.named_limiter import SharedLimits, key_bytes
from fast_litellm_shm._shared.native import Decision, lib
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.limiters import overrides
from fast_litellm_shm.limiters.grantors import ClusterArgument, Cost, DurableArgument
from fast_litellm_shm.limiters.rate import Batch, PlanOf, Plans, RateLimiter
from fast_litellm_shm.limits import LimitSpec, Spelled

_ON_ERROR = ("keep", "default", "raise")
_AFTER_ERROR = 1.0  # s, that an answer which was needed for want of a better one is kept
_TELL_SECONDS = 60.0  # between two log lines about one limiter

Limits = tuple[LimitSpec, ...]


def limits_of(given: object, what: str) -> Limits:
    """The limits of a plan. Raises ValueError or TypeError, which begin with ``what``."""
    several = isinstance(given, Iterable) and not isinstance(given, str)
    try:
        return limits.checked(given if several else (given,))  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None


class PlanLimiter(RateLimiter):
    """The limits of one plan, for all keys that have it."""

    def __init__(
        self,
        found: Limits,
        name: str,
        segment: Segment,
        on_full: str,
        cluster: ClusterArgument,
        durable: DurableArgument,
    ) -> None:
        SharedLimits.__init__(
            self, found, name=name, segment=segment, on_full=on_full, planned=True
        )
        self._measure(0, -1, 0)  # the limiter is measured, not its plans
        self._choose(cluster, durable)

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(f"the plans of limiter {self.name!r} cannot be pickled: pickle the limiter")


class PlannedRateLimiter(RateLimiter):
    """A RateLimiter whose keys have limits of their own::

        RateLimiter("10/minute", name="api",
                    plans={"pro": "100/minute", "team": ("300/minute", "5000/day")},
                    plan_of=lambda key: plan_of_customer(key))

    limits: of the keys for which ``plan_of`` returns None; without any, ``plan_of`` has to name a
    plan. plans: limits by the plan's name. plan_of: a function of the key, or a coroutine function;
    it returns a plan's name, or limits, or None. It is asked once for each key and process, and
    again after ``plan_age`` seconds (more than 0): so long does a process go by an older answer.
    :meth:`ask_again` ends that for all processes. Without ``plan_of``, all keys have the limiter's
    own limits, but for those with an override.

    A key that changes its plan keeps what it has consumed, limit by limit: a limit counts on where
    the new plan has one of the same kind and period. A plan has 1 to 4 limits.

    on_plan_error: what a key gets whose plan cannot be found, because ``plan_of`` raises an
    exception or names a plan that there is not: ``"keep"``: the plan that it had, else the
    limiter's own limits; ``"default"``: the limiter's own limits; in both cases
    :class:`~fast_litellm_shm.PlanError` where there are none; ``"raise"``: PlanError. ``plan_of``
    is asked again after a second. Errors are counted (``get_performance_stats("plan_of")``), and
    logged once a minute.

    Overrides are limits of one key, set by any process at any time (:meth:`set_override`, or
    ``fast-shm set``). They go before ``plan_of``, take effect at the next call in every process,
    and stay in the segment until they are removed.

    With ``cluster`` or ``durable``, all plans must have the same kinds and periods, in the same
    order. on_full: ``"share"`` is not possible here and means ``"deny"``. The other arguments are
    those of RateLimiter; ``name`` has to be given.
    """

    def __init__(
        self,
        *limits_: Spelled,
        name: str | None = None,
        segment: Segment | None = None,
        on_full: str = "deny",
        cluster: ClusterArgument = None,
        durable: DurableArgument = None,
        plans: Plans | None = None,
        plan_of: PlanOf | None = None,
        plan_age: float = 60.0,
        on_plan_error: str = "keep",
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"a limiter with plans needs a name: name must be a str, not {name!r}")
        if plans is not None and not isinstance(plans, Mapping):
            raise TypeError(f"plans must be a mapping of names to limits, not {plans!r}")
        if plan_of is not None and not callable(plan_of):
            raise TypeError(f"plan_of must be a function of the key, not {plan_of!r}")
        if isinstance(plan_age, bool) or not isinstance(plan_age, (int, float)):
            raise TypeError(f"plan_age must be a number of seconds, not {plan_age!r}")
        if not plan_age > 0:
            raise ValueError(f"plan_age must be more than 0 s, not {plan_age!r}")
        if on_plan_error not in _ON_ERROR:
            raise ValueError(
                f"on_plan_error must be 'keep', 'default' or 'raise', not {on_plan_error!r}"
            )
        found: dict[str, Limits] = {}
        for plan, its in (plans or {}).items():
            if not isinstance(plan, str):
                raise TypeError(f"plans: the name of a plan must be a str, not {plan!r}")
            found[plan] = limits_of(its, f"plan {plan!r}")
        own = limits.checked(limits_) if limits_ else None
        if own is None and plan_of is None:
            raise ValueError(
                f"limiter {name!r} has no limits of its own and no plan_of, so no key has a plan: "
                "give it limits, or plan_of"
            )
        if own is None and not found and on_plan_error == "default":
            raise ValueError("on_plan_error='default' needs limits of the limiter's own: give some")
        self._given = (limits_, name, on_full, plan_of, plan_age, on_plan_error, found)
        self._segment = Segment.default() if segment is None else segment
        self._options = ("deny" if on_full == "share" else on_full, cluster, durable)
        self._alike(name, own, found, cluster, durable)
        self._of_limits: WeakValueDictionary[Limits, PlanLimiter] = WeakValueDictionary()
        self._called = name  # before the first handle exists
        self._by_name = {plan: self._limiter_of(its) for plan, its in found.items()}
        self._own = None if own is None else self._limiter_of(own)
        # What the methods of all keys use: names, queues, resets.
        first = (
            self._own
            or next(iter(self._by_name.values()), None)
            or self._limiter_of(limits.checked(("1/s",)))
        )
        SharedLimits.__init__(
            self, first.limits, name=name, segment=segment, on_full=self._options[0], planned=True
        )
        self._choose(cluster, durable)
        self._asking: dict[Any, asyncio.Future[PlanLimiter]] = {}
        self._told = -_TELL_SECONDS
        self._bind_plans(float(plan_age))

    @staticmethod
    def _alike(
        name: str,
        own: Limits | None,
        plans: Mapping[str, Limits],
        cluster: ClusterArgument,
        durable: DurableArgument,
    ) -> None:
        """Over hosts, and in a file, grants are for a limit at a place of the limiter."""
        from fast_litellm_shm.limiters.choice import chosen
        from fast_litellm_shm.limiters.grantors import Grantor

        if type(chosen(cluster, durable)) is Grantor:
            return
        shapes = {plan: [(type(each), each.per) for each in its] for plan, its in plans.items()}
        if own is not None:
            shapes["the limiter's own limits"] = [(type(each), each.per) for each in own]
        first: tuple[str, object] | None = None
        for plan, shape in shapes.items():
            if first is None:
                first = plan, shape
            elif shape != first[1]:
                raise ValueError(
                    f"limiter {name!r}: with cluster or durable, all plans must have the same "
                    f"kinds of limits and the same periods, in the same order: {plan!r} differs "
                    f"from {first[0]!r}"
                )

    def _limiter_of(self, its: Limits) -> PlanLimiter:
        found = self._of_limits.get(its)
        if found is None:
            on_full, cluster, durable = self._options
            found = PlanLimiter(its, self._called, self._segment, on_full, cluster, durable)
            self._of_limits[its] = found
        return found

    # which plan

    def _answering(self, key: Any) -> PlanLimiter:
        """The limits of the key. Called by the native part, where it does not know them."""
        known = self._plan_known(key, True)
        if known is not None:
            return known  # type: ignore[no-any-return]
        begun = self._plan_begin()
        limiter = self._override(key)
        if limiter is None:
            began = time.perf_counter()
            try:
                named = None if self._plan_of is None else self._plan_of(key)
                if not isinstance(named, Awaitable):
                    limiter = self._named(key, named)
            except Exception as error:
                return self._failed_to_find(key, error)
            if limiter is None:
                self._cannot_await(named)
            self._asked(began)
        self._plan_found(key, limiter, begun)
        return limiter

    async def _answering_async(self, key: Any) -> PlanLimiter:
        known = self._plan_known(key, True)
        if known is not None:
            return known  # type: ignore[no-any-return]
        begun = self._plan_begin()
        if self._plan_of is None or self._override(key) is not None:
            return self._answering(key)
        loop = asyncio.get_running_loop()
        asked = self._asking.get((loop, key))
        if asked is not None:  # one task asks, and the others wait for its answer
            return await asyncio.shield(asked)
        mine = self._asking[loop, key] = loop.create_future()
        began = time.perf_counter()
        try:
            try:
                named = self._plan_of(key)
                if isinstance(named, Awaitable):
                    named = await named
                limiter = self._named(key, named)
            except Exception as error:
                limiter = self._failed_to_find(key, error)
            else:
                self._asked(began)
                self._plan_found(key, limiter, begun)
        except BaseException as error:
            if isinstance(error, Exception):
                mine.set_exception(error)
                mine.exception()  # seen, where nobody waits for it
            else:
                mine.cancel()  # the others ask themselves
            raise
        else:
            mine.set_result(limiter)
            return limiter
        finally:
            del self._asking[loop, key]

    @property
    def _plan_of(self) -> PlanOf | None:
        return self._given[3]

    def _cannot_await(self, named: object) -> NoReturn:
        if inspect.iscoroutine(named):
            named.close()
        raise exceptions.PlanError(
            f"limiter {self.name!r}: plan_of is a coroutine function, and this call cannot await "
            "it: use acquire_async() or wait_async(), or await limiter.plan_async(key) before"
        )

    def _named(self, key: object, named: object) -> PlanLimiter:
        """The plan that ``plan_of`` named."""
        if named is None:
            if self._own is None:
                raise exceptions.PlanError(
                    f"limiter {self.name!r}: plan_of({key!r}) is None, and the limiter has no "
                    "limits of its own: give it some, or return a plan"
                )
            return self._own
        if isinstance(named, str):
            found = self._by_name.get(named)
            if found is not None:
                return found
            try:
                return self._limiter_of(limits.parse_all(named))
            except ValueError:
                known = ", ".join(map(repr, self._by_name)) or "none"
                raise exceptions.PlanError(
                    f"limiter {self.name!r}: plan_of({key!r}) is {named!r}, which is neither a "
                    f"plan ({known}) nor a limit such as '100/minute'"
                ) from None
        try:
            return self._limiter_of(limits_of(named, "plan_of"))
        except (TypeError, ValueError) as error:
            raise exceptions.PlanError(
                f"limiter {self.name!r}: plan_of({key!r}) is {named!r}: {error}"
            ) from None

    def _asked(self, began: float) -> None:
        took = (time.perf_counter() - began) * 1e3
        performance.record_performance("plan_of", self.name[:52], took)

    def _failed_to_find(self, key: Any, error: Exception) -> PlanLimiter:
        performance.record_failure("plan_of", self.name[:52])
        policy = self._given[5]
        limiter: PlanLimiter | None = self._plan_known(key, False) if policy == "keep" else None
        if limiter is None and policy != "raise":
            limiter = self._own
        now = time.monotonic()
        if now - self._told >= _TELL_SECONDS:
            self._told = now
            instead = "so this call fails"
            if limiter is not None:
                instead = "it has " + "; ".join(map(limits.describe, limiter.limits)) + " instead"
            log.warning(
                "limiter %r: the plan of key %r could not be found (%s: %s); %s",
                self.name, key, type(error).__name__, error, instead,
            )  # fmt: skip
        if limiter is None:
            if isinstance(error, exceptions.PlanError):
                raise error
            raise exceptions.PlanError(
                f"limiter {self.name!r}: the plan of key {key!r} could not be found: "
                f"{type(error).__name__}: {error}"
            ) from error
        # plan_of is asked again after a second.
        early = max(self._given[4] - _AFTER_ERROR, 0.0)
        self._plan_found(key, limiter, max(self._plan_begin() - int(early * 1e9 / 2**20), 0))
        return limiter

    def _override(self, key: Any) -> PlanLimiter | None:
        if not lib.fshm_overrides(self._handle):
            return None
        its = overrides.get(self, key)
        return self._limiter_of(its) if its else None

    def plan(self, key: str | bytes) -> Limits:
        key_bytes(key)
        return self._answering(key).limits

    async def plan_async(self, key: str | bytes) -> Limits:
        key_bytes(key)
        return (await self._answering_async(key)).limits

    # overrides

    def set_override(self, key: str | bytes, *limits_: Spelled) -> None:
        overrides.put(self, key, limits.checked(limits_))

    def remove_override(self, key: str | bytes) -> None:
        overrides.put(self, key, ())

    def ask_again(self) -> None:
        lib.fshm_overrides_changed(self._handle)

    # the calls of RateLimiter that are not native

    async def acquire_async(self, key: str | bytes, cost: Cost = 1) -> Decision:
        key_bytes(key)
        return await (await self._answering_async(key)).acquire_async(key, cost)

    def reset(self, key: str | bytes | None = None) -> None:
        """Forget what a key has consumed, under its present plan; None: what all keys have."""
        if key is None:
            super().reset()
        else:
            self._answering(key).reset(key)

    def block(self, key: str | bytes, seconds: float) -> None:
        key_bytes(key)
        self._answering(key).block(key, seconds)

    def acquire_many(self, keys: Sequence[str | bytes], cost: int | Sequence[int] = 1) -> Batch:
        from fast_litellm_shm._shared.dependencies import numpy

        keys = tuple(keys)
        costs = list(cost) if isinstance(cost, Iterable) else [cost] * len(keys)
        if len(costs) != len(keys):
            raise ValueError(
                f"cost has {len(costs)} values for {len(keys)} keys: give one for each"
            )
        parts: list[Batch] = []
        begin = 0
        answering = [self._answering(key) for key in keys]  # before anything is consumed
        for end in range(1, len(keys) + 1):
            if end == len(keys) or answering[end] is not answering[begin]:
                parts.append(answering[begin].acquire_many(keys[begin:end], costs[begin:end]))
                begin = end
        if not parts:
            return super().acquire_many(())
        return Batch(*(numpy.concatenate(each) for each in zip(*parts, strict=True)))

    def wait(self, key: str | bytes, *args: Any, **options: Any) -> Decision:
        key_bytes(key)
        return self._answering(key).wait(key, *args, **options)

    async def wait_async(self, key: str | bytes, *args: Any, **options: Any) -> Decision:
        key_bytes(key)
        return await (await self._answering_async(key)).wait_async(key, *args, **options)

    def __reduce__(self) -> tuple[Any, ...]:
        given, name, on_full, plan_of, plan_age, on_plan_error, found = self._given
        options = {
            "name": name, "segment": self._segment, "on_full": on_full, "plans": found,
            "plan_of": plan_of, "plan_age": plan_age, "on_plan_error": on_plan_error,
            "cluster": self._options[1], "durable": self._options[2],
        }  # fmt: skip
        return _rebuild, (type(self), given, options)

    def __repr__(self) -> str:
        own = "".join(f"{limit!r}, " for limit in (self._own.limits if self._own else ()))
        plans = {plan: each.limits for plan, each in self._by_name.items()}
        return f"RateLimiter({own}name={self.name!r}, plans={plans!r}, plan_of={self._plan_of!r})"


def _rebuild(
    cls: type[PlannedRateLimiter], given: Sequence[Spelled], options: Mapping[str, Any]
) -> PlannedRateLimiter:
    return cls(*given, **options)
