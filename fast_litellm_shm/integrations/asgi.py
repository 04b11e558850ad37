"""ASGI middleware: limits for Starlette, FastAPI, Litestar, Quart and every other ASGI application.

It is pure ASGI and needs no extra package. All workers of the host count together::

    from fast_litellm_shm import TokenBucket
    from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Rule

    app.add_middleware(RateLimitMiddleware, name="shop", rules=[Rule(TokenBucket(100, per=60))])

See docs/web.md, and :class:`Rule` for what a rule can say.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, TypeAlias

from fast_litellm_shm._shared.segment import Segment
from fast_litellm_shm.integrations.web import (
    MARK,
    Middleware,
    Outcome,
    Request,
    Rule,
    client_address,
    client_network,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.cancellation import (
    Client,
    ClientGoneError,
    run_cancellable,
)
from fast_litellm_shm.integrations.web.request import AsgiRequest, asgi_asked
from fast_litellm_shm.integrations.web.responses import (
    TRY_LATER,
    Headers,
    RawHeaders,
    answers_handshake,
    as_bytes,
    problem,
)
from fast_litellm_shm.limiters.grantors import ClusterArgument

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

#: The messages that may end a body. Two of them are extensions, for files.
_ENDS_BODY = ("http.response.body", "http.response.pathsend", "http.response.zerocopysend")


class RateLimitMiddleware(Middleware[App]):
    """Checks each request before ``app`` gets it. The arguments are those of :class:`Middleware`,
    and:

    root_path: the mount point, for an application that sets it itself; default: what the server
    says, and ``FastAPI(root_path=...)``.
    websockets: whether handshakes are checked too; an accepted websocket holds its permit until its
    application has ended.
    in_flight_cancel: cancel the application when the client of a request that holds a permit of
    ``in_flight`` has gone. Otherwise the permit is held until the application ends.
    in_flight_seconds: how long a request may hold such a permit. Then the application is cancelled,
    and the client gets 503, or an incomplete response where one has begun. These two run the
    application in a task of its own, and need asyncio. See "Streaming" in ``docs/web.md``.

    Under a rule with ``wait``, which needs asyncio too, a request waits on the event loop. If its
    client goes meanwhile, it leaves the queue, and the application does not get it.

    A refused request is answered with 429 (or 503) and a JSON body. The result of a check is in
    ``scope["fast_litellm_shm.rate_limit"]``, an :class:`Outcome`. With a cluster, the event loop
    must be one of asyncio; it never waits for the server. Safe before and after a fork.
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
        cluster: ClusterArgument = None,
        websockets: bool = False,
        in_flight_cancel: bool = False,
        in_flight_seconds: float | None = None,
    ) -> None:
        if in_flight_seconds is not None and (
            isinstance(in_flight_seconds, bool)
            or not isinstance(in_flight_seconds, (int, float))
            or not 0 < in_flight_seconds < math.inf
        ):
            raise ValueError(
                f"in_flight_seconds must be a number of seconds above 0, or None, not "
                f"{in_flight_seconds!r}"
            )
        if root_path is not None and not isinstance(root_path, str):
            raise TypeError(f"root_path must be a str or None, not {root_path!r}")
        super().__init__(
            app,
            rules,
            name=name,
            segment=segment,
            on_error=on_error,
            on_cost_error=on_cost_error,
            ambiguous_paths=ambiguous_paths,
            cluster=cluster,
        )
        self._cancel, self._seconds = bool(in_flight_cancel), in_flight_seconds
        self._cancels = self._cancel or in_flight_seconds is not None
        self._root_path = _root_path_of(app) if root_path is None else root_path
        if self._cancels and not any(rule.in_flight for rule in self.rules):
            raise ValueError(
                "in_flight_cancel and in_flight_seconds are for requests of rules with in_flight, "
                "and there is none; add Rule(in_flight=...), or leave them out"
            )
        self._types = ("http", "websocket") if websockets else ("http",)
        self._waits = any(rule.wait for rule in self.rules)
        for rule in () if websockets else self.rules:
            if rule.websockets_only:
                raise ValueError(
                    f"rule {rule.name!r} is for WEBSOCKET, and handshakes are not checked without "
                    "RateLimitMiddleware(..., websockets=True)"
                )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in self._types:
            await self.app(scope, receive, send)
        elif self._waits:
            client = Client(receive)
            try:
                request = AsgiRequest(scope, None, self._root_path)
                try:
                    outcome = await self.check_async(request, client.wait_with)
                except ClientGoneError:
                    return
                await self._serve(outcome, scope, client.receive, send)
            finally:
                await client.close()
        else:
            checked: Any = False
            if self.has_usual and (peer := scope.get("client")):
                checked = self.usual(asgi_asked(scope, self._root_path), peer[0] or None)
            if checked is False:
                checked = self.checked(AsgiRequest(scope, None, self._root_path))
            if checked is None or isinstance(checked, Outcome):
                outcome = checked
            else:
                outcome = await checked
            if outcome is None or outcome.denied or outcome.holds:
                await self._serve(outcome, scope, receive, send)
            else:
                scope[MARK] = outcome
                await self.app(scope, receive, _with_its_headers(outcome, send))

    async def _serve(
        self, outcome: Outcome | None, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if outcome is None:
            await self.app(scope, receive, send)
            return
        try:
            scope[MARK] = outcome
            if outcome.refused:
                await _refuse(outcome, scope, receive, send)
                return
            response = _Response(outcome, send)
            if self._cancels and outcome.holds and not outcome.rule.dry_run:
                await self._run_cancellable(scope, receive, response)
            else:
                await self.app(scope, receive, response.send)
        finally:  # the app failed, was cancelled, or sent no end of its body
            outcome.release()

    async def _run_cancellable(self, scope: Scope, receive: Receive, response: _Response) -> None:
        in_time = await run_cancellable(
            lambda receive: self.app(scope, receive, response.send),
            receive,
            lambda: not response.ended,
            cancel=self._cancel,
            seconds=self._seconds,
        )
        if not in_time and not response.begun and scope["type"] == "http":
            detail = f"The request was given up after {self._seconds:g} s."
            await _respond(response.send, scope, 503, *problem(503, None, detail, None))


def _root_path_of(app: object) -> str:
    """The ``root_path`` that FastAPI writes into the scope, of a FastAPI within ``app``. (Others
    have an attribute of that name too: Quart's is a folder.)"""
    fastapi: Any = sys.modules.get("fastapi")
    for _ in range(0 if fastapi is None else 100):
        if isinstance(app, fastapi.FastAPI):
            return str(app.root_path)
        app = getattr(app, "app", None)  # where a middleware keeps the application that it wraps
    return ""


class _Response:
    """Adds the headers where the application's response begins, and releases the permit where it
    ends. A client that leaves releases nothing: the application may go on, in a thread say."""

    def __init__(self, outcome: Outcome, send: Send) -> None:
        self._outcome, self._send = outcome, send
        self.begun = self.ended = False

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            message = _with_headers(self._outcome, message)
            self.begun = True
        await self._send(message)
        if kind in _ENDS_BODY and not message.get("more_body", False):
            self.ended = True
            self._outcome.release()


def _with_its_headers(outcome: Outcome, send: Send) -> Send:
    """What the application gets as ``send``, where no permit is held: it makes no coroutine of its
    own."""

    def sending(message: Message) -> Awaitable[None]:
        if message["type"] == "http.response.start":
            present = message.get("headers", ())
            message = {**message, "headers": outcome.raw_headers_with(present)}
        return send(message)

    return sending


def _with_headers(outcome: Outcome, message: Message) -> Message:
    """The message that begins a response, with the headers that it has to have."""
    return {**message, "headers": outcome.raw_headers_with(message.get("headers", ()))}


def _raw(headers: Headers) -> RawHeaders:
    return [as_bytes(*field) for field in headers]


async def _refuse(outcome: Outcome, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()  # websocket.connect
        if not answers_handshake(scope):
            await send({"type": "websocket.close", "code": TRY_LATER, "reason": "rate limit"})
            return
    await _respond(send, scope, *outcome.refusal())


async def _respond(send: Send, scope: Scope, status: int, headers: Headers, body: bytes) -> None:
    prefix = "websocket.http" if scope["type"] == "websocket" else "http"
    await send({"type": f"{prefix}.response.start", "status": status, "headers": _raw(headers)})
    body = b"" if scope.get("method") == "HEAD" else body
    await send({"type": f"{prefix}.response.body", "body": body})
