"""ASGI middleware: limits for Starlette, FastAPI, Litestar, Quart, whatever is ASGI.

Pure ASGI, and needs no extra package. All workers of the host count together::

    from fast_litellm_shm import Limit
    from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Rule

    app.add_middleware(RateLimitMiddleware, name="shop", rules=[Rule(Limit(100, per=60))])

See docs/web.md, and :class:`Rule` for what a rule can say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from fast_litellm_shm.integrations.web import (
    Outcome,
    Request,
    Rule,
    client_address,
    forwarded_for,
    header,
)
from fast_litellm_shm.integrations.web.answers import LISTS, TRY_LATER, answers_handshake
from fast_litellm_shm.integrations.web.gate import MARK, Gate
from fast_litellm_shm.integrations.web.request import AsgiRequest
from fast_litellm_shm.segment import Segment

if TYPE_CHECKING:
    from fast_litellm_shm.cluster import Cluster

__all__ = [
    "MARK",
    "Outcome",
    "RateLimitMiddleware",
    "Request",
    "Rule",
    "client_address",
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
    what cannot be checked, because the segment is full or cannot be used. websockets: whether their
    handshakes are asked about as well; an accepted one holds a permit until it is closed.

    cluster: a URL (``redis://host:6379/0``) or a :class:`~fast_litellm_shm.cluster.Cluster`: the
    limits hold over all hosts that name the same server; False: this host alone; default: what
    FAST_LITELLM_SHM_CLUSTER says, else this host alone. See ``docs/cluster.md``. The event loop,
    which must be asyncio's then, never waits for the server.

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
        cluster: Cluster | str | Literal[False] | None = None,
        websockets: bool = False,
    ) -> None:
        self.app = app
        self._gate = Gate(rules, name=name, segment=segment, on_error=on_error, cluster=cluster)
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
        outcome = await self._gate.check_async(AsgiRequest(scope))
        if outcome is None:
            await self.app(scope, receive, send)
            return
        try:
            scope[MARK] = outcome
            if outcome.refused:
                await _refuse(outcome, scope, receive, send)
            else:
                answer = _Answer(outcome, receive, send)
                await self.app(scope, answer.receive, answer.send)
        finally:  # the app failed, was cancelled, or sent no end of its body
            outcome.release()


class _Answer:
    """Adds the headers where the app's answer begins, and lets go of the permit where it ends."""

    def __init__(self, outcome: Outcome, receive: Receive, send: Send) -> None:
        self._outcome, self._receive, self._send = outcome, receive, send

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] in ("http.disconnect", "websocket.disconnect"):
            self._outcome.release()
        return message

    async def send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            present: RawHeaders = list(message.get("headers", ()))
            message = {**message, "headers": present + _missing(self._outcome, present)}
        await self._send(message)
        if kind in _ENDS_BODY and not message.get("more_body", False):
            self._outcome.release()


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
