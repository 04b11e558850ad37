"""An ASGI application that hangs, and does not listen whether its client has gone."""

from __future__ import annotations

import asyncio
import os

from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Receive, Rule, Scope, Send

SECONDS = os.environ.get("SECONDS")
served = 0  # requests


async def hanging(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":  # lifespan
        raise NotImplementedError
    global served
    served += scope["path"] != "/ready"
    if scope["path"] != "/before":
        await send({"type": "http.response.start", "status": 200, "headers": []})
        more = scope["path"] == "/amid"
        body = str(served).encode() if scope["path"] == "/served" else b"a part"
        await send({"type": "http.response.body", "body": body, "more_body": more})
    if scope["path"] in ("/before", "/amid"):
        await asyncio.Event().wait()


app = RateLimitMiddleware(
    hanging,
    [
        Rule(path="/ready"),
        Rule(in_flight=1, key=lambda _: "one", wait=float(os.environ.get("WAIT", "0"))),
    ],
    name="hanging",
    in_flight_cancel="CANCEL" in os.environ,
    in_flight_seconds=float(SECONDS) if SECONDS else None,
)
