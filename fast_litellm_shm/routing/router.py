"""Routing by the statistics of all workers: requests in flight, latency, failures, cost.

A router picks one of the deployments of a model. It has the statistics that the program gives it:
wrap each request in :meth:`AdvancedRouter.track`, or call :meth:`AdvancedRouter.record` after it.

    >>> deployments = [
    ...     {"model_name": "gpt", "litellm_params": {"model": f"openai/gpt-{i}"},
    ...      "model_info": {"id": f"gpt-{i}"}}
    ...     for i in range(2)
    ... ]
    >>> router = AdvancedRouter("least_busy")
    >>> first = router.get_available_deployment(deployments, "gpt")
    >>> with router.track(first):
    ...     second = router.get_available_deployment(deployments, "gpt")
    >>> second is not first
    True
    >>> router.record(second, latency_ms=120, cost=0.002)
    >>> router.get_stats()[second["model_info"]["id"]]["requests"]
    1
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Mapping
from typing import Any

from fast_litellm_shm import exceptions
from fast_litellm_shm._shared import features, performance, settings
from fast_litellm_shm._shared.native import RouterCore, address, ffi, lib, owned
from fast_litellm_shm._shared.segment import InSegment, Segment
from fast_litellm_shm.routing.deployments import (
    COST_UNIT,
    Deployment,
    choose_plainly,
    name_of_model,
    number,
    those_of,
    weights_of,
)

STRATEGIES = {
    "simple_shuffle": lib.FSHM_ROUTE_SHUFFLE,
    "least_busy": lib.FSHM_ROUTE_LEAST_BUSY,
    "latency_based": lib.FSHM_ROUTE_LATENCY,
    "cost_based": lib.FSHM_ROUTE_COST,
}
_SETTINGS = ("strategy", "allowed_fails", "cooldown_seconds")
_UNKNOWN = 2**64 - 1
_NO_INDEX = 2**32 - 1  # of a deployment without statistics
_MOST_NAMES = 4096  # deployments whose ids a router keeps
_MOST_ROUTERS = 64  # that get_available_deployment() keeps


# tracking ----------------------------------------------------------------------------------------


class Tracked:
    """One request to a deployment, while the ``with`` or ``async with`` block runs. To record its
    cost, set ``cost`` in the block."""

    __slots__ = ("_begun", "_request", "_name", "_router", "cost")

    def __init__(self, router: AdvancedRouter, name: str) -> None:
        self._router, self._name = router, name
        self._request: Any = None
        self._begun = 0
        self.cost: float | None = None

    def __enter__(self) -> Tracked:
        if self._request is not None:
            raise RuntimeError("this request is tracked already: call track() for each request")
        router = self._router
        # If __exit__ never runs, the request in flight ends with the last reference to it.
        end = functools.partial(lib.fshm_request_end, router._handle)
        self._request = owned(ffi.new("fshm_request *"), end)
        # owner 0: not in flight (the process table is full); its result is recorded all the same
        lib.fshm_request_begin(router._handle, router._index(self._name), 0, self._request)
        self._begun = time.perf_counter_ns()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        begun, self._begun = self._begun, 0
        if not begun:
            return  # ended already
        took = time.perf_counter_ns() - begun
        counted = self._request.owner != 0
        if counted and not lib.fshm_request_end(self._router._handle, self._request):
            return  # in a forked child: the request belongs to the parent
        if kind is not None and not issubclass(kind, Exception):
            return
        try:
            self._router._record(self._name, took, kind is None, self.cost)
        except (TypeError, ValueError):  # cost is not a valid number
            if kind is None:
                raise
            self._router._record(self._name, took, False, None)  # and the block's error goes on

    async def __aenter__(self) -> Tracked:
        return self.__enter__()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.__exit__(kind)


# routers -----------------------------------------------------------------------------------------


def _checked_cooldown(
    strategy: str = "simple_shuffle", allowed_fails: int = 3, cooldown_seconds: float = 5.0
) -> float:
    """The settings of a router, checked; cooldown_seconds as a number."""
    if not isinstance(strategy, str):
        raise TypeError(f"strategy must be a str, not {strategy!r}")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}, not {strategy!r}")
    if isinstance(allowed_fails, bool) or not isinstance(allowed_fails, int):
        raise TypeError(f"allowed_fails must be an int, not {allowed_fails!r}")
    if not 0 <= allowed_fails < 2**24:
        raise ValueError(f"allowed_fails must be between 0 and 2**24 - 1, not {allowed_fails}")
    cooldown = number("AdvancedRouter", "cooldown_seconds", cooldown_seconds)
    if cooldown is None:
        raise TypeError("cooldown_seconds must be a number, not None")
    return cooldown


class AdvancedRouter(RouterCore, InSegment):
    """Picks one of a model's deployments. Routers of one name share statistics, in all workers.

    strategy:

    - ``simple_shuffle``: at random, in proportion to ``litellm_params.weight``; where no
      deployment has one, to ``rpm``; else to ``tpm``; else with equal chances;
    - ``least_busy``: the fewest requests in flight, over all workers. Those of a dead worker end
      within half a second;
    - ``latency_based``: the lowest decaying mean latency of successful requests. A deployment
      without a request in the last minute is tried first, by one request at a time (counting
      requests in :meth:`track`; :meth:`record` reports a request only after its end). A deployment
      with failures alone comes last;
    - ``cost_based``: the lowest mean of recorded costs. A deployment without one is ranked by its
      ``input_cost_per_token`` and ``output_cost_per_token`` (in litellm_params or model_info). One
      without a price comes last.

    Ties are broken at random. After more than ``allowed_fails`` failures in a minute of the clock,
    no strategy in any worker picks the deployment for ``cooldown_seconds`` (0: it is never left
    out). A deployment is identified by ``model_info.id``, else by a keyed hash of its parameters. A
    segment keeps statistics of about 200; beyond that, the one idle for longest loses its own.

    name: routers of one name share. The default is the same in all programs of the user.
    ``FAST_LITELLM_RUST_ROUTING=false`` makes it pick at random (seen within 0.1 s).

    Raises ValueError or TypeError for bad arguments, SegmentError where no segment can be opened.
    """

    _checks_flag = True  # of the feature rust_routing

    def __init__(
        self,
        strategy: str = "simple_shuffle",
        *,
        name: str = "default",
        allowed_fails: int = 3,
        cooldown_seconds: float = 5.0,
        segment: Segment | None = None,
    ) -> None:
        cooldown = _checked_cooldown(strategy, allowed_fails, cooldown_seconds)
        if not isinstance(name, str):
            raise TypeError(f"name must be a str, not {name!r}")
        if segment is not None and not isinstance(segment, Segment):
            raise TypeError(f"segment must be a Segment or None, not {segment!r}")
        if hasattr(self, "_handle"):
            raise RuntimeError(f"router {self._name!r} is open already: make another object")
        self._strategy, self._name = strategy, name
        self._allowed_fails, self._cooldown = allowed_fails, cooldown
        self._segment = Segment.default() if segment is None else segment
        self._handle: Any = self._segment._handle
        self._ids: dict[str, int] = {}
        self._set(
            self._handle,
            address(self._handle),
            STRATEGIES[strategy],
            random.getrandbits(64),
            *performance.measured("routing", strategy, self._segment),
        )

    @property
    def strategy(self) -> str:
        """The strategy it was made with."""
        return self._strategy

    def track(self, deployment: Mapping[str, Any] | str) -> Tracked:
        """Count a request as in flight while a ``with`` or ``async with`` block runs, and record
        its latency and success at the end. An Exception in the block counts as a failure of the
        deployment, and goes on. Another BaseException (asyncio.CancelledError, GeneratorExit,
        KeyboardInterrupt) is no failure: nothing is recorded. A forked child does not end a request
        of its parent."""
        return Tracked(self, self._name_of(deployment))

    def record(
        self,
        deployment: Mapping[str, Any] | str,
        latency_ms: float | None = None,
        success: bool = True,
        cost: float | None = None,
    ) -> None:
        """Record a request that has ended. deployment: an entry of the model list, or its name.
        latency_ms: not used for a failure, since failures are often fast. cost: in the unit of the
        prices."""
        took = number("record", "latency_ms", latency_ms)
        self._record(
            self._name_of(deployment), None if took is None else took * 1e6, bool(success), cost
        )

    def get_stats(self) -> dict[str, dict[str, Any]]:
        """By name, the deployments that this object has used: in_flight, latency_ms (None: not
        known), success_rate (0..1), cost (None: not known), cooldown_seconds (left), requests."""
        names = list(self._ids)
        indices = [self._index(name) for name in names]
        found = ffi.new("fshm_deployment_info[]", max(len(names), 1))
        lib.fshm_deployment_look(self._handle, indices, len(names), 0, 1, found)
        return {
            name: {
                "in_flight": info.in_flight,
                "latency_ms": None if info.latency_ns == _UNKNOWN else info.latency_ns / 1e6,
                "success_rate": info.success_rate,
                "cost": None if info.cost == _UNKNOWN else info.cost / COST_UNIT,
                "cooldown_seconds": info.cooldown_ns / 1e9,
                "requests": info.records,
            }
            for name, info in zip(names, found, strict=False)
        }

    def _record(self, name: str, took_ns: float | None, success: bool, cost: float | None) -> None:
        paid = number("record", "cost", cost)
        lib.fshm_deployment_record(
            self._handle,
            self._index(name),
            _UNKNOWN if took_ns is None else int(min(took_ns, 2**62)),  # it may be infinite
            success,
            _UNKNOWN if paid is None else round(min(paid * COST_UNIT, 2**43)),
            self._allowed_fails,
            int(min(self._cooldown * 1e9, 2**62)),
            0,
        )

    def _name_of(self, deployment: Mapping[str, Any] | str) -> str:
        if isinstance(deployment, str):
            return str.__str__(deployment)
        model_name = name_of_model("deployment", deployment)
        return Deployment("deployment", deployment, model_name).name(self._handle)

    def _index(self, name: str) -> int:
        """The index of its statistics. It may change at any time, when another deployment takes
        it."""
        known = self._ids.get(name)
        if known is None:
            raw = f"{self._name}\0{name}".encode("utf-8", "surrogatepass")
            known = lib.fshm_deployment_id(self._handle, raw, len(raw))
            if len(self._ids) >= _MOST_NAMES:
                self._ids.clear()
            self._ids[name] = known
        index = lib.fshm_deployment_open(self._handle, known, 0)
        return index if index >= 0 else _NO_INDEX

    def _plan(self, model_list: list[Any], model: str) -> Any:
        """Called by the native part: a row for each deployment that fits, as a list to keep for
        0.1 s, or as a tuple for this call only; None where the feature is off."""
        share = features.share_of("rust_routing") if self._checks_flag else 100.0
        if share < 100 and random.random() * 100 >= share:
            return None
        found = those_of(model_list, model)
        shuffled, priced = self._strategy == "simple_shuffle", self._strategy == "cost_based"
        rows = [
            (
                position,
                self._index(deployment.name(self._handle)),
                weight,
                deployment.price() if priced else -1.0,
                deployment.names(),
            )
            for (position, deployment), weight in zip(
                found, weights_of(found) if shuffled else [1.0] * len(found), strict=True
            )
        ]
        return rows if share >= 100 else tuple(rows)

    @staticmethod
    def _plain(model_list: list[Any], model: str, blocked: Any) -> Any:
        """Called by the native part where the feature is off."""
        return choose_plainly(model_list, model, blocked)

    def __reduce__(self) -> tuple[Any, ...]:
        arguments = {
            "name": self._name,
            "allowed_fails": self._allowed_fails,
            "cooldown_seconds": self._cooldown,
            "segment": self._segment,
        }
        return _remake, (type(self), self._strategy, arguments)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._strategy!r}, name={self._name!r})"


def _remake(kind: type[AdvancedRouter], strategy: str, arguments: dict[str, Any]) -> AdvancedRouter:
    return kind(strategy, **arguments)


class _Unflagged(AdvancedRouter):
    """For get_available_deployment(), which checks the feature flag itself."""

    _checks_flag = False


_routers: dict[tuple[Any, ...], _Unflagged] = {}


def _router(chosen: dict[str, Any]) -> _Unflagged:
    key = tuple(sorted(chosen.items()))
    router = _routers.get(key)
    if router is None:
        router = _Unflagged(**chosen)
        if len(_routers) >= _MOST_ROUTERS:
            _routers.clear()
        _routers[key] = router
    return router


def get_available_deployment(
    model_list: Any,
    model: str,
    blocked_models: Any = None,
    context: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """One of the deployments of ``model``, as :meth:`AdvancedRouter.get_available_deployment`; None
    where none can be used.

    blocked_models: names not to use. context: its ``request_id`` decides, where the feature
    ``rust_routing`` is on for a share of the requests. settings: strategy (default
    ``simple_shuffle``), allowed_fails and cooldown_seconds, as for :class:`AdvancedRouter`; the
    statistics are those of the routers named ``default``. Where no segment can be opened, it picks
    at random, with one warning.
    """
    if context is not None and not isinstance(context, Mapping):
        raise TypeError(f"context must be a dict, not {context!r}")
    request_id = context.get("request_id") if context else None
    chosen = {} if settings is None else _checked(settings)
    if features.is_enabled("rust_routing", request_id):
        try:
            router = _routers.get(()) if not chosen else None
            if router is None:
                router = _router(chosen)
        except exceptions.SegmentError as error:
            features.record_error("rust_routing", error)
        else:
            return router.get_available_deployment(model_list, model, blocked_models)
    return choose_plainly(model_list, model, blocked_models)


def _checked(given: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise TypeError(f"settings must be a dict, not {given!r}")
    for name in given:
        if name not in _SETTINGS:
            settings.warn_once(
                f"get_available_deployment: there is no setting {name!r}, it is ignored; known are "
                f"{', '.join(_SETTINGS)}"
            )
    chosen = {name: given[name] for name in _SETTINGS if name in given}
    _checked_cooldown(**chosen)
    return chosen
