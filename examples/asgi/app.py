"""A FastAPI app whose limits hold over all its workers, without a server.

    uvicorn --workers 4 app:app
    curl -i localhost:8000/
    curl -i -H 'X-Api-Key: key-of-ann' localhost:8000/

The middleware is pure ASGI: it wraps any other framework in the same way.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse

from fast_litellm_shm import FixedWindow, TokenBucket
from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Request, Rule, client_address
from fast_litellm_shm.integrations.fastapi import RateLimit

#: The user of each key. A real program keeps hashes of the keys, in its database.
API_KEYS = {"key-of-ann": "ann", "key-of-bob": "bob"}


def caller(request: Request) -> str:
    """A valid key counts by its user, all other requests by address. If nobody checked the header,
    a client would get a fresh limit for each value that it makes up."""
    user = API_KEYS.get(request.header("X-Api-Key") or "")
    return f"user={user}" if user else client_address(request)


app = FastAPI()
app.add_middleware(
    RateLimitMiddleware,
    name="asgi-example",
    rules=[  # the first that matches applies
        Rule(path="/ready"),  # no limits: exempt
        Rule(path="/search"),  # has a dependency of its own
        Rule(path="/stream", in_flight=3, busy_status=503, key=caller),
        Rule(FixedWindow(100, per=3600), TokenBucket(1000, per=1), key=caller),
    ],
)


@app.get("/")
async def index() -> int:
    """Which worker answered."""
    return os.getpid()


@app.get("/ready")
async def ready() -> int:
    """Not limited."""
    return os.getpid()


@app.get("/search", dependencies=[Depends(RateLimit(FixedWindow(5, per=3600), key=caller))])
async def search() -> int:
    """Limited by a dependency."""
    return os.getpid()


@app.get("/stream")
async def stream() -> StreamingResponse:
    """At most three of a caller at once, over all workers, until they end or their clients go."""

    async def parts() -> AsyncIterator[str]:
        while True:
            yield f"{os.getpid()}\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(parts(), media_type="text/plain")
