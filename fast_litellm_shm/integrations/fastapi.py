"""A FastAPI dependency: a limit for single routes, shared by all workers of the host.

    pip install "fast-litellm-shm[fastapi]"

::

    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.fastapi import RateLimit

    @app.get("/search", dependencies=[Depends(RateLimit(TokenBucket(20, per=60)))])
    async def search(q: str) -> list[str]: ...

The key may be another dependency: ``RateLimit(..., key=Depends(user_id))``. For whole applications,
streaming responses and limits by path, use the middleware:
:mod:`fast_litellm_shm.integrations.asgi`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args

try:
    from fastapi import HTTPException, Response, WebSocketException
    from fastapi.params import Depends
    from fastapi.requests import HTTPConnection
    from starlette.routing import Host, Mount
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.fastapi needs FastAPI: pip install "
        '"fast-litellm-shm[fastapi]"'
    ) from error

from fast_litellm_shm._shared.named_limiter import key_bytes
from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.web import (
    MARK,
    Outcome,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.gate import Gate
from fast_litellm_shm.integrations.web.keys import Key, KeyFunction
from fast_litellm_shm.integrations.web.request import AsgiRequest
from fast_litellm_shm.integrations.web.request import Request as WebRequest
from fast_litellm_shm.integrations.web.responses import LISTS, TRY_LATER, answers_handshake
from fast_litellm_shm.integrations.web.rules import (
    Cost,
    CostFunction,
    PriorityFunction,
    TenantFunction,
    WeightFunction,
)
from fast_litellm_shm.limiters.grantors import ClusterArgument
from fast_litellm_shm.limits import Spelled, checked, describe

__all__ = [
    "MARK",
    "Outcome",
    "RateLimit",
    "client_address",
    "client_network",
    "forwarded_for",
    "header",
]

_MOST_ROUTES = 10_000  # whose mount points one dependency keeps
_LONGEST = 75  # characters of a name: it fits into the segment, and into the names of a cluster


class RateLimit:
    """``Depends(RateLimit(TokenBucket(20, per=60)))``: sets the headers on the response. Raises
    HTTPException 429 with them where the request is denied, and 503 where it cannot be checked,
    with ``on_error="deny"``.

    limits: 1 to 4, as of a rule of the middleware. key, cost: functions of a
    :class:`fast_litellm_shm.integrations.web.Request`, whose ``raw`` is FastAPI's; they may be
    async. The key may also be a dependency, ``key=Depends(user_id)``: FastAPI resolves it, with all
    that it depends on, and it returns a str, bytes or None. If the key is None, the request is not
    limited. name: routes with the same name share
    their counts. By default each route has counts of its own, by its path as the program has it: in
    a sub-application that is mounted at ``/t/{tenant}``, ``/search`` is one route for all tenants.
    Without a name the headers say ``default``.
    wait, tenant, weight, priority, max_waiting: as of a rule of the middleware, which alone notices
    that the client of a waiting request has gone. exempt, dry_run, segment, on_error,
    on_cost_error, cluster: as in the middleware.

    FastAPI adds the headers of a dependency only to responses that it makes itself: a route that
    returns a Response of its own has no such headers, but is limited all the same. For a websocket,
    the handshake is limited. If it is refused, it gets the same 429 if the server can answer a
    handshake so, else it is closed with code 1013.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment,
    ImportError where a cluster is named and the library for it is missing.
    """

    def __init__(
        self,
        *limits: Spelled,
        key: KeyFunction | Depends = client_address,
        cost: Cost | CostFunction = 1,
        name: str | None = None,
        wait: float = 0,
        tenant: TenantFunction | None = None,
        weight: float | WeightFunction = 1.0,
        priority: int | PriorityFunction = 0,
        max_waiting: int | None = None,
        exempt: Collection[str | bytes] = (),
        dry_run: bool = False,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        cluster: ClusterArgument = None,
    ) -> None:
        if not limits:
            raise ValueError("RateLimit needs at least one limit, such as TokenBucket(20, per=60)")
        found = key if isinstance(key, Depends) else None
        if found is not None and found.dependency is None:
            raise TypeError("RateLimit: key=Depends() names no dependency; say Depends(user_id)")
        if found is None and _depends(key):
            name = getattr(key, "__name__", repr(key))
            raise TypeError(
                f"RateLimit: key={name} has parameters that FastAPI is to resolve; say "
                f"key=Depends({name})"
            )
        self.__signature__ = _signature(found)
        if isinstance(key, Depends):
            key = _resolved
        self._key, self._exempt = key, frozenset(map(key_bytes, exempt))
        self._each_route = name is None
        self._mounts: dict[tuple[int, int], tuple[Any, Any, list[tuple[Mount, ...]]]] = {}
        if name is None:  # in the segment: the limits, since dependencies with others count apart
            name = " + ".join(["each route", *map(describe, checked(limits))])
            if len(name) > _LONGEST:
                name = f"each route {hashlib.blake2s(name.encode(), digest_size=16).hexdigest()}"
        rule = Rule(
            *limits,
            key=self._key_of,
            cost=cost,
            wait=wait,
            tenant=tenant,
            weight=weight,
            priority=priority,
            max_waiting=max_waiting,
            dry_run=dry_run,
            name=name,
        )
        if self._each_route:
            rule.public_name = "default"
        self._gate = Gate(
            None,
            [rule],
            name="fastapi",
            segment=segment,
            on_error=on_error,
            on_cost_error=on_cost_error,
            cluster=cluster,
        )

    async def _key_of(self, request: WebRequest) -> Key:
        found = self._key(request)
        key = await found if inspect.isawaitable(found) else found
        if not isinstance(key, (str, bytes)) or key_bytes(key) in self._exempt:
            return None if isinstance(key, (str, bytes)) else key
        if not self._each_route:
            return key
        scope = request.raw.scope
        route = _route(scope)
        where = self._mounted_at(scope) + getattr(route, "path", "")
        methods = ",".join(sorted(getattr(route, "methods", None) or ()))
        return b"%b %b %b" % (methods.encode(), key_bytes(where), key_bytes(key))

    def _mounted_at(self, scope: Mapping[str, Any]) -> str:
        """Where the route's application is mounted, as the program has it: ``/t/{tenant}``, not
        what the client wrote for it."""
        above = scope.get("app_root_path")  # set by a mount
        if above is None:
            return ""
        router, route = scope.get("router"), scope.get("route")
        known = id(router), id(route)
        if known not in self._mounts:  # it keeps the two, so that no other objects get their ids
            if len(self._mounts) >= _MOST_ROUTES:
                self._mounts.clear()
            chains = list(_mounts_above(getattr(router, "routes", ()), route))
            self._mounts[known] = router, route, chains
        chains = self._mounts[known][2]
        if len(chains) > 1:  # one application, mounted twice
            text = scope.get("root_path", "")[len(above) :] + "/"
            chains = [each for each in chains if _leads(each, text)] or chains
        return "".join(mount.path for mount in chains[0]) if chains else ""

    async def __call__(
        self, request: HTTPConnection, response: Response, key: Any = None
    ) -> Outcome | None:
        asked = _Request(request.scope, request)
        asked.key = key
        outcome = await self._gate.check_async(asked)
        if outcome is None:
            return None
        request.scope[MARK] = outcome
        if outcome.refused:
            if request.scope["type"] == "websocket" and not answers_handshake(request.scope):
                raise WebSocketException(TRY_LATER, "rate limit")
            raise HTTPException(outcome.status, outcome.detail, headers=dict(outcome.headers()))
        for name, value in outcome.headers():
            if name.lower() in LISTS:
                response.headers.append(name, value)
            else:  # of several dependencies, the last is the route's own
                response.headers[name] = value
        return outcome


class _Request(AsgiRequest):
    """key: what the dependency returned that gives the key."""

    __slots__ = ("key",)
    key: Any


def _resolved(request: WebRequest) -> Key:
    """The key function where the key is a dependency."""
    assert isinstance(request, _Request)
    found: Key = request.key
    return found


def _depends(key: Any) -> bool:
    """Is the function a dependency that has others, and not a key function?"""
    try:
        try:
            parameters = inspect.signature(key, eval_str=True).parameters.values()
        except NameError:  # of annotations that are for type checkers alone
            parameters = inspect.signature(key).parameters.values()
    except (TypeError, ValueError):  # no Python function
        return False
    found = [x for each in parameters for x in (each.default, *get_args(each.annotation))]
    return any(isinstance(each, Depends) for each in found)


def _signature(dependency: Depends | None) -> inspect.Signature:
    """The parameters of ``RateLimit.__call__``, as FastAPI is to see them: ``key`` is one only
    where a dependency gives it."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    found = [
        inspect.Parameter("request", kind, annotation=HTTPConnection),
        inspect.Parameter("response", kind, annotation=Response),
    ]
    if dependency is not None:
        found.append(inspect.Parameter("key", kind, annotation=Any, default=dependency))
    return inspect.Signature(found)


def _route(scope: Mapping[str, Any]) -> Any:
    """The route; of an included router, with the prefix that it is included at."""
    route = scope.get("route")
    included = (scope.get("fastapi") or {}).get("effective_route_context")
    return included if getattr(included, "original_route", None) is route is not None else route


def _mounts_above(routes: Iterable[Any], route: Any) -> Iterator[tuple[Mount, ...]]:
    """The chains of mount points, from the outermost, that lead to a route."""
    for each in routes:
        if each is route:
            yield ()
        elif hasattr(each, "effective_route_contexts"):  # an included router
            contexts = each.effective_route_contexts()
            yield from _mounts_above(
                (c.starlette_route or c.original_route for c in contexts), route
            )
        elif isinstance(each, (Mount, Host)):
            here = (each,) if isinstance(each, Mount) else ()
            yield from (here + below for below in _mounts_above(each.routes, route))


def _leads(chain: tuple[Mount, ...], text: str) -> bool:
    """Did the request pass this chain? text: what the client wrote for it."""
    for mount in chain:
        match = mount.path_regex.match(text)
        if match is None:
            return False
        text = f"/{match.group('path')}"
    return not text.strip("/")
