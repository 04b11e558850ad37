"""An ASGI application that hangs, and does not listen whether its client has gone."""

from __future__ import annotations

import asyncio
import os

from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Receive, Rule, Scope, Send

SECONDS = os.environ.get("SECONDS")


async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":  # lifespan
        raise NotImplementedError
    if scope["path"] != "/before":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = scope["path"] == "/amid"
        await send({"type": "http.response.body", "body": b"a part", "more_body": more})
    if scope["path"] in ("/before", "/amid"):
        await asyncio.Event().wait()


app = RateLimitMiddleware(
    hanging,
    [Rule(path="/ready"), Rule(in_flight=1, key=lambda _: "one")],
    name="hanging",
    in_flight_cancel="CANCEL" in os.environ,
    in_flight_seconds=float(SECONDS) if SECONDS else None,
)
