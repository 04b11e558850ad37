"""A FastAPI app whose limits hold over all its workers, with no server beside them.

    uvicorn --workers 4 app:app
    curl -i localhost:8000/

The middleware is pure ASGI: it stands before any other framework in the same way.
"""

import asyncio
import os
from collections.abc import AsyncIterator

from fastapi import Depends, FastAPI
from fastapi.responses import StreamingResponse

from fast_litellm_shm import Limit, Window
from fast_litellm_shm.integrations.asgi import RateLimitMiddleware, Rule, header
from fast_litellm_shm.integrations.fastapi import RateLimit

app = FastAPI()
app.add_middleware(
    RateLimitMiddleware,
    name="asgi-example",
    rules=[  # the first that matches is asked
        Rule(path="/ready"),  # no limits: exempt
        Rule(path="/search"),  # has a dependency of its own
        Rule(path="/stream", in_flight=3, busy_status=503, key=lambda request: "all"),
        Rule(Window(100, per=3600), Limit(1000, per=1), key=header("X-Api-Key")),
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


@app.get("/search", dependencies=[Depends(RateLimit(Window(5, per=3600), key=header("X-Api-Key")))])
async def search() -> int:
    """Limited by a dependency."""
    return os.getpid()


@app.get("/stream")
async def stream() -> StreamingResponse:
    """At most three at once, over all workers, until they end or their clients go."""

    async def parts() -> AsyncIterator[str]:
        while True:
            yield f"{os.getpid()}\n"
            await asyncio.sleep(0.05)

    return StreamingResponse(parts(), media_type="text/plain")
