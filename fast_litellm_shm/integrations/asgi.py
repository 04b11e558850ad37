"""ASGI middleware: limits for Starlette, FastAPI, Litestar, Quart, whatever is ASGI.

Pure ASGI, and needs no extra package. All workers of the host count together::

    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Rule

    app.add_middleware(RateLimitMiddleware, name="shop", rules=[Rule(TokenBucket(100, per=60))])

See docs/web.md, and :class:`Rule` for what a rule can say.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.web import (
    Outcome,
    Request,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.answers import (
    LISTS,
    PROBLEM_TYPE,
    TRY_LATER,
    answers_handshake,
    problem,
)
from fast_litellm_shm.integrations.web.gate import MARK, Gate
from fast_litellm_shm.integrations.web.request import AsgiRequest
from fast_litellm_shm.integrations.web.watch import watched

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster

__all__ = [
    "MARK",
    "Outcome",
    "RateLimitMiddleware",
    "Request",
    "Rule",
    "client_address",
    "client_network",
    "forwarded_for",
    "header",
]

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders: TypeAlias = list[tuple[bytes, bytes]]

#: The messages that may end a body: two of them are extensions, for files.
_ENDS_BODY = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")


class RateLimitMiddleware:
    """Stands before ``app``. rules: the first that matches a request is asked; a request that none
    matches is not limited. name: of the application; whatever has the same name in the same segment
    shares its counts. segment: default ``Segment.default()``. on_error: ``"deny"`` or ``"allow"``
    what cannot be checked, because the segment is full or cannot be used. on_cost_error: ``"deny"``
    requests whose cost function fails, with 503, or ``"count"`` them as 1, for the client's
    address. ambiguous_paths: ``"count"`` a request under each rule that its path may mean, or
    ``"refuse"`` it with 400; see "How a path is read" in ``docs/web.md``. root_path: where the
    application says itself that it is; default: what the server tells, and FastAPI(root_path=...).
    websockets: whether their handshakes are asked about as well; an accepted one holds a permit
    until its application has ended.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limits hold over all hosts that name the same server; False: this host alone; default: what
    FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``. The event loop,
    which must be asyncio's then, never waits for the server.

    in_flight_cancel: cancel the application when the client of a request that holds a permit of
    ``in_flight`` has gone; else the permit is held until the application ends.
    in_flight_seconds: for how long a request may hold one: then the application is cancelled, and
    the client is answered 503, or its answer is cut off where it has begun. Both run the
    application in a task of its own, and need asyncio. See "Streaming" in ``docs/web.md``.

    A refused request is answered with 429 (or 503) and a JSON body. What became of a request is in
    ``scope["fast_litellm_shm.rate_limit"]``, an :class:`Outcome`. Safe before and after a fork.

    Raises ValueError or TypeError for bad arguments, SegmentError where there is no segment,
    ImportError where a cluster is named and the library for it is missing.
    """

    def __init__(
        self,
        app: App,
        rules: Iterable[Rule],
        *,
        name: str,
        segment: Segment | None = None,
        on_error: str = "deny",
        on_cost_error: str = "deny",
        ambiguous_paths: str = "count",
        root_path: str | None = None,
        cluster: Cluster | str | Literal[False] | None = None,
        websockets: bool = False,
        in_flight_cancel: bool = False,
        in_flight_seconds: float | None = None,
    ) -> None:
        self.app = app
        if in_flight_seconds is not None and (
            isinstance(in_flight_seconds, bool)
            or not isinstance(in_flight_seconds, (int, float))
            or not 0 < in_flight_seconds < math.inf
        ):
            raise ValueError(
                f"in_flight_seconds must be a number of seconds above 0, or None, not "
                f"{in_flight_seconds!r}"
            )
        self._cancel, self._seconds = bool(in_flight_cancel), in_flight_seconds
        if root_path is not None and not isinstance(root_path, str):
            raise TypeError(f"root_path must be a str or None, not {root_path!r}")
        self._root_path = _root_path_of(app) if root_path is None else root_path
        self._gate = Gate(
            rules,
            name=name,
            segment=segment,
            on_error=on_error,
            on_cost_error=on_cost_error,
            ambiguous_paths=ambiguous_paths,
            cluster=cluster,
        )
        if (in_flight_cancel or in_flight_seconds is not None) and not any(
            rule.in_flight for rule in self._gate.rules
        ):
            raise ValueError(
                "in_flight_cancel and in_flight_seconds are for requests of rules with in_flight, "
                "and there is none; add Rule(in_flight=...), or leave them out"
            )
        self._types = ("http", "websocket") if websockets else ("http",)
        for rule in () if websockets else self._gate.rules:
            if rule.websockets_only:
                raise ValueError(
                    f"rule {rule.name!r} is for WEBSOCKET, and handshakes are not asked about "
                    "without RateLimitMiddleware(..., websockets=True)"
                )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in self._types:
            await self.app(scope, receive, send)
            return
        outcome = await self._gate.check_async(AsgiRequest(scope, None, self._root_path))
        if outcome is None:
            await self.app(scope, receive, send)
            return
        try:
            scope[MARK] = outcome
            if outcome.refused:
                await _refuse(outcome, scope, receive, send)
            else:
                answer = _Answer(outcome, send)
                ends = self._cancel or self._seconds is not None
                if ends and outcome.holds and not outcome.rule.dry_run:
                    await self._watched(scope, receive, answer)
                else:
                    await self.app(scope, receive, answer.send)
        finally:  # the app failed, was cancelled, or sent no end of its body
            outcome.release()

    async def _watched(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        in_time = await watched(
            lambda receive: self.app(scope, receive, answer.send),
            receive,
            lambda: not answer.ended,
            cancel=self._cancel,
            seconds=self._seconds,
        )
        if not in_time and not answer.begun and scope["type"] == "http":
            await answer.give_up(scope, self._seconds)


def _root_path_of(app: Any) -> str:
    """What FastAPI(root_path=...) writes into the scope, where that stands further in. (Others have
    such an attribute too: Quart's is a folder.)"""
    known: Any = sys.modules.get("fastapi")
    for _ in range(0 if known is None else 100):
        if isinstance(app, known.FastAPI):
            return str(app.root_path)
        app = getattr(app, "app", None)  # as which middlewares keep what they are around
    return ""


class _Answer:
    """Adds the headers where the app's answer begins, and lets go of the permit where it ends. Not
    where the client leaves: what the app does for it then may go on, in a thread say."""

    def __init__(self, outcome: Outcome, send: Send) -> None:
        self._outcome, self._send = outcome, send
        self.begun = self.ended = False

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            present: RawHeaders = list(message.get("headers", ()))
            message = {**message, "headers": present + _missing(self._outcome, present)}
            self.begun = True
        await self._send(message)
        if kind in _ENDS_BODY and not message.get("more_body", False):
            self.ended = True
            self._outcome.release()

    async def give_up(self, scope: Scope, seconds: float | None) -> None:
        """Answer for an application whose time was up."""
        detail = f"The request was given up after {seconds:g} s."
        body = problem(503, None, detail, None)
        fixed = [(b"content-type", PROBLEM_TYPE.encode()), (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": 503, "headers": fixed})
        body = b"" if scope.get("method") == "HEAD" else body
        await self.send({"type": "http.response.body", "body": body})


def _missing(outcome: Outcome, present: RawHeaders) -> RawHeaders:
    """The headers to add. Those that are a list may come twice, from a limit further in; of the
    others the inner one's stands, and so does what the app says itself."""
    there = {name.lower() for name, _ in present}
    found = []
    for name, value in outcome.headers():
        raw = name.lower().encode()
        if name.lower() in LISTS or raw not in there:
            found.append((raw, value.encode()))
    return found


async def _refuse(outcome: Outcome, scope: Scope, receive: Receive, send: Send) -> None:
    status, headers, body = outcome.refusal()
    raw = [(name.lower().encode(), value.encode()) for name, value in headers]
    prefix = "http"
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if not answers_handshake(scope):
            await send({"type": "websocket.close", "code": TRY_LATER, "reason": "rate limit"})
            return
        prefix = "websocket.http"
    await send({"type": f"{prefix}.response.start", "status": status, "headers": raw})
    if scope.get("method") == "HEAD":
        body = b""
    await send({"type": f"{prefix}.response.body", "body": body})
