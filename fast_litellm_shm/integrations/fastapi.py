"""A FastAPI dependency: a limit for single routes, shared by all workers of the host.

    pip install "fast-litellm-shm[fastapi]"

::

    from fast_litellm_shm import Limit
    from fast_litellm_shm.integrations.fastapi import RateLimit

    @app.get("/search", dependencies=[Depends(RateLimit(Limit(20, per=60)))])
    async def search(q: str) -> list[str]: ...

For whole applications, for streaming answers and for limits by path there is the middleware:
:mod:`fast_litellm_shm.integrations.asgi`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

try:
    from fastapi import HTTPException, Response, WebSocketException
    from fastapi.requests import HTTPConnection
except ImportError as error:
    raise ImportError(
        "fast_litellm_shm.integrations.fastapi needs FastAPI: pip install "
        '"fast-litellm-shm[fastapi]"'
    ) from error

from fast_litellm_shm.handle import key_bytes
from fast_litellm_shm.integrations.web import Outcome, Rule, client_address, forwarded_for, header
from fast_litellm_shm.integrations.web.answers import LISTS, TRY_LATER, answers_handshake
from fast_litellm_shm.integrations.web.gate import MARK, Gate
from fast_litellm_shm.integrations.web.keys import Key, KeyFunction
from fast_litellm_shm.integrations.web.request import AsgiRequest
from fast_litellm_shm.integrations.web.request import Request as WebRequest
from fast_litellm_shm.integrations.web.rules import Cost, CostFunction
from fast_litellm_shm.limits import AnyLimit, describe
from fast_litellm_shm.segment import Segment

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster

__all__ = ["MARK", "Outcome", "RateLimit", "client_address", "forwarded_for", "header"]

_LONGEST = 75  # characters of a name, such that it fits the segment, and a server's limits


class RateLimit:
    """``Depends(RateLimit(Limit(20, per=60)))``: sets the headers on the answer, and raises
    HTTPException 429 with them where the request is denied (503 where it cannot be checked, with
    ``on_error="deny"``).

    limits: 1 to 4. key, cost: functions of a :class:`fast_litellm_shm.integrations.web.Request`,
    whose ``raw`` is FastAPI's; they may be async. name: routes that are given the same name share
    their counts; default: each route counts apart, by its path. exempt, dry_run, segment, on_error,
    cluster: as in the middleware.

    FastAPI adds headers of a dependency only to answers that it makes itself: a route that returns
    a Response of its own has none of them, and is limited all the same. Of a websocket the
    handshake is limited: refused with the same 429 where the server can answer one, else closed
    with code 1013.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment,
    ImportError where a cluster is named and the library for it is missing.
    """

    def __init__(
        self,
        *limits: AnyLimit,
        key: KeyFunction = client_address,
        cost: Cost | CostFunction = 1,
        name: str | None = None,
        exempt: Collection[str | bytes] = (),
        dry_run: bool = False,
        segment: Segment | None = None,
        on_error: str = "deny",
        cluster: Cluster | str | Literal[False] | None = None,
    ) -> None:
        if not limits:
            raise ValueError("RateLimit needs at least one limit, such as Limit(20, per=60)")
        self._key, self._exempt = key, frozenset(map(key_bytes, exempt))
        self._each_route = name is None
        if name is None:  # those of other limits must not have the same one
            name = " + ".join(["each route", *map(describe, limits)])
            if len(name) > _LONGEST:
                name = f"each route {hashlib.blake2s(name.encode(), digest_size=16).hexdigest()}"
        rule = Rule(*limits, key=self._key_of, cost=cost, dry_run=dry_run, name=name)
        self._gate = Gate(
            [rule], name="fastapi", segment=segment, on_error=on_error, cluster=cluster
        )

    async def _key_of(self, request: WebRequest) -> Key:
        found = self._key(request)
        key = await found if inspect.isawaitable(found) else found
        if not isinstance(key, (str, bytes)) or key_bytes(key) in self._exempt:
            return None if isinstance(key, (str, bytes)) else key
        if not self._each_route:
            return key
        route = request.raw.scope.get("route")
        where = request.raw.scope.get("root_path", "") + getattr(route, "path", request.path)
        methods = ",".join(sorted(getattr(route, "methods", None) or ()))
        return b"%b %b %b" % (methods.encode(), key_bytes(where), key_bytes(key))

    async def __call__(self, request: HTTPConnection, response: Response) -> Outcome | None:
        outcome = await self._gate.check_async(AsgiRequest(request.scope, request))
        if outcome is None:
            return None
        request.scope[MARK] = outcome
        if outcome.refused:
            if request.scope["type"] == "websocket" and not answers_handshake(request.scope):
                raise WebSocketException(TRY_LATER, "rate limit")
            status, headers, _ = outcome.refusal()
            kept = {name: value for name, value in headers if not name.startswith("Content-")}
            raise HTTPException(status, outcome.detail, headers=kept)
        for name, value in outcome.headers():
            if name.lower() in LISTS:
                response.headers.append(name, value)
            else:  # of several dependencies the last, which is the route's own
                response.headers[name] = value
        return outcome
